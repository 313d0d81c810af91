"""The one pass from vectors to codes against the plain functions that say what it means."""

from functools import partial

import pytest
import torch

from vqkit.ops import coding
from vqkit.ops.codebook import assignment_stats, directions, gather_codes
from vqkit.ops.coding import coded, coded_stats
from vqkit.ops.estimators import _rotated, straight_through

PLAIN = {"straight_through": straight_through, "rotation": _rotated, "none": lambda x, codes: codes}
KINDS = {
    "plain": lambda x, codes: (x, codes),
    "off centre": lambda x, codes: (x + 1000.0, codes + 1000.0),
    "tiny": lambda x, codes: (x * 1e-20, codes * 1e-20),
    "of very different lengths": lambda x, codes: (x * 1e-3, codes * torch.logspace(-6, 6, codes.shape[1])[:, None]),
    "large": lambda x, codes: (x * 1e16, codes * 1e16),
    "opposite": lambda x, codes: (torch.full_like(x, 1.0) + 1e-3 * x, torch.full_like(codes, -1.0) + 1e-3 * codes),
    "zeros": lambda x, codes: (x.where(x[..., :1] > 0, 0.0), codes.where(codes[..., :1] > 0, 0.0)),
}


@pytest.fixture(params=["plain", "compiled"], autouse=True)
def form(request):
    if request.param == "compiled":
        request.getfixturevalue("native_build")


def problem(kind, dtype, groups=2, num=90, size=30, width=7):
    x, codebook = KINDS[kind](torch.randn(groups, num, width, dtype=torch.float64), torch.randn(groups, size, width, dtype=torch.float64))
    indices = torch.randint(-1, size, (groups, num))
    return x.to(dtype), codebook.to(dtype), indices


def plain(x, codebook, indices, estimator):
    kept = indices.unsqueeze(-1) >= 0
    vectors, codes = x.where(kept, 0.0), gather_codes(codebook, indices)
    output = PLAIN[estimator](vectors, codes).where(kept, 0.0)
    return output, (vectors - codes).square().sum() / (kept.sum().clamp(min=1) * x.shape[-1])


def gradient(function, x, codebook, indices, estimator, of_output, of_error):
    x = x.detach().requires_grad_()
    output, error = function(x, codebook, indices, estimator)[:2]
    return output.detach(), error.detach(), torch.autograd.grad((output * of_output).sum() + (error * of_error).sum(), x)[0]


def fused(x, codebook, indices, estimator):
    return coded(x, codebook, indices, estimator=estimator)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("estimator", PLAIN)
@pytest.mark.parametrize("entries", [1 << 17, 64], ids=["one tile", "tiles"])
def test_values_errors_and_gradients_are_those_of_the_plain_functions(kind, dtype, estimator, entries, monkeypatch):
    monkeypatch.setattr(coding, "_ENTRIES_PER_TILE", entries)
    x, codebook, indices = problem(kind, dtype)
    weights = torch.randn(x.shape, dtype=dtype), x.numel() * torch.rand((), dtype=dtype) / codebook.abs().amax().clamp(min=1e-30)
    output, error, found = gradient(fused, x, codebook, indices, estimator, *weights)
    assert torch.equal(output, gather_codes(codebook, indices))
    wide = [tensor.double() for tensor in (x, codebook)]
    _, exact_error, exact = gradient(plain, *wide, indices, estimator, *(weight.double() for weight in weights))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(error.double(), exact_error, rtol=200 * eps, atol=0.0)
    of_plain = (gradient(plain, x, codebook, indices, estimator, *weights)[2] - exact).norm(dim=-1)
    e, q = (directions(tensor) for tensor in (wide[0].where(indices.unsqueeze(-1) >= 0, 0.0), gather_codes(wide[1], indices)))
    condition = 1.0 + 1.0 / (e + q).norm(dim=-1).clamp(min=1e-6)  # of the direction between the two
    bound = 400 * eps * exact.norm(dim=-1) + 60 * eps * condition * weights[0].norm(dim=-1) + 2 * of_plain
    assert ((found - exact).norm(dim=-1) <= bound).all()


