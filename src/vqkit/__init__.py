"""vqkit: codebooks for PyTorch - quantizers, the Transformer-VQ built on them, and the tool that trains it.

Names load when they are first used; importing the package does nothing else. A room of the house is reached as `vqkit.ROOM`,
so that `vqkit.train` and `vqkit.generate` are packages: their functions are `vqkit.train.train` and `vqkit.generate.generate`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqkit import compat as compat
    from vqkit import data as data
    from vqkit import generate as generate
    from vqkit import models as models
    from vqkit import ops as ops
    from vqkit import quantizers as quantizers
    from vqkit import recipes as recipes
    from vqkit import train as train
    from vqkit.generate import load as load
    from vqkit.models import ModelConfig as ModelConfig
    from vqkit.models import TransformerVQ as TransformerVQ
    from vqkit.ops.nearest_code import nearest_code as nearest_code
    from vqkit.ops.vq_attention import vq_attention as vq_attention
    from vqkit.quantizers import CodebookConfig as CodebookConfig
    from vqkit.quantizers import GroupedResidualVQ as GroupedResidualVQ
    from vqkit.quantizers import LearnableVQ as LearnableVQ
    from vqkit.quantizers import ResidualVQ as ResidualVQ
    from vqkit.quantizers import VectorQuantize as VectorQuantize
    from vqkit.quantizers import add_statistics_ as add_statistics_
    from vqkit.quantizers import attach as attach
    from vqkit.quantizers import register_fsdp_methods as register_fsdp_methods
    from vqkit.quantizers import synchronize_codebooks_ as synchronize_codebooks_
    from vqkit.quantizers import update_codebooks_ as update_codebooks_
    from vqkit.train import RunConfig as RunConfig

__version__ = "0.1.0"

__all__ = [
    "CodebookConfig",
    "GroupedResidualVQ",
    "LearnableVQ",
    "ModelConfig",
    "ResidualVQ",
    "RunConfig",
    "TransformerVQ",
    "VectorQuantize",
    "__version__",
    "add_statistics_",
    "attach",
    "compat",
    "data",
    "generate",
    "load",
    "models",
    "nearest_code",
    "ops",
    "quantizers",
    "recipes",
    "register_fsdp_methods",
    "synchronize_codebooks_",
    "train",
    "update_codebooks_",
    "vq_attention",
]

_ROOMS = ("compat", "data", "generate", "models", "ops", "quantizers", "recipes", "train")

_MODULES = {
    "CodebookConfig": "vqkit.quantizers",
    "GroupedResidualVQ": "vqkit.quantizers",
    "LearnableVQ": "vqkit.quantizers",
    "ModelConfig": "vqkit.models",
    "ResidualVQ": "vqkit.quantizers",
    "RunConfig": "vqkit.train",
    "TransformerVQ": "vqkit.models",
    "VectorQuantize": "vqkit.quantizers",
    "add_statistics_": "vqkit.quantizers",
    "attach": "vqkit.quantizers",
    "load": "vqkit.generate",
    "nearest_code": "vqkit.ops.nearest_code",
    "register_fsdp_methods": "vqkit.quantizers",
    "synchronize_codebooks_": "vqkit.quantizers",
    "update_codebooks_": "vqkit.quantizers",
    "vq_attention": "vqkit.ops.vq_attention",
}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"vqkit.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module 'vqkit' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
