"""Both ends of the model: token ids to vectors, and vectors to logits."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TokenEmbedding(nn.Module):
    """A table [vocab_size, dim], initially standard normal."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] integers -> [B, T, D]. Ids outside the vocabulary raise ValueError (RuntimeError in compiled code and on devices)."""
        check_tokens(tokens, self.weight.shape[0])
        return F.embedding(tokens, self.weight)


class Logits(nn.Module):
    """(x @ weight.T + bias) * scale, or (x * scale) @ weight.T + bias, in float32 or wider whatever the types are.

    A weight of its own has an initial standard deviation of 1 / sqrt(dim); without one, each call brings that of the embedding.
    The bias, if any, starts at 0.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        *,
        tied: bool = False,
        bias: bool = True,
        scale: float = 1.0,
        scale_at: Literal["logits", "input"] = "logits",
    ) -> None:
        super().__init__()
        self.scale, self.scale_at = scale, scale_at
        self.weight = nn.Parameter(torch.empty(vocab_size, dim)) if not tied else None
        self.bias = nn.Parameter(torch.empty(vocab_size)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """x [B, T, D] -> logits [B, T, vocab_size]; `weight` is the embedding's where it is shared."""
        weight = self.weight if weight is None else weight
        if weight is None:
            raise ValueError("weight = None: tied logits need the weight of the embedding")
        wide = torch.promote_types(x.dtype, torch.float32)
        x = x.to(wide)
        if self.scale != 1.0 and self.scale_at == "input":
            x = x * self.scale
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x, weight.to(wide), None if self.bias is None else self.bias.to(wide))
        return logits * self.scale if self.scale != 1.0 and self.scale_at == "logits" else logits


def check_tokens(tokens: Tensor, vocab_size: int) -> None:
    """Raise where an id is outside 0 ... vocab_size - 1: a ValueError that names it, or an assertion on the device without a sync."""
    if torch.compiler.is_compiling() or tokens.device.type != "cpu":
        torch._assert_async(((tokens >= 0) & (tokens < vocab_size)).all(), f"token outside 0 ... {vocab_size - 1}")
        return
    low, high = (int(bound) for bound in torch.aminmax(tokens))
    if low < 0 or high >= vocab_size:
        raise ValueError(f"token {low if low < 0 else high}: must be in 0 ... {vocab_size - 1}, the vocabulary of this model")
