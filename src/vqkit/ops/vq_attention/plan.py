"""What the blocked form knows before it looks at any float: codes that leave the window, counts that each block finds, who sees whom.

Shapes: B batch, H key heads, R blocks, L block length, M window memory, C codes. Extended time is the window of the state, then the call.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Plan(NamedTuple):
    """Block r holds the queries rL .. rL + L - 1; before it the extended tokens 0 .. rL - 1 have left the window."""

    leaving: Tensor  # [B, H, R, L] codes of the tokens that leave the window after block r, C for those that must not count
    counts: Tensor  # [B, H, R + 1, C] what block r finds in the cache; the last: what the next call finds
    present: Tensor  # [B, H, M] whether the window of the state holds a token
    query_segment: Tensor | None  # [B, R, L]
    key_segment: Tensor | None  # [B, M + R L]
    cached_segment: Tensor | None  # [B, R + 1]
    keep: Tensor | None  # [B, R] 1 where the cache lives on after block r, 0 where another document begins

    @property
    def blocks(self) -> int:
        return self.leaving.shape[2]

    def inverse(self, batch: slice, heads: slice, first: int, last: int) -> Tensor:
        """1 / counts of some blocks, 1 for codes that no cached token has."""
        return self.counts[batch, heads, first:last].clamp(min=1).reciprocal()


def make_plan(
    indices: Tensor,
    window_indices: Tensor,
    count: Tensor,
    segments: Tensor | None,
    window_segment: Tensor,
    cached_segment: Tensor,
    length: int,
) -> Plan:
    """indices [B, H, R L], segments [B, R L] or None; the other tensors are those of the state."""
    time, size = indices.shape[2], count.shape[2]
    leaving = torch.cat([window_indices, indices], 2)[:, :, :time].unflatten(2, (-1, length))
    leaving = torch.where(leaving < 0, size, leaving)
    present = window_indices >= 0
    if segments is None:
        return Plan(leaving, _running_counts(count, _gained(leaving, count), None), present, None, None, None, None)
    keys = torch.cat([window_segment, segments], 1)
    left = keys[:, :time].unflatten(1, (-1, length))
    cached = torch.cat([cached_segment[:, None], left[..., -1]], 1)
    keep = (cached[:, 1:] == cached[:, :-1]).to(count.dtype)
    leaving = leaving.masked_fill((left != left[..., -1:])[:, None], size)
    counts = _running_counts(count, _gained(leaving, count), keep)
    return Plan(leaving, counts, present, segments.unflatten(1, (-1, length)), keys, cached, keep)


def _gained(leaving: Tensor, count: Tensor) -> Tensor:
    """Tokens [B, H, R, C] of each code that leave the window after each block."""
    size = count.shape[2]
    gained = count.new_zeros(*leaving.shape[:3], size + 1)
    return gained.scatter_add_(3, leaving, gained.new_ones(()).expand(leaving.shape))[..., :size]


def _running_counts(start: Tensor, gained: Tensor, keep: Tensor | None) -> Tensor:
    if keep is None:
        return torch.cat([start[:, :, None], gained], 2).cumsum(2)
    counts = start.new_empty(*gained.shape[:2], gained.shape[2] + 1, gained.shape[3])
    counts[:, :, 0] = start
    for r in range(gained.shape[2]):
        torch.addcmul(gained[:, :, r], counts[:, :, r], keep[:, None, r, None], out=counts[:, :, r + 1])
    return counts


def alive(keep: Tensor | None, blocks: int, like: Tensor) -> Tensor:
    """[B or 1, R + 1, R + 1]: 1 where what entered the cache at column c (0: the state, else after block c - 1) is still there at row r."""
    causal = torch.ones(blocks + 1, blocks + 1, dtype=like.dtype, device=like.device).tril()
    if keep is None:
        return causal[None]
    document = F.pad((1 - keep).cumsum(1), (1, 0))
    return causal * (document[:, :, None] == document[:, None, :])
