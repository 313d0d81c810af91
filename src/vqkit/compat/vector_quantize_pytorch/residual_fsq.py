"""Residual FSQ by the names of vector-quantize-pytorch: `vqkit.quantizers.Residual` of FSQ layers, each as fine as a step before it.

Shapes: P... positions of the input, d scalars, q layers, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
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
from vqkit.compat.vector_quantize_pytorch.finite_scalar_quantization import FSQ
from vqkit.compat.vector_quantize_pytorch.groups import Groups
from vqkit.compat.vector_quantize_pytorch.rows import hide, linear, project_out, projected, rows_of
from vqkit.compat.vector_quantize_pytorch.settings import Settable, are_of, check_kinds, is_watched, overrides
from vqkit.quantizers import fsq
from vqkit.quantizers.base import Quantized
from vqkit.quantizers.layout import check_tensor
from vqkit.quantizers.residual import Residual

__all__ = ["FSQ", "GroupedResidualFSQ", "ResidualFSQ", "get_maybe_sync_seed", "is_distributed", "round_up_multiple"]


@in_these_words(handed_to=FSQ)
class ResidualFSQ(Settable):
    """As the peer's: x [B, N, dim], or with `is_channel_first` [B, dim, ...] -> (quantized, indices [B, N, q] or [B, q, ...]).

    With `return_all_codes` the codes of all layers [q, P..., d] follow. Indices are int32, or int64 where layers were dropped (-1).
    With `keep_num_codebooks_dim` an axis of one codebook stands before q, which decoding takes for one of P.
    """

    made_of = frozenset(("layers",))
    fixed = frozenset(("scales", "soft_clamp_input_value"))

    scales: Tensor
    native: Residual
    parts: Any
    seeds: Seeds
    _natives: list[Any]
    _sizes: tuple[int, ...]
    _clamp: Any

    def __init__(
        self,
        *,
        levels: list[int],
        num_quantizers: int,
        dim: int | None = None,
        is_channel_first: bool = False,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        soft_clamp_input_value: float | list[float] | Tensor | None = None,
        bound_hard_clamp: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        _refuse_layer_options(kwargs)
        self.quantize_dropout = check_dropout(quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of, num_quantizers)
        codebook_dim = len(levels)
        dim = codebook_dim if dim is None else dim
        self.dim = dim
        self.has_projections = dim != codebook_dim
        self.project_in = linear(dim, codebook_dim, self.has_projections)
        self.project_out = linear(codebook_dim, dim, self.has_projections)
        self.is_channel_first, self.num_quantizers, self.levels = is_channel_first, num_quantizers, levels
        options: dict[str, Any] = {"preserve_symmetry": True, "bound_hard_clamp": bound_hard_clamp, **kwargs}
        self.layers: Any = nn.ModuleList([FSQ(levels=levels, dim=codebook_dim, **options) for _ in range(num_quantizers)])
        first: Any = self.layers[0]
        self.codebook_size = first.codebook_size
        scales = torch.stack([torch.tensor(levels, dtype=torch.float32) ** -number for number in range(num_quantizers)])
        self.register_buffer("scales", scales, persistent=False)
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of
        limit = _limit(levels, soft_clamp_input_value, bound_hard_clamp)
        self.register_buffer("soft_clamp_input_value", limit, persistent=False)
        hide(self, _sizes=tuple(levels), _clamp=None if limit is None else limit.tolist(), seeds=Seeds())
        self._build()

    def _build(self) -> None:
        layers = [*self.layers]
        check_kinds(layers, FSQ)
        parts = []
        for number, layer in enumerate(layers):
            own = 1.0 if layer.scale is None else layer.scale
            part = layer.make_native(self._sizes, [own * n**-number for n in map(float, self._sizes)])
            hide(part, layer=layer, step=tuple(n**-number for n in map(float, self._sizes)))
            parts.append(part)
        native = Residual(parts, estimator="layers", soft_clamp=self._clamp)
        hide(self, parts=parts, native=native, _natives=[layer.native for layer in layers])

    def _settle(self) -> Residual:
        """The native quantizer, of the layers and their modes of now."""
        layers = self._modules["layers"]._modules.values()  # type: ignore[union-attr]
        if not are_of(layers, self._natives):
            self._build()
        for layer, part in zip(layers, self.parts, strict=True):
            layer.settle(part)
            if (part.__class__ is _Called) is not (watched := is_watched(layer, FSQ)):
                part.__class__ = _Called if watched else fsq.FSQ
        return self.native

    @property
    def codebooks(self) -> Tensor:
        """[q, C, d], the codes of the layers before they are scaled."""
        return torch.stack([layer.implicit_codebook for layer in self.layers])

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Indices of a call, all or those of the first layers -> the codes of all layers [q, P..., d], zeros for -1 and what is missing."""
        rows = self._rows_of_indices(indices)
        return all_layers(self._settle().decode_layers(rows).to(self.scales.dtype), self.num_quantizers)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """Indices of a call, all or those of the first layers -> its output."""
        rows = self._rows_of_indices(indices)
        own = overrides(self, ResidualFSQ, "get_codes_from_indices")
        codes = self.get_codes_from_indices(indices).sum(0) if own else self._settle().decode_codes(rows).to(self.scales.dtype)
        output = project_out(self.project_out, codes, rows)
        return output.movedim(-1, 1) if self.is_channel_first else output

    def _rows_of_indices(self, indices: Tensor) -> Tensor:
        check_tensor("indices", indices)
        return indices.movedim(1, -1) if self.is_channel_first and indices.dim() > 1 else indices

    def forward(self, x: Tensor, return_all_codes: bool = False, rand_quantize_dropout_fixed_seed: int | None = None) -> tuple[Tensor, ...]:
        rows = rows_of(x, self.dim, self.is_channel_first)
        native, number = self._settle(), len(self.layers)
        depth = number
        if self.training and self.quantize_dropout:
            seed = self.seeds.draw() if rand_quantize_dropout_fixed_seed is None else rand_quantize_dropout_fixed_seed
            drawn = layers_taking_part(seed, self.quantize_dropout_cutoff_index, self.quantize_dropout_multiple_of, self.num_quantizers)
            depth = min(drawn, number)
        vectors, finite = projected(self.project_in, rows)
        found = native.quantize_vectors(vectors, finite, freeze_codebook=True, depth=depth)
        output = project_out(self.project_out, found.quantized, None if finite is None else found.indices)
        indices = found.indices if depth < number else found.indices.to(torch.int32)
        kept = self.layers[0].keep_num_codebooks_dim
        indices = indices.unsqueeze(-2) if kept else indices
        if self.is_channel_first:
            output, indices = output.movedim(-1, 1), indices.movedim(-1, 1)
        if not return_all_codes:
            return output, indices
        # Outputs are then no codes.
        moved = any((part.training and part.noise_dropout > 0.0) or part.__class__ is _Called for part in self.parts)
        moved = moved or overrides(self, ResidualFSQ, "get_codes_from_indices")
        if moved:
            return output, indices, self.get_codes_from_indices(indices)
        codes = all_layers(torch.stack([*found.outputs]).detach(), self.num_quantizers)
        return output, indices, codes.unsqueeze(-2) if kept else codes


