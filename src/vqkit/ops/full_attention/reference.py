"""Dense softmax attention, score by score: slow and obvious, it defines what the fused form must compute."""

from __future__ import annotations

import torch
from torch import Tensor

from vqkit.ops.full_attention.inputs import Inputs, causal_mask, per_query_head


def reference_attention(inputs: Inputs) -> Tensor:
    """Output [B, Hq, T, V]; see `full_attention`."""
    heads, time = inputs.q.shape[1:3]
    slots = inputs.k.shape[2]
    wide = torch.promote_types(inputs.q.dtype, torch.float32)
    scores = inputs.q.to(wide) @ per_query_head(inputs.k, heads).to(wide).mT
    if inputs.position_query is not None and inputs.position_keys is not None:
        by_distance = inputs.position_query.to(wide) @ per_query_head(inputs.position_keys, heads).to(wide).mT
        query_at = torch.arange(slots - time, slots, device=scores.device)
        distance = query_at[:, None] - torch.arange(slots, device=scores.device)
        scores = scores + by_distance.gather(-1, distance.clamp(min=0).expand_as(scores))
    seen = causal_mask(time, slots, scores.device) if inputs.seen is None else inputs.seen
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights @ per_query_head(inputs.v, heads).to(wide)).to(inputs.v.dtype)
