"""VQ attention over groups of blocks that stay in cache: batched matrix products, forward and backward written out.

Block r holds the queries rL .. rL + L - 1. Its window is the M keys before it and its own L; everything older it sees
as `sums[r] / counts[r]`, a prefix sum over the values that have left the window, with resets where the document
changes. Only the prefix sums at the borders of groups are kept for the backward pass; within a group they, and the
attention weights, are computed again, which costs less than moving them through memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqkit.ops.vq_attention.inputs import AttentionInputs, Positions, cache_bias, next_window, window_mask
from vqkit.ops.vq_attention.recurrent import recurrent_attention
from vqkit.ops.vq_attention.state import AttentionState

GROUP_BYTES = 6 << 20
"""Working set of a group of blocks: scores, values, outputs and mean values, sized for the last cache level of two cores."""


def blocked_attention(
    inputs: AttentionInputs, state: AttentionState, block_len: int, mem_len: int, cache: bool, cache_gradient: bool
) -> tuple[Tensor, AttentionState]:
    """See `vq_attention`. The tokens after the last whole block go through the recurrent form."""
    if inputs.group > 1:
        return _by_query_head(inputs, state, block_len, mem_len, cache, cache_gradient)
    time = inputs.q.shape[2]
    whole = time // block_len * block_len
    if whole == 0:
        return recurrent_attention(inputs, state, block_len, mem_len, cache, cache_gradient)
    blocks = inputs if whole == time else inputs.slice(0, whole)
    output, state = _whole_blocks(blocks, state, block_len, mem_len, cache, cache_gradient)
    if whole == time:
        return output, state
    rest, state = recurrent_attention(inputs.slice(whole, time), state, block_len, mem_len, cache, cache_gradient)
    return torch.cat([output, rest], 2), state


def _by_query_head(
    inputs: AttentionInputs, state: AttentionState, block_len: int, mem_len: int, cache: bool, cache_gradient: bool
) -> tuple[Tensor, AttentionState]:
    """Every query head with a copy of its key head."""
    group, positions = inputs.group, inputs.positions
    repeated = AttentionInputs(
        q=inputs.q,
        k_hat=inputs.k_hat.repeat_interleave(group, 1),
        v=inputs.v.repeat_interleave(group, 1),
        indices=inputs.indices.repeat_interleave(group, 1),
        codebook=inputs.codebook.repeat_interleave(group, 0),
        positions=positions and Positions(positions.query, positions.keys.repeat_interleave(group, 0)),
        segments=inputs.segments,
    )
    by_head = ("k_hat", "v", "indices", "count", "mean")
    before = state._replace(**{name: getattr(state, name).repeat_interleave(group, 1) for name in by_head})
    output, after = blocked_attention(repeated, before, block_len, mem_len, cache, cache_gradient)
    return output, after._replace(**{name: getattr(after, name)[:, ::group].contiguous() for name in by_head})


class Plan(NamedTuple):
    """What does not depend on floats that carry gradients. R blocks; extended time is the window of the state, then the call."""

    block_len: int
    mem_len: int
    group: int  # blocks per group
    cache: bool
    cache_gradient: bool
    indices: Tensor  # [B, H, R L] code of each token that leaves the window, C for none
    counts: Tensor  # [B, H, R + 1, C] what block r finds in the cache
    present: Tensor  # [B, H, M + R L] whether there is a token
    query_segment: Tensor | None  # [B, R L]
    key_segment: Tensor | None  # [B, M + R L]
    cached_segment: Tensor | None  # [B, R + 1]
    keep: Tensor | None  # [B, R] 1 where the cache lives on after block r, 0 where another document begins


def _whole_blocks(
    inputs: AttentionInputs, state: AttentionState, block_len: int, mem_len: int, cache: bool, cache_gradient: bool
) -> tuple[Tensor, AttentionState]:
    plan = _plan(inputs, state, block_len, mem_len, cache, cache_gradient)
    positions = inputs.positions
    output, mean = _BlockedAttention.apply(
        inputs.q,
        inputs.k_hat,
        inputs.v,
        positions and positions.query,
        positions and positions.keys,
        state.k_hat,
        state.v,
        state.mean,
        inputs.codebook,
        plan,
    )
    time = inputs.q.shape[2]
    k_window, v_window, index_window, segment_window = next_window(inputs, state)
    segment = torch.cat([state.segment, inputs.segment_ids()], 1)
    return output, AttentionState(
        k_window, v_window, index_window, plan.counts[:, :, -1].clone(), mean, segment_window, segment[:, time - 1].clone()
    )


def _plan(inputs: AttentionInputs, state: AttentionState, block_len: int, mem_len: int, cache: bool, cache_gradient: bool) -> Plan:
    batch, heads, time, _ = inputs.q.shape
    size = inputs.codebook.shape[1]
    blocks = time // block_len
    extended = torch.cat([state.indices, inputs.indices], 2)
    leaving = extended[:, :, :time]
    leaving = torch.where(leaving < 0, size, leaving)
    key_segment = cached_segment = keep = None
    if inputs.segments is not None:
        key_segment = torch.cat([state.segment, inputs.segments], 1)
        last_left = key_segment[:, block_len - 1 : time : block_len]
        cached_segment = torch.cat([state.cached_segment[:, None], last_left], 1)
        keep = (cached_segment[:, 1:] == cached_segment[:, :-1]).to(state.count.dtype)
        other = key_segment[:, :time] != last_left.repeat_interleave(block_len, 1)
        leaving = leaving.masked_fill(other[:, None], size)
    gained = state.count.new_zeros(batch, heads, blocks, size + 1)
    gained.scatter_add_(3, leaving.unflatten(2, (blocks, block_len)), gained.new_ones(()).expand(batch, heads, blocks, block_len))
    counts = _running_counts(state.count, gained[..., :size], keep)
    unit = 4 * (block_len * (mem_len + block_len + size) + (2 * block_len + size) * inputs.v.shape[-1])
    group = max(1, min(blocks, GROUP_BYTES // unit))
    present = extended >= 0
    return Plan(
        block_len, mem_len, group, cache, cache_gradient, leaving, counts, present, inputs.segments, key_segment, cached_segment, keep
    )


def _running_counts(start: Tensor, gained: Tensor, keep: Tensor | None) -> Tensor:
    """Counts [B, H, R + 1, C] before each block and after the last."""
    if keep is None:
        return torch.cat([start[:, :, None], gained], 2).cumsum(2)
    counts = [start]
    for r in range(gained.shape[2]):
        counts.append(counts[-1] * keep[:, None, r, None] + gained[:, :, r])
    return torch.stack(counts, 2)


class _Lane:
    """One head of one batch element: views of its tensors and the steps that forward and backward share."""

    def __init__(
        self,
        plan: Plan,
        b: int,
        h: int,
        q: Tensor,
        k_hat: Tensor,
        v: Tensor,
        query: Tensor | None,
        keys: Tensor | None,
        k_window: Tensor,
        v_window: Tensor,
        codebook: Tensor,
    ) -> None:
        self.plan = plan
        self.wide = torch.promote_types(q.dtype, torch.float32)
        self.q, self.k_hat, self.v = q[b, h], k_hat[b, h], v[b, h]
        self.k_window, self.v_window = k_window[b, h], v_window[b, h]
        self.query = None if query is None else query[b, h]
        self.keys = None if keys is None else keys[h].to(self.wide).flip(0)  # by falling distance, as the window lies
        self.codebook = codebook[h].to(self.wide)
        self.indices, self.counts, self.present = plan.indices[b, h], plan.counts[b, h], plan.present[b, h]
        self.query_segment = None if plan.query_segment is None else plan.query_segment[b]
        self.key_segment = None if plan.key_segment is None else plan.key_segment[b]
        self.cached_segment = None if plan.cached_segment is None else plan.cached_segment[b]
        self.keep = None if plan.keep is None else plan.keep[b]

    def blocks(self, x: Tensor, first: int, last: int) -> Tensor:
        """Tokens of blocks first .. last - 1 as [G, L, ...]."""
        length = self.plan.block_len
        return x[first * length : last * length].unflatten(0, (last - first, length)).to(self.wide)

    def extended(self, window: Tensor, x: Tensor, first: int, last: int) -> Tensor:
        """Tokens from M before block first to the end of block last - 1, from the state's window where they are older than the call."""
        length, memory = self.plan.block_len, self.plan.mem_len
        start = first * length - memory
        if start >= 0:
            return x[start : last * length].to(self.wide)
        return torch.cat([window[start + memory :], x[: last * length]]).to(self.wide).contiguous()

    def windows(self, extended: Tensor, blocks: int) -> Tensor:
        """Overlapping windows [G, M + L, ...] of consecutive blocks, as a view."""
        length, memory = self.plan.block_len, self.plan.mem_len
        row, column = extended.stride()
        return extended.as_strided((blocks, memory + length, extended.shape[1]), (length * row, row, column), extended.storage_offset())

    def means(self, sums: Tensor, v_extended: Tensor, first: int, last: int) -> Tensor:
        """Mean values [G, C, V] that each block finds; moves the running `sums` [C + 1, V] to the end of the group.

        The last row of `sums` collects the tokens that must not count.
        """
        length = self.plan.block_len
        inverse = self.counts[first:last].clamp(min=1).reciprocal()
        means = sums.new_empty(last - first, sums.shape[0] - 1, sums.shape[1])
        for g, r in enumerate(range(first, last)):
            torch.mul(sums[:-1], inverse[g, :, None], out=means[g])
            if self.keep is not None:
                sums.mul_(self.keep[r])
            sums.index_add_(0, self.indices[r * length : (r + 1) * length], v_extended[g * length : (g + 1) * length].to(sums.dtype))
        return means

    def weights(self, q: Tensor, k_windows: Tensor, mask: Tensor, first: int, last: int) -> Tensor:
        """Attention weights [G, L, M + L + C]: the window, then the codes."""
        plan = self.plan
        blocks, length = q.shape[:2]
        window = plan.mem_len + length
        scores = q.new_empty(blocks, length, window + (self.codebook.shape[0] if plan.cache else 0))
        torch.baddbmm(mask, q, k_windows.mT, out=scores[..., :window])
        if self.query is not None and self.keys is not None:
            near = self.band(scores)
            near += self.blocks(self.query, first, last) @ self.keys.mT
        self._hide(scores[..., :window], first, last)
        if plan.cache:
            bias = cache_bias(self.counts[first:last]).to(q.dtype)[:, None]
            torch.baddbmm(bias, q, self.codebook.mT.expand(blocks, -1, -1), out=scores[..., window:])
            if self.query_segment is not None and self.cached_segment is not None:
                other = self.blocks_of(self.query_segment, first, last) != self.cached_segment[first:last, None]
                scores[..., window:].masked_fill_(other[..., None], -torch.inf)
        return torch.softmax(scores, -1)

    def blocks_of(self, ids: Tensor, first: int, last: int) -> Tensor:
        length = self.plan.block_len
        return ids[first * length : last * length].unflatten(0, (last - first, length))

    def band(self, scores: Tensor) -> Tensor:
        """The view [G, L, M + 1] of scores (or their gradient) of keys at distances M .. 0: row i begins at column i."""
        batch, row, column = scores.stride()
        shape = (*scores.shape[:2], self.plan.mem_len + 1)
        return scores.as_strided(shape, (batch, row + column, column), scores.storage_offset())

    def _hide(self, scores: Tensor, first: int, last: int) -> None:
        """Mask what is not there or belongs to another document."""
        length, memory = self.plan.block_len, self.plan.mem_len
        window = memory + length
        for g, r in enumerate(range(first, last)):
            if r * length >= memory:
                break
            scores[g].masked_fill_(~self.present[r * length : r * length + window], -torch.inf)
        if self.query_segment is not None and self.key_segment is not None:
            keys = self.key_segment[first * length : last * length + memory]
            keys = keys.as_strided((last - first, 1, window), (length, 0, 1), keys.storage_offset())
            scores.masked_fill_(self.blocks_of(self.query_segment, first, last)[..., None] != keys, -torch.inf)


