"""VQ attention one block at a time with carried state: memory constant in the number of tokens; one token is a block of one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vqkit.ops.vq_attention.inputs import AttentionInputs, cache_bias, next_window, window_mask
from vqkit.ops.vq_attention.state import AttentionState


def recurrent_attention(
    inputs: AttentionInputs, state: AttentionState, block_len: int, mem_len: int, cache: bool, cache_gradient: bool
) -> tuple[Tensor, AttentionState]:
    """See `vq_attention`."""
    time = inputs.q.shape[2]
    outputs = []
    for start in range(0, time, block_len):
        if not cache_gradient:
            state = state.detach()
        block = inputs if time <= block_len else inputs.slice(start, min(start + block_len, time))
        outputs.append(_attend(block, state, mem_len, cache))
        state = advance(block, state)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2), state


def _attend(inputs: AttentionInputs, state: AttentionState, mem_len: int, cache: bool) -> Tensor:
    """Queries of one block over the window and the cache as they stand before it; the queries of a key head in one product."""
    wide = torch.promote_types(inputs.q.dtype, torch.float32)
    heads, group = inputs.k_hat.shape[1], inputs.group
    q = _by_key_head(inputs.q, heads).to(wide)
    keys = torch.cat([state.k_hat, inputs.k_hat], 2).to(wide)
    values = torch.cat([state.v, inputs.v], 2).to(wide)
    scores = (q @ keys.mT).unflatten(2, (group, -1))  # [B, Hk, G, L, M + L]
    if inputs.positions is not None:
        near = _by_key_head(inputs.positions.query, heads).to(wide) @ inputs.positions.keys.to(wide).flip(1).mT
        scores = scores + _band(near.unflatten(2, (group, -1)))
    scores = scores.masked_fill(~_seen(inputs, state, mem_len, cache)[:, :, None], -torch.inf)
    if not cache:
        return _by_query_head(scores.softmax(-1).flatten(2, 3) @ values, group).to(inputs.v.dtype)

    cached = (q @ inputs.codebook.to(wide).mT + cache_bias(state.count)[:, :, None, :]).unflatten(2, (group, -1))
    if inputs.segments is not None:
        other = inputs.segments != state.cached_segment[:, None]
        cached = cached.masked_fill(other[:, None, None, :, None], -torch.inf)
    weights = torch.cat([scores, cached], -1).softmax(-1).flatten(2, 3)
    window = keys.shape[2]
    output = weights[..., :window] @ values + weights[..., window:] @ state.mean
    return _by_query_head(output, group).to(inputs.v.dtype)


def _by_key_head(x: Tensor, heads: int) -> Tensor:
    """[B, Hq, L, width] -> [B, Hk, G L, width]."""
    return x if x.shape[1] == heads else x.unflatten(1, (heads, -1)).flatten(2, 3)


def _by_query_head(x: Tensor, group: int) -> Tensor:
    """[B, Hk, G L, width] -> [B, Hq, L, width]."""
    return x if group == 1 else x.unflatten(2, (group, -1)).flatten(1, 2)


def _band(by_distance: Tensor) -> Tensor:
    """[..., L, M + 1] by falling distance -> [..., L, M + L] with row i moved right by i; 0 elsewhere."""
    length, near = by_distance.shape[-2:]
    window = near - 1 + length
    return F.pad(by_distance, (0, length)).flatten(-2)[..., : length * window].unflatten(-1, (length, window))


def _seen(inputs: AttentionInputs, state: AttentionState, mem_len: int, cache: bool) -> Tensor:
    """Which key of the window each query may see, [B, Hk, L, M + L]."""
    length = inputs.q.shape[2]
    seen = window_mask(length, mem_len, cache, inputs.q.device)
    present = F.pad(state.indices >= 0, (0, length), value=True)
    seen = seen & present[:, :, None, :]
    if inputs.segments is not None:
        segment = torch.cat([state.segment, inputs.segments], 1)
        seen = seen & (inputs.segments[:, :, None] == segment[:, None, :])[:, None]
    return seen


def advance(inputs: AttentionInputs, state: AttentionState) -> AttentionState:
    """The state after a block: its oldest tokens leave the window and enter the counts and means."""
    length = inputs.k_hat.shape[2]
    segment = torch.cat([state.segment, inputs.segment_ids()], 1)
    indices = torch.cat([state.indices, inputs.indices], 2)[:, :, :length]
    values = torch.cat([state.v, inputs.v], 2)[:, :, :length].to(state.mean.dtype)
    cached_segment = segment[:, length - 1].clone()
    count, mean, entering = state.count, state.mean, indices >= 0
    if inputs.segments is not None:
        keep = (state.cached_segment == cached_segment)[:, None, None]
        count, mean = count * keep, mean * keep[..., None]
        entering = entering & (segment[:, :length] == cached_segment[:, None])[:, None]
    target, weight = indices.clamp(min=0), entering.to(count.dtype)
    count = count.scatter_add(2, target, weight)
    # Each token moves the mean of its code by its share; a code that gains nothing stays exactly as it was.
    row = target[..., None].expand_as(values)
    share = (weight / count.gather(2, target).clamp(min=1))[..., None]
    moved = (values - mean.gather(2, row)) * share
    # The moves of a block are added up before they meet the mean, which so is rounded once a block and not once a token.
    mean = mean.scatter_add(2, row, moved) if length == 1 else mean + torch.zeros_like(mean).scatter_add(2, row, moved)
    k_hat, v, window_indices, window_segment = next_window(inputs, state)
    return AttentionState(k_hat, v, window_indices, count, mean, window_segment, cached_segment)
