"""What happens while data are fetched and packed: told to whoever listens, as this room prints nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Downloading:
    """`done` of `total` bytes of `name` are there; total None where the server does not say."""

    name: str
    done: int
    total: int | None


@dataclass(frozen=True)
class Note:
    """Something that takes a while has begun, or was found; in words."""

    text: str


@dataclass(frozen=True)
class Packing:
    """`done` of `total` bytes (ids, rows, images) of the source are packed."""

    done: int
    total: int


@dataclass(frozen=True)
class Checking:
    """`done` of `total` bytes of packed data are read again and compared with what was written."""

    done: int
    total: int


DataEvent = Downloading | Note | Packing | Checking
