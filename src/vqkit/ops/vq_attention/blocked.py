"""VQ attention over groups of blocks that stay in cache: one operator forward, one backward, both opaque to the compiler.

Block r holds the queries rL .. rL + L - 1. Its window is the M keys before it and its own L; everything older it sees as one mean value
per code and its count. Attention weights are computed again in the backward pass, and so are the means: only the prefix sums at the borders
of groups are kept, unless a reduction is asked for that holds the means of all blocks at once.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from vqkit.ops.vq_attention.groups import Call, Gradients, Group, Options, attend, attend_backward, group_length
from vqkit.ops.vq_attention.inputs import AttentionInputs, next_window
from vqkit.ops.vq_attention.plan import make_plan
from vqkit.ops.vq_attention.recurrent import recurrent_attention
from vqkit.ops.vq_attention.reductions import SCANS, Held, Running
from vqkit.ops.vq_attention.state import AttentionState

ReductionName: TypeAlias = Literal["auto", "serial", "matmul", "associative"]
_TENSORS = 15
"""How many arguments of the operator are tensors, or None."""


def blocked_attention(
    inputs: AttentionInputs,
    state: AttentionState,
    block_len: int,
    mem_len: int,
    cache: bool,
    cache_gradient: bool,
    reduction: ReductionName = "auto",
) -> tuple[Tensor, AttentionState]:
    """See `vq_attention`. The tokens after the last whole block go through the recurrent form."""
    time = inputs.q.shape[2]
    whole = time // block_len * block_len
    if whole == 0:
        return recurrent_attention(inputs, state, block_len, mem_len, cache, cache_gradient)
    blocks = inputs if whole == time else inputs.slice(0, whole)
    output, state = _whole_blocks(blocks, state, Options(block_len, mem_len, cache, cache_gradient), reduction)
    if whole == time:
        return output, state
    rest, state = recurrent_attention(inputs.slice(whole, time), state, block_len, mem_len, cache, cache_gradient)
    return torch.cat([output, rest], 2), state


def _whole_blocks(
    inputs: AttentionInputs, state: AttentionState, options: Options, reduction: ReductionName
) -> tuple[Tensor, AttentionState]:
    positions = inputs.positions
    output, count, mean, _ = _forward(
        inputs.q,
        inputs.k_hat,
        inputs.v,
        None if positions is None else positions.query,
        None if positions is None else positions.keys,
        state.k_hat,
        state.v,
        state.mean,
        inputs.codebook,
        inputs.indices,
        state.indices,
        state.count,
        inputs.segments,
        state.segment,
        state.cached_segment,
        *options,
        reduction,
    )
    time = inputs.q.shape[2]
    k_window, v_window, index_window, segment_window = next_window(inputs, state)
    segment = torch.cat([state.segment, inputs.segment_ids()], 1)
    return output, AttentionState(k_window, v_window, index_window, count.detach(), mean, segment_window, segment[:, time - 1].clone())


def run_forward(
    q: Tensor,
    k_hat: Tensor,
    v: Tensor,
    query: Tensor | None,
    keys: Tensor | None,
    k_window: Tensor,
    v_window: Tensor,
    mean: Tensor,
    codebook: Tensor,
    indices: Tensor,
    window_indices: Tensor,
    count: Tensor,
    segments: Tensor | None,
    window_segment: Tensor,
    cached_segment: Tensor,
    block_len: int,
    mem_len: int,
    cache: bool,
    cache_gradient: bool,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, count and mean of the next state, and the sums at the borders of groups (none where all means are held)."""
    plan = make_plan(indices, window_indices, count, segments, window_segment, cached_segment, block_len)
    options = Options(block_len, mem_len, cache, cache_gradient)
    call = Call(options, plan, q, k_hat, v, query, keys, k_window, v_window, codebook)
    output = _empty_output(q, v)
    borders = _empty_borders(len(call.runs), mean, reduction)
    means = Running(call, mean, borders) if reduction == "auto" else Held(call, mean, SCANS[reduction])
    for lanes in call.lanes:
        for first, last in call.runs:
            group = Group(call, lanes, first, last)
            v_extended = group.extended(v_window, v)
            attend(group, means.means(group, v_extended), v_extended, call.in_blocks(output))
    return output, plan.counts[:, :, -1].clone(), means.after(), borders


def _empty_output(q: Tensor, v: Tensor) -> Tensor:
    """[B, Hq, T, V], in memory [B, T, Hq, V] as the output projection wants it."""
    batch, heads, time, _ = q.shape
    return v.new_empty(batch, time, heads, v.shape[-1]).transpose(1, 2)


