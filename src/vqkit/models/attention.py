"""The attention unit of Transformer-VQ: norm, projections, attention over quantized or over plain keys, gate, residual.

Shapes: B batch, T time, D width, Hq query heads, H key heads, K key width, V value width, M window memory, C codes.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqkit.models.config import ModelConfig
from vqkit.models.dropout import NO_MASKS, PartMasks, drop, drop_elements
from vqkit.models.norm import RMSNorm, normalize
from vqkit.models.positions import PositionKeys
from vqkit.ops.codebook import CodebookStatistics
from vqkit.ops.full_attention import KeyValueState, full_attention
from vqkit.ops.vq_attention import AttentionState, DecodingState, codes_of, decoding_state, step_, vq_attention
from vqkit.quantizers.fixed import SimpleVQ
from vqkit.quantizers.learnable import LearnableVQ, QuantizedKeys

UnitState = AttentionState | KeyValueState | DecodingState
Implementation = Literal["auto", "reference", "recurrent", "blocked"]


class AttentionOutput(NamedTuple):
    """What one unit returns; `statistics` is None where none were asked for, or no codebook learns."""

    output: Tensor  # [B, T, D], residual included
    state: UnitState
    commitment: Tensor  # scalar
    statistics: CodebookStatistics | None


class Projected(NamedTuple):
    """What a unit computes of its input before it attends."""

    q: Tensor  # [B, Hq, T, K], of RMS 1 before the scale
    k: Tensor  # [B, H, T, K], likewise, not yet quantized
    v: Tensor  # [B, H, T, V]
    gate: Tensor | None  # [B, T, Hq V]


class AttentionUnit(nn.Module):
    """x + W_o (attention(q, quantized k, v) * g), with q, k, v, g from an RMS norm of x (Lingle 2024, section 3.1).

    In layers with a feed-forward there is no gate g, and v is linear. Queries, keys, position keys and the query biases u (content)
    and v (position) are scaled by K^(-1/4) each.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.gated = config.layer == "gated"
        self.scale = config.key_dim**-0.25
        queries, keys = config.heads * config.key_dim, config.num_key_heads * config.key_dim
        values, gates = config.num_key_heads * config.value_dim, config.heads * config.value_dim
        self.norm = RMSNorm(config.dim, affine=config.norm == "affine")
        self.q = nn.Linear(config.dim, queries, bias=False)
        self._rows = [keys, values, gates] if self.gated else [keys, values]
        rows = nn.Linear(config.dim, sum(self._rows), bias=False)  # all k, then all v, then all g
        self.register_module("kvg" if self.gated else "kv", rows)
        self.r = PositionKeys(config) if config.relative_positions else None
        self.out = nn.Linear(gates, config.dim, bias=False)
        self.content_bias = nn.Parameter(torch.empty(queries))
        self.position_bias = nn.Parameter(torch.empty(queries)) if config.relative_positions else None
        self.quantizer = _quantizer(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.q, self.key_rows, self.out):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        for bias in (self.content_bias, self.position_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    @property
    def key_rows(self) -> nn.Linear:
        """The projection to keys, values and, if any, gates: `kvg` or `kv`."""
        return self.get_submodule("kvg" if self.gated else "kv")  # type: ignore[return-value]

    def forward(
        self,
        x: Tensor,
        state: UnitState | None = None,
        *,
        segments: Tensor | None = None,
        mask: Tensor | None = None,
        masks: PartMasks = NO_MASKS,
        statistics: bool | None = None,
        impl: Implementation = "auto",
    ) -> AttentionOutput:
        """x [B, T, D]; segments [B, T] documents; mask [B, T] positions that count; statistics default to `self.training`.

        masks: what dropout keeps, in training. With a `DecodingState` T is 1, the state is changed in place, and there is no gradient,
        no commitment and no statistics. Raises ValueError for a state of the other kind of attention.
        """
        projected = self.project(x)
        statistics = self.training if statistics is None else statistics
        if isinstance(state, DecodingState):
            attended, keys = self._step_(projected, state), None
        else:
            attend = self._attend_codes if self.config.attention == "vq" else self._attend_keys
            attended, state, keys = attend(projected, state, segments, mask, masks.sinusoid, statistics, impl)
        attended = attended.transpose(1, 2).flatten(2)
        added = self.out(attended if projected.gate is None else attended * projected.gate)
        if self.training:
            added = drop(added, self.config.residual_dropout, masks.residual)
            added = drop_elements(added, self.config.layer_dropout, masks.layer)
        if keys is None:
            return AttentionOutput(x + added, state, projected.k.new_zeros((), dtype=_wide(projected.k)), None)
        return AttentionOutput(x + added, state, keys.commitment, keys.statistics)

    def project(self, x: Tensor) -> Projected:
        """Queries, keys, values and gates of x [B, T, D]."""
        x = self.norm(x)
        # One product for each part of the weight: slices of one wide result would be strided, and their gradients copied together.
        k, v, *gates = (F.linear(x, weight) for weight in self.key_rows.weight.split(self._rows))
        heads, key_heads = self.config.heads, self.config.num_key_heads
        return Projected(
            q=normalize(_split(self.q(x), heads)) * self.scale,
            k=normalize(_split(k, key_heads)) * self.scale,
            v=_split(F.silu(v) if self.gated else v, key_heads),
            gate=F.silu(gates[0]) if gates else None,
        )

    def scaled_bias(self, bias: Tensor) -> Tensor:
        """[Hq * K] -> [Hq, 1, K], scaled like the queries."""
        return bias.view(self.config.heads, 1, -1) * self.scale

    def _attend_codes(
        self,
        projected: Projected,
        state: UnitState | None,
        segments: Tensor | None,
        mask: Tensor | None,
        kept_sinusoids: Tensor | None,
        statistics: bool,
        impl: Implementation,
    ) -> tuple[Tensor, UnitState, QuantizedKeys | None]:
        config, (q, k, v, _) = self.config, projected
        if state is not None and not isinstance(state, AttentionState):
            raise ValueError(f'state is a {type(state).__name__}: model.attention = "vq" needs an AttentionState')
        keys, codebook = self._quantize(k, mask, statistics)
        # A key that is no number has no code. In training that must not end one process of several in the middle of a step: the quantized
        # key is no number either, so that the loss is none, and the step is given up by all.
        indices = keys.indices.clamp(min=0) if self.training else keys.indices
        position_query, position_keys = self._distances(q, q.dtype, None, kept_sinusoids)
        attended, state = vq_attention(
            q + self.scaled_bias(self.content_bias),
            keys.quantized,
            v,
            indices,
            codebook,
            block_len=config.block_len,
            mem_len=config.mem_len,
            state=state,
            position_query=position_query,
            position_keys=position_keys,
            segments=segments,
            cache=config.cache,
            cache_gradient=config.cache_gradient,
            reduction=config.reduction,
            impl=impl,
        )
        return attended, state, keys

    def _step_(self, projected: Projected, decoding: DecodingState) -> Tensor:
        q, k, v, _ = projected
        position_query = None if self.position_bias is None else q + self.scaled_bias(self.position_bias)
        content_query = q + self.scaled_bias(self.content_bias)
        return step_(content_query, v, codes_of(k, decoding), decoding, position_query, cache=self.config.cache)

    @torch.no_grad()
    def decoding_state(self, state: AttentionState, *, slot: int = 0) -> DecodingState:
        """What single steps carry after `state`; see `vqkit.ops.vq_attention.decoding_state`. It holds codes and position keys of now."""
        if self.quantizer is None:
            raise ValueError('model.attention = "full": there is no codebook')
        codebook = self.quantizer.codes(state.v.device) if isinstance(self.quantizer, SimpleVQ) else self.quantizer.codebook
        return decoding_state(state, codebook, None if self.r is None else self.r(state.v.dtype) * self.scale, slot=slot)

    def _quantize(self, k: Tensor, mask: Tensor | None, statistics: bool) -> tuple[QuantizedKeys, Tensor]:
        """The quantized keys, and the codebook [H, C, K] that they come from."""
        if isinstance(self.quantizer, LearnableVQ):
            return self.quantizer.quantize(k, mask, statistics), self.quantizer.codebook
        if isinstance(self.quantizer, SimpleVQ):
            return self.quantizer.quantize(k, mask), self.quantizer.codes(k.device)
        raise ValueError('model.attention = "full": there is no codebook')

    def _attend_keys(
        self,
        projected: Projected,
        state: UnitState | None,
        segments: Tensor | None,
        mask: Tensor | None,
        kept_sinusoids: Tensor | None,
        statistics: bool,
        impl: Implementation,
    ) -> tuple[Tensor, UnitState, QuantizedKeys | None]:
        q, k, v, _ = projected
        if state is not None and not isinstance(state, KeyValueState):
            raise ValueError(f'state is a {type(state).__name__}: model.attention = "full" needs a KeyValueState')
        if impl not in ("auto", "reference"):
            raise ValueError(f'impl = {impl!r}: model.attention = "full" has "auto" and "reference"')
        # Biases are wider than activations under autocast; the fused form wants one type.
        slots = k.shape[2] + (0 if state is None else state.k.shape[2])
        position_query, position_keys = self._distances(q, v.dtype, slots, kept_sinusoids)
        attended, state = full_attention(
            (q + self.scaled_bias(self.content_bias)).to(v.dtype),
            k.to(v.dtype),
            v,
            state=state,
            position_query=None if position_query is None else position_query.to(v.dtype),
            position_keys=position_keys,
            segments=segments,
            impl=impl,
        )
        return attended, state, None

    def _distances(
        self, q: Tensor, dtype: torch.dtype, slots: int | None, kept_sinusoids: Tensor | None
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """What scores of distances are made of: the queries with their bias, and keys of `dtype`, of `slots` distances or the window's."""
        if self.r is None or self.position_bias is None:
            return None, None
        keys = self.r(dtype, slots, kept_sinusoids, self.config.sinusoid_dropout)
        return q + self.scaled_bias(self.position_bias), keys * self.scale


def _quantizer(config: ModelConfig) -> LearnableVQ | SimpleVQ | None:
    if config.attention == "full":
        return None
    if config.quantizer == "sinusoidal":
        return SimpleVQ(config.num_key_heads, config.codebook_size, config.key_dim, config.position_base)
    return LearnableVQ(config.num_key_heads, config.codebook_size, config.key_dim, config.codebook)


def _split(x: Tensor, heads: int) -> Tensor:
    """[B, T, heads * width] -> [B, heads, T, width], a view; contiguous where there is one head."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