def _causal_mask(plan: Plan, like: Tensor) -> Tensor:
    """[1, L, M + L]: 0 for keys that a query may see as far as time goes, else -inf."""
    length, memory = plan.block_len, plan.mem_len
    seen = window_mask(length, memory, plan.cache, like.device)
    wide = torch.promote_types(like.dtype, torch.float32)
    return torch.zeros(1, length, memory + length, dtype=wide, device=like.device).masked_fill_(~seen, -torch.inf)


def _groups(plan: Plan) -> list[tuple[int, int]]:
    blocks = plan.counts.shape[2] - 1
    return [(first, min(first + plan.group, blocks)) for first in range(0, blocks, plan.group)]


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k_hat: Tensor,
        v: Tensor,
        query: Tensor | None,
        keys: Tensor | None,
        k_window: Tensor,
        v_window: Tensor,
        mean: Tensor,
        codebook: Tensor,
        plan: Plan,
    ) -> tuple[Tensor, Tensor]:
        batch, heads, time, _ = q.shape
        width = v.shape[-1]
        mask = _causal_mask(plan, q)
        groups = _groups(plan)
        output = v.new_empty(batch, time, heads, width).transpose(1, 2)
        sums = mean.new_zeros(batch, heads, mean.shape[2] + 1, width)
        torch.mul(mean, plan.counts[:, :, 0, :, None], out=sums[:, :, :-1])
        borders = sums.new_empty(len(groups), *sums.shape)
        for b in range(batch):
            for h in range(heads):
                lane = _Lane(plan, b, h, q, k_hat, v, query, keys, k_window, v_window, codebook)
                for n, (first, last) in enumerate(groups):
                    borders[n, b, h] = sums[b, h]
                    _forward_group(lane, mask, sums[b, h], output[b, h], first, last)
        ctx.save_for_backward(q, k_hat, v, query, keys, k_window, v_window, codebook, borders)
        ctx.plan = plan
        return output, sums[:, :, :-1] / plan.counts[:, :, -1].clamp(min=1)[..., None]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_output, grad_mean = grad_outputs
        q, k_hat, v, query, keys, k_window, v_window, codebook, borders = ctx.saved_tensors
        plan: Plan = ctx.plan
        grads = _Gradients(plan, q, v, query, keys, grad_mean)
        mask = _causal_mask(plan, q)
        for b in range(q.shape[0]):
            for h in range(q.shape[1]):
                lane = _Lane(plan, b, h, q, k_hat, v, query, keys, k_window, v_window, codebook)
                for n, (first, last) in reversed(list(enumerate(_groups(plan)))):
                    _backward_group(lane, grads, mask, borders[n, b, h].clone(), grad_output[b, h], b, h, first, last)
        return grads.result(q, v, query, keys)


