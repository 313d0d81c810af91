"""The byte tokenizer: every byte string has exactly one sequence of ids, and comes back whole."""

from __future__ import annotations

from typing import Any

import numpy as np


class ByteTokenizer:
    """Byte b is id b + 3; below stand three special ids: padding, end of document, unknown."""

    PAD = 0
    END = 1
    UNKNOWN = 2
    FIRST_BYTE = 3
    vocab_size = 259

    def encode(self, data: bytes | bytearray | memoryview) -> np.ndarray:
        """Ids of `data`, int64 [len(data)], without any special id. Raises TypeError for anything but bytes."""
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"data is a {type(data).__name__}: must be bytes; encode text first, for example by text.encode()")
        return np.frombuffer(data, dtype=np.uint8).astype(np.int64) + self.FIRST_BYTE

    def decode(self, ids: Any) -> bytes:
        """The bytes of one-dimensional integer `ids` (array, CPU tensor or list); special ids are dropped.

        Raises TypeError for ids that are not integers and ValueError for an id outside the vocabulary.
        """
        array = np.asarray(ids)
        if array.size == 0:
            return b""
        if array.dtype.kind not in "iu" or array.ndim != 1:
            raise TypeError(f"ids have dtype {array.dtype} and {array.ndim} dimensions: must be integers in one dimension")
        for extreme in (array.min(), array.max()):
            if not 0 <= extreme < self.vocab_size:
                raise ValueError(f"ids contain {extreme}: must be from 0 to {self.vocab_size - 1}")
        return (array[array >= self.FIRST_BYTE] - self.FIRST_BYTE).astype(np.uint8).tobytes()
