"""Which files a corpus consists of, and which of them are for training, validation and test.

Everything here depends on the names below the folder, on sizes and on contents alone: not on the place of the folder, the
machine or the order in which the file system lists it.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from vqkit.data.config import DataConfig, FractionSplits, PathSplits, SizedSplits

SPLITS = ("train", "validation", "test")
PIECE = 1 << 22


class SourceFile(NamedTuple):
    """A file of the corpus; `name` is its path below the folder, with / between the parts."""

    name: str
    path: Path
    size: int
    items: int | None = None
    """What it is split by: ids, rows or images; None where that is bytes."""

    @property
    def length(self) -> int:
        """Number of items, or else of bytes."""
        return self.size if self.items is None else self.items


class Sources(NamedTuple):
    """The files of a corpus in the order of their names, and how many were skipped."""

    files: list[SourceFile]
    empty_files: int
    short_files: int


class Document(NamedTuple):
    """Bytes (ids, rows, images) `start` to `stop` of a file, in one split: the whole file unless it is the only one of its corpus."""

    split: str
    file: SourceFile
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of bytes, or of items."""
        return self.stop - self.start


class Fingerprint:
    """Hashes of what is read: `files` of the contents of each file by name, and one of all names, sizes and contents."""

    def __init__(self) -> None:
        self._all = hashlib.blake2b(digest_size=16)
        self._file = hashlib.blake2b(digest_size=16)
        self._name: str | None = None
        self._done: dict[str, str] = {}

    def begin(self, file: SourceFile) -> None:
        """From now on `update` brings the content of `file`."""
        self._close()
        self._name, self._file = file.name, hashlib.blake2b(digest_size=16)
        name = _bytes_of(file.name)
        for number in (len(name), file.size):
            self._all.update(number.to_bytes(8, "little"))
        self._all.update(name)

    def update(self, piece: bytes) -> None:
        """The next bytes of the file."""
        self._all.update(piece)
        self._file.update(piece)

    def hexdigest(self) -> str:
        """The hash of all that was read, 32 hexadecimal digits."""
        return self._all.hexdigest()

    @property
    def files(self) -> dict[str, str]:
        """The hash of every file that was read to its end."""
        self._close()
        return self._done

    def _close(self) -> None:
        if self._name is not None:
            self._done[self._name] = self._file.hexdigest()
        self._name = None


def find_documents(config: DataConfig, measure: Callable[[SourceFile], SourceFile] | None = None) -> tuple[Sources, list[Document]]:
    """The files that `config` names, and which part of them is in which split, in the order in which they are packed.

    `measure` sets `items` of a file where it is split by something else than bytes. Raises what `list_files` and `measure` do, and
    ValueError where the files are not what `config.splits` asks for.
    """
    if isinstance(config.splits, PathSplits):
        return _by_path(config, config.splits, measure)
    sources = list_files(config, measure)
    if isinstance(config.splits, SizedSplits):
        return sources, _by_size(config, config.splits, sources)
    return sources, split_documents(sources.files, config)


def list_files(config: DataConfig, measure: Callable[[SourceFile], SourceFile] | None = None) -> Sources:
    """The files at `config.path`.

    Links are followed, but no file or folder is taken twice: a circle of links ends, and one content cannot come into two splits
    by two names. What is neither file nor folder (a socket, a device) is passed over.
    Raises ValueError if there is no path or no file, OSError naming what cannot be read.
    """
    if not config.path:
        raise ValueError("data.path is empty: name a file or a folder with --data.path")
    root = Path(config.path).expanduser()
    if not root.exists():
        raise ValueError(f"data.path = {config.path!r}: there is no such file or folder")
    found = sorted(_below(root, config)) if root.is_dir() else [SourceFile(root.name, root, root.stat().st_size)]
    files = [file for file in found if file.size >= config.min_file_bytes]
    empty = sum(file.size == 0 for file in found)
    short = len(found) - len(files) - empty
    if measure is not None:
        measured = [measure(file) for file in files]
        files = [file for file in measured if file.length]
        empty += len(measured) - len(files)
    if not files:
        skipped = f" ({empty} empty, {short} below data.min_file_bytes = {config.min_file_bytes})" if found else ""
        patterns = f" that match data.include = {list(config.include)}" if root.is_dir() else ""
        raise ValueError(f"data.path = {config.path!r}: holds no files with data{patterns}{skipped}; at least one is needed")
    return Sources(files, empty, short)


