"""Vectors whose scalars are rounded one by one, each to levels of its own: codes without a table, and what can be said of all of them.

The codes are all combinations of levels, named by one integer each. So nothing here looks for a code, and what needs all codes at once
factorises over the scalars.

Shapes: d scalars of a vector, L levels of a scalar, C = L_1 ... L_d codes, N vectors, H heads, b bits.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from vqkit.ops.codebook import CodebookStatistics
from vqkit.ops.precision import as_dtype, full_precision, may_keep, may_look

Bound = Literal["tanh", "clamp", "centred_tanh", "centred_clamp"]
_EPS = 1e-3  # keeps the outermost scalars of FSQ off the ties of rounding


# Integers


def join_digits(digits: Tensor, levels: Sequence[int], *, first: Literal["lowest", "highest"] = "lowest") -> Tensor:
    """digits [..., d] of 0 ... L_i - 1, whole numbers of any dtype -> the integer [...] int64 that they write, the first the lowest digit.

    Or the highest. Exact up to 2^63 codes.
    """
    if may_keep(digits) and digits.is_cpu and (places := _kept_places(tuple(levels), first, digits.dtype)) is not None:
        with full_precision("cpu"):
            return digits.matmul(places).long()
    if first == "highest":
        digits, levels = digits.flip(-1), levels[::-1]
    total = digits[..., -1].to(torch.int64)
    for place in range(len(levels) - 2, -1, -1):
        total = total * levels[place] + digits[..., place].to(torch.int64)
    return total


def split_digits(
    indices: Tensor, levels: Sequence[int], dtype: torch.dtype = torch.int64, *, first: Literal["lowest", "highest"] = "lowest"
) -> Tensor:
    """The digits [..., d] of integers [...] from 0 to C - 1; those of -1 are 0."""
    size = math.prod(levels)
    if may_look(indices) and size <= _whole_up_to(torch.float64):
        # A quotient of whole numbers that a float holds is never rounded up to the next whole number.
        wide = indices.to(torch.float32 if size <= _whole_up_to(torch.float32) else torch.float64).clamp(min=0).unsqueeze(-1)
        above = wide.div(per_scalar(_places_of[first], (*levels, 1) if first == "lowest" else (1, *levels), wide)).floor_()
        own, next_higher = above[..., :-1], above[..., 1:]
        if first == "highest":
            own, next_higher = next_higher, own
        return as_dtype(torch.addcmul(own, next_higher, per_scalar(tuple, levels, wide), value=-1), dtype)
    rest, digits = indices.to(torch.int64).clamp(min=0), []
    for number in levels if first == "lowest" else reversed(levels):
        digits.append(rest % number)
        rest = rest // number
    return torch.stack(digits if first == "lowest" else digits[::-1], dim=-1).to(dtype)


_WHOLE = {torch.float32: 2.0**24, torch.float64: 2.0**53}


def _whole_up_to(dtype: torch.dtype) -> float:
    """A float of this dtype holds all whole numbers up to here."""
    return _WHOLE[dtype] if dtype in _WHOLE else 2 / torch.finfo(dtype).eps


def _places(levels: Sequence[int]) -> tuple[int, ...]:
    """What a digit of each place is worth."""
    return tuple(itertools.accumulate(levels[:-1], operator.mul, initial=1))


def _places_from_highest(levels: Sequence[int]) -> tuple[int, ...]:
    return _places(levels[::-1])[::-1]


_places_of = {"lowest": _places, "highest": _places_from_highest}


@functools.lru_cache(maxsize=1024)
def _kept_places(levels: tuple[int, ...], first: str, dtype: torch.dtype) -> Tensor | None:
    """[d], what digits of a dtype are worth, on CPU; None where it holds no sums of them."""
    if not dtype.is_floating_point or math.prod(levels) > _whole_up_to(dtype):
        return None
    places = _places_of[first](levels)
    with torch.inference_mode(False):
        return torch.tensor(places, dtype=dtype, device="cpu")


# Levels


class Rounded(NamedTuple):
    """Scalars and what they are rounded to."""

    values: Tensor  # [..., d] the scalars among their codes, before they are rounded; differentiable
    digits: Tensor  # [..., d] the number of each scalar's level, from the lowest, in the dtype of the values


def side_by_side(x: Tensor) -> Tensor:
    """Vectors [..., d] in rows of several, [N / n, n d], if there are many: arithmetic with a number a scalar is faster on long rows."""
    if x.numel() < _MANY or not may_look(x):
        return x
    width = x.shape[-1]
    return x.reshape(-1, width * _together(x.numel() // width))


_MANY = 2**14


@functools.lru_cache(maxsize=256)
def _together(number: int) -> int:
    return next(n for n in range(64, 0, -1) if number % n == 0)


def round_to_levels(
    x: Tensor, levels: Sequence[int], *, symmetric: bool = False, bound: Bound = "tanh", scale: float | Sequence[float] = 1.0
) -> Rounded:
    """Finite scalar quantization (Mentzer et al., 2023): x [..., d] float32 or wider, or several vectors `side_by_side`.

    With half = L // 2 the codes of a scalar are k / half for k = -half ... L - half - 1, and what is rounded to k is, after appendix A.1
    there, tanh(x + shift) * (L - 1) (1 - eps) / 2 - offset, where an even L has offset = 1/2 and shift = tan(offset / ((L - 1)
    (1 - eps) / 2)), so that x = 0 has code 0. Of two levels that shift has no meaning; they part at 0 here (shift = 0).

    The "centred" bounds have (1 + eps) in place of (1 - eps) and shift = atanh(offset / width), or with "centred_clamp", which bounds
    x + shift to -1 ... 1, shift = offset / width: x = 0 stands exactly on code 0, and the outermost codes have a little more room. They
    have no meaning for two levels.

    `symmetric` (Parker et al., 2024, section 3.2): codes 2 k / (L - 1) - 1 for k = 0 ... L - 1, the nearest one to tanh(x), whether or not
    centred. With bound "clamp" scalars between the outermost codes stand for themselves, and are rounded to the nearest.

    `scale`, one number or one a scalar, divides x first and multiplies the values.
    """
    grid = _grid(levels, symmetric, bound, scale, x)
    squashed = bound in ("tanh", "centred_tanh")
    if bound == "clamp" and not symmetric:
        steps = (x * grid.unit).clamp(-grid.half, grid.highest)
        return Rounded(steps / grid.unit, steps.detach().round().add_(grid.half))
    if symmetric and not squashed:
        values = x.clamp(-scale, scale) if isinstance(scale, float) else x.clamp(-grid.scale, grid.scale)
    else:
        x = x if scale == 1.0 else x / grid.scale
        if not symmetric:
            moved = x + grid.shift
            steps = torch.addcmul(grid.offset, moved.tanh_() if squashed else moved.clamp(-1.0, 1.0), grid.width)
            return Rounded(steps / grid.unit, steps.detach().round().add_(grid.half))
        values = x.tanh() if scale == 1.0 else x.tanh() * grid.scale
    return Rounded(values, torch.addcmul(grid.middle, values.detach(), grid.unit).floor_())


def level_digits(codes: Tensor, levels: Sequence[int], *, symmetric: bool = False, scale: float | Sequence[float] = 1.0) -> Tensor:
    """The digits [..., d] of codes as `level_codes` makes them: the nearest level of each scalar, in the dtype of the codes."""
    grid = _grid(levels, symmetric, "tanh", scale, codes)
    return torch.addcmul(grid.half, codes.detach(), grid.unit).round_().clamp_(min=0).minimum(2 * grid.middle - 1)


def level_codes(
    digits: Tensor, levels: Sequence[int], dtype: torch.dtype, *, symmetric: bool = False, scale: float | Sequence[float] = 1.0
) -> Tensor:
    """The codes [..., d] of `round_to_levels`."""
    digits = as_dtype(digits, dtype)
    grid = _grid(levels, symmetric, "tanh", scale, digits)
    return (digits - grid.half).div_(grid.unit)


def sign_codes(digits: Tensor, levels: Sequence[int], dtype: torch.dtype, *, step: float) -> Tensor:
    """-step and step [..., d] for the digits 0 and 1 of two `levels` each."""
    digits = as_dtype(digits, dtype)
    return torch.add(per_scalar(tuple, (-step,), digits), digits, alpha=2.0 * step)


def level_places(digits: Tensor, levels: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The place of each scalar's level [..., d] where the levels of all scalars stand side by side."""
    digits = as_dtype(digits, dtype)
    return digits + per_scalar(_first_of_each, levels, digits)


