"""Linear-time softmax attention over quantized keys: exact in a window, one count and one mean value per code before it."""

from __future__ import annotations

from vqkit.ops.vq_attention.api import VQAttentionOutput, vq_attention
from vqkit.ops.vq_attention.state import AttentionState, initial_state

__all__ = ["AttentionState", "VQAttentionOutput", "initial_state", "vq_attention"]
