"""Optimizer states of the official launch script by the names of ours: AdamW, Lion and Adafactor, as optax keeps them.

There each parameter of the group "main" has moments; the codebooks are a group of their own, plain SGD, and have none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vqkit.compat.official_names import parameter_places, shapes, unused
from vqkit.compat.official_tree import Place, joined, part_of, part_shape, type_name
from vqkit.models.config import ModelConfig

Kind = Literal["adamw", "lion", "adafactor"]

_MAIN = "inner_states/main/inner_state/"
_MOMENTS: dict[frozenset[str], Kind] = {
    frozenset({"mu", "nu"}): "adamw",
    frozenset({"mu"}): "lion",
    frozenset({"v", "v_row", "v_col"}): "adafactor",
}
SMALLEST_FACTORED = 128
"""optax factors the second moments of arrays of which two sizes are at least this."""


class OptimizerState(NamedTuple):
    """What an optimizer remembers, by our names."""

    kind: Kind
    steps: int
    """Updates done, which is the number of the next one in the schedule."""
    tensors: dict[str, Tensor]
    """`PARAMETER.MOMENT` -> tensor."""


def optimizer_from_official(arrays: Mapping[str, Tensor], config: ModelConfig) -> OptimizerState | None:
    """The optimizer state of the arrays below `opt_state/`; None where there are none.

    Raises ValueError for moments of no optimizer that is known, of a parameter that the model has not or in another shape, and for
    counters that do not agree.
    """
    if not arrays:
        return None
    moments, counters = _sorted_arrays(arrays)
    kind = _MOMENTS.get(frozenset(moments))
    if kind is None:
        raise ValueError(f"opt_state has the moments {', '.join(sorted(moments)) or 'none'}, expected those of AdamW, Lion or Adafactor")
    steps = _steps(counters)
    places, expected = parameter_places(config), shapes(config)
    _check_keys(moments, {key for place in places.values() for key in place.keys}, unused(config))
    tensors: dict[str, Tensor] = {}
    for ours, place in places.items():
        pieces = [_Piece(key, expected[key], place, {moment: below[key] for moment, below in moments.items()}) for key in place.keys]
        tensors |= {f"{ours}.{name}": tensor for name, tensor in _CONVERT[kind](pieces, steps).items()}
    return OptimizerState(kind, steps, tensors)


def _sorted_arrays(arrays: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Moments by name and parameter, and counters by key; where in the chain they stand depends on clipping, and means nothing."""
    moments: dict[str, dict[str, Tensor]] = {}
    counters: dict[str, Tensor] = {}
    for key, array in arrays.items():
        moment = re.fullmatch(_MAIN + r"\d+/0/(mu|nu|v|v_row|v_col)/(.+)", key)
        if moment:
            below = moments.setdefault(moment[1], {})
            if moment[2] in below:
                raise ValueError(f"key 'opt_state/{key}' stands twice in the chain of optimizers")
            below[moment[2]] = array
        elif re.fullmatch(_MAIN + r"\d+/(0/)?count", key):
            counters[key] = array
        else:
            raise ValueError(f"key 'opt_state/{key}' of shape {tuple(array.shape)} belongs to no optimizer that is known")
    return moments, counters


def _steps(counters: Mapping[str, Tensor]) -> int:
    """The number of updates that all counters agree on: the optimizer has one, the schedule another."""
    values = {key: read_count(array, f"opt_state/{key}") for key, array in counters.items()}
    if len(set(values.values())) != 1:
        found = ", ".join(f"{key!r} {value}" for key, value in values.items())
        raise ValueError(f"opt_state has the counters {found or 'none'}, expected counters that agree")
    return next(iter(values.values()))


def read_count(array: Tensor, key: str) -> int:
    """The number of steps in an array that is to be one integer of at least 0."""
    if array.is_floating_point() or array.numel() != 1 or int(array) < 0:
        raise ValueError(f"key {key!r} has type {array.dtype} and shape {tuple(array.shape)}, expected one integer of at least 0")
    return int(array)


def _check_keys(moments: Mapping[str, Mapping[str, Tensor]], needed: set[str], unused: set[str]) -> None:
    for moment, below in moments.items():
        for key in sorted(needed - below.keys()):
            raise ValueError(f"key 'opt_state/.../{moment}/{key}' is missing")
        for key in sorted(below.keys() - needed - unused):
            shape = tuple(below[key].shape)
            raise ValueError(f"key 'opt_state/.../{moment}/{key}' of shape {shape} belongs to no parameter of this model")


