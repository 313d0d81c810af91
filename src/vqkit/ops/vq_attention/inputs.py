"""What the implementations of VQ attention share: their arguments in one piece, the window, and the bias of the cache.

Shapes: B batch, Hq query heads, Hk key heads, G = Hq / Hk of the first share one of the second, T time, K key width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vqkit.ops.vq_attention.state import AttentionState


class Positions(NamedTuple):
    """Positional term of the scores: query [B, Hq, T, K] against keys [Hk, M + 1, K], row d for distance d."""

    query: Tensor
    keys: Tensor


class AttentionInputs(NamedTuple):
    """The tensors of one call; see `vq_attention` for their shapes. The codebook carries no gradient."""

    q: Tensor
    k_hat: Tensor
    v: Tensor
    indices: Tensor
    codebook: Tensor
    positions: Positions | None
    segments: Tensor | None

    def slice(self, start: int, stop: int) -> AttentionInputs:
        """The tokens start .. stop - 1."""
        positions = None
        if self.positions is not None:
            positions = Positions(self.positions.query[:, :, start:stop], self.positions.keys)
        return AttentionInputs(
            q=self.q[:, :, start:stop],
            k_hat=self.k_hat[:, :, start:stop],
            v=self.v[:, :, start:stop],
            indices=self.indices[:, :, start:stop],
            codebook=self.codebook,
            positions=positions,
            segments=None if self.segments is None else self.segments[:, start:stop],
        )

    @property
    def group(self) -> int:
        """Query heads per key head (G)."""
        return self.q.shape[1] // self.k_hat.shape[1]

    def segment_ids(self) -> Tensor:
        """Segments [B, T], all 0 where documents are not told apart."""
        if self.segments is not None:
            return self.segments
        return self.indices.new_zeros(self.indices.shape[0], self.indices.shape[2])


def next_window(inputs: AttentionInputs, state: AttentionState) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The last M quantized keys, values, codes and segments; copies, so that the window does not keep a whole sequence alive."""
    mem_len = state.k_hat.shape[2]

    def tail(old: Tensor, new: Tensor, axis: int) -> Tensor:
        time = new.shape[axis]
        if time >= mem_len:
            return new.narrow(axis, time - mem_len, mem_len).clone(memory_format=torch.contiguous_format)
        return torch.cat([old.narrow(axis, time, mem_len - time), new], axis)

    return (
        tail(state.k_hat, inputs.k_hat, 2),
        tail(state.v, inputs.v, 2),
        tail(state.indices, inputs.indices, 2),
        tail(state.segment, inputs.segment_ids(), 1),
    )


def cache_bias(count: Tensor) -> Tensor:
    """What a code's count adds to its score: log(count), -inf for a code that no cached token has."""
    return torch.where(count == 0, -torch.inf, count.clamp(min=1).log())


def window_mask(length: int, mem_len: int, cache: bool, device: torch.device | None = None) -> Tensor:
    """Which keys of its window [M + L] each query [L] may see: those before it, without the cache at most `mem_len` back."""
    seen = torch.ones(length, mem_len + length, dtype=torch.bool, device=device).tril(mem_len)
    return seen if cache else seen.triu()
