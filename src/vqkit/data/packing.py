"""Packed data: the tokens of each split in one memory-mapped file, documents one after another, an end token after each.

A folder of packed data holds, per split, `NAME.tokens` (uint16, little endian) and `NAME.offsets` (int64, little endian: where each
document begins, and the end), and `meta.json`, which says what they were made from. It appears as a whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vqkit.config import from_dict, to_dict
from vqkit.data.config import DataConfig
from vqkit.data.source import SPLITS, Document, Sources, corpus_hash, list_files, new_digest, read_documents, split_documents
from vqkit.data.tokenizer import ByteTokenizer
from vqkit.files import sync_folder, temporary_name

FORMAT = 1
TOKEN = np.dtype("<u2")
OFFSET = np.dtype("<i8")
SPLIT_RULES = (
    "include",
    "exclude",
    "min_file_bytes",
    "validation_fraction",
    "test_fraction",
    "max_validation_bytes",
    "max_test_bytes",
)


@dataclass(frozen=True)
class SplitSummary:
    """What one split holds; tokens = bytes and one end token per document."""

    documents: int
    bytes: int
    tokens: int


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

    @property
    def total(self) -> SplitSummary:
        """What all splits hold together."""
        splits = (self.train, self.validation, self.test)
        return SplitSummary(sum(s.documents for s in splits), sum(s.bytes for s in splits), sum(s.tokens for s in splits))


def pack(config: DataConfig, folder: str | os.PathLike[str]) -> DataSummary:
    """Pack the files that `config` names into `folder`, or find that they are packed there already.

    Data that are there are used again if they were split by the same rules from the same files; files that are gone are not
    asked for. Raises ValueError if `folder` holds anything else, if there are no files, or if a split is shorter than one sequence;
    OSError naming a file that cannot be read. A call that raises leaves `folder` as it was.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        summary = _packed_before(config, folder)
        _check_lengths(config, summary)
        return summary
    sources = list_files(config)
    documents = split_documents(sources.files, config)
    summary = _summarize(config, sources, documents)
    _check_lengths(config, summary)
    temporary = temporary_name(folder)
    temporary.mkdir(parents=True)
    try:
        summary = _write(temporary, config, summary, documents)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(folder.parent)
    return summary


def read_summary(folder: str | os.PathLike[str]) -> DataSummary:
    """The summary of the packed data in `folder`. Raises ValueError if it holds none, or some of another format."""
    return from_dict(DataSummary, _read_meta(Path(folder))["summary"], where=f"{folder}/meta.json: summary")


class Split:
    """One split of packed data: `tokens` uint16 [num_tokens] and `offsets` int64 [num_documents + 1], memory-mapped.

    Raises ValueError for an unknown name, a folder without packed data, or a file whose size is not what meta.json says.
    """

    def __init__(self, folder: str | os.PathLike[str], name: str) -> None:
        if name not in SPLITS:
            raise ValueError(f"name = {name!r}: must be one of {', '.join(SPLITS)}")
        summary: SplitSummary = getattr(read_summary(folder), name)
        self.name = name
        self.num_documents, self.num_bytes, self.num_tokens = summary.documents, summary.bytes, summary.tokens
        self.tokens = _map(Path(folder) / f"{name}.tokens", TOKEN, self.num_tokens)
        self.offsets = _map(Path(folder) / f"{name}.offsets", OFFSET, self.num_documents + 1)

    def document(self, index: int) -> bytes:
        """Content of one document. Raises ValueError if there is none of that index."""
        if not 0 <= index < self.num_documents:
            raise ValueError(f"index = {index}: the {self.name} split has documents 0 to {self.num_documents - 1}")
        return ByteTokenizer().decode(self.tokens[self.offsets[index] : self.offsets[index + 1]])

    def byte_pieces(self, size: int = 1 << 22) -> Iterator[np.ndarray]:
        """The bytes of all documents one after another, without end tokens, as uint8 arrays of at most `size`."""
        for start in range(0, self.num_tokens, size):
            piece = self.tokens[start : start + size]
            yield (piece[piece >= ByteTokenizer.FIRST_BYTE] - ByteTokenizer.FIRST_BYTE).astype(np.uint8)


