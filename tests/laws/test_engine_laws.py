"""Laws of the engines that run a quantizer on one process: recomputation, compilers, export, accumulation."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from laws.book import law
from laws.drive import (
    Output,
    assert_same,
    backward_,
    call,
    commit_,
    committed,
    differs,
    gradients,
    is_manual,
    objective,
    state,
    trained,
    twins,
)
from laws.family import BATCH


@pytest.fixture(autouse=True)
def _fresh_compiler():
    yield
    torch._dynamo.reset()


def run(module, function, x):
    """Output, input gradient, parameter gradients and codebooks of one training step through `function`."""
    torch.manual_seed(7)
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    output = Output(*function(x * 1.5))  # reentrant checkpoints return a plain tuple
    backward_(output)
    return tuple(output), torch.zeros_like(x) if x.grad is None else x.grad, gradients(module), committed(module)


@law
def test_recomputed_is_not_counted_twice(case):
    plain, *others = twins(trained(case), 3)
    x = case.input()
    before = state(plain)
    expected = run(plain, lambda x: call(plain, x), x)
    assert differs(expected[-1], before) or expected[2] or not case.learns
    for other, reentrant in zip(others, (True, False), strict=True):
        assert_same(run(other, lambda x, m=other, r=reentrant: checkpoint(call, m, x, use_reentrant=r), x), expected)


def compiled_equals_eager(case, backend):
    eager, eager_eval, train, still = twins(trained(case), 4)
    eager_eval.eval(), still.eval()

    def both(train, still, x, z):
        return call(train, x), call(still, z)

    program = torch.compile(both, backend=backend, fullgraph=True, dynamic=False)
    results = []
    for function, *modules in ((both, eager, eager_eval), (program, train, still)):
        torch.manual_seed(7)
        outputs = []
        for seed in (1, 2):  # the second call reads what the first added
            x, z = case.input(seed=seed).requires_grad_(), case.input(seed=seed).requires_grad_()
            one, other = function(*modules, x, z)
            total = objective(one) + objective(other)
            if total.requires_grad:
                total.backward()
            outputs.append((tuple(one), tuple(other), x.grad, z.grad))
            if is_manual(modules[0]):
                commit_(modules[0])
        results.append((outputs, gradients(modules[0]), committed(modules[0]), state(modules[1])))
    return results


@law
def test_compiled_is_eager(case):
    eager, compiled = compiled_equals_eager(case, "aot_eager")
    assert_same(compiled, eager)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of the compiler, about itself
@law
def test_inductor_is_eager(case):
    eager, compiled = compiled_equals_eager(case, "inductor")
    assert_same(compiled, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # of the compiler, about its inputs
@law
def test_checkpointing_compiles(case):
    plain, around, inside = twins(trained(case), 3)
    x = case.input()
    expected = run(plain, lambda x: call(plain, x), x)
    program = torch.compile(lambda x: call(around, x), backend="aot_eager")
    assert_same(run(around, lambda x: checkpoint(program, x, use_reentrant=False), x), expected)
    program = torch.compile(lambda x: checkpoint(call, inside, x, use_reentrant=False), backend="aot_eager", fullgraph=True)
    assert_same(run(inside, program, x), expected)


class RoundTrip(nn.Module):
    """Both verbs in one program."""

    def __init__(self, quantizer):
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x):
        indices = self.quantizer.encode(x)
        return indices, self.quantizer.decode(indices)


@law
def test_encode_and_decode_export(case):
    module = RoundTrip(trained(case)).eval()
    x = case.input()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch.export about itself
        program = torch.export.export(module, (x,), strict=False)
    other = case.input(seed=2)
    assert_same(program.module()(other), module(other))


@law
def test_micro_batches_are_one_batch(case):
    whole, parts = twins(trained(case, commit="manual") if case.commits else trained(case))
    x = case.input()
    before = state(whole)
    whole.zero_grad()
    backward_(call(whole, x))
    commit_(whole)
    parts.zero_grad()
    number = 4
    for part in x.split(BATCH // number):
        total = objective(call(parts, part)) / number
        if total.requires_grad:
            total.backward()
    commit_(parts)
    near = {"rtol": 1e-5, "atol": 1e-6}
    assert_same(gradients(parts), gradients(whole), **near)
    assert_same(state(parts), state(whole), **near)
    assert differs(before, state(whole)) or gradients(whole)


def test_the_compiled_part_has_no_break():
    """What a compiled call does outside its graph, as a count of graph breaks: none."""
    from laws.family import VectorQuantize

    explained = torch._dynamo.explain(VectorQuantize(8, 16))(torch.randn(2, 8, 8))
    assert explained.graph_break_count == 0


@law
def test_transforms_see_what_autograd_does(case):
    module, inputs = trained(case).eval(), [case.input(seed=seed) for seed in (1, 2)]
    slopes, outputs = [], []
    for x in inputs:
        x = x.clone().requires_grad_()
        output = call(module, x)
        total = objective(output)
        slopes.append(torch.autograd.grad(total, x, materialize_grads=True)[0] if total.requires_grad else torch.zeros_like(x))
        outputs.append(output.quantized.detach())

    def run(x):
        return objective(call(module, x))

    warnings.filterwarnings("ignore", message="There is a performance drop")  # of operations that vmap does not know
    assert_same(torch.func.grad(run)(inputs[0]), slopes[0], rtol=1e-5, atol=1e-6)
    many = torch.stack(inputs)
    assert_same(torch.func.vmap(lambda x: call(module, x).quantized)(many), torch.stack(outputs), rtol=1e-5, atol=1e-6)
    assert_same(torch.func.vmap(torch.func.grad(run))(many), torch.stack(slopes), rtol=1e-5, atol=1e-6)
