"""Quantizers: modules that own a codebook, call the ops, and hand out statistics instead of changing while they are used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqkit.quantizers.config import CodebookConfig as CodebookConfig
    from vqkit.quantizers.fixed import SimpleVQ as SimpleVQ
    from vqkit.quantizers.learnable import LearnableVQ as LearnableVQ
    from vqkit.quantizers.learnable import Quantized as Quantized
    from vqkit.quantizers.learnable import add_statistics_ as add_statistics_
    from vqkit.quantizers.learnable import update_codebooks_ as update_codebooks_

__all__ = ["CodebookConfig", "LearnableVQ", "Quantized", "SimpleVQ", "add_statistics_", "update_codebooks_"]

_HOME = {
    "CodebookConfig": "config",
    "LearnableVQ": "learnable",
    "Quantized": "learnable",
    "SimpleVQ": "fixed",
    "add_statistics_": "learnable",
    "update_codebooks_": "learnable",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
