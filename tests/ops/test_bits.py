"""What bits say of all codes, factorised: against all codes at once, and the fast entropies against plain operations."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vqkit.ops import bits
from vqkit.ops.bits import Rule, bit_logits, bit_losses, bits_entropy, distribution_entropy, mean_bit_distribution


def every_code(bits, scale):
    """[2^b, b], the first bit the lowest."""
    return torch.tensor([code[::-1] for code in itertools.product((-scale, scale), repeat=bits)], dtype=torch.float64)


@pytest.mark.parametrize(("bits", "scale", "temperature"), [(1, 1.0, 1.0), (5, 0.5, 0.3), (6, 2.0, 0.3)])
def test_what_factorises_is_what_all_codes_say(bits, scale, temperature):
    x = torch.randn(2, 7, bits, dtype=torch.float64, requires_grad=True)
    share = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.5, 1.0, 1.0], dtype=torch.float64).expand(2, 7)
    distances = (x.unsqueeze(-2) - every_code(bits, scale)).square().sum(-1)
    logs = (-distances / temperature).log_softmax(-1)
    entropy, mean = -(logs.exp() * logs).sum(-1), (logs.exp() * share.unsqueeze(-1)).sum(1)
    logits = bit_logits(x, scale, temperature)
    found_entropy, found_mean = bits_entropy(logits), mean_bit_distribution(logits, share)
    torch.testing.assert_close(found_entropy, entropy, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found_mean, mean, rtol=1e-9, atol=1e-12)
    expected = entropy.sum() + torch.special.entr(mean / 5.5).sum()
    found = found_entropy.sum() + distribution_entropy(found_mean / 5.5).sum()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, x)[0], torch.autograd.grad(expected, x)[0], rtol=1e-7, atol=1e-9)


def test_sure_bits_have_no_entropy_and_finite_gradients():
    logits = torch.tensor([[0.0, 1e4, -1e4]], requires_grad=True)
    entropy = bits_entropy(logits)
    assert entropy.item() == pytest.approx(np.log(2))
    mean = mean_bit_distribution(logits.unsqueeze(0), torch.ones(1, 1))
    assert torch.equal(mean, torch.tensor([[0.0, 0.0, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0]]))
    (entropy.sum() + distribution_entropy(mean).sum()).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_small_probabilities_count_with_the_logarithm_of_the_floor(floor):
    share = torch.tensor([0.5, 0.499, 1e-3, 0.0], dtype=torch.float64, requires_grad=True)
    logs = share.detach().clamp(min=floor or 1.0e-300).log()
    found = distribution_entropy(share, floor)
    torch.testing.assert_close(found.detach(), -(share.detach() * logs).sum())
    (gradient,) = torch.autograd.grad(found, share)
    assert gradient.isfinite().all() and gradient[2] == pytest.approx(-math.log(0.1) if floor else -math.log(1e-3) - 1)


SIZES = [(1, 9, 4, 4), (2, 7, 9, 9), (2, 5, 13, 13), (1, 13, 20, 13), (3, 5, 8, 1), (2, 0, 3, 3)]
"""Heads, vectors, bits, and how many of them are taken together: few, many at once, two parts, groups of two and one, single bits, none."""
SLOPE = 1.5


def losses_and_plain(given, together, floor):
    found = bit_losses(*given, scale=0.5, temperature=2.0 / SLOPE, together=together, floor=floor)
    return found, bits._bit_losses(*given, Rule(SLOPE, together, floor))


def weighed(losses, bend=False):
    commitment, entropy, diversity = losses
    total = 1.3 * (entropy.square() if bend else entropy) + 0.7 * diversity
    return total if commitment is None else total + 0.4 * commitment


@pytest.mark.parametrize("floor", [0.0, 0.05])
@pytest.mark.parametrize("kept", ["all", "some", "heads", "none", "share", "share of some"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_losses_of_a_batch_and_their_derivatives_are_those_in_plain_operations(size, kept, floor):
    heads, number, width, together = size
    values = torch.randn(number, heads, width, dtype=torch.float64).requires_grad_()
    codes = None if kept == "none" else torch.randn_like(values)
    draws = {"some": torch.rand(number, 1) > 0.3, "heads": torch.rand(number, heads) > 0.5, "none": torch.zeros(number, 1) > 0}
    given = [values, codes, draws.get(kept.removeprefix("share of ")), draws["some"] & draws["heads"] if "share" in kept else None]
    both = losses_and_plain(given, together, floor)
    torch.testing.assert_close(*both, rtol=1e-12, atol=1e-13)
    gradients = [torch.autograd.grad(weighed(losses), values)[0] for losses in both]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-13)
    both = losses_and_plain(given, together, floor)
    slopes = [torch.autograd.grad(weighed(losses, bend=True), values, create_graph=True)[0] for losses in both]
    curves = [torch.autograd.grad(slope.square().sum(), values)[0] for slope in slopes]
    torch.testing.assert_close(*curves, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("with_codes", [True, False])
def test_losses_of_a_batch_in_a_compiled_program_and_in_a_transform(with_codes):
    values = torch.randn(6, 2, 8, requires_grad=True)
    codes = values.detach().sign() if with_codes else None
    kept = torch.tensor([[True], [False], [True], [True], [False], [True]])

    def run(values):
        return weighed(bit_losses(values, codes, kept, scale=1.0, temperature=4.0, together=8, floor=1e-5))

    expected = run(values)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(values)
    assert torch.equal(compiled, expected)
    (slope,) = torch.autograd.grad(expected, values)
    assert torch.equal(torch.autograd.grad(compiled, values)[0], slope)
    torch.testing.assert_close(torch.func.grad(run)(values.detach()), slope, rtol=1e-5, atol=1e-7)


def test_sure_bits_have_no_slope():
    values = torch.tensor([[[90.0, -80.0, 70.0]]], requires_grad=True)
    entropy = bit_losses(values, scale=1.0, temperature=4.0, together=3).entropy
    entropy.backward()
    assert 0 < entropy < 1e-28 and values.grad.abs().max() < 1e-28


def test_the_list_of_all_codes_of_many_bits_is_not_kept():
    kept = bits._kept_choices.cache_info().currsize
    bits.product_distribution(torch.randn(1, 13))
    with FakeTensorMode():
        bits.product_distribution(torch.randn(1, 3))
    assert bits._kept_choices.cache_info().currsize == kept
