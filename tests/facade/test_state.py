"""The state of the facade's codebooks is what the buffers hold, as in the peer: whoever reads or writes them at any time."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from facade.peer import facade, peer
from vqkit.quantizers import StoredEMA, VectorQuantize

DIM, CODES = 8, 16
LEARNED = {"learnable_codebook": True, "ema_update": False}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "averages": ("VectorQuantize", {}),
    "cosine": ("VectorQuantize", {"use_cosine_sim": True, "codebook_dim": 4}),
    "heads": ("VectorQuantize", {"heads": 2, "separate_codebook_per_head": True, "codebook_dim": 4}),
    "by hand": ("VectorQuantize", {"manual_ema_update": True}),
    "learnable": ("VectorQuantize", LEARNED),
    "affine": ("VectorQuantize", {"affine_param": True}),
    "residual": ("ResidualVQ", {"num_quantizers": 3, "codebook_dim": 4}),
    "shared": ("ResidualVQ", {"num_quantizers": 3, "shared_codebook": True}),
    "networks": ("ResidualVQ", {"num_quantizers": 2, "implicit_neural_codebook": True}),
    "groups": ("GroupedResidualVQ", {"num_quantizers": 2, "groups": 2}),
    "levels": ("HierarchicalVQ", {"scales": (1, 2, 4), "shared_codebook": False, "kmeans_init": False, "threshold_ema_dead_code": 0}),
    "projections": ("RandomProjectionQuantizer", {"codebook_dim": 4, "num_codebooks": 2}),
}


def vectors(seed: int = 0, *, first: bool = False) -> Tensor:
    x = 1.5 * torch.randn(2, 12, DIM, generator=torch.Generator().manual_seed(seed))
    return x.transpose(1, 2) if first else x


def both(kind: str, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """The peer's and the facade's, in the same state."""
    torch.manual_seed(0)
    there, here = (getattr(package, kind)(dim=DIM, codebook_size=CODES, **kwargs) for package in (peer, facade))
    here.load_state_dict(there.state_dict())
    return there, here


def make(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    return facade.VectorQuantize(dim=DIM, codebook_size=CODES, **kwargs)


def assert_same_buffers(there: nn.Module, here: nn.Module) -> None:
    for expected, found in ((dict(there.named_buffers()), dict(here.named_buffers())), (there.state_dict(), here.state_dict())):
        assert [*found] == [*expected]
        for name, value in expected.items():
            assert (found[name].shape, found[name].dtype) == (value.shape, value.dtype), name
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def step(module: nn.Module, x: Tensor, call: Callable[..., Any] | None = None) -> list[Tensor]:
    """The gradients of the input and the parameters."""
    x = x.clone().requires_grad_()
    quantized, _, loss = (module if call is None else call)(x)[:3]
    (quantized.sin().sum() + loss.sum()).backward()
    return [x.grad, *(parameter.grad for parameter in module.parameters())]


# Reading


def test_a_codebook_looks_like_the_peers() -> None:
    for kwargs in ({}, {"vq_bridge": nn.Tanh(), **LEARNED}):
        assert [repr(vq) for vq in both("VectorQuantize", **kwargs)] == [repr(peer.VectorQuantize(DIM, CODES, **kwargs))] * 2


@pytest.mark.parametrize("name", CASES)
def test_buffers_are_the_peers_after_every_step(name: str) -> None:
    kind, kwargs = CASES[name]
    there, here = both(kind, **kwargs)
    if name != "affine":  # there its first values are those of memory that nobody has written
        assert_same_buffers(there, here)
    for seed in range(3):
        x = vectors(seed, first=kind == "HierarchicalVQ")
        for module in (there, here):
            module(x)
        assert_same_buffers(there, here)


@pytest.mark.parametrize("name", ["averages", "residual"])
def test_averages_of_buffers_are_the_peers(name: str) -> None:
    kind, kwargs = CASES[name]
    modules = both(kind, **kwargs)
    averaged = [AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True) for module in modules]
    copies = [copy.deepcopy(module) for module in modules]
    for seed in range(3):
        for module, average, twin in zip(modules, averaged, copies, strict=True):
            module(vectors(seed))
            average.update_parameters(module)
            for own, other in zip(twin.buffers(), module.buffers(), strict=True):
                own.copy_(other)
    assert_same_buffers(averaged[0].module, averaged[1].module)
    assert_same_buffers(*copies)
    for one, other in (averaged, copies):
        assert torch.equal(one.eval()(vectors(9))[1], other.eval()(vectors(9))[1])


# Writing

NEW = vectors(7)[0]


def by_index(codebook: Any) -> None:
    dead = [1, 3, 4]
    codebook.embed.data[:, dead] = NEW[: len(dead)]
    codebook.embed_avg.data[:, dead] = NEW[: len(dead)]
    codebook.cluster_size.data[:, dead] = 1.0


def in_place(codebook: Any) -> None:
    for tensor in (codebook.embed, codebook.embed_avg):
        tensor.copy_(NEW[0] + torch.linspace(0, 1, CODES).unsqueeze(-1))
    codebook.cluster_size.fill_(1.0)


def as_data(codebook: Any) -> None:
    codebook.embed.data = 2 * codebook.embed.data


def as_buffer(codebook: Any) -> None:
    codebook.embed = codebook.embed + 1.0
    codebook.initted = torch.Tensor([1.0])


def by_state_dict(codebook: Any) -> None:
    for value in codebook.state_dict().values():
        value.mul_(2 if value.is_floating_point() else True)


def by_name(codebook: Any) -> None:
    dict(codebook.named_buffers())["embed_avg"].mul_(1.5)


def codes_alone(codebook: Any) -> None:
    codebook.embed.data[0, 2] = 0.0


@pytest.mark.parametrize("write", [by_index, in_place, as_data, as_buffer, by_state_dict, by_name, codes_alone])
def test_what_is_written_behind_a_call_holds(write: Callable[[Any], None]) -> None:
    there, here = both("VectorQuantize")
    for seed in range(3):
        for vq in (there, here):
            vq(vectors(seed))
            with torch.no_grad():
                write(vq._codebook)
        assert_same_buffers(there, here)
    assert torch.equal(there(vectors(5))[1], here(vectors(5))[1])
    assert_same_buffers(there, here)


def test_what_is_written_through_the_codebook_holds() -> None:
    there, here = both("VectorQuantize", manual_ema_update=True)
    for vq in (there, here):
        vq(vectors())
        vq.codebook.mul_(0.5)
        vq.codebook[3] = 1.0
        vq(vectors(1))
    assert_same_buffers(there, here)


@pytest.mark.parametrize("kwargs", [{**LEARNED, "threshold_ema_dead_code": 0.5}, {"orthogonal_reg_weight": 0.5}])
def test_what_is_written_into_a_parameter_holds(kwargs: dict[str, Any]) -> None:
    vq = make(**kwargs)
    for seed in range(2):
        vq(vectors(seed))
    assert isinstance(vq._codebook.embed, nn.Parameter)
    vq._codebook.cluster_size.fill_(9.0)
    vq._codebook.embed.data[:, 5] = 30.0  # nobody's nearest, and not dead
    vq(vectors(2))
    torch.testing.assert_close(vq._codebook.embed[:, 5], torch.full((1, DIM), 30.0), rtol=1e-4, atol=0)
    assert torch.equal(vq.eval()(torch.full((1, 1, DIM), 29.0))[1], torch.tensor([[5]]))


@pytest.mark.parametrize("made", [True, False])
def test_a_start_by_k_means_is_due_when_initted_is_unset(made: bool) -> None:
    vq = make(kmeans_init=made)
    for offset in (0.0, 50.0):
        vq._codebook.initted.data.copy_(torch.tensor(False))
        vq(vectors() + offset)
        assert vq._codebook.initted
        assert (vq._codebook.embed.mean() - offset).abs() < 5


# A call that is computed again reads what it read

RECOMPUTED: dict[str, dict[str, Any]] = {
    "averages": {},
    "cosine": {"use_cosine_sim": True},
    "affine": {"affine_param": True},
    "k-means": {"kmeans_init": True},
    "replaced": {**LEARNED, "threshold_ema_dead_code": 1.5, "decay": 0.1},
    "learned and averaged": {"orthogonal_reg_weight": 0.5},
}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", RECOMPUTED)
def test_a_recomputation_reads_what_the_call_read(name: str, reentrant: bool) -> None:
    plain, again = make(**RECOMPUTED[name]), make(**RECOMPUTED[name])

    def called(x: Tensor) -> Any:
        torch.manual_seed(1)
        return again(x)

    def interrupted(x: Tensor) -> Any:
        found = checkpoint(called, x, use_reentrant=reentrant)
        assert not torch.equal(again._codebook.embed, before)
        again._codebook.embed.data.mul_(3)
        return found

    for seed in range(2):
        torch.manual_seed(1)
        expected = step(plain, vectors(seed))
        before = again._codebook.embed.detach().clone()
        again.zero_grad()
        torch.testing.assert_close(step(again, vectors(seed), interrupted), expected)
        again._codebook.embed.data.div_(3)
        plain.zero_grad()
        assert_same_buffers(plain, again)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_recomputation_of_another_call_reads_that_one(frozen: bool) -> None:
    vq = make()
    for seed in range(3):
        vq(vectors(seed))
    x = vectors(3)
    expected = step(copy.deepcopy(vq), x, lambda y: vq(y, freeze_codebook=True))
    found = step(vq, x, lambda y: checkpoint(vq, y, freeze_codebook=frozen, use_reentrant=False))
    torch.testing.assert_close(found[0], expected[0])


def test_a_compiled_call_that_is_computed_again_reads_what_it_read() -> None:
    torch._dynamo.reset()
    plain, again = make(), make()
    compiled = torch.compile(again, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        expected = step(plain, vectors(seed))
        torch.testing.assert_close(step(again, vectors(seed), lambda x: checkpoint(compiled, x, use_reentrant=False)), expected)
        assert_same_buffers(plain, again)


@pytest.mark.parametrize("name", ["averages", "cosine", "affine", "learned and averaged"])
def test_two_calls_have_one_backward(name: str) -> None:
    apart, joint = make(**RECOMPUTED[name]), make(**RECOMPUTED[name])
    expected = [step(apart, vectors(seed)) for seed in range(2)]
    inputs = [vectors(seed).requires_grad_() for seed in range(2)]
    found = [joint(x) for x in inputs]
    sum(quantized.sin().sum() + loss for quantized, _, loss in found).backward()
    for x, gradients in zip(inputs, expected, strict=True):
        torch.testing.assert_close(x.grad, gradients[0])


SEVERAL: dict[str, dict[str, Any]] = {
    **RECOMPUTED,
    "own optimizer": {**LEARNED, "in_place_codebook_optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.5)},
}


def several(vq: Any, seeds: list[int], again: Callable[[int], bool], reentrant: bool, one_by_one: bool = False) -> list[Tensor | None]:
    """The gradients of all inputs and parameters after some calls of one codebook, of which some are computed `again`, and one backward."""
    vq.zero_grad()
    inputs = [vectors(seed).requires_grad_() for seed in seeds]
    torch.manual_seed(1)
    found = [checkpoint(vq, x, use_reentrant=reentrant) if again(number) else vq(x) for number, x in enumerate(inputs)]
    totals = [quantized.sin().sum() + loss for quantized, _, loss in found]
    for total in totals if one_by_one else (sum(totals),):
        total.backward()
    return [tensor.grad for tensor in (*inputs, *vq.parameters())]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", SEVERAL)
def test_several_calls_that_are_computed_again_read_each_what_it_read(name: str, reentrant: bool) -> None:
    plain, again = make(**SEVERAL[name]), make(**SEVERAL[name])
    for seeds, which, apart in (([0, 1, 2], (0, 1, 2), True), ([3, 4, 5], (0, 2), False), ([6, 6, 7], (0, 1), False), ([8], (0,), True)):
        expected = several(plain, seeds, lambda _: False, reentrant)
        found = several(again, seeds, lambda number, which=which: number in which, reentrant, apart)
        torch.testing.assert_close(found, expected)
        assert_same_buffers(plain, again)


@pytest.mark.parametrize("kind", ["ResidualVQ", "GroupedResidualVQ", "HierarchicalVQ"])
@pytest.mark.parametrize("shared", [False, True])
def test_several_calls_of_layers_are_computed_again(kind: str, shared: bool) -> None:
    given = {"scales": (1, 2), "threshold_ema_dead_code": 0} if kind == "HierarchicalVQ" else {"num_quantizers": 2}
    given = {**given, "dim": 8, "codebook_size": 6, "shared_codebook": shared, "kmeans_init": True}
    results = []
    for again in (False, True):
        torch.manual_seed(0)
        module, gradients = getattr(facade, kind)(**given), []
        for seeds in ((0, 1), (2, 3)):
            inputs = [torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(seed)).requires_grad_() for seed in seeds]
            torch.manual_seed(1)
            found = [checkpoint(module, x, use_reentrant=False) if again else module(x) for x in inputs]
            sum(out[0].sin().sum() + out[-1].sum() for out in found).backward()
            gradients += [x.grad for x in inputs]
        results.append((gradients, {**module.state_dict()}))
    torch.testing.assert_close(results[1], results[0])


def test_calls_that_wait_are_forgotten_aloud() -> None:
    vq = make()
    most = vq._codebook._recall.most
    several(vq, [*range(most + 1)], lambda _: True, False)
    with pytest.raises(RuntimeError, match=f"more than {most + 1} calls"):
        several(vq, [*range(most + 2)], lambda _: True, False)
    for seed in range(2):
        torch.testing.assert_close(several(copy.deepcopy(vq), [seed], lambda _: True, False), several(vq, [seed], lambda _: True, False))
    with torch.no_grad():
        for seed in range(5 * most):
            vq(vectors(seed))
    assert len(vq._codebook._recall.earlier) == most
    for seed in range(5 * most):
        vq(vectors(seed))
    assert not vq._codebook._recall.earlier and not copy.deepcopy(vq)._codebook._recall.earlier


def test_a_graph_of_the_users_over_the_codes_is_no_error() -> None:
    for vq in both("VectorQuantize"):
        x = vectors().requires_grad_()
        scores = x @ vq.codebook.mT
        vq(x)
        scores.sum().backward()
        assert x.grad is not None


# Moving and copying


def test_a_module_is_pickled_and_copied_between_two_steps() -> None:
    vq = make(affine_param=True)
    vq(vectors())
    file = io.BytesIO()
    torch.save(vq, file)
    file.seek(0)
    pickled = torch.load(file, weights_only=False)
    for other in (pickled, copy.deepcopy(vq)):
        assert_same_buffers(vq, other)
        other(vectors(1))
    vq(vectors(1))
    for other in (pickled,):
        assert_same_buffers(vq, other)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kwargs", [{}, {"kmeans_init": True}, {"affine_param": True}])
def test_a_module_on_the_meta_device_takes_a_state(kwargs: dict[str, Any], assign: bool) -> None:
    vq = make(**kwargs)
    vq(vectors())
    with torch.device("meta"):
        other = facade.VectorQuantize(dim=DIM, codebook_size=CODES, **kwargs)
    if not assign:
        other.to_empty(device="cpu")
    other.load_state_dict(copy.deepcopy(vq.state_dict()), assign=assign)
    other.zero = torch.tensor(0.0)  # in no state dict
    for module in (vq, other):
        module(vectors(1))
    assert_same_buffers(vq, other)


def test_codes_that_are_a_sharded_parameter_follow_no_averages() -> None:
    vq = make(orthogonal_reg_weight=0.5)
    vq._codebook._is_fsdp_managed_module = True
    with pytest.raises(ValueError, match="ema_update = True: must be False where fully_shard"):
        vq(vectors())
    vq._codebook.ema_update = False
    vq(vectors())


# What is set on a codebook

SET: list[tuple[str, Any, dict[str, Any]]] = [
    ("decay", 0.3, {}),
    ("eps", 0.5, {}),
    ("ema_update", False, {}),
    ("ema_update", True, {"ema_update": False}),
    ("manual_ema_update", True, {}),
    ("manual_ema_update", False, {"manual_ema_update": True}),
    ("affine_param_batch_decay", 0.2, {"affine_param": True}),
    ("affine_param_codebook_decay", 0.2, {"affine_param": True}),
    ("sample_codebook_temp", 0.0, {"stochastic_sample_codes": True, "sample_codebook_temp": 100.0}),
]


@pytest.mark.parametrize("name, value, kwargs", SET)
def test_what_is_set_later_is_computed_with(name: str, value: Any, kwargs: dict[str, Any]) -> None:
    there, here = both("VectorQuantize", **kwargs)
    unset = copy.deepcopy(here)
    for vq in (there, here, unset):
        torch.manual_seed(1)
        if name != "sample_codebook_temp":
            vq(vectors())
        if vq is not unset:
            setattr(vq._codebook, name, value)
        assert getattr(vq._codebook, name) == getattr((there if vq is here else vq)._codebook, name)
        for seed in range(1, 3):
            vq(vectors(seed))
    assert_same_buffers(there, here)
    assert any(not torch.equal(one, other) for one, other in zip(here.buffers(), unset.buffers(), strict=True))


def test_a_bridge_that_is_set_later_is_computed_with() -> None:
    modules = both("VectorQuantize", **LEARNED, rotation_trick=False)
    torch.manual_seed(1)
    bridge = nn.Linear(DIM, DIM)
    found = []
    for vq in modules:
        vq(vectors())
        vq._codebook.vq_bridge = copy.deepcopy(bridge)
        found.append((vq(vectors())[:2], step(vq, vectors())))
        vq._codebook.vq_bridge = None
        found[-1] += (vq(vectors())[:2],)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("start", [0, 1])
def test_expiry_is_as_set_later(start: float) -> None:
    vq = make(**LEARNED, threshold_ema_dead_code=start)
    codebook = vq._codebook
    vq(vectors())

    def replaced() -> Tensor:
        codes = codebook.embed.detach().clone()
        vq(vectors(1))
        return (codebook.embed != codes).any(-1)

    codebook.has_dead_code_replacement, codebook.threshold_ema_dead_code, codebook.reset_cluster_size = True, 50.0, 3.0
    moved = replaced()
    assert moved.sum() == CODES and (codebook.cluster_size == 3).all()  # which is dead again
    assert replaced().any()
    codebook.threshold_ema_dead_code = 0.0
    assert not replaced().any()
    codebook.threshold_ema_dead_code = 50.0
    assert replaced().any()
    codebook.has_dead_code_replacement = False
    assert not replaced().any()


def test_the_rounds_of_k_means_are_as_set_later() -> None:
    made, set_later, few = (make(kmeans_init=True, kmeans_iters=rounds) for rounds in (10, 1, 1))
    set_later._codebook.kmeans_iters = 10
    for vq in (made, set_later, few):
        vq(torch.cat([vectors(seed) for seed in range(6)]))
    assert_same_buffers(made, set_later)
    assert not torch.allclose(made.codebook, few.codebook)


@pytest.mark.parametrize(
    "name, value",
    [
        ("codebook_size", 8),
        ("num_codebooks", 2),
        ("use_cosine_sim", True),
        ("learnable_codebook", True),
        ("affine_param", True),
        ("gumbel_sample", max),
        ("transform_input", max),
        ("decay", 2.0),
    ],
)
def test_what_cannot_be_set_later_is_refused(name: str, value: Any) -> None:
    codebook = make()._codebook
    before = getattr(codebook, name)
    with pytest.raises(ValueError, match=name):
        setattr(codebook, name, value)
    setattr(codebook, name, before)
    assert getattr(codebook, name) == before


def test_health_of_the_codes_is_that_of_the_native_quantizer():
    ours = facade.VectorQuantize(dim=6, codebook_size=12)
    native = VectorQuantize(6, 12, update=StoredEMA(decay=0.8), losses=())
    native.codebook = ours.codebook.clone()
    x = torch.randn(2, 40, 6)
    for quantizer in (ours, native):
        quantizer(x)
    found, expected = ours.native.metrics(), native.metrics()
    assert found.keys() == expected.keys() and found["perplexity"] > 1
    for name in ("perplexity", "active", "relative_error", "non_finite"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)
