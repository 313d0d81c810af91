"""Distances of vectors to codes, a tile at a time, as exact as explicit differences and as fast as a matrix product.

The product gives |x|^2 + |c|^2 - 2 x.c, which loses the digits that its terms have in common. So the mean code is subtracted from vectors
and codes alike, and where a vector is near to a code, beside how far both are from there, their distance is that of explicit differences.
So on CPU; elsewhere, where asking which pairs are near would wait for the device, and for few or extreme numbers, all are. So are the
gradients, but for those of a device, which are products.

Shapes: G codebooks, N vectors, C codes, K width, R vectors of a tile, P pairs of a vector and a code.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from vqkit.ops.precision import may_look

_FEW_DIFFERENCES = 1 << 17
_FEW_VECTORS = 16
_NEAR = 1 / 16
"""Of |x|^2 + |c|^2: a squared distance below it has lost four bits and more."""
_DIFFERENCES_AT_ONCE = 1 << 18
_COST_OF_A_PAIR = 8
"""Of one near pair among others, in pairs of a tile that are computed by differences altogether."""


_Pairs = tuple[Tensor, Tensor, Tensor]
"""Codebook, vector and code of each, [P]."""


class Distances:
    """Of vectors x [G, N, K] to codes [G, C, K], all finite, both float32 or both float64. No gradient."""

    def __init__(self, x: Tensor, codes: Tensor) -> None:
        self.x, self.codes = x, codes
        self._near: _Pairs | None = None  # of the last tile, by differences
        self._all_near = False
        many = x.shape[1] >= _FEW_VECTORS and x.shape[1] * codes.numel() >= _FEW_DIFFERENCES
        self._by_products = many and x.device.type == "cpu" and self._prepare()

    @cached_property
    def centred(self) -> tuple[Tensor, Tensor]:
        """Vectors and codes without the mean code."""
        origin = self.codes.mean(1, keepdim=True)
        return self.x - origin, self.codes - origin

    def _prepare(self) -> bool:
        """The factors of the product; False where it would leave the range of the numbers."""
        vectors, codes = self.centred
        self._of_vectors, self._of_codes = vectors.square().sum(-1, keepdim=True), codes.square().sum(-1)
        largest = self._of_codes.amax(-1)
        top = float(torch.maximum(largest.amax(), self._of_vectors.amax()))
        info = torch.finfo(vectors.dtype)
        if not info.tiny / info.eps < top < info.max / 16:
            return False
        ones = torch.ones_like(self._of_vectors), torch.ones_like(codes[..., :1])
        self._left = torch.cat([vectors, self._of_vectors, ones[0]], dim=-1)
        self._right = torch.cat([-2.0 * codes, ones[1], self._of_codes.unsqueeze(-1)], dim=-1).mT
        self._doubtful = _NEAR * (self._of_vectors.squeeze(-1) + largest.unsqueeze(-1))
        return True

    def tile(self, rows: slice) -> Tensor:
        """[G, R, C], of the caller."""
        self._near, self._all_near = None, not self._by_products
        if self._all_near:
            return _by_differences(self.x[:, rows], self.codes)
        squares = self._left[:, rows] @ self._right
        doubtful = squares.amin(-1) < self._doubtful[:, rows]
        if doubtful.any():
            self._sharpen_(squares, doubtful, rows)
        return squares.sqrt_()

    def _sharpen_(self, squares: Tensor, doubtful: Tensor, rows: slice) -> None:
        """The squares of near pairs, of which doubtful [G, R] vectors may have some, by differences."""
        group, row = doubtful.nonzero(as_tuple=True)
        bound = _NEAR * (self._of_vectors[:, rows][group, row] + self._of_codes[group])
        place, code = (squares[group, row] < bound).nonzero(as_tuple=True)
        group, row = group[place], row[place]
        x = self.x[:, rows]
        if len(place) * _COST_OF_A_PAIR > squares.numel():
            squares.copy_(_by_differences(x, self.codes).square_())
            self._all_near = True
            return
        self._near = group, row, code
        at_once = max(1, _DIFFERENCES_AT_ONCE // x.shape[-1])
        for g, r, c in zip(group.split(at_once), row.split(at_once), code.split(at_once), strict=True):
            squares[g, r, c] = (x[g, r] - self.codes[g, c]).square_().sum(-1)

    def add_gradients_(self, of_tile: Tensor, tile: Tensor, rows: slice, of_x: Tensor | None, of_codes: Tensor | None) -> None:
        """Add to `of_x` [G, N, K] and `of_codes` [G, C, K], where given, what the gradient of the last tile makes; that is overwritten.

        A vector on a code has no gradient from that.
        """
        if self._all_near and tile.is_cpu:
            x = self.x[:, rows].contiguous()
            if of_x is not None:
                of_x[:, rows] += torch.ops.aten._cdist_backward(of_tile, x, self.codes, 2.0, tile)
            if of_codes is not None:
                of_codes += torch.ops.aten._cdist_backward(of_tile.mT.contiguous(), self.codes, x, 2.0, tile.mT.contiguous())
            return
        vectors, codes = self.centred
        vectors, pull = vectors[:, rows], _divide_(of_tile, tile)
        if self._near is not None:
            self._add_of_near_(self._near, pull, rows, of_x, of_codes)
        if of_x is not None:
            of_x[:, rows] += vectors * pull.sum(-1, keepdim=True) - pull @ codes
        if of_codes is not None:
            of_codes += codes * pull.sum(1).unsqueeze(-1) - pull.mT @ vectors

    def _add_of_near_(self, near: _Pairs, pull: Tensor, rows: slice, of_x: Tensor | None, of_codes: Tensor | None) -> None:
        """What near pairs make, by differences; they are taken out of `pull` [G, R, C]."""
        x = self.x[:, rows]
        at_once = max(1, _DIFFERENCES_AT_ONCE // x.shape[-1])
        for g, r, c in zip(*(part.split(at_once) for part in near), strict=True):
            found = (x[g, r] - self.codes[g, c]) * pull[g, r, c].unsqueeze(-1)
            if of_x is not None:
                of_x[:, rows].index_put_((g, r), found, accumulate=True)
            if of_codes is not None:
                of_codes.index_put_((g, c), -found, accumulate=True)
        pull[near] = 0.0


def _by_differences(x: Tensor, codes: Tensor) -> Tensor:
    return torch.cdist(x, codes, compute_mode="donot_use_mm_for_euclid_dist")


def _divide_(gradient: Tensor, distance: Tensor) -> Tensor:
    """gradient / distance, 0 where that is 0."""
    if may_look(distance) and (distance.numel() == 0 or distance.amin() > 0):
        return gradient.div_(distance)
    return torch.where(distance > 0, gradient / distance, 0.0)
