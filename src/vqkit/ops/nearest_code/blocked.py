"""Nearest code by matrix products on tiles that stay in cache; no N x C matrix.

The nearest code has the largest score x.c - |c|^2 / 2, taken after subtracting the mean code from both, so that a common offset costs
no precision. A rounding bound tells which scores of a row could be the best in truth. On CPU one product of these hits with weights
W + j, W a power of two above every j, gives their number and index at once: below W no hit (the row is not finite), below 2 W exactly
one, else several, and then their few distances are computed by explicit differences. That is three cheap passes over the scores, where
an arg-max alone costs as much as the product. Elsewhere the four best scores are settled by explicit differences for every row, which
needs no synchronisation with the host.

Shapes: G codebooks, N vectors, C codes, K width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_CODES_PER_TILE = 1 << 10
_SCORES_PER_TILE = {"cpu": 1 << 18}  # 1 MiB of float32
_SCORES_PER_TILE_ELSEWHERE = 1 << 24
_MIN_ROWS_PER_TILE = 128
_PAIRS_AT_ONCE = 1 << 15
_FINALISTS = 4


def nearest_index(x: Tensor, codebook: Tensor) -> Tensor:
    """x [G, N, K], codebook [G, C, K], both float32 or both float64 -> [G, N] int64; -1 where a distance is not finite.

    Of codes whose distances differ by less than the rounding of explicit differences any may be chosen; of equal codes the first.
    """
    size = codebook.shape[-2]
    if size > _CODES_PER_TILE and x.shape[0] > 1:
        return torch.cat([nearest_index(x[g : g + 1], codebook[g : g + 1]) for g in range(x.shape[0])])
    prepared = _prepare(codebook)
    scores_per_tile = _SCORES_PER_TILE.get(x.device.type, _SCORES_PER_TILE_ELSEWHERE)
    rows = max(_MIN_ROWS_PER_TILE, scores_per_tile // (x.shape[0] * min(size, _CODES_PER_TILE)))
    nearest = _nearest_on_cpu if x.device.type == "cpu" else _nearest_without_sync
    if x.shape[1] <= rows:
        return nearest(x, prepared)
    return torch.cat([nearest(tile, prepared) for tile in x.split(rows, dim=1)], dim=1)


class _Prepared(NamedTuple):
    codebook: Tensor  # [G, C, K]
    origin: Tensor  # [G, 1, K] mean code
    codes: Tensor  # [G, K, C] codes around the origin
    half_norm: Tensor  # [G, 1, C] half of their squared lengths
    radius: Tensor  # [G, 1, 1] largest of their lengths


def _prepare(codebook: Tensor) -> _Prepared:
    origin = codebook.mean(-2, keepdim=True)
    codes = codebook - origin
    half_norm = codes.square().sum(-1).mul_(0.5).unsqueeze(-2)
    return _Prepared(codebook, origin, codes.mT, half_norm, half_norm.amax(-1, keepdim=True).mul(2.0).sqrt_())


def _code_slices(size: int) -> list[slice]:
    return [slice(start, min(start + _CODES_PER_TILE, size)) for start in range(0, size, _CODES_PER_TILE)]


def _scores(vectors: Tensor, prepared: _Prepared, codes: slice) -> Tensor:
    return torch.baddbmm(prepared.half_norm[..., codes], vectors, prepared.codes[..., codes], beta=-1)


def _nearest_on_cpu(x: Tensor, prepared: _Prepared) -> Tensor:
    size, width = prepared.codebook.shape[-2:]
    vectors = x - prepared.origin
    margin = _rounding(vectors, prepared.radius, width)
    unit = 1 << min(size, _CODES_PER_TILE).bit_length()
    weights = torch.arange(unit, unit + min(size, _CODES_PER_TILE), dtype=x.dtype)
    for codes in _code_slices(size):
        scores = _scores(vectors, prepared, codes)
        top = scores.amax(-1, keepdim=True)
        hits = scores.ge_(top - margin)
        found = (hits.view(-1, hits.shape[-1]) @ weights[: hits.shape[-1]]).view(x.shape[:2])
        several = found >= 2 * unit
        index = found.to(torch.int64).sub_(unit).clamp_(min=-1)
        if codes.start == 0:
            best, chosen, doubtful = top, index, several
            continue
        index += codes.start
        rises = (top > best).squeeze(-1)
        leaves = (top > best + margin).squeeze(-1)
        ties = (top >= best - margin).squeeze(-1)
        chosen = torch.where(rises, index, chosen)
        doubtful = torch.where(leaves, several, doubtful | ties)
        best = torch.maximum(best, top)
    group, row = doubtful.nonzero(as_tuple=True)
    if row.numel():
        chosen[group, row] = _settle(x[group, row], vectors[group, row], (best - margin)[group, row], group, prepared)
    return chosen


def _rounding(vectors: Tensor, radius: Tensor, width: int) -> Tensor:
    """[G, N, 1]: two computed scores further apart than this are in their true order.

    Centring, K products with their sum, and the half norm each err by their share of (K + 4) units of rounding.
    """
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return (length + 0.5 * radius).mul_(radius * ((width + 4) * torch.finfo(vectors.dtype).eps))


def _settle(x: Tensor, vectors: Tensor, threshold: Tensor, group: Tensor, prepared: _Prepared) -> Tensor:
    """The nearest code [R] of rows x [R, K] by explicit differences, among the codes that score at least `threshold` [R, 1]."""
    size = prepared.codebook.shape[-2]
    smallest = x.new_full((len(x),), torch.inf)
    index = torch.full((len(x),), -1, dtype=torch.int64)
    for g in group.unique().tolist():
        rows = (group == g).nonzero().squeeze(1)
        for codes in _code_slices(size):
            scores = vectors[rows] @ prepared.codes[g, :, codes] - prepared.half_norm[g, :, codes]
            pair_row, pair_code = (scores >= threshold[rows]).nonzero(as_tuple=True)
            pair_row, pair_code = rows[pair_row], pair_code + codes.start
            _take_nearest_(smallest, index, x, prepared.codebook[g], pair_row, pair_code)
    return index


def _take_nearest_(smallest: Tensor, index: Tensor, x: Tensor, codebook: Tensor, row: Tensor, code: Tensor) -> None:
    """Let row r of `smallest` and `index` know the nearest of its codes, the first among equals; codes come in rising order."""
    size = codebook.shape[0]
    parts = zip(row.split(_PAIRS_AT_ONCE), code.split(_PAIRS_AT_ONCE), strict=True)
    distance = torch.cat([(x[r] - codebook[c]).square_().sum(-1) for r, c in parts])
    nearest = torch.full_like(smallest, torch.inf).scatter_reduce_(0, row, distance, "amin")
    equal = torch.where(distance == nearest[row], code, size)
    first = torch.full_like(index, size).scatter_reduce_(0, row, equal, "amin")
    closer = nearest < smallest
    smallest.copy_(torch.where(closer, nearest, smallest))
    index.copy_(torch.where(closer, first, index))


def _nearest_without_sync(x: Tensor, prepared: _Prepared) -> Tensor:
    size = prepared.codebook.shape[-2]
    vectors = x - prepared.origin
    best, finalists = x.new_empty((*x.shape[:2], 0)), torch.empty((*x.shape[:2], 0), dtype=torch.int64, device=x.device)
    for codes in _code_slices(size):
        scores = _scores(vectors, prepared, codes)
        top, index = scores.topk(min(_FINALISTS, scores.shape[-1]), dim=-1)
        best, index = torch.cat([best, top], dim=-1), torch.cat([finalists, index + codes.start], dim=-1)
        best, place = best.topk(min(_FINALISTS, best.shape[-1]), dim=-1)
        finalists = index.gather(-1, place)
    flat = (finalists + size * torch.arange(x.shape[0], device=x.device).view(-1, 1, 1)).view(-1)
    candidates = prepared.codebook.reshape(-1, x.shape[-1]).index_select(0, flat).view(*finalists.shape, x.shape[-1])
    distance = (x.unsqueeze(-2) - candidates).square_().sum(-1)
    nearest = distance.amin(-1, keepdim=True)
    index = torch.where(distance == nearest, finalists, size).amin(-1)
    return torch.where(nearest.squeeze(-1).isfinite(), index, -1)
