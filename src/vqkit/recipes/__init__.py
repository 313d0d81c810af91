"""Recipes: functions that return a whole run configuration, without torch. Names load lazily."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqkit.recipes.byte_models import quickstart as quickstart
    from vqkit.recipes.byte_models import text as text
    from vqkit.recipes.catalog import RECIPES as RECIPES

__all__ = ["RECIPES", "quickstart", "text"]

_MODULES = {
    "RECIPES": "catalog",
    "quickstart": "byte_models",
    "text": "byte_models",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'vqkit.recipes' has no attribute {name!r}")
    return getattr(import_module(f"vqkit.recipes.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
