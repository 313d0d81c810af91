"""Residual LFQ by the names of vector-quantize-pytorch: `vqkit.quantizers.Residual` of LFQ layers, each of half the scale before it.

Shapes: P... positions of the input, d scalars, q layers, G groups.
"""

from __future__ import annotations

import copy
from math import log2
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqkit.compat.vector_quantize_pytorch.arguments import in_these_words
from vqkit.compat.vector_quantize_pytorch.depth import (
    Seeds,
    all_layers,
    check_dropout,
    get_maybe_sync_seed,
    is_distributed,
    layers_taking_part,
    round_up_multiple,
)
from vqkit.compat.vector_quantize_pytorch.groups import Groups
from vqkit.compat.vector_quantize_pytorch.layers import WEIGHED
from vqkit.compat.vector_quantize_pytorch.lookup_free_quantization import INV_TEMPERATURE, LFQ, check_loss_mask, loss_mask
from vqkit.compat.vector_quantize_pytorch.rows import hide, linear, project_out, projected, rows_of
from vqkit.compat.vector_quantize_pytorch.settings import Settable, are_of, check_kinds, is_watched, overrides
from vqkit.quantizers import lfq
from vqkit.quantizers.base import Quantized
from vqkit.quantizers.residual import Residual, stacked

__all__ = ["LFQ", "GroupedResidualLFQ", "ResidualLFQ", "get_maybe_sync_seed", "is_distributed", "round_up_multiple"]


