"""Dense O(T^2) attention over quantized keys: slow and obvious, it defines what the other implementations must compute."""

from __future__ import annotations

import torch
from torch import Tensor

from vqkit.ops.vq_attention.inputs import AttentionInputs, cache_bias, next_window
from vqkit.ops.vq_attention.state import AttentionState


def reference_attention(
    inputs: AttentionInputs, state: AttentionState, block_len: int, mem_len: int, cache: bool, cache_gradient: bool
) -> tuple[Tensor, AttentionState]:
    """See `vq_attention`. Every query gets a score for every code of the cache it started from and every single key since."""
    wide = torch.promote_types(inputs.q.dtype, torch.float32)
    q = inputs.q.to(wide)
    heads, time = q.shape[1:3]
    segment = torch.cat([state.segment, inputs.segment_ids()], 1)

    def of_query_heads(x: Tensor, axis: int = 1) -> Tensor:
        return x.repeat_interleave(inputs.group, axis)

    own_v = torch.cat([state.v, inputs.v], 2).to(wide)
    own_indices = torch.cat([state.indices, inputs.indices], 2)
    k_hat = of_query_heads(torch.cat([state.k_hat, inputs.k_hat], 2).to(wide))  # [B, Hq, M + T, K]
    v, indices = of_query_heads(own_v), of_query_heads(own_indices)
    count, mean = of_query_heads(state.count), of_query_heads(state.mean)
    codebook = of_query_heads(inputs.codebook.to(wide), 0)

    query_at = torch.arange(time, device=q.device)[:, None]
    key_at = torch.arange(-mem_len, time, device=q.device)[None, :]
    block_at = query_at // block_len * block_len
    distance = query_at - key_at
    in_window = key_at >= block_at - mem_len
    in_block = key_at >= block_at

    # In the window a key is itself; once it has left, only its code remains.
    codes = torch.stack([codebook[h][indices[:, h].clamp(min=0)] for h in range(heads)], 1)
    own = _scores(q, k_hat, in_block, cache_gradient)
    scores = torch.where(in_window, own, q @ codes.mT)
    if inputs.positions is not None:
        scores = scores + _position_scores(
            inputs.positions.query.to(wide), of_query_heads(inputs.positions.keys.to(wide), 0), distance, mem_len
        )

    seen = (distance >= 0) & (indices >= 0)[:, :, None, :]
    if not cache:
        seen = seen & (distance <= mem_len)
    cached = q @ codebook.mT + cache_bias(count)[:, :, None, :]  # [B, Hq, T, C]
    if inputs.segments is not None:
        seen = seen & (inputs.segments[:, :, None] == segment[:, None, :])[:, None]
        other = inputs.segments != state.cached_segment[:, None]
        cached = cached.masked_fill(other[:, None, :, None], -torch.inf)
    if not cache:
        cached = torch.full_like(cached, -torch.inf)
    weights = torch.cat([cached, scores.masked_fill(~seen, -torch.inf)], -1).softmax(-1)

    to_cache, to_keys = weights.split([codebook.shape[1], mem_len + time], -1)
    mean = mean if cache_gradient else mean.detach()
    output = to_cache @ mean + _values(to_keys, v, in_block, cache_gradient)
    return output.to(inputs.v.dtype), _next_state(inputs, state, own_v, own_indices, segment)


def _scores(q: Tensor, k: Tensor, in_block: Tensor, cache_gradient: bool) -> Tensor:
    if cache_gradient:
        return q @ k.mT
    return torch.where(in_block, q @ k.mT, q @ k.detach().mT)


def _values(weights: Tensor, v: Tensor, in_block: Tensor, cache_gradient: bool) -> Tensor:
    if cache_gradient:
        return weights @ v
    return weights.masked_fill(~in_block, 0.0) @ v + weights.masked_fill(in_block, 0.0) @ v.detach()


def _position_scores(query: Tensor, keys: Tensor, distance: Tensor, mem_len: int) -> Tensor:
    by_distance = query @ keys.mT  # [B, H, T, M + 1]
    index = distance.clamp(0, mem_len).expand(*query.shape[:2], -1, -1)
    near = (distance >= 0) & (distance <= mem_len)
    return by_distance.gather(-1, index).masked_fill(~near, 0.0)


def _next_state(inputs: AttentionInputs, state: AttentionState, v: Tensor, indices: Tensor, segment: Tensor) -> AttentionState:
    """Counts and means of all tokens that have left the window, of the document of the last one that left."""
    time = inputs.q.shape[2]
    size = inputs.codebook.shape[1]
    cached_segment = segment[:, time - 1].clone()
    leaving = torch.nn.functional.one_hot(indices[:, :, :time] + 1, size + 1)[..., 1:].to(state.mean.dtype)  # absent tokens: no code
    old = state.count
    if inputs.segments is not None:
        leaving = leaving * (segment[:, :time] == cached_segment[:, None])[:, None, :, None]
        old = old * (state.cached_segment == cached_segment)[:, None, None]
    count = old + leaving.sum(2)
    total = old[..., None] * state.mean + leaving.mT @ v[:, :, :time].to(state.mean.dtype)
    mean = total / count.clamp(min=1)[..., None]
    k_window, v_window, index_window, segment_window = next_window(inputs, state)
    return AttentionState(k_window, v_window, index_window, count, mean, segment_window, cached_segment)
