"""Laws of what a quantizer returns: round trips, masks, order, number formats, hard inputs, seeds."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from laws import drive
from laws.book import law
from laws.drive import assert_same, backward_, books, call, committed, gradients, objective, started, trained, twins
from laws.family import BATCH

_PROJECTIONS = ("project_in", "norm")
NARROW = (torch.bfloat16, torch.float16)


def step(module, x, mask=None, seed=7, **options):
    """Output, loss, gradients and the state after one training call."""
    torch.manual_seed(seed)
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    output = call(module, x, mask, **options)
    backward_(output)
    return tuple(output), gradient_of(x), gradients(module), committed(module)


def gradient_of(x):
    return torch.zeros_like(x) if x.grad is None else x.grad


@law
def test_decode_of_encode_is_the_output(case):
    module, x = trained(case).eval(), case.input()
    output = call(module, x)
    indices = module.encode(x)
    assert torch.equal(indices, output.indices)
    assert torch.equal(module.decode(indices), output.quantized)
    assert torch.equal(module.train().encode(x), indices)


@law
def test_shapes_are_told(case):
    module, x = started(case).eval(), case.input()
    output = call(module, x)
    assert output.quantized.shape == case.output_shape(module, x)
    assert output.loss.shape == ()
    assert output.indices.dtype == torch.int64
    assert output.indices.shape == case.index_shape(module)
    sizes = module.codebook_sizes
    assert len(sizes) == math.prod(module.code_shape)
    assert module.bits_per_vector == pytest.approx(sum(map(math.log2, sizes)))
    assert set(sizes) == {book.size for book in module.codebooks()}
    dropped = module.decode(torch.full_like(output.indices, -1))
    assert dropped.shape == output.quantized.shape and not dropped.any()


@law
def test_a_mask_of_ones_is_no_mask(case):
    plain, masked = twins(started(case))
    x = case.input()
    assert_same(step(masked, x, torch.ones(case.mask_shape(), dtype=torch.bool)), step(plain, x))


@law
def test_masked_vectors_influence_nothing(case):
    mask = case.some_mask()
    keep = case.spread(mask)
    results = []
    for garbage, module in zip((0.0, 1e4, torch.nan, torch.inf), twins(trained(case), 4), strict=True):
        x = case.input().masked_fill(~keep, garbage)
        (quantized, indices, loss), gradient, parameters, state = step_on_kept(case, module, x, mask)
        results.append(
            (
                quantized.where(case.spread(mask, quantized), 0.0),
                case.kept(indices, mask),
                loss,
                gradient.where(keep, 0.0),
                parameters,
                state,
            )
        )
        assert loss.isfinite()
    for other in results[1:]:
        assert_same(other, results[0])


def step_on_kept(case, module, x, mask):
    """As `step`, with an objective that sees the kept outputs alone."""
    torch.manual_seed(7)
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    output = call(module, x, mask)
    backward_(output._replace(quantized=output.quantized.where(case.spread(mask, output.quantized), 0.0)))
    return tuple(output), gradient_of(x), gradients(module), committed(module)


@law
def test_order_does_not_matter(case):
    plain, permuted = twins(trained(case))
    x = case.input()
    (quantized, indices, loss), gradient, parameters, state = step(plain, x)
    order = torch.randperm(math.prod(case.mask_shape()))
    (other_quantized, other_indices, *other_loss), other_gradient, *others = step(permuted, case.reorder(x, order))
    assert torch.equal(other_indices, case.reorder_indices(indices, order))
    near = {"rtol": 1e-5, "atol": 1e-6}
    assert_same(other_quantized, case.reorder(quantized, order), **near)
    assert_same(other_gradient, case.reorder(gradient, order), **near)
    assert_same((*other_loss, *others), (loss, parameters, state), **near)


@law
def test_arrangement_does_not_matter(case):
    plain, arranged = twins(trained(case))
    x = case.input()
    (quantized, _, loss), _, parameters, state = step(plain, x)
    (other_quantized, _, other_loss), _, *others = step(arranged, case.as_one_batch(x))
    near = {"rtol": 1e-5, "atol": 1e-6}
    assert_same((other_loss, *others), (loss, parameters, state), **near)
    assert_same(other_quantized, case.as_one_batch(quantized), **near)


@law
def test_dtype_in_is_dtype_out(case):
    for dtype in (torch.float64, torch.float32, *NARROW):
        module = started(case).to(dtype)
        x = case.input().to(dtype).requires_grad_()
        for training in (True, False):
            output = call(module.train(training), x)
            assert output.quantized.dtype == dtype and output.indices.dtype == torch.int64
            assert output.quantized.isfinite().all() and output.loss.isfinite()
            if output.quantized.requires_grad:
                (gradient,) = torch.autograd.grad(objective(output), x, allow_unused=True)
                assert gradient is None or (gradient.dtype == dtype and gradient.isfinite().all())
        assert module.decode(output.indices).isfinite().all()


def same_projection(source, target):
    """Make the input projections of `target` return what those of `source` returned last."""
    seen = {}
    for name, layer in source.named_modules():
        if name.endswith(_PROJECTIONS):
            layer.register_forward_hook(lambda _, __, result, name=name: seen.__setitem__(name, result.detach()))
    for name, layer in target.named_modules():
        if name.endswith(_PROJECTIONS):
            layer.register_forward_hook(lambda _, __, result, name=name: seen[name].to(result.dtype))


@law
def test_autocast_changes_nothing(case):
    for training in (True, False):
        narrow, wide = (m.train(training) for m in twins(trained(case)))
        same_projection(narrow, wide)
        x = case.input()
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16):
            found = call(narrow, x)
        torch.manual_seed(7)
        expected = call(wide, x)
        assert torch.equal(found.indices, expected.indices)
        assert_same(committed(narrow), committed(wide))
        if not case.projects:
            assert_same(found, expected)


@law
def test_narrow_modules_assign_as_float32(case):
    for dtype in NARROW:
        wide = trained(case)
        (narrow,) = (m.to(dtype) for m in twins(wide, 1))
        same_projection(narrow, wide)
        x = case.input().to(dtype)
        for _ in range(2):
            torch.manual_seed(7)
            found = call(narrow, x)
            torch.manual_seed(7)
            expected = call(wide, x.float())
            assert torch.equal(found.indices, expected.indices)
            drive.commit_(narrow), drive.commit_(wide)
        assert all(book.codes().dtype == torch.float32 for book in books(narrow))
        assert_same([book.codes() for book in books(narrow)], [book.codes() for book in books(wide)])


@law
def test_far_and_tiny_data_assign_right(case):
    for scale, offset in ((1.0, 1000.0), (1e-5, 0.0)):
        module = started(case).eval()
        module.codebook = torch.randn_like(module.codebook) * scale + offset
        x = case.input(batch=16) * scale + offset
        assert regret(case, module, x) <= 8 * torch.finfo(torch.float32).eps


def regret(case, module, x):
    """How much farther the chosen code is than the nearest, over the size of the data; in float64."""
    codes = module.codebook.detach().double()
    vectors = case.rows(x).double().reshape(-1, module.heads, codes.shape[-1])
    if module.metric == "cosine":
        codes, vectors = F.normalize(codes, dim=-1), F.normalize(vectors, dim=-1)
    distances = (vectors.unsqueeze(-2) - codes).norm(dim=-1)  # [N, heads, C]
    chosen = distances.gather(-1, module.encode(x).reshape(*distances.shape[:-1], 1)).squeeze(-1)
    return ((chosen - distances.amin(-1)).max() / vectors.abs().max()).item()


@law
def test_vectors_that_are_not_finite_enter_nothing(case):
    keep_all = case.some_mask()
    keep = case.spread(keep_all)
    clean, spoiled = twins(trained(case))
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf])[torch.randint(3, case.mask_shape())]
    x = case.input().where(keep, case.spread(bad))
    (quantized, indices, loss), gradient, parameters, after = step(spoiled, x)
    step_on_kept(case, clean, x, keep_all)
    assert (case.kept(indices, ~keep_all) == -1).all()
    assert (case.kept(indices, keep_all).reshape(int(keep_all.sum()), -1)[:, 0] >= 0).all()  # later layers may be dropped
    assert not quantized.masked_select(~case.spread(keep_all, quantized)).any() and quantized.isfinite().all()
    assert loss.isfinite() and gradient.isfinite().all() and not gradient.masked_select(~keep).any()
    assert all(g.isfinite().all() for g in parameters.values())
    assert all(t.isfinite().all() for t in after.values() if t.is_floating_point())
    assert_same([book.codes() for book in books(spoiled)], [book.codes() for book in books(clean)], rtol=1e-5, atol=1e-6)


@law
def test_nothing_to_quantize_works(case):
    for training in (True, False):
        for batch, mask in ((0, None), (BATCH, torch.zeros(case.mask_shape(), dtype=torch.bool))):
            module = trained(case).train(training)
            x = case.input(batch=batch).requires_grad_()
            output = call(module, x, mask)
            assert output.quantized.shape == case.output_shape(module, x) and output.loss.isfinite()
            backward_(output)
            assert x.grad is None or x.grad.isfinite().all()
            assert all(g.isfinite().all() for g in gradients(module).values())
            assert all(t.isfinite().all() for t in committed(module).values() if t.is_floating_point())


@law
def test_training_returns_one_codebook(case):
    module = trained(case)
    before, still = twins(module)
    x = case.input()
    output = call(module, x)
    assert torch.equal(before.eval().encode(x), output.indices)
    assert_same(before.decode(output.indices), output.quantized)
    assert_same(call(still.eval(), x).quantized, output.quantized)


@law
def test_the_same_seed_repeats(case):
    results = []
    for _ in range(2):
        module = case.build(seed=3).train()
        if case.waits:
            module.initialize_(case.input(seed=99))
        results.append([step(module, case.input(seed=s), seed=s) for s in (4, 5)])
    assert_same(*results)


@law
def test_second_derivatives_are_given_or_refused(case):
    """A function that knows first ones alone says so only where the gradient that comes in is itself differentiable."""
    found = []
    for module, differentiable in zip(twins(trained(case)), (False, True), strict=True):
        torch.manual_seed(7)
        x, share = case.input().requires_grad_(), torch.ones((), requires_grad=differentiable)
        total = objective(call(module, x)) * share
        first = torch.autograd.grad(total, x, create_graph=True, materialize_grads=True)[0] if total.requires_grad else total
        try:
            if first.requires_grad:
                first.sin().sum().backward()
        except NotImplementedError:  # as torch refuses
            found.append(None)
        else:
            found.append(gradient_of(x))
    without, within = found
    assert (without is None) == (within is None)
    assert without is None or torch.equal(without, within)
