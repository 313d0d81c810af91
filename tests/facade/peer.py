"""The installed peer and its facade, side by side."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any

import pytest

peer: ModuleType = pytest.importorskip("vector_quantize_pytorch", reason="the peer, vector-quantize-pytorch, is not installed")
PEER = "vector_quantize_pytorch"
FACADE = "vqkit.compat.vector_quantize_pytorch"


def __getattr__(name: str) -> Any:
    """`facade`, imported when it is asked for."""
    if name == "facade":
        return importlib.import_module(FACADE)
    raise AttributeError(name)


def peer_modules() -> dict[str, ModuleType]:
    """The peer's modules by their own names, in order."""
    return {found.name: importlib.import_module(f"{PEER}.{found.name}") for found in pkgutil.iter_modules(peer.__path__)}


def facade_module(name: str) -> ModuleType:
    """The module of the facade for the peer's module of that name."""
    return importlib.import_module(f"{FACADE}.{name}")
