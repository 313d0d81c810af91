"""Configuration of the models: plain dataclasses, without torch, so that help texts load fast."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from vqkit.quantizers.config import CodebookConfig


@dataclass(frozen=True)
class ModelConfig:
    """The Transformer-VQ of Lingle (2024): `layers` layers of two gated VQ attention units each."""

    vocab_size: int = 259
    """Number of token ids; 259 = 256 bytes after pad, end of document and unknown."""
    dim: int = 256
    """Width of the residual stream (d_model)."""
    key_dim: int = 64
    """Width of queries and keys per head (d_k)."""
    value_dim: int = 512
    """Width of values and gates per head (d_v)."""
    layers: int = 4
    """Number of layers, each of two attention units."""
    heads: int = 1
    """Number of heads, each with a codebook of its own."""
    codebook_size: int = 128
    """Codes per head (n_code)."""
    block_len: int = 128
    """Queries per block (L)."""
    mem_len: int = 128
    """Keys before a block that are still attended one by one (M)."""
    cache: bool = True
    """Attend to everything older than the window through one count and one mean value per code."""
    cache_gradient: bool = True
    """Let gradients flow into earlier blocks through the carried window and cache."""
    input: Literal["tokens", "features"] = "tokens"
    """Token ids, or float features of width `dim` in their place."""
    absolute_positions: bool = False
    """Add scaled sinusoids of the absolute position to the embeddings."""
    position_base: float = 100_000.0
    """Base of the wavelengths of all sinusoids (pe_lam)."""
    tied: bool = False
    """Share the embedding with the output projection; with float features the table serves the output alone."""
    output_norm: bool = True
    """RMS norm before the output projection (e_preln)."""
    logit_scale: float = 1.0
    """Factor on the logits, bias included (e_scale)."""
    codebook: CodebookConfig = field(default_factory=CodebookConfig)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "key_dim", "value_dim", "layers", "heads", "codebook_size", "block_len", "mem_len"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"model.{name} = {value!r}: must be an integer of at least 1")
        if self.dim % 2:
            raise ValueError(f"model.dim = {self.dim}: must be even, half sines and half cosines")
        if self.input not in ("tokens", "features"):
            raise ValueError(f'model.input = {self.input!r}: must be "tokens" or "features"')
        if not 1.0 < self.position_base < math.inf:
            raise ValueError(f"model.position_base = {self.position_base}: must be a finite number greater than 1")
        if not 0.0 < self.logit_scale < math.inf:
            raise ValueError(f"model.logit_scale = {self.logit_scale}: must be a finite number greater than 0")
