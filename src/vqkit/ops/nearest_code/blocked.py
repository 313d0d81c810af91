"""Nearest code by matrix products on tiles that stay in cache; no N x C matrix.

The nearest code has the largest score x.c - |c|^2 / 2, taken after subtracting the mean code from both, so that a common offset costs
no precision; the second term is one more column of the product. A rounding bound tells which scores of a row could be the best in
truth. One product of these hits with weights W + j, W a power of two above every j, gives their number and index at once: below W no
hit (the row is not finite), below 2 W exactly one, else several, and then the row's distances are computed by explicit differences.
That is three cheap passes over the scores, where an arg-max alone costs as much as the product. So on CPU; elsewhere, where asking which
rows are in doubt would wait for the device, all distances are explicit differences, a tile at a time.

Shapes: G codebooks, N vectors, C codes, K width, R rows and T codes of a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vqkit.ops.nearest_code import reference
from vqkit.ops.precision import full_precision

_CODES_PER_TILE = 512
_ROWS_PER_TILE = 2048
_CODES_PER_TILE_ELSEWHERE = 1 << 10
_SCORES_PER_TILE_ELSEWHERE = 1 << 24
_DIFFERENCES_AT_ONCE = 1 << 18
_SCORES_AT_ONCE = 1 << 20
_MIN_ROWS_PER_TILE = 64
_FEW_DIFFERENCES = 1 << 16


def nearest_index(x: Tensor, codebook: Tensor) -> Tensor:
    """x [G, N, K], codebook [G, C, K], both float32 or both float64 -> [G, N] int64; -1 where the least distance is not finite.

    Of codes whose distances differ by less than the rounding of explicit differences any may be chosen; of equal codes the first.
    """
    if x.shape[1] * codebook.numel() <= _FEW_DIFFERENCES:
        return reference.nearest_index(x, codebook)
    nearest = _nearest_on_cpu if x.device.type == "cpu" else _nearest_elsewhere
    with full_precision(x.device.type):
        return torch.stack([nearest(x[g], codebook[g]) for g in range(len(x))])


class _Tiled(NamedTuple):
    """A codebook as factors of the product."""

    origin: Tensor  # [K] mean code
    factor: Tensor  # [C, K + 1] codes around the origin, minus half of their squared lengths
    tiles: list[Tensor]  # [K + 1, T] each, of the transpose of that
    radius: Tensor  # [] the largest of their lengths


def _tile(codebook: Tensor) -> _Tiled:
    size, width = codebook.shape
    origin = codebook.mean(0)
    codes = codebook.new_empty(size, width + 1)
    around = torch.sub(codebook, origin, out=codes[:, :width])
    squared = torch.linalg.vector_norm(around, dim=-1).square_()
    torch.mul(squared, -0.5, out=codes[:, width])
    return _Tiled(origin, codes, [tile.mT for tile in codes.split(_CODES_PER_TILE)], squared.amax().sqrt_())


class _Rows:
    """Rows of vectors with a column of ones, around the origin of the codes; one buffer for all tiles of rows."""

    def __init__(self, x: Tensor, origin: Tensor, most: int) -> None:
        self.x, self.origin = x, origin
        self.per_tile = max(1, min(len(x), most))
        self.buffer = x.new_ones(self.per_tile, x.shape[1] + 1)

    def tile(self, start: int) -> tuple[Tensor, Tensor]:
        """Vectors [R, K] and the factor [R, K + 1]; both are overwritten by the next call."""
        part = self.x[start : start + self.per_tile]
        factor = self.buffer[: len(part)]
        return torch.sub(part, self.origin, out=factor[:, :-1]), factor


def _nearest_on_cpu(x: Tensor, codebook: Tensor) -> Tensor:
    """x [N, K], codebook [C, K] -> [N]."""
    tiled = _tile(codebook)
    rows = _Rows(x, tiled.origin, _ROWS_PER_TILE)
    scores = x.new_empty(rows.per_tile * tiled.tiles[0].shape[1])
    index = x.new_empty(len(x), dtype=torch.int64)
    doubtful = x.new_empty(len(x), dtype=torch.bool)
    for start in range(0, len(x), rows.per_tile):
        vectors, factor = rows.tile(start)
        stop = start + len(vectors)
        index[start:stop], doubtful[start:stop] = _race(factor, _rounding(vectors, tiled.radius), tiled.tiles, scores)
    row = doubtful.nonzero().squeeze(-1)
    if row.numel():
        index[row] = _settle(x[row], codebook, tiled)
    return index


def _rounding(vectors: Tensor, radius: Tensor) -> Tensor:
    """[R]: two computed scores further apart than this are in their true order.

    Centring, K + 1 products with their sum, and the half norm each err by their share of (K + 5) units of rounding.
    """
    length = torch.linalg.vector_norm(vectors, dim=-1)
    return length.add_(0.5 * radius).mul_(radius * ((vectors.shape[-1] + 5) * torch.finfo(vectors.dtype).eps))


def _race(factor: Tensor, margin: Tensor, tiles: list[Tensor], buffer: Tensor) -> tuple[Tensor, Tensor]:
    """factor [R, K + 1], margin [R] -> the best code [R], -1 where nothing is finite, and whether several could be it [R]."""
    num, size = len(factor), tiles[0].shape[1]
    unit = 1 << size.bit_length()
    weights = torch.arange(unit, unit + size, dtype=factor.dtype)
    best, found = factor.new_empty(len(tiles), num, 1), factor.new_empty(len(tiles), num)
    for t, tile in enumerate(tiles):
        scores = buffer[: num * tile.shape[1]].view(num, -1)
        torch.mm(factor, tile, out=scores)
        torch.amax(scores, -1, keepdim=True, out=best[t])
        torch.ge(scores, best[t] - margin.unsqueeze(-1), out=scores)
        torch.mv(scores, weights[: tile.shape[1]], out=found[t])
    first, total = -unit, found[0]
    if len(tiles) > 1:
        hits = best.squeeze(-1) >= best.amax(0).squeeze(-1) - margin
        total = found.where(hits, 0.0).sum(0)
        first = (hits * torch.arange(0, len(tiles) * size, size).unsqueeze(-1)).sum(0).sub_(unit)
    return torch.where(total < unit, -1, total.to(torch.int64) + first), total >= 2 * unit


def _settle(x: Tensor, codebook: Tensor, tiled: _Tiled) -> Tensor:
    """The nearest code [R] of rows x [R, K] by explicit differences to all codes that could be it."""
    at_once = max(1, _SCORES_AT_ONCE // len(codebook))
    return torch.cat([_settle_part(part, codebook, tiled) for part in x.split(at_once)])


def _settle_part(x: Tensor, codebook: Tensor, tiled: _Tiled) -> Tensor:
    vectors, factor = _Rows(x, tiled.origin, len(x)).tile(0)
    scores = factor @ tiled.factor.mT
    row, code = (scores >= scores.amax(-1, keepdim=True) - _rounding(vectors, tiled.radius).unsqueeze(-1)).nonzero(as_tuple=True)
    pairs = torch.stack([row, code]).split(max(1, _DIFFERENCES_AT_ONCE // x.shape[1]), dim=1)
    distance = torch.cat([(x[rows] - codebook[codes]).square_().sum(-1) for rows, codes in pairs])
    smallest = x.new_full((len(x),), torch.inf).scatter_reduce_(0, row, distance, "amin")
    first = torch.full_like(row, len(codebook)).where(distance != smallest[row], code)
    index = torch.full_like(smallest, len(codebook), dtype=torch.int64).scatter_reduce_(0, row, first, "amin")
    return torch.where(smallest.isfinite(), index, -1)


def _nearest_elsewhere(x: Tensor, codebook: Tensor) -> Tensor:
    rows = max(1, _SCORES_PER_TILE_ELSEWHERE // min(len(codebook), _CODES_PER_TILE_ELSEWHERE))
    return torch.cat([_nearest_by_distance(part, codebook) for part in x.split(rows)])


def _nearest_by_distance(x: Tensor, codebook: Tensor) -> Tensor:
    size = len(codebook)
    smallest = x.new_full(x.shape[:-1], torch.inf)
    index = torch.full_like(smallest, -1, dtype=torch.int64)
    for start in range(0, size, _CODES_PER_TILE_ELSEWHERE):
        distance = _distances(x, codebook[start : start + _CODES_PER_TILE_ELSEWHERE])
        nearest = distance.amin(-1)
        code = torch.arange(start, start + distance.shape[-1], device=x.device)
        first = torch.where(distance == nearest.unsqueeze(-1), code, size).amin(-1)
        index = torch.where(nearest < smallest, first, index)
        smallest = torch.minimum(smallest, nearest)
    return torch.where(smallest.isfinite(), index, -1)


def _distances(x: Tensor, codes: Tensor) -> Tensor:
    return torch.cdist(x, codes, compute_mode="donot_use_mm_for_euclid_dist")


_SPARE = 4
_CODES_PER_GROUP = 16


def nearest_codes(x: Tensor, codebook: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`reference.nearest_codes` without its memory: the same up to the rounding of explicit differences."""
    nearest = _rank_by_scores if x.device.type == "cpu" else _rank_by_distance
    with full_precision(x.device.type):
        parts = [nearest(x[g], codebook[g], k) for g in range(len(x))]
    if not parts:
        return x.new_empty(*x.shape[:-1], k, dtype=torch.int64), x.new_empty(*x.shape[:-1], k)
    indices, distances = zip(*parts, strict=True)
    return torch.stack(indices), torch.stack(distances)


