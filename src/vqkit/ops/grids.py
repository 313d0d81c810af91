"""Grids over the positions of sequences, images and volumes: averages over their cells, and values of cells spread over positions.

Shapes: B batch, D width, P... positions (1 to 3 axes), G... cells of a grid.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vqkit.ops.precision import may_keep

_POOL: dict[int, Callable[..., Tensor]] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def average(x: Tensor, grid: Sequence[int], weights: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Averages of x [B, D, P...] over cells [B, D, G...], weighed by `weights` [B, 1, P...] if given, and the mean weight [B, 1, G...].

    Cell i of n along an axis of length T is floor(i T / n) ... ceil((i + 1) T / n) - 1, so that cells overlap where n does not divide T. A
    cell without weight is 0.
    """
    pool = _POOL[x.dim() - 2]
    if weights is None:
        return pool(x, tuple(grid)), None
    share = pool(weights, tuple(grid))
    return pool(x * weights, tuple(grid)) / share.where(share > 0, 1.0), share


def interpolate(x: Tensor, positions: Sequence[int]) -> Tensor:
    """Values of cells [B, D, G...] -> [B, D, P...], linear between the middles of the cells, and constant beyond the outermost.

    The same as interpolation with align_corners=False, axis by axis; bit by bit the same in a compiled program.
    """
    make = _kept_neighbours if may_keep(x) else _make_neighbours
    for axis, (size, length) in enumerate(zip(x.shape[2:], positions, strict=True), 2):
        if size == length:
            continue
        if size == 1:
            x = x.expand(*x.shape[:axis], length, *x.shape[axis + 1 :])
            continue
        low, high, share = make(size, length, x.dtype, x.device)
        lower, upper = x.index_select(axis, low), x.index_select(axis, high)
        x = lower + share.view(-1, *(1 for _ in x.shape[axis + 1 :])) * (upper - lower)
    return x


def neighbourhoods(grid: Sequence[int], positions: Sequence[int], like: Tensor) -> Tensor:
    """[G, 3^n P]: what each of the G cells of a grid of n axes gives, by `interpolate`, to the 3^n neighbours of each of P positions.

    The neighbours come first, in the order of a convolution of 3 x ... x 3; those beyond the edge are 0.
    """
    make = _kept_neighbourhoods if may_keep(like) else _make_neighbourhoods
    return make(tuple(grid), tuple(positions), like.dtype, like.device)


def _make_neighbourhoods(grid: tuple[int, ...], positions: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    cells = torch.eye(math.prod(grid), dtype=dtype, device=device)
    windows = F.pad(interpolate(cells.view(-1, 1, *grid), positions), (1, 1) * len(grid))
    for axis, length in enumerate(positions, 2):
        windows = windows.unfold(axis, length, 1)
    return windows.reshape(len(cells), -1)


@functools.lru_cache(maxsize=64)
def _kept_neighbourhoods(grid: tuple[int, ...], positions: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return _make_neighbourhoods(grid, positions, dtype, device)


def _make_neighbours(size: int, length: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For `length` positions the cells before and behind each, and the share of the second."""
    place = ((torch.arange(length, dtype=dtype, device=device) + 0.5) * (size / length) - 0.5).clamp(0, size - 1)
    below = place.floor()
    low = below.to(torch.int64)
    return low, (low + 1).clamp(max=size - 1), place - below


@functools.lru_cache(maxsize=256)
def _kept_neighbours(size: int, length: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    with torch.inference_mode(False):
        return _make_neighbours(size, length, dtype, device)
