"""Arrays of an official parameter tree: where one of our tensors stands in it, and whether all keys and shapes are as they should be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """Where the official tree holds one of our tensors."""

    keys: tuple[str, ...]
    """Usually one; of several, our tensor holds the rows of all, in order."""
    transposed: bool = False
    """Kernels are [in, out] there and [out, in] here."""
    layer: int | None = None
    """Index [layer, 0] of arrays that hold all layers, [n_layer, 1, ...]."""


def at(key: str, transposed: bool = False, layer: int | None = None) -> Place:
    """The place of a tensor that is one array, or one layer of one."""
    return Place((key,), transposed, layer)


def part_of(array: Tensor, place: Place) -> Tensor:
    """What an array of the place holds of our tensor, in our layout; a view."""
    array = array if place.layer is None else array[place.layer, 0]
    return array.T if place.transposed else array


def part_shape(shape: tuple[int, ...], place: Place) -> tuple[int, ...]:
    """Shape of that part, in the official layout."""
    return shape if place.layer is None else shape[2:]


def joined(arrays: Sequence[Tensor], place: Place) -> Tensor:
    """Our tensor from the arrays of its keys, in memory of its own."""
    parts = [part_of(array, place) for array in arrays]
    return parts[0].clone(memory_format=torch.contiguous_format) if len(parts) == 1 else torch.cat(parts)


def parted(tensor: Tensor, place: Place, shapes: Mapping[str, tuple[int, ...]]) -> list[Tensor]:
    """The inverse of `joined`: one part a key, in the official layout, of one layer where the arrays hold all; views.

    Raises ValueError where the tensor has not as many rows as they have.
    """
    if len(place.keys) == 1:
        parts: Sequence[Tensor] = [tensor]
    else:
        rows = [part_shape(shapes[key], place)[-1 if place.transposed else 0] for key in place.keys]
        if tensor.dim() == 0 or sum(rows) != tensor.shape[0]:
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)}, expected {sum(rows)} rows: those of {' and '.join(place.keys)}")
        parts = tensor.split(rows)
    return [part.T if place.transposed else part for part in parts]


def check_keys_and_shapes(arrays: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless `arrays` has exactly the expected keys and shapes, all floating point."""
    for key, shape in expected.items():
        if key not in arrays:
            raise ValueError(f"key {key!r} of shape {shape} is missing")
        if tuple(arrays[key].shape) != shape:
            raise ValueError(f"key {key!r} has shape {tuple(arrays[key].shape)}, expected {shape}")
        if not arrays[key].is_floating_point():
            raise ValueError(f"key {key!r} has type {type_name(arrays[key])}, expected floating point")
    for key, array in arrays.items():
        if key not in expected:
            raise ValueError(f"key {key!r} of shape {tuple(array.shape)} belongs to no part of this model")


def shape_of(arrays: Mapping[str, Tensor], key: str, dimensions: int) -> tuple[int, ...]:
    """The shape of an array that sizes of the model are read from. Raises ValueError where it is missing or has other dimensions."""
    if key not in arrays:
        raise ValueError(f"key {key!r} is missing, from which sizes of the model are read")
    shape = tuple(arrays[key].shape)
    if len(shape) != dimensions:
        raise ValueError(f"key {key!r} has shape {shape}, expected {dimensions} dimensions")
    return shape


def check_stated(name: str, stated: object, found: object, key: str, shape: tuple[int, ...] | None) -> None:
    """Raise ValueError where a setting that was stated is not what the tree tells by `key` (shape None: by not having it)."""
    if stated is not None and stated != found:
        tells = f"there is no key {key!r}" if shape is None else f"key {key!r} has shape {shape}"
        raise ValueError(f"{name} = {stated!r}: {tells}, expected {name} = {found!r}")


def first_names(keys: Iterable[str]) -> str:
    """The uppermost levels of a tree, a few of them, for a message."""
    return ", ".join(repr(name) for name in list(dict.fromkeys(key.split("/")[0] for key in keys))[:8]) or "no array"


def type_name(array: Tensor) -> str:
    """`float32` for torch.float32."""
    return str(array.dtype).removeprefix("torch.")
