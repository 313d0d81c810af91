"""Distribution functions, bins and moments: against the formulas written out, in float64."""

import math

import pytest
import torch

from vqkit.ops.perturbation import MOMENTS, bins, cdf, centres, moments, perturb, quantile

DENSITIES = {
    "normal": lambda x: (-x * x / 2).exp() / math.sqrt(2 * math.pi),
    "sigmoid": lambda x: (-x).exp() / (1 + (-x).exp()) ** 2,
    "tanh": lambda x: 0.5 / x.cosh() ** 2,
    "laplace": lambda x: 0.5 * (-x.abs()).exp(),
    "cauchy": lambda x: 1 / (math.pi * (1 + x * x)),
}


@pytest.mark.parametrize("kind", DENSITIES)
def test_it_is_the_integral_of_its_density_and_has_an_inverse(kind):
    x = torch.linspace(-4, 4, 4001, dtype=torch.float64)
    x[2000] = 0.0
    x.requires_grad_()
    place = cdf(x, kind)
    density = DENSITIES[kind](x.detach())
    torch.testing.assert_close(torch.autograd.grad(place.sum(), x)[0], density, rtol=1e-12, atol=1e-15)
    area = torch.cumulative_trapezoid(density, x.detach())
    torch.testing.assert_close(place.detach()[1:] - place.detach()[0], area, rtol=1e-4, atol=1e-6)
    assert cdf(torch.zeros(1), kind).item() == 0.5
    torch.testing.assert_close(quantile(place, kind), x, rtol=1e-9, atol=1e-9)
    for far in (-1e3, 1e3):
        end = torch.tensor(far, requires_grad=True)
        (slope,) = torch.autograd.grad(cdf(end, kind), end)
        assert slope.isfinite() and cdf(end, kind).item() == pytest.approx(float(far > 0), abs=1e-3)


@pytest.mark.parametrize("kind", MOMENTS)
def test_the_moments_of_a_distribution_are_those_of_its_quantiles(kind):
    draws = quantile((torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000, kind).unsqueeze(-1)
    found = [value.item() for value in moments(draws, torch.ones(len(draws), dtype=torch.float64))]
    assert found == pytest.approx(MOMENTS[kind], abs=2e-2)


@pytest.mark.parametrize("levels", [(8, 5, 3), (2, 2, 7)])
def test_bins_are_where_the_middles_say(levels):
    p = torch.rand(500, 3, dtype=torch.float64)
    p[0], p[1] = 0.0, 1.0
    digits = bins(p, levels)
    assert digits.dtype == p.dtype
    digits = digits.long()
    for scalar, number in enumerate(levels):
        middles = (torch.arange(number, dtype=torch.float64) + 0.5) / number
        assert torch.equal(digits[:, scalar], (p[:, scalar, None] - middles).abs().argmin(-1))
        assert torch.equal(centres(digits, levels, torch.float64)[:, scalar], middles[digits[:, scalar]])
    noise = torch.rand_like(p)
    for row, draw, moved in zip(p.tolist(), noise.tolist(), perturb(p, levels, noise).places.tolist(), strict=True):
        for place, one, after, number in zip(row, draw, moved, levels, strict=True):
            proposal = place + (one - 0.5) / number
            assert after == pytest.approx(proposal if 0 < proposal < 1 else place, abs=1e-15)


def test_moments_are_those_of_the_vectors_that_count():
    x = torch.randn(40, 3, dtype=torch.float64).exp()
    kept = torch.rand(40) < 0.6
    chosen = x[kept]
    mean, std = chosen.mean(0), chosen.std(0)
    scaled = (chosen - mean) / std
    expected = (mean, std**2, (scaled**3).mean(0), (scaled**4).mean(0) - 3)
    torch.testing.assert_close(tuple(moments(x, kept.double())), expected)
    constant = torch.ones(5, 2, requires_grad=True)
    sum(value.sum() for value in moments(constant, torch.ones(5))).backward()
    assert constant.grad.isfinite().all()
    for few in (torch.zeros(5), torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0])):
        assert all(value.isfinite().all() for value in moments(torch.randn(5, 2), few))
