"""Laws of the gradient estimators: exact in value where they promise it, the gradient of their formula, never one that explodes."""

import pytest
import torch

from vqkit.ops import estimators
from vqkit.ops.estimators import directional, rotation_trick, straight_through

EXACT = {"straight through": straight_through, "rotation": rotation_trick}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EXACT)
def test_the_value_is_the_code_and_the_code_gets_no_gradient(name, dtype, compiled):
    run = torch.compile(EXACT[name], backend="aot_eager", fullgraph=True) if compiled else EXACT[name]
    x = (1e4 * torch.randn(3, 5)).to(dtype).requires_grad_()
    codes = (1e-4 * torch.randn(3, 5)).to(dtype).requires_grad_()
    weight = torch.randn(3, 5).to(dtype)
    out = run(x, codes)
    assert torch.equal(out, codes)
    of_x, of_codes = torch.autograd.grad((out * weight).sum(), (x, codes), allow_unused=True)
    assert of_codes is None and of_x.dtype == dtype
    if name == "straight through":
        assert torch.equal(of_x, weight)


def test_straight_through_works_under_function_transforms():
    x, codes = torch.randn(4), torch.randn(4)
    torch.testing.assert_close(torch.func.jacrev(lambda v: straight_through(v, codes) * 3)(x), 3 * torch.eye(4))
    torch.testing.assert_close(torch.func.vmap(straight_through)(x.expand(2, 4), codes.expand(2, 4)), codes.expand(2, 4))


@pytest.mark.parametrize("run", [*EXACT.values(), directional])
def test_what_does_not_match_is_refused(run):
    with pytest.raises(ValueError, match=r"^quantized is \(3,\) torch.float32"):
        run(torch.randn(4), torch.randn(3))
    with pytest.raises(ValueError, match=r"^quantized is \(4,\) torch.float64"):
        run(torch.randn(4), torch.randn(4).double())


@pytest.mark.parametrize("run", [*EXACT.values(), directional])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 4), (2, 3, 4)])
def test_any_leading_axes_and_none(run, shape):
    x = torch.randn(shape, requires_grad=True)
    out = run(x, torch.randn(shape))
    out.sum().backward()
    assert out.shape == x.grad.shape == shape


# Rotation


def jacobians(run, x, codes):
    """[N, K, K], row i the gradient of output i."""
    return torch.func.vmap(torch.func.jacrev(run))(x, codes)


def test_the_rotation_takes_the_vector_to_its_code_and_is_a_scaled_orthogonal_map():
    x, codes = torch.randn(50, 6, dtype=torch.float64), torch.randn(50, 6, dtype=torch.float64) * 3
    map_ = jacobians(rotation_trick, x, codes)
    torch.testing.assert_close((map_ @ x.unsqueeze(-1)).squeeze(-1), codes)
    scale = codes.norm(dim=-1) / x.norm(dim=-1)
    torch.testing.assert_close(map_.mT @ map_, scale.square().reshape(-1, 1, 1) * torch.eye(6, dtype=torch.float64).expand(50, 6, 6))
    torch.testing.assert_close(torch.linalg.det(map_), scale**6)  # no reflection


def test_the_rotation_turns_only_the_plane_of_the_two():
    x, codes = torch.randn(20, 6, dtype=torch.float64), torch.randn(20, 6, dtype=torch.float64)
    basis = torch.linalg.qr(torch.stack([x, codes], dim=-1)).Q
    beside = torch.randn(20, 6, 1, dtype=torch.float64)
    beside = beside - basis @ (basis.mT @ beside)
    scale = (codes.norm(dim=-1) / x.norm(dim=-1)).reshape(-1, 1, 1)
    torch.testing.assert_close(jacobians(rotation_trick, x, codes) @ beside, scale * beside)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e15])
@pytest.mark.parametrize("near", [0.0, 1e-45, 1e-30, 1e-20, 1e-8, 1e-4, 1e-2, 1.0, 1e2, 1e4, 1e8])
def test_a_vector_or_code_near_zero_has_a_bounded_gradient_that_ends_in_straight_through(near, scale):
    for factors in ((near, 1.0), (1.0, near)):
        x, codes = (torch.randn(30, 5) * scale * factor for factor in factors)
        map_ = jacobians(rotation_trick, x, codes)
        assert torch.equal(rotation_trick(x, codes), codes)
        assert torch.linalg.matrix_norm(map_, ord=2).max() <= 114
        if near <= 1e-8 or near >= 1e8:
            torch.testing.assert_close(map_, torch.eye(5).expand(30, 5, 5), rtol=0, atol=1e-3)


def test_the_gradient_of_the_rotation_is_continuous_in_the_length_of_the_vector():
    x, code = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    lengths = torch.logspace(-4, 1, 4000, dtype=torch.float64).unsqueeze(-1)
    map_ = jacobians(rotation_trick, x / x.norm() * lengths, code.expand(4000, 5) / code.norm())
    step = torch.linalg.matrix_norm(map_.diff(dim=0), ord=2)
    assert step.max() < 0.5  # of up to 113: no jump