def _empty_borders(runs: int, mean: Tensor, reduction: str) -> Tensor:
    batch, heads, size, width = mean.shape
    return mean.new_empty((runs if reduction == "auto" else 0), batch, heads, size + 1, width)


_forward = torch.library.custom_op("vqkit::vq_attention", run_forward, mutates_args=())


@_forward.register_fake
def _(q: Tensor, k_hat: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, count = others[4], others[8]
    *_, block_len, mem_len, cache, cache_gradient, reduction = others
    blocks, size, group = q.shape[2] // block_len, mean.shape[2], q.shape[1] // k_hat.shape[1]
    run = group_length(Options(block_len, mem_len, cache, cache_gradient), blocks, size, group, v.shape[-1], q.device.type)
    borders = _empty_borders((blocks + run - 1) // run, mean, reduction)
    return _empty_output(q, v), torch.empty_like(count), torch.empty_like(mean), borders


def run_backward(
    grad_output: Tensor,
    grad_mean: Tensor,
    borders: Tensor,
    q: Tensor,
    k_hat: Tensor,
    v: Tensor,
    query: Tensor | None,
    keys: Tensor | None,
    k_window: Tensor,
    v_window: Tensor,
    mean: Tensor,
    codebook: Tensor,
    indices: Tensor,
    window_indices: Tensor,
    count: Tensor,
    segments: Tensor | None,
    window_segment: Tensor,
    cached_segment: Tensor,
    block_len: int,
    mem_len: int,
    cache: bool,
    cache_gradient: bool,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the first eight arguments of the forward operator; empty for positions that are not there."""
    plan = make_plan(indices, window_indices, count, segments, window_segment, cached_segment, block_len)
    options = Options(block_len, mem_len, cache, cache_gradient)
    call = Call(options, plan, q, k_hat, v, query, keys, k_window, v_window, codebook)
    grads = Gradients(call, q, k_hat, v, query, keys)
    means = Running(call, mean, borders, grad_mean) if reduction == "auto" else Held(call, mean, SCANS[reduction], grad_mean)
    grad_blocks = call.in_blocks(grad_output)
    for lanes in call.lanes:
        for first, last in reversed(call.runs):
            group = Group(call, lanes, first, last)
            v_extended = group.extended(v_window, v)
            grad_means = attend_backward(group, grads, means.means(group, v_extended), v_extended, grad_blocks)
            if cache_gradient:
                means.add_gradient(group, grad_means, grads)
    of_mean = means.finish(grads) if cache_gradient else torch.zeros_like(mean)
    return (
        grads.q,
        grads.k[:, :, mem_len:].to(k_hat.dtype, copy=True),
        grads.v[:, :, mem_len:].to(v.dtype, copy=True),
        grads.query,
        grads.keys.flip(1).to(keys.dtype) if keys is not None else grads.keys,
        grads.k[:, :, :mem_len].to(k_window.dtype, copy=True),
        grads.v[:, :, :mem_len].to(v_window.dtype, copy=True),
        of_mean,
    )


_backward = torch.library.custom_op("vqkit::vq_attention_backward", run_backward, mutates_args=())


@_backward.register_fake
def _(grad_output: Tensor, grad_mean: Tensor, borders: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    q, k_hat, v, query, keys, k_window, v_window, mean = inputs[:8]
    of_positions = [q.new_empty(0) if x is None else torch.empty_like(x) for x in (query, keys)]
    own = (torch.empty_like(q), k_hat.new_empty(k_hat.shape), v.new_empty(v.shape))
    return *own, *of_positions, k_window.new_empty(k_window.shape), v_window.new_empty(v_window.shape), mean.new_empty(mean.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[3], *inputs[:_TENSORS])
    ctx.options = inputs[_TENSORS:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_output: Tensor | None, of_count: Any, grad_mean: Tensor | None, *others: Any) -> tuple[Any, ...]:
    borders, *inputs = ctx.saved_tensors
    (
        q,
        _,
        v,
        query,
        keys,
        *_,
    ) = inputs
    mean = inputs[7]
    if grad_output is None:
        grad_output = torch.zeros_like(_empty_output(q, v))
    if grad_mean is None:
        grad_mean = torch.zeros_like(mean)
    grads = list(_backward(grad_output, grad_mean, borders, *inputs, *ctx.options))
    if query is None or keys is None:
        grads[3:5] = None, None
    if not ctx.options[3]:
        grads[5:8] = None, None, None
    return *grads, *[None] * (_TENSORS - 8 + len(ctx.options))


_forward.register_autograd(_differentiate, setup_context=_keep)
