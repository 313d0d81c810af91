"""Residual quantization over grids of growing size (VAR; Tian et al., 2024): each level codes, at its scale, what those before it left.

A level averages what is left into the cells of its grid, quantizes these, and spreads the codes over all positions again, by linear
interpolation and a convolution. So the first indices say what a whole image is like, and the last ones the detail.

Shapes: B batch, P... positions of the input (1 to 3 axes), D width, L levels, S cells of all levels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqkit.dist import Reducer
from vqkit.ops.grids import average, interpolate, neighbourhoods
from vqkit.ops.precision import as_dtype, finite_rows, known_finite, may_keep, may_look, widest, without_autocast
from vqkit.quantizers.base import Quantized, Quantizer, changed
from vqkit.quantizers.committed import WIDE, Committed, Counting
from vqkit.quantizers.config import Commit, NestedDropout, check_choice, check_count, check_kind, check_number
from vqkit.quantizers.layout import (
    Layout,
    check_indices,
    check_layout,
    check_tensor,
    has_hooks,
    is_all,
    position_mask,
    where_kept,
    width_back,
    width_last,
)
from vqkit.quantizers.residual import (
    check_parts,
    codebook_slots,
    gather_statistics,
    has_start,
    joined_codebook,
    numbered,
    scramble,
    set_joined_codebook,
    unique_codebooks,
)
from vqkit.quantizers.vector_quantize import VectorQuantize

Scale = int | Sequence[int]
"""The size of a grid: one number for all axes, or one an axis."""

_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONVOLUTION: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Mixer(nn.Module):
    """A share of what a 3 x ... x 3 convolution makes of its input, and the rest of the input itself; float32 or wider, as codes are."""

    def __init__(self, dim: int, axes: int, share: float, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.axes, self.share = axes, share
        self.conv: Any = _CONVOLUTION[axes](dim, dim, 3, padding=1, device=device, dtype=torch.float32)

    def forward(self, x: Tensor, positions: Sequence[int] | None = None) -> Tensor:
        """[B, D, P...] -> [B, D, P...]; or cells [B, D, G...], which are first spread over `positions`."""
        positions = x.shape[2:] if positions is None else positions
        weight, bias = self.conv.weight, self.conv.bias
        dtype = torch.promote_types(x.dtype, weight.dtype)
        x, weight, bias = as_dtype(x, dtype), as_dtype(weight, dtype), as_dtype(bias, dtype)
        with without_autocast(x.device.type):
            if has_hooks(self.conv):  # which may make its weights
                x = interpolate(x, positions)
                return x.lerp(self.conv(as_dtype(x, self.conv.weight.dtype)).to(dtype), self.share)
            if _is_small(x, weight, positions):
                return self._by_products(x, weight, bias, positions)
            x = interpolate(x, positions)
            return x.lerp(_CONVOLVE[self.axes](x, weight, bias, padding=1), self.share)

    def _by_products(self, x: Tensor, weight: Tensor, bias: Tensor, positions: Sequence[int]) -> Tensor:
        """Spreading, convolution and share as two matrix products: a convolution of a few positions costs a multiple of its arithmetic."""
        columns = (x.flatten(2) @ neighbourhoods(x.shape[2:], positions, x)).view(len(x), weight[0].numel(), math.prod(positions))
        kernel = torch.add(_centre(weight, 1.0 - self.share), weight.flatten(1), alpha=self.share)
        # A product of a matrix and a batch takes another way where nothing has a gradient, and rounds otherwise.
        mixed = torch.baddbmm((bias * self.share).unsqueeze(-1), kernel.expand(len(x), -1, -1), columns)
        return mixed.unflatten(-1, tuple(positions))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if not tensor.is_floating_point() or moved.dtype in WIDE:
                return moved
            return torch.empty_like(tensor, device=moved.device) if tensor.is_meta or moved.is_meta else tensor.to(moved.device)

        return super()._apply(wide, recurse)


_SMALL = 2**15
"""Of the matrices and of the neighbourhoods that a convolution by products makes, none has more numbers."""


def _is_small(x: Tensor, weight: Tensor, positions: Sequence[int]) -> bool:
    """Cells x [B, D, G...], weight [D, D, 3, ...]."""
    windows = math.prod(weight.shape[2:]) * math.prod(positions)
    return weight.numel() <= _SMALL and windows * max(math.prod(x.shape[:2]), math.prod(x.shape[2:])) <= _SMALL


def _centre(weight: Tensor, value: float) -> Tensor:
    """[D, D 3^n], the kernel of a convolution that multiplies by `value`."""
    make = _kept_centre if may_keep(weight.detach()) else _make_centre
    return make(len(weight), math.prod(weight.shape[2:]), value, weight.dtype, weight.device)


def _make_centre(dim: int, around: int, value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return F.pad(value * torch.eye(dim, dtype=dtype, device=device).unsqueeze(-1), (around // 2, around // 2)).flatten(1)


@functools.lru_cache(maxsize=64)
def _kept_centre(*key: Any) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return _make_centre(*key)


class Hierarchical(Quantizer):
    """The sum of `levels` on grids of the sizes `scales`, each applied to what is left by those before it; one may stand several times.

    Inputs are [B, P..., D] with `axes` axes of positions, or with layout="first" [B, D, P...], of any size: a level averages what is
    left over the parts of the input that are the cells of its grid. Its codes are spread over the positions by linear interpolation, and
    `mixing` of the result passes a convolution: one for all levels, or `mixers` of them, each for as many levels in a row; None: one a
    level. The gradient goes through all of this as the levels pass it on.

    Indices are [B, S], those of the first level first, each grid in row-major order: see `split`. So code_shape is (S,), and
    bits_per_vector are those of a whole item. Levels are quantizers of one width and one index a vector, with the width last; the loss is
    the mean over the levels. With `nested_dropout` the output and loss of a training forward are at times of the first levels alone;
    indices and statistics are of all.

    A mask leaves positions out of the averages; a cell without any has index -1. Masked positions get zeros, or with masked="input"
    themselves; vectors that are not finite are masked.

    Raises ValueError for scales that shrink, another number of them than levels, other sizes that do not fit, and levels that differ in
    width or have several indices a vector.
    """

    whole_items = True

    def __init__(
        self,
        levels: Sequence[Quantizer],
        scales: Sequence[Scale],
        *,
        axes: int = 2,
        mixing: float = 0.5,
        mixers: int | None = 1,
        nested_dropout: NestedDropout | None = None,
        layout: Layout = "last",
        masked: Literal["zero", "input"] = "zero",
        commit: Commit = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        levels = list(levels)
        check_parts("levels", levels, alike=("dim",))
        for number, level in enumerate(levels):
            if level.code_shape:
                raise ValueError(f"levels[{number}].code_shape = {level.code_shape}: must be (), one index a vector")
        self.grids = check_scales(scales, axes)
        if len(self.grids) != len(levels):
            raise ValueError(f"scales has {len(self.grids)} entries: must be {len(levels)}, one a level")
        check_number("mixing", mixing)
        if not 0.0 <= mixing <= 1.0:
            raise ValueError(f"mixing = {mixing}: must be from 0 to 1")
        _check_dropout(nested_dropout, len(levels))
        check_layout(layout)
        check_choice("masked", masked, ("zero", "input"))
        self.levels = nn.ModuleList(dict.fromkeys(levels))
        self._order = [list(self.levels).index(level) for level in levels]
        self._slots = codebook_slots(levels)
        self.dim: int = levels[0].dim
        self.axes, self.mixing, self.layout, self.masked = axes, mixing, layout, masked
        number = self.num_levels if mixers is None else mixers
        check_count("mixers", number)
        number = min(number, self.num_levels) if mixing > 0 else 0
        self.mixers = nn.ModuleList(Mixer(self.dim, axes, mixing, device=device) for _ in range(number))
        self.nested_dropout = nested_dropout
        self.clock = Committed(device=device) if nested_dropout else None
        self.commit = commit

    def extra_repr(self) -> str:
        own = f"dim={self.dim}, grids={self.grids}, mixing={self.mixing}"
        return own + changed(self, nested_dropout=None, layout="last", masked="zero", commit="auto")

    @property
    def num_levels(self) -> int:
        """L, shared levels as often as they are used."""
        return len(self._order)

    def _each(self) -> Iterator[Any]:
        return (self.levels[number] for number in self._order)

    def _mix(self, level: int, x: Tensor, positions: Sequence[int]) -> Tensor:
        """Cells [B, D, G...] of a level, spread over positions and mixed."""
        if not len(self.mixers):
            return interpolate(x, positions)
        mixer = self.mixers[round(level / max(self.num_levels - 1, 1) * (len(self.mixers) - 1))]
        return mixer(x, positions) if isinstance(mixer, Mixer) else mixer(interpolate(x, positions))

    # What every quantizer says of itself

    def codebooks(self) -> list[Counting]:
        return unique_codebooks(self.levels)

    @property
    def cells(self) -> tuple[int, ...]:
        """How many cells the grid of each level has."""
        return tuple(math.prod(grid) for grid in self.grids)

    @property
    def code_shape(self) -> tuple[int, ...]:
        return (sum(self.cells),)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return tuple(size for level, number in zip(self._each(), self.cells, strict=True) for size in level.codebook_sizes * number)

    @property
    def loss_weights(self) -> dict[str, float]:
        each = enumerate(self._each())
        return {numbered(name, i): weight / self.num_levels for i, level in each for name, weight in level.loss_weights.items()}

    @property
    def codebook(self) -> Tensor:
        """[L, C, D], the codebooks of the levels; without the first axis that of one level shared by all.

        Raises ValueError where they have different shapes; then see `levels[i].codebook`.
        """
        return joined_codebook(self.levels)

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        set_joined_codebook(self.levels, codes)

    def split(self, indices: Tensor) -> tuple[Tensor, ...]:
        """indices [B, S], or of the first levels alone -> those of each level as its grid, [B, *grid]."""
        known = self._known_levels(indices)
        pieces = indices.split(self.cells[:known], dim=-1)
        return tuple(piece.unflatten(-1, grid) for piece, grid in zip(pieces, self.grids, strict=False))

    # Quantizing

    def quantize(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        freeze_codebook: bool = False,
        depth: int | None = None,
        temperature: float | None = None,
    ) -> Quantized:
        """x [B, P..., D] or, with layout "first", [B, D, P...]; mask [B, P...] bool, or lengths [B] of sequences.

        Output and loss are of the first `depth` levels, if given, else of all or of those that nested dropout leaves. `temperature` stands
        for that of a `Gumbel` or `Softmax` assignment of the levels, all of which must have the option. Losses are named "NAME/LEVEL".
        """
        rows, counted, kept = self._read(x, mask, lengths)
        used = self._used_levels(depth)
        options = {} if temperature is None else {"temperature": temperature}
        vectors = self._vectors(rows, kept)
        self._start_shared(vectors, kept, options)
        found: list[Quantized] = []

        def choose(level: Any, cells: Tensor, known: Tensor | None) -> tuple[Tensor, Tensor]:
            found.append(level.quantize(cells, known, freeze_codebook=freeze_codebook, **options))
            return found[-1].indices, found[-1].quantized

        indices, spread = self._walk(vectors, kept, choose)
        if isinstance(used, Tensor):
            spread = [each * (number < used) for number, each in enumerate(spread)]
        output = _add(spread[:used] if isinstance(used, int) else spread)
        output = output.movedim(1, -1) if kept is None else where_kept(kept, output.movedim(1, -1))
        output = as_dtype(output, x.dtype)
        if counted is not None and self.masked == "input":
            output = output.where(counted.unsqueeze(-1), rows)
        losses = {}
        for number, level in enumerate(found):
            losses |= {numbered(name, number): self._share(loss, number, used) for name, loss in level.losses.items()}
        return Quantized(width_back(output, self.layout), indices, losses, gather_statistics(self._slots, [f.statistics for f in found]))

    def encode(self, x: Tensor, mask: Tensor | None = None, *, lengths: Tensor | None = None) -> Tensor:
        """x -> indices [B, S] int64 of all levels; -1: a cell of masked positions alone."""
        rows, _, kept = self._read(x, mask, lengths)

        def choose(level: Any, cells: Tensor, known: Tensor | None) -> tuple[Tensor, Tensor]:
            indices = level.encode(cells, known)
            return indices, level.decode(indices)

        return self._walk(self._vectors(rows, kept), kept, choose)[0]

    def decode(self, indices: Tensor, positions: Sequence[int] | None = None) -> Tensor:
        """indices [B, S], or of the first levels alone -> vectors at `positions`, None: as many as the last grid has cells.

        [B, *positions, D] or, with layout "first", [B, D, *positions]. A level whose indices are all -1 adds nothing.
        """
        grids = self.split(indices)
        positions = self.grids[-1] if positions is None else _check_grid("positions", positions, self.axes)
        spread = [self._spread(number, self._codes(number, grid), grid, positions) for number, grid in enumerate(grids)]
        return _add(spread) if self.layout == "first" else _add(spread).movedim(1, -1)

    def decode_codes(self, indices: Tensor) -> Tensor:
        """indices [B, S], or of the first levels alone -> the code of each cell [B, S, D]; zeros for -1."""
        return torch.cat([self._codes(number, grid).flatten(1, -2) for number, grid in enumerate(self.split(indices))], dim=1)

    def _codes(self, number: int, grid: Tensor) -> Tensor:
        """[B, *grid] -> [B, *grid, D]."""
        level: Any = self.levels[self._order[number]]
        check_indices("indices", grid, level.codebook_size)
        return level.decode(grid)

    def _known_levels(self, indices: Tensor) -> int:
        check_tensor("indices", indices)
        sums = [sum(self.cells[: number + 1]) for number in range(self.num_levels)]
        if indices.dim() != 2 or indices.shape[1] not in sums:
            allowed = " or ".join(map(str, sums))
            raise ValueError(f"indices has shape {tuple(indices.shape)}: must be [batch, {allowed}], the cells of the first levels")
        if indices.is_floating_point():
            raise TypeError(f"indices is {indices.dtype}: must be an integer type")
        return sums.index(indices.shape[1]) + 1

    # The start

    @torch.no_grad()
    def initialize_(
        self, x: Tensor, mask: Tensor | None = None, *, lengths: Tensor | None = None, seed: int = 0, reducer: Reducer | None = None
    ) -> None:
        """k-means of each level on what those before it leave of x; a shared level then once more, on what all its uses see.

        Arguments as for `quantize`; with several ranks `reducer` makes the result that of all their vectors. Raises ValueError when there
        is no vector to start from.
        """
        rows, _, kept = self._read(x, mask, lengths)
        seen: dict[Any, list[tuple[Tensor, Tensor | None]]] = {}

        def choose(level: Any, cells: Tensor, known: Tensor | None) -> tuple[Tensor, Tensor]:
            if level not in seen and has_start(level):
                level.initialize_(cells, known, seed=seed + len(seen), reducer=reducer)
            seen.setdefault(level, []).append((cells, known))
            indices = level.encode(cells, known)
            return indices, level.decode(indices)

        self._walk(self._vectors(rows, kept), kept, choose)
        for level, uses in seen.items():
            if len(uses) > 1 and has_start(level):
                level.initialize_(*_join(uses), seed=seed, reducer=reducer)

    @torch.no_grad()
    def _start_shared(self, vectors: Tensor, kept: Tensor | None, options: dict[str, Any]) -> None:
        """Before a training forward: a shared level that waits for k-means starts at what all its uses see."""
        shared = [level for number, level in enumerate(self.levels) if self._order.count(number) > 1]
        waiting = [level for level in shared if not all(codebook.initialized for codebook in unique_codebooks([level]))]
        if not waiting:
            return
        seen: dict[Any, list[tuple[Tensor, Tensor | None]]] = {level: [] for level in waiting}

        def choose(level: Any, cells: Tensor, known: Tensor | None) -> tuple[Tensor, Tensor]:
            if level in seen:
                seen[level].append((cells, known))
            found = level.quantize(cells, known, **options)
            return found.indices, found.quantized

        self._walk(vectors, kept, choose)
        for level, uses in seen.items():
            codebooks = unique_codebooks([level])
            if all(codebook.initialized for codebook in codebooks):  # else no rank has vectors yet
                for codebook in codebooks:
                    codebook.initialized = False  # once more
                level.quantize(*_join(uses))

    # Steps of `quantize`

    def _read(self, x: Tensor, mask: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The rows [B, P..., D], the positions [B, P...] that count, and those of them that are finite; None: all."""
        rows = width_last(x, self.dim, self.layout)
        if rows.dim() != self.axes + 2 or not all(rows.shape[1:-1]):
            raise ValueError(
                f"x has shape {tuple(x.shape)}: must have {self.axes} axes of positions, none of length 0, beside those of batch and width"
            )
        counted = position_mask(rows.shape[:-1], mask, lengths)
        if counted is None and known_finite(rows):
            return rows, None, None
        finite = finite_rows(rows)
        kept = finite if counted is None else finite & counted
        return rows, counted, None if is_all(kept) else kept

    def _vectors(self, rows: Tensor, kept: Tensor | None) -> Tensor:
        """[B, D, P...] float32 or wider; 0 where not kept."""
        return as_dtype((rows if kept is None else where_kept(kept, rows)).movedim(-1, 1), widest(rows))

    def _used_levels(self, depth: int | None) -> Tensor | int | None:
        """How many levels enter the output, if drawn [] int64; None for all."""
        if depth is not None:
            check_count("depth", depth)
            if depth > self.num_levels:
                raise ValueError(f"depth = {depth}: must be from 1 to {self.num_levels}, the number of levels")
            return None if depth == self.num_levels else depth
        if self.clock is None or self.nested_dropout is None or not self.training:
            return None
        return nested_depth(self.nested_dropout, self.clock.commits, self.num_levels)

    def _share(self, loss: Tensor, number: int, used: Tensor | int | None) -> Tensor:
        """The loss of a level in a mean over those that are used."""
        if used is None:
            return loss
        if isinstance(used, int):
            return loss * (self.num_levels / used) if number < used else torch.zeros_like(loss)
        return loss * ((number < used) * (self.num_levels / used))

    def _walk(
        self, vectors: Tensor, kept: Tensor | None, choose: Callable[[Any, Tensor, Tensor | None], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[Tensor]]:
        """Every level in turn on what is left of [B, D, P...]: the indices [B, S], and what each level adds, [B, D, P...].

        `choose` takes a level, cells [B, N, D] and which of them are known [B, N] (None: all), and gives their indices and codes.
        """
        residual, found, spread = vectors, [], []
        weights = None if kept is None else kept.unsqueeze(1).to(vectors.dtype)
        for number, (level, grid) in enumerate(zip(self._each(), self.grids, strict=True)):
            if number > 0:
                residual = residual - spread[-1]
            cells, share = average(residual, grid, weights)
            indices, codes = choose(level, cells.flatten(2).mT, None if share is None else share.flatten(1) > 0)
            spread.append(self._spread(number, codes.unflatten(1, grid), indices.unflatten(1, grid), tuple(vectors.shape[2:])))
            found.append(indices)
        return torch.cat(found, dim=1), spread

    def _spread(self, number: int, codes: Tensor, indices: Tensor, positions: tuple[int, ...]) -> Tensor:
        """Codes [B, *grid, D] of indices [B, *grid] -> [B, D, *positions]; zeros where an item has no index."""
        whole = may_look(indices) and indices.numel() > 0 and int(indices.min()) >= 0
        x = (codes if whole else codes.where((indices >= 0).unsqueeze(-1), 0.0)).movedim(-1, 1)
        spread = self._mix(number, as_dtype(x, widest(x)), positions)
        if whole:
            return spread
        return spread * (indices >= 0).flatten(1).any(1).reshape(-1, *(1 for _ in x.shape[1:]))


class HierarchicalVQ(Hierarchical):
    """A `VectorQuantize` on each grid of `scales`: one for all levels, or with shared_codebook=False one each.

    `codebook_size` is a number, or one a level. `options` are those of `VectorQuantize` (but for heads), all others those of
    `Hierarchical`. Raises ValueError for sizes that do not fit.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int | Sequence[int],
        scales: Sequence[Scale],
        *,
        shared_codebook: bool = True,
        axes: int = 2,
        mixing: float = 0.5,
        mixers: int | None = 1,
        nested_dropout: NestedDropout | None = None,
        layout: Layout = "last",
        masked: Literal["zero", "input"] = "zero",
        commit: Commit = "auto",
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        check_kind("shared_codebook", shared_codebook, bool)
        number = len(check_scales(scales, axes))
        sizes = (codebook_size,) * number if isinstance(codebook_size, int) else tuple(codebook_size)
        if len(sizes) != number:
            raise ValueError(f"codebook_size = {sizes}: must be one number, or {number}, one a level")
        if shared_codebook and len(set(sizes)) > 1:
            raise ValueError(f"codebook_size = {sizes}: must be one size where shared_codebook = True")
        for name in ("heads", "separate_heads"):
            if name in options:
                raise TypeError(f"{name}: is no option of HierarchicalVQ, whose cells have one index each")
        options["device"] = device
        if shared_codebook:
            levels = [VectorQuantize(dim, sizes[0], **options)] * number
        else:
            levels = [VectorQuantize(dim, size, **options) for size in sizes]
        super().__init__(
            levels,
            scales,
            axes=axes,
            mixing=mixing,
            mixers=mixers,
            nested_dropout=nested_dropout,
            layout=layout,
            masked=masked,
            commit=commit,
            device=device,
        )


def nested_depth(dropout: NestedDropout, commits: Tensor | int, num_levels: int) -> Any:
    """How many levels take part after `commits` commits; the same on every rank, tensor or int as `commits`.

    With the chance of `dropout.probability` min_levels ... num_levels - 1, all alike; else num_levels.
    """
    draw = scramble(commits ^ scramble(dropout.seed))
    depth = dropout.min_levels + scramble(draw) % (num_levels - dropout.min_levels)
    dropped = draw < int(dropout.probability * 2**32)
    return torch.where(dropped, depth, num_levels) if isinstance(draw, Tensor) else (depth if dropped else num_levels)


def check_scales(scales: Sequence[Scale], axes: int) -> tuple[tuple[int, ...], ...]:
    """Scales as grids of `axes` axes. Raises ValueError where one is smaller than the one before it, TypeError for other kinds."""
    check_count("axes", axes)
    if axes > 3:
        raise ValueError(f"axes = {axes}: must be 1, 2 or 3")
    if isinstance(scales, str) or not isinstance(scales, Sequence):
        raise TypeError(f"scales = {scales!r}: must be a sequence, one size of a grid a level")
    if not scales:
        raise ValueError("scales is empty: must hold one size of a grid a level")
    grids = [_check_grid(f"scales[{number}]", scale, axes) for number, scale in enumerate(scales)]
    for number, (before, after) in enumerate(pairwise(grids), 1):
        if any(one > other for one, other in zip(before, after, strict=True)):
            raise ValueError(f"scales[{number}] = {after}: must not be smaller than {before} before it, along any axis")
    return tuple(grids)


def _check_grid(name: str, scale: Scale, axes: int) -> tuple[int, ...]:
    several = isinstance(scale, Sequence) and not isinstance(scale, str)
    grid = tuple(cast(Sequence[int], scale)) if several else (cast(int, scale),) * axes
    for size in grid:
        check_count(name, size)
    if len(grid) != axes:
        raise ValueError(f"{name} = {grid}: must have {axes} numbers, one an axis of positions")
    return grid


def _check_dropout(dropout: NestedDropout | None, num_levels: int) -> None:
    if dropout is None:
        return
    check_kind("nested_dropout", dropout, NestedDropout)
    if dropout.min_levels >= num_levels:
        raise ValueError(f"NestedDropout.min_levels = {dropout.min_levels}: must be below {num_levels}, the number of levels")


def _join(uses: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Cells [B, N, D] and which of them are known [B, N], None: all, of several levels, as those of one."""
    known = [known for _, known in uses if known is not None]  # of all levels or of none
    return torch.cat([cells for cells, _ in uses], dim=1), torch.cat(known, dim=1) if known else None


def _add(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
