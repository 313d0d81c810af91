"""Residual SimVQ by the names of vector-quantize-pytorch: the sum of `SimVQ` layers, each of what those before it leave.

Shapes: P... positions of the input, q layers, C codes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import ModuleList

from vqkit.compat.vector_quantize_pytorch.arguments import in_these_words
from vqkit.compat.vector_quantize_pytorch.depth import (
    Seeds,
    check_dropout,
    get_maybe_sync_seed,
    is_distributed,
    layers_taking_part,
    round_up_multiple,
)
from vqkit.compat.vector_quantize_pytorch.rows import hide
from vqkit.compat.vector_quantize_pytorch.settings import Settable
from vqkit.compat.vector_quantize_pytorch.sim_vq import SimVQ
from vqkit.quantizers.layout import check_tensor

__all__ = ["ResidualSimVQ", "SimVQ", "get_maybe_sync_seed", "is_distributed", "round_up_multiple"]


@in_these_words(handed_to=SimVQ)
class ResidualSimVQ(Settable):
    """As the peer's: x [B, ..., dim] or, with `channel_first`, [B, dim, ...] -> (quantized, indices [P..., q], losses [q]).

    With `return_all_codes` the codes of all layers, each in the layout of the input, follow: [q, ...]. Indices of -1: dropped.
    """

    fixed = frozenset(("channel_first",))

    seeds: Seeds

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int,
        codebook_size: int,
        heads: int = 1,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        channel_first: bool = False,
        rotation_trick: bool = True,
        **sim_vq_kwargs: Any,
    ) -> None:
        super().__init__()
        if heads != 1:
            raise ValueError(f"heads = {heads}: must be 1 in a residual quantizer")
        self.quantize_dropout = check_dropout(quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of, num_quantizers)
        self.channel_first, self.num_quantizers = channel_first, num_quantizers
        options: dict[str, Any] = {"channel_first": channel_first, "rotation_trick": rotation_trick, **sim_vq_kwargs}
        self.layers: Any = ModuleList([SimVQ(dim=dim, codebook_size=codebook_size, **options) for _ in range(num_quantizers)])
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of
        hide(self, seeds=Seeds(), native=None)

    @property
    def codebook_size(self) -> int:
        """C."""
        return self.layers[0].codebook_size

    @property
    def codebook_dim(self) -> int:
        """The width of the codes."""
        return self.layers[0].codebook_dim

    @property
    def codebooks(self) -> Tensor:
        """[q, C, dim]."""
        return torch.stack([layer.codebook for layer in self.layers])

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Indices of a call, all or those of the first layers -> the codes of all layers [q, ...], zeros for -1 and what is missing."""
        check_tensor("indices", indices)
        number = indices.shape[-1] if indices.dim() > 1 else 0
        if not 1 <= number <= len(self.layers):
            raise ValueError(f"indices has shape {tuple(indices.shape)}: must be [batch, ..., 1 to {len(self.layers)}]")
        codes = [layer.indices_to_codes(own) for layer, own in zip(self.layers, indices.unbind(-1), strict=False)]
        codes += [torch.zeros_like(codes[0])] * max(self.num_quantizers - number, 0)
        return torch.stack(codes)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """Indices of a call, all or those of the first layers -> its output."""
        return self.get_codes_from_indices(indices).sum(0)

    def forward(self, x: Tensor, return_all_codes: bool = False, rand_quantize_dropout_fixed_seed: int | None = None) -> tuple[Tensor, ...]:
        depth = len(self.layers)
        if self.training and self.quantize_dropout:
            seed = self.seeds.draw() if rand_quantize_dropout_fixed_seed is None else rand_quantize_dropout_fixed_seed
            drawn = layers_taking_part(seed, self.quantize_dropout_cutoff_index, self.quantize_dropout_multiple_of, self.num_quantizers)
            depth = min(drawn, depth)
        residual = x
        outputs, indices, losses = [], [], []
        for layer in self.layers[:depth]:
            if outputs:
                residual = residual - outputs[-1].detach()
            quantized, own, loss = layer(residual)
            outputs.append(quantized)
            indices.append(own)
            losses.append(loss)
        left_out = len(self.layers) - depth
        indices += [torch.full_like(indices[0], -1)] * left_out
        losses += [torch.zeros_like(losses[0])] * left_out
        result = (functools.reduce(torch.add, outputs), torch.stack(indices, dim=-1), torch.stack(losses))
        return (*result, self.get_codes_from_indices(result[1])) if return_all_codes else result
