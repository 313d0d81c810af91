"""BinaryMapper: against a sum over all codes, its draws, what it refuses. The laws of all quantizers are in tests/laws."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from vqkit.quantizers import BinaryMapper, FreeBits, Residual, VectorQuantize


def chances_of_all_codes(logits, temperature):
    """[N, 2^b], code by code; the first bit is the lowest."""
    ones, each = torch.sigmoid(logits / temperature), []
    for code in itertools.product((0, 1), repeat=logits.shape[-1]):
        bits = code[::-1]
        each.append(math.prod([ones[:, i] if bit else 1 - ones[:, i] for i, bit in enumerate(bits)], start=1.0))
    return torch.stack(each, dim=-1)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 4.0])
@pytest.mark.parametrize("bits", [1, 4, 5])
def test_a_code_in_value_and_all_chances_in_gradient(bits, temperature):
    mapper = BinaryMapper(bits, free_bits=None)
    logits = torch.randn(30, bits, requires_grad=True)
    found = mapper(logits, temperature=temperature)
    assert torch.equal(found.quantized, F.one_hot(found.indices, 2**bits).float())
    upstream = torch.randn(30, 2**bits)
    expected = torch.autograd.grad((chances_of_all_codes(logits, temperature) * upstream).sum(), logits)[0]
    torch.testing.assert_close(torch.autograd.grad((found.quantized * upstream).sum(), logits)[0], expected, rtol=1e-4, atol=1e-6)


def test_codes_are_drawn_as_often_as_their_chance_and_evaluation_takes_the_likeliest():
    mapper = BinaryMapper(3)
    logits = torch.tensor([[0.5, -1.0, 2.0]])
    many = mapper(logits.expand(40_000, 3), temperature=2.0).indices
    share = torch.bincount(many, minlength=8) / len(many)
    torch.testing.assert_close(share, chances_of_all_codes(logits, 2.0)[0], rtol=0, atol=0.012)
    mapper.eval()
    assert mapper(logits).indices.item() == 0b101 == mapper.encode(logits).item()
    assert mapper(logits.expand(400, 3), draw=True).indices.unique().numel() > 1
    assert mapper.train()(logits.expand(400, 3), draw=False).indices.unique().tolist() == [0b101]
    assert mapper.codebook.tolist()[0b110] == [0.0, 1.0, 1.0] and mapper.decode_codes(torch.tensor([6])).tolist() == [[0.0, 1.0, 1.0]]


def test_the_loss_is_the_divergence_from_fair_coins_beyond_what_is_free():
    logits = torch.randn(20, 4) * 3
    logits[0] = torch.nan
    chances = chances_of_all_codes(logits[1:], 1.0).double()
    divergence = (chances * (chances.clamp(min=1e-300) * 16).log()).sum(-1)
    assert (divergence < 1.0).any() and (divergence > 1.0).any()
    found = BinaryMapper(4, free_bits=FreeBits(weight=0.5, threshold=1.0))(logits, temperature=7.0)
    assert found.loss.item() == pytest.approx(0.5 * (divergence - 1.0).clamp(min=0).mean().item(), rel=1e-5)
    assert BinaryMapper(4, free_bits=FreeBits(threshold=99.0))(logits).loss.item() == 0.0


def test_layers_around_it_make_a_table_of_vectors():
    mapper = BinaryMapper(3, 6, heads=2).eval()
    x = torch.randn(5, 7, 6)
    quantized, indices, _ = mapper(x)
    table = mapper.project_out.weight.T.unflatten(0, (2, 8))
    torch.testing.assert_close(quantized, table[0][indices[..., 0]] + table[1][indices[..., 1]])
    assert mapper.bits_per_vector == 6 and mapper.out_dim == 6 and BinaryMapper(3, heads=2).out_dim == 16
    Residual([VectorQuantize(6, 16), BinaryMapper(3, 6)])(x)


def test_given_indices_are_taken():
    mapper = BinaryMapper(3)
    indices = torch.tensor([4, -1, 0, 7])
    found = mapper.quantize(torch.randn(4, 3), indices=indices)
    assert torch.equal(found.indices, indices) and torch.equal(found.quantized, mapper.decode(indices))
    assert found.statistics.vectors.item() == 3


@pytest.mark.parametrize(
    ("attempt", "error", "message"),
    [
        (lambda: BinaryMapper(0), ValueError, r"^bits = 0: must be at least 1"),
        (lambda: BinaryMapper(25), ValueError, r"^bits = 25: must be at most 24"),
        (lambda: BinaryMapper(3, dim=0), ValueError, r"^dim = 0"),
        (lambda: BinaryMapper(3, free_bits=0.5), TypeError, r"^free_bits = 0.5: must be FreeBits"),
        (lambda: FreeBits(threshold=-1.0), ValueError, r"^FreeBits.threshold = -1.0"),
        (lambda: BinaryMapper(3)(torch.randn(2, 3), temperature=0.0), ValueError, r"^temperature = 0.0: must be positive"),
        (lambda: BinaryMapper(3)(torch.randn(2, 4)), ValueError, r"^x has shape \(2, 4\)"),
        (lambda: Residual([BinaryMapper(3)]), ValueError, r"^layers\[0\] gives vectors of width 8: must be 3"),
        (lambda: BinaryMapper(3, 6).nearest(torch.randn(2, 6), 2), ValueError, r"^nearest: a BinaryMapper"),
    ],
)
def test_what_does_not_fit_is_named(attempt, error, message):
    with pytest.raises(error, match=message):
        attempt()
