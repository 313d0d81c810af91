"""Packing: from the files that a configuration names to a folder of packed data (see `stored`), or to the one that is there already."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from vqkit.config import differences, to_dict
from vqkit.data.config import DataConfig, FractionSplits, SentencePieceTokens
from vqkit.data.events import DataEvent, Note, Packing
from vqkit.data.pieces import SentencePieceTokenizer
from vqkit.data.reading import Counts, Reader, measure_of, reader_of
from vqkit.data.source import (
    SPLITS,
    SourceFile,
    Sources,
    corpus_hash,
    find_documents,
    new_digest,
    read_documents,
    split_documents,
    whole_file,
)
from vqkit.data.stored import (
    FILES_FILE,
    FORMAT,
    OFFSET,
    DataSummary,
    Layout,
    Shard,
    Split,
    SplitSummary,
    StoredSplit,
    find_defects,
    is_packed,
    read_meta,
    read_summary,
    write_meta,
)
from vqkit.data.tokenizer import ByteTokenizer
from vqkit.files import naming, sync_folder, temporary_name

SHARD_BYTES = 1 << 30
RACE = 2_000_000_000
"""Nanoseconds before packing within which a file's time of change says nothing: it may have been written twice in one tick."""
SPLIT_RULES = (
    "include",
    "exclude",
    "min_file_bytes",
    "validation_fraction",
    "test_fraction",
    "max_validation_bytes",
    "max_test_bytes",
    "source",
    "splits",
    "tokenizer",
)
Emit = Callable[[DataEvent], None]


def pack(config: DataConfig, folder: str | os.PathLike[str], *, on_event: Emit | None = None) -> DataSummary:
    """Pack the files that `config` names into `folder`, or find that they are packed there already.

    Data that are there are used again if they were split by the same rules from the same files and are, byte for byte, what was
    written; files that are gone are not asked for. `config.path` may also be a folder of packed data made by the same rules, which is
    then taken over after the same check.
    Raises ValueError if `folder` holds anything else or is damaged, if there are no files, or if a split is shorter than one sequence;
    OSError naming a file that cannot be read. A call that raises leaves `folder` as it was.
    """
    folder, emit = Path(folder), on_event or (lambda event: None)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        summary = _packed_before(config, folder, emit)
        _check_lengths(config, summary)
        return summary
    temporary = temporary_name(folder)
    temporary.mkdir(parents=True)
    try:
        with naming(folder):
            summary = _take_over(config, temporary, emit) if is_packed(config.path) else _write(temporary, config, emit)
            _check_lengths(config, summary)
            _sync(temporary)
        try:
            os.replace(temporary, folder)
        except OSError:
            if not is_packed(folder):
                raise
            summary = _packed_before(config, folder, emit)  # another process was faster
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(folder.parent)
    return summary