def _summarize(config: DataConfig, sources: Sources, documents: Sequence[Document]) -> DataSummary:
    """The summary, all but the hash, from names and sizes alone."""
    counts = {name: (sum(d.split == name for d in documents), sum(d.size for d in documents if d.split == name)) for name in SPLITS}
    return DataSummary(
        path=config.path,
        corpus_hash="",
        files=len(sources.files),
        empty_files=sources.empty_files,
        short_files=sources.short_files,
        **{name: SplitSummary(number, size, number + size) for name, (number, size) in counts.items()},
    )


def _check_lengths(config: DataConfig, summary: DataSummary) -> None:
    advice = {
        "train": "add files",
        "validation": "add files, raise data.validation_fraction or data.max_validation_bytes",
        "test": "add files, raise data.test_fraction or data.max_test_bytes",
    }
    asked = {"train": 1.0, "validation": config.validation_fraction, "test": config.test_fraction}
    for name in SPLITS:
        tokens = getattr(summary, name).tokens
        if asked[name] and tokens < config.sequence_len:
            raise ValueError(
                f"the {name} split of {summary.path!r} has {tokens} tokens: one sequence needs data.sequence_len = "
                f"{config.sequence_len}; {advice[name]}, or shorten data.sequence_len"
            )


def _write(folder: Path, config: DataConfig, summary: DataSummary, documents: Sequence[Document]) -> DataSummary:
    """Fill `folder`; the result is `summary` with the hash of what was read."""
    tokenizer, digest = ByteTokenizer(), new_digest()
    end = np.array([tokenizer.END], dtype=TOKEN).tobytes()
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / f"{name}.tokens", "wb")) for name in SPLITS}
        for document, pieces in read_documents(documents, digest):
            for piece in pieces:
                files[document.split].write(tokenizer.encode(piece).astype(TOKEN).tobytes())
            files[document.split].write(end)
    for name in SPLITS:
        lengths = [0] + [document.size + 1 for document in documents if document.split == name]
        (folder / f"{name}.offsets").write_bytes(np.cumsum(lengths).astype(OFFSET).tobytes())
    summary = replace(summary, corpus_hash=digest.hexdigest())
    meta = {"format": FORMAT, "rules": _rules(config), "summary": asdict(summary)}
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)
    return summary


def _packed_before(config: DataConfig, folder: Path) -> DataSummary:
    """The summary of the data in `folder`, which must be what `config` asks for."""
    meta, summary = _read_meta(folder), read_summary(folder)
    for name, asked in _rules(config).items():
        packed = meta["rules"].get(name)
        if packed != asked:
            raise ValueError(f"{folder} was packed with data.{name} = {packed!r}, not {asked!r}: ask for the same, or use another folder")
    if config.path and Path(config.path).expanduser().exists():
        digest = corpus_hash(split_documents(list_files(config).files, config))
        if digest != summary.corpus_hash:
            raise ValueError(
                f"{folder} was packed from other data (hash {summary.corpus_hash}) than data.path = {config.path!r} "
                f"holds now (hash {digest}): use another folder"
            )
    return summary


def _rules(config: DataConfig) -> dict[str, Any]:
    fields = to_dict(config)
    return {name: fields[name] for name in SPLIT_RULES}


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no packed data: there is no meta.json in it") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT or not {"rules", "summary"} <= meta.keys():
        raise ValueError(f"{path} is not the description of packed data of format {FORMAT}")
    return meta


def _map(path: Path, dtype: np.dtype[Any], length: int) -> np.ndarray:
    found = path.stat().st_size if path.exists() else 0
    if found != length * dtype.itemsize:
        raise ValueError(f"{path} has {found} bytes: meta.json speaks of {length * dtype.itemsize}; the file is damaged")
    if not length:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", shape=(length,))
