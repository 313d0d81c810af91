"""The facade has every public name of the installed peer: modules, classes, methods, functions, with their signatures and attributes."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from facade.peer import FACADE, PEER, facade, facade_module, peer, peer_modules

NOT_YET: tuple[str, ...] = ()
"""Modules that are still to come."""

OWN: tuple[str, ...] = ("exists", "default", "noop", "identity", "maybe", "first", "unique", "pack_one", "unpack_one", "pack_with_inverse")
"""Functions that are no part of what the peer offers: what its own code is written with."""

ADDED: dict[str, tuple[str, ...]] = {"vector_quantize_pytorch.VectorQuantize.__init__": ("reinmax",)}
"""Arguments that older releases had, behind those of the installed one."""

SMALL: dict[str, dict[str, Any]] = {
    "VectorQuantize": {"dim": 8, "codebook_size": 16},
    "ResidualVQ": {"dim": 8, "num_quantizers": 2, "codebook_size": 16},
    "GroupedResidualVQ": {"dim": 8, "groups": 2, "num_quantizers": 2, "codebook_size": 16},
    "RandomProjectionQuantizer": {"dim": 8, "codebook_size": 16, "codebook_dim": 4, "num_codebooks": 2},
    "FSQ": {"levels": [5, 3]},
    "FSP": {"levels": [5, 3]},
    "LFQ": {"codebook_size": 16, "dim": 8},
    "EvoLFQ": {"encoder": nn.Linear(8, 4), "decoder": nn.Linear(4, 8), "dim": 4},
    "ResidualLFQ": {"dim": 8, "num_quantizers": 2, "codebook_size": 16},
    "GroupedResidualLFQ": {"dim": 8, "groups": 2, "num_quantizers": 2, "codebook_size": 16},
    "ResidualFSQ": {"dim": 8, "num_quantizers": 2, "levels": [5, 3]},
    "GroupedResidualFSQ": {"dim": 8, "groups": 2, "num_quantizers": 2, "levels": [5, 3]},
    "LatentQuantize": {"levels": [5, 3], "dim": 8},
    "SimVQ": {"dim": 8, "codebook_size": 16},
    "ResidualSimVQ": {"dim": 8, "num_quantizers": 2, "codebook_size": 16},
    "BinaryMapper": {"bits": 3},
    "HierarchicalVQ": {"dim": 8, "codebook_size": 16, "scales": (1, 2)},
}
"""Arguments with which every class of the peer's `__init__` can be made."""


def public(module: ModuleType, kind: Any) -> list[str]:
    return [n for n, v in vars(module).items() if kind(v) and v.__module__ == module.__name__ and not n.startswith("_")]


MODULES = peer_modules()
THERE = [name for name in MODULES if name not in NOT_YET]
CLASSES = [f"{name}.{cls}" for name in THERE for cls in public(MODULES[name], inspect.isclass)]


def find(name: str) -> tuple[Any, Any]:
    """The class "MODULE.NAME" of the peer and of the facade."""
    module, _, cls = name.partition(".")
    return getattr(MODULES[module], cls), getattr(facade_module(module), cls)


def shape(function: Any) -> list[tuple[str, Any, str]]:
    """Names, kinds and defaults of the parameters; a function that is a default counts by its name."""
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, getattr(p.default, "__name__", repr(p.default))) for p in parameters]


def methods(cls: type) -> Iterator[tuple[str, Any]]:
    for name, value in vars(cls).items():
        if name in ("__init__", "forward") or not name.startswith("_"):
            yield name, value


def check_signature(name: str, there: Any, here: Any) -> None:
    expected, found = shape(there), shape(here)
    added = ADDED.get(name, ())
    assert [p for p in found if p[0] not in added] == expected, name
    assert {p[0] for p in found} - {p[0] for p in expected} == set(added), name
    assert all(p[1] is inspect.Parameter.KEYWORD_ONLY for p in found if p[0] in added), name


