"""Grouped quantization: the width is cut into groups, and each has a quantizer of its own (Yang et al., 2023).

Shapes: P positions of the input, D width of the input, G groups, Q layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vqkit.dist import Reducer
from vqkit.ops.precision import finite_rows
from vqkit.quantizers.base import Quantized, Quantizer
from vqkit.quantizers.committed import Counting
from vqkit.quantizers.config import Commit
from vqkit.quantizers.layout import Layout, check_layout, is_integer, position_mask, where_kept, width_back, width_last
from vqkit.quantizers.residual import (
    ResidualVQ,
    call_options,
    check_options,
    check_parts,
    check_path,
    codebook_slots,
    gather_statistics,
    has_start,
    joined_codebook,
    numbered,
    set_joined_codebook,
    unique_codebooks,
)
from vqkit.quantizers.vector_quantize import VectorQuantize


class Grouped(Quantizer):
    """`parts` side by side, each quantizing as much of the width as it is wide; one that stands several times is shared.

    Parts are quantizers of one `code_shape`, with the width last. Indices are those of the parts, stacked in front of their code_shape;
    a loss is the mean over the groups, named "NAME/g" for each. Masked vectors give what the parts make of them.

    Raises ValueError for no parts and parts of different code_shape.
    """

    def __init__(self, parts: Sequence[Quantizer], *, layout: Layout = "last", commit: Commit = "auto") -> None:
        super().__init__()
        parts = list(parts)
        check_parts("parts", parts, alike=("code_shape",))
        check_layout(layout)
        self.parts = nn.ModuleList(dict.fromkeys(parts))
        self._order = [list(self.parts).index(part) for part in parts]
        self._slots = codebook_slots(parts)
        self._options = call_options(parts)
        self.widths: tuple[int, ...] = tuple(part.dim for part in self._each())
        self.dim = sum(self.widths)
        self.layout = layout
        self.commit = commit

    def extra_repr(self) -> str:
        return f"dim={self.dim}, groups={self.groups}"

    @property
    def groups(self) -> int:
        """G, shared parts as often as they are used."""
        return len(self._order)

    def _each(self) -> list[Any]:
        return [self.parts[number] for number in self._order]

    # What every quantizer says of itself

    def codebooks(self) -> list[Counting]:
        return unique_codebooks(self.parts)

    @property
    def code_shape(self) -> tuple[int, ...]:
        return (self.groups, *self._each()[0].code_shape)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return tuple(size for part in self._each() for size in part.codebook_sizes)

    @property
    def loss_weights(self) -> dict[str, float]:
        each = enumerate(self._each())
        return {numbered(name, g): weight / self.groups for g, part in each for name, weight in part.loss_weights.items()}

    @property
    def codebook(self) -> Tensor:
        """[G, ...], the codebooks of the parts; without the first axis that of one part shared by all.

        Raises ValueError where they have different shapes; then see `parts[g].codebook`.
        """
        return joined_codebook(self.parts)

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        set_joined_codebook(self.parts, codes)

    # Quantizing

    def quantize(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        freeze_codebook: bool = False,
        indices: Tensor | None = None,
        targets: Tensor | None = None,
        **options: Any,
    ) -> Quantized:
        """x [B, ..., D] or, with layout "first", [B, D, ...]; mask [P...] bool or lengths [B].

        `indices` and `targets` [P..., G, ...] mean what they mean to the parts, and so do all other options, which every part must know:
        of `ResidualVQ`, `depth`, `beam_size`, `temperature` and `weights` [P...].
        """
        rows = self._rows(x)
        positions = rows.shape[:-1]
        counted = position_mask(positions, mask, lengths)
        given = {name: path for name, path in (("indices", indices), ("targets", targets)) if path is not None}
        for name, path in given.items():
            check_path(name, path, positions, self.code_shape, self.codebook_sizes)
        check_options((*given, *options), self._options, type(self).__name__)
        pieces = rows.split(self.widths, dim=-1)
        self._start_shared(pieces, counted, options)
        found = [
            part.quantize(
                piece,
                counted,
                freeze_codebook=freeze_codebook,
                **{name: path.select(len(positions), g) for name, path in given.items()},
                **options,
            )
            for g, (part, piece) in enumerate(zip(self._each(), pieces, strict=True))
        ]
        return Quantized(
            width_back(torch.cat([part.quantized for part in found], dim=-1), self.layout),
            torch.stack([part.indices for part in found], dim=len(positions)),
            {numbered(name, g): loss for g, part in enumerate(found) for name, loss in part.losses.items()},
            gather_statistics(self._slots, [part.statistics for part in found]),
        )

    def _rows(self, x: Tensor) -> Tensor:
        """The width last; a vector that is not finite in one group is NaN in all, so that it gets no code at all."""
        rows = width_last(x, self.dim, self.layout)
        return where_kept(finite_rows(rows), rows, torch.nan)

    def encode(self, x: Tensor, mask: Tensor | None = None, *, lengths: Tensor | None = None, **options: Any) -> Tensor:
        """x -> indices [P..., G, ...] int64; `options` are those of the parts' `encode`."""
        rows = self._rows(x)
        counted = position_mask(rows.shape[:-1], mask, lengths)
        pieces = zip(self._each(), rows.split(self.widths, dim=-1), strict=True)
        return torch.stack([part.encode(piece, counted, **options) for part, piece in pieces], dim=rows.dim() - 1)

    def decode(self, indices: Tensor) -> Tensor:
        """indices [P..., G, ...] -> vectors of the layout and width of the input."""
        return width_back(self._decode(indices, lambda part, own: part.decode(own)), self.layout)

    def decode_codes(self, indices: Tensor) -> Tensor:
        """indices [P..., G, ...] -> the codes of all groups side by side [P..., sum of their widths]."""
        return self._decode(indices, lambda part, own: part.decode_codes(own))

    def _decode(self, indices: Tensor, decode: Callable[[Any, Tensor], Tensor]) -> Tensor:
        pieces = self._split("indices", indices, indices.dim() - len(self.code_shape))
        return torch.cat([decode(part, own) for part, own in zip(self._each(), pieces, strict=True)], dim=-1)

    def _split(self, name: str, path: Tensor, axis: int) -> Sequence[Tensor]:
        """The part of each group, of indices that have so many axes of positions."""
        if not is_integer(path):
            raise TypeError(f"{name} is {path.dtype}: must be an integer type")
        if axis < 0 or path.shape[axis] != self.groups:
            raise ValueError(f"{name} has shape {tuple(path.shape)}: must be [positions, {', '.join(map(str, self.code_shape))}]")
        return path.unbind(axis)

    # The start

    @torch.no_grad()
    def initialize_(
        self, x: Tensor, mask: Tensor | None = None, *, lengths: Tensor | None = None, seed: int = 0, reducer: Reducer | None = None
    ) -> None:
        """k-means of each part on its share of x; a shared part on what all its uses see. Arguments as for `quantize`.

        With several ranks `reducer` makes the result that of all their vectors. Raises ValueError when there is no vector to start from.
        """
        rows = self._rows(x)
        counted = position_mask(rows.shape[:-1], mask, lengths)
        number = rows.shape[:-1].numel()
        kept = torch.ones(number, dtype=torch.bool, device=x.device) if counted is None else counted.reshape(number)
        seen: dict[Any, list[Tensor]] = {part: [] for part in self.parts}
        for part, piece in zip(self._each(), rows.split(self.widths, dim=-1), strict=True):
            seen[part].append(piece.reshape(number, part.dim))
        for g, (part, pieces) in enumerate(seen.items()):
            if has_start(part):
                part.initialize_(torch.cat(pieces), kept.repeat(len(pieces)), seed=seed + g, reducer=reducer)

    @torch.no_grad()
    def _start_shared(self, pieces: Sequence[Tensor], counted: Tensor | None, options: dict[str, Any]) -> None:
        """Before a training forward: a shared part that waits for k-means starts at what all its uses see."""
        parts: Iterable[Any] = self.parts
        for number, part in enumerate(parts):
            uses = [piece for piece, own in zip(pieces, self._order, strict=True) if own == number]
            if len(uses) > 1 and not all(codebook.initialized for codebook in unique_codebooks([part])):
                part.quantize(torch.cat(uses), None if counted is None else torch.cat([counted] * len(uses)), **options)


