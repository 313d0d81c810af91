"""Generation: sampling rules, the constant-memory decoding engine, and `load`. Names load lazily."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqkit.generate.engine import Generation as Generation
    from vqkit.generate.engine import Step as Step
    from vqkit.generate.engine import TokenLogprobs as TokenLogprobs
    from vqkit.generate.engine import generate as generate
    from vqkit.generate.engine import prefill as prefill
    from vqkit.generate.sampling import SamplingRules as SamplingRules
    from vqkit.generate.sampling import next_token as next_token
    from vqkit.generate.session import LoadedModel as LoadedModel
    from vqkit.generate.session import load as load
    from vqkit.generate.states import GenerationState as GenerationState
    from vqkit.generate.states import load_state as load_state
    from vqkit.generate.states import row_seeds as row_seeds
    from vqkit.generate.states import save_state as save_state

__all__ = [
    "Generation",
    "GenerationState",
    "LoadedModel",
    "SamplingRules",
    "Step",
    "TokenLogprobs",
    "generate",
    "load",
    "load_state",
    "next_token",
    "prefill",
    "row_seeds",
    "save_state",
]

_MODULES = {
    "GenerationState": "states",
    "load_state": "states",
    "row_seeds": "states",
    "save_state": "states",
    "Generation": "engine",
    "Step": "engine",
    "TokenLogprobs": "engine",
    "generate": "engine",
    "prefill": "engine",
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
