"""Generation: sampling rules, the constant-memory decoding engine, and `load`. Names load lazily."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqkit.generate.engine import Step as Step
    from vqkit.generate.engine import generate as generate
    from vqkit.generate.sampling import SamplingRules as SamplingRules
    from vqkit.generate.sampling import next_token as next_token
    from vqkit.generate.session import LoadedModel as LoadedModel
    from vqkit.generate.session import load as load

__all__ = ["LoadedModel", "SamplingRules", "Step", "generate", "load", "next_token"]

_MODULES = {
    "Step": "engine",
    "generate": "engine",
    "SamplingRules": "sampling",
    "next_token": "sampling",
    "LoadedModel": "session",
    "load": "session",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'vqkit.generate' has no attribute {name!r}")
    return getattr(import_module(f"vqkit.generate.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
