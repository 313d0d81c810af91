"""Recipes: functions that return a whole run configuration, without torch. Names load lazily."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqkit.recipes.byte_models import quickstart as quickstart
    from vqkit.recipes.byte_models import text as text
    from vqkit.recipes.byte_models import tokens as tokens
    from vqkit.recipes.catalog import DATA as DATA
    from vqkit.recipes.catalog import HARDWARE as HARDWARE
    from vqkit.recipes.catalog import RECIPES as RECIPES
    from vqkit.recipes.catalog import RESULTS as RESULTS
    from vqkit.recipes.published import TOP_P as TOP_P
    from vqkit.recipes.published import enwik8 as enwik8
    from vqkit.recipes.published import enwik8_small as enwik8_small
    from vqkit.recipes.published import enwik8_tiny as enwik8_tiny
    from vqkit.recipes.published import imagenet64 as imagenet64
    from vqkit.recipes.published import imagenet64_small as imagenet64_small
    from vqkit.recipes.published import imagenet64_tiny as imagenet64_tiny
    from vqkit.recipes.published import pg19 as pg19
    from vqkit.recipes.published import pg19_small as pg19_small
    from vqkit.recipes.published import pg19_tiny as pg19_tiny

__all__ = [
    "DATA",
    "HARDWARE",
    "RECIPES",
    "RESULTS",
    "TOP_P",
    "enwik8",
    "enwik8_small",
    "enwik8_tiny",
    "imagenet64",
    "imagenet64_small",
    "imagenet64_tiny",
    "pg19",
    "pg19_small",
    "pg19_tiny",
    "quickstart",
    "text",
    "tokens",
]

_MODULES = {
    "DATA": "catalog",
    "HARDWARE": "catalog",
    "RECIPES": "catalog",
    "RESULTS": "catalog",
    "TOP_P": "published",
    "enwik8": "published",
    "enwik8_small": "published",
    "enwik8_tiny": "published",
    "imagenet64": "published",
    "imagenet64_small": "published",
    "imagenet64_tiny": "published",
    "pg19": "published",
    "pg19_small": "published",
    "pg19_tiny": "published",
    "quickstart": "byte_models",
    "text": "byte_models",
    "tokens": "byte_models",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'vqkit.recipes' has no attribute {name!r}")
    return getattr(import_module(f"vqkit.recipes.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
