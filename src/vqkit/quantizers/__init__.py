"""Quantizers: modules that own a codebook, call the ops, and hand out statistics instead of changing while they are used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqkit.quantizers.base import Quantized as Quantized
    from vqkit.quantizers.base import Quantizer as Quantizer
    from vqkit.quantizers.base import QuantizerOutput as QuantizerOutput
    from vqkit.quantizers.codebook import Codebook as Codebook
    from vqkit.quantizers.commit import add_statistics_ as add_statistics_
    from vqkit.quantizers.commit import attach as attach
    from vqkit.quantizers.commit import register_fsdp_methods as register_fsdp_methods
    from vqkit.quantizers.commit import synchronize_codebooks_ as synchronize_codebooks_
    from vqkit.quantizers.commit import update_codebooks_ as update_codebooks_
    from vqkit.quantizers.config import EMA as EMA
    from vqkit.quantizers.config import MLP as MLP
    from vqkit.quantizers.config import Affine as Affine
    from vqkit.quantizers.config import ClipEMA as ClipEMA
    from vqkit.quantizers.config import CodebookConfig as CodebookConfig
    from vqkit.quantizers.config import Commitment as Commitment
    from vqkit.quantizers.config import CrossEntropyCommitment as CrossEntropyCommitment
    from vqkit.quantizers.config import DeadCodes as DeadCodes
    from vqkit.quantizers.config import DiVeQ as DiVeQ
    from vqkit.quantizers.config import Diversity as Diversity
    from vqkit.quantizers.config import Frozen as Frozen
    from vqkit.quantizers.config import Gradient as Gradient
    from vqkit.quantizers.config import Gumbel as Gumbel
    from vqkit.quantizers.config import KMeans as KMeans
    from vqkit.quantizers.config import Orthogonality as Orthogonality
    from vqkit.quantizers.config import OwnOptimizer as OwnOptimizer
    from vqkit.quantizers.fixed import SimpleVQ as SimpleVQ
    from vqkit.quantizers.grouped import Grouped as Grouped
    from vqkit.quantizers.grouped import GroupedResidualVQ as GroupedResidualVQ
    from vqkit.quantizers.learnable import LearnableVQ as LearnableVQ
    from vqkit.quantizers.packing import pack_indices as pack_indices
    from vqkit.quantizers.packing import unpack_indices as unpack_indices
    from vqkit.quantizers.residual import Residual as Residual
    from vqkit.quantizers.residual import ResidualVQ as ResidualVQ
    from vqkit.quantizers.vector_quantize import VectorQuantize as VectorQuantize

_NAMES = {
    "base": ("Quantized", "Quantizer", "QuantizerOutput"),
    "codebook": ("Codebook",),
    "commit": ("add_statistics_", "attach", "register_fsdp_methods", "synchronize_codebooks_", "update_codebooks_"),
    "config": (
        *("EMA", "ClipEMA", "Gradient", "OwnOptimizer", "Frozen"),
        *("KMeans", "DeadCodes", "Affine", "MLP", "Gumbel", "DiVeQ"),
        *("Commitment", "CrossEntropyCommitment", "Orthogonality", "Diversity"),
        "CodebookConfig",
    ),
    "fixed": ("SimpleVQ",),
    "grouped": ("Grouped", "GroupedResidualVQ"),
    "learnable": ("LearnableVQ",),
    "packing": ("pack_indices", "unpack_indices"),
    "residual": ("Residual", "ResidualVQ"),
    "vector_quantize": ("VectorQuantize",),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
