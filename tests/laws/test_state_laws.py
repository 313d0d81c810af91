"""Laws of what a quantizer keeps: what changes it, what does not, and that it travels whole."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from laws.book import law
from laws.drive import assert_same, backward_, books, call, commit_, committed, is_manual, learn_, started, state, trained, twins


def everything(module):
    """The whole state, and the random generator."""
    return state(module), torch.get_rng_state()


@law
def test_eval_changes_nothing(case):
    module = trained(case, steps=1)
    learn_(module, case.input(seed=60))
    module.eval()
    x = case.input().requires_grad_()
    before = everything(module)
    for mask in (None, case.some_mask()):
        output = call(module, x, mask)
        backward_(output)
        module.decode(module.encode(x))
        if not case.in_heads:
            module.quantize(x, mask)
    assert_same(everything(module), before)
    module.train()
    assert_same(state(module), before[0])
    module.eval()
    assert_same(state(module), before[0])


@law
def test_frozen_changes_nothing(case):
    module = trained(case)
    call(module, case.input(seed=60))  # so that something is pending
    before = state(module)
    for seed in (1, 2):
        backward_(call(module, case.input(seed=seed), freeze_codebook=True))
    assert_same(state(module), before)


@law
def test_a_call_that_raises_changes_nothing(case):
    module = trained(case)
    call(module, case.input(seed=61))  # so that something is pending
    x = case.input()
    before = everything(module)
    mask = torch.ones(case.mask_shape(), dtype=torch.bool)
    axis = 1 if case.arguments.get("layout") == "first" else -1
    wrong = [
        (ValueError, r"^x has shape", lambda: call(module, x.narrow(axis, 0, x.shape[axis] - 1))),
        (ValueError, r"^x has shape", lambda: call(module, x.reshape(-1))),
        (TypeError, r"^x is torch.int64", lambda: call(module, x.long())),
        (TypeError, r"^mask is torch.float32", lambda: call(module, x, mask.float())),
        (ValueError, r"^mask has shape", lambda: call(module, x, mask[1:])),
        (ValueError, r"^x has shape", lambda: module.encode(x.narrow(axis, 0, x.shape[axis] - 1))),
    ]
    for error, match, attempt in wrong:
        with pytest.raises(error, match=match):
            attempt()
        assert_same(everything(module), before)
    indices = module.encode(x)
    past = torch.tensor(module.codebook_sizes).reshape(module.code_shape).expand_as(indices) if not case.in_heads else indices + 10**6
    for bad in (torch.full_like(indices, -2), past):
        with pytest.raises(ValueError, match=r"^indices holds"):
            module.decode(bad)
    with pytest.raises(TypeError, match=r"^indices is torch.float32"):
        module.decode(indices.float())
    assert_same(everything(module), before)


@law
def test_the_loss_is_nobodys_buffer(case):
    spoiled, clean = (m.eval() for m in twins(trained(case)))
    for training in (True, False):
        for module in (spoiled, clean):
            module.train(training)
        x = case.input()
        torch.manual_seed(7)
        output = call(spoiled, x)
        with torch.no_grad():
            output.loss.add_(5.0)
            output.quantized.fill_(9.0)
        if output.indices.numel():
            output.indices.fill_(0)
        torch.manual_seed(7)
        call(clean, x)
        assert_same(committed(spoiled), committed(clean))
        torch.manual_seed(8)
        found = call(spoiled, x)
        torch.manual_seed(8)
        assert_same(found, call(clean, x))
    assert case.in_heads or not call(clean, case.input().requires_grad_()).loss.requires_grad
    assert all(buffer.grad is None and not buffer.requires_grad for module in (spoiled, clean) for buffer in module.buffers())


@law
def test_reading_writes_nothing(case):
    read, alone = twins(trained(case))
    for seed in (1, 2, 3):
        for module in (read, alone):
            torch.manual_seed(seed)
            call(module, case.input(seed=seed))
        once, again = state(read), state(read)
        assert_same(again, once)
        shown = [book.codes().detach().clone() for book in books(read)]
        if not is_manual(read):
            read.eval(), read.eval(), read.train()
            assert_same([book.codes() for book in books(read)], shown)
            assert_same({n: t for n, t in state(read).items() if "pending" not in n}, {n: t for n, t in once.items() if "pending" not in n})
        else:
            commit_(read), commit_(alone)
    assert_same(committed(read), committed(alone))


@law
def test_the_codebook_learns(case):
    module = started(case)
    codes = [book.codes().detach().clone() for book in books(module)]
    learn_(module, case.input(seed=5))
    assert any(not torch.equal(old, book.codes()) for old, book in zip(codes, books(module), strict=True))


@law
def test_any_state_survives_the_state_dict(case):
    fresh, waiting, between, settled = started(case), case.build(), trained(case), trained(case)
    call(between, case.input(seed=62))
    commit_(settled)
    for module in (fresh, waiting, between, settled):
        stored = io.BytesIO()
        torch.save(module.state_dict(), stored)
        stored.seek(0)
        other = case.build(seed=77)
        call(other.train(), case.input(seed=63)) if not case.waits else None  # stale statistics, to be dropped
        other.load_state_dict(torch.load(stored, weights_only=True), strict=True)
        assert_same(state(other), state(module))
        if module is waiting and case.waits:
            continue
        for m in (module.train(), other.train()):
            torch.manual_seed(9)
            commit_(m)
            learn_(m, case.input(seed=64))
        assert_same(committed(other), committed(module))


@law
def test_copies_are_whole(case):
    module = trained(case)
    call(module, case.input(seed=65))
    with torch.device("meta"):
        empty = case.build()
    assert all(t.is_meta for t in [*empty.parameters(), *empty.buffers()])
    by_assignment = empty
    by_assignment.load_state_dict({name: t.clone() for name, t in module.state_dict().items()}, assign=True)
    with torch.device("meta"):
        empty = case.build()
    empty.to_empty(device="cpu").load_state_dict(module.state_dict())
    others = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), by_assignment.train(), empty.train()]
    before = state(module)
    for other in others:
        assert_same(state(other), before)
        torch.manual_seed(9)
        learn_(other, case.input(seed=66))
    assert_same(state(module), before)
    torch.manual_seed(9)
    learn_(module, case.input(seed=66))
    for other in others:
        assert_same(state(other), state(module))


@law
def test_the_setter_lasts(case):
    module = trained(case)
    call(module, case.input(seed=67))
    codes = torch.randn_like(module.codebook)
    module.codebook = codes
    expected = F.normalize(codes, dim=-1) if case.arguments.get("metric") == "cosine" else codes
    near = {"rtol": 1e-6, "atol": 1e-6}
    assert_same(module.codebook.detach(), expected, **near)
    commit_(module)
    assert_same(module.codebook.detach(), expected, **near)
    with pytest.raises(ValueError, match=r"^codebook has shape"):
        module.codebook = codes[..., :-1]
    assert_same(module.codebook.detach(), expected, **near)


@law
def test_metrics_are_told(case):
    module = started(case)
    x = case.input()
    call(module, x)
    commit_(module)
    metrics = module.metrics()
    assert all(isinstance(value, float) for value in metrics.values())
    words = " ".join(metrics)
    for name in ("perplexity", "active", "dead", "relative_error", "non_finite"):
        assert name in words


def test_sharing_a_codebook_is_told_once():
    """A module that stands in a model twice is committed once."""
    from laws.family import VectorQuantize

    shared = VectorQuantize(8, 16, commit="manual")
    model = nn.ModuleList([shared, nn.ModuleList([shared])])
    alone = copy.deepcopy(shared)
    x = torch.randn(2, 8, 8)
    from vqkit.quantizers import update_codebooks_

    for module, root in ((shared, model), (alone, alone)):
        module(x)
        update_codebooks_(root)
    assert_same(state(shared), state(alone))
