"""Packed data as they lie on the disk, and how they are read: the ids of each split, memory-mapped.

A folder of packed data holds, per split, shards `NAME-00000.tokens`, ... (unsigned integers, little endian, of the fewest bytes that
the vocabulary needs, counted from `first_id`) and `NAME.offsets` (int64, little endian: where each document begins, and the end;
absent where all are equally long); the tokenizer; `files.jsonl`, what was read; and `meta.json`, which says how all was made. It
appears as a whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vqkit.config import from_dict
from vqkit.data.config import DataConfig
from vqkit.data.events import Checking, DataEvent
from vqkit.data.source import PIECE, SPLITS
from vqkit.data.tokenizer import TOKENIZER_FILE, ByteTokenizer, Tokenizer, load_tokenizer

FORMAT = 2
META_FILE = "meta.json"
FILES_FILE = "files.jsonl"
OFFSET = np.dtype("<i8")


@dataclass(frozen=True)
class SplitSummary:
    """What one split holds; of bytes with end tokens, tokens = bytes and one more per document. Ids have no bytes, only text has words."""

    documents: int
    bytes: int
    tokens: int
    words: int = 0


@dataclass(frozen=True)
class DataSummary:
    """What packed data were made from: the hash is of names, sizes and contents of all files (see `corpus_hash`)."""

    path: str
    corpus_hash: str
    files: int
    empty_files: int
    short_files: int
    train: SplitSummary
    validation: SplitSummary
    test: SplitSummary
    tokenizer: str = ByteTokenizer.kind
    vocab_size: int = ByteTokenizer.vocab_size
    tokenizer_hash: str = ByteTokenizer().hash

    @property
    def content_hash(self) -> str:
        """One hash of what was read and of how it became ids."""
        return hashlib.blake2b(f"{self.corpus_hash} {self.tokenizer_hash}".encode(), digest_size=16).hexdigest()

    @property
    def total(self) -> SplitSummary:
        """What all splits hold together."""
        splits = (self.train, self.validation, self.test)
        return SplitSummary(*(sum(getattr(s, name) for s in splits) for name in ("documents", "bytes", "tokens", "words")))


@dataclass(frozen=True)
class Shard:
    """One file of ids."""

    file: str
    tokens: int
    hash: str


@dataclass(frozen=True)
class StoredSplit:
    """The files of one split, and the hash of its offsets; empty where there are none, or none is known."""

    shards: tuple[Shard, ...]
    offsets: str = ""


@dataclass(frozen=True)
class Layout:
    """How the ids of all splits are stored: numbers of `dtype`, counted from `first_id`; `files` is the hash of files.jsonl."""

    dtype: str
    first_id: int
    document_len: int | None
    train: StoredSplit
    validation: StoredSplit
    test: StoredSplit
    files: str = ""


def is_packed(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a folder of packed data, damaged or not."""
    folder = Path(path).expanduser()
    if not str(path) or not (folder / META_FILE).is_file():
        return False
    try:
        return _is_description(_read_json(folder / META_FILE))
    except ValueError:
        return any(folder.glob("*.tokens"))


def read_summary(folder: str | os.PathLike[str]) -> DataSummary:
    """The summary of the packed data in `folder`. Raises ValueError if it holds none, or some of another format."""
    return from_dict(DataSummary, read_meta(Path(folder))["summary"], where=f"{folder}/meta.json: summary")


def read_rules(folder: str | os.PathLike[str]) -> DataConfig:
    """A configuration with the rules by which the data in `folder` were packed, and `folder` as its path."""
    rules = read_meta(Path(folder))["rules"]
    source = rules.get("source", {})
    length = source["height"] * source["width"] * source["channels"] if source.get("kind") == "images" else 1
    return from_dict(DataConfig, {**rules, "path": str(folder), "sequence_len": length}, where=f"{folder}/meta.json: rules")


def find_defects(
    folder: str | os.PathLike[str], *, splits: Sequence[str] = SPLITS, on_event: Callable[[DataEvent], None] | None = None
) -> list[str]:
    """Read the packed data in `folder`, or these splits of them: every file that is not what was written there; none if all is well."""
    folder, emit = Path(folder), on_event or (lambda event: None)
    layout, defects = read_layout(folder), []
    stored = {name: getattr(layout, name) for name in splits}
    expected = {shard.file: shard.hash for split in stored.values() for shard in split.shards}
    expected |= {f"{name}.offsets": split.offsets for name, split in stored.items()}
    expected[FILES_FILE] = layout.files
    hashes = {folder / name: digest for name, digest in expected.items() if digest}
    done, total = 0, sum(path.stat().st_size for path in hashes if path.is_file())
    for path, digest in hashes.items():
        if not path.is_file():
            defects.append(f"{path} is missing")
            continue
        found = hashlib.blake2b(digest_size=16)
        for piece in _pieces(path):
            found.update(piece)
            done += len(piece)
            emit(Checking(done, total))
        if found.hexdigest() != digest:
            defects.append(_damaged(path))
    try:
        found = _tokenizer(folder).hash
    except (ValueError, OSError) as error:
        return [*defects, str(error)]
    if found != read_summary(folder).tokenizer_hash:
        defects.append(f"{folder / TOKENIZER_FILE} is another tokenizer than the one that the data were packed with")
    return defects