def test_what_is_still_to_come_is_not_there() -> None:
    """So that the list shrinks with the work, and what it names is the peer's."""
    assert set(NOT_YET) <= set(MODULES)
    package = importlib.import_module("vqkit.compat").__path__[0]
    there = {path.stem for path in Path(package, "vector_quantize_pytorch").glob("*.py")}
    assert not there & set(NOT_YET)


@pytest.mark.parametrize("name", CLASSES)
def test_signatures_are_the_peers(name: str) -> None:
    there, here = find(name)
    assert issubclass(here, nn.Module) == issubclass(there, nn.Module)
    assert issubclass(here, tuple) == issubclass(there, tuple)
    if issubclass(there, tuple):
        assert here._fields == there._fields
        assert here.__name__ == there.__name__
        return
    for method, value in methods(there):
        mine = inspect.getattr_static(here, method, None)
        assert mine is not None, f"{name}.{method}"
        if isinstance(value, property):
            assert isinstance(mine, property), f"{name}.{method}"
            assert (mine.fset is None) == (value.fset is None), f"{name}.{method} and its setter"
        elif callable(value) or isinstance(value, (classmethod, staticmethod)):
            assert isinstance(mine, (classmethod, staticmethod)) == isinstance(value, (classmethod, staticmethod)), f"{name}.{method}"
            check_signature(f"{name}.{method}", getattr(there, method), getattr(here, method))


@pytest.mark.parametrize("name", [name for name in CLASSES if name.split(".")[1] in SMALL])
def test_attributes_are_the_peers(name: str) -> None:
    """Every public attribute of an object, with its value where that is a plain one and its kind where it is a tensor."""
    there, here = (kind(**SMALL[name.split(".")[1]]) for kind in find(name))
    for attribute in sorted({*vars(there), *there._buffers, *there._parameters, *there._modules} - {*vars(nn.Module())}):
        if attribute.startswith("_") and attribute != "_codebook":
            continue
        assert hasattr(here, attribute), f"{name}.{attribute}"
        value, mine = getattr(there, attribute), getattr(here, attribute)
        if value is None or isinstance(value, (bool, int, float, str, tuple)):
            assert mine == value, f"{name}.{attribute}"
        elif isinstance(value, torch.Tensor):
            assert isinstance(mine, torch.Tensor) and mine.shape == value.shape and mine.dtype == value.dtype, f"{name}.{attribute}"
        elif isinstance(value, nn.ModuleList):
            assert len(mine) == len(value), f"{name}.{attribute}"


MADE = {
    **{name: (name, arguments) for name, arguments in SMALL.items()},
    **{
        f"{name}, k-means": (name, {**SMALL[name], "kmeans_init": True, "codebook_dim": 4})
        for name in ("VectorQuantize", "ResidualVQ", "GroupedResidualVQ")
    },
    "VectorQuantize, k-means, cosine": ("VectorQuantize", {**SMALL["VectorQuantize"], "kmeans_init": True, "use_cosine_sim": True}),
    "HierarchicalVQ, of several": ("HierarchicalVQ", {**SMALL["HierarchicalVQ"], "shared_codebook": False, "share_quant_resi": 2}),
    "VectorQuantize, affine": ("VectorQuantize", {**SMALL["VectorQuantize"], "affine_param": True}),
    "ResidualVQ, networks": ("ResidualVQ", {**SMALL["ResidualVQ"], "implicit_neural_codebook": True}),
    "ResidualVQ, shared": ("ResidualVQ", {**SMALL["ResidualVQ"], "shared_codebook": True, "codebook_dim": 4}),
    "FSQ, rotated": ("FSQ", {"levels": [3, 3], "dim": 8, "orthogonal_rotation": True}),
    "LFQ, rotated": ("LFQ", {**SMALL["LFQ"], "orthogonal_rotation": True, "spherical": True}),
    "HierarchicalVQ, uniform": ("HierarchicalVQ", {**SMALL["HierarchicalVQ"], "kmeans_init": False, "quant_resi": 0.0}),
}


