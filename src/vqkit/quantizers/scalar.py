"""What quantizers have in common that round scalars one by one: their codes are no table, but all combinations of levels.

An input of any layout is brought into one vector a head, whose scalars a subclass rounds; the digits are joined to one index. Nothing
here makes a tensor of all codes, unless asked to list them.

Shapes: P... positions of the input, D width of the input, H heads, d scalars of a head, C codes of a head.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqkit.ops.codebook import CodebookStatistics, zero_statistics
from vqkit.ops.estimators import straight_through
from vqkit.ops.nearest_code import nearest_codes
from vqkit.ops.precision import as_dtype, finite_rows, is_traced, known_finite, may_look, widest, without_autocast
from vqkit.ops.scalar import Rounded, join_digits, level_places, rounding_stats, split_digits
from vqkit.ops.usage import active_fraction, perplexity
from vqkit.quantizers.base import Quantized, Quantizer, changed
from vqkit.quantizers.committed import Counting
from vqkit.quantizers.config import check_choice, check_count, check_kind
from vqkit.quantizers.layout import (
    Layout,
    check_indices,
    check_layout,
    check_tensor,
    is_all,
    position_mask,
    rows_at,
    where_kept,
    width_back,
    width_last,
)

_COUNTED = 2**18
"""With more codes than this, not they are counted but the levels of each scalar."""
_LISTED = 2**20
"""More codes than this are not listed."""


class CodeCounts(Counting):
    """How often each of prod(levels) codes was used; the codes are those that `codes_of` makes of indices [C]: [C, d].

    Of more than 2^18 codes the levels of the scalars are counted instead, side by side. There is no state but the number of commits and,
    for whom it serves, a rotation [d, d].
    """

    rotation: Tensor | None
    """Kept float32 or wider, as all state of codes."""

    def __init__(
        self,
        heads: int,
        levels: Sequence[int],
        codes_of: Callable[[Tensor], Tensor],
        *,
        device: torch.device | str | None = None,
    ) -> None:
        size, width = math.prod(levels), len(levels)
        self.by_level = size > _COUNTED
        none = zero_statistics(heads, sum(levels) if self.by_level else size, 0, moments=True, device=device)
        pending = none._replace(
            sum=none.sum.new_zeros(heads, 0, width),
            candidates=none.sum.new_zeros(heads, 0, width),
            moments=none.sum.new_zeros(heads, 2, width),
        )
        super().__init__(size, pending, device=device)
        self.heads = heads
        self.levels = tuple(levels)
        self.codes_of = codes_of
        self.register_buffer("rotation", None)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, size={self.size}"

    def codes(self) -> Tensor:
        """[H, C, d] float32. Raises ValueError for more than 2^20 codes."""
        if self.size > _LISTED:
            raise ValueError(f"codebook: of {self.size} codes no list is made, only up to {_LISTED}; decode the indices that you need")
        codes = self.codes_of(torch.arange(self.size, device=self.updates.device))
        return codes.expand(self.heads, *codes.shape)

    @torch.no_grad()
    def statistics(self, x: Tensor, codes: Tensor, indices: Tensor, counted: Tensor | None, *, whole: bool) -> CodebookStatistics:
        """Of x and codes [N, H, d], indices and counted [N, H]; see `rounding_stats`."""
        used, size = indices.unsqueeze(-1), self.size
        if self.by_level:
            used, size = level_places(split_digits(indices, self.levels), self.levels, torch.int64), sum(self.levels)
        return rounding_stats(x, codes, used, size, indices, counted, whole=whole)

    def _usage(self, count: Tensor) -> dict[str, Tensor]:
        if not self.by_level:
            return super()._usage(count)
        each = count.split(self.levels, dim=-1)
        entropy = torch.stack([perplexity(own).log() for own in each])
        active = torch.stack([active_fraction(own) * number for own, number in zip(each, self.levels, strict=True)])
        unknown = dict.fromkeys(super()._usage(count), torch.full_like(entropy[0], torch.nan))
        return unknown | {"perplexity_bound": entropy.sum(0).exp(), "active_levels": active.sum(0) / sum(self.levels)}


class _Vectors(NamedTuple):
    """An input, ready to be rounded."""

    rows: Tensor  # [P..., D] the input with its width last
    vectors: Tensor  # [P..., H, d] float32 or wider; 0 where not kept
    mask: Tensor | None  # [P...] bool, the positions that count; None: all
    finite: Tensor | None  # [P...] bool, those of them that are finite; None: it is known that all positions are
    dtype: torch.dtype  # of the projected input

    @property
    def kept(self) -> Tensor:
        """[P...] bool, the positions that count and are finite."""
        return self.rows.new_ones(self.rows.shape[:-1], dtype=torch.bool) if self.finite is None else self.finite


class _Assigned(NamedTuple):
    """What vectors were quantized to."""

    output: Tensor  # [P..., H, d]
    indices: Tensor  # [P...] or [P..., H]
    known: bool  # whether it is known that no index is -1
    losses: dict[str, Tensor]
    statistics: CodebookStatistics | None


class ScalarQuantizer(Quantizer):
    """The base of quantizers that round the scalars of `heads` vectors, the i-th to `levels[i]` levels.

    Where heads * len(levels) is not dim, linear projections stand before and behind. With `rotation` vectors are rounded in axes that an
    orthogonal matrix, drawn once, turns (a buffer). A subclass writes `_round` and `_codes`, and may
    write `_estimate` and `_losses`. Raises ValueError for levels below 2, for more codes than an int64 can name, and for other sizes
    that do not fit.
    """

    def __init__(
        self,
        levels: Sequence[int],
        dim: int | None,
        heads: int,
        *,
        rotation: bool = False,
        layout: Layout,
        masked: Literal["zero", "input"],
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
        self.levels = check_levels(levels)
        check_count("heads", heads)
        check_layout(layout)
        check_choice("masked", masked, ("zero", "input"))
        self.heads, self.width = heads, len(self.levels)
        inner = heads * self.width
        if dim is not None:
            check_count("dim", dim)
        self.dim = inner if dim is None else dim
        self.layout, self.masked = layout, masked
        self.codebook_size = math.prod(self.levels)
        self.project_in = nn.Linear(self.dim, inner, device=device) if inner != self.dim else None
        self.project_out = nn.Linear(inner, self.dim, device=device) if inner != self.dim else None
        check_kind("rotation", rotation, bool)
        self.counts = CodeCounts(heads, self.levels, self._codes_of, device=device)
        self._rotates = rotation
        if rotation:
            self.counts.rotation = _draw_rotation(self.width, device)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, levels={self.levels}" + changed(self, heads=1, layout="last", masked="zero", commit="auto")

    @property
    def takes_vectors(self) -> bool:
        """Whether `quantize_vectors` does what `quantize` does: no linear projection stands around codes."""
        return False

    @property
    def gives_finite(self) -> bool:
        """Whether finite vectors always give finite codes."""
        return False

    # What a subclass writes; where there is a rotation, `_round` turns the vectors

    @abstractmethod
    def _round(self, vectors: Tensor) -> Rounded:
        """vectors [..., H, d], finite -> the scalars among their codes, and the number of each one's level, in their dtype."""

    @property
    def _rotation(self) -> Any:
        """That of `counts`, looked up without the price of asking two modules for their attributes."""
        return self._modules["counts"]._buffers["rotation"]  # type: ignore[union-attr]

    def _turn(self, vectors: Tensor) -> Tensor:
        """Vectors [..., d] in the axes in which scalars are rounded."""
        return _times(vectors, self._rotation) if self._rotates else vectors

    def _turn_back(self, codes: Tensor) -> Tensor:
        """The opposite of `_turn`."""
        return _times(codes, self._rotation, back=True) if self._rotates else codes

    @abstractmethod
    def _codes(self, digits: Tensor, dtype: torch.dtype) -> Tensor:
        """digits [..., d], whole numbers of any dtype -> codes [..., d]."""

    def _estimate(self, values: Tensor, codes: Tensor) -> Tensor:
        """The codes in value, or near them, with a gradient to the values if these have one."""
        return straight_through(values, codes) if values.requires_grad or is_traced() else codes

    def _losses(self, vectors: Tensor, values: Tensor, codes: Tensor, kept: Tensor | None) -> dict[str, Tensor]:
        """Of vectors as they came, values and codes, all [P..., H, d]; kept [P..., H or 1], or None where it is known that all are."""
        return {}

    def _join(self, digits: Tensor) -> Tensor:
        """digits [..., d] -> the index [...] that they write."""
        return join_digits(digits, self.levels)

    def _split(self, indices: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
        """The opposite of `_join`; 0 for -1."""
        return split_digits(indices, self.levels, dtype)

    # What every quantizer says of itself

    def codebooks(self) -> list[CodeCounts]:
        return [self.counts]

    @property
    def code_shape(self) -> tuple[int, ...]:
        return () if self.heads == 1 else (self.heads,)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return (self.codebook_size,) * self.heads

    @property
    def loss_weights(self) -> dict[str, float]:
        return {}

    @property
    def codebook(self) -> Tensor:
        """[C, d], all codes of a head, listed anew at every call. Raises ValueError for more than 2^20."""
        return self.counts.codes()[0]

    # Quantizing

    def quantize(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        freeze_codebook: bool = False,
        indices: Tensor | None = None,
    ) -> Quantized:
        """x [B, ..., D] or, with layout "first", [B, D, ...]; mask [P...] bool, or lengths [B] of sequences.

        `indices` [P..., heads?] are taken instead of rounding; -1: none.
        """
        return self._quantize(x, mask, lengths, freeze_codebook, indices)

    def _quantize(
        self, x: Tensor, mask: Tensor | None, lengths: Tensor | None, freeze_codebook: bool, indices: Tensor | None, **options: Any
    ) -> Quantized:
        """`options` are those of `_losses`."""
        given = self._read(x, mask, lengths)
        positions = given.rows.shape[:-1]
        if indices is not None:
            check_indices("indices", indices, self.codebook_size, torch.Size((*positions, *self.code_shape)))
        output, found, known, losses, statistics = self._assign(given, freeze_codebook, indices, **options)
        return Quantized(self._write(given, output, None if known else found), found, losses, statistics)

    def quantize_vectors(self, vectors: Tensor, finite: Tensor | None, *, freeze_codebook: bool = False, **options: Any) -> Quantized:
        """As `quantize`, between the projections: vectors [P..., heads * d] -> codes of that shape and dtype.

        finite [P...] bool says which vectors are finite; None: it is known that all are. `options` are those of `quantize`, but for its
        masks.
        """
        given = self._vectors(vectors, vectors if finite is None else where_kept(finite, vectors), None, finite)
        output, found, _, losses, statistics = self._assign(given, freeze_codebook, None, **options)
        return Quantized(as_dtype(output.flatten(-2), given.dtype), found, losses, statistics)

    def _assign(self, given: _Vectors, freeze_codebook: bool, indices: Tensor | None, **options: Any) -> _Assigned:
        values, digits = self._round(given.vectors)
        if indices is None:
            found = self._join(digits)
            kept = None if given.finite is None else given.finite.unsqueeze(-1)
        else:
            found = indices.to(torch.int64).reshape(digits.shape[:-1])
            digits, kept = self._split(found, values.dtype), given.kept.unsqueeze(-1) & (found >= 0)
        if kept is not None:
            found = found.where(kept, -1)
        codes = self._codes(digits, values.dtype)
        losses = self._losses(given.vectors, values, codes, kept, **options)
        output = self._turn_back(self._estimate(values, codes))
        if kept is not None:
            output = where_kept(kept, output)
        statistics = None
        if self.training and not freeze_codebook:
            statistics = self._statistics(given, values, found, codes, indices)
        return _Assigned(output, found.squeeze(-1) if self.heads == 1 else found, kept is None, losses, statistics)

    def encode(self, x: Tensor, mask: Tensor | None = None, *, lengths: Tensor | None = None) -> Tensor:
        """x -> indices int64, [P...] or [P..., heads]; -1: masked or not finite."""
        given = self._read(x, mask, lengths)
        return self._indices(given, self._round(given.vectors).digits)

    def _indices(self, given: _Vectors, digits: Tensor) -> Tensor:
        found = self._join(digits)
        if given.finite is not None:
            found = found.where(given.finite.unsqueeze(-1), -1)
        return found.squeeze(-1) if self.heads == 1 else found

    def encode_and_decode(self, x: Tensor, mask: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        given = self._read(x, mask, **{"lengths": None, **options})
        digits = self._round(given.vectors).digits
        indices = self._indices(given, digits)
        codes = self._turn_back(self._codes(digits, torch.float32)).flatten(-2)
        if given.finite is None:
            return indices, width_back(self._project_out(codes), self.layout)
        return indices, width_back(self._project_out(where_kept(given.finite, codes), indices), self.layout)

    def decode(self, indices: Tensor) -> Tensor:
        """indices [P...] or [P..., heads] -> vectors in the layout and width of the input; zeros where all heads are -1."""
        return width_back(self._project_out(self._look_up(indices), indices), self.layout)

    def decode_codes(self, indices: Tensor) -> Tensor:
        """As `decode`, without the output projection: of width heads * d."""
        return width_back(self._look_up(indices), self.layout)

    def digits(self, indices: Tensor) -> Tensor:
        """indices -> the level of each scalar, [..., d] int64, as a model with one small alphabet a scalar wants them; 0 for -1."""
        check_indices("indices", indices, self.codebook_size)
        return self._split(indices)

    @torch.no_grad()
    def nearest(self, x: Tensor, num: int) -> tuple[Tensor, Tensor]:
        """The `num` codes nearest to the scalars of vectors x [N, D] before rounding, or all if there are fewer; for a beam search.

        Indices [N, k] int64, nearest first, and what they decode to, [N, k, D] of the dtype of x; -1 and zeros for a vector that is not
        finite. Raises ValueError for more than one head and for more codes than are listed.
        """
        if self.heads > 1:
            raise ValueError(f"nearest needs one head: this has heads = {self.heads}, whose nearest codes do not combine")
        check_tensor("x", x)
        if x.dim() != 2:
            raise ValueError(f"x has shape {tuple(x.shape)}: must be [vectors, {self.dim}]")
        check_count("num", num)
        given = self._read(x, None, None)
        values, digits = self._round(given.vectors)
        if num == 1:
            indices = self._join(digits)
        else:
            codes = self._turn(self.counts.codes()[0].to(values.dtype))
            indices = nearest_codes(values.squeeze(1), codes, min(num, self.codebook_size)).indices
        indices = indices.where(given.kept.unsqueeze(-1), -1)
        decoded = self._project_out(self._look_up(indices).to(given.dtype), indices)
        return indices, decoded.to(x.dtype)

    # From an input to vectors and back

    def _read(self, x: Tensor, mask: Tensor | None, lengths: Tensor | None) -> _Vectors:
        rows = width_last(x, self.dim, self.layout)
        mask = position_mask(rows.shape[:-1], mask, lengths)
        if mask is None and may_look(rows):
            vectors = self._project_in(rows)
            if known_finite(vectors):  # and so are the rows: what is not shows in its projection
                return self._vectors(rows, vectors, None, None)
        kept = finite_rows(rows) if mask is None else finite_rows(rows) & mask
        # Before the projection, whose gradient what is not finite would reach even with weight 0.
        vectors = where_kept(kept, rows)
        if self.project_in is not None:
            vectors = self._project_in(vectors)
            kept = kept & finite_rows(vectors)
            vectors = where_kept(kept, vectors)
        return self._vectors(rows, vectors, mask, None if is_all(kept) else kept)

    def _project_in(self, rows: Tensor) -> Tensor:
        return rows if self.project_in is None else self.project_in(as_dtype(rows, self.project_in.weight.dtype))

    def _vectors(self, rows: Tensor, vectors: Tensor, mask: Tensor | None, finite: Tensor | None) -> _Vectors:
        split = as_dtype(vectors, widest(vectors)).reshape(*vectors.shape[:-1], self.heads, self.width)
        return _Vectors(rows, split, mask, finite, vectors.dtype)

    def _write(self, given: _Vectors, quantized: Tensor, indices: Tensor | None) -> Tensor:
        """[P..., H, d] to the layout, width and dtype of the input; no indices where all are known to have one."""
        output = as_dtype(self._project_out(as_dtype(quantized.flatten(-2), given.dtype), indices), given.rows.dtype)
        if given.mask is not None and self.masked == "input":
            output = output.where(given.mask.unsqueeze(-1), given.rows)
        return width_back(output, self.layout)

    def _project_out(self, codes: Tensor, indices: Tensor | None = None) -> Tensor:
        """Codes, 0 where the indices of all heads are -1, in the width of the input; no indices where there is no such position."""
        if self.project_out is None:
            return codes
        output = self.project_out(as_dtype(codes, self.project_out.weight.dtype))
        if indices is None:
            return output
        return where_kept((indices >= 0) if self.heads == 1 else (indices >= 0).any(-1), output)

    def _look_up(self, indices: Tensor) -> Tensor:
        """[P...] or [P..., heads] -> codes [P..., heads * d]."""
        check_tensor("indices", indices)
        if indices.dim() < 1 or (self.heads > 1 and (indices.dim() < 2 or indices.shape[-1] != self.heads)):
            shape = "[batch, ...]" if self.heads == 1 else f"[batch, ..., {self.heads}]"
            raise ValueError(f"indices has shape {tuple(indices.shape)}: must be {shape}")
        if (table := self._list(indices)) is not None:
            codes = self._of_listed(*rows_at(table, indices), indices)
        elif check_indices("indices", indices, self.codebook_size):
            codes = self._codes_of(indices)
        else:
            codes = where_kept(indices >= 0, self._codes_of(indices))
        return codes if self.heads == 1 else codes.flatten(-2)

    def _list(self, like: Tensor) -> Tensor | None:
        """What all codes [C, d] are made of, on the device of `like`: where it never changes, and is kept."""
        return None

    def _of_listed(self, rows: Tensor, complete: bool, indices: Tensor) -> Tensor:
        """Codes [..., d] of rows of the list, zeros for -1; `complete`: it is known that there is none."""
        return self._turn_back(rows)

    def _codes_of(self, indices: Tensor) -> Tensor:
        """[...] -> [..., d], float32; those of -1 mean nothing."""
        return self._turn_back(self._codes(self._split(indices, torch.float32), torch.float32))

    def _statistics(self, given: _Vectors, values: Tensor, found: Tensor, codes: Tensor, own: Tensor | None) -> CodebookStatistics:
        """Of [P..., H, d]; heads of positions that are masked, or have no index of those given, are left out."""
        counted = None if given.mask is None else given.mask.unsqueeze(-1).expand(found.shape)
        if own is not None:
            known = own.reshape(found.shape) >= 0
            counted = known if counted is None else counted & known
        x, codes = (tensor.reshape(-1, self.heads, self.width) for tensor in (values, codes))
        counted = None if counted is None else counted.reshape(-1, self.heads)
        return self.counts.statistics(x, codes, found.reshape(-1, self.heads), counted, whole=given.finite is None and own is None)


def _draw_rotation(width: int, device: torch.device | str | None) -> Tensor:
    return nn.init.orthogonal_(torch.empty(width, width, device=device))


def _times(vectors: Tensor, rotation: Tensor, *, back: bool = False) -> Tensor:
    rotation = as_dtype(rotation, vectors.dtype)
    with without_autocast(vectors.device.type):
        return F.linear(vectors, rotation) if back else vectors @ rotation


def check_levels(levels: Sequence[int]) -> tuple[int, ...]:
    """Levels as a tuple.

    Raises TypeError for what is no sequence of integers, ValueError for one below 2 and for more than 2^63 - 1 codes.
    """
    if isinstance(levels, str) or not isinstance(levels, Sequence):
        raise TypeError(f"levels = {levels!r}: must be a sequence of integers, one a scalar")
    if not levels:
        raise ValueError("levels is empty: must hold one number a scalar")
    for place, number in enumerate(levels):
        check_count(f"levels[{place}]", number, least=2)
    if (size := math.prod(levels)) >= 2**63:
        raise ValueError(f"levels make {size} codes: must be below 2^63, what an index (int64) can name; use heads, with fewer levels each")
    return tuple(map(int, levels))
