"""Laws of what every quantizer does around `quantize`: when codebooks change, what readers see meanwhile, and what counts nothing twice."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from plain_quantizer import Plain
from states import assert_same, snapshot
from vqkit.ops.codebook import assignment_stats, ema_update, laplace_codes_from_ema
from vqkit.quantizers import (
    EMA,
    Affine,
    ClipEMA,
    DeadCodes,
    Frozen,
    Gradient,
    KMeans,
    OwnOptimizer,
    QuantizeDropout,
    QuantizerOutput,
    ResidualVQ,
    VectorQuantize,
    update_codebooks_,
)

CHOICES = {
    "ema": {"update": EMA(0.8)},
    "clip": {"update": ClipEMA(0.8)},
    "cosine": {"update": EMA(0.8), "metric": "cosine"},
    "expiry": {"update": EMA(0.5), "dead_codes": DeadCodes(1.0)},
    "adam": {"update": OwnOptimizer(learning_rate=0.1)},
    "sgd": {"update": OwnOptimizer("sgd", learning_rate=0.1, momentum=0.9), "dead_codes": DeadCodes(0.5)},
    "gradient": {"update": Gradient()},
    "gradient, expiry": {"update": Gradient(0.5), "dead_codes": DeadCodes(0.8, reset_count=0.9)},
    "affine": {"update": EMA(0.8), "affine": Affine()},
    "frozen": {"update": Frozen()},
    "simvq": {"update": Frozen(), "transform": "linear"},
    "transform": {"update": Gradient(), "transform": nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))},
}
NAMES = list(CHOICES)
MOVING = [name for name in NAMES if name not in ("gradient", "frozen", "simvq", "transform")]


def plain(name, commit="auto"):
    torch.manual_seed(1)
    return Plain(commit=commit, **copy.deepcopy(CHOICES[name]))


def batch(step, rows=12):
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(step))


def optimizer_of(module):
    return torch.optim.SGD([*module.parameters(), nn.Parameter(torch.zeros(1))], lr=0.1)


def train(module, run=None, steps=3):
    """Steps of a training loop; what each gave, and the state at the end."""
    run = module if run is None else run
    optimizer, seen = optimizer_of(module), []
    for step in range(steps):
        torch.manual_seed(step)
        x = batch(step).requires_grad_()
        out = run(x)
        optimizer.zero_grad()
        (out.quantized.square().sum() + out.loss).backward()
        gradients = [x.grad, *(parameter.grad for parameter in module.parameters())]
        seen.append([out.quantized.detach(), out.indices, out.loss.detach(), *gradients])
        optimizer.step()
        if module.commit == "manual":
            update_codebooks_(module)
    return seen, snapshot(module)


def assert_same_training(found, expected, **tolerance):
    for step, (one, other) in enumerate(zip(found[0], expected[0], strict=True)):
        for number, (left, right) in enumerate(zip(one, other, strict=True)):
            torch.testing.assert_close(
                left, right, **(tolerance or {"rtol": 0, "atol": 0}), msg=lambda m, s=step, n=number: f"{s} {n}: {m}"
            )
    assert_same(found[1], expected[1], **tolerance)


# One step a forward, seen from outside


@pytest.mark.parametrize("name", ["ema", "clip", "expiry", "adam", "affine"])
def test_auto_is_manual_with_a_commit_after_every_step(name):
    auto, manual = plain(name), plain(name, "manual")
    found = train(auto)
    assert_same_training(found, train(manual))
    assert_same(snapshot(auto.eval()), found[1])
    assert torch.equal(auto.table.codebook, manual.table.codebook)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_training_forward_leaves_is_seen_at_once_and_however_it_is_committed(name):
    module = plain(name)
    before = module.table.codebook.detach().clone()
    module(batch(0))
    after = module.table.codebook.detach().clone()
    assert torch.equal(after, before) != (name in MOVING)
    state = snapshot(module)
    early, twice = copy.deepcopy(module), copy.deepcopy(module)
    early.eval()
    assert_same(snapshot(early), state)
    assert torch.equal(early.table.codebook, after)
    twice.eval().train().eval()
    assert_same(snapshot(twice), state)
    x = batch(1)
    assert torch.equal(module.encode(x), early.encode(x))  # reading in either mode
    results = []
    for other in (module, early.train(), twice.train()):
        torch.manual_seed(5)
        other(x)
        results.append(snapshot(other))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])
    assert results[0]["clock.updates"] == 2


def test_a_forward_reads_what_is_committed_and_returns_what_it_read():
    module = plain("ema")
    codes, x = module.table.codebook.clone(), batch(0)
    out = module(x)
    vectors = x[None]
    statistics = assignment_stats(vectors, out.indices[None], 8)
    total, count = ema_update(codes.clone(), torch.ones(1, 8), statistics, 0.8)
    torch.testing.assert_close(module.table.codebook, laplace_codes_from_ema(total, count))
    torch.testing.assert_close(out.quantized, x + codes[0][out.indices] * x.sin())
    torch.testing.assert_close(out.loss, 0.5 * (x - codes[0][out.indices]).square().sum(-1).mean())


@pytest.mark.parametrize("name", NAMES)
def test_eval_frozen_and_pure_calls_change_nothing(name):
    for commit in ("auto", "manual"):
        module = plain(name, commit)
        module(batch(0))
        before, pending = snapshot(module), copy.deepcopy(module.table.pending)
        module(batch(1), freeze_codebook=True)
        module.quantize(batch(1))
        module.decode(module.encode(batch(2)))
        module.metrics()
        assert_same(snapshot(module), before)
        module.eval()
        module(batch(1)).quantized.sum().backward() if any(p.requires_grad for p in module.parameters()) else module(batch(1))
        assert_same(snapshot(module), before)
        if commit == "manual":
            assert all(torch.equal(a, b) for a, b in zip(module.table.pending, pending, strict=True))


def test_freezing_ends_all_change():
    module = plain("expiry")
    module(batch(0))
    before = snapshot(module)
    module.table.frozen = True
    assert_same(snapshot(module), before)
    for step in range(3):
        module(batch(step))
    module.eval().train()
    found = snapshot(module)
    assert found.pop("clock.updates") == 4 and before.pop("clock.updates") == 1
    assert_same(found, before)
    assert module.metrics()["perplexity"] > 0


# Nothing twice


def around(reentrant):
    return lambda module: lambda x: QuantizerOutput(*checkpoint(module, x, use_reentrant=reentrant))


def compiled(module):
    return torch.compile(module, backend="aot_eager", fullgraph=True)


def inside(module):
    return compiled(lambda x: checkpoint(module, x, use_reentrant=False))


def around_compiled(module):
    run = compiled(module)
    return lambda x: checkpoint(run, x, use_reentrant=False)


ENGINES = {"reentrant": around(True), "recomputed": around(False), "compiled": compiled, "inside": inside, "around": around_compiled}


@pytest.mark.parametrize("commit", ["auto", "manual"])
@pytest.mark.parametrize(
    ("name", "engine"),
    [
        *((name, engine) for name in NAMES for engine in ("reentrant", "recomputed")),
        *((name, engine) for name in ("ema", "gradient, expiry", "affine") for engine in ("compiled", "inside", "around")),
        *((name, "compiled") for name in ("expiry", "adam", "simvq")),
    ],
)
def test_engines_change_nothing(name, engine, commit):
    expected = train(plain(name, commit))
    module = plain(name, commit)
    torch.compiler.reset()
    found = train(module, ENGINES[engine](module))
    exact = engine in ("reentrant", "recomputed")
    assert_same_training(found, expected, **({} if exact else {"rtol": 1e-5, "atol": 1e-6}))
    if name in MOVING:
        assert not torch.equal(plain(name).table.codebook, module.table.codebook)


@pytest.mark.parametrize("name", NAMES)
def test_accumulated_is_one_batch(name):
    if name == "transform":
        pytest.skip("it has no state that commits change")
    whole, parts = plain(name, "manual"), plain(name, "manual")
    x = batch(0, 24)
    whole(x)
    for part in x.split([5, 0, 19]):
        parts(part)
    for module in (whole, parts):
        update_codebooks_(module)
    found, expected = snapshot(parts), snapshot(whole)
    if "expiry" in name or name == "sgd":  # replaced codes are other vectors of the same batch
        for state in (found, expected):
            for key in ("table.sum", "table.weight"):
                state.pop(key, None)
    assert_same(found, expected, rtol=1e-5, atol=1e-6)


def test_compiled_evaluation_is_eager():
    module = plain("ema")
    module(batch(0))
    module.eval()
    torch.compiler.reset()
    found, expected = compiled(module)(batch(1)), module(batch(1))
    torch.testing.assert_close(found.quantized, expected.quantized)
    assert torch.equal(found.indices, expected.indices)


# Moving and storing


@pytest.mark.parametrize("commit", ["auto", "manual"])
@pytest.mark.parametrize("name", NAMES)
def test_any_state_survives_and_goes_on(name, commit):
    module = plain(name, commit)
    train(module, steps=2)
    module(batch(7))
    stored = io.BytesIO()
    torch.save(module.state_dict(), stored)
    stored.seek(0)
    loaded = plain(name, commit)
    for step in range(4):
        loaded(batch(step))  # what it saw is dropped, though it follows a commit of the number that is loaded
    loaded.load_state_dict(torch.load(stored, weights_only=True), strict=True)
    others = [loaded, copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    with torch.device("meta"):
        empty = plain(name, commit)
    empty.load_state_dict(copy.deepcopy(module.state_dict()), assign=True)
    others.append(empty)
    expected = snapshot(module)
    for other in others:
        assert_same(snapshot(other), expected)
    torch.manual_seed(3)
    expected = train(module)
    for other in others:
        torch.manual_seed(3)
        assert_same_training(train(other), expected)


def test_what_is_pending_is_neither_kept_nor_counted_twice_where_states_meet():
    auto, manual, other = plain("ema"), plain("ema", "manual"), plain("ema", "manual")
    auto(batch(0))
    manual.load_state_dict(auto.state_dict())
    assert not any(tensor.any() for tensor in manual.table.pending)
    manual(batch(1))
    state = {name: value for name, value in other.state_dict().items() if "pending" not in name}
    manual.load_state_dict(state, strict=True)
    assert not any(tensor.any() for tensor in manual.table.pending)


@pytest.mark.parametrize("name", NAMES)
def test_codebooks_stay_wide_in_narrow_modules(name):
    module = plain(name)
    module(batch(0))
    before = snapshot(module)
    module.bfloat16()
    assert_same(snapshot(module), before)
    out = module(batch(1).bfloat16())
    assert out.loss.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = module.table.codebook
    assert codes.dtype == torch.float32 and torch.equal(codes, module.table.codebook)


@pytest.mark.parametrize("commit", ["auto", "manual"])
@pytest.mark.parametrize("name", NAMES)
def test_a_forward_on_the_meta_device_gives_shapes(name, commit):
    with torch.device("meta"):
        module = plain(name, commit).to("meta")
        for training in (True, False):
            out = module.train(training)(torch.empty(3, 5, 4))
            assert out.quantized.shape == (3, 5, 4) and out.indices.shape == (3, 5) and out.loss.is_meta
            assert module.decode(module.encode(torch.empty(2, 4))).shape == (2, 4)
        if commit == "manual":
            update_codebooks_(module)


# K-means by itself


def test_a_kmeans_start_happens_in_the_first_training_forward_and_nowhere_else():
    for commit in ("auto", "manual"):
        module, x = Plain(commit=commit, init=KMeans()), batch(0, 40)
        torch.compiler.reset()
        for use in (
            lambda module=module, x=x: module(x, freeze_codebook=True),
            lambda module=module, x=x: module.encode(x),
            lambda module=module: module.decode(torch.zeros(3, dtype=torch.int64)),
            lambda module=module, x=x: copy.deepcopy(module).eval()(x),
            lambda module=module: module.table.codebook,
        ):
            with pytest.raises(ValueError, match=r"call initialize_\(x\)"):
                use()
        with pytest.raises(Exception, match=r"k-means start"):
            compiled(module)(x)
        module(x[:0])
        module(x, torch.zeros(40, dtype=torch.bool))
        assert not module.table.initialized
        module(x)
        assert module.table.initialized
        other = Plain(commit=commit, init=KMeans())
        other.table.initialize_(x[None])
        other(x)
        if commit == "manual":
            assert torch.equal(other.table.codebook, module.table.codebook)


def test_a_kmeans_start_of_directions_waits_for_vectors_that_have_one():
    module = Plain(init=KMeans(), metric="cosine")
    module(torch.zeros(5, 4))
    assert not module.table.initialized
    module(batch(0))
    assert module.table.initialized


def test_a_forward_that_raises_leaves_the_state_as_readers_saw_it():
    module = plain("ema")
    module(batch(0))
    before = snapshot(module)
    with pytest.raises(ValueError, match="must"):
        module(torch.zeros(3, 5))
    assert_same(snapshot(module), before)


# Health


def test_metrics_are_those_of_the_last_commit_and_warn_of_collapse():
    for commit in ("auto", "manual"):
        module = plain("ema", commit)
        assert module.metrics() == {}
        module.table.codebook = 10 * torch.eye(8, 4)[None]
        x = 10 * torch.eye(4).repeat(5, 1)
        x[0, 0] = torch.nan
        module(x)
        if commit == "manual":
            assert module.metrics() == {}
            update_codebooks_(module)
        found = module.metrics()
        assert found["perplexity"] == pytest.approx(4, rel=0.02) and found["active"] == 0.5 and found["dead"] == 0
        assert found["non_finite"] == 1 and found["relative_error"] == 0
    expiring = plain("expiry")
    expiring(torch.zeros(6, 4))  # one code alone is chosen: the counts of the others, 2 at the start, halve to what is not yet dead
    assert expiring.metrics()["dead"] == 0
    expiring(torch.zeros(6, 4))
    assert expiring.metrics()["dead"] == pytest.approx(7 / 8)  # six vectors replace six of these codes
    expiring(torch.zeros(6, 4))
    assert expiring.metrics()["dead"] == pytest.approx(1 / 8)
    wide = Plain(size=16)
    wide.table.codebook = torch.arange(16.0)[:, None].expand(1, 16, 4)
    wide(torch.zeros(40, 4))
    with pytest.warns(UserWarning, match=r"codebook 0 collapses: 40 vectors use 6\.2 % of its 16 codes"):
        wide.metrics()
    few = Plain(size=512)
    few.table.codebook = torch.arange(512.0)[:, None].expand(1, 512, 4)
    few(torch.zeros(40, 4))  # fewer vectors than codes, and all at one
    with pytest.warns(UserWarning, match="codebook 0 collapses"):
        few.metrics()
    few(10.0 * torch.arange(40)[:, None].expand(40, 4))  # as many codes as these vectors can use
    assert few.metrics()["active"] == pytest.approx(40 / 512)


def test_metrics_of_no_vector_are_not_numbers():
    module = plain("ema")
    module(torch.full((5, 4), torch.nan))
    module(torch.randn(7, 4))
    module(torch.full((5, 4), torch.nan))
    found = module.metrics()
    assert found.pop("non_finite") == 5
    assert len(found) == 4 and all(math.isnan(value) for value in found.values())
    module(torch.zeros(0, 4))
    assert math.isnan(module.metrics()["perplexity"])


def test_codes_that_nobody_has_chosen_for_long_are_dead():
    module = Plain(size=8, update=EMA(decay=0.5))
    module.table.codebook = torch.arange(8.0)[:, None].expand(1, 8, 4)
    for _ in range(6):
        module(torch.zeros(64, 4))
    assert module.metrics()["dead"] == pytest.approx(7 / 8)
    module(torch.arange(8.0)[:, None].expand(8, 4))
    assert module.metrics()["dead"] == 0


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
def test_a_vector_that_is_not_finite_counts_once_however_many_heads(heads, separate):
    module = VectorQuantize(6, 8, heads=heads, separate_heads=separate)
    x = torch.randn(4, 5, 6)
    x[0, 1, 2] = x[3, 3, 5] = torch.nan
    module(x)
    assert module.metrics()["non_finite"] == 2


def test_metrics_of_several_codebooks_are_their_means():
    module = ResidualVQ(4, 8, num_quantizers=3)
    module(batch(0))
    found = module.metrics()
    for name in ("perplexity", "active", "dead", "relative_error", "non_finite"):
        each = [found[f"{name}/{number}"] for number in range(3)]
        assert found[name] == pytest.approx(sum(each) / 3)
    assert len({found[f"perplexity/{number}"] for number in range(3)}) > 1


def test_the_switch_of_commit_reaches_all_parts():
    module = nn.Sequential(plain("ema"), plain("clip"))
    module[0].commit = "manual"
    with pytest.raises(ValueError, match='commit = "auto"'):
        update_codebooks_(module)
    with pytest.raises(ValueError, match=r"^commit = 'often'"):
        module[0].commit = "often"
    assert module[0].commit == "manual" and not module[0].table.auto and not module[0].clock.auto


def test_what_is_not_usual_shows_in_the_representation():
    shown = repr(VectorQuantize(8, 16, layout="first", masked="input", commit="manual", init=KMeans(), dead_codes=DeadCodes(1.0)))
    for part in ("layout='first'", "masked='input'", "commit='manual'", "init=KMeans(", "dead_codes=DeadCodes("):
        assert part in shown
    assert "quantize_dropout=QuantizeDropout(" in repr(ResidualVQ(8, 16, 2, quantize_dropout=QuantizeDropout()))
    assert "layout" not in repr(VectorQuantize(8, 16)) and "affine" not in repr(VectorQuantize(8, 16))


@pytest.mark.parametrize("commit", ["auto", "manual"])
def test_a_code_whose_count_stays_where_codes_start_is_not_dead(commit):
    module = plain("expiry", commit)  # counts start at 2
    module.table.codebook = 10 * torch.arange(8.0)[:, None].expand(1, 8, 4)
    for used, dead in ((8, 0.0), (8, 0.0), (4, 0.0), (4, 0.5)):  # the counts of four codes fall to 1, which is not yet dead, and to 0.5
        module(10 * torch.arange(float(used)).repeat(2)[:, None].expand(2 * used, 4))
        if commit == "manual":
            update_codebooks_(module)
        assert module.metrics()["dead"] == dead
    if commit == "auto":
        assert module.eval().metrics()["dead"] == 0.5
