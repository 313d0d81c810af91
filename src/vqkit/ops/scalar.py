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
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vqkit.ops.codebook import CodebookStatistics
from vqkit.ops.precision import full_precision, is_traced, may_look, without_autocast

Bound = Literal["tanh", "clamp", "centred_tanh", "centred_clamp"]
_EPS = 1e-3  # keeps the outermost scalars of FSQ off the ties of rounding


# Integers


def join_digits(digits: Tensor, levels: Sequence[int]) -> Tensor:
    """digits [..., d] of 0 ... L_i - 1, whole numbers of any dtype -> the integer [...] int64 that they write, the first the lowest digit.

    Exact up to 2^63 codes.
    """
    if digits.is_floating_point() and may_look(digits) and math.prod(levels) <= _whole_up_to(digits.dtype):
        with full_precision("cpu"):
            total = digits.reshape(-1, len(levels)).mv(per_scalar(_places, levels, digits))
        return total.to(torch.int64).view(digits.shape[:-1])
    total = digits[..., -1].to(torch.int64)
    for place in range(len(levels) - 2, -1, -1):
        total = total * levels[place] + digits[..., place].to(torch.int64)
    return total


def split_digits(indices: Tensor, levels: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
    """The digits [..., d] of integers [...] from 0 to C - 1; those of -1 are 0."""
    rest = indices.to(torch.int64).clamp(min=0)
    size = math.prod(levels)
    if may_look(indices) and size <= _whole_up_to(torch.float64):
        # A quotient of whole numbers that a float holds is never rounded up to the next whole number.
        wide = rest.to(torch.float32 if size <= _whole_up_to(torch.float32) else torch.float64).unsqueeze(-1)
        above = wide.div(per_scalar(_places, (*levels, 1), wide)).floor_()
        return torch.addcmul(above[..., :-1], above[..., 1:], per_scalar(tuple, levels, wide), value=-1).to(dtype)
    digits = []
    for number in levels:
        digits.append(rest % number)
        rest = rest // number
    return torch.stack(digits, dim=-1).to(dtype)


def _whole_up_to(dtype: torch.dtype) -> float:
    """A float of this dtype holds all whole numbers up to here."""
    return 2 / torch.finfo(dtype).eps


def _places(levels: Sequence[int]) -> tuple[int, ...]:
    """What a digit of each place is worth."""
    return tuple(itertools.accumulate(levels[:-1], operator.mul, initial=1))


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


def round_to_levels(x: Tensor, levels: Sequence[int], *, symmetric: bool = False, bound: Bound = "tanh") -> Rounded:
    """Finite scalar quantization (Mentzer et al., 2023): x [..., d] float32 or wider, or several vectors `side_by_side`.

    With half = L // 2 the codes of a scalar are k / half for k = -half ... L - half - 1, and what is rounded to k is, after appendix A.1
    there, tanh(x + shift) * (L - 1) (1 - eps) / 2 - offset, where an even L has offset = 1/2 and shift = tan(offset / ((L - 1)
    (1 - eps) / 2)), so that x = 0 has code 0. Of two levels that shift has no meaning; they part at 0 here (shift = 0).

    The "centred" bounds have (1 + eps) in place of (1 - eps) and shift = atanh(offset / width), or with "centred_clamp", which bounds
    x + shift to -1 ... 1, shift = offset / width: x = 0 stands exactly on code 0, and the outermost codes have a little more room. They
    have no meaning for two levels.

    `symmetric` (Parker et al., 2024, section 3.2): codes 2 k / (L - 1) - 1 for k = 0 ... L - 1, the nearest one to tanh(x), whether or not
    centred. With bound "clamp" scalars between the outermost codes stand for themselves, and are rounded to the nearest.
    """
    squashed = bound in ("tanh", "centred_tanh")
    if symmetric:
        values = x.tanh() if squashed else x.clamp(-1.0, 1.0)
        middle, width = per_scalar(_middles, levels, x), per_scalar(_half_widths, levels, x)
        return Rounded(values, torch.addcmul(middle, values.detach(), width).floor_())
    half = per_scalar(_halves, levels, x)
    if bound == "clamp":
        steps = (x * half).clamp(-half, per_scalar(_highest, levels, x))
    else:
        shifts, widths = _BOUNDS[bound]
        moved = x + per_scalar(shifts, levels, x)
        bounded = moved.tanh_() if squashed else moved.clamp(-1.0, 1.0)
        steps = torch.addcmul(per_scalar(_offsets, levels, x), bounded, per_scalar(widths, levels, x))
    return Rounded(steps / half, steps.detach().round().add_(half))


def level_digits(codes: Tensor, levels: Sequence[int], *, symmetric: bool = False) -> Tensor:
    """The digits [..., d] of codes as `level_codes` makes them: the nearest level of each scalar, in the dtype of the codes."""
    half = per_scalar(_half_widths if symmetric else _halves, levels, codes)
    return torch.addcmul(half, codes.detach(), half).round_().clamp_(min=0).minimum(2 * per_scalar(_half_widths, levels, codes))


def level_codes(digits: Tensor, levels: Sequence[int], dtype: torch.dtype, *, symmetric: bool = False) -> Tensor:
    """The codes [..., d] of `round_to_levels`."""
    digits = digits.to(dtype)
    half = per_scalar(_half_widths if symmetric else _halves, levels, digits)
    return (digits - half).div_(half)


def level_steps(levels: Sequence[int], like: Tensor, *, symmetric: bool = False) -> Tensor:
    """How far neighbouring codes of each scalar are apart, [d]."""
    return 1.0 / per_scalar(_half_widths if symmetric else _halves, levels, like)


def _halves(levels: Sequence[int]) -> list[int]:
    return [number // 2 for number in levels]


def _highest(levels: Sequence[int]) -> list[int]:
    return [(number - 1) // 2 for number in levels]


def _half_widths(levels: Sequence[int]) -> list[float]:
    return [(number - 1) / 2 for number in levels]


def _middles(levels: Sequence[int]) -> list[float]:
    return [number / 2 for number in levels]


def _widths(levels: Sequence[int]) -> list[float]:
    return [(number - 1) * (1 - _EPS) / 2 for number in levels]


def _centred_widths(levels: Sequence[int]) -> list[float]:
    return [(number - 1) * (1 + _EPS) / 2 for number in levels]


def _offsets(levels: Sequence[int]) -> list[float]:
    return [0.0 if number % 2 else -0.5 for number in levels]


def _shifts(levels: Sequence[int]) -> list[float]:
    each = zip(_offsets(levels), _widths(levels), levels, strict=True)
    return [math.tan(-offset / width) if number > 2 else 0.0 for offset, width, number in each]


def _centred_clamp_shifts(levels: Sequence[int]) -> list[float]:
    return [-offset / width for offset, width in zip(_offsets(levels), _centred_widths(levels), strict=True)]


def _centred_tanh_shifts(levels: Sequence[int]) -> list[float]:
    return [math.atanh(shift) for shift in _centred_clamp_shifts(levels)]


_BOUNDS = {
    "tanh": (_shifts, _widths),
    "centred_tanh": (_centred_tanh_shifts, _centred_widths),
    "centred_clamp": (_centred_clamp_shifts, _centred_widths),
}
"""What is added to a scalar before it is bounded to -1 ... 1, and how far it goes then."""


def per_scalar(of: Callable[[Any], Sequence[float]], values: Sequence[float], like: Tensor) -> Tensor:
    """of(values), one number for each scalar of a row of `like`, which holds one vector or several side by side."""
    repeats = max(1, like.shape[-1] // len(values))
    make = _make_row if is_traced() or type(like) is not Tensor else _kept_row  # a traced constant is that of its program alone
    return make(of, tuple(values), repeats, like.dtype, like.device)


def _make_row(
    of: Callable[[Any], Sequence[float]], values: tuple[float, ...], repeats: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    return torch.tensor(list(of(values)) * repeats, dtype=dtype, device=device)


@functools.lru_cache(maxsize=1024)
def _kept_row(
    of: Callable[[Any], Sequence[float]], values: tuple[float, ...], repeats: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    with torch.inference_mode(False):
        return _make_row(of, values, repeats, dtype, device)


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
    x, error = x.detach(), x.detach() - codes.detach()
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
    away = _subtract_from_rows(x, total / vectors.clamp(min=1).unsqueeze(-1))
    if weight is not None:
        away = away * weight
    nothing = x.new_empty(heads, 0, width)
    return CodebookStatistics(
        count=x.new_zeros(heads * size).index_add_(0, used.reshape(-1), share).view(heads, size),
        sum=nothing,
        candidates=nothing,
        keys=x.new_empty(heads, 0),
        vectors=vectors,
        squared_error=_sum_of_rows(error.square_()).sum(-1),
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


# Bits


def bit_logits(x: Tensor, scale: float, temperature: float) -> Tensor:
    """The log odds [..., b] of each bit under softmax(-|x - c|^2 / temperature) over all codes c in {-scale, scale}^b.

    They are 4 scale x / temperature, and the softmax is the product of what they say of each bit (Yu et al., 2023).
    """
    return x * (4.0 * scale / temperature)


def bits_entropy(logits: Tensor) -> Tensor:
    """The entropy [...], in nats, of independent bits of log odds [..., b]: the sum of theirs."""
    size = logits.abs()
    return (F.softplus(-size) + size * torch.sigmoid(-size)).sum(-1)


def mean_bit_distribution(logits: Tensor, share: Tensor) -> Tensor:
    """The mean over vectors of the distribution over all 2^b codes that log odds [H, N, b] say: [H, 2^b], for weights `share` [H, N].

    The first bit is the lowest. One product of N x 2^(b/2) with N x 2^(b/2) numbers: no N x 2^b matrix. Differentiable.
    """
    low = logits.shape[-1] // 2
    first, second = product_distribution(logits[..., :low]), product_distribution(logits[..., low:])
    with without_autocast(logits.device.type):
        return ((second * share.unsqueeze(-1)).mT @ first).flatten(1)


def product_distribution(logits: Tensor) -> Tensor:
    """The probabilities [..., 2^b] of all codes of independent bits of log odds [..., b]; the first bit is the lowest. Differentiable."""
    logs = F.logsigmoid(torch.cat([-logits, logits], dim=-1))
    make = _make_choices if is_traced() or type(logits) is not Tensor else _kept_choices
    with without_autocast(logits.device.type):
        return (logs @ make(logits.shape[-1], logits.dtype, logits.device)).exp()


def _make_choices(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[2 b, 2^b]: 1 where a code has a bit of 0, and then where it has a bit of 1."""
    ones = torch.arange(2**bits, device=device) >> torch.arange(bits, device=device).unsqueeze(-1) & 1
    return torch.cat([1 - ones, ones]).to(dtype)


@functools.lru_cache(maxsize=64)
def _kept_choices(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _make_choices(bits, dtype, device)


def distribution_entropy(distribution: Tensor, floor: float = 0.0) -> Tensor:
    """[..., C] -> [...], in nats; its gradient is finite also where a code has no probability.

    The logarithm is that of `floor` for smaller probabilities.
    """
    least = max(floor, torch.finfo(distribution.dtype).tiny)
    return -torch.xlogy(distribution, distribution.clamp(min=least)).sum(-1)
