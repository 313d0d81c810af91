"""FSP: its training output written out, its loss, what it refuses. The laws are in tests/laws, its formulas in tests/ops."""

import math
from itertools import pairwise
from typing import get_args

import pytest
import torch

from vqkit.ops.perturbation import Distribution, cdf, quantile
from vqkit.quantizers import FSP, Moments, Residual

SPREAD = math.sqrt(12.0)


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("output", ["uniform", "latent"])
def test_a_training_call_scalar_by_scalar(rate, output):
    levels = (8, 5, 3)
    quantizer = FSP(levels, cdf="sigmoid", output=output, quantize_rate=rate, scale=0.5, moments=None)
    x = torch.randn(50, 3, requires_grad=True)
    torch.manual_seed(5)
    noise, choice = torch.rand(50, 1, 3).squeeze(1), torch.rand(50, 1, 3).squeeze(1)
    expected, slopes, indices = torch.empty(50, 3), torch.empty(50, 3), []
    for row in range(50):
        digits = []
        for scalar, number in enumerate(levels):
            latent = x[row, scalar].item() / 0.5
            place = 1 / (1 + math.exp(-latent))
            digits.append(min(int(place * number), number - 1))
            proposal = place + (noise[row, scalar].item() - 0.5) / number
            moved = proposal if 0 < proposal < 1 else place
            used = moved if rate < 1 and choice[row, scalar].item() > rate else (digits[-1] + 0.5) / number
            expected[row, scalar] = 0.5 * ((used - 0.5) * SPREAD if output == "uniform" else math.log(used / (1 - used)))
            slopes[row, scalar] = SPREAD * place * (1 - place) if output == "uniform" else 1.0
        indices.append(digits[0] + 8 * digits[1] + 40 * digits[2])
    torch.manual_seed(5)
    found = quantizer(x)
    assert found.indices.tolist() == indices
    torch.testing.assert_close(found.quantized, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(found.quantized.sum(), x)[0], slopes, rtol=1e-5, atol=1e-6)
    given = torch.stack([noise, choice])
    assert torch.equal(quantizer.quantize(x, noise=given).quantized, found.quantized)
    with pytest.raises(ValueError, match=r"^noise has shape \(2, 3\): must be \(2, 50, 3\)"):
        quantizer.quantize(x, noise=given[:, 0])
    middle = quantizer.eval()(x)
    assert torch.equal(middle.indices, found.indices) and torch.equal(quantizer.decode(middle.indices), middle.quantized)
    assert torch.equal(FSP(levels, cdf="sigmoid", output=output, quantize_rate=1.0, scale=0.5)(x).quantized, middle.quantized)


def test_bins_are_used_alike_and_the_output_has_variance_one():
    x = torch.randn(40_000, 2)
    quantizer = FSP((8, 5))
    found = quantizer(x)
    assert found.quantized.std().item() == pytest.approx(1.0, abs=0.02) and found.quantized.mean().item() == pytest.approx(0.0, abs=0.02)
    assert quantizer.metrics()["perplexity"] > 39.8
    assert found.quantized.sub((cdf(x, "normal") - 0.5) * SPREAD).abs().max() <= SPREAD / 10 + 1e-5


def test_the_loss_is_that_of_the_moments():
    x = torch.randn(60, 3) * 2 + 1
    mask = torch.rand(60) < 0.7
    quantizer = FSP((5, 4, 3), cdf="laplace", scale=2.0, moments=Moments(mean=0.1, variance=0.2, kurtosis=0.3))
    counted = x[mask] / 2
    scaled = (counted - counted.mean(0)) / counted.std(0)
    mean, variance = counted.mean(0).square().mean(), (counted.var(0) - 2).square().mean()
    kurtosis = ((scaled**4).mean(0) - 3 - 3).square().mean()
    torch.testing.assert_close(quantizer(x, mask).loss, 0.1 * mean + 0.2 * variance + 0.3 * kurtosis)
    losses = quantizer.quantize(x, mask).losses
    assert losses.keys() == {"mean", "variance", "kurtosis"} and losses["variance"].item() == pytest.approx(variance.item(), rel=1e-5)
    one = torch.zeros(60, dtype=torch.bool).index_fill_(0, torch.tensor([3]), True)
    assert quantizer(x, one).loss.item() == 0.0 and FSP((5, 4, 3), moments=None)(x).loss.item() == 0.0


def test_places_stay_away_from_the_ends():
    x = torch.tensor([[9.0, -9.0]])
    assert FSP((100, 100), eps=0.1).encode(x).item() == 90 and FSP((100, 100)).encode(x).item() == 99
    far = FSP((1000, 1000), cdf="sigmoid", output="latent", eps=0.1, quantize_rate=1.0)(x).quantized
    torch.testing.assert_close(far, torch.tensor([[0.9, 0.1]]).logit())


def test_layers_at_falling_scales_leave_less_and_less():
    residual = Residual([FSP((8, 8), output="latent", scale=0.4**i, quantize_rate=1.0) for i in range(4)]).eval()
    x = torch.randn(500, 2)
    indices = residual.encode(x)
    errors = [(residual.decode(indices[:, :layers]) - x).abs().median().item() for layers in range(1, 5)]
    assert all(after < 0.6 * before for before, after in pairwise(errors)), errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"levels": (4, 1)}, ValueError, r"^levels\[1\] = 1: must be at least 2"),
        ({"cdf": "uniform"}, ValueError, r"^cdf = 'uniform': must be one of 'normal', 'sigmoid', 'tanh', 'laplace', 'cauchy'"),
        ({"cdf": "cauchy"}, ValueError, r'^cdf = "cauchy": must come with moments = None or Moments\(targets'),
        ({"output": "both"}, ValueError, r"^output = 'both'"),
        ({"quantize_rate": 1.5}, ValueError, r"^quantize_rate = 1.5: must be from 0 to 1"),
        ({"quantize_rate": "half"}, TypeError, r"^quantize_rate = 'half': must be a number"),
        ({"eps": 0.5}, ValueError, r"^eps = 0.5: must be None or between 0 and 1/2"),
        ({"scale": 0}, ValueError, r"^scale = 0: must be positive"),
        ({"moments": 0.1}, TypeError, r"^moments = 0.1: must be Moments"),
    ],
)
def test_what_does_not_fit_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        FSP(**{"levels": (4, 4), **arguments})


def test_moments_that_do_not_fit_are_named():
    for arguments, message in (
        ({"mean": -1.0}, r"^Moments.mean = -1.0: must be 0 or positive"),
        ({"targets": (0.0, 1.0)}, r"^Moments.targets = \(0.0, 1.0\): must be None or four"),
    ):
        with pytest.raises(ValueError, match=message):
            Moments(**arguments)


@pytest.mark.parametrize("output", ["uniform", "latent"])
@pytest.mark.parametrize("cdf", get_args(Distribution))
def test_indices_decode_to_the_middles_of_their_bins_by_settings_of_now(cdf, output):
    module, indices = FSP((4, 3), cdf=cdf, output=output, scale=2.0, moments=None), torch.arange(12)
    for eps in (None, 0.2, None):
        module.eps = eps
        place = (module.digits(indices) + 0.5) / torch.tensor([4.0, 3.0])
        inside = place.clamp(0.0 if eps is None else eps, 1.0 if eps is None else 1.0 - eps)
        expected = quantile(inside, cdf) if output == "latent" else (place - 0.5) * 12**0.5
        torch.testing.assert_close(module.decode(indices), 2.0 * expected)
