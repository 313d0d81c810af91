"""Transformer-VQ: embeddings, layers of two gated VQ attention units, logits; every call can go on where another stopped.

Shapes: B batch, T time, D width, H heads, K key width, V value width, M window memory, C codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vqkit.models.attention import GatedVQAttention
from vqkit.models.config import ModelConfig
from vqkit.models.embedding import Logits, TokenEmbedding
from vqkit.models.hub import Pretrained
from vqkit.models.norm import RMSNorm
from vqkit.models.positions import ScaledSinusoids, count_positions
from vqkit.ops.codebook import CodebookStatistics
from vqkit.ops.vq_attention import AttentionState, initial_state
from vqkit.ops.vq_attention.api import Implementation
from vqkit.quantizers.learnable import LearnableVQ


class ModelState(NamedTuple):
    """What a model carries from one call to the next; its size does not depend on the number of tokens."""

    position: Tensor  # [B] int64, tokens of the current document so far
    segment: Tensor  # [B] int64, that document; -1 before any token, 0 where documents are not told apart
    attention: tuple[AttentionState, ...]  # one a unit, in order

    def detach(self) -> ModelState:
        """The same state, cut from the graph that made it."""
        return ModelState(self.position, self.segment, tuple(state.detach() for state in self.attention))


class ModelOutput(NamedTuple):
    """What one call returns; `statistics` is empty where none were asked for."""

    logits: Tensor  # [B, T, vocab_size], float32 or wider
    state: ModelState
    commitment: Tensor  # scalar, summed over units
    statistics: tuple[CodebookStatistics, ...]  # one a unit, in order


class LayerOutput(NamedTuple):
    """What one layer returns, with one state and one statistics a unit."""

    output: Tensor  # [B, T, D]
    states: tuple[AttentionState, ...]
    commitment: Tensor
    statistics: tuple[CodebookStatistics, ...]


class Layer(nn.Module):
    """Two gated VQ attention units, one after the other; there is no feed-forward part."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = nn.ModuleList([GatedVQAttention(config), GatedVQAttention(config)])

    def forward(
        self,
        x: Tensor,
        states: Sequence[AttentionState | None] = (None, None),
        *,
        segments: Tensor | None = None,
        mask: Tensor | None = None,
        statistics: bool | None = None,
        impl: Implementation = "auto",
    ) -> LayerOutput:
        """x [B, T, D] and the state of each unit; the rest as in `TransformerVQ.forward`."""
        outputs = []
        for unit, state in zip(self.attention, states, strict=True):
            outputs.append(unit(x, state, segments=segments, mask=mask, statistics=statistics, impl=impl))
            x = outputs[-1].output
        counted = tuple(o.statistics for o in outputs if o.statistics is not None)
        return LayerOutput(x, tuple(o.state for o in outputs), outputs[0].commitment + outputs[1].commitment, counted)