@pytest.mark.parametrize("estimator", PLAIN)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_a_vector_without_code_holds_has_no_influence(estimator, bad):
    x, codebook, indices = problem("plain", torch.float32)
    spoiled = x.masked_fill(indices.unsqueeze(-1) < 0, bad)
    weights = torch.randn(x.shape), x.numel() * torch.rand(())
    for one, other in zip(*(gradient(fused, v, codebook, indices, estimator, *weights) for v in (x, spoiled)), strict=True):
        assert torch.equal(one, other)
    assert not gradient(fused, spoiled, codebook, indices, estimator, *weights)[2][indices < 0].any()


@pytest.mark.parametrize("estimator", PLAIN)
def test_the_way_without_tiles_is_the_same(estimator):
    """What devices run, and what a gradient of the gradient is made of."""
    x, codebook, indices = problem("plain", torch.float64)
    of_output, of_error = torch.randn(x.shape, dtype=torch.float64), x.numel() * torch.rand((), dtype=torch.float64)
    for one, other in zip(*(look_up(x, codebook, indices) for look_up in (coding._look_up_at_once, coding._look_up_in_tiles)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0.0)
    whole = coding._whole_backward(of_output, of_error, x, codebook, indices, estimator)
    torch.testing.assert_close(whole, coding._backward(of_output, of_error, x, codebook, indices, estimator), rtol=1e-12, atol=1e-12)
    twice = []
    for function in (fused, plain):
        leaf, direction = x.clone().requires_grad_(), of_output.clone().requires_grad_()
        output, error = function(leaf, codebook, indices, estimator)[:2]
        total = (output * direction).sum() + (error * of_error).sum()
        first = torch.autograd.grad(total, leaf, create_graph=True)[0]
        twice.append(torch.autograd.grad(first.square().sum(), [leaf, direction], allow_unused=True, materialize_grads=True))
    for one, other in zip(*twice, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("estimator", PLAIN)
def test_compiled_is_eager(estimator):
    x, codebook, indices = problem("plain", torch.float32)
    weights = torch.randn(x.shape), x.numel() * torch.rand(())
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for one, other in zip(*(gradient(f, x, codebook, indices, estimator, *weights) for f in (fused, compiled)), strict=True):
        assert torch.equal(one, other)


def learned(x, codebook, indices, estimator, pull, passed):
    """What `coded` gives a codebook that learns."""
    kept = indices.unsqueeze(-1) >= 0
    vectors, codes = x.where(kept, 0.0), gather_codes(codebook, indices)
    output = PLAIN[estimator](vectors, codes.detach()) + passed * (codes - codes.detach())
    difference = vectors - (codes.detach() + pull * (codes - codes.detach()))
    return output.where(kept, 0.0), difference.square().sum() / (kept.sum().clamp(min=1) * x.shape[-1])


@pytest.mark.parametrize("estimator", PLAIN)
@pytest.mark.parametrize("pull, passed", [(1.0, 0.0), (4.0, 1.0), (0.0, 0.25)])
@pytest.mark.parametrize("of_x", [True, False])
def test_a_codebook_learns_from_so_much_of_both_gradients(estimator, pull, passed, of_x):
    x, codebook, indices = problem("plain", torch.float64)
    x = x.masked_fill(indices.unsqueeze(-1) < 0, torch.nan).requires_grad_(of_x)
    codebook.requires_grad_()
    weights = torch.randn(x.shape, dtype=x.dtype, requires_grad=True), torch.rand((), dtype=x.dtype)
    leaves = [x, codebook] if of_x else [codebook]

    def run(*given):
        return coded(*given, estimator=estimator, pull=pull, passed=passed)

    def gradients(function, *more):
        output, error = function(x, codebook, indices, *more)[:2]
        total = (output * weights[0]).sum() + error * weights[1]
        first = torch.autograd.grad(total, leaves, create_graph=True)
        second = sum(gradient.square().sum() for gradient in first)
        return *first, *torch.autograd.grad(second, [*leaves, weights[0]], allow_unused=True, materialize_grads=True)

    expected = gradients(learned, estimator, pull, passed)
    for one, other in zip(gradients(run), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_codebook_learns_in_a_compiled_graph():
    x, codebook, indices = problem("plain", torch.float32)
    leaves = [x.requires_grad_(), codebook.requires_grad_()]
    run = partial(coded, estimator="rotation", pull=4.0, passed=0.5)
    weights, found = torch.randn(x.shape), []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        output, error = function(x, codebook, indices)[:2]
        found.append(torch.autograd.grad((output * weights).sum() + error, leaves))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("shape", [(1, 0, 4), (3, 0, 4), (2, 5, 1)])
def test_no_vectors_and_narrow_ones(shape):
    x, codebook = torch.randn(shape, requires_grad=True), torch.randn(shape[0], 3, shape[2])
    found = coded(x, codebook, torch.zeros(shape[:2], dtype=torch.int64), estimator="rotation", count=True)
    assert found.quantized.shape == shape and found.error.shape == () and found.squared_error.shape == shape[:1]
    (found.quantized.sum() + found.error).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["plain", "off centre", "tiny"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_what_is_counted_are_the_statistics_of_the_assignment(kind, compiled):
    x, codebook, indices = problem(kind, torch.float32)
    x = x.masked_fill(indices.unsqueeze(-1) < 0, torch.nan)
    run = torch.compile(coded, fullgraph=True, backend="aot_eager") if compiled else coded
    found = run(x, codebook, indices, estimator="rotation", count=True)
    uncounted = coded(x, codebook, indices, estimator="rotation")
    assert [tensor.numel() for tensor in uncounted[5:]] == [0, 0, 0]
    assert all(torch.equal(one, other) for one, other in zip(uncounted[:5], found[:5], strict=True))
    assert not any(tensor.requires_grad for tensor in found)
    assert [tensor.requires_grad for tensor in run(x.clone().requires_grad_(), codebook, indices, estimator="rotation", count=True)] == [
        True,
        True,
        *[False] * 6,
    ]
    torch.testing.assert_close(found.error, found.squared_error.sum() / ((indices >= 0).sum() * x.shape[-1]))
    ignored = torch.rand(indices.shape) < 0.5
    quantized = gather_codes(codebook.double(), indices)
    weights = (~(ignored & (indices < 0))).double()
    expected = assignment_stats(
        x.double(), indices, codebook.shape[1], weights=weights, quantized=quantized, num_candidates=4, moments=True
    )
    counted = coded_stats(x, indices, found, ignored & (indices < 0), num_candidates=4)
    for name in ("count", "vectors", "non_finite"):
        assert torch.equal(getattr(counted, name).double(), getattr(expected, name))
    scale = codebook.abs().amax().item()
    torch.testing.assert_close(counted.sum.double(), expected.sum, rtol=1e-6, atol=1e-5 * scale)
    torch.testing.assert_close(counted.squared_error.double(), expected.squared_error, rtol=1e-5, atol=0.0)
    exact = 2e-4 if kind == "off centre" else 1e-5  # sums of numbers near 1,000 are good to 1e-4, and they stand against a spread of 1
    torch.testing.assert_close(counted.moments[:, 0].double(), expected.moments[:, 0], rtol=1e-5, atol=1e-5 * scale)
    torch.testing.assert_close(counted.moments[:, 1].double(), expected.moments[:, 1], rtol=exact, atol=0.0)
    assert all((row == x[g]).all(-1).any() for g in range(2) for row in counted.candidates[g])


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_vectors_that_nothing_reaches_have_no_gradient(backend):
    """As an optimizer steps, or decays, where there is one, be it 0."""
    x, codebook, indices = problem("plain", torch.float32)
    x.requires_grad_()
    codebook.requires_grad_()

    def run(x, codebook):
        return coded(x, codebook, indices, estimator="none", passed=1.0).quantized

    run = run if backend is None else torch.compile(run, fullgraph=True, backend=backend)
    run(x, codebook).sum().backward()
    assert codebook.grad is not None and x.grad is None


@pytest.mark.parametrize("estimator", PLAIN)
def test_a_transform_sees_the_values_and_gradients_of_autograd(estimator):
    x, codebook, indices = problem("plain", torch.float64)
    weights = torch.randn(x.shape, dtype=x.dtype), torch.rand((), dtype=x.dtype)

    def run(*leaves):
        found = coded(*leaves, indices, estimator=estimator, pull=0.5, passed=0.25)
        return (found.quantized * weights[0]).sum() + found.error * weights[1]

    found, values = torch.func.grad_and_value(run, argnums=(0, 1))(x, codebook)
    leaves = x.requires_grad_(), codebook.requires_grad_()
    torch.testing.assert_close(values, run(*leaves).detach())
    for one, other in zip(found, torch.autograd.grad(run(*leaves), leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
