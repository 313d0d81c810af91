"""Vectors whose scalars are rounded one by one, each to levels of its own: codes without a table, and what can be said of all of them.

The codes are all combinations of levels, named by one integer each. So nothing here looks for a code, and what needs all codes at once
factorises over the scalars.

Shapes: d scalars of a vector, L levels of a scalar, C = L_1 ... L_d codes, N vectors, H heads, b bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vqkit.ops.precision import without_autocast

Bound = Literal["tanh", "clamp", "centred_tanh", "centred_clamp"]
_EPS = 1e-3  # keeps the outermost scalars of FSQ off the ties of rounding


# Integers


def join_digits(digits: Tensor, levels: Sequence[int]) -> Tensor:
    """digits [..., d] of 0 ... L_i - 1 -> the integer [...] int64 that they write, the first digit being the lowest.

    Exact up to 2^63 codes.
    """
    total = digits[..., -1].to(torch.int64)
    for place in range(len(levels) - 2, -1, -1):
        total = total * levels[place] + digits[..., place]
    return total


def split_digits(indices: Tensor, levels: Sequence[int]) -> Tensor:
    """The digits [..., d] int64 of integers [...] from 0 to C - 1; those of -1 are 0."""
    rest = indices.to(torch.int64).clamp(min=0)
    digits = []
    for number in levels:
        digits.append(rest % number)
        rest = rest // number
    return torch.stack(digits, dim=-1)


# Levels


class Rounded(NamedTuple):
    """Scalars and what they are rounded to."""

    values: Tensor  # [..., d] the scalars among their codes, before they are rounded; differentiable
    digits: Tensor  # [..., d] int64, the number of each scalar's level, from the lowest


def round_to_levels(x: Tensor, levels: Sequence[int], *, symmetric: bool = False, bound: Bound = "tanh") -> Rounded:
    """Finite scalar quantization (Mentzer et al., 2023): x [..., d] float32 or wider.

    With half = L // 2 the codes of a scalar are k / half for k = -half ... L - half - 1, and what is rounded to k is, after appendix A.1
    there, tanh(x + shift) * (L - 1) (1 - eps) / 2 - offset, where an even L has offset = 1/2 and shift = tan(offset / ((L - 1)
    (1 - eps) / 2)), so that x = 0 has code 0. Of two levels that shift has no meaning; they part at 0 here (shift = 0).

    The "centred" bounds have (1 + eps) in place of (1 - eps) and shift = atanh(offset / width), or with "centred_clamp", which bounds
    x + shift to -1 ... 1, shift = offset / width: x = 0 stands exactly on code 0, and the outermost codes have a little more room. They
    have no meaning for two levels.

    `symmetric` (Parker et al., 2024, section 3.2): codes 2 k / (L - 1) - 1 for k = 0 ... L - 1, the nearest one to tanh(x), whether or not
    centred. With bound "clamp" scalars between the outermost codes stand for themselves, and are rounded to the nearest.
    """
    squash = torch.tanh if bound in ("tanh", "centred_tanh") else None
    if symmetric:
        top = _each([number - 1 for number in levels], x)
        values = squash(x) if squash else x.clamp(-1.0, 1.0)
        return Rounded(values, torch.floor(top * (values.detach() + 1.0) / 2.0 + 0.5).to(torch.int64))
    half = _each([number // 2 for number in levels], x)
    if bound.startswith("centred"):
        steps = _centred_steps(x, levels, bound)
    elif squash:
        widths = [(number - 1) * (1 - _EPS) / 2 for number in levels]
        offsets = [0.0 if number % 2 else 0.5 for number in levels]
        shifts = [math.tan(o / w) if number > 2 else 0.0 for o, w, number in zip(offsets, widths, levels, strict=True)]
        steps = squash(x + _each(shifts, x)) * _each(widths, x) - _each(offsets, x)
    else:
        steps = (x * half).clamp(_limit(x, [-(number // 2) for number in levels]), _limit(x, [(number - 1) // 2 for number in levels]))
    return Rounded(steps / half, (steps.detach().round() + half).to(torch.int64))


def _centred_steps(x: Tensor, levels: Sequence[int], bound: Bound) -> Tensor:
    widths = [(number - 1) * (1 + _EPS) / 2 for number in levels]
    offsets = [0.0 if number % 2 else 0.5 for number in levels]
    shifts = [offset / width for offset, width in zip(offsets, widths, strict=True)]
    if bound == "centred_tanh":
        bounded = torch.tanh(x + _each([math.atanh(shift) for shift in shifts], x))
    else:
        bounded = (x + _each(shifts, x)).clamp(-1.0, 1.0)
    return bounded * _each(widths, x) - _each(offsets, x)


def level_digits(codes: Tensor, levels: Sequence[int], *, symmetric: bool = False) -> Tensor:
    """The digits [..., d] int64 of codes as `level_codes` makes them: the nearest level of each scalar."""
    half = _each([(number - 1) / 2 if symmetric else number // 2 for number in levels], codes)
    return torch.minimum((codes.detach() * half + half).round().clamp(min=0), _limit(codes, [n - 1 for n in levels])).to(torch.int64)


def level_codes(digits: Tensor, levels: Sequence[int], dtype: torch.dtype, *, symmetric: bool = False) -> Tensor:
    """The codes [..., d] of `round_to_levels`."""
    digits = digits.to(dtype)
    if symmetric:
        return digits * 2.0 / _each([number - 1 for number in levels], digits) - 1.0
    half = _each([number // 2 for number in levels], digits)
    return (digits - half) / half


def level_steps(levels: Sequence[int], like: Tensor, *, symmetric: bool = False) -> Tensor | float:
    """How far neighbouring codes of each scalar are apart, [d] or one number for all."""
    return _each([2 / (number - 1) if symmetric else 1 / (number // 2) for number in levels], like)


def _each(values: Sequence[float], like: Tensor) -> Tensor | float:
    """One number a scalar, or one for all where they are equal."""
    return float(values[0]) if len(set(values)) == 1 else torch.tensor(values, dtype=like.dtype, device=like.device)


def _limit(like: Tensor, values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)


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
    found = torch.ones_like(logits[..., :1]) if logits.shape[-1] else logits.new_ones(*logits.shape[:-1], 1)
    one, zero = torch.sigmoid(logits), torch.sigmoid(-logits)
    for bit in range(logits.shape[-1]):
        found = torch.cat([found * zero[..., bit : bit + 1], found * one[..., bit : bit + 1]], dim=-1)
    return found


def distribution_entropy(distribution: Tensor, floor: float = 0.0) -> Tensor:
    """[..., C] -> [...], in nats; its gradient is finite also where a code has no probability.

    The logarithm is that of `floor` for smaller probabilities.
    """
    least = max(floor, torch.finfo(distribution.dtype).tiny)
    return -torch.xlogy(distribution, distribution.clamp(min=least)).sum(-1)
