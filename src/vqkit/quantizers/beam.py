"""Beam search over the layers of a residual quantizer (as in Babenko and Lempitsky, 2014): the best few paths instead of the greedy one.

A path is one code per layer; its error is the squared distance between the vector and the sum of the codes so far. Nothing here is
differentiable: the search returns indices, and the codes of the chosen path are then quantized like any given indices.

Shapes: N vectors, D width, Q layers, S paths kept, P proposals per path.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_ELEMENTS = 2**22
"""About how many numbers one tensor of the search may hold; more vectors are searched in chunks."""


class Propose(Protocol):
    """The codes of one layer that are nearest to what is left of the vectors."""

    def __call__(self, layer: int, residual: Tensor, partial: Tensor, num: int) -> tuple[Tensor, Tensor]:
        """residual [M, D] and the sum of the codes before it [M, D] -> indices [M, P, ...] and codes [M, P, D]; P <= num."""
        ...


class _Paths(NamedTuple):
    """Best path first."""

    residual: Tensor  # [N, S, D]
    score: Tensor  # [N, S]
    indices: Tensor  # [N, S, layers so far, ...]


@torch.no_grad()
def beam_search(
    x: Tensor, num_layers: int, propose: Propose, size: int, *, weights: Sequence[float] | None = None, depth: Tensor | None = None
) -> Tensor:
    """The best path found for each vector of x [N, D], with `size` paths kept after every layer: indices [N, Q, ...] int64.

    Paths compete by their error, among equals the one whose earlier layers were better, then the lower index. With `weights`, one
    positive number a layer, they compete by the weighted sum of their errors after each layer, for those who decode coarse prefixes
    as well. Layers from `depth` (an integer tensor []) on are skipped and get index -1. A `size` of 1 is greedy; of the product of
    the codebook sizes before the last layer, exhaustive.
    """
    width = x.shape[-1]
    step = max(1, _ELEMENTS // (size * size * width))
    parts = [_search(part, num_layers, propose, size, weights, depth) for part in x.split(step)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _search(x: Tensor, num_layers: int, propose: Propose, size: int, weights: Sequence[float] | None, depth: Tensor | None) -> Tensor:
    paths = _Paths(x.unsqueeze(1), x.new_zeros(len(x), 1), torch.empty(0))
    for layer in range(num_layers):
        grown = _grow(x, paths, layer, propose, size, weights)
        paths = grown if depth is None else _skip_from(depth, layer, paths, grown)
    return paths.indices[:, 0]


def _grow(x: Tensor, paths: _Paths, layer: int, propose: Propose, size: int, weights: Sequence[float] | None) -> _Paths:
    """Every path by each of its proposals, and the best of all these."""
    number, kept, width = paths.residual.shape
    partial = x.unsqueeze(1) - paths.residual
    indices, codes = propose(layer, paths.residual.reshape(-1, width), partial.reshape(-1, width), size)
    proposed = indices.shape[1]
    residual = (paths.residual.unsqueeze(2) - codes.view(number, kept, proposed, width)).flatten(1, 2)
    score = residual.square().sum(-1)
    if weights is not None:
        score = weights[layer] * score + paths.score.repeat_interleave(proposed, dim=1)
    score, order = score.sort(dim=1, stable=True)
    score, order = score[:, :size], order[:, :size]
    new = _select(indices.reshape(number, kept * proposed, *indices.shape[2:]), order).unsqueeze(2)
    if layer > 0:
        new = torch.cat([_select(paths.indices, order // proposed), new], dim=2)
    return _Paths(_select(residual, order), score, new)


def _select(rows: Tensor, order: Tensor) -> Tensor:
    """rows [N, R, ...], order [N, S] -> [N, S, ...]."""
    index = order.reshape(*order.shape, *(1,) * (rows.dim() - 2)).expand(-1, -1, *rows.shape[2:])
    return rows.gather(1, index)


def _skip_from(depth: Tensor, layer: int, paths: _Paths, grown: _Paths) -> _Paths:
    """`grown` where this layer is above `depth`, else `paths` as they were, filled up with paths that never win."""
    if layer == 0:
        return grown
    more = grown.score.shape[1] - paths.score.shape[1]
    same = _Paths(
        F.pad(paths.residual, (0, 0, 0, more)),
        F.pad(paths.score, (0, more), value=torch.inf),
        F.pad(paths.indices, (0, 0) * (paths.indices.dim() - 3) + (0, 1, 0, more), value=-1),
    )
    return _Paths(*(torch.where(layer < depth, new, old) for new, old in zip(grown, same, strict=True)))
