"""Optimizer states of the official launch script by the names of ours: AdamW, Lion and Adafactor, as optax keeps them.

There each parameter of the group "main" has moments; the codebooks are a group of their own, plain SGD, and have none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vqkit.compat.official_names import UNUSED, Place, parameter_places, shapes
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
    tensors: dict[str, Tensor] = {}
    expected = shapes(config)
    for ours, place in parameter_places(config).items():
        of_parameter = {moment: _moment(moments[moment], moment, place.key) for moment in moments}
        converted = _CONVERT[kind](of_parameter, place, expected[place.key], steps)
        tensors |= {f"{ours}.{name}": tensor for name, tensor in converted.items()}
    known = {place.key for place in parameter_places(config).values()} | {UNUSED}
    for moment, below in moments.items():
        for key, array in below.items():
            if key not in known:
                raise ValueError(f"key 'opt_state/.../{moment}/{key}' of shape {tuple(array.shape)} belongs to no parameter of this model")
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


def _moment(below: Mapping[str, Tensor], moment: str, key: str) -> Tensor:
    if key not in below:
        raise ValueError(f"key 'opt_state/.../{moment}/{key}' is missing")
    return below[key]


def _adamw(moments: Mapping[str, Tensor], place: Place, shape: tuple[int, ...], steps: int) -> dict[str, Tensor]:
    average, square = (_as_parameter(moments, moment, place, shape) for moment in ("mu", "nu"))
    return {"exp_avg": average, "exp_avg_sq": square, "step": torch.tensor(float(steps))}


def _lion(moments: Mapping[str, Tensor], place: Place, shape: tuple[int, ...], steps: int) -> dict[str, Tensor]:
    return {"exp_avg": _as_parameter(moments, "mu", place, shape)}


def _adafactor(moments: Mapping[str, Tensor], place: Place, shape: tuple[int, ...], steps: int) -> dict[str, Tensor]:
    axes = factored_axes(shape)
    if axes is None:
        return {"exp_avg_sq": _as_parameter(moments, "v", place, shape)}
    found = {}
    for moment, kept in zip(("v_row", "v_col"), axes, strict=True):
        _check_shape(moments[moment], moment, place, (shape[kept],))
        ours = 1 - kept if place.transposed else kept
        found["exp_avg_sq_row" if ours == 0 else "exp_avg_sq_col"] = moments[moment].clone()
    return found


def factored_axes(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The axes that `v_row` and `v_col` keep of a matrix of this official shape; None where optax keeps the whole.

    `v_row` is a mean over the longer axis, `v_col` over the shorter one; of two equal ones the second counts as longer.
    """
    if len(shape) != 2 or min(shape) < SMALLEST_FACTORED:
        return None
    return (1, 0) if shape[0] > shape[1] else (0, 1)


def _as_parameter(moments: Mapping[str, Tensor], moment: str, place: Place, shape: tuple[int, ...]) -> Tensor:
    array = moments[moment]
    _check_shape(array, moment, place, shape)
    return (array.T if place.transposed else array).clone(memory_format=torch.contiguous_format)


def _check_shape(array: Tensor, moment: str, place: Place, shape: tuple[int, ...]) -> None:
    if not array.is_floating_point() or tuple(array.shape) != shape:
        found = f"{tuple(array.shape)} of {str(array.dtype).removeprefix('torch.')}"
        raise ValueError(f"key 'opt_state/.../{moment}/{place.key}' has shape {found}, expected floating point {shape}")


_CONVERT: dict[Kind, Callable[[Mapping[str, Tensor], Place, tuple[int, ...], int], dict[str, Tensor]]] = {
    "adamw": _adamw,
    "lion": _lion,
    "adafactor": _adafactor,
}
