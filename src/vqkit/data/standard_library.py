"""The text that every machine with Python has: its standard library, about 14 MB of source code."""

from __future__ import annotations

import sysconfig

from vqkit.data.config import DataConfig

KIBIBYTE = 1024


def python_library() -> DataConfig:
    """The running interpreter's `*.py` outside `test`, `site-packages` and what packagers of Python put in their place."""
    return DataConfig(
        path=sysconfig.get_path("stdlib"),
        include=("*.py",),
        exclude=("test", "site-packages", "dist-packages", "__pycache__"),
        max_validation_bytes=256 * KIBIBYTE,
        max_test_bytes=256 * KIBIBYTE,
    )
