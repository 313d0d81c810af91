"""Latent quantization: its values, and that they learn. The laws are in tests/laws."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vqkit.quantizers import Commitment, LatentQuantize, latent


def test_it_starts_at_even_values_with_zero_among_them():
    quantizer = LatentQuantize((5, 4, 2))
    assert [v.tolist() for v in quantizer.counts.weight.detach().split((5, 4, 2))] == [
        pytest.approx([-0.5, -0.25, 0.0, 0.25, 0.5]) if number == 5 else pytest.approx([k / number - 0.5 for k in range(number)])
        for number in (5, 4, 2)
    ]


def test_each_scalar_takes_the_nearest_of_its_values_and_these_learn():
    quantizer = LatentQuantize((5, 3), commitment=Commitment(weight=1.0, pull=2.0))
    with torch.no_grad():
        quantizer.counts.weight.normal_()
    first, second = quantizer.counts.weight.detach().split((5, 3))
    x = torch.randn(50, 2, requires_grad=True)
    quantized, indices, loss = quantizer(x)
    digits = torch.stack([(x[:, 0:1] - first).abs().argmin(-1), (x[:, 1:2] - second).abs().argmin(-1)], dim=-1)
    assert torch.equal(indices, digits[:, 0] + 5 * digits[:, 1])
    assert torch.equal(quantized, torch.stack([first[digits[:, 0]], second[digits[:, 1]]], dim=-1))
    loss.backward()
    error = (quantized - x).detach()
    torch.testing.assert_close(x.grad, -2 * error / 100)
    expected = torch.zeros(8).index_add_(0, digits[:, 0], error[:, 0]).index_add_(0, 5 + digits[:, 1], error[:, 1])
    torch.testing.assert_close(quantizer.counts.weight.grad, 2 * 2 * expected / 100)
    frozen = LatentQuantize((5, 3))
    frozen(x.detach().requires_grad_(), freeze_codebook=True).loss.backward()
    assert frozen.counts.weight.grad is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"levels": (4, 1)}, ValueError, r"^levels\[1\] = 1: must be at least 2"),
        ({"levels": (4, 4), "commitment": 0.1}, TypeError, r"^commitment = 0.1: must be Commitment"),
    ],
)
def test_what_does_not_fit_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        LatentQuantize(**arguments)


def test_many_vectors_are_compared_a_few_at_a_time(monkeypatch):
    quantizer, x = LatentQuantize((4, 7, 3), heads=2), torch.randn(3, 11, 6)
    expected = quantizer.encode(x)
    monkeypatch.setattr(latent, "_AT_ONCE", 70)
    with Shapes() as seen:
        assert torch.equal(quantizer.encode(x), expected)
    assert seen.most <= x.numel()


class Shapes(TorchDispatchMode):
    """The most numbers that a result of any operation has."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.most = max(
            self.most, *(part.numel() for part in (found if isinstance(found, tuple) else (found,)) if isinstance(part, torch.Tensor)), 0
        )
        return found