class _SplitWriter:
    """Takes the ids of one split, document by document, and lays them down in shards."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype[Any], first_id: int, reader: Reader) -> None:
        self.counts = Counts()
        self.num_tokens = 0
        self._folder, self._name, self._dtype, self._first_id, self._reader = folder, name, dtype, first_id, reader
        self._offsets = array("q", [0])
        self._shards: list[Shard] = []
        self._file: Any = None
        self._digest, self._in_shard = hashlib.blake2b(digest_size=16), 0

    def document(self, pieces: Iterator[np.ndarray]) -> None:
        """All ids of a document, or, with equally long ones, of several."""
        for ids in pieces:
            self._put(ids)
            if self._reader.ends_inside:
                self._offsets.extend((np.flatnonzero(ids == ByteTokenizer.END) + (self.num_tokens - len(ids) + 1)).tolist())
        if self._reader.ends:
            self._put(np.array([ByteTokenizer.END]))
        if self._reader.document_len is None and self._offsets[-1] < self.num_tokens:
            self._offsets.append(self.num_tokens)

    def close(self) -> tuple[SplitSummary, StoredSplit]:
        """What was written, and where."""
        self._end_shard()
        length = self._reader.document_len
        documents = self.num_tokens // length if length else len(self._offsets) - 1
        digest = ""
        if not length:
            offsets = np.array(self._offsets, dtype=OFFSET).tobytes()
            (self._folder / f"{self._name}.offsets").write_bytes(offsets)
            digest = hashlib.blake2b(offsets, digest_size=16).hexdigest()
        summary = SplitSummary(documents, self.counts.bytes, self.num_tokens, self.counts.words)
        return summary, StoredSplit(tuple(self._shards), digest)

    def abort(self) -> None:
        """Let go of the open file."""
        if self._file is not None:
            self._file.close()

    def _put(self, ids: np.ndarray) -> None:
        self.num_tokens += len(ids)
        most = SHARD_BYTES // self._dtype.itemsize
        while len(ids):
            if self._file is None:
                self._file = (self._folder / self._shard_name()).open("wb")
            part, ids = ids[: most - self._in_shard], ids[most - self._in_shard :]
            stored = (part - self._first_id).astype(self._dtype).tobytes()
            self._file.write(stored)
            self._digest.update(stored)
            self._in_shard += len(part)
            if self._in_shard == most:
                self._end_shard()

    def _shard_name(self) -> str:
        return f"{self._name}-{len(self._shards):05d}.tokens"

    def _end_shard(self) -> None:
        if self._file is None:
            return
        self._file.close()
        self._shards.append(Shard(self._shard_name(), self._in_shard, self._digest.hexdigest()))
        self._file, self._digest, self._in_shard = None, hashlib.blake2b(digest_size=16), 0


def _write(folder: Path, config: DataConfig, emit: Emit) -> DataSummary:
    """Fill `folder`, all but bringing it to the disk."""
    began = time.time_ns()
    sources, documents = find_documents(config, measure_of(config))
    times = {file.name: file.path.stat().st_mtime_ns for file in sources.files}
    reader, digest = reader_of(config, documents, emit), new_digest()
    first_id = ByteTokenizer.FIRST_BYTE if _holds_no_special_id(reader) else ByteTokenizer.END
    dtype = _smallest(reader.tokenizer.vocab_size - first_id)
    advance = _Progress(sum(document.size for document in documents), emit)
    with ExitStack() as stack:
        writers = {name: _SplitWriter(folder, name, dtype, first_id, reader) for name in SPLITS}
        for writer in writers.values():
            stack.callback(writer.abort)
        for document in documents:
            writer = writers[document.split]
            for pieces in reader.read(document, digest, advance, writer.counts):
                writer.document(pieces)
        written = {name: writer.close() for name, writer in writers.items()}
    if note := reader.note():
        emit(Note(note))
    reader.tokenizer.save(folder)
    listing = _listing(sources, digest.files, times, began)
    (folder / FILES_FILE).write_bytes(listing)
    summary = DataSummary(
        path=config.path,
        corpus_hash=digest.hexdigest(),
        files=len(sources.files),
        empty_files=sources.empty_files,
        short_files=sources.short_files,
        **{name: split for name, (split, _) in written.items()},
        tokenizer=reader.tokenizer.kind,
        vocab_size=reader.tokenizer.vocab_size,
        tokenizer_hash=reader.tokenizer.hash,
    )
    layout = Layout(
        dtype=dtype.str,
        first_id=first_id,
        document_len=reader.document_len,
        **{name: stored for name, (_, stored) in written.items()},
        files=hashlib.blake2b(listing, digest_size=16).hexdigest(),
    )
    meta = {"format": FORMAT, "rules": _rules(config), "summary": asdict(summary), "layout": to_dict(layout)}
    write_meta(folder, meta)
    return summary


def _holds_no_special_id(reader: Reader) -> bool:
    return not reader.ends and not reader.ends_inside and reader.tokenizer.kind != "sentencepiece"


def _smallest(values: int) -> np.dtype[Any]:
    """The unsigned type that tells `values` numbers apart."""
    return next(np.dtype(name) for name in ("<u1", "<u2", "<u4") if values <= 1 << 8 * np.dtype(name).itemsize)


class _Progress:
    """Counts what was read, and tells of it every so often."""

    def __init__(self, total: int, emit: Emit) -> None:
        self._done, self._told, self._total, self._emit = 0, 0, total, emit

    def __call__(self, number: int) -> None:
        self._done += number
        if self._done == self._total or self._done - self._told >= self._total // 100:
            self._told = self._done
            self._emit(Packing(self._done, self._total))


def _listing(sources: Sources, hashes: dict[str, str], times: dict[str, int], began: int) -> bytes:
    """`files.jsonl`: name, size and hash of every file, and the time of its last change if that can tell whether it changes again."""
    lines = []
    for file in sources.files:
        when = times[file.name] if times[file.name] < began - RACE else 0
        lines.append(json.dumps({"name": file.name, "size": file.size, "hash": hashes[file.name], "time": when}) + "\n")
    return "".join(lines).encode()


def _check_lengths(config: DataConfig, summary: DataSummary) -> None:
    fractions = isinstance(config.splits, FractionSplits)
    advice = {
        "train": "add files",
        "validation": "add files, raise data.validation_fraction or data.max_validation_bytes" if fractions else "make it longer",
        "test": "add files, raise data.test_fraction or data.max_test_bytes" if fractions else "make it longer",
    }
    asked = {"train": 1.0, "validation": config.validation_fraction, "test": config.test_fraction}
    for name in SPLITS:
        tokens = getattr(summary, name).tokens
        if (asked[name] if fractions else getattr(config.splits, name)) and tokens < config.sequence_len:
            raise ValueError(
                f"the {name} split of {summary.path!r} has {tokens} tokens: one sequence needs data.sequence_len = "
                f"{config.sequence_len}; {advice[name]}, or shorten data.sequence_len"
            )


def _take_over(config: DataConfig, temporary: Path, emit: Emit) -> DataSummary:
    """Put the packed data at `config.path` into `temporary`, without copying where the disk is the same."""
    source = Path(config.path).expanduser()
    _check_rules(config, source)
    _check_contents(source, emit)
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            try:
                os.link(path, temporary / path.name)
            except OSError:
                shutil.copy2(path, temporary / path.name)
    return read_summary(temporary)


def _packed_before(config: DataConfig, folder: Path, emit: Emit) -> DataSummary:
    """The summary of the data in `folder`, which must be what `config` asks for."""
    summary = read_summary(folder)
    _check_rules(config, folder)
    if config.path and Path(config.path).expanduser().exists():
        other = _difference_to(config, folder, summary)
        if other:
            raise ValueError(f"{folder} was packed from other data than data.path = {config.path!r} holds now: {other}; use another folder")
    _check_contents(folder, emit)
    return summary


def _check_contents(folder: Path, emit: Emit) -> None:
    """Read all of `folder`, about a second a gigabyte. Raises ValueError that names a file which is not what was written."""
    for name in SPLITS:
        Split(folder, name)  # the sizes, which cost nothing
    if defects := find_defects(folder, on_event=emit):
        more = f" ({len(defects) - 1} more files are damaged or missing)" if len(defects) > 1 else ""
        raise ValueError(f"{defects[0]}{more}; put it back from a copy, or move {folder} away to have it packed anew")


def _check_rules(config: DataConfig, folder: Path) -> None:
    defaults = _rules(DataConfig())
    packed = {**defaults, **read_meta(folder)["rules"]}
    for difference in differences(packed, _rules(config)):
        raise ValueError(
            f"{folder} was packed with data.{difference.path} = {difference.old!r}, not {difference.new!r}: "
            "ask for the same, or use another folder"
        )


def _difference_to(config: DataConfig, folder: Path, summary: DataSummary) -> str:
    """How what `config` names now differs from what `folder` was packed from; "" if it does not."""
    model = config.tokenizer.model if isinstance(config.tokenizer, SentencePieceTokens) else ""
    if model and Path(model).expanduser().exists():
        now = SentencePieceTokenizer.from_file(Path(model).expanduser()).hash
        if now != summary.tokenizer_hash:
            return f"{model} changed (hash {now}, not {summary.tokenizer_hash})"
    if is_packed(config.path):
        other = read_summary(Path(config.path).expanduser())
        same = (other.corpus_hash, other.tokenizer_hash) == (summary.corpus_hash, summary.tokenizer_hash)
        return "" if same else f"it was packed from other files (hash {other.corpus_hash}, not {summary.corpus_hash})"
    sources, _ = find_documents(config, measure_of(config))
    if (folder / FILES_FILE).exists():
        changes = changed_files(folder, sources.files)
        return f"{changes[0]}{f' and {len(changes) - 1} more' if len(changes) > 1 else ''}" if changes else ""
    now = corpus_hash(split_documents(sources.files, config))
    return "" if now == summary.corpus_hash else f"hash {now}, not {summary.corpus_hash}"


def changed_files(folder: str | os.PathLike[str], files: Sequence[SourceFile]) -> list[str]:
    """Every file that is new, gone or other than when the data in `folder` were packed, in words.

    Read are only those files whose time of change is not the one they had then.
    """
    lines = (Path(folder) / FILES_FILE).read_text(encoding="utf-8").splitlines()
    known = {entry["name"]: entry for entry in map(json.loads, lines)}
    changes = []
    for file in files:
        entry = known.pop(file.name, None)
        if entry is None:
            changes.append(f"{file.path} is new")
        elif entry["size"] != file.size:
            changes.append(f"{file.path} changed (it had {entry['size']} bytes and has {file.size})")
        elif (not entry["time"] or file.path.stat().st_mtime_ns != entry["time"]) and _hash_of(file) != entry["hash"]:
            changes.append(f"{file.path} changed (its content has another hash)")
    return changes + [f"{name} is gone" for name in known]


def _hash_of(file: SourceFile) -> str:
    digest = new_digest()
    for _, pieces in read_documents([whole_file(file)], digest):
        for _ in pieces:
            pass
    return digest.files[file.name]


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def _rules(config: DataConfig) -> dict[str, Any]:
    fields = to_dict(config)
    return {name: fields[name] for name in SPLIT_RULES}