@in_these_words(handed_to=LFQ)
class ResidualLFQ(Settable):
    """As the peer's: x [B, N, dim], images and more [B, dim, ...] -> (quantized, indices [P..., q], losses [q]).

    `channel_first` says where the width of all inputs is. With `return_all_codes` the codes of all layers [q, P..., d] follow. Indices
    of -1: dropped. `mask` is that of `LFQ`.
    With `keep_num_codebooks_dim` an axis of one codebook stands before q, which decoding takes for one of P.
    """

    made_of = frozenset(("layers",))

    native: Residual
    quiet: Residual
    seeds: Seeds
    _natives: list[Any]
    _mixed: dict[tuple[tuple[bool, bool], ...], Residual]

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int,
        codebook_size: int,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        soft_clamp_input_value: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        _refuse_layer_options(kwargs)
        self.quantize_dropout = check_dropout(quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of, num_quantizers)
        codebook_dim = int(log2(codebook_size))
        self.dim = dim
        self.has_projections = codebook_dim != dim
        self.project_in = linear(dim, codebook_dim, self.has_projections)
        self.project_out = linear(codebook_dim, dim, self.has_projections)
        self.num_quantizers = num_quantizers
        clamps = [None if soft_clamp_input_value is None else soft_clamp_input_value * 0.5**number for number in range(num_quantizers)]
        self.layers: Any = nn.ModuleList(
            [
                LFQ(dim=codebook_dim, codebook_scale=2**-number, soft_clamp_input_value=clamp, **kwargs)
                for number, clamp in enumerate(clamps)
            ]
        )
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of
        hide(self, seeds=Seeds())
        self._build()

    def _build(self) -> None:
        layers = [*self.layers]
        check_kinds(layers, LFQ)
        natives = {name: Residual([getattr(layer, name) for layer in layers], estimator="layers") for name in ("native", "quiet")}
        hide(self, _natives=[layer.native for layer in layers], _mixed={}, **natives)

    def _settle(self) -> Residual:
        """The native quantizer, of the layers and their modes of now."""
        layers = self._modules["layers"]._modules.values()  # type: ignore[union-attr]
        if not are_of(layers, self._natives):
            self._build()
        alike = True
        for layer in layers:
            layer.settle()
            alike = alike and layer.training is self.training and not is_watched(layer, LFQ)
        if alike:
            return self.native if self.training else self.quiet
        modes = tuple((layer.training, is_watched(layer, LFQ)) for layer in layers)
        if modes not in self._mixed:
            parts = [_called(layer) if watched else _alone(layer) for layer, (_, watched) in zip(layers, modes, strict=True)]
            self._mixed[modes] = Residual(parts, estimator="layers")
        return self._mixed[modes]

    @property
    def codebooks(self) -> Tensor:
        """[q, C, d], the codes of the layers as they are added up."""
        return torch.stack([layer.codes() for layer in self.layers])

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Indices of a call, all or those of the first layers -> the codes of all layers [q, P..., d], zeros for -1 and what is missing."""
        return all_layers(self._settle().decode_layers(indices).to(self._first.dtype), self.num_quantizers)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """Indices of a call, all or those of the first layers -> its output: [B, dim, ...] of images, whose indices have 4 axes or more."""
        own = overrides(self, ResidualLFQ, "get_codes_from_indices")
        codes = self.get_codes_from_indices(indices).sum(0) if own else self._settle().decode_codes(indices).to(self._first.dtype)
        output = project_out(self.project_out, codes, indices)
        return output.movedim(-1, 1) if self._is_first(indices.dim() - self._keeps) else output

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        return_all_codes: bool = False,
        rand_quantize_dropout_fixed_seed: int | None = None,
    ) -> tuple[Tensor, ...]:
        native = self._settle()
        layer = self._first
        first = _is_first(layer, x.dim())
        rows = rows_of(x, self.dim, first)
        depth = len(self._natives)
        if self.training and self.quantize_dropout:
            seed = self.seeds.draw() if rand_quantize_dropout_fixed_seed is None else rand_quantize_dropout_fixed_seed
            drawn = layers_taking_part(seed, self.quantize_dropout_cutoff_index, self.quantize_dropout_multiple_of, self.num_quantizers)
            depth = min(drawn, depth)
        options: dict[str, Any] = {"depth": depth}
        if mask is not None:
            check_loss_mask(mask, rows.shape[:-1])
        learns = native is not self.quiet
        if learns:
            options |= {"temperature": 1.0 / INV_TEMPERATURE, "loss_mask": loss_mask(mask, rows.shape[:-1])}
        vectors, finite = projected(self.project_in, rows)
        found = native.quantize_vectors(vectors if learns else vectors.detach(), finite, freeze_codebook=True, **options)
        output = project_out(self.project_out, found.quantized, None if finite is None else found.indices)
        output = output.movedim(-1, 1) if first else output
        indices = found.indices.unsqueeze(-2) if layer.keep_num_codebooks_dim else found.indices
        result = (output, indices, self._losses(found.losses, depth) if found.losses else layer.zero.new_zeros(len(self._natives)))
        if not return_all_codes:
            return result
        if overrides(self, ResidualLFQ, "get_codes_from_indices"):
            return (*result, self.get_codes_from_indices(indices))
        codes = all_layers(torch.stack([*found.outputs]).detach(), self.num_quantizers)
        return (*result, codes.unsqueeze(-2) if layer.keep_num_codebooks_dim else codes)

    @property
    def _first(self) -> LFQ:
        """The first layer, without the price of asking a list of modules for it."""
        return next(iter(self._modules["layers"]._modules.values()))  # type: ignore[union-attr, return-value]

    def _is_first(self, rank: int) -> bool:
        """Whether an input of this rank, or one that gives indices of this rank, has its width first."""
        return _is_first(self._first, rank)

    @property
    def _keeps(self) -> bool:
        """Whether indices have an axis of one codebook before that of the layers."""
        return self._first.keep_num_codebooks_dim

    def _losses(self, losses: dict[str, Tensor], depth: int) -> Tensor:
        """[q], 0 for layers that took no part."""
        layers, number = [*self.layers], len(self._natives)
        if _weighs_alike(layers):
            names = layers[0].native.loss_weights
            found = layers[0].weigh({name: stacked([losses[f"{name}/{layer}"] for layer in range(depth)]) for name in names})
            return found if depth == number else F.pad(found, (0, number - depth))
        each = [{name.partition("/")[0]: loss for name, loss in losses.items() if name.endswith(f"/{layer}")} for layer in range(number)]
        return torch.stack([own.get(WEIGHED, layer.weigh(own)) for layer, own in zip(layers, each, strict=True)])


def _is_first(layer: LFQ, rank: int) -> bool:
    return rank >= 4 if layer.channel_first is None else bool(layer.channel_first)


def _weighs_alike(layers: list[LFQ]) -> bool:
    """Whether all layers weigh their losses alike, all are in training, and none is called itself."""
    if any(is_watched(layer, LFQ) for layer in layers):
        return False
    first, *others = ((layer.training, *(getattr(layer, name) for name in _WEIGHTS)) for layer in layers)
    return first[0] and all(weights == first for weights in others)


class _Quiet(lfq.LFQ):
    """Of a layer in eval mode among others in training: no gradient passes it."""

    def quantize_vectors(self, vectors: Tensor, *args: Any, **options: Any) -> Quantized:
        return super().quantize_vectors(vectors.detach(), *args, **options)

    def _quantize(self, x: Tensor, *args: Any, **options: Any) -> Quantized:
        return super()._quantize(x.detach(), *args, **options)


class _Called(lfq.LFQ):
    """Of a layer that is called itself, as it has hooks or a forward of its own."""

    layer: LFQ

    def quantize_vectors(self, vectors: Tensor, *_: Any, loss_mask: Tensor | None = None, **__: Any) -> Quantized:
        mask = None if loss_mask is None else loss_mask.flatten(1)
        output, indices, loss = self.layer(vectors.flatten(1, -2), mask=mask)
        losses = {WEIGHED: loss} if self.layer.training else {}
        return Quantized(output.reshape(vectors.shape), indices.reshape(vectors.shape[:-1]), losses, None)

    def quantize(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        freeze_codebook: bool = False,
        indices: Tensor | None = None,
        temperature: float | None = None,
        loss_mask: Tensor | None = None,
    ) -> Quantized:
        return self.quantize_vectors(x, loss_mask=loss_mask)


def _alone(layer: LFQ) -> lfq.LFQ:
    return layer.native if layer.training else _quiet(layer)


def _called(layer: LFQ) -> lfq.LFQ:
    found = copy.copy(layer.native)
    found.__class__ = _Called
    hide(found, layer=layer)
    return found


def _quiet(layer: LFQ) -> lfq.LFQ:
    found = copy.copy(layer.quiet)
    found.__class__ = _Quiet
    return found


_WEIGHTS = (
    "entropy_loss_weight",
    "diversity_gamma",
    "commitment_loss_weight",
    "experimental_softplus_entropy_loss",
    "entropy_loss_offset",
)


def _refuse_layer_options(options: dict[str, Any]) -> None:
    """Raise ValueError for options of LFQ that have no meaning for a layer."""
    only = {"num_codebooks": 1, "has_projections": False}
    for name, value in only.items():
        if options.get(name, value) not in (value, None):
            raise ValueError(f"{name} = {options[name]!r}: must be {value!r} in the layers of a residual quantizer")


@in_these_words(handed_to=ResidualLFQ)
class GroupedResidualLFQ(Groups):
    """As the peer's: `groups` times a `ResidualLFQ`, each on its part of the width; indices [G, P..., q], losses [G, q].

    With `accept_image_fmap` inputs are [B, dim, ...], and so are outputs and what indices decode to.
    """

    seeds: Seeds

    def __init__(self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **kwargs: Any) -> None:
        super().__init__(dim, groups, accept_image_fmap, lambda width: ResidualLFQ(dim=width, **kwargs))
        hide(self, seeds=Seeds())

    def forward(self, x: Tensor, mask: Tensor | None = None, return_all_codes: bool = False) -> tuple[Any, ...]:
        pieces = self._pieces(x)
        seed = self.seeds.draw() if self.training else None
        found = [rvq(piece, mask, return_all_codes, seed) for rvq, piece in zip(self.rvqs, pieces, strict=True)]
        output, (indices, losses, *codes) = self._joined(found)
        return (output, torch.stack(indices), torch.stack(losses), *codes)