def _rank_by_scores(x: Tensor, codebook: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """x [N, K], codebook [C, K] -> [N, k] twice: the codes of the k and some more largest scores by explicit differences.

    All codes for a row where still more than those could be meant.
    """
    tiled = _tile(codebook)
    factor_of_codes = F.pad(tiled.factor, (0, 0, 0, -len(codebook) % _CODES_PER_GROUP))
    factor_of_codes[len(codebook) :, -1] = -torch.inf  # codes that nobody is near
    rows = _Rows(x, tiled.origin, max(_MIN_ROWS_PER_TILE, _SCORES_AT_ONCE // len(codebook)))
    index, distance = x.new_empty(len(x), k, dtype=torch.int64), x.new_empty(len(x), k)
    for start in range(0, len(x), rows.per_tile):
        vectors, factor = rows.tile(start)
        score, code = _largest(factor @ factor_of_codes.mT, min(k + _SPARE, len(codebook)))
        here = slice(start, start + len(vectors))
        code = code.clamp_(max=len(codebook) - 1).sort(dim=-1).values  # a row that is not finite may hold any
        index[here], distance[here] = _rank(x[here], codebook, code, k)
        if score.shape[-1] == len(codebook):
            continue
        decided = score[:, -1] < score[:, k - 1] - _rounding(vectors, tiled.radius)
        for row in ((~decided).nonzero().squeeze(-1) + start).split(max(1, _DIFFERENCES_AT_ONCE // codebook.numel())):
            settled = reference.nearest_codes(x[row].unsqueeze(0), codebook.unsqueeze(0), k)
            index[row], distance[row] = settled[0].squeeze(0), settled[1].squeeze(0)
    return index, distance


def _largest(scores: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """`scores.topk(num)` of [R, C], which is slow: among the groups of the largest maxima, which hold the largest scores."""
    groups = scores.shape[1] // _CODES_PER_GROUP
    if groups <= num:
        return scores.topk(num, dim=-1)
    grouped = scores.view(len(scores), _CODES_PER_GROUP, groups)
    group = grouped.amax(1).topk(num, dim=-1).indices
    score, place = grouped.gather(2, group.unsqueeze(1).expand(-1, _CODES_PER_GROUP, -1)).flatten(1).topk(num, dim=-1)
    return score, place // num * groups + group.gather(1, place % num)


def _rank(x: Tensor, codebook: Tensor, code: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of the codes [N, E] of each row, in rising order, the k nearest."""
    distance, place = (x.unsqueeze(1) - codebook[code]).square().sum(-1).sort(dim=-1, stable=True)
    return reference.known(code.gather(-1, place[:, :k]), distance[:, :k])


def _rank_by_distance(x: Tensor, codebook: Tensor, k: int) -> tuple[Tensor, Tensor]:
    rows = max(1, _SCORES_PER_TILE_ELSEWHERE // min(len(codebook), _CODES_PER_TILE_ELSEWHERE))
    parts = [_rank_part_by_distance(part, codebook, k) for part in x.split(rows)]
    indices, distances = zip(*parts, strict=True)
    return torch.cat(indices), torch.cat(distances)


def _rank_part_by_distance(x: Tensor, codebook: Tensor, k: int) -> tuple[Tensor, Tensor]:
    distance, code = x.new_empty(len(x), 0), x.new_empty(len(x), 0, dtype=torch.int64)
    for start in range(0, len(codebook), _CODES_PER_TILE_ELSEWHERE):
        of_tile = _distances(x, codebook[start : start + _CODES_PER_TILE_ELSEWHERE])
        distance, place = torch.cat([distance, of_tile], dim=-1).sort(dim=-1, stable=True)
        here = torch.arange(start, start + of_tile.shape[-1], device=x.device).expand(len(x), -1)
        code = torch.cat([code, here], dim=-1).gather(-1, place)
        distance, code = distance[:, :k], code[:, :k]
    return _rank(x, codebook, code.sort(dim=-1).values, k)
