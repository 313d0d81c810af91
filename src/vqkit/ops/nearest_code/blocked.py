"""Nearest code by matrix products on tiles that stay in cache; no N x C matrix.

The nearest code has the largest score x.c - |c|^2 / 2, taken after subtracting the mean code from both, so that a common offset costs
no precision. A rounding bound tells which scores of a row could be the best in truth. One product of these hits with weights W + j, W a
power of two above every j, gives their number and index at once: below W no hit (the row is not finite), below 2 W exactly one, else
several, and then the row's distances are computed by explicit differences. That is three cheap passes over the scores, where an arg-max
alone costs as much as the product. So on CPU; elsewhere, where asking which rows are in doubt would wait for the device, all distances
are explicit differences, a tile at a time.

Shapes: G codebooks, N vectors, C codes, K width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vqkit.ops.nearest_code import reference

_CODES_PER_TILE = 1 << 10
_SCORES_PER_TILE = {"cpu": 1 << 18}  # 1 MiB of float32
_SCORES_PER_TILE_ELSEWHERE = 1 << 24
_MIN_ROWS_PER_TILE = 128
_DIFFERENCES_AT_ONCE = 1 << 18
_FEW_DIFFERENCES = 1 << 16


def nearest_index(x: Tensor, codebook: Tensor) -> Tensor:
    """x [G, N, K], codebook [G, C, K], both float32 or both float64 -> [G, N] int64; -1 where the least distance is not finite.

    Of codes whose distances differ by less than the rounding of explicit differences any may be chosen; of equal codes the first.
    """
    size = codebook.shape[-2]
    if x.shape[1] * codebook.numel() <= _FEW_DIFFERENCES:
        return reference.nearest_index(x, codebook)
    if size > _CODES_PER_TILE and x.shape[0] > 1:
        return torch.cat([nearest_index(x[g : g + 1], codebook[g : g + 1]) for g in range(x.shape[0])])
    prepared = _prepare(codebook)
    scores_per_tile = _SCORES_PER_TILE.get(x.device.type, _SCORES_PER_TILE_ELSEWHERE)
    rows = max(_MIN_ROWS_PER_TILE, scores_per_tile // (x.shape[0] * min(size, _CODES_PER_TILE)))
    nearest = _nearest_on_cpu if x.device.type == "cpu" else _nearest_elsewhere
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


class _Race(NamedTuple):
    """What the codes of a tile did for each vector."""

    best: Tensor  # [G, N, 1] largest score
    index: Tensor  # [G, N] its code; of no meaning where doubtful; -1 where nothing is finite
    doubtful: Tensor  # [G, N] bool, whether several codes could be the best


def _nearest_on_cpu(x: Tensor, prepared: _Prepared) -> Tensor:
    vectors = x - prepared.origin
    margin = _rounding(vectors, prepared.radius)
    first, *others = _code_slices(prepared.codebook.shape[-2])
    race = _run(vectors, margin, prepared, first)
    for codes in others:
        race = _merge(race, _run(vectors, margin, prepared, codes), margin)
    group, row = race.doubtful.nonzero(as_tuple=True)
    if row.numel():
        race.index[group, row] = _settle(x[group, row], group, prepared.codebook)
    return race.index


def _rounding(vectors: Tensor, radius: Tensor) -> Tensor:
    """[G, N, 1]: two computed scores further apart than this are in their true order.

    Centring, K products with their sum, and the half norm each err by their share of (K + 4) units of rounding.
    """
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return length.add_(0.5 * radius).mul_(radius * ((vectors.shape[-1] + 4) * torch.finfo(vectors.dtype).eps))


def _run(vectors: Tensor, margin: Tensor, prepared: _Prepared, codes: slice) -> _Race:
    scores = _scores(vectors, prepared, codes)
    best = scores.amax(-1, keepdim=True)
    hits = scores.ge_(best - margin)
    num = hits.shape[-1]
    unit = 1 << num.bit_length()
    weights = torch.arange(unit, unit + num, dtype=vectors.dtype)
    found = (hits.view(-1, num) @ weights).view(vectors.shape[:-1])
    index = torch.where(found < unit, -1, found.to(torch.int64).add_(codes.start - unit))
    return _Race(best, index, found >= 2 * unit)


def _merge(race: _Race, later: _Race, margin: Tensor) -> _Race:
    rises = (later.best > race.best).squeeze(-1)
    wins = (later.best > race.best + margin).squeeze(-1)
    close = (later.best >= race.best - margin).squeeze(-1)
    return _Race(
        torch.maximum(race.best, later.best),
        torch.where(rises, later.index, race.index),
        torch.where(wins, later.doubtful, race.doubtful | close),
    )


def _settle(x: Tensor, group: Tensor, codebook: Tensor) -> Tensor:
    """The nearest code [R] of rows x [R, K], each with its group's codebook, by explicit differences."""
    at_once = max(1, _DIFFERENCES_AT_ONCE // codebook[0].numel())
    parts = zip(x.split(at_once), group.split(at_once), strict=True)
    return torch.cat([reference.nearest_index(rows.unsqueeze(1), codebook[g]) for rows, g in parts]).squeeze(1)


def _nearest_elsewhere(x: Tensor, prepared: _Prepared) -> Tensor:
    size = prepared.codebook.shape[-2]
    smallest = x.new_full(x.shape[:-1], torch.inf)
    index = torch.full_like(smallest, -1, dtype=torch.int64)
    for codes in _code_slices(size):
        distance = torch.cdist(x, prepared.codebook[:, codes], compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distance.amin(-1)
        code = torch.arange(codes.start, codes.stop, device=x.device)
        first = torch.where(distance == nearest.unsqueeze(-1), code, size).amin(-1)
        index = torch.where(nearest < smallest, first, index)
        smallest = torch.minimum(smallest, nearest)
    return torch.where(smallest.isfinite(), index, -1)


_SPARE = 8


def nearest_codes(x: Tensor, codebook: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`reference.nearest_codes` without its memory: the same up to the rounding of explicit differences."""
    parts = [_nearest_codes_of_one(x[g], codebook[g], k) for g in range(x.shape[0])]
    if not parts:
        return x.new_empty(*x.shape[:-1], k, dtype=torch.int64), x.new_empty(*x.shape[:-1], k)
    indices, distances = zip(*parts, strict=True)
    return torch.stack(indices), torch.stack(distances)


def _nearest_codes_of_one(x: Tensor, codebook: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """x [N, K], codebook [C, K] -> [N, k] twice."""
    on_cpu = x.device.type == "cpu"
    scores_per_tile = _SCORES_PER_TILE.get(x.device.type, _SCORES_PER_TILE_ELSEWHERE)
    rows = max(_MIN_ROWS_PER_TILE, scores_per_tile // min(codebook.shape[0], _CODES_PER_TILE))
    prepared = _prepare(codebook.unsqueeze(0))
    tiles = [_rank_by_scores(tile, prepared, k) if on_cpu else _rank_by_distance(tile, codebook, k) for tile in x.split(rows)]
    indices, distances = zip(*tiles, strict=True)
    return torch.cat(indices), torch.cat(distances)


def _rank_by_scores(x: Tensor, prepared: _Prepared, k: int) -> tuple[Tensor, Tensor]:
    """The codes of the k and some more largest scores by explicit differences; all codes for a row where still more could be meant."""
    size = prepared.codebook.shape[-2]
    vectors = (x - prepared.origin).squeeze(0)
    margin = _rounding(vectors, prepared.radius[0])
    score, code = x.new_empty(len(x), 0), x.new_empty(len(x), 0, dtype=torch.int64)
    for codes in _code_slices(size):
        of_tile = _scores(vectors.unsqueeze(0), prepared, codes).squeeze(0)
        best, place = of_tile.topk(min(k + _SPARE, of_tile.shape[-1]), dim=-1)
        score, code = torch.cat([score, best], dim=-1), torch.cat([code, place + codes.start], dim=-1)
        score, place = score.topk(min(k + _SPARE, score.shape[-1]), dim=-1)
        code = code.gather(-1, place)
    index, distance = _rank(x, prepared.codebook[0], code.sort(dim=-1).values, k)
    if score.shape[-1] < size:
        doubtful = (~(score[:, -1:] < score[:, k - 1 : k] - margin)).squeeze(-1).nonzero().squeeze(-1)
        for row in doubtful.split(max(1, _DIFFERENCES_AT_ONCE // prepared.codebook.numel())):
            settled, settled_distance = reference.nearest_codes(x[row].unsqueeze(0), prepared.codebook, k)
            index[row], distance[row] = settled.squeeze(0), settled_distance.squeeze(0)
    return index, distance


def _rank(x: Tensor, codebook: Tensor, code: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of the codes [N, E] of each row, in rising order, the k nearest."""
    distance, place = (x.unsqueeze(1) - codebook[code]).square().sum(-1).sort(dim=-1, stable=True)
    return reference.known(code.gather(-1, place[:, :k]), distance[:, :k])


def _rank_by_distance(x: Tensor, codebook: Tensor, k: int) -> tuple[Tensor, Tensor]:
    distance, code = x.new_empty(len(x), 0), x.new_empty(len(x), 0, dtype=torch.int64)
    for codes in _code_slices(codebook.shape[0]):
        of_tile = torch.cdist(x, codebook[codes], compute_mode="donot_use_mm_for_euclid_dist")
        distance, place = torch.cat([distance, of_tile], dim=-1).sort(dim=-1, stable=True)
        code = torch.cat([code, torch.arange(codes.start, codes.stop, device=x.device).expand(len(x), -1)], dim=-1).gather(-1, place)
        distance, code = distance[:, :k], code[:, :k]
    return _rank(x, codebook, code.sort(dim=-1).values, k)