def _first_of_each(levels: Sequence[float]) -> list[float]:
    return [0, *itertools.accumulate(levels[:-1])]


def level_steps(levels: Sequence[int], like: Tensor, *, symmetric: bool = False, scale: float | Sequence[float] = 1.0) -> Tensor:
    """How far neighbouring codes of each scalar are apart, [d]."""
    return 1.0 / _grid(levels, symmetric, "tanh", scale, like).unit


def list_codes(
    of: Callable[..., Tensor], levels: Sequence[int], like: Tensor, *, first: Literal["lowest", "highest"] = "lowest", **options: Hashable
) -> Tensor | None:
    """of(digits, levels, float32, **options) of the digits of all indices in order, [C, d] on the device of `like`, made once and kept.

    None for more than 2^19 numbers, and where nothing may be kept.
    """
    if len(levels) * math.prod(levels) > _LISTED or not may_keep(like):
        return None
    return _kept_list(of, tuple(levels), first, tuple(options.items()), like.device)


_LISTED = 2**19


@functools.lru_cache(maxsize=32)
def _kept_list(of: Callable[..., Tensor], levels: tuple[int, ...], first: Any, options: Any, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        indices = torch.arange(math.prod(levels), device=device)
        return of(split_digits(indices, levels, torch.float32, first=first), levels, torch.float32, **dict(options))


class _Grid(NamedTuple):
    """Where the codes of scalars are, and what is done to a scalar before it is rounded: a number for each scalar of a row."""

    half: Tensor  # the digit of code 0, or of the middle of symmetric codes
    unit: Tensor  # how many digits there are from code 0 to 1
    scale: Tensor
    highest: Tensor  # the code of the last digit, in units
    middle: Tensor  # L / 2
    shift: Tensor  # what is added to a scalar before it is bounded to -1 ... 1
    width: Tensor  # how far it goes then, in units
    offset: Tensor


def _grid(levels: Sequence[int], symmetric: bool, bound: Bound, scale: float | Sequence[float], like: Tensor) -> _Grid:
    """For rows of `like`, which holds one vector or several side by side."""
    make = _kept_grid if may_keep(like) else _make_grid
    scales = scale if isinstance(scale, (int, float)) else tuple(scale)
    return make(tuple(levels), symmetric, bound, scales, like.shape[-1], like.dtype, like.device)


def _make_grid(
    levels: tuple[int, ...],
    symmetric: bool,
    bound: Bound,
    scale: float | tuple[float, ...],
    length: int,
    dtype: torch.dtype,
    device: torch.device,
) -> _Grid:
    scales = scale if isinstance(scale, tuple) else (scale,) * len(levels)
    eps = _EPS if bound.startswith("centred") else -_EPS
    halves = [(number - 1) / 2 if symmetric else number // 2 for number in levels]
    widths = [(number - 1) * (1 + eps) / 2 for number in levels]
    offsets = [0.0 if number % 2 else -0.5 for number in levels]
    shift, each = _SHIFTS[bound], zip(offsets, widths, levels, strict=True)
    numbers = {
        "half": halves,
        "unit": [half / own for half, own in zip(halves, scales, strict=True)],
        "scale": scales,
        "highest": [(number - 1) // 2 for number in levels],
        "middle": [number / 2 for number in levels],
        "shift": [shift(-offset / width) if number > 2 else 0.0 for offset, width, number in each],
        "width": widths,
        "offset": offsets,
    }
    return _Grid(**{name: _make_row(tuple, values, length, dtype, device) for name, values in numbers.items()})


_SHIFTS: dict[str, Callable[[float], float]] = {
    "tanh": math.tan,
    "clamp": float,
    "centred_tanh": math.atanh,
    "centred_clamp": float,
}


@functools.lru_cache(maxsize=1024)
def _kept_grid(*key: Any) -> _Grid:
    with torch.inference_mode(False):
        return _make_grid(*key)


def per_scalar(of: Callable[[Any], Sequence[float]], values: Sequence[float], like: Tensor) -> Tensor:
    """of(values), one number for each scalar of a row of `like`, which holds one vector or several side by side."""
    make = _kept_row if may_keep(like) else _make_row
    return make(of, tuple(values), like.shape[-1], like.dtype, like.device)


def _make_row(
    of: Callable[[Any], Sequence[float]], values: Sequence[float], length: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    numbers = list(of(values))
    return torch.tensor(numbers * max(1, length // len(numbers)), dtype=dtype, device=device)


@functools.lru_cache(maxsize=1024)
def _kept_row(*key: Any) -> Tensor:
    with torch.inference_mode(False):
        return _make_row(*key)


# Use


def rounding_stats(
    x: Tensor, codes: Tensor, used: Tensor, size: int, indices: Tensor, counted: Tensor | None = None, *, whole: bool = False
) -> CodebookStatistics:
    """The `CodebookStatistics` of finite x [N, H, d] rounded to codes [N, H, d], without the sum of the vectors of each code.

    used [N, H, k] int64 of 0 ... size - 1 is what is counted of a vector: its index, or its levels. Vectors of index -1 and those not
    counted, indices and counted [N, H], enter nothing, but that those counted of index -1 are `non_finite`. `whole`: there are no such.
    No gradient.
    """
    number, heads, width = x.shape
    x = x.detach()
    error = x - codes.detach()
    if heads > 1:
        used = used + torch.arange(heads, device=x.device).unsqueeze(-1) * size
    weight = None
    if whole:
        vectors, lost = x.new_full((heads,), number), x.new_zeros(heads)
        share = x.new_ones(1).expand(used.numel())
    else:
        known = indices >= 0
        taken, missed = (known, ~known) if counted is None else (known & counted, ~known & counted)
        vectors, lost = taken.sum(0).to(x.dtype), missed.sum(0).to(x.dtype)
        weight = taken.to(x.dtype).unsqueeze(-1)
        x, error, used = x * weight, error * weight, used.where(taken.unsqueeze(-1), 0)
        share = weight.expand(used.shape).reshape(-1)
    total = _sum_of_rows(x)
    away = _subtract_from_rows(x, total / (max(number, 1) if whole else vectors.clamp(min=1).unsqueeze(-1)))
    if weight is not None:
        away = away * weight
    nothing = x.new_empty(heads, 0, width)
    return CodebookStatistics(
        count=x.new_zeros(heads * size).index_add_(0, used.reshape(-1), share).view(heads, size),
        sum=nothing,
        candidates=nothing,
        keys=x.new_empty(heads, 0),
        vectors=vectors,
        squared_error=error.square_().sum((0, 2)) if x.numel() < _MANY else _sum_of_rows(error.square_()).sum(-1),
        non_finite=lost,
        moments=torch.stack([total, _sum_of_rows(away.square_())], dim=1),
    )


def _sum_of_rows(x: Tensor) -> Tensor:
    """[N, H, d] -> [H, d]."""
    if x.numel() < _MANY:
        return x.sum(0)
    return side_by_side(x.flatten(1)).sum(0).view(-1, *x.shape[1:]).sum(0)


def _subtract_from_rows(x: Tensor, value: Tensor) -> Tensor:
    """x [N, H, d] - value [H, d]."""
    if x.numel() < _MANY:
        return x - value
    rows = side_by_side(x.flatten(1))
    return (rows - value.flatten().repeat(rows.shape[1] // value.numel())).view(x.shape)
