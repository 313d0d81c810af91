"""Attention by `scaled_dot_product_attention`: its fast path where there is no positional term, a score bias where there is one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vqkit.ops.full_attention.inputs import Inputs, causal_mask, per_query_head


def fused_attention(inputs: Inputs) -> Tensor:
    """Output [B, Hq, T, V]; see `full_attention`."""
    heads, time = inputs.q.shape[1:3]
    slots = inputs.k.shape[2]
    mask = inputs.seen
    if inputs.position_query is not None and inputs.position_keys is not None:
        seen = causal_mask(time, slots, inputs.q.device) if mask is None else mask
        mask = _position_bias(inputs.position_query, inputs.position_keys).masked_fill(~seen, -torch.inf)
    k, v = (per_query_head(t, heads) for t in (inputs.k, inputs.v))
    return F.scaled_dot_product_attention(inputs.q, k, v, attn_mask=mask, is_causal=mask is None, scale=1.0)


def _position_bias(query: Tensor, keys: Tensor) -> Tensor:
    """[B, Hq, T, S + T]: the product of each query and the key of its distance to each slot; later slots hold what must be masked."""
    heads, time = query.shape[1:3]
    by_falling_distance = query @ per_query_head(keys, heads).flip(-2).mT
    slots = by_falling_distance.shape[-1]
    # Row t has to move left by T - 1 - t: one column more in front, and the rows of a matrix that is T wide and lacks its first.
    padded = F.pad(by_falling_distance, (1, 0)).flatten(-2)
    return padded[..., time:].unflatten(-1, (time, slots))