LISTED = ("codebook", "implicit_codebook")
"""Buffers of the peer that a state dict does not hold: here they are listed when they are read."""


@pytest.mark.parametrize("case", MADE)
def test_what_walks_over_a_module_finds_what_it_finds_there(case: str) -> None:
    """Parameters, buffers and modules by their names, in their order."""
    name, arguments = MADE[case]
    pair = [getattr(package, name)(**arguments) for package in (peer, facade)]
    for of in ("named_parameters", "named_buffers"):
        there, here = ([(key, value.shape, value.dtype, type(value)) for key, value in getattr(module, of)()] for module in pair)
        assert here == [entry for entry in there if entry[0].rpartition(".")[2] not in LISTED]
    assert [key for key, _ in pair[1].named_modules()] == [key for key, _ in pair[0].named_modules()]
    assert [*pair[1].state_dict()] == [*pair[0].state_dict()]


@pytest.mark.parametrize("case", MADE)
def test_what_walks_over_a_module_finds_what_it_finds_there_after_it_was_moved(case: str) -> None:
    """A state is taken as it is, where a module waits for it on no device."""
    name, arguments = MADE[case]
    source, module = (getattr(package, name)(**copy.deepcopy(arguments)) for package in (peer, facade))
    module.to("meta").load_state_dict(source.state_dict(), assign=True)
    assert not any(value.is_meta for value in module.state_dict().values())


@pytest.mark.parametrize("case", MADE)
def test_what_is_made_next_is_drawn_as_there(case: str) -> None:
    name, arguments = MADE[case]
    made, drawn = [], []
    for package in (peer, facade):
        torch.manual_seed(0)
        made.append(getattr(package, name)(**arguments).state_dict())
        drawn.append(torch.rand(4))
    assert torch.equal(*drawn)
    if name == "HierarchicalVQ":
        for key, value in made[0].items():
            assert torch.equal(value, made[1][key]) or key.endswith(("cluster_size", "embed_avg")), key


@pytest.mark.parametrize("module", THERE)
def test_functions_are_the_peers(module: str) -> None:
    there, here = MODULES[module], facade_module(module)
    for name in public(there, inspect.isfunction):
        if name not in OWN:
            check_signature(f"{module}.{name}", getattr(there, name), getattr(here, name))


def test_the_package_has_what_the_peers_has() -> None:
    """The names that can be imported from the package itself."""
    assert {*SMALL, "Sequential"} == {name for name, value in vars(peer).items() if inspect.isclass(value)}
    for name in {*SMALL, "Sequential"}:
        module = getattr(peer, name).__module__.removeprefix(f"{PEER}.")
        if module in THERE:
            assert getattr(importlib.import_module(FACADE), name) is getattr(facade_module(module), name)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_the_small_ones_can_be_made(name: str) -> None:
    assert isinstance(getattr(peer, name)(**SMALL[name]), nn.Module)


def test_another_signature_is_found() -> None:
    def there(x: Any, scale: float = 1.0, *, mask: Any = None) -> None: ...
    def other_name(x: Any, factor: float = 1.0, *, mask: Any = None) -> None: ...
    def other_order(scale: float = 1.0, x: Any = None, *, mask: Any = None) -> None: ...
    def other_default(x: Any, scale: float = 2.0, *, mask: Any = None) -> None: ...
    def other_kind(x: Any, scale: float = 1.0, mask: Any = None) -> None: ...
    def one_more(x: Any, scale: float = 1.0, *, mask: Any = None, more: int = 0) -> None: ...

    check_signature("", there, there)
    for here in (other_name, other_order, other_default, other_kind, one_more):
        with pytest.raises(AssertionError):
            check_signature("", there, here)
