"""Files in Flax's msgpack serialisation as named tensors, without Flax, JAX or pickle.

A file may come from anywhere: nothing in it is executed, no size that it declares is believed before it was compared with the bytes that
are there, and whatever is not as it should be is a ValueError that names the file and the key.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPES: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
}
"""Types of arrays that are read, by the names that NumPy and JAX give them."""

MAX_DEPTH = 32
MAX_ITEMS = 1024
"""Most items of a list; longer ones would let a short file ask for much memory."""
MAX_KEYS = 100_000
MAX_KEY_BYTES = 1024
MAX_DIMENSIONS = 8

_ARRAY, _SCALAR = 1, 3  # Flax's extension types
_CHUNKED = "__msgpack_chunked_array__"  # marks a map that stands for an array too large for one extension


class _Map(list):
    """The pairs of a map, in order and with repetitions, which a dict would hide."""


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All arrays of the file by their keys, levels joined by `/`; items of lists go by their number, as in maps with keys "0", "1", ...

    So the two forms in which Flax writes optimizer states give the same names; nil and empty maps and lists give nothing.
    Raises ImportError without the package msgpack, OSError for a file that cannot be read, ValueError for one that is not whole, is no
    such serialisation, or holds anything but arrays and integers.
    """
    path = Path(path)
    root = _unpack(_read(path), f"{path}")
    if not isinstance(root, _Map):
        raise ValueError(f"{path}: holds {_kind(root)}, expected a map of arrays in Flax's msgpack serialisation")
    try:
        return dict(_tensors(root, "", 1))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read(path: Path) -> bytes:
    with open(path, "rb") as file:
        first = file.read(1)
        # A map opens with one of these bytes: a look at it spares reading gigabytes of something else.
        if not first or not (0x80 <= first[0] <= 0x8F or first[0] in (0xDE, 0xDF)):
            found = f"begins with byte 0x{first.hex()}" if first else "is empty"
            raise ValueError(f"{path}: {found}: no map in msgpack, as Flax writes checkpoints")
        file.seek(0)
        return file.read()


def _unpack(data: bytes, where: str, *, max_items: int = MAX_ITEMS, max_keys: int = MAX_KEYS) -> Any:
    try:
        import msgpack
    except ModuleNotFoundError as error:
        raise ImportError('checkpoints of the official code need the package msgpack: pip install "vqkit[official]"') from error
    try:
        return msgpack.unpackb(
            data,
            raw=False,
            object_pairs_hook=_Map,
            max_array_len=max_items,
            max_map_len=max_keys,
            max_str_len=MAX_KEY_BYTES,
            max_bin_len=len(data),
            max_ext_len=len(data),
        )
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{where}: not a whole msgpack serialisation: {reason}") from error


def _tensors(node: Any, key: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    import msgpack

    if depth > MAX_DEPTH:
        raise ValueError(f"key {key!r} stands {depth} levels deep, expected at most {MAX_DEPTH}")
    if node is None:
        return
    if isinstance(node, _Map):
        below = _table(node, key)
        if _CHUNKED in below:
            yield key, _joined(below, key)
            return
        for name, value in below.items():
            yield from _tensors(value, f"{key}/{name}" if key else name, depth + 1)
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _tensors(value, f"{key}/{i}", depth + 1)
    elif isinstance(node, msgpack.ExtType):
        yield key, _array(node, key)
    elif isinstance(node, int) and not isinstance(node, bool) and -(2**63) <= node < 2**63:
        yield key, torch.tensor(node)
    else:
        raise ValueError(f"key {key!r} holds {_kind(node)}, expected an array, an integer, a map or a list")


def _table(pairs: _Map, key: str) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name, value in pairs:
        if not isinstance(name, str) or not name or "/" in name:
            raise ValueError(f"a map below {key!r} has the key {name!r}, expected a text without '/'")
        if name in table:
            raise ValueError(f"key {f'{key}/{name}' if key else name!r} stands twice")
        table[name] = value
    return table


def _array(packed: Any, key: str) -> Tensor:
    """The array of an extension: msgpack of [shape, name of the type, little-endian bytes]."""
    if packed.code not in (_ARRAY, _SCALAR):
        raise ValueError(f"key {key!r} holds msgpack extension type {packed.code}, expected {_ARRAY} (an array) or {_SCALAR} (a scalar)")
    parts = _unpack(packed.data, f"key {key!r}", max_items=MAX_DIMENSIONS, max_keys=1)
    if isinstance(parts, _Map) or not isinstance(parts, list) or [type(part) for part in parts] != [list, str, bytes]:
        raise ValueError(f"key {key!r} holds {_kind(parts)} where an array is its shape, the name of its type and its bytes")
    shape, name, data = parts
    _check_shape(shape, key)
    if name not in DTYPES:
        raise ValueError(f"key {key!r} has type {name!r}, expected one of {', '.join(DTYPES)}")
    dtype = DTYPES[name]
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"key {key!r} of shape {tuple(shape)} and type {name} has {len(data)} bytes, expected {_bytes(shape, dtype)}")
    bits = np.frombuffer(data, dtype=f"<i{dtype.itemsize}").astype(f"i{dtype.itemsize}")  # a copy, in the byte order of this machine
    return torch.from_numpy(bits).view(dtype).reshape(shape)


def _check_shape(shape: list[Any], key: str) -> None:
    if not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"key {key!r} has shape {shape}, expected integers of at least 1")


def _bytes(shape: list[int], dtype: torch.dtype) -> str:
    return f"{math.prod(shape) * dtype.itemsize:,}"


def _joined(table: dict[str, Any], key: str) -> Tensor:
    """An array that Flax cut into chunks of its elements, each an array of one dimension."""
    import msgpack

    if table.keys() != {_CHUNKED, "shape", "chunks"}:
        raise ValueError(f"key {key!r} is an array in chunks with the entries {list(table)}, expected shape and chunks")
    shape, chunks = _numbered(table["shape"], f"{key}/shape"), _numbered(table["chunks"], f"{key}/chunks")
    _check_shape(shape, key)
    if len(shape) > MAX_DIMENSIONS or not chunks or not all(isinstance(chunk, msgpack.ExtType) for chunk in chunks):
        raise ValueError(f"key {key!r} is an array in {len(chunks)} chunks of {len(shape)} dimensions, expected arrays as chunks")
    parts = [_array(chunk, f"{key}/chunks/{i}") for i, chunk in enumerate(chunks)]
    found = sum(part.numel() for part in parts)
    if len({part.dtype for part in parts}) > 1 or math.prod(shape) != found:
        types = ", ".join(sorted({str(part.dtype).removeprefix("torch.") for part in parts}))
        raise ValueError(f"key {key!r} of shape {tuple(shape)} has chunks of {found:,} elements of {types}, expected {math.prod(shape):,}")
    return torch.cat([part.flatten() for part in parts]).reshape(shape)


def _numbered(node: Any, key: str) -> list[Any]:
    """The values of a map with the keys "0", "1", ..., in that order."""
    table = _table(node, key) if isinstance(node, _Map) else None
    if table is None or table.keys() != {str(i) for i in range(len(table))}:
        raise ValueError(f"key {key!r} holds {_kind(node)}, expected a map with the keys 0, 1, ...")
    return [table[str(i)] for i in range(len(table))]


def _kind(node: Any) -> str:
    if isinstance(node, _Map):
        return "a map"
    names = {list: "a list", str: "a text", bytes: "bytes", bool: "true or false", int: "an integer", float: "a number"}
    return names.get(type(node), "nothing" if node is None else f"a {type(node).__name__}")
