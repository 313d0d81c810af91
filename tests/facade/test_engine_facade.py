"""Every class of the facade under the engine of PyTorch: compiled, exported, checkpointed, copied, in narrow numbers."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import vqkit.compat.vector_quantize_pytorch as facade

DIM, CODES = 8, 12
LEARNED = {"learnable_codebook": True, "ema_update": False}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "averages": ("VectorQuantize", {}),
    "cosine": ("VectorQuantize", {"use_cosine_sim": True, "codebook_dim": 4}),
    "heads": ("VectorQuantize", {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True}),
    "learnable": ("VectorQuantize", {**LEARNED, "orthogonal_reg_weight": 0.1, "codebook_diversity_loss_weight": 0.1}),
    "affine": ("VectorQuantize", {"affine_param": True, "commitment_use_cross_entropy_loss": True}),
    "expiry": ("VectorQuantize", {"threshold_ema_dead_code": 2}),
    "residual": ("ResidualVQ", {"num_quantizers": 3}),
    "residual, shared": ("ResidualVQ", {"num_quantizers": 3, "shared_codebook": True, "codebook_dim": 4}),
    "residual, beam": ("ResidualVQ", {"num_quantizers": 2, "beam_size": 2}),
    "groups": ("GroupedResidualVQ", {"num_quantizers": 2, "groups": 2}),
    "FSQ": ("FSQ", {"levels": [8, 5, 5], "dim": DIM}),
    "ResidualFSQ": ("ResidualFSQ", {"levels": [5, 5], "num_quantizers": 2}),
    "LFQ": ("LFQ", {"codebook_size": 16, "entropy_loss_weight": 0.1}),
    "ResidualLFQ": ("ResidualLFQ", {"codebook_size": 16, "num_quantizers": 2}),
    "SimVQ": ("SimVQ", {}),
    "ResidualSimVQ": ("ResidualSimVQ", {"num_quantizers": 2}),
    "LatentQuantize": ("LatentQuantize", {"levels": [5, 4]}),
    "FSP": ("FSP", {"levels": [8, 5, 5], "dim": DIM}),
    "random projections": ("RandomProjectionQuantizer", {"codebook_dim": 4, "num_codebooks": 2}),
    "hierarchical": ("HierarchicalVQ", {"scales": (1, 2, 4), "accept_image_fmap": True}),
}
COUNTED = ("VectorQuantize", "ResidualVQ", "GroupedResidualVQ", "SimVQ", "ResidualSimVQ", "RandomProjectionQuantizer", "HierarchicalVQ")


def make(name: str, **more: Any) -> nn.Module:
    kind, kwargs = CASES[name]
    kwargs = {**kwargs, **more}
    sizes = {"codebook_size": CODES} if kind in COUNTED else {}
    sizes = sizes if "dim" in kwargs else {"dim": DIM, **sizes}
    torch.manual_seed(0)
    return getattr(facade, kind)(**sizes, **kwargs)


def vectors(name: str, seed: int = 0) -> Tensor:
    x = torch.randn(2, 16, DIM, generator=torch.Generator().manual_seed(seed))
    if CASES[name][0] == "HierarchicalVQ":
        return x.transpose(1, 2).reshape(2, DIM, 4, 4).contiguous()
    return x.transpose(1, 2).contiguous() if CASES[name][0] == "LatentQuantize" else x


def leaves(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else ()
    return [leaf for part in parts for leaf in leaves(part)]


def step(module: nn.Module, x: Tensor, call: Callable[..., Any] | None = None) -> tuple[list[Tensor], Tensor | None]:
    """What a call returns, and the gradient of the input."""
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    found = leaves((module if call is None else call)(x))
    total = sum(leaf.float().sin().sum() for leaf in found if leaf.requires_grad)
    if isinstance(total, Tensor):
        total.backward()
    return [leaf.detach() for leaf in found], x.grad


def assert_same_state(one: nn.Module, other: nn.Module, **tolerance: float) -> None:
    there, here = one.state_dict(), other.state_dict()
    assert there.keys() == here.keys()
    for key, value in there.items():
        torch.testing.assert_close(here[key], value, **tolerance, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", CASES)
def test_training_and_evaluation_compile_to_one_graph(name: str) -> None:
    torch._dynamo.reset()
    eager, traced = make(name), make(name)
    step(eager, vectors(name, 2))  # where there is a start by k-means, it is an eager one
    traced.load_state_dict(eager.state_dict())
    for training in (True, False):
        compiled = torch.compile(traced.train(training), fullgraph=True, backend="aot_eager")
        for seed in range(2):
            x = vectors(name, seed)
            torch.testing.assert_close(step(traced, x, compiled), step(eager.train(training), x), rtol=1e-5, atol=1e-5)
    assert_same_state(eager, traced, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # of torch, where the graph breaks, as it does for a start
@pytest.mark.parametrize("name", ["averages", "expiry", "residual", "hierarchical"])
def test_the_first_call_may_be_a_compiled_one_that_starts_by_k_means(name: str) -> None:
    torch._dynamo.reset()
    eager, x = make(name, kmeans_init=True), vectors(name)
    traced = copy.deepcopy(eager)
    compiled = torch.compile(traced, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(step(traced, x, compiled), step(eager, x), rtol=1e-5, atol=1e-5)
    assert_same_state(eager, traced, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", [name for name in CASES if name != "FSP"])  # whose extras have gradients of their own
def test_a_recomputation_changes_nothing(name: str, reentrant: bool) -> None:
    plain, again = make(name), make(name)
    again.load_state_dict(plain.state_dict())
    for seed in range(2):
        x = vectors(name, seed)
        expected = step(plain, x)
        torch.testing.assert_close(step(again, x, lambda y: checkpoint(again, y, use_reentrant=reentrant)), expected)
    assert_same_state(plain, again)


@pytest.mark.parametrize("name", CASES)
def test_copies_and_state_dicts_are_whole(name: str) -> None:
    module = make(name)
    step(module, vectors(name))
    twin, loaded = copy.deepcopy(module), make(name)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    x = vectors(name, 1)
    expected = step(module, x)
    for other in (twin, loaded):
        torch.testing.assert_close(step(other, x), expected, rtol=1e-5, atol=1e-6)
        assert_same_state(module, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_narrow_modules_give_narrow_vectors_and_keep_wide_codebooks(name: str, dtype: torch.dtype) -> None:
    module = make(name).to(dtype)
    found, gradient = step(module, vectors(name).to(dtype))
    if found[0].is_floating_point():
        assert found[0].dtype == dtype and (gradient is None or gradient.dtype == dtype)
    assert all(leaf.isfinite().all() for leaf in found)
    for key, value in module.state_dict().items():
        if key.endswith(("embed_avg", "cluster_size", "_codebook.embed")):
            assert value.dtype == torch.float32, key


@pytest.mark.parametrize("name", ["averages", "learnable", "affine", "expiry", "residual", "residual, beam", "groups", "SimVQ"])
def test_autocast_chooses_the_same_codes(name: str) -> None:
    plain, cast = make(name), make(name)
    cast.load_state_dict(plain.state_dict())
    expected = plain(vectors(name))
    with torch.autocast("cpu", torch.bfloat16):
        found = cast(vectors(name))
    for one, other in zip(leaves(found), leaves(expected), strict=True):
        if not one.is_floating_point():
            assert torch.equal(one, other)


@pytest.mark.parametrize("name", CASES)
def test_evaluation_exports(name: str) -> None:
    module, x = make(name), vectors(name)
    step(module, x)
    module.eval()
    program = torch.export.export(module, (x,))
    torch.testing.assert_close(leaves(program.module()(x)), leaves(module(x)))


@pytest.mark.filterwarnings("ignore")  # of torch, which calls it deprecated
@pytest.mark.parametrize("name", [name for name in CASES if name != "FSP"])  # whose extras no traced program can return
def test_evaluation_is_traced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VQKIT_COMPILED", "1")  # where it leaves torch, a tracer sees nothing
    module = make(name)
    step(module, vectors(name))
    program = torch.jit.trace(module.eval(), vectors(name), check_trace=False, strict=False)
    torch.testing.assert_close(leaves(program(vectors(name, 1))), leaves(module(vectors(name, 1))))
