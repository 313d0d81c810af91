"""Finite scalar perturbation (VP-VAE, 2026): distribution functions, bins of equal probability, and the moments of a batch.

A scalar of the right distribution is uniform behind its distribution function, so that bins of equal width are used alike; in training
noise as wide as a bin stands for the choice of one.

Shapes: d scalars of a vector, N vectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Distribution = Literal["normal", "sigmoid", "tanh", "laplace", "cauchy"]
"""Whose distribution function: "sigmoid" is the logistic distribution, "tanh" that of half the scale."""

UNIFORM_STD = 12**-0.5
"""Of the uniform distribution from 0 to 1."""

MOMENTS: dict[str, tuple[float, float, float, float]] = {
    "normal": (0.0, 1.0, 0.0, 0.0),
    "sigmoid": (0.0, math.pi**2 / 3, 0.0, 1.2),
    "tanh": (0.0, math.pi**2 / 12, 0.0, 1.2),
    "laplace": (0.0, 2.0, 0.0, 3.0),
}
"""Mean, variance, skewness, and excess of the kurtosis over that of the normal distribution; the Cauchy distribution has none."""


def cdf(x: Tensor, distribution: Distribution) -> Tensor:
    """The distribution function: x [...] -> the probability [...] of a smaller scalar. Differentiable everywhere."""
    if distribution == "normal":
        return torch.special.ndtr(x)
    if distribution == "laplace":
        below, above = x.where(x < 0, 0.0), x.where(x >= 0, 0.0)
        return (below.exp() - torch.expm1(-above)) / 2
    if distribution == "cauchy":
        return torch.atan(x) / math.pi + 0.5
    return torch.sigmoid(x if distribution == "sigmoid" else 2.0 * x)


def quantile(p: Tensor, distribution: Distribution) -> Tensor:
    """The inverse of `cdf`: p [...] above 0 and below 1."""
    if distribution == "normal":
        return torch.special.ndtri(p)
    if distribution == "laplace":
        tail = torch.log(2.0 * p.where(p < 0.5, 1.0 - p))
        return tail.where(p < 0.5, -tail)
    if distribution == "cauchy":
        return torch.tan(math.pi * (p - 0.5))
    return torch.logit(p) if distribution == "sigmoid" else torch.logit(p) / 2


def bins(p: Tensor, levels: Sequence[int]) -> Tensor:
    """The bin [..., d] int64 of each probability [..., d]: the i-th scalar has `levels[i]` bins of equal width."""
    number = _each(levels, p)
    return torch.minimum((p.detach() * number).floor(), number - 1).to(torch.int64)


def centres(digits: Tensor, levels: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The middles [..., d] of bins [..., d]."""
    return (digits.to(dtype) + 0.5) / _each(levels, digits.to(dtype))


def perturb(p: Tensor, levels: Sequence[int], noise: Tensor) -> Tensor:
    """Probabilities [..., d] moved by noise, uniform from 0 to 1, by up to half a bin; what would leave 0 ... 1 stays where it was."""
    moved = p + (2.0 * noise - 1.0) / (2.0 * _each(levels, p))
    return moved.where((moved > 0.0) & (moved < 1.0), p)


def _each(levels: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(levels, dtype=like.dtype, device=like.device)


class Moments(NamedTuple):
    """Of N vectors, for each scalar."""

    mean: Tensor  # [..., d]
    variance: Tensor  # [..., d], over N - 1
    skewness: Tensor  # [..., d]
    kurtosis: Tensor  # [..., d], its excess over that of the normal distribution


def moments(x: Tensor, share: Tensor, *, eps: float = 1e-8) -> Moments:
    """Of x [N, ..., d], whose vectors count `share` [N, ...], 1 or 0; float32 or wider. Standard deviations are at least `eps`.

    With fewer than two vectors there is no variance: it is 0 then, and so are all that follow.
    """
    share = share.unsqueeze(-1)
    number = share.sum(0)
    mean = (x * share).sum(0) / number.clamp(min=1)
    centred = (x - mean) * share
    variance = centred.square().sum(0) / (number - 1).clamp(min=1)
    scaled = centred / variance.clamp(min=eps**2).sqrt()
    third, fourth = (scaled.pow(power).sum(0) / number.clamp(min=1) for power in (3, 4))
    return Moments(mean, variance, third, fourth - 3.0)
