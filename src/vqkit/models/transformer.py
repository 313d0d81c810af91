"""Transformer-VQ: embeddings, layers of attention and maybe feed-forward, logits; every call can go on where another stopped.

Shapes: B batch, T time, D width, H key heads, K key width, V value width, M window memory, C codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqkit.models.attention import AttentionUnit, Implementation, UnitState
from vqkit.models.config import ModelConfig
from vqkit.models.dropout import NO_MASKS, DropoutMasks, PartMasks, SequenceMasks, draw_keep, drop
from vqkit.models.embedding import Logits, TokenEmbedding
from vqkit.models.feed_forward import FeedForward
from vqkit.models.hub import Pretrained
from vqkit.models.norm import RMSNorm
from vqkit.models.positions import ScaledSinusoids, count_positions
from vqkit.ops.codebook import CodebookStatistics
from vqkit.ops.full_attention import KeyValueState, empty_state
from vqkit.ops.vq_attention import AttentionState, DecodingState, initial_state
from vqkit.quantizers.learnable import LearnableVQ


class ModelState(NamedTuple):
    """What a model carries from one call to the next; with quantized keys its size does not depend on the number of tokens."""

    position: Tensor  # [B] int64, tokens of the current document so far
    segment: Tensor  # [B] int64, that document; -1 before any token, 0 where documents are not told apart
    attention: tuple[UnitState, ...]  # one a unit, in order; `DecodingState`s for single steps in place
    masks: SequenceMasks | None = None  # dropout decided for the whole sequence; None where no such dropout is on, and in evaluation

    def detach(self) -> ModelState:
        """The same state, cut from the graph that made it."""
        return self._replace(attention=tuple(state.detach() for state in self.attention))


class ModelOutput(NamedTuple):
    """What one call returns; `statistics` is empty where none were asked for, or no codebook learns."""

    logits: Tensor  # [B, T, vocab_size], float32 or wider
    state: ModelState
    commitment: Tensor  # scalar, summed over units
    statistics: tuple[CodebookStatistics, ...]  # one a unit, in order


class LayerOutput(NamedTuple):
    """What one layer returns, with one state and one statistics a unit."""

    output: Tensor  # [B, T, D]
    states: tuple[UnitState, ...]
    commitment: Tensor
    statistics: tuple[CodebookStatistics, ...]


class Layer(nn.Module):
    """Two parts, one after the other, each added to the residual stream: two attention units, or one and a feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = nn.ModuleList(AttentionUnit(config) for _ in range(config.attentions_per_layer))
        self.feed_forward = FeedForward(config) if config.layer == "feed_forward" else None

    def forward(
        self,
        x: Tensor,
        states: Sequence[UnitState | None] | None = None,
        *,
        segments: Tensor | None = None,
        mask: Tensor | None = None,
        masks: Sequence[PartMasks] = (NO_MASKS, NO_MASKS),
        statistics: bool | None = None,
        impl: Implementation = "auto",
    ) -> LayerOutput:
        """x [B, T, D], the state of each unit and the dropout masks of each part; the rest as in `TransformerVQ.forward`."""
        states = [None] * len(self.attention) if states is None else states
        outputs = []
        for unit, state, own in zip(self.attention, states, masks, strict=False):
            outputs.append(unit(x, state, segments=segments, mask=mask, masks=own, statistics=statistics, impl=impl))
            x = outputs[-1].output
        if self.feed_forward is not None:
            x = self.feed_forward(x, masks=masks[1])
        commitment = outputs[0].commitment if len(outputs) == 1 else outputs[0].commitment + outputs[1].commitment
        counted = tuple(o.statistics for o in outputs if o.statistics is not None)
        return LayerOutput(x, tuple(o.state for o in outputs), commitment, counted)


