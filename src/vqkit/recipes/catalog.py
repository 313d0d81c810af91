"""All recipes by name, and what each is sized for."""

from __future__ import annotations

from collections.abc import Callable

from vqkit.recipes.byte_models import quickstart, text, tokens
from vqkit.recipes.published import (
    enwik8,
    enwik8_small,
    enwik8_tiny,
    imagenet64,
    imagenet64_small,
    imagenet64_tiny,
    pg19,
    pg19_small,
    pg19_tiny,
)
from vqkit.train.config import RunConfig

RECIPES: dict[str, Callable[[], RunConfig]] = {
    "quickstart": quickstart,
    "text": text,
    "tokens": tokens,
    "enwik8-tiny": enwik8_tiny,
    "pg19-tiny": pg19_tiny,
    "imagenet64-tiny": imagenet64_tiny,
    "enwik8-small": enwik8_small,
    "pg19-small": pg19_small,
    "imagenet64-small": imagenet64_small,
    "enwik8": enwik8,
    "pg19": pg19,
    "imagenet64": imagenet64,
}

_LAPTOP, _ONE, _MANY = "a laptop", "one GPU", "many GPUs"
HARDWARE = dict.fromkeys(RECIPES, _LAPTOP) | {
    **dict.fromkeys(("enwik8-small", "pg19-small", "imagenet64-small"), _ONE),
    **dict.fromkeys(("enwik8", "pg19", "imagenet64"), _MANY),
}
"""What a recipe is sized for."""

DATA = {
    "quickstart": "Python's standard library",
    "text": "your files",
    "tokens": "your ids",
    "enwik8-tiny": "enwik8",
    "pg19-tiny": "pg19 (validation books, as bytes)",
    "imagenet64-tiny": "imagenet64 (test images)",
    **{f"{name}{variant}": name for name in ("enwik8", "pg19", "imagenet64") for variant in ("-small", "")},
}
"""What a recipe reads; enwik8, pg19 and imagenet64 are fetched by `vqkit data download`."""

RESULTS = {"enwik8": "0.99 bits per byte", "pg19": "26.6 word-level perplexity", "imagenet64": "3.16 bits per byte"}
"""What Lingle (2024) reports on the test split."""
