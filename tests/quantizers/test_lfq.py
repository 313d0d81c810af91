"""LFQ and its spherical form: bits, losses against all codes at once, ranks, what it refuses. The laws are in tests/laws."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from thread_ranks import in_ranks
from vqkit.quantizers import LFQ, Commitment, CrossEntropyCommitment, Diversity, Entropy, Residual, lfq

BOTH = (Entropy(weight=1.0, temperature=0.3), Diversity(weight=1.0, temperature=0.3))


def test_signs_are_the_bits_of_the_index():
    quantizer = LFQ(5, scale=2.0).eval()
    x = torch.randn(40, 5)
    x[0] = 0.0
    quantized, indices, _ = quantizer(x)
    assert torch.equal(quantized, torch.where(x > 0, 2.0, -2.0))
    assert indices.tolist() == [sum(2**i for i in range(5) if row[i] > 0) for row in x.tolist()]
    assert quantizer.codebook_size == 32 and quantizer.bits_per_vector == 5


def on_sphere(x, scale):
    return scale * F.normalize(x, dim=-1)


@pytest.mark.parametrize("spherical", [False, True])
def test_losses_are_those_of_a_softmax_over_all_codes(spherical):
    quantizer = LFQ(8, heads=2, scale=1.5, spherical=spherical, losses=(Commitment(), *BOTH)).double()
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    mask = torch.rand(3, 6) < 0.7
    one, other = (x.clone().requires_grad_() for _ in range(2))
    found = quantizer.quantize(one, mask).losses
    vectors = other[mask].unflatten(-1, (2, 4))
    vectors = on_sphere(vectors, 1.5) if spherical else vectors
    step = 1.5 / 2 if spherical else 1.5
    codes = torch.tensor(list(itertools.product((-step, step), repeat=4)), dtype=torch.float64)
    distances = (vectors.unsqueeze(-2) - codes).square().sum(-1)  # [N, 2, 16]
    logs = (-distances / 0.3).log_softmax(-1)
    expected = {
        "commitment": distances.amin(-1).mean() / 4,
        "entropy": -(logs.exp() * logs).sum(-1).mean(),
        "diversity": -torch.special.entr(logs.exp().mean(0)).sum(-1).mean(),
    }
    assert found.keys() == expected.keys() == quantizer.loss_weights.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)
        gradients = [torch.autograd.grad(loss, at, retain_graph=True)[0] for loss, at in ((found[name], one), (value, other))]
        torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-10)


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.numel())
        return found


def test_no_matrix_of_vectors_by_codes_is_made():
    quantizer = LFQ(16)
    x = torch.randn(64, 16, requires_grad=True)
    with Largest() as largest:
        output = quantizer(x)
        (output.quantized.sum() + output.loss).backward()
    assert largest.entries <= 2**16 + 1


def test_groups_of_bits_bound_the_entropy():
    x = torch.randn(50, 6, dtype=torch.float64)
    exact, bound = (LFQ(6, losses=BOTH, diversity_bits=bits).quantize(x).losses["diversity"] for bits in (None, 2))
    assert bound < exact < 0  # entropies with a minus
    whole = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=6)), dtype=torch.float64)  # independent bits
    exact, bound = (LFQ(6, losses=BOTH, diversity_bits=bits).quantize(whole).losses["diversity"] for bits in (6, 1))
    assert exact.item() == pytest.approx(-6 * math.log(2)) == bound.item()


def test_the_batch_is_that_of_all_ranks_in_value_and_gradient():
    """Shares of different size, one of them empty: the mean gradient of the ranks is that of one process on all vectors."""
    x = torch.randn(30, 4, dtype=torch.float64)
    shares = [x[:21], x[21:], x[:0]]

    def step(x, reducer=None):
        quantizer = LFQ(4, losses=BOTH, diversity_over="ranks")
        quantizer.reducer = reducer
        weight = torch.ones(4, dtype=torch.float64, requires_grad=True)
        diversity = quantizer.quantize(x * weight).losses["diversity"]
        diversity.backward()
        return diversity.item(), weight.grad

    ranks = in_ranks(3, lambda reducer: step(shares[reducer.rank], reducer))
    value, gradient = step(x)
    for found, _ in ranks:
        assert found == pytest.approx(value, rel=1e-9)
    torch.testing.assert_close(sum(g for _, g in ranks) / 3, gradient)
    alone = LFQ(4, losses=BOTH).quantize(shares[1]).losses["diversity"].item()
    assert alone != pytest.approx(value, rel=1e-3)


def test_evaluation_asks_no_other_rank():
    quantizer = LFQ(4, diversity_over="ranks").eval()

    class Unreachable:
        world_size, rank = 2, 0

        def all_reduce_(self, flat):
            raise AssertionError("a collective")

    quantizer.reducer = Unreachable()
    assert quantizer(torch.randn(10, 4)).loss.isfinite()


def test_spherical_codes_have_one_length():
    quantizer = LFQ(9, spherical=True, scale=3.0).eval()
    x = torch.randn(20, 9)
    x[3] = 0.0
    quantized = quantizer(x).quantized
    torch.testing.assert_close(quantized.norm(dim=-1), torch.full((20,), 3.0))
    assert quantized.isfinite().all()
    x.requires_grad_()
    quantizer.train()(x).quantized.sum().backward()
    other = x.detach().clone().requires_grad_()
    on_sphere(other, 3.0).sum().backward()
    torch.testing.assert_close(x.grad[:3], other.grad[:3])


def test_soft_clamp_bounds_what_is_passed_on():
    quantizer = LFQ(3, soft_clamp=2.0, losses=(Commitment(),))
    x = torch.tensor([[100.0, -0.5, 1.0]])
    (commitment,) = quantizer.quantize(x).losses.values()
    clamped = 2 * (x / 2).tanh()
    torch.testing.assert_close(commitment, (clamped - torch.tensor([[1.0, -1.0, 1.0]])).square().mean())


def test_halved_scales_add_up():
    residual = Residual([LFQ(3, scale=0.5**i, losses=()) for i in range(1, 6)]).eval()
    x = torch.rand(200, 3) * 2 - 1
    assert (residual(x).quantized - x).abs().max() <= 0.5**5 + 1e-6


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dim": 8, "codebook_size": 100}, ValueError, r"^codebook_size = 100: must be a power of two, as 64 and 128 are"),
        ({"dim": 8, "codebook_size": 1}, ValueError, r"^codebook_size = 1: must be at least 2"),
        ({"dim": 8, "codebook_size": 16.0}, TypeError, r"^codebook_size = 16.0: must be an integer"),
        ({"dim": 8, "codebook_size": 2**63}, ValueError, r"^codebook_size = 2\^63: must be at most 2\^62"),
        ({"dim": 8, "heads": 3}, ValueError, r"^heads = 3: must divide dim = 8"),
        ({"dim": 63, "losses": ()}, ValueError, r"^codebook_size = 2\^63"),
        ({"dim": 25}, ValueError, r"^diversity_bits = 25: must be at most 24"),
        ({"dim": 25, "diversity_bits": 0}, ValueError, r"^diversity_bits = 0"),
        ({"dim": 8, "scale": -1.0}, ValueError, r"^scale = -1.0: must be positive"),
        ({"dim": 8, "soft_clamp": 0.0}, ValueError, r"^soft_clamp = 0.0: must be positive"),
        ({"dim": 8, "losses": (CrossEntropyCommitment(),)}, TypeError, r"^losses holds CrossEntropyCommitment.*must be of Commitment"),
        ({"dim": 8, "losses": (Entropy(), Entropy())}, ValueError, r"^losses holds several of Entropy"),
        ({"dim": 8, "losses": Entropy()}, TypeError, r"^losses = Entropy.*must be a sequence"),
        ({"dim": 8, "diversity_over": "world"}, ValueError, r"^diversity_over = 'world'"),
    ],
)
def test_what_does_not_fit_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        LFQ(**arguments)


def test_many_bits_work_in_groups_or_without_diversity():
    for quantizer in (LFQ(36, diversity_bits=12), LFQ(36, losses=(Entropy(),)), LFQ(62, losses=())):
        x = torch.randn(10, quantizer.dim)
        quantized, indices, loss = quantizer(x)
        assert loss.isfinite() and torch.equal(quantizer.decode(indices), quantized)


def test_the_first_scalar_may_be_the_highest_bit():
    quantizer = LFQ(5, first_bit="highest").eval()
    x = torch.randn(40, 5)
    indices = quantizer.encode(x)
    assert indices.tolist() == [sum(2 ** (4 - i) for i in range(5) if row[i] > 0) for row in x.tolist()]
    assert torch.equal(quantizer.decode(indices), torch.where(x > 0, 1.0, -1.0))
    assert torch.equal(quantizer.digits(indices), (x > 0).to(torch.int64))
    assert torch.equal(quantizer.nearest(x, 3)[0][:, 0], indices)


def test_the_gradient_goes_through_the_activation_in_training():
    quantizer = LFQ(4, losses=(), activation=torch.nn.Tanh())
    x = torch.randn(6, 4, requires_grad=True)
    for expected in (1 - x.detach().tanh() ** 2, torch.ones(6, 4)):
        out = quantizer(x).quantized
        assert torch.equal(out, torch.where(x > 0, 1.0, -1.0))
        torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], expected)
        quantizer.eval()


def test_a_call_may_set_the_temperature_and_what_the_losses_see():
    x, mask = torch.randn(3, 10, 4), torch.rand(3, 10) < 0.6
    hot = LFQ(4, losses=(Commitment(), Entropy(temperature=2.0), Diversity(temperature=2.0)))
    cold = LFQ(4, losses=(Commitment(), Entropy(), Diversity()))
    found, expected = cold.quantize(x, temperature=2.0, loss_mask=mask), hot.quantize(x, mask)
    torch.testing.assert_close(found.losses, expected.losses)
    assert torch.equal(found.indices, hot.encode(x)) and (expected.indices[~mask] == -1).all()
    with pytest.raises(ValueError, match=r"^temperature = 0.0: must be positive and finite"):
        cold.quantize(x, temperature=0.0)


@pytest.mark.parametrize("masked", [False, True])
def test_entropies_of_a_share_of_the_vectors(masked, monkeypatch):
    x = torch.randn(2, 40, 4)
    mask = torch.rand(2, 40) < 0.5 if masked else torch.ones(2, 40, dtype=torch.bool)
    quantizer = LFQ(4, losses=(Commitment(), *BOTH), loss_share=0.25)
    seen = quantizer._draw_share(mask.view(80, 1), x.view(80, 1, 4)).view(2, 40)
    assert seen.sum() == int(0.25 * mask.sum()) and not (seen & ~mask).any()
    torch.manual_seed(3)
    found = quantizer.quantize(x, mask).losses
    torch.manual_seed(3)
    seen = quantizer._draw_share(mask.view(80, 1), x.view(80, 1, 4)).view(2, 40)
    whole = LFQ(4, losses=(Commitment(), *BOTH))
    expected = {**whole.quantize(x, seen).losses, "commitment": whole.quantize(x, mask).losses["commitment"]}
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(quantizer.eval().quantize(x, mask).losses, whole.quantize(x, mask).losses)
    torch.manual_seed(3)
    with monkeypatch.context() as patch:
        patch.setattr(lfq, "may_look", lambda _: False)
        assert torch.equal(quantizer._draw_share(mask.view(80, 1), x.view(80, 1, 4)).view(2, 40), seen)
    few = LFQ(4, loss_share=0.1)
    assert few._draw_share(None, torch.zeros(2, 1, 4)).sum() == 1
    assert few._draw_share(torch.tensor([[False], [True]]), torch.zeros(2, 1, 4)).tolist() == [[False], [True]]
    assert not few._draw_share(torch.zeros(2, 1, dtype=torch.bool), torch.zeros(2, 1, 4)).any()
