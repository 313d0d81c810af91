"""Files in Flax's serialisation: what is read, and what is refused by name."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch

from vqkit.compat.flax_file import DTYPES, MAX_DEPTH, read_tensors


def packed(array: np.ndarray, name: str | None = None, shape: Any = None, code: int = 1) -> msgpack.ExtType:
    """An array as Flax packs it; `name` and `shape` may lie."""
    shape = list(array.shape) if shape is None else shape
    return msgpack.ExtType(code, msgpack.packb([shape, name or array.dtype.name, array.tobytes()]))


def write(tree: Any, folder: Path) -> Path:
    path = folder / "checkpoint"
    path.write_bytes(tree if isinstance(tree, bytes) else msgpack.packb(tree))
    return path


NUMBERS = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.mark.parametrize("name", sorted(set(DTYPES) - {"bfloat16"}))
def test_every_type_comes_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    array = np.array([[1, 2, 3], [-4, 5, 0]]).astype(name)
    (found,) = read_tensors(write({"a": packed(array)}, tmp_path)).values()
    assert found.dtype == DTYPES[name]
    assert torch.equal(found, torch.from_numpy(array))


def test_bfloat16_comes_back_bit_for_bit(tmp_path: Path) -> None:
    expected = torch.tensor([[1.5, -2.0, math.inf]], dtype=torch.bfloat16)
    bits = expected.view(torch.int16).numpy()
    found = read_tensors(write({"a": packed(bits, "bfloat16")}, tmp_path))["a"]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


def test_maps_with_numbers_and_lists_are_the_same_and_what_is_empty_is_nothing(tmp_path: Path) -> None:
    array, count = packed(NUMBERS), packed(np.array(3, dtype=np.int32))
    as_maps = write({"step": 3, "o": {"0": {}, "1": {"0": {"count": count, "mu": {"w": array, "c": {}}}}}}, tmp_path)
    maps = read_tensors(as_maps)
    lists = read_tensors(write({"o": [None, [{"mu": {"c": None, "w": array}, "count": count}]], "step": 3}, tmp_path))
    assert maps.keys() == lists.keys() == {"step", "o/1/0/count", "o/1/0/mu/w"}
    for key, tensor in maps.items():
        assert torch.equal(tensor, lists[key])
    assert int(maps["step"]) == int(maps["o/1/0/count"]) == 3


def test_scalars_and_arrays_in_chunks(tmp_path: Path) -> None:
    flat = NUMBERS.reshape(-1)
    chunks = {str(i): packed(flat[4 * i : 4 * i + 4]) for i in range(2)}
    tree = {"a": {"__msgpack_chunked_array__": True, "shape": {"0": 2, "1": 3}, "chunks": chunks}, "s": packed(np.array(7), code=3)}
    found = read_tensors(write(tree, tmp_path))
    assert torch.equal(found["a"], torch.from_numpy(NUMBERS))
    assert int(found["s"]) == 7


def nested(depth: int) -> Any:
    tree: Any = packed(NUMBERS)
    for _ in range(depth):
        tree = {"a": tree}
    return tree


def chunked(shape: Any, chunks: Any, **more: Any) -> dict[str, Any]:
    return {"p": {"w": {"__msgpack_chunked_array__": True, "shape": shape, "chunks": chunks, **more}}}


GOOD = msgpack.packb({"p": {"w": packed(NUMBERS)}})
CHUNK = {"0": packed(NUMBERS.reshape(-1))}
BAD: dict[str, tuple[Any, str]] = {
    "empty": (b"", "is empty"),
    "text": (b"# a checkpoint\n", "begins with byte 0x23"),
    "a number": (msgpack.packb(7), "begins with byte 0x07"),
    "a list": (msgpack.packb([1, 2]), "begins with byte 0x92"),
    "truncated": (GOOD[:-3], "not a whole msgpack serialisation"),
    "with a tail": (GOOD + b"\x01", "not a whole msgpack serialisation"),
    "no utf-8": (b"\x81\xa1\xff\x01", "not a whole msgpack serialisation"),
    "reserved byte": (b"\x81\xa1a\xc1", "not a whole msgpack serialisation"),
    "huge map": (b"\xdf\xff\xff\xff\xff", "exceeds max_map_len"),
    "huge list": (b"\x81\xa1a\xdd\xff\xff\xff\xff", "exceeds max_array_len"),
    "huge text": (b"\x81\xdb\xff\xff\xff\xff", "not a whole msgpack serialisation"),
    "huge bytes": (b"\x81\xa1a\xc6\xff\xff\xff\xff", "not a whole msgpack serialisation"),
    "huge extension": (b"\x81\xa1a\xc9\xff\xff\xff\xff\x01", "not a whole msgpack serialisation"),
    "huge shape": (
        {"p": {"w": packed(NUMBERS, shape=[2**40, 2**40])}},
        "'p/w' of shape (1099511627776, 1099511627776) and type float32 has 24 bytes",
    ),
    "shape of another array": (
        {"p": {"w": packed(NUMBERS, shape=[2, 4])}},
        "'p/w' of shape (2, 4) and type float32 has 24 bytes, expected 32",
    ),
    "negative shape": ({"p": {"w": packed(NUMBERS, shape=[-2, -3])}}, "'p/w' has shape [-2, -3]"),
    "shape without elements": ({"p": {"w": packed(NUMBERS, shape=[0, 3])}}, "'p/w' has shape [0, 3]"),
    "shape of words": ({"p": {"w": packed(NUMBERS, shape=["2", 3])}}, "'p/w' has shape ['2', 3]"),
    "shape of truths": ({"p": {"w": packed(NUMBERS, shape=[True, 6])}}, "'p/w' has shape [True, 6]"),
    "too many dimensions": (
        {"p": {"w": packed(NUMBERS, shape=[1] * 9)}},
        "'p/w': not a whole msgpack serialisation: 9 exceeds max_array_len",
    ),
    "unknown type": ({"p": {"w": packed(NUMBERS, "float31")}}, "'p/w' has type 'float31', expected one of float16, bfloat16"),
    "objects": ({"p": {"w": packed(NUMBERS, "object")}}, "'p/w' has type 'object'"),
    "complex": ({"p": {"w": packed(NUMBERS.astype(np.complex64))}}, "'p/w' has type 'complex64'"),
    "another extension": ({"p": {"w": msgpack.ExtType(42, b"abc")}}, "'p/w' holds msgpack extension type 42"),
    "a time": (b"\x81\xa1a" + msgpack.packb(msgpack.Timestamp(1)), "'a' holds a Timestamp"),
    "no array inside": ({"p": {"w": msgpack.ExtType(1, msgpack.packb({"a": 1}))}}, "'p/w' holds a map where an array"),
    "two parts inside": ({"p": {"w": msgpack.ExtType(1, msgpack.packb([[1], "int32"]))}}, "'p/w' holds a list where an array"),
    "noise inside": ({"p": {"w": msgpack.ExtType(1, b"\xc1\xc1")}}, "'p/w': not a whole msgpack serialisation"),
    "a text": ({"p": {"w": "weights"}}, "'p/w' holds a text"),
    "bytes": ({"p": {"w": b"weights"}}, "'p/w' holds bytes"),
    "a number as leaf": ({"p": {"w": 1.5}}, "'p/w' holds a number"),
    "a truth": ({"p": {"w": True}}, "'p/w' holds true or false"),
    "an integer too large": ({"p": {"w": 2**64 - 1}}, "'p/w' holds an integer"),
    "a key with a slash": ({"p": {"a/b": packed(NUMBERS)}}, "below 'p' has the key 'a/b'"),
    "an empty key": ({"p": {"": packed(NUMBERS)}}, "below 'p' has the key ''"),
    "a key of bytes": ({"p": {b"w": packed(NUMBERS)}}, "below 'p' has the key b'w'"),
    "a key twice": (b"\x81\xa1p\x82\xa1w\x01\xa1w\x02", "'p/w' stands twice"),
    "deep": (nested(MAX_DEPTH + 1), f"expected at most {MAX_DEPTH}"),
    "deeper than the stack": (b"\x81\xa1a" * 100_000, "not a whole msgpack serialisation"),
    "chunks that are too few": (chunked({"0": 2, "1": 4}, CHUNK), "'p/w' of shape (2, 4) has chunks of 6 elements of float32, expected 8"),
    "chunks of two types": (
        chunked({"0": 12}, CHUNK | {"1": packed(np.arange(6))}),
        "'p/w' of shape (12,) has chunks of 12 elements of float32, int64",
    ),
    "no chunks": (chunked({"0": 2}, {}), "'p/w' is an array in 0 chunks"),
    "chunks of words": (chunked({"0": 2}, {"0": "a"}), "'p/w' is an array in 1 chunks"),
    "chunks without number": (chunked({"0": 6}, {"first": CHUNK["0"]}), "'p/w/chunks' holds a map, expected a map with the keys 0, 1"),
    "chunks with more": (chunked({"0": 6}, CHUNK, more=1), "'p/w' is an array in chunks with the entries"),
    "chunks without shape": (chunked(7, CHUNK), "'p/w/shape' holds an integer"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_such_file_is_refused_by_name(tmp_path: Path, case: str) -> None:
    tree, message = BAD[case]
    path = write(tree, tmp_path)
    with pytest.raises(ValueError) as error:
        read_tensors(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_noise_is_refused(tmp_path: Path) -> None:
    """Random bytes after the first byte of a map, and a good file with random bytes changed: a ValueError or other numbers, never more."""
    draw = random.Random(0)
    whole = msgpack.packb({"p": {"w": packed(NUMBERS), "b": packed(NUMBERS[0])}, "step": 3})
    refused = 0
    for i in range(600):
        noise = bytearray(whole) if i % 2 else bytearray([0x82, *draw.randbytes(100)])
        for _ in range(draw.randrange(1, 4)):
            noise[draw.randrange(len(noise))] = draw.randrange(256)
        try:
            read_tensors(write(bytes(noise), tmp_path))
        except ValueError:
            refused += 1
    assert 300 < refused < 600


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    for length in range(len(GOOD)):
        with pytest.raises(ValueError):
            read_tensors(write(GOOD[:length], tmp_path))


def test_without_msgpack_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "msgpack", None)
    with pytest.raises(ImportError, match=r'pip install "vqkit\[official\]"'):
        read_tensors(write(GOOD, tmp_path))
