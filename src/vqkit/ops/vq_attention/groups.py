"""One group of blocks of the blocked form: attention weights, output, and their gradients, as batched matrix products.

A group is a run of blocks of some lanes, a lane being one key head of one batch element; long sequences give groups of one lane, short ones
groups of several whole lanes. Softmax is float32 or wider. Products are, too, unless the activations are bfloat16 and the device
multiplies those fast: then their operands and results are bfloat16, as in ordinary attention under autocast.

Shapes: B batch, H key heads, G query heads per key head, N blocks of a group (over its lanes), R blocks, L block length, M window memory,
C codes, K key width, V value width, W = M + L.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vqkit.ops.vq_attention.inputs import cache_bias, window_mask
from vqkit.ops.vq_attention.plan import Plan

GROUP_BYTES = {"cpu": 6 << 20, "cuda": 512 << 20}
"""Working set of a group: on a CPU the share of the last cache level that two cores have, on a GPU enough to fill it."""


class Options(NamedTuple):
    """The choices of `vq_attention` that the blocked form needs."""

    block_len: int
    mem_len: int
    cache: bool
    cache_gradient: bool


class Lanes(NamedTuple):
    """Which batch elements and key heads a group takes; several heads only together with all or one of the batch elements."""

    batch: slice
    heads: slice
    shape: tuple[int, int]  # how many of each

    @property
    def number(self) -> int:
        return self.shape[0] * self.shape[1]


def group_length(options: Options, blocks: int, size: int, group: int, value_dim: int, device: str) -> int:
    """Blocks of one lane that a group takes."""
    return max(1, min(blocks, _capacity(options, size, group, value_dim, device)))


def _capacity(options: Options, size: int, group: int, value_dim: int, device: str) -> int:
    length, memory = options.block_len, options.mem_len
    floats = group * length * (memory + length + size) + (2 * group * length + size) * value_dim
    return GROUP_BYTES.get(device, GROUP_BYTES["cuda"]) // (4 * floats)


def split_lanes(batch: int, heads: int, lanes: int) -> Iterator[Lanes]:
    """All lanes, at most so many at a time."""
    if lanes >= 2 * heads:
        step = lanes // heads
        for b in range(0, batch, step):
            stop = min(b + step, batch)
            yield Lanes(slice(b, stop), slice(0, heads), (stop - b, heads))
        return
    step = max(1, lanes)
    for b in range(batch):
        for h in range(0, heads, step):
            stop = min(h + step, heads)
            yield Lanes(slice(b, b + 1), slice(h, stop), (1, stop - h))


@functools.cache
def _multiplies_bfloat16(device: str) -> bool:
    """Whether products of bfloat16 are faster than those of float32."""
    return device != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def product_type(q: Tensor, k_hat: Tensor, v: Tensor) -> torch.dtype:
    """In which type the products of these tensors are computed."""
    if q.dtype == k_hat.dtype == v.dtype == torch.bfloat16 and _multiplies_bfloat16(q.device.type):
        return torch.bfloat16
    return torch.promote_types(q.dtype, torch.float32)


class Call:
    """The tensors of one call, those of the queries cut into blocks [B, H, R, G, L, width]."""

    def __init__(
        self,
        options: Options,
        plan: Plan,
        q: Tensor,
        k_hat: Tensor,
        v: Tensor,
        query: Tensor | None,
        keys: Tensor | None,
        k_window: Tensor,
        v_window: Tensor,
        codebook: Tensor,
    ) -> None:
        self.options, self.plan = options, plan
        self.heads, self.group = k_hat.shape[1], q.shape[1] // k_hat.shape[1]
        self.dtype, self.wide = product_type(q, k_hat, v), torch.promote_types(q.dtype, torch.float32)
        self.q, self.k_hat, self.v = self.in_blocks(q), k_hat, v
        self.query = None if query is None else self.in_blocks(query)
        self.keys = None if keys is None else keys.flip(1).to(self.dtype)  # by falling distance, as the window lies
        self.k_window, self.v_window, self.codebook = k_window, v_window, codebook.to(self.dtype)
        seen = window_mask(options.block_len, options.mem_len, options.cache, q.device)
        mask = torch.zeros(seen.shape, dtype=self.wide, device=q.device).masked_fill_(~seen, -torch.inf)
        self.mask = mask.repeat(self.group, 1)[None]  # [1, G L, W]
        sizes = (options, plan.blocks, codebook.shape[1], self.group, v.shape[-1], q.device.type)
        self.length = group_length(*sizes)
        self.lanes = list(split_lanes(q.shape[0], self.heads, _capacity(options, *sizes[2:]) // self.length))
        self.runs = [(first, min(first + self.length, plan.blocks)) for first in range(0, plan.blocks, self.length)]

    def in_blocks(self, x: Tensor) -> Tensor:
        """[B, H G, R L, width] -> [B, H, R, G, L, width], a view."""
        return x.unflatten(2, (-1, self.options.block_len)).unflatten(1, (-1, self.group)).transpose(2, 3)


class Group:
    """Blocks first .. last - 1 of some lanes."""

    def __init__(self, call: Call, lanes: Lanes, first: int, last: int) -> None:
        self.call, self.lanes, self.first, self.last = call, lanes, first, last
        self.length = last - first
        self.blocks = lanes.number * self.length
        self.at = (lanes.batch, lanes.heads, slice(first, last))
        self.grid = (*lanes.shape, self.length)
        self.window = call.options.mem_len + call.options.block_len

    def of_queries(self, x: Tensor) -> Tensor:
        """[B, H, R, G, L, width] -> [N, G L, width]."""
        return x[self.at].reshape(self.blocks, -1, x.shape[-1]).to(self.call.dtype)

    def extended(self, window: Tensor, x: Tensor) -> Tensor:
        """Tokens [lanes, M + length L, width] from M before the first block on; those older than the call come from the state's window."""
        length, memory = self.call.options.block_len, self.call.options.mem_len
        start, stop = self.first * length - memory, self.last * length
        x, window = x[self.at[:2]], window[self.at[:2]]
        part = x[:, :, start:stop] if start >= 0 else torch.cat([window[:, :, start + memory :], x[:, :, :stop]], 2)
        return part.reshape(self.lanes.number, part.shape[2], part.shape[3]).to(self.call.dtype)

    def put(self, out: Tensor, x: Tensor) -> None:
        """[N, G L, width] or [N G, L, width] -> its place in [B, H, R, G, L, width]."""
        out[self.at] = x.view(*self.grid, *out.shape[3:])

    def add_to_windows(self, out: Tensor, x: Tensor, start: int) -> None:
        """Add x [N, W - start, width], windows without their first columns, to the extended tokens [B, H, M + R L, width]."""
        length, columns = self.call.options.block_len, x.shape[1]
        out = out[*self.at[:2], self.first * length + start :]
        x = x.view(*self.grid, columns, -1)
        *lanes, row, column = out.stride()
        for at in range(0, columns, length):  # pieces of one length do not overlap
            piece = x[..., at : at + length, :]
            out.as_strided(piece.shape, (*lanes, length * row, row, column), out.storage_offset() + at * row).add_(piece)

    def windows(self, extended: Tensor) -> Tensor:
        """Overlapping windows [N, W, width] of `extended`, without a copy where there is one lane."""
        lane, row, column = extended.stride()
        shape = (extended.shape[0], self.length, self.window, extended.shape[2])
        view = extended.as_strided(shape, (lane, self.call.options.block_len * row, row, column), extended.storage_offset())
        return view.reshape(self.blocks, *shape[2:])

    def for_blocks(self, x: Tensor, copies: int = 1) -> Tensor:
        """What belongs to a head [H, rows, width] -> [N copies, rows, width], without a copy where the group has one head."""
        x = x[None, self.lanes.heads, None].expand(*self.grid[:2], self.length * copies, *x.shape[1:])
        return x.reshape(-1, *x.shape[3:])

    def weights(self, q: Tensor, k_windows: Tensor) -> Tensor:
        """Attention weights [N, G L, W + C]: the window, then the codes."""
        call, window = self.call, self.window
        size = call.codebook.shape[1] if call.options.cache else 0
        scores = q.new_empty(self.blocks, q.shape[1], window + size, dtype=call.wide)
        _add_product(scores[..., :window], call.mask, q, k_windows.mT)
        if call.query is not None and call.keys is not None:
            near = self.band(scores)
            near += self.near_queries(call.query) @ self.for_blocks(call.keys, call.group).mT
        if size:
            bias = cache_bias(call.plan.counts[self.at]).to(call.wide).view(self.blocks, 1, size)
            _add_product(scores[..., window:], bias, q, self.for_blocks(call.codebook).mT)
        self._hide(scores)
        return torch.softmax(scores, -1)

    def near_queries(self, query: Tensor) -> Tensor:
        """[B, H, R, G, L, K] -> [N G, L, K]."""
        return query[self.at].reshape(-1, *query.shape[-2:]).to(self.call.dtype)

    def band(self, scores: Tensor) -> Tensor:
        """The view [N G, L, M + 1] of scores (or their gradient) of keys at distances M .. 0: row i begins at column i."""
        length, row = self.call.options.block_len, scores.shape[-1]
        shape = (self.blocks * self.call.group, length, self.call.options.mem_len + 1)
        return scores.as_strided(shape, (length * row, row + 1, 1), scores.storage_offset())

    def _hide(self, scores: Tensor) -> None:
        """Mask what is not there or belongs to another document."""
        plan, length, memory = self.call.plan, self.call.options.block_len, self.call.options.mem_len
        scores = scores.view(*self.grid, self.call.group, length, -1)
        for g, r in enumerate(range(self.first, self.last)):
            if r * length >= memory:
                break
            absent = ~plan.present[*self.at[:2], r * length :]
            scores[:, :, g, ..., : memory - r * length].masked_fill_(absent[:, :, None, None], -torch.inf)
        if plan.query_segment is None or plan.key_segment is None or plan.cached_segment is None:
            return
        queries = plan.query_segment[self.lanes.batch, None, self.first : self.last, None, :, None]
        keys = plan.key_segment[self.lanes.batch, self.first * length :]
        keys = keys.as_strided((keys.shape[0], self.length, self.window), (keys.stride(0), length, 1), keys.storage_offset())
        scores[..., : self.window].masked_fill_(queries != keys[:, None, :, None, None], -torch.inf)
        if self.call.options.cache:
            cached = plan.cached_segment[self.lanes.batch, None, self.first : self.last, None, None, None]
            scores[..., self.window :].masked_fill_(queries != cached, -torch.inf)