def split_documents(files: Sequence[SourceFile], config: DataConfig) -> list[Document]:
    """Every byte of `files` in one split, in the order of `files`.

    One file is cut by position: train, then validation, then test. Several are split file by file, by a hash of their names:
    the files whose hash, as a fraction of 1, lies below `test_fraction` are for test, the next `validation_fraction` for validation
    (if that is none, the file of the lowest hash that is left, so that a few files suffice); all others are for train.
    Where a split has a limit, its files are taken in the order of their hash; one that no longer fits is for train. A limit that no
    file fits cuts the end of the longest, so much of it as the fraction is of all, a quarter at most.
    """
    if len(files) == 1:
        return _by_position(files[0], config)
    splits, ends = _by_hash(files, config)
    return [document for file in files for document in _cut(file, splits[file.name], ends.get(file.name, []))]


def read_documents(documents: Iterable[Document], digest: Fingerprint) -> Iterator[tuple[Document, Iterator[bytes]]]:
    """Each document with its content in pieces. Names, sizes and whatever is read enter `digest`: read all pieces in turn.

    Raises OSError naming a file that cannot be read or whose size is no longer what it was.
    """
    for document in documents:
        if document.start == 0:
            digest.begin(document.file)
        yield document, _pieces(document, digest)


def corpus_hash(documents: Iterable[Document]) -> str:
    """One blake2b over name, size and content of all files, as 32 hexadecimal digits."""
    digest = new_digest()
    for _, pieces in read_documents(documents, digest):
        for _ in pieces:
            pass
    return digest.hexdigest()


def new_digest() -> Fingerprint:
    """The hash that `corpus_hash` speaks of, before any file."""
    return Fingerprint()


def whole_file(file: SourceFile) -> Document:
    """All bytes of `file`, whatever it is split by."""
    return Document("train", file._replace(items=None), 0, file.size)


