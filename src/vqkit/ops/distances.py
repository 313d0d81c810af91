"""Distances of vectors to codes, a tile at a time, as exact as explicit differences and as fast as a matrix product.

The product gives |x|^2 + |c|^2 - 2 x.c, which loses the digits that its terms have in common. So the mean code is subtracted from vectors
and codes alike, and where a vector is near to a code, beside how far both are from there, their distance is that of explicit differences.
So on CPU; elsewhere, where asking which pairs are near would wait for the device, and for few or extreme numbers, all are. So are the
gradients, but for those of a device, which are products.

Shapes: G codebooks, N vectors, C codes, K width, R vectors of a tile, P pairs of a vector and a code.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

_FEW_DIFFERENCES = 1 << 17
_FEW_VECTORS = 16
_NEAR = 1 / 16
"""Of |x|^2 + |c|^2: a squared distance below it has lost four bits and more."""
_DIFFERENCES_AT_ONCE = 1 << 18
_COST_OF_A_PAIR = 8
"""Of one near pair among others, in pairs of a tile that are computed by differences altogether."""


class Near(NamedTuple):
    """Pairs of a tile whose distances are those of differences."""

    place: Tensor  # [P] int64 of [G * R * C]
    vector: Tensor  # [P] of [G * N]
    code: Tensor  # [P] of [G * C]


class Tile(NamedTuple):
    """The distances of some vectors, and what their gradient needs beside them."""

    rows: slice
    distances: Tensor  # [G, R, C]
    near: Near | None
    all_near: bool  # all are those of differences


class Distances:
    """Of vectors x [G, N, K] to codes [G, C, K], all finite, both float32 or both float64. No gradient."""

    def __init__(self, x: Tensor, codes: Tensor) -> None:
        self.x, self.codes = x, codes

    @cached_property
    def centred(self) -> tuple[Tensor, Tensor]:
        """Vectors and codes without the mean code."""
        origin = self.codes.mean(1, keepdim=True)
        return self.x - origin, self.codes - origin

    @cached_property
    def _by_products(self) -> bool:
        many = self.x.shape[1] >= _FEW_VECTORS and self.x.shape[1] * self.codes.numel() >= _FEW_DIFFERENCES
        return many and self.x.device.type == "cpu" and self._prepare()

    def _prepare(self) -> bool:
        """The factors of the product; False where it would leave the range of the numbers."""
        vectors, codes = self.centred
        of_vectors, of_codes = vectors.square().sum(-1, keepdim=True), codes.square().sum(-1, keepdim=True)
        largest = of_codes.amax(1)
        top = float(torch.maximum(largest.amax(), of_vectors.amax()))
        info = torch.finfo(vectors.dtype)
        if not info.tiny / info.eps < top < info.max / 16:
            return False
        ones = torch.ones_like(of_vectors), torch.ones_like(of_codes)
        self._left = torch.cat([vectors, of_vectors, ones[0]], dim=-1)
        self._right = torch.cat([-2.0 * codes, ones[1], of_codes], dim=-1).mT
        self._near_vectors, self._near_codes = _NEAR * of_vectors.squeeze(-1), _NEAR * of_codes.squeeze(-1)  # add up to what is near
        self._doubtful = self._near_vectors + _NEAR * largest
        return True

    def tile(self, rows: slice, out: Tensor | None = None) -> Tile:
        """Of some vectors; the distances stand in `out` [G, R, C], contiguous, where given."""
        if not self._by_products:
            found = _by_differences(self.x[:, rows], self.codes)
            return Tile(rows, found if out is None else out.copy_(found), None, all_near=True)
        squares = torch.bmm(self._left[:, rows], self._right, out=out)
        doubtful = squares.amin(-1) <= self._doubtful[:, rows]
        near = self._find_near(squares, doubtful, rows) if doubtful.any() else None
        if near is not None and len(near.place) * _COST_OF_A_PAIR > squares.numel():
            return Tile(rows, squares.copy_(_by_differences(self.x[:, rows], self.codes)), None, all_near=True)
        for place, vector, code in _parts(near, self.x):
            squares.view(-1).scatter_(0, place, self._differences(vector, code).square_().sum(-1))
        return Tile(rows, squares.sqrt_(), near, all_near=False)

    def _find_near(self, squares: Tensor, doubtful: Tensor, rows: slice) -> Near:
        """Of squares [G, R, C], where doubtful [G, R] vectors may have some."""
        num, size = squares.shape[1:]
        row = doubtful.flatten().nonzero().squeeze(-1)
        group = row.div(num, rounding_mode="floor")
        beyond = squares.view(-1, size).index_select(0, row).sub_(self._near_codes.index_select(0, group))
        found = (beyond <= self._near_vectors[:, rows].flatten().index_select(0, row).unsqueeze(-1)).view(-1).nonzero().squeeze(-1)
        of_row = found.div(size, rounding_mode="floor")
        code, row, group = found - of_row * size, row.index_select(0, of_row), group.index_select(0, of_row)
        vector = row + group * (self.x.shape[1] - num) + (rows.start or 0)
        return Near(row * size + code, vector, code + group * size)

    def _differences(self, vector: Tensor, code: Tensor) -> Tensor:
        """[P, K]."""
        width = self.x.shape[-1]
        return self.x.reshape(-1, width).index_select(0, vector).sub_(self.codes.reshape(-1, width).index_select(0, code))

    def add_gradients_(
        self, of_tile: Tensor, tile: Tile, of_x: Tensor | None, of_codes: Tensor | None, weight: Tensor | None = None
    ) -> None:
        """Add to `of_x` [G, N, K] and `of_codes` [G, C, K], where given, what a tile's gradient [G, R, C] makes; that is overwritten.

        With `weight` [G, R, 1] the gradient is that times as much. A vector on a code has no gradient from that.
        """
        if tile.all_near and tile.distances.is_cpu:
            of_tile = of_tile if weight is None else of_tile.mul_(weight)
            self._add_of_differences_(of_tile, tile, of_x, of_codes)
            return
        vectors, codes = self.centred
        vectors = vectors[:, tile.rows]
        pull = of_tile.div_(tile.distances) if tile.distances.is_cpu else _divide(of_tile, tile.distances)  # near ones alone may be 0
        if tile.near is not None:
            self._add_of_near_(pull, tile, tile.near, of_x, of_codes, weight)
        if of_x is not None:
            found = (vectors * pull.sum(-1, keepdim=True)).sub_(pull @ codes)
            of_x[:, tile.rows] += found if weight is None else found.mul_(weight)
        if of_codes is not None:
            total = pull.sum(1).unsqueeze(-1) if weight is None else pull.mT @ weight
            of_codes += (codes * total).sub_(pull.mT @ (vectors if weight is None else vectors * weight))

    def _add_of_differences_(self, of_tile: Tensor, tile: Tile, of_x: Tensor | None, of_codes: Tensor | None) -> None:
        x = self.x[:, tile.rows].contiguous()
        if of_x is not None:
            of_x[:, tile.rows] += torch.ops.aten._cdist_backward(of_tile, x, self.codes, 2.0, tile.distances)
        if of_codes is not None:
            turned = of_tile.mT.contiguous(), tile.distances.mT.contiguous()
            of_codes += torch.ops.aten._cdist_backward(turned[0], self.codes, x, 2.0, turned[1])

    def _add_of_near_(
        self, pull: Tensor, tile: Tile, near: Near, of_x: Tensor | None, of_codes: Tensor | None, weight: Tensor | None
    ) -> None:
        """What near pairs make, by differences; they are taken out of `pull` [G, R, C]."""
        flat, width, size = pull.view(-1), self.x.shape[-1], pull.shape[-1]
        for place, vector, code in _parts(near, self.x):
            share = flat.index_select(0, place).masked_fill_(tile.distances.view(-1).index_select(0, place) == 0, 0.0)
            if weight is not None:
                share.mul_(weight.flatten().index_select(0, place.div(size, rounding_mode="floor")))
            found = self._differences(vector, code).mul_(share.unsqueeze(-1))
            if of_x is not None:
                of_x.view(-1, width).index_add_(0, vector, found)
            if of_codes is not None:
                of_codes.view(-1, width).index_add_(0, code, found, alpha=-1)
        flat.index_fill_(0, near.place, 0.0)


def _parts(near: Near | None, x: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some pairs at a time."""
    at_once = max(1, _DIFFERENCES_AT_ONCE // max(1, x.shape[-1]))
    return iter(()) if near is None else zip(*(part.split(at_once) for part in near), strict=True)


def _by_differences(x: Tensor, codes: Tensor) -> Tensor:
    return torch.cdist(x, codes, compute_mode="donot_use_mm_for_euclid_dist")


def _divide(gradient: Tensor, distance: Tensor) -> Tensor:
    """gradient / distance, 0 where that is 0."""
    return torch.where(distance > 0, gradient / distance, 0.0)


def dense_distances(x: Tensor, codes: Tensor) -> Tensor:
    """[G, N, C], with derivatives of any order; a vector on a code has no gradient from that."""
    return _Dense.apply(x, codes)


class _Dense(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, codes: Tensor) -> Tensor:
        return _by_differences(x, codes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:  # pyrefly: ignore[bad-override]
        x, codes, distances = ctx.saved_tensors
        apart = distances > 0
        pull = torch.where(apart, gradients[0] / distances.where(apart, 1.0), 0.0)
        origin = codes.detach().mean(1, keepdim=True)
        x, codes = x - origin, codes - origin
        return x * pull.sum(-1, keepdim=True) - pull @ codes, codes * pull.sum(1).unsqueeze(-1) - pull.mT @ x
