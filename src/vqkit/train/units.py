"""The unit that the likelihood of a kind of data is told in, wherever it is told: the live bar, metrics.jsonl, plots, evaluations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vqkit.data import Split


@dataclass(frozen=True)
class LossUnit:
    """What bits are shared out over. Ends of documents cost bits wherever they are, and are no bytes."""

    name: Literal["bits per byte", "bits per dim", "bits per token"]
    bytes_per_token: float | None = None
    """Of pieces of text: the bytes of the split over its tokens. None: a target is a byte, a dimension or a token, and is counted."""

    @property
    def key(self) -> str:
        """Its name in metrics.jsonl."""
        return self.name.replace(" ", "_")

    @property
    def short(self) -> str:
        """Its name where room is scarce."""
        return self.name.replace(" per ", "/")

    def size(self, num_tokens: Any, num_bytes: Any) -> Any:
        """How many units there are in so many targets, of which `num_bytes` are no special ids; numbers or tensors."""
        if self.bytes_per_token is not None:
            return num_tokens * self.bytes_per_token
        return num_tokens if self.name == "bits per token" else num_bytes

    def bits(self, nats: float, size: float) -> float:
        """The figure, from the negative log-likelihood of `size` units; 0 units count as one."""
        return nats / math.log(2) / (size or 1)


def loss_unit(split: Split) -> LossUnit:
    """Bits per byte of text, in pieces of a vocabulary as well, as its bytes are known; per dim of images; per token of bare ids."""
    match split.tokenizer.kind:
        case "images":
            return LossUnit("bits per dim")
        case "ids":
            return LossUnit("bits per token")
        case "sentencepiece":
            return LossUnit("bits per byte", split.num_bytes / max(split.num_tokens, 1))
        case _:
            return LossUnit("bits per byte")


def measured(line: Mapping[str, Any]) -> tuple[str, float]:
    """The unit and the figure of a line of metrics.jsonl, of training or validation."""
    key = next(name for name in line if name.startswith("bits_per_"))
    return key.replace("_", " "), line[key]