def _forward_group(lane: _Lane, mask: Tensor, sums: Tensor, output: Tensor, first: int, last: int) -> None:
    blocks, window = last - first, lane.plan.mem_len + lane.plan.block_len
    v_extended = lane.extended(lane.v_window, lane.v, first, last)
    k_windows = lane.windows(lane.extended(lane.k_window, lane.k_hat, first, last), blocks)
    means = lane.means(sums, v_extended, first, last)
    weights = lane.weights(lane.blocks(lane.q, first, last), k_windows, mask, first, last)
    result = weights[..., :window] @ lane.windows(v_extended, blocks)
    if lane.plan.cache:
        result.baddbmm_(weights[..., window:], means.to(result.dtype))
    output[first * lane.plan.block_len : last * lane.plan.block_len] = result.flatten(0, 1)


class _Gradients:
    """Accumulators of the backward pass; times are extended, the state's window first."""

    def __init__(self, plan: Plan, q: Tensor, v: Tensor, query: Tensor | None, keys: Tensor | None, grad_mean: Tensor) -> None:
        batch, heads, time, key_dim = q.shape
        wide = torch.promote_types(q.dtype, torch.float32)
        extended = (batch, heads, plan.mem_len + time)
        self.q = q.new_empty(q.shape, dtype=wide)
        self.k = q.new_zeros(*extended, key_dim, dtype=wide)
        self.v = v.new_zeros(*extended, v.shape[-1], dtype=wide)
        self.query = None if query is None else q.new_empty(query.shape, dtype=wide)
        self.keys = None if keys is None else q.new_zeros(keys.shape, dtype=wide)  # by falling distance
        # Gradient of the sums after the block at hand; the row of tokens that do not count stays 0.
        self.sums = grad_mean.new_zeros(batch, heads, grad_mean.shape[2] + 1, grad_mean.shape[3])
        torch.div(grad_mean, plan.counts[:, :, -1].clamp(min=1)[..., None], out=self.sums[:, :, :-1])
        self.plan = plan

    def result(self, q: Tensor, v: Tensor, query: Tensor | None, keys: Tensor | None) -> tuple[Tensor | None, ...]:
        memory = self.plan.mem_len
        grad_mean = self.sums[:, :, :-1] * self.plan.counts[:, :, 0, :, None]
        window = (self.k[:, :, :memory].to(q.dtype), self.v[:, :, :memory].to(v.dtype), grad_mean)
        if not self.plan.cache_gradient:
            window = (None, None, None)
        grad_query = None if query is None or self.query is None else self.query.to(query.dtype)
        grad_keys = None if keys is None or self.keys is None else self.keys.flip(1).to(keys.dtype)
        own = (self.q.to(q.dtype), self.k[:, :, memory:].to(q.dtype), self.v[:, :, memory:].to(v.dtype))
        return *own, grad_query, grad_keys, *window, None, None


