"""Dropout of Transformer-VQ: what is drawn anew in every call, and what is decided once for a whole sequence.

Masks are True where a number is kept; what is kept is divided by the probability of keeping it.
Shapes: B batch, T time, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class SequenceMasks(NamedTuple):
    """Decisions that hold for a sequence, carried from call to call in the state of the model. A kind that is off has no entries."""

    sinusoid: tuple[Tensor, ...]  # one an attention unit: [distances, D] bool, for all elements of the batch
    layer: tuple[Tensor, ...]  # one a part of a layer, that is two a layer: [B] bool


class DropoutMasks(NamedTuple):
    """What one call would draw for itself, given in its place. A kind that is off has no entries."""

    embedding: Tensor | None  # [B, T, D] bool
    residual: tuple[Tensor, ...]  # one an attention unit: [B, T, D] bool


class PartMasks(NamedTuple):
    """What concerns one part of a layer; without an entry a decision for the sequence drops nothing, the residual mask is drawn."""

    sinusoid: Tensor | None = None
    layer: Tensor | None = None
    residual: Tensor | None = None


NO_MASKS = PartMasks()


def draw_keep(*shape: int, rate: float, device: torch.device) -> Tensor:
    """A mask of numbers that are kept with probability 1 - rate each."""
    return torch.rand(shape, device=device) >= rate


def drop(x: Tensor, rate: float, keep: Tensor | None = None) -> Tensor:
    """x with a share `rate` of its entries at 0: those that `keep`, of a shape that broadcasts, leaves out; without it drawn anew."""
    if keep is None:
        return F.dropout(x, rate) if rate > 0.0 else x
    return x.masked_fill(~keep, 0.0) / (1.0 - rate)


def drop_elements(x: Tensor, rate: float, keep: Tensor | None) -> Tensor:
    """x [B, T, D] with the elements of the batch that `keep` [B] leaves out at 0; as it is without."""
    return x if keep is None else drop(x, rate, keep[:, None, None])
