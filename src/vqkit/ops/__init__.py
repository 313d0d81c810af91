"""Pure functions of tensors: no module, no configuration, no process group, no global state but the random generator where said.

One idea a module; `vqkit.ops.codebook.gather_codes` and the like. Modules load when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vqkit.ops import assignment as assignment
    from vqkit.ops import codebook as codebook
    from vqkit.ops import estimators as estimators
    from vqkit.ops import kmeans as kmeans
    from vqkit.ops import losses as losses
    from vqkit.ops import nearest_code as nearest_code
    from vqkit.ops import positions as positions
    from vqkit.ops import precision as precision
    from vqkit.ops import usage as usage
    from vqkit.ops import vq_attention as vq_attention

__all__ = [
    "assignment",
    "codebook",
    "estimators",
    "kmeans",
    "losses",
    "nearest_code",
    "positions",
    "precision",
    "usage",
    "vq_attention",
]


def __getattr__(name: str) -> ModuleType:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
