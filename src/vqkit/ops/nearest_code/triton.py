"""Nearest code and the statistics of its choices on CUDA, as Triton kernels.

A first kernel keeps, tile of codes by tile, the best score x.c - |c|^2 / 2 around the mean code, its index and the second best score. Where
the two are further apart than rounding, the choice is proven. All other rows go on a list in device memory, whose length the host never
asks for, and a second kernel settles them by explicit differences. Statistics are sums over the vectors sorted by code, always in the
same order: the same inputs give the same bits, which sums by atomics do not, and one popular code does not queue up its vectors.

Kernels are defined when first asked for, since only then may triton be imported; it finds the names they use among this module's globals.
With TRITON_INTERPRET=1 in the environment, set before triton is imported, they run on CPU tensors.

Shapes: G codebooks or H heads, N vectors, C codes, K width.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vqkit.ops.nearest_code import blocked

if TYPE_CHECKING:
    import triton.language as tl  # pyrefly: ignore[missing-import]

_UNDECIDED = 0x7F800000 << 32  # the key of an infinite distance
_CODE_BITS = (1 << 32) - 1
_TINY = torch.finfo(torch.float32).tiny
_EPS = torch.finfo(torch.float32).eps
_SETTLED_ROWS, _SETTLED_CODES, _SETTLING_PROGRAMS = 16, 128, 1024
_VECTORS_PER_PIECE, _SUMMED_ROWS, _SUMMED_COLUMNS = 256, 16, 64

SHARED_BYTES = 64 << 10
"""What the tiles of one program may take of shared memory: three programs find room on a multiprocessor of an H100 or H200."""

# BLOCK_N, BLOCK_C, BLOCK_K, num_warps, num_stages
_CONFIGURATIONS = [
    (128, 128, 16, 8, 3),
    (128, 128, 32, 8, 2),
    (128, 64, 32, 4, 2),
    (64, 128, 16, 4, 3),
    (64, 128, 32, 4, 2),
    (64, 64, 32, 4, 3),
    (32, 128, 32, 4, 3),
    (16, 128, 32, 4, 3),
]
_INTERPRETED = [(16, 16, 16, 1, 1)]  # tiles small enough that tiny inputs have several; more than one would be timed, on a device


def is_importable() -> bool:
    """Whether triton is there, without importing it."""
    return find_spec("triton") is not None


def is_there() -> bool:
    """Whether triton is importable and VQKIT_TRITON=1 asks for it: the kernels are proved by the interpreter, not yet on a device."""
    return os.environ.get("VQKIT_TRITON") == "1" and is_importable()


def nearest_index(x: Tensor, codebook: Tensor) -> Tensor:
    """x [G, N, K], codebook [G, C, K], both float32 or both float64 -> [G, N] int64; -1 where the least distance is not finite.

    Of codes whose distances differ by less than the rounding of explicit differences any may be chosen; of equal codes the first. Waits
    for the device only to choose tile sizes, once for each K, C and power of two of N. float64 takes the form of blocked.py. Raises
    ImportError without triton, ValueError for tensors that are not on CUDA.
    """
    _check_device(x)
    if x.dtype == torch.float64 or x.numel() == 0:
        return blocked.nearest_index(x, codebook)
    with torch.cuda.device_of(x):
        x = x.contiguous()
        race = _run(x, codebook)
        _settle(x, codebook, race)
        known = (race.key >= 0) & (race.key < _UNDECIDED)
        return torch.where(known, race.key & _CODE_BITS, -1)


def scatter_statistics(x: Tensor, indices: Tensor, codebook_size: int, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`count` [H, C] and `sum` [H, C, K] of `vqkit.ops.codebook.assignment_stats`, float32 or float64 for float64 vectors.

    x [H, N, K] floating point, indices [H, N] int64 in -1 ... C - 1, weights [H, N] floating point, not negative. Vectors of index -1 or
    weight 0 enter nothing, whatever they hold. The same inputs give the same bits. Raises as `nearest_index`.
    """
    _check_device(x)
    dtype = torch.promote_types(x.dtype, torch.float32)
    heads, width = x.shape[0], x.shape[-1]
    num_segments = heads * codebook_size
    with torch.cuda.device_of(x):
        dropped = indices < 0 if weights is None else (indices < 0) | (weights == 0)
        head = torch.arange(heads, device=x.device).unsqueeze(-1)
        code = torch.where(dropped, num_segments, indices + head * codebook_size).reshape(-1).to(torch.int32)
        code, order = code.sort(stable=True)
        bounds = torch.searchsorted(code, torch.arange(num_segments + 1, dtype=torch.int32, device=x.device))
        share = None if weights is None else weights.detach().to(dtype).reshape(-1)
        total = _sum_by_segment(x.detach().reshape(-1, width), share, order, bounds, dtype)
        if share is None:
            count = bounds.diff().to(dtype)
        else:
            count = _sum_by_segment(share.unsqueeze(-1), None, order, bounds, dtype)
        return count.reshape(heads, codebook_size), total.reshape(heads, codebook_size, width)


