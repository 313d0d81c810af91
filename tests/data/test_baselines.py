"""The baselines are what they are called: the compressors of the standard library, and proper byte tables."""

from __future__ import annotations

import bz2
import gzip
import lzma
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqkit.data import DataConfig, Split, byte_baselines, pack
from vqkit.data.baselines import compressors, table_bits

few_bytes = st.lists(st.sampled_from([0, 1, 7, 255]), max_size=60).map(bytes)


def pieces(data: bytes, *cuts: int) -> list[np.ndarray]:
    return np.split(np.frombuffer(data, dtype=np.uint8), sorted(cuts))


def probability(train: bytes, context: bytes, byte: int) -> float:
    """The definition, by recursion over ever shorter contexts."""
    shorter = probability(train, context[1:], byte) if context else 1 / 256
    n = len(context)
    successors = Counter(train[i + n] for i in range(len(train) - n) if train[i : i + n] == context)
    total = sum(successors.values())
    return (successors[byte] + len(successors) * shorter) / (total + len(successors)) if total else shorter


def bits(train: bytes, test: bytes, order: int) -> float:
    return -sum(math.log2(probability(train, test[max(i - order, 0) : i], byte)) for i, byte in enumerate(test)) / len(test)


@given(few_bytes, few_bytes.filter(len), st.integers(0, 1), st.lists(st.integers(0, 60), max_size=3))
def test_tables_are_their_definition(train: bytes, test: bytes, order: int, cuts: list[int]) -> None:
    assert table_bits(pieces(train, *cuts), test, order) == pytest.approx(bits(train, test, order), rel=1e-12)


@settings(max_examples=15)  # the table of order 2 is large, whatever it counts
@given(few_bytes, few_bytes.filter(len), st.lists(st.integers(0, 60), max_size=3))
def test_the_table_of_order_2_is_its_definition(train: bytes, test: bytes, cuts: list[int]) -> None:
    assert table_bits(pieces(train, *cuts), test, 2) == pytest.approx(bits(train, test, 2), rel=1e-12)


@given(few_bytes, few_bytes.map(lambda context: context[:2]))
def test_the_definition_gives_probabilities_that_add_up_to_one(train: bytes, context: bytes) -> None:
    chances = [probability(train, context, byte) for byte in range(256)]
    assert sum(chances) == pytest.approx(1.0, rel=1e-9)
    assert min(chances) > 0.0


def test_compressors_are_those_of_the_standard_library() -> None:
    # Long and varied enough for each compressor's strongest setting to differ from its weaker ones.
    data = b"".join(b"%d bottles %d on the wall %d\n" % (i * i % 97, i % 89, i**3 % 1009) for i in range(8000))
    assert len(gzip.compress(data, 9)) < len(gzip.compress(data, 6)) and len(bz2.compress(data, 9)) < len(bz2.compress(data, 1))
    sizes = {name: value * len(data) / 8 for name, value in compressors(data).items()}
    assert sizes == {
        "gzip": len(gzip.compress(data, 9)),
        "bzip2": len(bz2.compress(data, 9)),
        "xz": len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)),
    }


def test_baselines_see_the_bytes_of_all_documents_without_end_tokens(tmp_path: Path) -> None:
    for i in range(30):
        path = tmp_path / "corpus" / str(i)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"line %d of a file\n" % i * 3)
    pack(DataConfig(path=str(tmp_path / "corpus"), test_fraction=0.3, sequence_len=8), tmp_path / "data")
    train, test = (Split(tmp_path / "data", name) for name in ("train", "test"))
    train_bytes, test_bytes = (b"".join(s.document(i) for i in range(s.num_documents)) for s in (train, test))
    tables = {f"order-{order}": table_bits(pieces(train_bytes), test_bytes, order) for order in (1, 2)}
    assert byte_baselines(train, test) == compressors(test_bytes) | tables


def test_nothing_cannot_be_measured() -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        table_bits([], b"", 1)
    with pytest.raises(ValueError, match="order = 3: must be from 0 to 2"):
        table_bits([], b"a", 3)
