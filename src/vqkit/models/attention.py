"""The gated VQ attention unit of Transformer-VQ: norm, projections, vector-quantized keys, attention, gate, residual.

Shapes: B batch, T time, D width, H heads, K key width, V value width, M window memory, C codes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqkit.models.config import ModelConfig
from vqkit.models.norm import RMSNorm, normalize
from vqkit.models.positions import PositionKeys
from vqkit.ops.codebook import CodebookStatistics
from vqkit.ops.vq_attention import AttentionState, vq_attention
from vqkit.ops.vq_attention.api import Implementation
from vqkit.quantizers.learnable import LearnableVQ


class AttentionOutput(NamedTuple):
    """What one unit returns; `statistics` is None where none were asked for."""

    output: Tensor  # [B, T, D], residual included
    state: AttentionState
    commitment: Tensor  # scalar
    statistics: CodebookStatistics | None


class Projected(NamedTuple):
    """What a unit computes of its input before it attends."""

    q: Tensor  # [B, H, T, K], of RMS 1 before the scale
    k: Tensor  # [B, H, T, K], likewise, not yet quantized
    v: Tensor  # [B, H, T, V]
    gate: Tensor  # [B, T, H V]


class GatedVQAttention(nn.Module):
    """x + W_o (attention(q, quantized k, v) * g), with q, k, v, g from an RMS norm of x (Lingle 2024, section 3.1).

    Queries, keys, position keys and the query biases u (content) and v (position) are scaled by K^(-1/4) each.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.scale = config.key_dim**-0.25
        keys, values = config.heads * config.key_dim, config.heads * config.value_dim
        self.norm = RMSNorm(config.dim)
        self.q = nn.Linear(config.dim, keys, bias=False)
        self.kvg = nn.Linear(config.dim, keys + 2 * values, bias=False)  # rows: all k, then all v, then all g
        self.r = PositionKeys(config)
        self.out = nn.Linear(values, config.dim, bias=False)
        self.content_bias = nn.Parameter(torch.empty(keys))
        self.position_bias = nn.Parameter(torch.empty(keys))
        self.quantizer = LearnableVQ(config.heads, config.codebook_size, config.key_dim, config.codebook)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.q, self.kvg, self.out):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        for bias in (self.content_bias, self.position_bias):
            nn.init.zeros_(bias)

    def forward(
        self,
        x: Tensor,
        state: AttentionState | None = None,
        *,
        segments: Tensor | None = None,
        mask: Tensor | None = None,
        statistics: bool | None = None,
        impl: Implementation = "auto",
    ) -> AttentionOutput:
        """x [B, T, D]; segments [B, T] documents; mask [B, T] positions that count; statistics default to `self.training`."""
        config = self.config
        q, k, v, gate = self.project(x)
        keys = self.quantizer.quantize(k, mask, self.training if statistics is None else statistics)
        u, w = self.scaled_bias(self.content_bias), self.scaled_bias(self.position_bias)
        attended, state = vq_attention(
            q + u,
            keys.quantized,
            v,
            keys.indices,
            self.quantizer.codebook,
            block_len=config.block_len,
            mem_len=config.mem_len,
            state=state,
            position_query=q + w,
            position_keys=self.r(q.dtype) * self.scale,
            segments=segments,
            cache=config.cache,
            cache_gradient=config.cache_gradient,
            impl=impl,
        )
        attended = attended.transpose(1, 2).reshape(gate.shape)
        return AttentionOutput(x + self.out(attended * gate), state, keys.commitment, keys.statistics)

    def project(self, x: Tensor) -> Projected:
        """Queries, keys, values and gates of x [B, T, D]."""
        config = self.config
        x = self.norm(x)
        keys, values = config.heads * config.key_dim, config.heads * config.value_dim
        # One product for each part of the weight: slices of one wide result would be strided, and their gradients copied together.
        k_weight, v_weight, g_weight = self.kvg.weight.split([keys, values, values])
        return Projected(
            q=self._normalized(self.q(x)),
            k=self._normalized(F.linear(x, k_weight)),
            v=self._split(F.silu(F.linear(x, v_weight))),
            gate=F.silu(F.linear(x, g_weight)),
        )

    def _normalized(self, x: Tensor) -> Tensor:
        return normalize(self._split(x)) * self.scale

    def _split(self, x: Tensor) -> Tensor:
        """[B, T, H * width] -> [B, H, T, width], a view; contiguous where there is one head."""
        return x.unflatten(-1, (self.config.heads, -1)).transpose(1, 2)

    def scaled_bias(self, bias: Tensor) -> Tensor:
        """[H * K] -> [H, 1, K], scaled like the queries."""
        return bias.view(self.config.heads, 1, -1) * self.scale
