"""What has to be said about an official checkpoint: a plain dataclass, without torch, so that help texts load fast."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class OfficialSettings:
    """What no array of an official checkpoint tells; in brackets the flag of the official launch script with the same meaning."""

    block_len: int
    """Queries per block (--block_len); decides speed and gradients, not what the model says."""
    logit_scale: float
    """Factor on the logits (--e_scale): 1 in the script for enwik8, 0.005 in those with a tied output."""
    mem_len: int | None = None
    """Keys before a block that are attended one by one, with position terms (--mem_len). Branch main needs it, optimized has none."""
    output_norm: bool | None = None
    """Norm before the output projection (--e_preln). Branch optimized needs it, of main the arrays tell it."""
    key_dim: int | None = None
    """Width of a head (--d_k). Ordinary multi-head attention of branch optimized needs it, elsewhere the arrays tell it."""
    position_base: float = 100_000.0
    """Base of the wavelengths of all sinusoids (--pe_lam)."""
    cache: bool = True
    """Attend to everything older than the window (--agg_cache)."""
    cache_gradient: bool = True
    """Let gradients flow into earlier blocks (--grad_thru_cache)."""
    decay: float = 0.99
    """Rate of the moving averages of the codebooks (--c_gamma)."""
    input: Literal["tokens", "features"] = "tokens"
    """What a model with a tied output reads; every other tells it by having an embedding or none."""

    embedding_dropout: float = 0.0
    """Rate of dropout on the embedded input, when training goes on (--p_dropemb)."""
    residual_dropout: float = 0.0
    """Rate of dropout on what an attention adds (--p_dropres)."""
    sinusoid_dropout: float = 0.0
    """Rate of dropout on the table of distances (--p_dropsin)."""
    layer_dropout: float = 0.0
    """Rate at which parts of layers are skipped (--p_droplyr)."""

    def __post_init__(self) -> None:
        for name in ("block_len", "mem_len", "key_dim"):
            value = getattr(self, name)
            if value is None and name != "block_len":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} = {value!r}: must be an integer of at least 1")
        if not 0.0 < self.logit_scale < math.inf:
            raise ValueError(f"logit_scale = {self.logit_scale}: must be a finite number greater than 0")
        if not 1.0 < self.position_base < math.inf:
            raise ValueError(f"position_base = {self.position_base}: must be a finite number greater than 1")
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"decay = {self.decay}: must be at least 0 and below 1")
        for name, rate in self.dropouts.items():
            if not 0.0 <= rate < 1.0:
                raise ValueError(f"{name} = {rate}: must be at least 0 and below 1")
        if self.input not in ("tokens", "features"):
            raise ValueError(f'input = {self.input!r}: must be "tokens" or "features"')

    @property
    def dropouts(self) -> dict[str, float]:
        """The four rates, by the names that they have in `ModelConfig`, too."""
        names = ("embedding_dropout", "residual_dropout", "sinusoid_dropout", "layer_dropout")
        return {name: getattr(self, name) for name in names}