class ProductVQ(Grouped):
    """Product quantization (Jegou et al., 2011): `groups` times a `VectorQuantize` of width dim / groups, each of `codebook_size` codes.

    So codebook_size^groups codes in all. `options` are those of `VectorQuantize`; other quantizers are combined by `Grouped`. Raises
    ValueError where `groups` does not divide `dim`.
    """

    def __init__(
        self, dim: int, codebook_size: int, groups: int, *, layout: Layout = "last", commit: Commit = "auto", **options: Any
    ) -> None:
        width = _width(dim, groups)
        super().__init__([VectorQuantize(width, codebook_size, **options) for _ in range(groups)], layout=layout, commit=commit)


def _width(dim: int, groups: int) -> int:
    """Of one group."""
    if groups < 1 or dim % groups:
        raise ValueError(f"groups = {groups}: must be at least 1 and divide dim = {dim}")
    return dim // groups


class GroupedResidualVQ(Grouped):
    """`groups` times a `ResidualVQ` of width dim / groups.

    `options` are those of `ResidualVQ`; `codebook_dim` is that of one group. Quantize dropout cuts all groups at the same layer. Raises
    ValueError where `groups` does not divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int | Sequence[int],
        num_quantizers: int | None = None,
        *,
        groups: int = 1,
        layout: Layout = "last",
        masked: Literal["zero", "input"] = "zero",
        commit: Commit = "auto",
        **options: Any,
    ) -> None:
        width = _width(dim, groups)
        parts = [ResidualVQ(width, codebook_size, num_quantizers, masked=masked, **options) for _ in range(groups)]
        super().__init__(parts, layout=layout, commit=commit)

    def decode_layers(self, indices: Tensor) -> Tensor:
        """indices [P..., G, L] of the first L <= Q layers -> the codes of each [G, L, P..., d], before the output projections."""
        pieces = self._split("indices", indices, indices.dim() - len(self.code_shape))
        return torch.stack([part.decode_layers(own) for part, own in zip(self._each(), pieces, strict=True)])
