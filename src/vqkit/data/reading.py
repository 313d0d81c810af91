"""From files to ids: one reader for each kind of source. What is read enters a `Fingerprint` on the way.

A reader turns a part of a file into documents, and each document into pieces of ids, so that no file is ever whole in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vqkit.data.config import DataConfig, IdSource, ImageSource, SentencePieceTokens, SizedSplits, TextSource
from vqkit.data.events import DataEvent, Note
from vqkit.data.images import ImageTokenizer, read_image
from vqkit.data.pieces import SentencePieceTokenizer, train_sentencepiece
from vqkit.data.source import Document, Fingerprint, SourceFile, new_digest, read_documents, whole_file
from vqkit.data.tokenizer import ByteTokenizer, IdTokenizer, Tokenizer

BLOCK = 1 << 20
"""Ids, or bytes of images, that are read at once."""
CHANGES_DTYPE = "--data.source.dtype names another type"
Documents = Iterator[Iterator[np.ndarray]]


class Reader(Protocol):
    """What packing knows of a source."""

    @property
    def tokenizer(self) -> Tokenizer:
        """What makes the ids."""
        ...

    @property
    def ends(self) -> bool:
        """Whether an end token is to follow every document."""
        ...

    @property
    def ends_inside(self) -> bool:
        """Whether documents end where an end token stands in what is read."""
        ...

    @property
    def document_len(self) -> int | None:
        """Tokens of every document, where they are equally long."""
        ...

    def read(self, document: Document, digest: Fingerprint, advance: Callable[[int], None], split: Counts) -> Documents:
        """The documents in a part of a file as pieces of ids; all are to be read in turn."""
        ...

    def note(self) -> str:
        """What is worth telling of what was read; empty where nothing was taken for granted."""
        ...


class Counts:
    """Bytes and words of one split, counted as they pass. A word is what stands between ASCII whitespace."""

    def __init__(self) -> None:
        self.bytes, self.words = 0, 0

    def text(self, pieces: Iterable[bytes], advance: Callable[[int], None]) -> Iterator[bytes]:
        """The same pieces of one document."""
        after_space = True
        for piece in pieces:
            spaces = _IS_SPACE[np.frombuffer(piece, dtype=np.uint8)]
            self.words += int(np.count_nonzero(spaces[:-1] & ~spaces[1:])) + (after_space and not spaces[0])
            after_space = bool(spaces[-1])
            self.bytes += len(piece)
            advance(len(piece))
            yield piece


_IS_SPACE = np.isin(np.arange(256), list(b" \t\n\r\v\f"))


class TextReader:
    """Every part of a file is a document of bytes."""

    ends_inside = False
    document_len = None

    def __init__(self, tokenizer: Tokenizer, ends: bool) -> None:
        self.tokenizer, self.ends = tokenizer, ends

    def read(self, document: Document, digest: Fingerprint, advance: Callable[[int], None], split: Counts) -> Documents:
        """See `Reader`. Raises ValueError, with the name of the file, for bytes that the tokenizer cannot keep."""
        for _, pieces in read_documents([document], digest):
            yield self._ids(document, split.text(pieces, advance))

    def note(self) -> str:
        """See `Reader`: bytes are bytes."""
        return ""

    def _ids(self, document: Document, pieces: Iterator[bytes]) -> Iterator[np.ndarray]:
        try:
            yield from self.tokenizer.encode_pieces(pieces)
        except ValueError as error:
            raise ValueError(f"{document.file.path}: {error}") from error


class IdReader:
    """Arrays of ids: one axis is one document, of two axes every row is one."""

    document_len = None

    def __init__(self, source: IdSource, ends: bool) -> None:
        add = source.special_ids == "add"
        self.tokenizer = IdTokenizer(source.vocab_size, 3 if add else 0)
        self.ends, self.ends_inside = ends and add, not add
        self._source = source
        self._number, self._largest, self._bare = 0, 0, False

    def measure(self, file: SourceFile) -> SourceFile:
        """`file` with its number of ids, or of rows. Raises ValueError, with the name of the file, for what holds no ids."""
        array = self._array(file.path)
        return file._replace(items=len(array) if array.size else 0)

    def read(self, document: Document, digest: Fingerprint, advance: Callable[[int], None], split: Counts) -> Documents:
        """See `Reader`. Raises ValueError, with file and place, for an id outside the vocabulary."""
        _take_in(document, digest)
        array = self._array(document.file.path)
        if array.ndim == 1:
            yield self._ids(document, array[document.start : document.stop], document.start, "")
            advance(document.size)
            return
        for i in range(document.start, document.stop):
            yield self._ids(document, array[i], 0, f"row {i}, ")
            advance(1)

    def _ids(self, document: Document, row: np.ndarray, first: int, where: str) -> Iterator[np.ndarray]:
        limit, least = self._source.vocab_size, 0 if self.tokenizer.shift else IdTokenizer.PAD + 1
        for start in range(0, len(row), BLOCK):
            block = row[start : start + BLOCK].astype(np.int64)
            self._number, self._largest = self._number + len(block), max(self._largest, int(block.max()))
            wrong = np.flatnonzero((block < least) | (block >= limit))
            if len(wrong):
                place = first + start + int(wrong[0])
                raise ValueError(
                    f"{document.file.path} has id {block[wrong[0]]} at {where}place {place}: must be from {least} to {limit - 1}, "
                    f"with data.source.vocab_size = {limit} and data.source.special_ids = {self._source.special_ids!r}"
                    + self._taken(document.file.path)
                )
            yield block + self.tokenizer.shift

    def note(self) -> str:
        """See `Reader`: how many ids, how large, and of which numbers, where the files do not say it themselves."""
        found = f"{self._number:,} ids, the largest {self._largest:,} of data.source.vocab_size = {self._source.vocab_size:,}"
        return f"{found}; numbers without a header were taken for {self._source.dtype}: {CHANGES_DTYPE}" if self._bare else found

    def _taken(self, path: Path) -> str:
        return "" if path.suffix == ".npy" else f"; its numbers were taken for {self._source.dtype}: {CHANGES_DTYPE}"

    def _array(self, path: Path) -> np.ndarray:
        self._bare = self._bare or path.suffix != ".npy"
        array = open_array(path, np.dtype(self._source.dtype).newbyteorder("<"))
        if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
            raise ValueError(f"{path} holds {array.dtype} of {array.ndim} axes: must be integers of one axis, or of two, a row a document")
        return array


class ImageReader:
    """Files of one image, or arrays of many; every image is a document of equal length, without an end token."""

    ends = False
    ends_inside = False

    def __init__(self, source: ImageSource) -> None:
        self.tokenizer = ImageTokenizer(source.height, source.width, source.channels)
        self.document_len = source.num_bytes

    def measure(self, file: SourceFile) -> SourceFile:
        """`file` with its number of images. Raises ValueError, with the name of the file, for an array of anything else."""
        return file._replace(items=len(self._array(file.path)) if file.path.suffix == ".npy" else 1)

    def read(self, document: Document, digest: Fingerprint, advance: Callable[[int], None], split: Counts) -> Documents:
        """See `Reader`: one stream of whole images. Raises ValueError, with the name of the file, for what is no such image."""
        content = _take_in(document, digest, keep=document.file.path.suffix != ".npy")
        yield self._ids(document, content, advance, split)

    def _ids(self, document: Document, content: bytes, advance: Callable[[int], None], split: Counts) -> Iterator[np.ndarray]:
        many = max(BLOCK // self.document_len, 1)
        for start in range(document.start, document.stop, many):
            stop = min(start + many, document.stop)
            if document.file.path.suffix == ".npy":
                images = self._array(document.file.path)[start:stop]
            else:
                images = read_image(content, self.tokenizer.shape, str(document.file.path))
            split.bytes += images.size
            advance(stop - start)
            yield images.reshape(-1).astype(np.int64) + ByteTokenizer.FIRST_BYTE

    def note(self) -> str:
        """See `Reader`: the size of every image was compared."""
        return ""

    def _array(self, path: Path) -> np.ndarray:
        array = open_array(path, np.dtype(np.uint8))
        if self.tokenizer.channels == 1 and array.ndim == 3:
            array = array[..., None]
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1:] != self.tokenizer.shape:
            wanted = ", ".join(map(str, self.tokenizer.shape))
            raise ValueError(
                f"{path} holds {array.dtype} of shape {array.shape}: must be uint8 of shape [N, {wanted}], "
                "the height, width and channels of data.source"
            )
        return array


def open_array(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    """The numbers of a .npy file, or of any other as bare numbers of `dtype`, memory-mapped. Raises ValueError with the path."""
    if path.suffix != ".npy":
        size = path.stat().st_size
        if size % dtype.itemsize:
            multiple = f"must be a multiple of {dtype.itemsize} for numbers of data.source.dtype = {dtype.name!r}"
            raise ValueError(f"{path} has {size} bytes: {multiple}; {CHANGES_DTYPE}")
        return np.memmap(path, dtype=dtype, mode="r") if size else np.empty(0, dtype=dtype)
    try:
        return np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not an array that numpy wrote, or it is damaged: {error}") from error


def measure_of(config: DataConfig) -> Callable[[SourceFile], SourceFile] | None:
    """What sets `items` of a file; see `find_documents`."""
    match config.source:
        case IdSource():
            return IdReader(config.source, ends=True).measure
        case ImageSource():
            return ImageReader(config.source).measure
        case TextSource():
            return None


def reader_of(config: DataConfig, documents: list[Document], emit: Callable[[DataEvent], None]) -> Reader:
    """The reader of `config.source`; a vocabulary that is to be learned is learned from the training split of `documents` now."""
    ends = not isinstance(config.splits, SizedSplits)
    match config.source:
        case IdSource():
            return IdReader(config.source, ends)
        case ImageSource():
            return ImageReader(config.source)
        case TextSource():
            return TextReader(_text_tokenizer(config, documents, emit), ends)


def _text_tokenizer(config: DataConfig, documents: list[Document], emit: Callable[[DataEvent], None]) -> Tokenizer:
    wanted = config.tokenizer
    if not isinstance(wanted, SentencePieceTokens):
        return ByteTokenizer()
    if wanted.model:
        tokenizer = SentencePieceTokenizer.from_file(Path(wanted.model).expanduser())
        if tokenizer.vocab_size != wanted.vocab_size:
            raise ValueError(
                f"data.tokenizer.vocab_size = {wanted.vocab_size}: data.tokenizer.model = {wanted.model!r} has {tokenizer.vocab_size} "
                "ids; they must be equally many"
            )
        return tokenizer
    emit(Note(f"learning a vocabulary of {wanted.vocab_size:,} from the training split"))
    training = [document for document in documents if document.split == "train"]
    return train_sentencepiece((piece for _, pieces in read_documents(training, new_digest()) for piece in pieces), wanted.vocab_size)


def _take_in(document: Document, digest: Fingerprint, *, keep: bool = False) -> bytes:
    """Let all of the file enter `digest`, once, before its first part is read; the content is returned if it is to be kept."""
    if document.start:
        return b""
    kept = []
    for _, pieces in read_documents([whole_file(document.file)], digest):
        for piece in pieces:
            kept += [piece] if keep else []
    return b"".join(kept)