class _Called(fsq.FSQ):
    """The native quantizer of a layer that is called itself, as it has hooks or a forward of its own."""

    layer: FSQ
    step: tuple[float, ...]
    """By which its inputs are divided, and its outputs multiplied."""

    def quantize_vectors(self, vectors: Tensor, *_: Any, **__: Any) -> Quantized:
        if self.layer.orthogonal_rotation and len({*self.step}) > 1:
            raise ValueError("layers have hooks, or a forward of their own: must have neither with orthogonal_rotation and unequal levels")
        step = vectors.new_tensor(self.step)
        output, indices = self.layer((vectors / step).flatten(1, -2))
        return Quantized(output.reshape(vectors.shape) * step, indices.reshape(vectors.shape[:-1]).to(torch.int64), {}, None)

    def quantize(self, x: Tensor, *_: Any, **__: Any) -> Quantized:
        return self.quantize_vectors(x)


def _limit(levels: Sequence[int], given: float | Sequence[float] | Tensor | None, hard: bool) -> Tensor | None:
    if not hard:
        return given if given is None or isinstance(given, Tensor) else torch.tensor(given)
    if given is not None:
        raise ValueError(f"soft_clamp_input_value = {given}: must be None with bound_hard_clamp, which has its own")
    return 1 + 1 / (torch.tensor(levels) - 1)


def _refuse_layer_options(options: dict[str, Any]) -> None:
    """Raise ValueError for options of FSQ that have no meaning for a layer."""
    only = {"num_codebooks": 1, "channel_first": False, "return_indices": True}
    for name, value in only.items():
        if options.get(name, value) not in (value, None):
            raise ValueError(f"{name} = {options[name]!r}: must be {value!r} in the layers of a residual quantizer")


@in_these_words(handed_to=ResidualFSQ)
class GroupedResidualFSQ(Groups):
    """As the peer's: `groups` times a `ResidualFSQ`, each on its part of the width; indices [G, B, N, q], codes G times [q, P..., d].

    With `accept_image_fmap` inputs are [B, dim, ...], and so are outputs and what indices decode to.
    """

    seeds: Seeds

    def __init__(self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **kwargs: Any) -> None:
        options: dict[str, Any] = {**kwargs, "is_channel_first": True} if accept_image_fmap else kwargs
        super().__init__(dim, groups, accept_image_fmap, lambda width: ResidualFSQ(dim=width, **options))
        self.codebook_size = self.rvqs[0].codebook_size
        hide(self, seeds=Seeds())

    @property
    def split_dim(self) -> int:
        """The axis of the width."""
        return 1 if self.rvqs[0].is_channel_first else -1

    def forward(self, x: Tensor, return_all_codes: bool = False) -> tuple[Any, ...]:
        pieces = self._pieces(x)
        seed = self.seeds.draw() if self.training else None
        output, (indices, *codes) = self._joined([rvq(piece, return_all_codes, seed) for rvq, piece in zip(self.rvqs, pieces, strict=True)])
        return (output, torch.stack(indices), *codes)
