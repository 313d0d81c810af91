"""Models that other programs trained, in ours: checkpoints of the official Transformer-VQ. Names load lazily."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqkit.compat.config import OfficialSettings as OfficialSettings
    from vqkit.compat.official import OfficialModel as OfficialModel
    from vqkit.compat.official import load_official as load_official

__all__ = ["OfficialModel", "OfficialSettings", "load_official"]

_MODULES = {
    "OfficialModel": "official",
    "OfficialSettings": "config",
    "load_official": "official",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'vqkit.compat' has no attribute {name!r}")
    return getattr(import_module(f"vqkit.compat.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
