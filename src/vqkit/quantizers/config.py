"""Configuration of codebooks: plain dataclasses, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CodebookConfig:
    """A codebook kept as moving averages: codes are sum / max(count, 0.01)."""

    decay: float = 0.99
    """Rate of the moving averages (gamma); 1 - decay of each new batch enters."""
    init: Literal["normal", "kmeans"] = "normal"
    """Random start, or k-means on the keys of the first training step."""
    dead_code_threshold: float = 0.0
    """Codes whose average count falls below this are replaced by keys of the batch; 0 = never."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"codebook.decay = {self.decay}: must be at least 0 and below 1")
        if self.dead_code_threshold < 0.0:
            raise ValueError(f"codebook.dead_code_threshold = {self.dead_code_threshold}: must be 0 (never) or positive")