def hash_fraction(name: str) -> float:
    """A number from 0 to 1 that depends on `name` alone, spread evenly over names."""
    digest = hashlib.blake2b(_bytes_of(name), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2.0**64


def _below(root: Path, config: DataConfig) -> Iterator[SourceFile]:
    seen = {os.path.realpath(root)}
    waiting = [(root, os.path.realpath(root), "")]
    while waiting:
        folder, real_folder, prefix = waiting.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise _unreadable(folder, error) from error
        for entry in entries:
            name, path = prefix + entry.name, Path(entry.path)
            if any(fnmatchcase(entry.name, pattern) for pattern in config.exclude):
                continue
            wanted = any(fnmatchcase(name, pattern) for pattern in config.include)
            try:
                status = entry.stat()
            except OSError as error:
                if wanted:
                    raise _unreadable(path, error) from error
                continue
            real = os.path.realpath(path) if entry.is_symlink() else os.path.join(real_folder, entry.name)
            if stat.S_ISDIR(status.st_mode) and real not in seen:
                waiting.append((path, real, name + "/"))
            elif stat.S_ISREG(status.st_mode) and wanted and real not in seen:
                yield SourceFile(name, path, status.st_size)
            else:
                continue
            seen.add(real)


def _by_position(file: SourceFile, config: DataConfig) -> list[Document]:
    test = _limited(int(file.length * config.test_fraction), config.max_test_bytes)
    validation = _limited(int(file.length * config.validation_fraction), config.max_validation_bytes)
    borders = (0, file.length - test - validation, file.length - test, file.length)
    parts = zip(SPLITS, borders, borders[1:], strict=False)
    return [Document(split, file, start, stop) for split, start, stop in parts if stop > start]


def _by_hash(files: Sequence[SourceFile], config: DataConfig) -> tuple[dict[str, str], dict[str, list[tuple[str, int]]]]:
    """The split of every name, and of some the ends that are for another: split and length, the last one first."""
    place = {file.name: hash_fraction(file.name) for file in files}
    train = sorted(files, key=lambda file: (place[file.name], file.name))
    splits, ends = {file.name: "train" for file in files}, dict[str, list[tuple[str, int]]]()
    whole = sum(file.length for file in files)
    low = 0.0
    for split, fraction, limit in (
        ("test", config.test_fraction, config.max_test_bytes),
        ("validation", config.validation_fraction, config.max_validation_bytes),
    ):
        if fraction > 0.0:
            high = low + fraction
            taken = _fitting((file for file in train if low <= place[file.name] < high), limit) or _fitting(train, limit)[:1]
            splits |= {file.name: split for file in taken}
            train = [file for file in train if splits[file.name] == "train"]
            if train and not taken:
                longest = max(train, key=lambda file: file.length)
                size = min(_limited(int(whole * fraction), limit), longest.length // 4)
                ends.setdefault(longest.name, []).append((split, size))
            low = high
    return splits, ends


def _cut(file: SourceFile, split: str, ends: Iterable[tuple[str, int]]) -> list[Document]:
    parts, stop = [], file.length
    for other, size in ends:
        parts.append(Document(other, file, stop - size, stop))
        stop -= size
    return [document for document in (Document(split, file, 0, stop), *reversed(parts)) if document.stop > document.start]


def _fitting(files: Iterable[SourceFile], limit: int) -> list[SourceFile]:
    taken, total = [], 0
    for file in files:
        if not limit or total + file.length <= limit:
            taken.append(file)
            total += file.length
    return taken


def _limited(size: int, limit: int) -> int:
    return min(size, limit) if limit else size


def _by_size(config: DataConfig, splits: SizedSplits, sources: Sources) -> list[Document]:
    sizes = {name: getattr(splits, name) for name in SPLITS}
    if len(sources.files) != 1:
        raise ValueError(f"data.path = {config.path!r}: holds {len(sources.files)} files; data.splits.kind = 'sizes' cuts exactly one")
    (file,) = sources.files
    if sum(sizes.values()) != file.length:
        raise ValueError(
            f"data.splits: train = {splits.train}, validation = {splits.validation} and test = {splits.test} add up to "
            f"{sum(sizes.values())}: must be the {file.length} that {file.path} holds"
        )
    documents, start = [], 0
    for name, size in sizes.items():
        documents += [Document(name, file, start, start + size)] if size else []
        start += size
    return documents


def _by_path(config: DataConfig, splits: PathSplits, measure: Callable[[SourceFile], SourceFile] | None) -> tuple[Sources, list[Document]]:
    if not config.path:
        raise ValueError("data.path is empty: name the folder that holds the splits with --data.path")
    files, documents, empty, short = [], [], 0, 0
    places: dict[str, str] = {}
    for name in SPLITS:
        below = getattr(splits, name)
        if not below:
            continue
        path = Path(config.path).expanduser() / Path(below).expanduser()
        try:
            found = list_files(replace(config, path=str(path), splits=FractionSplits()), measure)
        except ValueError as error:
            raise ValueError(f"data.splits.{name} = {below!r}: {error}") from error
        for file in found.files:
            real = os.path.realpath(file.path)
            if real in places:
                raise ValueError(f"{file.path} is in two splits, {places[real]} and {name}: no file may be in more than one")
            places[real] = name
            named = file._replace(name=f"{name}/{file.name}")
            files.append(named)
            documents.append(Document(name, named, 0, named.length))
        empty, short = empty + found.empty_files, short + found.short_files
    return Sources(files, empty, short), documents


def _pieces(document: Document, digest: Fingerprint) -> Iterator[bytes]:
    path, left = document.file.path, document.size
    try:
        with open(path, "rb") as file:
            same = os.fstat(file.fileno()).st_size == document.file.size
            file.seek(document.start)
            while same and left and (piece := file.read(min(left, PIECE))):
                left -= len(piece)
                digest.update(piece)
                yield piece
    except OSError as error:
        raise _unreadable(path, error) from error
    if left:
        raise OSError(f"{path} changed while it was being read: it held {document.file.size} bytes; run again")


def _unreadable(path: Path, error: OSError) -> OSError:
    return OSError(f"cannot read {path}: {error.strerror}")


def _bytes_of(name: str) -> bytes:
    # Names that are no UTF-8 come from the file system with escapes and go back to the bytes that they are.
    return name.encode("utf-8", "surrogateescape")
