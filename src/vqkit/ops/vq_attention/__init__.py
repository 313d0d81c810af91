"""Linear-time softmax attention over quantized keys: exact in a window, one count and one mean value per code before it.

Names load lazily.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqkit.ops.vq_attention.api import VQAttentionOutput as VQAttentionOutput
    from vqkit.ops.vq_attention.api import vq_attention as vq_attention
    from vqkit.ops.vq_attention.decoding import DecodingState as DecodingState
    from vqkit.ops.vq_attention.decoding import attention_state as attention_state
    from vqkit.ops.vq_attention.decoding import codes_of as codes_of
    from vqkit.ops.vq_attention.decoding import decoding_state as decoding_state
    from vqkit.ops.vq_attention.decoding import step_ as step_
    from vqkit.ops.vq_attention.state import AttentionState as AttentionState
    from vqkit.ops.vq_attention.state import initial_state as initial_state

__all__ = [
    "AttentionState",
    "DecodingState",
    "VQAttentionOutput",
    "attention_state",
    "codes_of",
    "decoding_state",
    "initial_state",
    "step_",
    "vq_attention",
]

_MODULES = {
    "AttentionState": "state",
    "DecodingState": "decoding",
    "VQAttentionOutput": "api",
    "attention_state": "decoding",
    "codes_of": "decoding",
    "decoding_state": "decoding",
    "initial_state": "state",
    "step_": "decoding",
    "vq_attention": "api",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'vqkit.ops.vq_attention' has no attribute {name!r}")
    return getattr(import_module(f"vqkit.ops.vq_attention.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