class TransformerVQ(Pretrained, nn.Module):
    """The decoder of "Transformer-VQ: Linear-Time Transformers via Vector Quantization" (Lingle 2024, arXiv 2309.16354)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        has_table = config.tied or config.input == "tokens"
        self.embedding = TokenEmbedding(config.vocab_size, config.dim) if has_table else None
        self.positions = ScaledSinusoids(config.dim, config.position_base) if config.absolute_positions else None
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim) if config.output_norm else None
        self.logits = Logits(config.vocab_size, config.dim, tied=config.tied, scale=config.logit_scale)

    def forward(
        self,
        inputs: Tensor,
        state: ModelState | None = None,
        *,
        segments: Tensor | None = None,
        mask: Tensor | None = None,
        statistics: bool | None = None,
        impl: Implementation = "auto",
    ) -> ModelOutput:
        """Logits of the token after each input.

        Args:
            inputs: Tokens [B, T] int64, or features [B, T, D] where config.input is "features".
            state: What an earlier call returned; None for the start.
            segments: Document of each token, [B, T] int64 from 0 on, never decreasing along T and from call to call; tokens see
                their own document only and positions restart with each. None: all tokens are one document.
            mask: Positions that count in commitment and statistics, [B, T] bool; None for all.
            statistics: Whether to return the statistics that codebooks learn from; default `self.training`.
            impl: Implementation of the attention, see `vq_attention`.

        Raises:
            ValueError: a shape, type or value that does not fit, a state of another model or batch; before anything is computed.
        """
        self._check(inputs, state, segments, mask)
        batch, time = inputs.shape[:2]
        state = self.initial_state(batch) if state is None else state
        if segments is None:
            positions = state.position[:, None] + torch.arange(time, device=inputs.device)
            segment = torch.zeros_like(state.segment)
        else:
            positions = count_positions(state.position, state.segment, segments)
            segment = segments[:, -1].clone()

        x = inputs if self.config.input == "features" or self.embedding is None else self.embedding(inputs)
        if self.positions is not None:
            x = x + self.positions(positions).to(x.dtype)
        states: list[AttentionState] = []
        commitments: list[Tensor] = []
        counted: list[CodebookStatistics] = []
        for layer in self.layers:
            units = state.attention[len(states) : len(states) + 2]
            out = layer(x, units, segments=segments, mask=mask, statistics=statistics, impl=impl)
            x = out.output
            states.extend(out.states)
            counted.extend(out.statistics)
            commitments.append(out.commitment)
        if self.norm is not None:
            x = self.norm(x)
        logits = self.logits(x, self.embedding.weight if self.config.tied and self.embedding is not None else None)
        return ModelOutput(logits, ModelState(positions[:, -1] + 1, segment, tuple(states)), torch.stack(commitments).sum(), tuple(counted))

    def initial_state(self, batch: int) -> ModelState:
        """The state before any token, in the type and on the device of the parameters."""
        config, like = self.config, self.logits.bias
        sizes = (batch, config.heads, config.mem_len, config.codebook_size, config.key_dim, config.value_dim)
        attention = tuple(initial_state(*sizes, dtype=like.dtype, device=like.device) for _ in range(2 * config.layers))
        position = torch.zeros(batch, dtype=torch.int64, device=like.device)
        return ModelState(position, torch.full_like(position, -1), attention)

    def quantizers(self) -> list[LearnableVQ]:
        """The quantizer of each attention unit, in order."""
        return [unit.quantizer for unit in self.units()]

    def units(self) -> list[GatedVQAttention]:
        """All attention units, in order."""
        return [module for module in self.modules() if isinstance(module, GatedVQAttention)]

    def _check(self, inputs: Tensor, state: ModelState | None, segments: Tensor | None, mask: Tensor | None) -> None:
        shape, floating = tuple(inputs.shape), inputs.is_floating_point()
        if self.config.input == "features":
            if not floating or len(shape) != 3 or shape[2] != self.config.dim:
                raise ValueError(f"inputs has shape {shape} and type {inputs.dtype}: must be float features [B, T, {self.config.dim}]")
        elif inputs.dtype not in (torch.int64, torch.int32) or len(shape) != 2:
            raise ValueError(f"inputs has shape {shape} and type {inputs.dtype}: must be token ids [B, T] of type int64")
        if 0 in shape:
            raise ValueError(f"inputs has shape {shape}: needs at least one token")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != shape[:2]):
            raise ValueError(f"mask has shape {tuple(mask.shape)} and type {mask.dtype}: must be {shape[:2]} of type bool")
        if state is not None:
            self._check_state(state, shape[0])
        if segments is not None:
            _check_segments(segments, shape[:2], state)

    def _check_state(self, state: ModelState, batch: int) -> None:
        config = self.config
        if len(state.attention) != 2 * config.layers:
            raise ValueError(f"state is that of {len(state.attention)} attention units: this model has {2 * config.layers}")
        if state.position.shape != (batch,):
            raise ValueError(f"state is that of a batch of {state.position.shape[0]}: inputs has a batch of {batch}")
        expected = {
            "k_hat": (batch, config.heads, config.mem_len, config.key_dim),
            "mean": (batch, config.heads, config.codebook_size, config.value_dim),
        }
        for i, attention in enumerate(state.attention):
            for name, shape in expected.items():
                found = tuple(getattr(attention, name).shape)
                if found != shape:
                    raise ValueError(f"state.attention[{i}].{name} has shape {found}: this model needs {shape}")


def _check_segments(segments: Tensor, shape: tuple[int, ...], state: ModelState | None) -> None:
    if segments.dtype != torch.int64 or segments.shape != shape:
        raise ValueError(f"segments has shape {tuple(segments.shape)} and type {segments.dtype}: must be {shape} of type int64")
    if segments.device.type != "cpu" or torch.compiler.is_compiling():
        return
    before = torch.zeros_like(segments[:, 0]) if state is None else state.segment.clamp(min=0)
    falls = torch.diff(segments, dim=1, prepend=before[:, None]) < 0
    if falls.any():
        row, at = falls.nonzero()[0].tolist()
        raise ValueError(f"segments[{row}, {at}] = {int(segments[row, at])}: must be at least 0 and never less than before it")