class StoredIds:
    """The ids of one split, in one or more memory-mapped shards: `ids[start:stop]` is an array, int64 [stop - start]."""

    def __init__(self, shards: Sequence[np.ndarray], first_id: int) -> None:
        self._shards, self._first_id = list(shards), first_id
        self._begins = np.cumsum([0, *map(len, shards)]).tolist()

    def __len__(self) -> int:
        return self._begins[-1]

    def __getitem__(self, index: slice) -> np.ndarray:
        start, stop, step = index.indices(len(self))
        if step != 1:
            raise ValueError(f"step = {step}: ids are read one after another, step 1")
        parts = [np.empty(0, dtype=np.int64)]
        first = int(np.searchsorted(self._begins, start, side="right")) - 1
        for begin, shard in zip(self._begins[first:], self._shards[first:], strict=False):
            if begin >= stop:
                break
            parts.append(shard[max(start - begin, 0) : stop - begin].astype(np.int64) + self._first_id)
        return np.concatenate(parts)

    def astype(self, dtype: Any) -> np.ndarray:
        """All ids in memory."""
        return self[:].astype(dtype)

    def tolist(self) -> list[int]:
        """All ids as a list."""
        return self[:].tolist()


class Split:
    """One split of packed data: `tokens`, its ids (see `StoredIds`), and `offsets` int64 [num_documents + 1], memory-mapped.

    `document_len` is the length of every document where they are equally long, as images are, and no end token stands between
    them, else None. Raises ValueError for an unknown name, a folder without packed data, or a file whose size is not what
    meta.json says.
    """

    def __init__(self, folder: str | os.PathLike[str], name: str) -> None:
        if name not in SPLITS:
            raise ValueError(f"name = {name!r}: must be one of {', '.join(SPLITS)}")
        folder = Path(folder)
        summary: SplitSummary = getattr(read_summary(folder), name)
        layout = read_layout(folder)
        self.name = name
        self.num_documents, self.num_bytes = summary.documents, summary.bytes
        self.num_tokens, self.num_words = summary.tokens, summary.words
        self.document_len = layout.document_len
        self.tokenizer = _tokenizer(folder)
        stored: StoredSplit = getattr(layout, name)
        self.tokens = StoredIds([_map(folder / s.file, np.dtype(layout.dtype), s.tokens) for s in stored.shards], layout.first_id)
        if len(self.tokens) != self.num_tokens:
            raise ValueError(f"{folder / META_FILE}: the shards of {name} have {len(self.tokens)} tokens, its summary {self.num_tokens}")
        if layout.document_len is None:
            self.offsets = _map(folder / f"{name}.offsets", OFFSET, self.num_documents + 1)
        else:
            self.offsets = np.arange(self.num_documents + 1) * layout.document_len

    def document(self, index: int) -> Any:
        """Content of one document: bytes of text, an array of ids or an image. Raises ValueError if there is none of that index."""
        if not 0 <= index < self.num_documents:
            raise ValueError(f"index = {index}: the {self.name} split has documents 0 to {self.num_documents - 1}")
        return self.tokenizer.decode(self.tokens[int(self.offsets[index]) : int(self.offsets[index + 1])])

    def byte_pieces(self, size: int = 1 << 22) -> Iterator[np.ndarray]:
        """The bytes of all documents one after another, without end tokens, as uint8 arrays of at most `size`.

        Raises ValueError for ids of a vocabulary of the user's own, which have no bytes.
        """
        if self.tokenizer.kind == "ids":
            raise ValueError(f"the {self.name} split holds ids of a vocabulary that is not known here: they have no bytes")
        for start in range(0, self.num_tokens, size):
            ids = self.tokens[start : start + size]
            if self.tokenizer.kind == "sentencepiece":
                content = np.frombuffer(self.tokenizer.decode(ids), dtype=np.uint8)
                yield from (content[i : i + size] for i in range(0, len(content), size))
            else:
                yield (ids[ids >= ByteTokenizer.FIRST_BYTE] - ByteTokenizer.FIRST_BYTE).astype(np.uint8)


def read_meta(folder: Path) -> dict[str, Any]:
    """What meta.json says. Raises ValueError if there is none, one of another format, or one that is not as it was written."""
    path = folder / META_FILE
    try:
        meta = _read_json(path)
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no packed data: there is no meta.json in it") from None
    if not _is_description(meta):
        raise ValueError(f"{path} is not the description of packed data of format {FORMAT}")
    if meta.pop("hash", None) not in (None, _hash_of_meta(meta)):
        raise ValueError(_damaged(path))
    return meta


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Write meta.json, with a hash of the rest of it."""
    text = json.dumps(meta | {"hash": _hash_of_meta(meta)}, indent=2)
    (folder / META_FILE).write_text(text + "\n", encoding="utf-8")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _is_description(meta: Any) -> bool:
    return isinstance(meta, dict) and meta.get("format") in (1, FORMAT) and {"rules", "summary"} <= meta.keys()


def _hash_of_meta(meta: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(meta, sort_keys=True).encode(), digest_size=16).hexdigest()


def _damaged(path: Path) -> str:
    return f"{path} is damaged: its content is not what was written"


def read_layout(folder: Path) -> Layout:
    """How the packed data in `folder` are stored."""
    meta = read_meta(folder)
    if meta["format"] == 1:  # bytes with end tokens, one file a split, no hashes
        train, validation, test = (StoredSplit((Shard(f"{name}.tokens", meta["summary"][name]["tokens"], ""),)) for name in SPLITS)
        return Layout("<u2", first_id=0, document_len=None, train=train, validation=validation, test=test)
    return from_dict(Layout, meta.get("layout", {}), where=f"{folder}/meta.json: layout")


def _tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of packed data; of format 1 it is not written down, and bytes."""
    return load_tokenizer(folder) if read_meta(folder)["format"] == FORMAT else ByteTokenizer()


def _pieces(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            yield piece


def _map(path: Path, dtype: np.dtype[Any], length: int) -> np.ndarray:
    found = path.stat().st_size if path.exists() else 0
    if found != length * dtype.itemsize:
        raise ValueError(f"{path} has {found} bytes: meta.json speaks of {length * dtype.itemsize}; the file is damaged")
    if not length:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", shape=(length,))
