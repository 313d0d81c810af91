"""Other programs' ways, in ours: checkpoints of the official Transformer-VQ; the drop-in `vector_quantize_pytorch`. Names load lazily."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqkit.compat.config import OfficialSettings as OfficialSettings
    from vqkit.compat.official import OfficialModel as OfficialModel
    from vqkit.compat.official import load_official as load_official
    from vqkit.compat.official_run import run_config as run_config
    from vqkit.compat.official_run import write_run as write_run

__all__ = ["OfficialModel", "OfficialSettings", "load_official", "run_config", "write_run"]

_MODULES = {
    "OfficialModel": "official",
    "OfficialSettings": "config",
    "load_official": "official",
    "run_config": "official_run",
    "write_run": "official_run",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'vqkit.compat' has no attribute {name!r}")
    return getattr(import_module(f"vqkit.compat.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
