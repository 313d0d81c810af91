"""What `bench_facade.py` times: every row of the covering arrays in tests/facade, as the tests call it and at sizes of real use.

The rows are those that the tests compare: their test functions are run with a comparison that only notes what it is given. A row at real
sizes is the same with wider vectors, more codes and the batch repeated up to about a thousand vectors.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

HANDED_ON: dict[str, tuple[str, ...]] = importlib.import_module("facade.test_options").HANDED_ON
"""Whose arguments a class hands on."""

WIDTH, CODES, LAYERS, VECTORS = 64, 512, 4, 1024
SIZES = ("tests", "real", "large")
TESTS: dict[str, tuple[str, str]] = {
    "VectorQuantize": ("test_vector_quantize_facade", "test_every_pair_of_options_is_the_peers"),
    "ResidualVQ": ("test_residual_vq", "test_pairs_of_options"),
    "GroupedResidualVQ": ("test_residual_vq", "test_pairs_of_options_in_groups"),
    "FSQ": ("test_finite_scalar_quantization", "test_every_pair_of_options_of_fsq"),
    "ResidualFSQ": ("test_finite_scalar_quantization", "test_every_pair_of_options_of_the_residual_form"),
    "GroupedResidualFSQ": ("test_finite_scalar_quantization", "test_every_pair_of_options_of_the_grouped_form"),
    "LFQ": ("test_lookup_free_quantization", "test_every_pair_of_options_of_lfq"),
    "ResidualLFQ": ("test_lookup_free_quantization", "test_every_pair_of_options_of_the_residual_form"),
    "GroupedResidualLFQ": ("test_lookup_free_quantization", "test_every_pair_of_options_of_the_grouped_form"),
    "SimVQ": ("test_sim_vq", "test_every_pair_of_options_of_sim_vq"),
    "ResidualSimVQ": ("test_sim_vq", "test_every_pair_of_options_of_the_residual_form"),
    "LatentQuantize": ("test_latent_quantization", "test_every_pair_of_options"),
    "RandomProjectionQuantizer": ("test_random_projection_quantizer", "test_every_pair_of_options"),
    "FSP": ("test_finite_scalar_perturbation", "test_a_pair_of_options_is_the_peers"),
    "BinaryMapper": ("test_binary_mapper_facade", "test_a_pair_of_options_is_the_peers"),
    "EvoLFQ": ("test_evo_lookup_free_quantization", "test_a_pair_of_options_is_the_peers"),
    "HierarchicalVQ": ("test_hierarchical_vq", "test_a_pair_of_options_is_the_peers"),
}
"""The test of each class that compares its covering array."""
NAMED: dict[str, dict[str, dict[str, Any]]] = {
    "VectorQuantize": {
        "defaults": {},
        "cosine": {"use_cosine_sim": True},
        "codebook_dim": {"codebook_dim": 16},
        "heads": {"heads": 4, "codebook_dim": 16},
        "separate heads": {"heads": 4, "codebook_dim": 16, "separate_codebook_per_head": True},
        "straight through": {"rotation_trick": False},
        "learnable": {"learnable_codebook": True, "ema_update": False},
        "expiry": {"threshold_ema_dead_code": 2},
        "drawn": {"stochastic_sample_codes": True},
        "cross-entropy": {"commitment_use_cross_entropy_loss": True},
        "diversity": {"codebook_diversity_loss_weight": 0.1, "codebook_diversity_temperature": 1.0},
        "affine": {"affine_param": True},
        "directional": {"directional_reparam": True, "threshold_ema_dead_code": 2},
    },
    "ResidualVQ": {"defaults": {"num_quantizers": 8}, "beam": {"num_quantizers": 8, "beam_size": 4}},
    "FSQ": {"defaults": {"levels": [8, 5, 5, 5]}},
    "FSP": {"defaults": {"levels": [8, 5, 5, 5]}},
    "LFQ": {"defaults": {"codebook_size": 1024}},
    "ResidualFSQ": {"defaults": {"levels": [8, 5, 5, 3], "num_quantizers": LAYERS}},
    "GroupedResidualFSQ": {"defaults": {"levels": [8, 5, 5, 3], "num_quantizers": LAYERS, "groups": 2}},
    "ResidualLFQ": {"defaults": {"codebook_size": 256, "num_quantizers": LAYERS}},
    "GroupedResidualLFQ": {"defaults": {"codebook_size": 256, "num_quantizers": LAYERS, "groups": 2}},
    "SimVQ": {"defaults": {}},
    "ResidualSimVQ": {"defaults": {"num_quantizers": LAYERS}},
}
"""Settings that people use, beside the arrays, for vectors of `WIDTH`."""
LARGE: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "VectorQuantize": [
        (1_024, {"dim": 64, "codebook_size": 1_024}),
        (16_384, {"dim": 64, "codebook_size": 1_024}),
        (65_536, {"dim": 64, "codebook_size": 1_024}),
        (16_384, {"dim": 64, "codebook_size": 8_192}),
        (16_384, {"dim": 256, "codebook_size": 1_024}),
        (16_384, {"dim": 64, "codebook_size": 1_024, "codebook_dim": 64, "heads": 4, "separate_codebook_per_head": True}),
    ],
    "ResidualVQ": [
        (16_384, {"dim": 128, "codebook_size": 1_024, "num_quantizers": 8}),
        (4_096, {"dim": 64, "codebook_size": 1_024, "num_quantizers": 4, "beam_size": 4}),
    ],
    "GroupedResidualVQ": [(16_384, {"dim": 256, "codebook_size": 1_024, "num_quantizers": 4, "groups": 2})],
}
"""Problems of bench_quantizers.py: the number of vectors, and how the class is made."""
_HAVE_CODES = ("VectorQuantize", "ResidualVQ", "SimVQ", "ResidualSimVQ")


@dataclass(frozen=True)
class Case:
    """A class, how it is made, what it is called with in training and in eval mode, and the size it has: one of `SIZES`."""

    kind: str
    name: str
    size: str
    kwargs: dict[str, Any]
    x: Tensor
    calls: dict[str, Any]
    eval_calls: dict[str, Any]


def cases(kind: str, sizes: tuple[str, ...] = SIZES) -> Iterator[Case]:
    """All of a class: the named settings, then the rows of its covering array at each of `sizes`."""
    if "real" in sizes:
        for name, options in NAMED.get(kind, {}).items():
            codes = {"codebook_size": CODES} if kind in _HAVE_CODES else {}
            yield Case(kind, name, "real", {"dim": WIDTH, **codes, **options}, torch.randn(8, 128, WIDTH), {}, {})
    for vectors, kwargs in LARGE.get(kind, []) if "large" in sizes else []:
        told = ", ".join(f"{name} {value}" for name, value in {"vectors": vectors, **kwargs}.items())
        yield Case(kind, told, "large", kwargs, torch.randn(1, vectors, kwargs["dim"]), {}, {})
    for case in recorded(kind) if {"tests", "real"} & {*sizes} else []:
        if "tests" in sizes:
            yield case
        if "real" in sizes and case.x.numel():
            yield enlarged(case)


def recorded(kind: str) -> list[Case]:
    """What the test of the class gives to its comparison."""
    module, test = TESTS[kind]
    return _recorded(importlib.import_module(f"facade.{module}"), test)


def _recorded(module: ModuleType, test: str) -> list[Case]:
    found: list[Case] = []

    def single(value: Any) -> Any:
        """In float32: some rows are compared in float64."""
        return value.to(torch.float32) if isinstance(value, Tensor) and value.is_floating_point() else value

    class Noted:
        def check(self) -> None: ...

    def note(kind: str, kwargs: dict[str, Any], x: Any, *, calls: Any = None, eval_calls: Any = None, **_: Any) -> Noted:
        calls = {name: single(value) for name, value in (calls or {}).items()}
        eval_calls = calls if eval_calls is None else {name: single(value) for name, value in eval_calls.items()}
        x = single(x(0) if callable(x) else x)
        found.append(Case(kind, f"row {len(found)}", "tests", dict(kwargs), x.detach(), calls, eval_calls))
        return Noted()

    compare, function = vars(module)["compare"], getattr(module, test)
    vars(module)["compare"] = note
    try:
        for values in _parameters(function):
            with pytest.MonkeyPatch.context() as patch:
                given = {"monkeypatch": patch, **values}
                function(**{name: given.get(name) for name in inspect.signature(function).parameters})
    finally:
        vars(module)["compare"] = compare
    return found


def _parameters(function: Callable[..., Any]) -> list[dict[str, Any]]:
    """What a test is parametrized with, by one mark or none."""
    marks = [mark for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
    if not marks:
        return [{}]
    (mark,) = marks
    return [{mark.args[0]: value} for value in mark.args[1]]


def enlarged(case: Case) -> Case:
    """The same at sizes of real use: wider, with more codes and more vectors."""
    if case.kind in ("ResidualVQ", "GroupedResidualVQ") and case.x.ndim > 2 and not _is_sequence(case):
        return _enlarged_image(case)
    kwargs, widths = _enlarged_arguments(case.kind, copy.deepcopy(case.kwargs))
    x, repeats = case.x, _repeats(case.x, widths)
    if widths is not None and widths[0] != widths[1]:
        axis = 1 if x.ndim > 2 and x.shape[1] == widths[0] and _is_first(case, x) else -1
        x = torch.randn(
            *(widths[1] if i == axis % x.ndim else n for i, n in enumerate(x.shape)), generator=torch.Generator().manual_seed(0)
        )
    batch = len(x)
    calls, eval_calls = (
        {name: _repeated(name, value, batch, repeats) for name, value in given.items()} for given in (case.calls, case.eval_calls)
    )
    for given in (calls, eval_calls):
        if "codebook_transform_fn" in given:
            parts = 1 if kwargs["separate_codebook_per_head"] else kwargs["heads"]
            positions = x.numel() // (batch * WIDTH)
            given["codebook_transform_fn"] = _moved(batch * repeats * parts, positions, kwargs["codebook_dim"] or WIDTH)
    return Case(case.kind, case.name, "real", kwargs, _repeated("x", x, batch, repeats), calls, eval_calls)


def _is_sequence(case: Case) -> bool:
    """Whether an input of residual quantizers is [batch, positions, width]."""
    return case.x.ndim == 3 and case.kwargs["channel_last"]


def _enlarged_image(case: Case) -> Case:
    """Of images, volumes and sequences with the width first each side is the width of a group there, or it raises."""
    kwargs, _ = _with_codes(case.kind, copy.deepcopy(case.kwargs))
    width, side = case.kwargs["dim"], 10 if case.x.ndim == 5 else 32
    wide = side * case.kwargs.get("groups", 1)
    x = torch.randn(32 if case.x.ndim == 3 else 1, *(wide if n == width else side for n in case.x.shape[1:]))
    calls, eval_calls = (
        {name: torch.rand(len(x), side) > 0.3 if name == "mask" else value for name, value in given.items()}
        for given in (case.calls, case.eval_calls)
    )
    return Case(case.kind, case.name, "real", {**kwargs, "dim": wide}, x, calls, eval_calls)


def _moved(batch: int, positions: int, width: int) -> Callable[[Tensor], Tensor]:
    """Codes of their own for every vector, as in the tests."""
    offset = torch.randn(batch, positions, 1, width)
    return lambda codes: codes[:, None, None] * 1.1 + 0.3 * offset


def _is_first(case: Case, x: Tensor) -> bool:
    """Whether the width of x is its axis 1."""
    options = case.kwargs
    first = any(options.get(name) for name in ("channel_first", "is_channel_first", "accept_image_fmap", "accept_3d_fmap"))
    if "channel_last" in options:
        first = first or not options["channel_last"]
    return bool(first) or x.ndim > 3 or x.shape[-1] != x.shape[1]


def _repeats(x: Tensor, widths: tuple[int, int] | None) -> int:
    vectors = x.numel() // (widths[0] if widths else x.shape[-1])
    return max(VECTORS // max(vectors, 1), 1)


def _repeated(name: str, value: Any, batch: int, repeats: int) -> Any:
    if name == "ema_update_weight" and isinstance(value, Tensor):
        return torch.linspace(0.1, 1.0, CODES).expand(*value.shape[:-1], -1)
    if isinstance(value, Tensor) and value.ndim and len(value) == batch:
        axis = 1 if batch == 1 and value.ndim > 1 else 0  # one sequence becomes a longer one
        return value.repeat(*(repeats if i == axis else 1 for i in range(value.ndim)))
    return value


def _enlarged_arguments(kind: str, kwargs: dict[str, Any]) -> tuple[dict[str, Any], tuple[int, int] | None]:
    """Arguments, and the width of the input before and after (None: it stays)."""
    if kind in (
        "VectorQuantize",
        "SimVQ",
        "ResidualSimVQ",
        "HierarchicalVQ",
        "ResidualVQ",
        "GroupedResidualVQ",
        "RandomProjectionQuantizer",
    ):
        return _with_codes(kind, kwargs)
    if kind in ("LFQ", "ResidualLFQ", "GroupedResidualLFQ"):
        return _lookup_free(kind, kwargs)
    if kind == "BinaryMapper":
        return {**kwargs, "bits": 2 * kwargs["bits"]}, (kwargs["bits"], 2 * kwargs["bits"])
    if kind == "EvoLFQ" or kwargs.get("dim") != 7:  # 7 is the width that is projected, in the arrays of the scalar quantizers
        return kwargs, None
    return {**kwargs, "dim": WIDTH}, (7, WIDTH)


def _with_codes(kind: str, kwargs: dict[str, Any]) -> tuple[dict[str, Any], tuple[int, int]]:
    width = kwargs["dim"]
    sizes: dict[str, Any] = {"dim": WIDTH, "codebook_size": CODES}
    if isinstance(kwargs["codebook_size"], tuple):
        sizes["codebook_size"] = (CODES, CODES // 2, CODES // 4)
    if kwargs.get("codebook_dim"):
        sizes["codebook_dim"] = WIDTH if kwargs["codebook_dim"] == width else 16
    if kwargs.get("implicit_neural_codebook"):
        sizes["codebook_size"] = (16, 8, 8) if isinstance(sizes["codebook_size"], tuple) else 16
    if kwargs.get("frozen_codebook_dim"):
        sizes["frozen_codebook_dim"] = 16
    if kwargs.get("codebook_transform") is not None:
        inner = sizes.get("frozen_codebook_dim", WIDTH)
        sizes["codebook_transform"] = nn.Sequential(nn.Linear(inner, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    return {**kwargs, **sizes}, (width, WIDTH)


def _lookup_free(kind: str, kwargs: dict[str, Any]) -> tuple[dict[str, Any], tuple[int, int]]:
    parts = kwargs.get("num_codebooks", 1) if kind == "LFQ" else kwargs.get("groups", 1)
    bits = 10 if kind == "LFQ" else 8
    old = kwargs.get("dim") or 4 * parts
    if kwargs.get("codebook_size") is None:
        return kwargs, (old, old)
    new = bits * parts if old == 4 * parts else WIDTH
    return {**kwargs, "codebook_size": 2**bits, **({"dim": new} if kwargs.get("dim") else {})}, (old, new)
