"""What others make of the same bytes: general compressors, and tables of byte frequencies learned from the training split.

They stand beside a model's bits per byte, so that the number means something.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Iterable

import numpy as np

from vqkit.data.stored import Split


def byte_baselines(train: Split, test: Split) -> dict[str, float]:
    """Bits per byte of the test split's bytes, all documents as one, by name: gzip, bzip2, xz, order-1, order-2.

    The compressors see nothing but the test bytes, at their strongest settings. The tables are learned from the training bytes.
    Raises ValueError if the test split is empty.
    """
    data = b"".join(piece.tobytes() for piece in test.byte_pieces())
    if not data:
        raise ValueError("the test split has no bytes: bits per byte need at least one")
    return compressors(data) | {f"order-{order}": table_bits(train.byte_pieces(), data, order) for order in (1, 2)}


def compressors(data: bytes) -> dict[str, float]:
    """Bits per byte of `gzip -9`, `bzip2 -9` and `xz -9e` on `data`, which must not be empty."""
    sizes = {
        "gzip": len(gzip.compress(data, compresslevel=9, mtime=0)),
        "bzip2": len(bz2.compress(data, compresslevel=9)),
        "xz": len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)),
    }
    return {name: 8.0 * size / len(data) for name, size in sizes.items()}


def table_bits(train: Iterable[np.ndarray], test: bytes, order: int) -> float:
    """Bits per byte of `test` under the frequencies of each byte after its `order` predecessors in `train` (uint8 pieces).

    Interpolated with all shorter contexts down to the uniform distribution after Witten and Bell (1991), method C: a context that was
    seen n times, with d different successors, weighs n / (n + d). The first bytes have as much context as there is.
    """
    if not test:
        raise ValueError("test = b'': bits per byte need at least one byte")
    if not 0 <= order <= 2:
        raise ValueError(f"order = {order}: must be from 0 to 2; a table holds 256^(order + 1) counts")
    target = np.frombuffer(test, dtype=np.uint8)
    probability = np.full(len(target), 1.0 / 256)
    for length, counts in enumerate(_count(train, order)):
        # From byte number `length` on, counted from 0, there is a context of that length.
        grams = _grams(target, length)
        seen, total, distinct = counts[grams], counts.reshape(-1, 256).sum(axis=1), np.count_nonzero(counts.reshape(-1, 256), axis=1)
        total, distinct = total[grams // 256], distinct[grams // 256]
        shorter = probability[length:]
        probability[length:] = np.where(total > 0, (seen + distinct * shorter) / np.maximum(total + distinct, 1), shorter)
    return float(-np.log2(probability).mean())


def _count(pieces: Iterable[np.ndarray], order: int) -> list[np.ndarray]:
    """How often each byte follows each context of 0, 1, ..., `order` bytes: arrays of 256, 256^2, ... entries."""
    counts = [np.zeros(256 ** (length + 1), dtype=np.int64) for length in range(order + 1)]
    before = np.empty(0, dtype=np.uint8)
    for piece in pieces:
        joined = np.concatenate([before, piece])
        for length, table in enumerate(counts):
            new = _grams(joined, length)[max(len(before) - length, 0) :]
            grams, number = np.unique(new, return_counts=True)
            table[grams] += number
        before = joined[max(len(joined) - order, 0) :]
    return counts


def _grams(data: np.ndarray, length: int) -> np.ndarray:
    """Each byte of `data` that has `length` predecessors, with these before it, as one number in base 256."""
    grams = np.zeros(max(len(data) - length, 0), dtype=np.uint32)
    for i in range(length + 1):
        grams = grams * 256 + data[i : len(data) - length + i]
    return grams
