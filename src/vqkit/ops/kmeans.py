"""K-means (Lloyd, 1982) for several codebooks at once, with k-means++ starts (Arthur and Vassilvitskii, 2007), also of directions.

Shapes: H codebooks, N vectors, S sampled vectors, C codes, K width.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vqkit.dist import LocalReducer, Reducer
from vqkit.ops.codebook import assignment_stats, codes_from_ema, directions, largest_keys, replace_dead_codes
from vqkit.ops.nearest_code import nearest_code, nearest_index

Metric = Literal["euclidean", "cosine"]

_SAMPLED_PER_CODE = 32


class KMeans(NamedTuple):
    """Codes and how many vectors chose each."""

    codes: Tensor  # [H, C, K]
    count: Tensor  # [H, C] the vectors whose mean a code is; 0 where there are fewer distinct vectors than codes


@torch.no_grad()
def kmeans(
    x: Tensor,
    codebook_size: int,
    *,
    mask: Tensor | None = None,
    iterations: int = 10,
    start: Literal["k-means++", "random"] | Tensor = "k-means++",
    metric: Metric = "euclidean",
    generator: torch.Generator | None = None,
    reducer: Reducer | None = None,
) -> KMeans:
    """Cluster x [H, N, K] into `codebook_size` codes a head; mask [H, N] bool, True for vectors that count.

    Vectors that are not finite take no part. The start, and new places for codes that nobody chose (the vectors furthest from their
    codes), come from a random sample of up to 32 vectors a code, drawn by `generator` on the device of x; `start` may be codes
    [H, C, K] instead. With metric "cosine" the directions of the vectors are clustered, those of length 0 take no part either, and codes
    have length 1 (spherical k-means; Dhillon and Modha, 2001). With a reducer, codes and counts are those of the vectors of all ranks
    and equal on all of them, given generators of equal state; from a given start they are those of one process, where the sample holds
    every vector or no code is left empty. A rank may have no vector. float32 or float64, as x.
    Raises ValueError for a codebook size or a number of iterations below 1, and when a head has no vector.
    """
    for name, value in (("codebook_size", codebook_size), ("iterations", iterations)):
        if value < 1:
            raise ValueError(f"{name} = {value}: must be at least 1")
    if isinstance(start, Tensor):
        if start.shape != (x.shape[0], codebook_size, x.shape[-1]):
            raise ValueError(f"start has shape {tuple(start.shape)}: must be {(x.shape[0], codebook_size, x.shape[-1])}")
    elif start not in ("k-means++", "random"):
        raise ValueError(f'start = {start!r}: must be "k-means++", "random" or a tensor of codes')
    if metric not in ("euclidean", "cosine"):
        raise ValueError(f'metric = {metric!r}: must be "euclidean" or "cosine"')
    reducer = reducer or LocalReducer()
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    valid = x.isfinite().all(-1) if mask is None else x.isfinite().all(-1) & mask
    x = x.where(valid.unsqueeze(-1), 0.0)
    place = _means
    if metric == "cosine":
        x, place = directions(x), _mean_directions
        valid = valid & x.any(-1)
    sample, present = _sample(x, valid, _SAMPLED_PER_CODE * codebook_size, generator, reducer)
    if not present.any(-1).all():
        raise ValueError(f"x has shape {tuple(x.shape)}, and a head of it holds no finite vector that counts: must hold at least one")
    codes = _start(start, metric, sample, present, codebook_size, generator)
    count, total = _assign(x, valid, codes, reducer)
    for _ in range(iterations - 1):
        codes = place(codes, count, total)
        if not count.all():  # the counts are those of all ranks, so that all ranks agree
            codes = _reseed(codes, count, sample, present)
        count, total = _assign(x, valid, codes, reducer)
    return KMeans(place(codes, count, total), count)


def _start(start: str | Tensor, metric: str, sample: Tensor, present: Tensor, num: int, generator: torch.Generator | None) -> Tensor:
    if isinstance(start, Tensor):
        codes = start.to(sample.dtype)
        return directions(codes) if metric == "cosine" else codes
    choose = _spread if start == "k-means++" else _first
    return choose(sample, present, num, generator)


def _means(codes: Tensor, count: Tensor, total: Tensor) -> Tensor:
    return torch.where(count.unsqueeze(-1) > 0, codes_from_ema(total, count, floor=1.0), codes)


def _mean_directions(codes: Tensor, count: Tensor, total: Tensor) -> Tensor:
    mean = directions(total)
    return torch.where(mean.any(-1, keepdim=True) & (count.unsqueeze(-1) > 0), mean, codes)


def _sample(x: Tensor, valid: Tensor, size: int, generator: torch.Generator | None, reducer: Reducer) -> tuple[Tensor, Tensor]:
    """Up to `size` random vectors of each rank: rows [H, S, K], and which of them are there [H, S]."""
    draws = 1.0 - torch.rand(valid.shape, dtype=x.dtype, device=x.device, generator=generator)
    rows, keys = largest_keys(x, draws.where(valid, 0.0), size)
    slots = x.new_zeros(reducer.world_size, *keys.shape, x.shape[-1] + 1)
    slots[reducer.rank] = torch.cat([rows, keys.unsqueeze(-1)], dim=-1)
    reducer.all_reduce_(slots)
    gathered = slots.movedim(0, 1).flatten(1, 2)
    return gathered[..., :-1], gathered[..., -1] > 0


def _first(sample: Tensor, present: Tensor, num: int, generator: torch.Generator | None) -> Tensor:
    """Random vectors: a sample stands in random order already. Too few start over."""
    order = present.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(num, device=sample.device) % present.sum(-1, keepdim=True)
    return _take(sample, order.gather(1, place))


def _spread(sample: Tensor, present: Tensor, num: int, generator: torch.Generator | None) -> Tensor:
    """k-means++: each next code is a vector drawn with a probability in proportion to its squared distance to the codes so far."""
    weight = present.to(sample.dtype)
    distance, codes = weight, []
    for _ in range(num):
        hopeless = distance.sum(-1, keepdim=True) == 0  # fewer distinct vectors than codes
        drawn = torch.where(hopeless, weight, distance).multinomial(1, generator=generator)
        codes.append(_take(sample, drawn))
        to_new = (sample - codes[-1]).square().sum(-1) * weight
        distance = to_new if len(codes) == 1 else torch.minimum(distance, to_new)
    return torch.cat(codes, dim=1)


def _take(rows: Tensor, index: Tensor) -> Tensor:
    return rows.gather(1, index.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))


def _assign(x: Tensor, valid: Tensor, codes: Tensor, reducer: Reducer) -> tuple[Tensor, Tensor]:
    """Count [H, C] and sum [H, C, K] of the vectors of all ranks."""
    indices = nearest_index(x, codes).where(valid, -1)
    statistics = assignment_stats(x, indices, codes.shape[1])
    flat = torch.cat([statistics.count.unsqueeze(-1), statistics.sum], dim=-1)
    reducer.all_reduce_(flat)
    return flat[..., 0], flat[..., 1:]


def _reseed(codes: Tensor, count: Tensor, sample: Tensor, present: Tensor) -> Tensor:
    """Codes that nobody chose move to the sampled vectors furthest from their codes."""
    distance = nearest_code(sample, codes).squared_distance.where(present, 0.0)
    rows, keys = largest_keys(sample, distance, codes.shape[1])
    return replace_dead_codes(codes, count, rows, keys, threshold=1.0, reset_count=1.0)[0]
