"""Tokenizers: between the items that a person has (bytes of text, ids, images) and the ids that a model sees.

All keep three ids below the others: 0 padding, 1 end of document, 2 unknown. `decode(encode(item)) == item` for every item that
the tokenizer promises that of.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from vqkit.files import write_text_atomic

TOKENIZER_FILE = "tokenizer.json"
FORMAT = 1


class Tokenizer(Protocol):
    """What the rooms above know of a tokenizer."""

    PAD: ClassVar[int]
    END: ClassVar[int]
    UNKNOWN: ClassVar[int]
    kind: ClassVar[str]

    @property
    def vocab_size(self) -> int:
        """Number of ids, the special ones included."""
        ...

    @property
    def hash(self) -> str:
        """32 hexadecimal digits that are equal where two tokenizers give every item the same ids."""
        ...

    def encode(self, data: Any) -> np.ndarray:
        """Ids of an item, int64 in one dimension, without any special id but `UNKNOWN`."""
        ...

    def encode_pieces(self, pieces: Iterable[Any]) -> Iterator[np.ndarray]:
        """The ids of one long item that comes in pieces: together what `encode` of the whole gives."""
        ...

    def decode(self, ids: Any) -> Any:
        """The item of one-dimensional integer `ids` (array, CPU tensor or list); padding and ends are dropped.

        Raises TypeError for ids that are not integers and ValueError for an id outside the vocabulary.
        """
        ...

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write what `load_tokenizer` needs into `folder`."""
        ...


class SpecialIds:
    """The ids that every tokenizer keeps below the others."""

    PAD: ClassVar[int] = 0
    END: ClassVar[int] = 1
    UNKNOWN: ClassVar[int] = 2


class ByteTokenizer(SpecialIds):
    """Byte b is id b + 3; below stand three special ids: padding, end of document, unknown."""

    FIRST_BYTE = 3
    kind: ClassVar[str] = "bytes"
    vocab_size = 259

    @property
    def hash(self) -> str:
        """See `Tokenizer`."""
        return digest_of(b"bytes 3")

    def encode(self, data: bytes | bytearray | memoryview) -> np.ndarray:
        """Ids of `data`, int64 [len(data)], without any special id. Raises TypeError for anything but bytes."""
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"data is a {type(data).__name__}: must be bytes; encode text first, for example by text.encode()")
        return np.frombuffer(data, dtype=np.uint8).astype(np.int64) + self.FIRST_BYTE

    def encode_pieces(self, pieces: Iterable[bytes]) -> Iterator[np.ndarray]:
        """See `Tokenizer`."""
        return map(self.encode, pieces)

    def decode(self, ids: Any) -> bytes:
        """The bytes of one-dimensional integer `ids` (array, CPU tensor or list); special ids are dropped.

        Raises TypeError for ids that are not integers and ValueError for an id outside the vocabulary.
        """
        array = checked_ids(ids, self.vocab_size)
        return (array[array >= self.FIRST_BYTE] - self.FIRST_BYTE).astype(np.uint8).tobytes()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """See `Tokenizer`."""
        write_description(folder, self)


class IdTokenizer(SpecialIds):
    """Ids of a vocabulary of the user's own: id i is i + `shift`, 3 where the three special ids are added, 0 where they are included."""

    kind: ClassVar[str] = "ids"

    def __init__(self, num_ids: int, shift: int) -> None:
        if shift not in (0, 3):
            raise ValueError(f"shift = {shift}: must be 3 where special ids are added to the vocabulary, 0 where it includes them")
        if num_ids < 1:
            raise ValueError(f"num_ids = {num_ids}: must be at least 1")
        self.num_ids, self.shift = num_ids, shift

    @property
    def vocab_size(self) -> int:
        """See `Tokenizer`."""
        return self.num_ids + self.shift

    @property
    def hash(self) -> str:
        """See `Tokenizer`."""
        return digest_of(f"ids {self.num_ids} {self.shift}".encode())

    def encode(self, data: Any) -> np.ndarray:
        """Ids of a row of integers. Raises TypeError for anything else, ValueError for one outside the vocabulary."""
        return checked_ids(data, self.num_ids).astype(np.int64) + self.shift

    def encode_pieces(self, pieces: Iterable[Any]) -> Iterator[np.ndarray]:
        """See `Tokenizer`."""
        return map(self.encode, pieces)

    def decode(self, ids: Any) -> np.ndarray:
        """The user's ids, int64 [T]; padding and ends are dropped, and unknown ones where special ids were added."""
        array = checked_ids(ids, self.vocab_size).astype(np.int64)
        return array[array >= max(self.shift, self.UNKNOWN)] - self.shift

    def save(self, folder: str | os.PathLike[str]) -> None:
        """See `Tokenizer`."""
        write_description(folder, self, num_ids=self.num_ids, shift=self.shift)


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer saved in `folder`. Raises ValueError if there is none or it is damaged."""
    path = Path(folder) / TOKENIZER_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no tokenizer: there is no {TOKENIZER_FILE} in it") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("options"), dict):
        raise ValueError(f"{path} is not the description of a tokenizer of format {FORMAT}")
    tokenizer = _made(found.get("kind"), found["options"], Path(folder), path)
    if found.get("hash") != tokenizer.hash or found.get("vocab_size") != tokenizer.vocab_size:
        raise ValueError(f"{path} speaks of another tokenizer (hash {found.get('hash')}) than lies there (hash {tokenizer.hash})")
    return tokenizer


def _made(kind: Any, options: dict[str, Any], folder: Path, path: Path) -> Tokenizer:
    from vqkit.data.images import ImageTokenizer
    from vqkit.data.pieces import MODEL_FILE, SentencePieceTokenizer

    try:
        match kind:
            case "bytes":
                return ByteTokenizer(**options)
            case "ids":
                return IdTokenizer(**options)
            case "images":
                return ImageTokenizer(**options)
            case "sentencepiece":
                return SentencePieceTokenizer((folder / MODEL_FILE).read_bytes(), **options)
    except TypeError as error:
        raise ValueError(f"{path}: wrong options of a tokenizer of kind {kind!r}: {error}") from error
    raise ValueError(f"{path}: kind = {kind!r}: must be bytes, ids, images or sentencepiece")


def write_description(folder: str | os.PathLike[str], tokenizer: Tokenizer, **options: Any) -> None:
    """The file by which `load_tokenizer` makes `tokenizer` again, from `options`."""
    entries = {"format": FORMAT, "kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "hash": tokenizer.hash, "options": options}
    write_text_atomic(Path(folder) / TOKENIZER_FILE, json.dumps(entries, indent=2) + "\n")


def checked_ids(ids: Any, vocab_size: int) -> np.ndarray:
    """`ids` as an array of one dimension. Raises TypeError unless they are integers, ValueError for one outside the vocabulary."""
    array = np.asarray(ids)
    if array.size == 0:
        return np.empty(0, dtype=np.int64)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise TypeError(f"ids have dtype {array.dtype} and {array.ndim} dimensions: must be integers in one dimension")
    for extreme in (array.min(), array.max()):
        if not 0 <= extreme < vocab_size:
            raise ValueError(f"ids contain {extreme}: must be from 0 to {vocab_size - 1}")
    return array


def digest_of(data: bytes) -> str:
    """32 hexadecimal digits of blake2b."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()
