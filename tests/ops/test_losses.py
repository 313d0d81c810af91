"""Laws of the losses: their dense formulas, what is masked has no part, nothing gives 0, arrangement does not matter."""

import math

import pytest
import torch

from vqkit.ops.losses import (
    commitment_loss,
    cross_entropy_commitment,
    diversity_loss,
    mean_commitment_loss,
    orthogonality_loss,
)


@pytest.mark.parametrize("poison", [1.0, torch.nan, torch.inf])
def test_commitment_is_the_mean_over_positions_of_the_sum_over_heads(poison):
    x, codes = torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 5) < 0.6
    expected = ((x - codes).square().sum(-1) * mask[:, None]).sum() / 10
    spoiled = torch.where(mask[:, None, :, None], x, poison).requires_grad_()
    loss = commitment_loss(spoiled, codes, mask)
    torch.testing.assert_close(loss, expected.detach())
    loss.backward()
    assert codes.grad is None
    torch.testing.assert_close(spoiled.grad, (2 * (x - codes) * mask[:, None, :, None] / 10).detach())


@pytest.mark.parametrize("poison", [1.0, torch.nan, torch.inf])
@pytest.mark.parametrize("shape", [(20, 4), (2, 3, 5, 4)])
def test_mean_commitment_is_the_mean_over_the_values_that_count(poison, shape):
    x, codes = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(shape[:-1]) < 0.6
    spoiled = torch.where(mask.unsqueeze(-1), x, poison).requires_grad_()
    loss = mean_commitment_loss(spoiled, codes, mask)
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(x[mask], codes[mask]).detach())
    loss.backward()
    assert codes.grad is None and not spoiled.grad[~mask].any()
    torch.testing.assert_close(spoiled.grad[mask], (2 * (x - codes)[mask] / (mask.sum() * shape[-1])).detach())
    torch.testing.assert_close(mean_commitment_loss(x, codes), mean_commitment_loss(x, codes, torch.ones_like(mask)))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("pull", [0.0, 0.3, 1.0, 4.0])