def _backward_group(
    lane: _Lane, grads: _Gradients, mask: Tensor, sums: Tensor, grad_output: Tensor, b: int, h: int, first: int, last: int
) -> None:
    plan = lane.plan
    length, memory = plan.block_len, plan.mem_len
    blocks, window = last - first, memory + length
    tokens = slice(first * length, last * length)
    v_extended = lane.extended(lane.v_window, lane.v, first, last)
    k_windows = lane.windows(lane.extended(lane.k_window, lane.k_hat, first, last), blocks)
    means = lane.means(sums, v_extended, first, last)
    q = lane.blocks(lane.q, first, last)
    weights = lane.weights(q, k_windows, mask, first, last)
    grad_out = lane.blocks(grad_output, first, last)

    grad_weights = torch.empty_like(weights)
    torch.bmm(grad_out, lane.windows(v_extended, blocks).mT, out=grad_weights[..., :window])
    if plan.cache:
        torch.bmm(grad_out, means.to(grad_out.dtype).mT, out=grad_weights[..., window:])
    grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)

    grad_q = grads.q[b, h, tokens].view(blocks, length, -1)
    torch.bmm(grad_scores[..., :window], k_windows, out=grad_q)
    if plan.cache:
        grad_q.baddbmm_(grad_scores[..., window:], lane.codebook.expand(blocks, -1, -1))
    if lane.query is not None and lane.keys is not None and grads.query is not None and grads.keys is not None:
        near = lane.band(grad_scores)
        grads.query[b, h, tokens] = (near @ lane.keys).flatten(0, 1)
        grads.keys[h] += (near.mT @ lane.blocks(lane.query, first, last)).sum(0)

    _backward_values(lane, grads, q, grad_out, weights, grad_scores, b, h, first, last)


