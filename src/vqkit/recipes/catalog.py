"""All recipes by name."""

from __future__ import annotations

from collections.abc import Callable

from vqkit.recipes.byte_models import quickstart, text
from vqkit.train.config import RunConfig

RECIPES: dict[str, Callable[[], RunConfig]] = {"quickstart": quickstart, "text": text}