class TransformerVQ(Pretrained, nn.Module):
    """The decoder of "Transformer-VQ: Linear-Time Transformers via Vector Quantization" (Lingle 2024, arXiv 2309.16354)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        has_table = config.tied or config.input == "tokens"
        self.embedding = TokenEmbedding(config.vocab_size, config.dim) if has_table else None
        self.positions = ScaledSinusoids(config.dim, config.position_base) if config.absolute_positions else None
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim, affine=config.norm == "affine") if config.output_norm else None
        self.logits = Logits(
            config.vocab_size,
            config.dim,
            tied=config.tied,
            bias=config.tied_bias or not config.tied,
            scale=config.logit_scale,
            scale_at=config.logit_scale_at,
        )

    def forward(
        self,
        inputs: Tensor,
        state: ModelState | None = None,
        *,
        segments: Tensor | None = None,
        mask: Tensor | None = None,
        statistics: bool | None = None,
        impl: Implementation = "auto",
        dropout: DropoutMasks | None = None,
    ) -> ModelOutput:
        """Logits of the token after each input.

        Args:
            inputs: Tokens [B, T] int64, or features [B, T, D] where config.input is "features".
            state: What an earlier call returned; None for the start.
            segments: Document of each token, [B, T] int64 from 0 on, never decreasing along T and from call to call; tokens see
                their own document only and positions restart with each. None: all tokens are one document.
            mask: Positions that count in commitment and statistics, [B, T] bool; None for all.
            statistics: Whether to return the statistics that codebooks learn from; default `self.training`.
            impl: Implementation of the attention, see `vq_attention`; ordinary attention has "auto" and "reference".
            dropout: In training, what this call keeps; None to draw it. What is kept for a whole sequence stands in the state.

        Raises:
            ValueError: a shape, type or value that does not fit, a state of another model or batch; before anything is computed.
        """
        self._check(inputs, state, segments, mask, impl)
        self._check_dropout(dropout, inputs)
        batch, time = inputs.shape[:2]
        state = self.initial_state(batch) if state is None else state
        masks = self.sequence_masks(state, batch, time)
        if segments is None:
            positions = state.position[:, None] + torch.arange(time, device=inputs.device)
            segment = torch.zeros_like(state.segment)
        else:
            positions = count_positions(state.position, state.segment, segments)
            segment = segments[:, -1].clone()

        x = self._embed(inputs, positions, dropout)
        options = {"segments": segments, "mask": mask if self.config.masked_keys == "left_out" else None}
        options |= {"statistics": self.training if statistics is None else statistics, "impl": impl}
        layers = self._run_layers(x, state.attention, self._part_masks(masks if self.training else None, dropout), options)
        x = layers.output if self.norm is None else self.norm(layers.output)
        logits = self.logits(x, self.embedding.weight if self.config.tied and self.embedding is not None else None)
        after = ModelState(positions[:, -1] + 1, segment, layers.states, masks)
        return ModelOutput(logits, after, layers.commitment, layers.statistics)

    def initial_state(self, batch: int) -> ModelState:
        """The state before any token, in the type and on the device of the parameters.

        In training mode this draws the dropout masks that live as long as the sequence.
        """
        config, like = self.config, self.like
        attention: list[UnitState] = []
        for _ in range(config.layers * config.attentions_per_layer):
            if config.attention == "full":
                sizes = (batch, config.num_key_heads, config.key_dim, config.value_dim)
                attention.append(empty_state(*sizes, dtype=like.dtype, device=like.device))
            else:
                sizes = (batch, config.num_key_heads, config.mem_len, config.codebook_size, config.key_dim, config.value_dim)
                attention.append(initial_state(*sizes, dtype=like.dtype, device=like.device))
        position = torch.zeros(batch, dtype=torch.int64, device=like.device)
        return ModelState(position, torch.full_like(position, -1), tuple(attention), self._draw_sequence_masks(batch))

    @property
    def like(self) -> Tensor:
        """A parameter with the type and device of a new state."""
        return self.logits.bias if self.logits.bias is not None else next(self.logits.parameters(), next(self.parameters()))

    def quantizers(self) -> list[LearnableVQ]:
        """The quantizer of each attention unit, in order; none where no codebook learns."""
        return [unit.quantizer for unit in self.units() if isinstance(unit.quantizer, LearnableVQ)]

    def units(self) -> list[AttentionUnit]:
        """All attention units, in order."""
        return [module for module in self.modules() if isinstance(module, AttentionUnit)]

    def _embed(self, inputs: Tensor, positions: Tensor, dropout: DropoutMasks | None) -> Tensor:
        x = inputs if self.config.input == "features" or self.embedding is None else self.embedding(inputs)
        if self.positions is not None:
            x = x + self.positions(positions).to(x.dtype)
        return drop(x, self.config.embedding_dropout, None if dropout is None else dropout.embedding) if self.training else x

    def _run_layers(self, x: Tensor, states: Sequence[UnitState], masks: Sequence[PartMasks], options: dict[str, Any]) -> LayerOutput:
        """All layers in turn, as if they were one; each computed again in the backward pass where the configuration says so."""
        config = self.config
        recompute = config.recompute and torch.is_grad_enabled()
        after: list[UnitState] = []
        commitments: list[Tensor] = []
        counted: list[CodebookStatistics] = []
        for i, layer in enumerate(self.layers):
            own = states[i * config.attentions_per_layer : (i + 1) * config.attentions_per_layer]
            call = partial(layer, masks=masks[2 * i : 2 * i + 2], **options)
            if recompute:
                # The state of the random generator matters to residual dropout alone: all other noise is drawn outside.
                draws = self.training and config.residual_dropout > 0.0
                out = checkpoint(call, x, own, use_reentrant=False, preserve_rng_state=draws)
            else:
                out = call(x, own)
            x = out.output
            after.extend(out.states)
            counted.extend(out.statistics)
            commitments.append(out.commitment)
        return LayerOutput(x, tuple(after), torch.stack(commitments).sum(), tuple(counted))

    # Dropout

    def _draw_sequence_masks(self, batch: int) -> SequenceMasks | None:
        config, device = self.config, self.like.device
        if not self.training or (config.sinusoid_dropout == 0.0 and config.layer_dropout == 0.0):
            return None
        units = config.layers * config.attentions_per_layer if config.sinusoid_dropout > 0.0 else 0
        distances = config.mem_len + 1 if config.attention == "vq" else 0
        parts = 2 * config.layers if config.layer_dropout > 0.0 else 0
        return SequenceMasks(
            sinusoid=tuple(draw_keep(distances, config.dim, rate=config.sinusoid_dropout, device=device) for _ in range(units)),
            layer=tuple(draw_keep(batch, rate=config.layer_dropout, device=device) for _ in range(parts)),
        )

    def sequence_masks(self, state: ModelState, batch: int, time: int) -> SequenceMasks | None:
        """Dropout masks for `time` tokens after `state`, which rows of one batch that are worked off one after another must share.

        Those of the state; in training drawn where it has none, and drawn on for distances that ordinary attention first meets here.
        """
        masks = self._draw_sequence_masks(batch) if state.masks is None else state.masks
        if not self.training or masks is None or not masks.sinusoid or not isinstance(state.attention[0], KeyValueState):
            return masks
        config, device = self.config, self.like.device
        more = max(0, state.attention[0].k.shape[2] + time - masks.sinusoid[0].shape[0])
        grown = (torch.cat([m, draw_keep(more, config.dim, rate=config.sinusoid_dropout, device=device)]) for m in masks.sinusoid)
        return masks._replace(sinusoid=tuple(grown))

    def _part_masks(self, masks: SequenceMasks | None, dropout: DropoutMasks | None) -> list[PartMasks]:
        """Of each part of each layer, two a layer."""
        per_layer, found = self.config.attentions_per_layer, []
        for i in range(2 * self.config.layers):
            layer, part = divmod(i, 2)
            unit = layer * per_layer + part if part < per_layer else None
            found.append(
                PartMasks(
                    sinusoid=masks.sinusoid[unit] if unit is not None and masks is not None and masks.sinusoid else None,
                    layer=masks.layer[i] if masks is not None and masks.layer else None,
                    residual=dropout.residual[unit] if unit is not None and dropout is not None and dropout.residual else None,
                )
            )
        return found

    # Checks

    def _check(self, inputs: Tensor, state: ModelState | None, segments: Tensor | None, mask: Tensor | None, impl: str) -> None:
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
        if self.config.attention == "full" and impl not in ("auto", "reference"):
            raise ValueError(f'impl = {impl!r}: model.attention = "full" has "auto" and "reference"')
        if state is not None:
            self.check_state(state, shape[0])
        if segments is not None:
            _check_segments(segments, shape[:2], state)

    def check_state(self, state: ModelState, batch: int) -> None:
        """Raise ValueError unless `state` is one of this model with this batch."""
        config = self.config
        units = config.layers * config.attentions_per_layer
        if len(state.attention) != units:
            raise ValueError(f"state is that of {len(state.attention)} attention units: this model has {units}")
        if state.position.shape != (batch,):
            raise ValueError(f"state is that of a batch of {state.position.shape[0]}: inputs has a batch of {batch}")
        kind = KeyValueState if config.attention == "full" else AttentionState
        for i, attention in enumerate(state.attention):
            if not isinstance(attention, kind) and not (kind is AttentionState and isinstance(attention, DecodingState)):
                needs = f'model.attention = "{config.attention}" needs a {kind.__name__}'
                raise ValueError(f"state.attention[{i}] is a {type(attention).__name__}: {needs}")
            for name, shape in self._state_shapes(attention, batch).items():
                found = tuple(getattr(attention, name).shape)
                if found != shape:
                    raise ValueError(f"state.attention[{i}].{name} has shape {found}: this model needs {shape}")
        if state.masks is not None:
            self._check_sequence_masks(state.masks, batch)

    def _state_shapes(self, state: UnitState, batch: int) -> dict[str, tuple[int, ...]]:
        config = self.config
        heads = config.num_key_heads
        if isinstance(state, AttentionState):
            return {
                "k_hat": (batch, heads, config.mem_len, config.key_dim),
                "mean": (batch, heads, config.codebook_size, config.value_dim),
            }
        if isinstance(state, DecodingState):
            rows = config.mem_len + 1 + config.codebook_size
            return {"keys": (batch, heads, rows, config.key_dim), "values": (batch, heads, rows, config.value_dim)}
        slots = state.present.shape[-1]
        return {
            "present": (batch, slots),
            "segment": (batch, slots),
            "k": (batch, heads, slots, config.key_dim),
            "v": (batch, heads, slots, config.value_dim),
        }

    def _check_sequence_masks(self, masks: SequenceMasks, batch: int) -> None:
        config = self.config
        units = config.layers * config.attentions_per_layer if config.sinusoid_dropout > 0.0 else 0
        parts = 2 * config.layers if config.layer_dropout > 0.0 else 0
        rows = config.mem_len + 1 if config.attention == "vq" else masks.sinusoid[0].shape[0] if masks.sinusoid else 0
        for name, tensors, number, shape in (
            ("sinusoid", masks.sinusoid, units, (rows, config.dim)),
            ("layer", masks.layer, parts, (batch,)),
        ):
            _check_masks(f"state.masks.{name}", tensors, number, shape)

    def _check_dropout(self, dropout: DropoutMasks | None, inputs: Tensor) -> None:
        if dropout is None:
            return
        if not self.training:
            raise ValueError("dropout is given in evaluation: must be None there, where nothing is dropped")
        config, shape = self.config, (*inputs.shape[:2], self.config.dim)
        if dropout.embedding is not None:
            _check_masks("dropout.embedding", (dropout.embedding,), int(config.embedding_dropout > 0.0), shape)
        if dropout.residual:
            units = config.layers * config.attentions_per_layer if config.residual_dropout > 0.0 else 0
            _check_masks("dropout.residual", dropout.residual, units, shape)


def _check_masks(name: str, masks: Sequence[Tensor], number: int, shape: tuple[int, ...]) -> None:
    if len(masks) != number:
        raise ValueError(f"{name} has {len(masks)} masks: this model needs {number}")
    for mask in masks:
        if mask.dtype != torch.bool or tuple(mask.shape) != shape:
            raise ValueError(f"{name} has a mask of shape {tuple(mask.shape)} and type {mask.dtype}: must be {shape} of type bool")


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