def test_parallel_and_opposite_vectors_have_a_rotation():
    x = torch.randn(9, 4, dtype=torch.float64)
    torch.testing.assert_close(jacobians(rotation_trick, x, 2 * x), 2 * torch.eye(4, dtype=torch.float64).expand(9, 4, 4))
    opposite = jacobians(rotation_trick, x, -x)
    torch.testing.assert_close((opposite @ x.unsqueeze(-1)).squeeze(-1), -x)
    assert opposite.isfinite().all()
    assert jacobians(rotation_trick, torch.zeros(1, 4), torch.zeros(1, 4)).equal(torch.eye(4).unsqueeze(0))


def test_half_precision_rotates_as_float32_does():
    x, codes = torch.randn(40, 8).bfloat16(), torch.randn(40, 8).bfloat16()
    weight = torch.randn(40, 8)
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        v = x.detach().clone().to(dtype).requires_grad_()
        (rotation_trick(v, codes.to(dtype)) * weight.bfloat16().to(dtype)).sum().backward()
        gradients.append(v.grad.bfloat16())
    assert torch.equal(*gradients)


# DiVeQ


@pytest.mark.parametrize("sigma2", [0.0, 1e-3, 1.0])
def test_the_directional_estimator_is_its_formula_with_gradients_for_both(sigma2):
    x, codes, noise = (torch.randn(12, 5, dtype=torch.float64) for _ in range(3))
    x.requires_grad_(), codes.requires_grad_()
    noisy = (codes - x + sigma2**0.5 * noise).detach()
    expected = x + (codes - x).norm(dim=-1, keepdim=True) * noisy / noisy.norm(dim=-1, keepdim=True)
    found = directional(x, codes, sigma2=sigma2, noise=noise)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    for a, b in zip(*(torch.autograd.grad((out * weight).sum(), (x, codes)) for out in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close((found - x).norm(dim=-1), (codes - x).norm(dim=-1))


def test_without_noise_the_directional_estimator_ends_at_the_code():
    x, codes = torch.randn(12, 5), torch.randn(12, 5)
    torch.testing.assert_close(directional(x, codes, sigma2=0.0), codes)


def test_a_vector_on_its_code_stays_there_with_a_finite_gradient():
    x, codes = torch.randn(12, 5, requires_grad=True), torch.empty(12, 5).requires_grad_()
    codes.data.copy_(x)
    out = directional(x, codes)
    assert torch.equal(out, x)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (x, codes)))


def test_the_noise_of_the_directional_estimator_is_repeatable_and_compiles():
    x, codes = torch.randn(12, 5, requires_grad=True), torch.randn(12, 5)
    results = []
    for run in (directional, torch.compile(directional, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(4)
        results.append(run(x, codes))
    torch.manual_seed(4)
    results.append(directional(x, codes, noise=torch.randn(12, 5)))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_bad_arguments_of_the_directional_estimator_are_named():
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"^sigma2 = -1: must be 0 or positive"):
        directional(x, x, sigma2=-1)
    with pytest.raises(ValueError, match=r"^noise has shape \(3,\)"):
        directional(x, x, noise=torch.randn(3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["one tile", "tiles", "compiled"])
def test_the_rotation_in_one_pass_is_that_in_plain_operations(dtype, form, monkeypatch, request):
    if form == "compiled":
        request.getfixturevalue("native_build")
    monkeypatch.setattr(estimators, "_ENTRIES_PER_TILE", 1 << 16 if form == "one tile" else 32)
    x, codes, weight = (torch.randn(3, 40, 7, dtype=torch.float64).to(dtype) for _ in range(3))
    x[0, 0], codes[0, 1], x[0, 2], codes[0, 3] = 0.0, 0.0, 1e-3 * x[0, 2], -x[0, 3]
    found = []
    for rotate in (rotation_trick, estimators._rotated):
        leaf = x.clone().requires_grad_()
        output = rotate(leaf, codes)
        assert torch.equal(output, codes) and output.dtype == dtype
        found.append(torch.autograd.grad((output * weight).sum(), leaf)[0])
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(*found, rtol=200 * eps, atol=200 * eps)


@pytest.mark.parametrize("built", [False, True])
def test_a_backward_inside_of_autocast_is_as_exact(built, request, monkeypatch):
    if built:
        request.getfixturevalue("native_build")
    x, codes, weight = torch.randn(64, 16), torch.randn(64, 16), torch.randn(64, 16)
    found = []
    for lowered in (False, True):
        vectors = x.clone().requires_grad_()
        rotated = (rotation_trick(vectors, codes) * weight).sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=lowered):
            found.append(torch.autograd.grad(rotated, vectors)[0])
    assert torch.equal(*found)
