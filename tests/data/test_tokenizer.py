"""The byte tokenizer loses nothing and lets nothing wrong pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqkit.data import ByteTokenizer

tokenizer = ByteTokenizer()


@given(st.binary())
def test_decoding_undoes_encoding(data: bytes) -> None:
    ids = tokenizer.encode(data)
    assert ids.dtype == np.int64 and ids.shape == (len(data),)
    assert tokenizer.decode(ids) == data
    assert tokenizer.decode(ids.astype(np.uint16)) == data
    assert tokenizer.decode(torch.from_numpy(ids)) == data
    assert tokenizer.decode(ids.tolist()) == data


def test_every_byte_has_an_id_of_its_own_above_the_special_ones() -> None:
    ids = tokenizer.encode(bytes(range(256)))
    special = [tokenizer.PAD, tokenizer.END, tokenizer.UNKNOWN]
    assert sorted([*special, *ids.tolist()]) == list(range(tokenizer.vocab_size))
    assert ids.tolist() == [byte + 3 for byte in range(256)]


@given(st.lists(st.one_of(st.integers(0, 2), st.integers(3, 258))))
def test_special_ids_are_dropped(ids: list[int]) -> None:
    assert tokenizer.decode(ids) == bytes(i - 3 for i in ids if i >= 3)


@pytest.mark.parametrize("wrong", [-1, 259, 70_000])
def test_an_id_outside_the_vocabulary_is_named(wrong: int) -> None:
    with pytest.raises(ValueError, match=f"contain {wrong}: must be from 0 to 258"):
        tokenizer.decode([5, wrong, 7])


@pytest.mark.parametrize("wrong", [[1.5], [[3, 4]], ["a"], 5])
def test_only_rows_of_integers_are_decoded(wrong: object) -> None:
    with pytest.raises(TypeError, match="must be integers in one dimension"):
        tokenizer.decode(wrong)


def test_text_is_not_bytes() -> None:
    with pytest.raises(TypeError, match="data is a str: must be bytes"):
        tokenizer.encode("text")  # type: ignore[arg-type]