def _check_device(x: Tensor) -> None:
    if not is_importable():
        raise ImportError("triton is not installed: pip install vqkit[triton], or ask for another impl")
    if not (x.is_cuda or _is_interpreted()):
        raise ValueError(f"x is on {x.device}: impl 'triton' needs a CUDA device (or TRITON_INTERPRET=1, for tests)")


def _is_interpreted() -> bool:
    return _triton().knobs.runtime.interpret


class _Race(NamedTuple):
    """What the scores say. A key holds the distance's bits above the code, so that the least key is the nearest code, the lower first."""

    key: Tensor  # [G, N] int64: the code, above zero bits; -1 where x is not finite; _UNDECIDED for rows on the list
    doubtful: Tensor  # [G, N] int32, of which the first num_doubtful of each codebook are the rows on the list, in no order
    num_doubtful: Tensor  # [G] int32


def _run(x: Tensor, codebook: Tensor) -> _Race:
    groups, num, width = x.shape
    size = codebook.shape[1]
    origin = codebook.mean(-2)
    codes = (codebook - origin.unsqueeze(-2)).mT.contiguous()  # [G, K, C]
    half_norm = codes.square().sum(-2).mul_(0.5)
    radius = half_norm.amax(-1).mul_(2.0).sqrt_()
    race = _Race(
        key=torch.empty(groups, num, dtype=torch.int64, device=x.device),
        doubtful=torch.empty(groups, num, dtype=torch.int32, device=x.device),
        num_doubtful=torch.zeros(groups, dtype=torch.int32, device=x.device),
    )
    bounds = _EPS * (width + 8), _TINY * (width + 8)
    _race_kernel()[lambda meta: (groups * -(-num // meta["BLOCK_N"]),)](
        x, origin, codes, half_norm, radius, *race, num, size, num.bit_length(), *bounds, WIDTH=width, UNDECIDED=_UNDECIDED
    )
    return race


def _settle(x: Tensor, codebook: Tensor, race: _Race) -> None:
    """Lower the keys of the rows on the list to those of their nearest codes."""
    groups, num, width = x.shape
    size = codebook.shape[1]
    items = -(-num // _SETTLED_ROWS) * -(-size // _SETTLED_CODES)
    programs = min(items, max(1, _SETTLING_PROGRAMS // groups))
    _settle_kernel()[(programs, groups)](
        x, codebook.mT.contiguous(), *race, num, size, WIDTH=width, UNDECIDED=_UNDECIDED, BLOCK_N=_SETTLED_ROWS, BLOCK_C=_SETTLED_CODES
    )


def _sum_by_segment(rows: Tensor, share: Tensor | None, order: Tensor, bounds: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums [S, K] of the rows [R, K], each times its share [R], at places bounds[s] ... bounds[s + 1] - 1 of `order` [R].

    In two steps, so that a long segment is many programs' work: sums of pieces of bounded length, then of each segment's pieces.
    """
    first, last = bounds[:-1], bounds[1:]
    pieces = (last - first + (_VECTORS_PER_PIECE - 1)) // _VECTORS_PER_PIECE
    end = pieces.cumsum(0)
    begin = end - pieces
    most = min(len(rows), len(first) + len(rows) // _VECTORS_PER_PIECE)  # how many there are is known to the device alone
    piece = torch.arange(most, device=rows.device)
    segment = torch.searchsorted(end, piece, right=True).clamp_(max=len(first) - 1)
    start = first[segment] + (piece - begin[segment]) * _VECTORS_PER_PIECE
    stop = torch.minimum(start + _VECTORS_PER_PIECE, last[segment])
    partial = _sum_ranges(rows.contiguous(), share, order, start, stop, dtype)
    return _sum_ranges(partial, None, None, begin, end, dtype)


def _sum_ranges(rows: Tensor, share: Tensor | None, order: Tensor | None, start: Tensor, stop: Tensor, dtype: torch.dtype) -> Tensor:
    width = rows.shape[-1]
    total = rows.new_empty(len(start), width, dtype=dtype)
    grid = (len(start), -(-width // _SUMMED_COLUMNS))
    _sum_kernel()[grid](rows, share, order, start, stop, total, WIDTH=width, BLOCK_N=_SUMMED_ROWS, BLOCK_K=_SUMMED_COLUMNS)
    return total


def _triton() -> Any:
    """The library; its language becomes a global, where triton looks for it."""
    global tl
    import triton  # pyrefly: ignore[missing-import]
    import triton.language as tl  # pyrefly: ignore[missing-import]

    return triton


def _fitting(configurations: list[Any], arguments: dict[str, Any], **constants: Any) -> list[Any]:
    """The configurations whose tiles are not mostly padding; never none."""
    widest = max(16, constants["WIDTH"])
    tallest = max(16, arguments["num"])
    fitting = [c for c in configurations if c.kwargs["BLOCK_K"] < 2 * widest and c.kwargs["BLOCK_N"] < 2 * tallest]
    return fitting or configurations[-1:]


@cache
def _race_kernel() -> Any:
    triton = _triton()
    configurations = [
        triton.Config({"BLOCK_N": n, "BLOCK_C": c, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
        for n, c, k, warps, stages in (_INTERPRETED if _is_interpreted() else _CONFIGURATIONS)
    ]

    @triton.autotune(
        configurations,
        key=["WIDTH", "size", "magnitude"],
        reset_to_zero=["num_doubtful"],
        prune_configs_by={"early_config_prune": _fitting},
    )
    @triton.jit
    def race(
        x: tl.tensor,  # [G, N, K]
        origin: tl.tensor,  # [G, K]
        codes: tl.tensor,  # [G, K, C] around the origin
        half_norm: tl.tensor,  # [G, C]
        radius: tl.tensor,  # [G]
        key: tl.tensor,
        doubtful: tl.tensor,
        num_doubtful: tl.tensor,
        num: tl.tensor,
        size: tl.tensor,
        magnitude: tl.tensor,
        rounding: tl.tensor,
        underflow: tl.tensor,
        WIDTH: tl.constexpr,
        UNDECIDED: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_C: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        blocks = tl.cdiv(num, BLOCK_N)
        group = (tl.program_id(0) // blocks).to(tl.int64)
        row = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
        present = row < num
        x += group * num * WIDTH + row.to(tl.int64)[:, None] * WIDTH
        origin += group * WIDTH
        codes += group * WIDTH * size
        half_norm += group * size
        radius = tl.load(radius + group)

        squared_length = tl.zeros([BLOCK_N], tl.float32)
        not_finite = tl.zeros([BLOCK_N], tl.int32)
        for first_column in range(0, WIDTH, BLOCK_K):
            column = first_column + tl.arange(0, BLOCK_K)
            vectors = tl.load(x + column[None, :], mask=present[:, None] & (column < WIDTH)[None, :], other=0.0)
            not_finite += tl.sum(tl.where(tl.abs(vectors) < float("inf"), 0, 1), 1)
            vectors -= tl.load(origin + column, mask=column < WIDTH, other=0.0)[None, :]
            squared_length += tl.sum(vectors * vectors, 1)

        best = tl.full([BLOCK_N], float("-inf"), tl.float32)
        second = tl.full([BLOCK_N], float("-inf"), tl.float32)
        index = tl.zeros([BLOCK_N], tl.int32)
        for first_code in tl.range(0, size, BLOCK_C):
            code = first_code + tl.arange(0, BLOCK_C)
            norms = tl.load(half_norm + code, mask=code < size, other=float("inf"))
            score = tl.zeros([BLOCK_N, BLOCK_C], tl.float32) - norms[None, :]
            for first_column in range(0, WIDTH, BLOCK_K):
                column = first_column + tl.arange(0, BLOCK_K)
                vectors = tl.load(x + column[None, :], mask=present[:, None] & (column < WIDTH)[None, :], other=0.0)
                vectors -= tl.load(origin + column, mask=column < WIDTH, other=0.0)[None, :]
                inside = (column < WIDTH)[:, None] & (code < size)[None, :]
                tile = tl.load(codes + column[:, None] * size + code[None, :], mask=inside, other=0.0)
                score = tl.dot(vectors, tile, score, input_precision="ieee")
            tile_best = tl.max(score, 1)
            tile_index = tl.min(tl.where(score == tile_best[:, None], code[None, :], size), 1)
            tile_second = tl.max(tl.where(code[None, :] == tile_index[:, None], float("-inf"), score), 1)
            second = tl.maximum(tl.maximum(second, tile_second), tl.minimum(best, tile_best))
            index = tl.where(tile_best > best, tile_index, index)
            best = tl.maximum(best, tile_best)

        # Two computed scores further apart than this are in their true order; of lengths near overflow nothing is said.
        margin = (tl.sqrt(squared_length) + 0.5 * radius) * radius * rounding + underflow
        proven = (best - second > margin) & (squared_length + radius * radius < 1e37)
        found = tl.where(proven, index.to(tl.int64), UNDECIDED)
        tl.store(key + group * num + row, tl.where(not_finite > 0, -1, found), mask=present)
        listed = ((not_finite == 0) & (proven == 0) & present).to(tl.int32)
        place = tl.atomic_add(num_doubtful + group, tl.sum(listed, 0)) + tl.cumsum(listed, 0) - 1
        tl.store(doubtful + group * num + place, row, mask=listed > 0)

    return race


@cache
def _settle_kernel() -> Any:
    triton = _triton()

    @triton.jit
    def settle(
        x: tl.tensor,  # [G, N, K]
        codebook: tl.tensor,  # [G, K, C]
        key: tl.tensor,
        doubtful: tl.tensor,
        num_doubtful: tl.tensor,
        num: tl.tensor,
        size: tl.tensor,
        WIDTH: tl.constexpr,
        UNDECIDED: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        group = tl.program_id(1).to(tl.int64)
        x += group * num * WIDTH
        codebook += group * WIDTH * size
        count = tl.load(num_doubtful + group)
        tiles = tl.cdiv(size, BLOCK_C)
        for item in tl.range(tl.program_id(0), tl.cdiv(count, BLOCK_N) * tiles, tl.num_programs(0)):
            place = (item // tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
            code = (item % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
            row = tl.load(doubtful + group * num + place, mask=place < count, other=0).to(tl.int64)
            distance = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
            for column in range(WIDTH):
                vectors = tl.load(x + row * WIDTH + column)
                codes = tl.load(codebook + column * size + code, mask=code < size, other=0.0)
                difference = vectors[:, None] - codes[None, :]
                distance += difference * difference
            bits = distance.to(tl.int32, bitcast=True).to(tl.int64)
            found = tl.where(distance == distance, (bits << 32) | code.to(tl.int64)[None, :], -1)
            found = tl.where((code < size)[None, :], found, UNDECIDED)
            tl.atomic_min(key + group * num + row, tl.min(found, 1), mask=place < count)

    return settle


@cache
def _sum_kernel() -> Any:
    triton = _triton()

    @triton.jit
    def sum_ranges(
        rows: tl.tensor,  # [R, K]
        share: tl.tensor,  # [R]
        order: tl.tensor,  # [R]
        start: tl.tensor,  # [S]
        stop: tl.tensor,  # [S]
        total: tl.tensor,  # [S, K]
        WIDTH: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        segment = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
        last = tl.load(stop + segment)
        dtype = total.dtype.element_ty
        sums = tl.zeros([BLOCK_N, BLOCK_K], dtype)
        for first in tl.range(tl.load(start + segment), last, BLOCK_N):
            row = first + tl.arange(0, BLOCK_N)
            present = row < last
            if order is not None:
                row = tl.load(order + row, mask=present, other=0)
            inside = present[:, None] & (column < WIDTH)[None, :]
            values = tl.load(rows + row.to(tl.int64)[:, None] * WIDTH + column[None, :], mask=inside, other=0.0).to(dtype)
            if share is not None:
                values *= tl.load(share + row, mask=present, other=0.0)[:, None]
            sums += values
        tl.store(total + segment * WIDTH + column, tl.sum(sums, 0), mask=column < WIDTH)

    return sum_ranges
