"""A drop-in for vector-quantize-pytorch 1.32.0: its classes by its names, made of the parts of vqkit. Names load lazily.

Each module has the name and the public names of the peer's. A class here has the peer's signature, state dict and timing, and is a
translation: `translate.py` says which parts a set of arguments names. docs/migration.md lists where the result is not the peer's, and why.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqkit.compat.vector_quantize_pytorch.binary_mapper import BinaryMapper as BinaryMapper
    from vqkit.compat.vector_quantize_pytorch.evo_lookup_free_quantization import EvoLFQ as EvoLFQ
    from vqkit.compat.vector_quantize_pytorch.finite_scalar_perturbation import FSP as FSP
    from vqkit.compat.vector_quantize_pytorch.finite_scalar_quantization import FSQ as FSQ
    from vqkit.compat.vector_quantize_pytorch.hierarchical_vq import HierarchicalVQ as HierarchicalVQ
    from vqkit.compat.vector_quantize_pytorch.latent_quantization import LatentQuantize as LatentQuantize
    from vqkit.compat.vector_quantize_pytorch.lookup_free_quantization import LFQ as LFQ
    from vqkit.compat.vector_quantize_pytorch.random_projection_quantizer import RandomProjectionQuantizer as RandomProjectionQuantizer
    from vqkit.compat.vector_quantize_pytorch.residual_fsq import GroupedResidualFSQ as GroupedResidualFSQ
    from vqkit.compat.vector_quantize_pytorch.residual_fsq import ResidualFSQ as ResidualFSQ
    from vqkit.compat.vector_quantize_pytorch.residual_lfq import GroupedResidualLFQ as GroupedResidualLFQ
    from vqkit.compat.vector_quantize_pytorch.residual_lfq import ResidualLFQ as ResidualLFQ
    from vqkit.compat.vector_quantize_pytorch.residual_sim_vq import ResidualSimVQ as ResidualSimVQ
    from vqkit.compat.vector_quantize_pytorch.residual_vq import GroupedResidualVQ as GroupedResidualVQ
    from vqkit.compat.vector_quantize_pytorch.residual_vq import ResidualVQ as ResidualVQ
    from vqkit.compat.vector_quantize_pytorch.sim_vq import SimVQ as SimVQ
    from vqkit.compat.vector_quantize_pytorch.utils import Sequential as Sequential
    from vqkit.compat.vector_quantize_pytorch.vector_quantize_pytorch import VectorQuantize as VectorQuantize

__all__ = [
    "FSP",
    "FSQ",
    "LFQ",
    "BinaryMapper",
    "EvoLFQ",
    "GroupedResidualFSQ",
    "GroupedResidualLFQ",
    "GroupedResidualVQ",
    "HierarchicalVQ",
    "LatentQuantize",
    "RandomProjectionQuantizer",
    "ResidualFSQ",
    "ResidualLFQ",
    "ResidualSimVQ",
    "ResidualVQ",
    "Sequential",
    "SimVQ",
    "VectorQuantize",
]

_MODULES = {
    "HierarchicalVQ": "hierarchical_vq",
    "FSP": "finite_scalar_perturbation",
    "EvoLFQ": "evo_lookup_free_quantization",
    "BinaryMapper": "binary_mapper",
    "FSQ": "finite_scalar_quantization",
    "GroupedResidualFSQ": "residual_fsq",
    "GroupedResidualLFQ": "residual_lfq",
    "GroupedResidualVQ": "residual_vq",
    "LFQ": "lookup_free_quantization",
    "LatentQuantize": "latent_quantization",
    "RandomProjectionQuantizer": "random_projection_quantizer",
    "ResidualFSQ": "residual_fsq",
    "ResidualLFQ": "residual_lfq",
    "ResidualSimVQ": "residual_sim_vq",
    "ResidualVQ": "residual_vq",
    "Sequential": "utils",
    "SimVQ": "sim_vq",
    "VectorQuantize": "vector_quantize_pytorch",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    if name in _MODULES.values():  # the peer has its modules as attributes, too
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES.values()})