def _add_product(out: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> None:
    """out = bias + a @ b, the sum in the type of `out`."""
    if a.dtype == out.dtype:
        torch.baddbmm(bias, a, b, out=out)
    else:
        torch.add(bias, a @ b, out=out)


def _product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b."""
    if a.dtype == out.dtype:
        torch.bmm(a, b, out=out)
    else:
        out.copy_(a @ b)


def attend(group: Group, means: Tensor, v_extended: Tensor, output: Tensor) -> None:
    """Write the output [B, H, R, G, L, V] of a group; means [N, C, V]."""
    call, window = group.call, group.window
    k_windows = group.windows(group.extended(call.k_window, call.k_hat))
    weights = group.weights(group.of_queries(call.q), k_windows).to(call.dtype)
    result = weights[..., :window] @ group.windows(v_extended)
    if call.options.cache:
        result.baddbmm_(weights[..., window:], means.to(call.dtype))
    group.put(output, result)


class Gradients:
    """What the backward pass adds up; times of keys and values are extended, the state's window first."""

    def __init__(self, call: Call, q: Tensor, k_hat: Tensor, v: Tensor, query: Tensor | None, keys: Tensor | None) -> None:
        batch, heads, time, key_dim = k_hat.shape
        extended = (batch, heads, call.options.mem_len + time)
        self.q = torch.empty_like(q)
        self.k = k_hat.new_zeros(*extended, key_dim, dtype=call.wide)
        self.v = v.new_zeros(*extended, v.shape[-1], dtype=call.wide)
        self.query = q.new_empty(0) if query is None else torch.empty_like(query)
        self.keys = q.new_zeros(0 if keys is None else keys.shape, dtype=call.wide)  # by falling distance


def attend_backward(group: Group, grads: Gradients, means: Tensor, v_extended: Tensor, grad_output: Tensor) -> Tensor | None:
    """Gradients of a group; returns those of its means [N, C, V], where any are wanted. grad_output [B, H, R, G, L, V]."""
    call, window = group.call, group.window
    k_windows = group.windows(group.extended(call.k_window, call.k_hat))
    q, grad_out = group.of_queries(call.q), group.of_queries(grad_output)
    weights = group.weights(q, k_windows)

    grad_weights = torch.empty_like(weights)
    _product(grad_weights[..., :window], grad_out, group.windows(v_extended).mT)
    if call.options.cache:
        _product(grad_weights[..., window:], grad_out, means.to(call.dtype).mT)
    grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype).to(call.dtype)
    weights = weights.to(call.dtype)

    grad_q = grad_scores[..., :window] @ k_windows
    if call.options.cache:
        grad_q.baddbmm_(grad_scores[..., window:], group.for_blocks(call.codebook))
    group.put(call.in_blocks(grads.q), grad_q)
    if call.query is not None and call.keys is not None:
        _near_backward(group, grads, group.band(grad_scores), call.query, call.keys)
    seen = slice(0 if call.options.cache_gradient else call.options.mem_len, window)
    group.add_to_windows(grads.k, grad_scores[..., seen].mT @ q, seen.start)
    group.add_to_windows(grads.v, weights[..., seen].mT @ grad_out, seen.start)
    if call.options.cache and call.options.cache_gradient:
        return (weights[..., window:].mT @ grad_out).to(call.wide)
    return None


def _near_backward(group: Group, grads: Gradients, near: Tensor, query: Tensor, keys: Tensor) -> None:
    """Gradients of the positional term; near [N G, L, M + 1]."""
    grad_query = near @ group.for_blocks(keys, group.call.group)
    group.put(group.call.in_blocks(grads.query), grad_query)
    grad_keys = near.mT @ group.near_queries(query)
    grads.keys[group.lanes.heads] += grad_keys.view(*group.lanes.shape, -1, *grad_keys.shape[1:]).sum((0, 2), dtype=grads.keys.dtype)