class _Piece(NamedTuple):
    """The moments of one official array, of which one of our parameters is a part, or which holds some of its rows."""

    key: str
    shape: tuple[int, ...]
    """Of the array."""
    place: Place
    moments: dict[str, Tensor]

    def whole(self, moment: str) -> Tensor:
        """A moment of the shape of the array, as its part of our parameter."""
        return part_of(self.checked(moment, self.shape), self.place)

    def checked(self, moment: str, shape: tuple[int, ...]) -> Tensor:
        """The moment, whose shape has to be this."""
        array = self.moments[moment]
        if not array.is_floating_point() or tuple(array.shape) != shape:
            found = f"{tuple(array.shape)} of {type_name(array)}"
            raise ValueError(f"key 'opt_state/.../{moment}/{self.key}' has shape {found}, expected floating point {shape}")
        return array


def _adamw(pieces: Sequence[_Piece], steps: int) -> dict[str, Tensor]:
    return {"exp_avg": _rows(pieces, "mu"), "exp_avg_sq": _rows(pieces, "nu"), "step": torch.tensor(float(steps))}


def _lion(pieces: Sequence[_Piece], steps: int) -> dict[str, Tensor]:
    return {"exp_avg": _rows(pieces, "mu")}


def _rows(pieces: Sequence[_Piece], moment: str) -> Tensor:
    return joined([piece.checked(moment, piece.shape) for piece in pieces], pieces[0].place)


def _adafactor(pieces: Sequence[_Piece], steps: int) -> dict[str, Tensor]:
    """Whole mean squares, or those of rows and columns where the parameter is large enough for that.

    Of several pieces the mean squares of all their columns are the mean of theirs, weighted by the number of their rows.
    """
    for piece in pieces:
        axes, last = factored_axes(piece.shape), len(piece.shape) - 1
        if axes is not None and set(axes) != {last, last - 1}:
            raise ValueError(f"key 'opt_state/.../v_row/{piece.key}' is a mean over layers, which have no moments in common here")
    if len(part_shape(pieces[0].shape, pieces[0].place)) != 2:
        return {"exp_avg_sq": _rows(pieces, "v")}
    sizes = [part_shape(piece.shape, piece.place) for piece in pieces]
    rows = [size[-1] if pieces[0].place.transposed else size[0] for size in sizes]
    if min(sum(rows), sizes[0][0] if pieces[0].place.transposed else sizes[0][-1]) < SMALLEST_FACTORED:
        return {"exp_avg_sq": _rows(pieces, "v")}
    halves = [_row_and_column(piece) for piece in pieces]
    columns = sum(column * number for (_, column), number in zip(halves, rows, strict=True)) / sum(rows)
    return {"exp_avg_sq_row": torch.cat([row for row, _ in halves]), "exp_avg_sq_col": torch.as_tensor(columns).clone()}


def _row_and_column(piece: _Piece) -> tuple[Tensor, Tensor]:
    """Mean squares of the rows and of the columns of the piece, in our layout."""
    axes = factored_axes(piece.shape)
    if axes is None:
        whole = piece.whole("v")
        return whole.mean(1), whole.mean(0)
    last = len(piece.shape) - 1
    kept = {}
    for moment, axis, other in (("v_row", axes[0], axes[1]), ("v_col", axes[1], axes[0])):
        array = piece.checked(moment, tuple(size for i, size in enumerate(piece.shape) if i != other))
        kept[axis] = array if piece.place.layer is None else array[piece.place.layer, 0]
    first, second = kept[last - 1], kept[last]
    return (second, first) if piece.place.transposed else (first, second)


def factored_axes(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The axes that `v_row` and `v_col` of an array of this official shape keep, beside all shorter ones; None where optax keeps all.

    The longest axis and the second longest are factored; `v_row` is a mean over the longest, `v_col` over the other. Of two equal ones
    the later counts as longer.
    """
    if len(shape) < 2:
        return None
    *_, second, longest = sorted(range(len(shape)), key=lambda axis: shape[axis])
    return (second, longest) if shape[second] >= SMALLEST_FACTORED else None


_CONVERT: dict[Kind, Callable[[Sequence[_Piece], int], dict[str, Tensor]]] = {"adamw": _adamw, "lion": _lion, "adafactor": _adafactor}
