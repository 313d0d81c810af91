"""Ordinary causal softmax attention with a growing cache of keys and values: the yardstick for attention over quantized keys.

Names load lazily.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqkit.ops.full_attention.api import FullAttentionOutput as FullAttentionOutput
    from vqkit.ops.full_attention.api import full_attention as full_attention
    from vqkit.ops.full_attention.state import KeyValueState as KeyValueState
    from vqkit.ops.full_attention.state import empty_state as empty_state

__all__ = ["FullAttentionOutput", "KeyValueState", "empty_state", "full_attention"]

_MODULES = {
    "FullAttentionOutput": "api",
    "KeyValueState": "state",
    "empty_state": "state",
    "full_attention": "api",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'vqkit.ops.full_attention' has no attribute {name!r}")
    return getattr(import_module(f"vqkit.ops.full_attention.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
