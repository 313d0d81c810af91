"""Files that are whole or absent: what is written here appears under its name only once all of it is on the disk.

A crash at any instant leaves the old file, or the new one; at worst a temporary file lies beside it, under a name
that starts with a dot and ends in `TEMPORARY_SUFFIX`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

TEMPORARY_SUFFIX = ".tmp"


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8, line ends as they are; see `write_bytes_atomic`."""
    write_bytes_atomic(path, text.encode())


def write_bytes_atomic(path: str | os.PathLike[str], data: bytes | bytearray | memoryview) -> None:
    """Put `data` at `path`, replacing the file of that name in one step.

    Raises OSError that names `path` (no such folder, disk full, ...); the file there is then what it was and nothing is left beside it.
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        with naming(path):
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """An OSError raised within that names no file, as that of a full disk does, or a temporary one, is raised again with `path`."""
    try:
        yield
    except OSError as error:
        temporary = error.filename is not None and any(part.endswith(TEMPORARY_SUFFIX) for part in Path(os.fsdecode(error.filename)).parts)
        if error.errno is None or not (error.filename is None or temporary):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def temporary_name(path: str | os.PathLike[str]) -> Path:
    """A name in the same folder, hence on the same disk, that no other writer picks."""
    path = Path(path)
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Bring the folder's list of names to the disk; without it a rename may be lost with the power."""
    if not hasattr(os, "O_DIRECTORY"):  # systems that cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
