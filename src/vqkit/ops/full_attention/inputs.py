"""What the implementations of ordinary attention share: their arguments in one piece, with the carried keys in front."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """One call over S carried and T new slots; see `full_attention`. `seen` is None where it is the causal mask alone and S is 0."""

    q: Tensor  # [B, Hq, T, K]
    k: Tensor  # [B, Hk, S + T, K]
    v: Tensor  # [B, Hk, S + T, V]
    position_query: Tensor | None  # [B, Hq, T, K]
    position_keys: Tensor | None  # [Hk, S + T, K]
    seen: Tensor | None  # [B or 1, 1, T, S + T] bool


def causal_mask(time: int, slots: int, device: torch.device) -> Tensor:
    """[T, S + T] bool: the keys that are no later than each query."""
    return torch.ones(time, slots, dtype=torch.bool, device=device).tril(slots - time)


def per_query_head(keys: Tensor, heads: int) -> Tensor:
    """[..., Hk, T, K] -> [..., Hq, T, K]: each key head for the consecutive query heads that share it."""
    return keys if keys.shape[-3] == heads else keys.repeat_interleave(heads // keys.shape[-3], -3)