def _backward_values(
    lane: _Lane, grads: _Gradients, q: Tensor, grad_out: Tensor, weights: Tensor, grad_scores: Tensor, b: int, h: int, first: int, last: int
) -> None:
    """Gradients of keys and values, block by block from the last, with the gradient of the prefix sums carried back."""
    plan = lane.plan
    length, memory = plan.block_len, plan.mem_len
    window = memory + length
    grad_k, grad_v, grad_sums = grads.k[b, h], grads.v[b, h], grads.sums[b, h]
    seen = slice(0 if plan.cache_gradient else memory, window)
    for g, r in reversed(list(enumerate(range(first, last)))):
        keys = slice(r * length + seen.start, r * length + window)
        grad_k[keys].addmm_(grad_scores[g, :, seen].mT, q[g])
        grad_v[keys].addmm_(weights[g, :, seen].mT, grad_out[g])
        if not plan.cache_gradient:
            continue
        left = slice(r * length, (r + 1) * length)
        grad_v[left] += grad_sums.index_select(0, lane.indices[left]).to(grad_v.dtype)
        if lane.keep is not None:
            grad_sums.mul_(lane.keep[r])
        if plan.cache:
            grad_means = weights[g, :, window:].mT @ grad_out[g]
            grad_sums[:-1].addcmul_(grad_means.to(grad_sums.dtype), lane.counts[r].clamp(min=1).reciprocal()[:, None])
