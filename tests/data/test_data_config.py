"""Contradictory or impossible data configurations are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from vqkit.config import from_json, to_json
from vqkit.data import DataConfig
from vqkit.data.config import (
    ByteTokens,
    FractionSplits,
    IdSource,
    ImageSource,
    PathSplits,
    SentencePieceTokens,
    SizedSplits,
    TextSource,
)


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("path", None),
        ("include", ()),
        ("include", "*.py"),
        ("include", ("",)),
        ("exclude", (3,)),
        ("min_file_bytes", 0),
        ("min_file_bytes", True),
        ("max_validation_bytes", -1),
        ("max_test_bytes", 1.5),
        ("sequence_len", 0),
        ("validation_fraction", -0.1),
        ("validation_fraction", float("nan")),
        ("test_fraction", 1.0),
        ("test_fraction", "a lot"),
        ("segments", "isolated"),
    ],
)
def test_a_wrong_value_is_named(field: str, wrong: Any) -> None:
    with pytest.raises(ValueError, match=rf"^data\.{field} = .*must"):
        DataConfig(**{field: wrong})


def test_something_must_be_left_for_training() -> None:
    with pytest.raises(ValueError, match=r"data\.validation_fraction = 0\.5 and data\.test_fraction = 0\.5.*less than 1"):
        DataConfig(validation_fraction=0.5, test_fraction=0.5)


def test_a_configuration_comes_back_from_json_as_it_was() -> None:
    config = DataConfig(path="a folder", include=("*.py", "docs/*"), exclude=(), max_test_bytes=9, segments="ignore")
    assert from_json(DataConfig, to_json(config)) == config


KINDS = {
    "source": [TextSource(), IdSource(100, "int64", "included"), ImageSource(2, 3, 1)],
    "splits": [FractionSplits(), SizedSplits(5, 4, 0), PathSplits("a", "", "c")],
    "tokenizer": [ByteTokens(), SentencePieceTokens(500, "words.model")],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in KINDS.items() for value in values])
def test_every_kind_comes_back_from_json(field: str, value: Any) -> None:
    config = DataConfig(sequence_len=6, **{field: value})
    assert from_json(DataConfig, to_json(config)) == config


def test_a_configuration_without_kinds_is_one_of_text_bytes_and_fractions() -> None:
    config = from_json(DataConfig, '{"path": "x", "validation_fraction": 0.1, "sequence_len": 64}')
    assert config == DataConfig(path="x", validation_fraction=0.1, sequence_len=64)
    assert (config.source, config.splits, config.tokenizer) == (TextSource(), FractionSplits(), ByteTokens())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"source": {"kind": "idss"}}', r"config\.source\.kind = 'idss': must be 'text' or 'ids' or 'images'; did you mean 'ids'"),
        ('{"source": {"vocab_size": 5}}', r"config\.source\.kind: missing; must be 'text' or 'ids' or 'images'"),
        ('{"source": {"kind": "ids", "width": 5}}', r"config\.source\.width = 5: unknown option"),
        ('{"splits": {"kind": "sizes", "train": "a"}}', r"config\.splits\.train = 'a': must be an integer"),
        ('{"tokenizer": {"kind": "bytes", "vocab_size": 5}}', r"config\.tokenizer\.vocab_size = 5: unknown option"),
    ],
)
def test_a_wrong_kind_is_named(text: str, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        from_json(DataConfig, text)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: IdSource(vocab_size=0), r"data\.source\.vocab_size = 0: must be an integer of at least 1"),
        (lambda: IdSource(vocab_size=3, special_ids="included"), r"vocab_size = 3: must be an integer of at least 4"),
        (lambda: IdSource(dtype="float32"), r"data\.source\.dtype = 'float32': must be 'uint8' or"),  # type: ignore[arg-type]
        (lambda: ImageSource(channels=2), r"data\.source\.channels = 2: must be 1 or 3"),  # type: ignore[arg-type]
        (lambda: ImageSource(channels=True), r"data\.source\.channels = True"),  # type: ignore[arg-type]
        (lambda: ImageSource(height=0), r"data\.source\.height = 0: must be"),
        (lambda: SizedSplits(train=0), r"data\.splits\.train = 0: must be an integer of at least 1"),
        (lambda: SizedSplits(test=-1), r"data\.splits\.test = -1: must be an integer of at least 0"),
        (lambda: PathSplits(train=""), r"data\.splits\.train = '': must be a path, not empty"),
        (lambda: SentencePieceTokens(vocab_size=3), r"data\.tokenizer\.vocab_size = 3: must be"),
        (lambda: DataConfig(source="text"), r"data\.source = 'text': must be one of TextSource, IdSource, ImageSource"),  # type: ignore[arg-type]
        (
            lambda: DataConfig(source=IdSource(), tokenizer=SentencePieceTokens()),
            r"data\.tokenizer\.kind = 'sentencepiece': is for text, not for data\.source\.kind = 'ids'",
        ),
        (
            lambda: DataConfig(source=ImageSource()),
            r"data\.sequence_len = 512: must be the 12288 bytes of an image, data\.source\.height \* width \* channels = 64 \* 64 \* 3",
        ),
    ],
)
def test_what_does_not_go_together_is_named(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_the_vocabulary_follows_from_the_kinds() -> None:
    assert DataConfig().vocab_size == 259
    assert DataConfig(sequence_len=12288, source=ImageSource()).vocab_size == 259
    assert DataConfig(tokenizer=SentencePieceTokens()).vocab_size == 32_000
    assert DataConfig(source=IdSource(100)).vocab_size == 103
    assert DataConfig(source=IdSource(100, special_ids="included")).vocab_size == 100
