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

from vqkit.ops.scalar import per_scalar

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
        below, above = x.clamp(max=0.0), x.relu()  # at 0 the first alone has a slope
        return (below.exp() - torch.expm1(-above)) * 0.5
    if distribution == "cauchy":
        return torch.atan(x) / math.pi + 0.5
    return torch.sigmoid(x if distribution == "sigmoid" else 2.0 * x)


def quantile(p: Tensor, distribution: Distribution) -> Tensor:
    """The inverse of `cdf`: p [...] above 0 and below 1."""
    if distribution == "normal":
        return torch.special.ndtri(p)
    if distribution == "laplace":
        low = p < 0.5
        tail = torch.log(2.0 * p.where(low, 1.0 - p))
        return tail.where(low, -tail)
    if distribution == "cauchy":
        return torch.tan(math.pi * (p - 0.5))
    return torch.logit(p) if distribution == "sigmoid" else torch.logit(p) / 2


def bins(p: Tensor, levels: Sequence[int]) -> Tensor:
    """The bin [..., d] of each probability [..., d], in its dtype: the i-th scalar has `levels[i]` bins of equal width."""
    places = p.detach() * per_scalar(tuple, levels, p)
    return places.floor_().minimum(per_scalar(_highest, levels, p))


def centres(digits: Tensor, levels: Sequence[int], dtype: torch.dtype, *, standard: bool = False) -> Tensor:
    """The middles [..., d] of bins [..., d]; `standard`: (p - 1/2) / UNIFORM_STD of each, so that all are of mean 0 and variance 1."""
    digits = digits.to(dtype)
    if standard:
        return torch.addcmul(per_scalar(_lowest, levels, digits), digits, per_scalar(_steps, levels, digits))
    return (digits + 0.5).div_(per_scalar(tuple, levels, digits))


def output_at(place: Tensor, distribution: Distribution | None, *, scale: float = 1.0, eps: float | None = None) -> Tensor:
    """Places [...] in 0 ... 1, kept `eps` (None: what their dtype tells apart) off the ends, to scalars of a distribution.

    None: they are standard places, and stay where they are. Times `scale`.
    """
    if distribution is not None:
        eps = torch.finfo(place.dtype).eps if eps is None else eps
        place = quantile(place.clamp(eps, 1.0 - eps), distribution)
    return place if scale == 1.0 else place * scale


def bin_codes(
    digits: Tensor,
    levels: Sequence[int],
    dtype: torch.dtype,
    *,
    distribution: Distribution | None = None,
    scale: float = 1.0,
    eps: float | None = None,
) -> Tensor:
    """The codes [..., d] of bins [..., d]: `output_at` of their middles."""
    return output_at(centres(digits, levels, dtype, standard=distribution is None), distribution, scale=scale, eps=eps)


class Perturbed(NamedTuple):
    """Places [..., d] that were moved by noise."""

    places: Tensor  # what would leave the interval stays where it was
    moved: Tensor  # bool: what did not


def perturb(p: Tensor, levels: Sequence[int], noise: Tensor, *, standard: bool = False) -> Perturbed:
    """Probabilities, or `standard` ones as of `centres`, [..., d] moved by noise, uniform from 0 to 1, by up to half a bin."""
    proposal = torch.addcmul(p, noise - 0.5, per_scalar(_steps if standard else _widths, levels, p))
    away, most = (proposal, 0.5 / UNIFORM_STD) if standard else (proposal - 0.5, 0.5)
    inside = away.abs() < most
    return Perturbed(proposal.where(inside, p), inside)


def _highest(levels: Sequence[int]) -> list[int]:
    return [number - 1 for number in levels]


def _widths(levels: Sequence[int]) -> list[float]:
    return [1.0 / number for number in levels]


def _steps(levels: Sequence[int]) -> list[float]:
    return [1.0 / (number * UNIFORM_STD) for number in levels]


def _lowest(levels: Sequence[int]) -> list[float]:
    return [(0.5 / number - 0.5) / UNIFORM_STD for number in levels]


_MANY = 2**10
"""Scalars, of which `torch.var_mean` along the first axis takes longer than step by step."""


class Moments(NamedTuple):
    """Of N vectors, for each scalar."""

    mean: Tensor  # [..., d]
    variance: Tensor  # [..., d], over N - 1
    skewness: Tensor  # [..., d]
    kurtosis: Tensor  # [..., d], its excess over that of the normal distribution


def moments(x: Tensor, share: Tensor | None = None, *, eps: float = 1e-8) -> Moments:
    """Of x [N, ..., d], whose vectors count `share` [N, ...], 1 or 0 (None: all); float32 or wider. Standard deviations are at least `eps`.

    With fewer than two vectors there is no variance: it is 0 then, and so are all that follow.
    """
    if share is None and len(x) > 1:
        number, few = len(x), x.numel() < _MANY
        variance, mean = torch.var_mean(x, 0) if few else (None, x.mean(0))
        centred = x - mean
        variance = centred.square().sum(0) / (number - 1) if variance is None else variance
    else:
        share = (x.new_ones(x.shape[:-1]) if share is None else share).unsqueeze(-1)
        total = share.sum(0)
        number = total.clamp(min=1)
        mean = (x * share).sum(0) / number
        centred = (x - mean) * share
        variance = centred.square().sum(0) / (total - 1).clamp(min=1)
    scaled = centred * variance.clamp(min=eps**2).rsqrt()
    third, fourth = (scaled.pow(power).sum(0) / number for power in (3, 4))
    return Moments(mean, variance, third, fourth - 3.0)
