"""Residual LFQ by the names of vector-quantize-pytorch: `vqkit.quantizers.Residual` of LFQ layers, each of half the scale before it.

Shapes: P... positions of the input, d scalars, q layers, G groups.
"""

from __future__ import annotations

from math import log2
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Module

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
from vqkit.compat.vector_quantize_pytorch.lookup_free_quantization import INV_TEMPERATURE, LFQ, check_loss_mask, loss_mask
from vqkit.compat.vector_quantize_pytorch.rows import hide, linear, project_out, projected, rows_of
from vqkit.quantizers.residual import Residual

__all__ = ["LFQ", "GroupedResidualLFQ", "ResidualLFQ", "get_maybe_sync_seed", "is_distributed", "round_up_multiple"]


@in_these_words(handed_to=LFQ)
class ResidualLFQ(Module):
    """As the peer's: x [B, N, dim], images and more [B, dim, ...] -> (quantized, indices [P..., q], losses [q]).

    With `return_all_codes` the codes of all layers [q, P..., d] follow. Indices of -1: dropped. `mask` is that of `LFQ`.
    """

    native: Residual
    quiet: Residual
    seeds: Seeds

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
        natives = {name: Residual([getattr(layer, name) for layer in self.layers], estimator="layers") for name in ("native", "quiet")}
        hide(self, seeds=Seeds(), **natives)

    def _settle(self) -> Residual:
        for layer in self.layers:
            layer.settle()
        return self.native if self.training else self.quiet

    @property
    def codebooks(self) -> Tensor:
        """[q, C, d], the codes of the layers as they are added up."""
        return torch.stack([layer.codes() for layer in self.layers])

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Indices of a call, all or those of the first layers -> the codes of all layers [q, P..., d], zeros for -1 and what is missing."""
        return all_layers(self._settle().decode_layers(indices), self.num_quantizers)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """Indices of a call, all or those of the first layers -> its output: [B, dim, ...] of images, whose indices have 4 axes or more."""
        codes = self._settle().decode_codes(indices)
        output = project_out(self.project_out, codes, indices)
        return output.movedim(-1, 1) if indices.dim() >= 4 else output

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        return_all_codes: bool = False,
        rand_quantize_dropout_fixed_seed: int | None = None,
    ) -> tuple[Tensor, ...]:
        image = x.dim() >= 4
        rows = rows_of(x, self.dim, image)
        depth = self.num_quantizers
        if self.training and self.quantize_dropout:
            seed = self.seeds.draw() if rand_quantize_dropout_fixed_seed is None else rand_quantize_dropout_fixed_seed
            depth = layers_taking_part(seed, self.quantize_dropout_cutoff_index, self.quantize_dropout_multiple_of, depth)
        options: dict[str, Any] = {"depth": depth}
        if mask is not None:
            check_loss_mask(mask, rows.shape[:-1])
        if self.training:
            options |= {"temperature": 1.0 / INV_TEMPERATURE, "loss_mask": loss_mask(mask, rows.shape[:-1])}
        vectors, finite = projected(self.project_in, rows)
        found = self._settle().quantize_vectors(vectors if self.training else vectors.detach(), finite, freeze_codebook=True, **options)
        output = project_out(self.project_out, found.quantized, None if finite is None else found.indices)
        output = output.movedim(-1, 1) if image else output
        result = (output, found.indices, self._losses(found.losses, depth))
        return (*result, all_layers(torch.stack([*found.outputs]).detach(), self.num_quantizers)) if return_all_codes else result

    def _losses(self, losses: dict[str, Tensor], depth: int) -> Tensor:
        """[q], 0 for layers that took no part."""
        first: Any = self.layers[0]
        if not losses:
            return first.zero.new_zeros(self.num_quantizers)
        names = first.native.loss_weights
        found = first.weigh({name: torch.stack([losses[f"{name}/{number}"] for number in range(depth)]) for name in names})
        return found if depth == self.num_quantizers else F.pad(found, (0, self.num_quantizers - depth))


def _refuse_layer_options(options: dict[str, Any]) -> None:
    """Raise ValueError for options of LFQ that have no meaning for a layer."""
    only = {"num_codebooks": 1, "channel_first": None, "has_projections": False, "keep_num_codebooks_dim": False}
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