def test_codes_are_pulled_by_so_much_of_the_same_gradient(pull, reduction):
    x, codes = (torch.randn(20, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.rand(20) < 0.6
    loss = mean_commitment_loss(x, codes, mask, pull=pull, reduction=reduction)
    assert torch.equal(loss, mean_commitment_loss(x, codes, mask, reduction=reduction))
    loss.sum().backward()
    assert x.grad.any() and (codes.grad is None) == (pull == 0.0)
    if pull:
        torch.testing.assert_close(codes.grad, -pull * x.grad)


def draw(of_x=(2, 3), of_codes=(3,), num=11, codes=7, dtype=torch.float64):
    return torch.randn(*of_x, num, 4, dtype=dtype, requires_grad=True), torch.randn(*of_codes, codes, 4, dtype=dtype, requires_grad=True)


def dense_log_softmax(x, codebook, metric, temperature):
    if metric == "cosine":
        scores = torch.nn.functional.normalize(x, dim=-1) @ torch.nn.functional.normalize(codebook, dim=-1).mT
    else:
        scores = -(x.unsqueeze(-2) - codebook.unsqueeze(-3)).square().sum(-1).sqrt()
    return (scores / temperature).log_softmax(-1)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_cross_entropy_is_the_mean_over_what_counts(metric):
    x, codebook = draw()
    indices, mask = torch.randint(-1, 7, (2, 3, 11)), torch.rand(2, 1, 11) < 0.7
    counted = mask & (indices >= 0)
    expected = torch.nn.functional.nll_loss(dense_log_softmax(x, codebook, metric, 0.5)[counted], indices[counted])
    found = cross_entropy_commitment(x, codebook, indices, mask, temperature=0.5, metric=metric)
    torch.testing.assert_close(found, expected)
    for a, b in zip(*(torch.autograd.grad(loss, (x, codebook)) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_diversity_is_the_negative_entropy_of_the_mean_softmax(metric):
    x, codebook = draw()
    mean = dense_log_softmax(x, codebook, metric, 0.5).exp().mean((0, 2))
    expected = (mean * mean.log()).sum(-1).mean()
    found = diversity_loss(x, codebook, temperature=0.5, metric=metric)
    torch.testing.assert_close(found, expected)
    for a, b in zip(*(torch.autograd.grad(loss, (x, codebook)) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_diversity_does_not_depend_on_the_arrangement_of_the_vectors():
    x, codebook = draw((), (), num=24)
    loss = diversity_loss(x, codebook, temperature=0.1)
    for shape in [(24, 1), (1, 24), (4, 6), (2, 3, 4)]:
        torch.testing.assert_close(diversity_loss(x[torch.randperm(24)].reshape(*shape, 4), codebook, temperature=0.1), loss)


def test_diversity_knows_the_extremes():
    codebook = torch.eye(8)
    assert diversity_loss(codebook.repeat(3, 1), codebook, temperature=1e-3).item() == pytest.approx(-math.log(8))
    assert diversity_loss(codebook[:1].repeat(3, 1), codebook, temperature=1e-3).item() == pytest.approx(0.0)


@pytest.mark.parametrize(("size", "width"), [(9, 4), (4, 9)])
def test_orthogonality_is_the_mean_squared_cosine_of_different_codes(size, width):
    codebook = torch.randn(3, size, width, dtype=torch.float64, requires_grad=True)
    active = torch.rand(3, size) < 0.6
    for chosen in (None, active):
        per_head = []
        for head in range(3):
            unit = torch.nn.functional.normalize(codebook[head] if chosen is None else codebook[head, active[head]], dim=-1)
            cosine = unit @ unit.T
            per_head.append((cosine.square().sum() - len(unit)) / len(unit) ** 2)
        expected, found = torch.stack(per_head).mean(), orthogonality_loss(codebook, chosen)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(loss, codebook)[0] for loss in (found, expected)))


def test_orthogonality_of_sampled_codes_takes_those_of_the_largest_noise_that_are_active():
    codebook, active, noise = torch.randn(2, 10, 4), torch.rand(2, 10) < 0.5, torch.rand(2, 10)
    active[0] = torch.arange(10) % 6 == 0  # fewer than are asked for
    for num in (1, 3, 10, 12):
        chosen = torch.zeros(2, 10, dtype=torch.bool)
        for head in range(2):
            order = noise[head].argsort(descending=True)
            chosen[head, order[active[head, order]][:num]] = True
        found = orthogonality_loss(codebook, active, max_codes=num, noise=noise)
        torch.testing.assert_close(found, orthogonality_loss(codebook, chosen))
    torch.manual_seed(2)
    drawn = orthogonality_loss(codebook, max_codes=3)
    torch.manual_seed(2)
    assert torch.equal(orthogonality_loss(codebook, max_codes=3, noise=torch.rand(2, 10)), drawn)
    with pytest.raises(ValueError, match=r"^max_codes = 0: must be at least 1"):
        orthogonality_loss(codebook, max_codes=0)


def test_orthogonal_codes_lose_nothing():
    assert orthogonality_loss(torch.eye(6) * 3).abs() < 1e-6
    assert orthogonality_loss(torch.ones(5, 6)).item() == pytest.approx(20 / 25)
    assert orthogonality_loss(torch.randn(1, 1, 3)).abs() < 1e-6


LOSSES = {
    "commitment": lambda x, c, mask: mean_commitment_loss(x, c[..., :1, :].expand_as(x), mask),
    "cross entropy": lambda x, c, mask: cross_entropy_commitment(x, c, torch.zeros(x.shape[:-1], dtype=torch.int64), mask),
    "diversity": lambda x, c, mask: diversity_loss(x, c, mask),
    "orthogonality": lambda x, c, mask: orthogonality_loss(c, torch.zeros(c.shape[:-1], dtype=torch.bool) if mask is not None else None),
}


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_loses_nothing(name):
    """No vectors, all masked, or no code active: 0, with a gradient of zeros."""
    cases = [(torch.randn(3, 8, 4), torch.zeros(3, 8, dtype=torch.bool))]
    if name != "orthogonality":
        cases += [(torch.empty(3, 0, 4), None), (torch.empty(0, 3, 8, 4), torch.empty(0, 3, 8, dtype=torch.bool))]
    for x, mask in cases:
        x, codebook = x.requires_grad_(), torch.randn(3, 7, 4, requires_grad=True)
        loss = LOSSES[name](x, codebook, mask)
        assert loss == 0
        loss.backward()
        assert all(tensor.grad is None or not tensor.grad.any() for tensor in (x, codebook))


@pytest.mark.parametrize("name", ["commitment", "cross entropy", "diversity"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1e30])
def test_what_is_masked_influences_nothing(name, poison):
    x, codebook = torch.randn(3, 8, 4), torch.randn(3, 7, 4)
    mask = torch.rand(3, 8) < 0.5
    results = []
    for values in (x, torch.where(mask.unsqueeze(-1), x, poison)):
        values = values.clone().requires_grad_()
        loss = LOSSES[name](values, codebook, mask)
        loss.backward()
        assert not values.grad[~mask].any()
        results.append((loss.detach(), values.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("name", ["cross entropy", "diversity"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1e30])
def test_what_is_not_finite_counts_as_masked(name, poison):
    x, codebook = torch.randn(3, 8, 4), torch.randn(3, 7, 4)
    x[:, 2] = poison
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[:, 2] = False
    assert torch.equal(LOSSES[name](x, codebook, None), LOSSES[name](x, codebook, mask))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_float32_whatever_the_vectors_and_autocast_and_compile_to_one_graph(name):
    x, codebook = torch.randn(3, 8, 4).bfloat16(), torch.randn(3, 7, 4)
    expected = LOSSES[name](x.float(), codebook, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = LOSSES[name](x, codebook, None)
    compiled = torch.compile(lambda a, b: LOSSES[name](a, b, None), backend="aot_eager", fullgraph=True)(x, codebook)
    assert inside.dtype == compiled.dtype == torch.float32
    assert torch.equal(inside, expected)
    torch.testing.assert_close(compiled, expected)


def test_the_loss_of_an_orthogonal_codebook_makes_no_matrix_of_codes_by_codes():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        orthogonality_loss(torch.randn(3000, 4, requires_grad=True))
    assert max(kept) <= 3000 * 4


def test_bad_arguments_are_named():
    x, codes, mask = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4), torch.ones(2, 5, dtype=torch.bool)
    cases = [
        (ValueError, r"^quantized has shape \(5, 4\): must be that of x, \(2, 3, 5, 4\)", lambda: mean_commitment_loss(x, codes[0, 0])),
        (ValueError, r"^quantized has shape \(5, 4\)", lambda: commitment_loss(x, codes[0, 0])),
        (ValueError, r"^x has shape \(5, 4\): must be \[batch, heads, time, width\]", lambda: commitment_loss(x[0, 0], codes[0, 0])),
        (ValueError, r"^mask has shape \(5, 2\): must be \(2, 5\)", lambda: commitment_loss(x, codes, mask.T)),
        (ValueError, r"^mask has shape \(2, 5\): must broadcast to \(2, 3, 5\)", lambda: mean_commitment_loss(x, codes, mask)),
        (TypeError, r"^mask is torch.float32: must be torch.bool", lambda: mean_commitment_loss(x, codes, mask[:, None].float())),
        (ValueError, r"^active has shape \(4,\): must broadcast to \(7,\)", lambda: orthogonality_loss(torch.randn(7, 4), mask[0, :4])),
        (ValueError, r"^reduction = 'sum': must be \"mean\" or \"none\"", lambda: mean_commitment_loss(x, codes, reduction="sum")),
    ]
    for error, message, attempt in cases:
        with pytest.raises(error, match=message):
            attempt()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_a_loss_of_each_vector_adds_up_to_the_mean(metric):
    x, codebook = draw()
    mask = torch.rand(2, 1, 11) < 0.6
    indices = torch.randint(7, (2, 3, 11))
    kept = mask.expand(indices.shape)
    for loss in (
        lambda r: mean_commitment_loss(x, codebook[0, indices], mask, reduction=r),
        lambda r: cross_entropy_commitment(x, codebook, indices, mask, metric=metric, reduction=r),
    ):
        each = loss("none")
        assert each.shape == kept.shape and not each[~kept].any() and (each[kept] > 0).all()
        torch.testing.assert_close(each.sum() / kept.sum(), loss("mean"))


def test_the_loss_of_orthogonality_counts_pairs():
    """(n - 1) / n times the mean over pairs of different codes; a code of length 0 adds what it lacks to the identity."""
    codes = torch.randn(6, 4, dtype=torch.float64)
    cosine = torch.nn.functional.cosine_similarity(codes.unsqueeze(0), codes.unsqueeze(1), dim=-1).square()
    pairs = cosine[~torch.eye(6, dtype=torch.bool)]
    torch.testing.assert_close(orthogonality_loss(codes), pairs.mean() * 5 / 6)
    with_zero = torch.cat([codes, torch.zeros(1, 4, dtype=torch.float64)])
    torch.testing.assert_close(orthogonality_loss(with_zero), (pairs.sum() + 1) / 49)
