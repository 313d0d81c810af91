"""A map of a whole codebook that lets every code see all others (FVQ; Chang et al., 2025): compress, process, recover.

Neighbouring stored vectors are compressed to one token, blocks of a vision transformer process all tokens, and each gives its codes
back. So every step of the optimizer moves all codes, those that no vector chose too.

Shapes: H heads with a codebook each, C codes, K width, T tokens of `hidden` numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqkit.quantizers.config import VQBridge


class _Block(nn.Module):
    """Attention of all tokens to all, then a perceptron of four times the width; each on normalised tokens, and added to them."""

    def __init__(self, hidden: int, heads: int, dtype: torch.dtype, device: torch.device | str | None) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(hidden, dtype=dtype, device=device)
        self.query_key_value = nn.Linear(hidden, 3 * hidden, dtype=dtype, device=device)
        self.attention_out = nn.Linear(hidden, hidden, dtype=dtype, device=device)
        self.before_perceptron = nn.LayerNorm(hidden, dtype=dtype, device=device)
        self.widen = nn.Linear(hidden, 4 * hidden, dtype=dtype, device=device)
        self.narrow = nn.Linear(4 * hidden, hidden, dtype=dtype, device=device)

    def forward(self, tokens: Tensor) -> Tensor:
        """[H, T, hidden] -> [H, T, hidden]."""
        each = self.query_key_value(self.before_attention(tokens)).unflatten(-1, (3, self.heads, -1))
        query, key, value = (part.transpose(1, 2) for part in each.unbind(-3))
        seen = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2)
        tokens = tokens + self.attention_out(seen)
        return tokens + self.narrow(F.gelu(self.widen(self.before_perceptron(tokens))))


class Bridge(nn.Module):
    """What `VQBridge` says, for codebooks of `size` codes of width `dim`. Raises ValueError where its patches do not divide them."""

    def __init__(
        self, config: VQBridge, size: int, dim: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        if size % config.patch:
            raise ValueError(f"VQBridge.patch = {config.patch}: must divide the number of codes, {size}")
        self.patch, self.dim = config.patch, dim
        self.compress = nn.Linear(config.patch * dim, config.hidden, dtype=dtype, device=device)
        self.place = nn.Parameter(torch.empty(size // config.patch, config.hidden, dtype=dtype, device=device))
        self.blocks = nn.ModuleList(_Block(config.hidden, config.heads, dtype, device) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.hidden, dtype=dtype, device=device)
        self.recover = nn.Linear(config.hidden, config.patch * dim, dtype=dtype, device=device)
        nn.init.normal_(self.place, std=0.02)

    def forward(self, codes: Tensor) -> Tensor:
        """[H, C, K] -> [H, C, K]."""
        tokens = self.compress(codes.unflatten(1, (-1, self.patch)).flatten(-2)) + self.place
        for block in self.blocks:
            tokens = block(tokens)
        return self.recover(self.norm(tokens)).unflatten(-1, (self.patch, self.dim)).flatten(1, 2)
