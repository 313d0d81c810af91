"""Configuration of the data: plain dataclasses, without torch, so that help texts load fast.

Three choices say what a run reads: `source`, what the files hold; `splits`, which part is for training, validation and test;
`tokenizer`, how text becomes ids. Each is one of a few dataclasses that `kind` tells apart, in JSON, TOML and on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

SPECIAL_IDS = 3
"""Ids below all others: 0 padding, 1 end of document, 2 unknown."""


@dataclass(frozen=True)
class TextSource:
    """Files of text, or of any bytes: every file is a document."""

    kind: Literal["text"] = "text"
    """What the files hold: text, ids or images."""


@dataclass(frozen=True)
class IdSource:
    """Ids from another tokenizer: .npy files of integers, one or two axes (a row is a document), or files of bare numbers."""

    vocab_size: int = 50_257
    """Number of different ids in the files: all lie below it."""
    dtype: Literal["uint8", "uint16", "uint32", "int32", "int64"] = "uint16"
    """Type of the numbers, little endian, in files that are no .npy."""
    special_ids: Literal["add", "included"] = "add"
    """add: every id counts from 3 on in the model, and an end token follows each document; included: 0 is padding, 1 ends a document."""
    kind: Literal["ids"] = "ids"
    """What the files hold: text, ids or images."""

    def __post_init__(self) -> None:
        _check_choice("data.source", self, "kind", "dtype", "special_ids")
        _check_integer("data.source", self, "vocab_size", 1 if self.special_ids == "add" else SPECIAL_IDS + 1)


@dataclass(frozen=True)
class ImageSource:
    """Images of one size, as bytes in raster order, channels last: image files, or .npy arrays of uint8 [N, height, width, channels]."""

    height: int = 64
    """Rows of every image."""
    width: int = 64
    """Columns of every image."""
    channels: Literal[1, 3] = 3
    """3 = red, green, blue; 1 = grey."""
    kind: Literal["images"] = "images"
    """What the files hold: text, ids or images."""

    def __post_init__(self) -> None:
        _check_choice("data.source", self, "kind", "channels")
        for name in ("height", "width"):
            _check_integer("data.source", self, name, 1)

    @property
    def num_bytes(self) -> int:
        """Bytes, hence tokens, of one image."""
        return self.height * self.width * self.channels


@dataclass(frozen=True)
class FractionSplits:
    """Shares of the files, or of a single file: data.validation_fraction, data.test_fraction and their limits."""

    kind: Literal["fractions"] = "fractions"
    """How the data are split: by fractions, by sizes within one file, or by paths."""


@dataclass(frozen=True)
class SizedSplits:
    """One file, cut by position, without end tokens: bytes of text, ids or images. The sizes of enwik8, unless told otherwise."""

    train: int = 90_000_000
    """How many come first."""
    validation: int = 5_000_000
    """How many come next; 0 = none."""
    test: int = 5_000_000
    """How many come last; 0 = none."""
    kind: Literal["sizes"] = "sizes"
    """How the data are split: by fractions, by sizes within one file, or by paths."""

    def __post_init__(self) -> None:
        _check_choice("data.splits", self, "kind")
        for name, least in (("train", 1), ("validation", 0), ("test", 0)):
            _check_integer("data.splits", self, name, least)


@dataclass(frozen=True)
class PathSplits:
    """A file or folder for each split, below data.path unless absolute."""

    train: str = "train"
    """File or folder to train on."""
    validation: str = "validation"
    """File or folder that measures the model during training; empty = none."""
    test: str = "test"
    """File or folder that measures the trained model; empty = none."""
    kind: Literal["paths"] = "paths"
    """How the data are split: by fractions, by sizes within one file, or by paths."""

    def __post_init__(self) -> None:
        _check_choice("data.splits", self, "kind")
        for name in ("train", "validation", "test"):
            value = getattr(self, name)
            if not isinstance(value, str) or not (value or name != "train"):
                raise ValueError(f"data.splits.{name} = {value!r}: must be a path{', not empty' * (name == 'train')}")


@dataclass(frozen=True)
class ByteTokens:
    """Byte b is id b + 3: a vocabulary of 259."""

    kind: Literal["bytes"] = "bytes"
    """How text becomes ids: bytes or sentencepiece."""


@dataclass(frozen=True)
class SentencePieceTokens:
    """Pieces of words (needs the extra `sentencepiece`): a vocabulary learned from the training split, or one from a file."""

    vocab_size: int = 32_000
    """Number of ids, the special ones included."""
    model: str = ""
    """A SentencePiece model file to use, with ids 0 padding, 1 end, 2 unknown; empty = learn one from the training split."""
    kind: Literal["sentencepiece"] = "sentencepiece"
    """How text becomes ids: bytes or sentencepiece."""

    def __post_init__(self) -> None:
        _check_choice("data.tokenizer", self, "kind")
        _check_integer("data.tokenizer", self, "vocab_size", SPECIAL_IDS + 1)
        if not isinstance(self.model, str):
            raise ValueError(f"data.tokenizer.model = {self.model!r}: must be a string")


def _check_integer(where: str, config: object, name: str, least: int) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{where}.{name} = {value!r}: must be an integer of at least {least}")


def _check_choice(where: str, config: object, *names: str) -> None:
    """That the values of these fields, annotated as Literal, are among those named there."""
    hints = get_type_hints(type(config))
    for name in names:
        value, choices = getattr(config, name), get_args(hints[name])
        if value not in choices or isinstance(value, bool):
            raise ValueError(f"{where}.{name} = {value!r}: must be {' or '.join(map(repr, choices))}")


@dataclass(frozen=True)
class DataConfig:
    """What a run reads, split into train, validation and test, and cut into sequences."""

    path: str = ""
    """A file, or a folder that is searched through (several files are split file by file, a single one by position); or packed data."""
    include: tuple[str, ...] = ("*",)
    """Patterns of the files to take, matched against the path below the folder; * also matches /."""
    exclude: tuple[str, ...] = (".git", "__pycache__")
    """Patterns of names of folders and files, anywhere below the folder, to leave out."""
    min_file_bytes: int = 1
    """Shorter files are skipped and counted, as empty ones always are."""
    validation_fraction: float = 0.05
    """Share of the files (of a single file: of its bytes, ids or images) that measures the model during training; 0 = none."""
    test_fraction: float = 0.05
    """Share of the files (of a single file: of its bytes, ids or images) that measures the trained model; 0 = none."""
    max_validation_bytes: int = 0
    """Most bytes (ids, images) of the validation split by fractions, the rest goes to train; 0 = no limit."""
    max_test_bytes: int = 0
    """Most bytes (ids, images) of the test split by fractions, the rest goes to train; 0 = no limit."""
    sequence_len: int = 512
    """Tokens per training sequence; of images, height * width * channels."""
    segments: Literal["isolate", "ignore"] = "isolate"
    """Keep the documents of a sequence from seeing each other, or let them."""
    source: TextSource | IdSource | ImageSource = TextSource()
    """What the files hold: --data.source.kind text, ids or images."""
    splits: FractionSplits | SizedSplits | PathSplits = FractionSplits()
    """How they are split: --data.splits.kind fractions, sizes or paths."""
    tokenizer: ByteTokens | SentencePieceTokens = ByteTokens()
    """How text becomes ids: --data.tokenizer.kind bytes or sentencepiece."""

    def __post_init__(self) -> None:
        if not isinstance(self.path, str):
            raise ValueError(f"data.path = {self.path!r}: must be a string")
        for name in ("include", "exclude"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(isinstance(pattern, str) and pattern for pattern in value):
                raise ValueError(f"data.{name} = {value!r}: must be a tuple of patterns, none of them empty")
        if not self.include:
            raise ValueError('data.include = (): must hold at least one pattern; "*" takes every file')
        for name, least in (("min_file_bytes", 1), ("max_validation_bytes", 0), ("max_test_bytes", 0), ("sequence_len", 1)):
            _check_integer("data", self, name, least)
        for name in ("validation_fraction", "test_fraction"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
                raise ValueError(f"data.{name} = {value!r}: must be a number of at least 0 and below 1")
        if self.validation_fraction + self.test_fraction >= 1.0:
            raise ValueError(
                f"data.validation_fraction = {self.validation_fraction} and data.test_fraction = {self.test_fraction}: "
                "must add up to less than 1, the rest is for train"
            )
        if self.segments not in ("isolate", "ignore"):
            raise ValueError(f'data.segments = {self.segments!r}: must be "isolate" or "ignore"')
        for name, choices in _CHOICES.items():
            if not isinstance(getattr(self, name), choices):
                wanted = ", ".join(choice.__name__ for choice in choices)
                raise ValueError(f"data.{name} = {getattr(self, name)!r}: must be one of {wanted}")
        if not isinstance(self.source, TextSource) and not isinstance(self.tokenizer, ByteTokens):
            raise ValueError(f"data.tokenizer.kind = {self.tokenizer.kind!r}: is for text, not for data.source.kind = {self.source.kind!r}")
        if isinstance(self.source, ImageSource) and self.sequence_len != self.source.num_bytes:
            raise ValueError(
                f"data.sequence_len = {self.sequence_len}: must be the {self.source.num_bytes} bytes of an image, "
                f"data.source.height * width * channels = {self.source.height} * {self.source.width} * {self.source.channels}"
            )

    @property
    def vocab_size(self) -> int:
        """Number of ids that a model of these data needs, the special ones included."""
        if isinstance(self.source, IdSource):
            return self.source.vocab_size + (SPECIAL_IDS if self.source.special_ids == "add" else 0)
        if isinstance(self.tokenizer, SentencePieceTokens):
            return self.tokenizer.vocab_size
        return 256 + SPECIAL_IDS


CUT_OPTIONS = ("sequence_len", "segments")
"""Options that say how packed data are read, not how they are packed."""
_CHOICES: dict[str, tuple[type, ...]] = {
    "source": (TextSource, IdSource, ImageSource),
    "splits": (FractionSplits, SizedSplits, PathSplits),
    "tokenizer": (ByteTokens, SentencePieceTokens),
}
