"""Transformer-VQ: its layers, its configuration, its weight files and its cost."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqkit.models.attention import AttentionUnit as AttentionUnit
    from vqkit.models.config import ModelConfig as ModelConfig
    from vqkit.models.transformer import ModelOutput as ModelOutput
    from vqkit.models.transformer import ModelState as ModelState
    from vqkit.models.transformer import TransformerVQ as TransformerVQ
    from vqkit.models.weights import find_weights as find_weights
    from vqkit.models.weights import load_weights as load_weights
    from vqkit.models.weights import save_weights as save_weights

_MODULES = {
    "AttentionUnit": "vqkit.models.attention",
    "ModelConfig": "vqkit.models.config",
    "ModelOutput": "vqkit.models.transformer",
    "ModelState": "vqkit.models.transformer",
    "TransformerVQ": "vqkit.models.transformer",
    "find_weights": "vqkit.models.weights",
    "load_weights": "vqkit.models.weights",
    "save_weights": "vqkit.models.weights",
}

__all__ = [
    "AttentionUnit",
    "ModelConfig",
    "ModelOutput",
    "ModelState",
    "TransformerVQ",
    "find_weights",
    "load_weights",
    "save_weights",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
