"""Configuration of the data: a plain dataclass, without torch, so that help texts load fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    """Files as bytes, split into train, validation and test, and cut into sequences."""

    path: str = ""
    """A file, or a folder that is searched through; several files are split file by file, a single one by position."""
    include: tuple[str, ...] = ("*",)
    """Patterns of the files to take, matched against the path below the folder; * also matches /."""
    exclude: tuple[str, ...] = (".git", "__pycache__")
    """Patterns of names of folders and files, anywhere below the folder, to leave out."""
    min_file_bytes: int = 1
    """Shorter files are skipped and counted, as empty ones always are."""
    validation_fraction: float = 0.05
    """Share of the files (of a single file: of its bytes) that measures the model during training; 0 = none."""
    test_fraction: float = 0.05
    """Share of the files (of a single file: of its bytes) that measures the trained model; 0 = none."""
    max_validation_bytes: int = 0
    """Most bytes of the validation split, the rest goes to train; 0 = no limit."""
    max_test_bytes: int = 0
    """Most bytes of the test split, the rest goes to train; 0 = no limit."""
    sequence_len: int = 512
    """Tokens per training sequence."""
    segments: Literal["isolate", "ignore"] = "isolate"
    """Keep the documents of a sequence from seeing each other, or let them."""

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
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"data.{name} = {value!r}: must be an integer of at least {least}")
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
