"""What VQ attention carries from one call to the next."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class AttentionState(NamedTuple):
    """Everything that later queries need of earlier tokens; its size does not depend on their number.

    Shapes: B batch, H key heads, M window memory, C codes, K key width, V value width.
    `count` and `mean` are float32, or float64 for float64 inputs, whatever the activations are.
    """

    k_hat: Tensor  # [B, H, M, K] quantized keys of the window, oldest first
    v: Tensor  # [B, H, M, V] their values
    indices: Tensor  # [B, H, M] int64, their codes; -1 where there is no token yet
    count: Tensor  # [B, H, C] tokens per code that have left the window
    mean: Tensor  # [B, H, C, V] mean of their values
    segment: Tensor  # [B, M] int64, document of each window token
    cached_segment: Tensor  # [B] int64, the one document that `count` and `mean` describe; -1 none

    def detach(self) -> AttentionState:
        """The same state, cut from the graph that made it."""
        return AttentionState(*(t.detach() for t in self))


def initial_state(
    batch: int,
    heads: int,
    mem_len: int,
    codebook_size: int,
    key_dim: int,
    value_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> AttentionState:
    """The state before any token: an empty window and an empty cache."""
    wide = torch.promote_types(dtype, torch.float32)

    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def absent(*shape: int) -> Tensor:
        return torch.full(shape, -1, dtype=torch.int64, device=device)

    return AttentionState(
        k_hat=zeros(batch, heads, mem_len, key_dim, dtype=dtype),
        v=zeros(batch, heads, mem_len, value_dim, dtype=dtype),
        indices=absent(batch, heads, mem_len),
        count=zeros(batch, heads, codebook_size, dtype=wide),
        mean=zeros(batch, heads, codebook_size, value_dim, dtype=wide),
        segment=absent(batch, mem_len),
        cached_segment=absent(batch),
    )
