"""Quantizers: modules that own a codebook, call the ops, and hand out statistics instead of changing while they are used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqkit.quantizers.base import Quantized as Quantized
    from vqkit.quantizers.base import Quantizer as Quantizer
    from vqkit.quantizers.base import QuantizerOutput as QuantizerOutput
    from vqkit.quantizers.binary_mapper import BinaryMapper as BinaryMapper
    from vqkit.quantizers.codebook import Codebook as Codebook
    from vqkit.quantizers.commit import add_statistics_ as add_statistics_
    from vqkit.quantizers.commit import attach as attach
    from vqkit.quantizers.commit import discard_statistics_ as discard_statistics_
    from vqkit.quantizers.commit import register_fsdp_methods as register_fsdp_methods
    from vqkit.quantizers.commit import synchronize_codebooks_ as synchronize_codebooks_
    from vqkit.quantizers.commit import update_codebooks_ as update_codebooks_
    from vqkit.quantizers.config import EMA as EMA
    from vqkit.quantizers.config import MLP as MLP
    from vqkit.quantizers.config import Affine as Affine
    from vqkit.quantizers.config import BeamSearch as BeamSearch
    from vqkit.quantizers.config import ClipEMA as ClipEMA
    from vqkit.quantizers.config import CodebookConfig as CodebookConfig
    from vqkit.quantizers.config import Commitment as Commitment
    from vqkit.quantizers.config import CrossEntropyCommitment as CrossEntropyCommitment
    from vqkit.quantizers.config import DeadCodes as DeadCodes
    from vqkit.quantizers.config import DiVeQ as DiVeQ
    from vqkit.quantizers.config import Diversity as Diversity
    from vqkit.quantizers.config import Entropy as Entropy
    from vqkit.quantizers.config import Evolution as Evolution
    from vqkit.quantizers.config import FreeBits as FreeBits
    from vqkit.quantizers.config import Frozen as Frozen
    from vqkit.quantizers.config import Gradient as Gradient
    from vqkit.quantizers.config import Gumbel as Gumbel
    from vqkit.quantizers.config import KMeans as KMeans
    from vqkit.quantizers.config import Moments as Moments
    from vqkit.quantizers.config import NestedDropout as NestedDropout
    from vqkit.quantizers.config import Orthogonality as Orthogonality
    from vqkit.quantizers.config import OwnOptimizer as OwnOptimizer
    from vqkit.quantizers.config import QuantizeDropout as QuantizeDropout
    from vqkit.quantizers.config import Softmax as Softmax
    from vqkit.quantizers.config import StoredEMA as StoredEMA
    from vqkit.quantizers.config import VQBridge as VQBridge
    from vqkit.quantizers.evolution import EvoLFQ as EvoLFQ
    from vqkit.quantizers.fixed import SimpleVQ as SimpleVQ
    from vqkit.quantizers.fsp import FSP as FSP
    from vqkit.quantizers.fsq import FSQ as FSQ
    from vqkit.quantizers.grouped import Grouped as Grouped
    from vqkit.quantizers.grouped import GroupedResidualVQ as GroupedResidualVQ
    from vqkit.quantizers.grouped import ProductVQ as ProductVQ
    from vqkit.quantizers.hierarchical import Hierarchical as Hierarchical
    from vqkit.quantizers.hierarchical import HierarchicalVQ as HierarchicalVQ
    from vqkit.quantizers.implicit import ImplicitVQ as ImplicitVQ
    from vqkit.quantizers.latent import LatentQuantize as LatentQuantize
    from vqkit.quantizers.learnable import LearnableVQ as LearnableVQ
    from vqkit.quantizers.lfq import LFQ as LFQ
    from vqkit.quantizers.packing import pack_indices as pack_indices
    from vqkit.quantizers.packing import unpack_indices as unpack_indices
    from vqkit.quantizers.random_projection import RandomProjectionQuantizer as RandomProjectionQuantizer
    from vqkit.quantizers.residual import Residual as Residual
    from vqkit.quantizers.residual import ResidualVQ as ResidualVQ
    from vqkit.quantizers.sim_vq import SimVQ as SimVQ
    from vqkit.quantizers.vector_quantize import VectorQuantize as VectorQuantize

__all__ = [
    "EMA",
    "FSP",
    "FSQ",
    "LFQ",
    "MLP",
    "Affine",
    "BeamSearch",
    "BinaryMapper",
    "ClipEMA",
    "Codebook",
    "CodebookConfig",
    "Commitment",
    "CrossEntropyCommitment",
    "DeadCodes",
    "DiVeQ",
    "Diversity",
    "Entropy",
    "EvoLFQ",
    "Evolution",
    "FreeBits",
    "Frozen",
    "Gradient",
    "Grouped",
    "GroupedResidualVQ",
    "Gumbel",
    "Hierarchical",
    "HierarchicalVQ",
    "ImplicitVQ",
    "KMeans",
    "LatentQuantize",
    "LearnableVQ",
    "Moments",
    "NestedDropout",
    "Orthogonality",
    "OwnOptimizer",
    "ProductVQ",
    "QuantizeDropout",
    "Quantized",
    "Quantizer",
    "QuantizerOutput",
    "RandomProjectionQuantizer",
    "Residual",
    "ResidualVQ",
    "SimVQ",
    "SimpleVQ",
    "Softmax",
    "StoredEMA",
    "VQBridge",
    "VectorQuantize",
    "add_statistics_",
    "attach",
    "discard_statistics_",
    "pack_indices",
    "register_fsdp_methods",
    "synchronize_codebooks_",
    "unpack_indices",
    "update_codebooks_",
]

_MODULES = {
    "Affine": "config",
    "BeamSearch": "config",
    "BinaryMapper": "binary_mapper",
    "ClipEMA": "config",
    "Codebook": "codebook",
    "CodebookConfig": "config",
    "Commitment": "config",
    "CrossEntropyCommitment": "config",
    "DeadCodes": "config",
    "DiVeQ": "config",
    "Diversity": "config",
    "EMA": "config",
    "Entropy": "config",
    "FSP": "fsp",
    "FSQ": "fsq",
    "LFQ": "lfq",
    "EvoLFQ": "evolution",
    "Evolution": "config",
    "FreeBits": "config",
    "Frozen": "config",
    "Gradient": "config",
    "Grouped": "grouped",
    "GroupedResidualVQ": "grouped",
    "Gumbel": "config",
    "Hierarchical": "hierarchical",
    "HierarchicalVQ": "hierarchical",
    "ImplicitVQ": "implicit",
    "KMeans": "config",
    "LearnableVQ": "learnable",
    "MLP": "config",
    "Moments": "config",
    "NestedDropout": "config",
    "Orthogonality": "config",
    "OwnOptimizer": "config",
    "ProductVQ": "grouped",
    "SimVQ": "sim_vq",
    "LatentQuantize": "latent",
    "RandomProjectionQuantizer": "random_projection",
    "QuantizeDropout": "config",
    "Quantized": "base",
    "Quantizer": "base",
    "QuantizerOutput": "base",
    "Residual": "residual",
    "ResidualVQ": "residual",
    "SimpleVQ": "fixed",
    "Softmax": "config",
    "StoredEMA": "config",
    "VQBridge": "config",
    "VectorQuantize": "vector_quantize",
    "add_statistics_": "commit",
    "attach": "commit",
    "discard_statistics_": "commit",
    "pack_indices": "packing",
    "register_fsdp_methods": "commit",
    "synchronize_codebooks_": "commit",
    "unpack_indices": "packing",
    "update_codebooks_": "commit",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
