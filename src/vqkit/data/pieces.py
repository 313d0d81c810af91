"""SentencePiece: pieces of words as ids, such that every byte string comes back whole. Needs the extra `sentencepiece`."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vqkit.data.tokenizer import SpecialIds, checked_ids, digest_of, write_description
from vqkit.files import write_bytes_atomic

MODEL_FILE = "tokenizer.model"
SPACE = "\u2581"
"""How SentencePiece writes a space; where it stands in a text itself, its three bytes take its place."""
CHUNK = 1 << 16
"""Long texts are encoded in chunks of at most this many bytes, cut after a line end if there is one, or before a space."""
SENTENCE_BYTES = 4000
"""Lines are cut to this for training; SentencePiece passes over longer ones."""
TRAINING_CHARACTERS = 1_000_000_000
"""Most characters that a vocabulary is learned from."""
_PROBE = "  Two  spaces,\n\n tabs\t\tand \ufb01, \u00bd, e\u0301, \u00e9, \uff21 at once \n "
_LITERAL = re.compile(f"[{SPACE}\0\udc80-\udcff]+")


class SentencePieceTokenizer(SpecialIds):
    """A SentencePiece model with the official ids: 0 padding, 1 end, 2 unknown, no begin token.

    A model with a piece for every byte that leaves text as it is (`is_lossless`; those that `train_sentencepiece` learns are)
    gives any bytes back as they were. Every other gives back its normal form of the text, and refuses what is not UTF-8.
    Raises ValueError for a model that cannot be read or has other special ids.
    """

    kind: ClassVar[str] = "sentencepiece"

    def __init__(self, model: bytes, *, name: str = "the SentencePiece model") -> None:
        sentencepiece = sentencepiece_module()
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.vocab_size: int = processor.vocab_size()
        except RuntimeError as error:
            raise ValueError(f"{name} is not a SentencePiece model, or it is damaged") from error
        found = (processor.pad_id(), processor.eos_id(), processor.unk_id())
        if found != (self.PAD, self.END, self.UNKNOWN):
            raise ValueError(
                f"{name} has padding, end and unknown at {found}: must be at (0, 1, 2); learn one with pad_id=0, eos_id=1, unk_id=2"
            )
        self.model = model
        self._processor = processor
        self._content = [_content(processor, i) for i in range(self.vocab_size)]
        self._byte_ids = {self._content[i]: i for i in range(self.vocab_size) if processor.is_byte(i)}
        self.is_lossless = len(self._byte_ids) == 256 and self.decode(self._encode_text([_PROBE])) == _PROBE.encode()

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> SentencePieceTokenizer:
        """The model of a file. Raises ValueError if there is none, or it is of no use."""
        if not Path(path).is_file():
            raise ValueError(f"data.tokenizer.model = {str(path)!r}: there is no such file")
        return cls(Path(path).read_bytes(), name=str(path))

    @property
    def hash(self) -> str:
        """See `Tokenizer`."""
        return digest_of(self.model)

    def encode(self, data: bytes | bytearray | memoryview) -> np.ndarray:
        """Ids of `data`, int64 [T]. Raises TypeError for anything but bytes, ValueError for bytes that the model cannot keep."""
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"data is a {type(data).__name__}: must be bytes; encode text first, for example by text.encode()")
        return np.concatenate([np.empty(0, dtype=np.int64), *self.encode_pieces([bytes(data)])])

    def encode_pieces(self, pieces: Iterable[bytes]) -> Iterator[np.ndarray]:
        """See `Tokenizer`. Where chunks end depends on what stands before, not on the pieces."""
        place = 0
        for batch in _batches(_chunks(pieces), size=64):
            texts = []
            for chunk in batch:
                texts.append(self._text(chunk, place))
                place += len(chunk)
            yield self._encode_text(texts)

    def decode(self, ids: Any) -> bytes:
        """The bytes of `ids`; see `Tokenizer`. A model that is not lossless begins words, the first one too, with a space."""
        return b"".join(self._content[i] for i in checked_ids(ids, self.vocab_size).tolist())

    def save(self, folder: str | os.PathLike[str]) -> None:
        """See `Tokenizer`."""
        write_bytes_atomic(Path(folder) / MODEL_FILE, self.model)
        write_description(folder, self)

    def _text(self, chunk: bytes, place: int) -> str:
        if self.is_lossless:
            return chunk.decode("utf-8", "surrogateescape")
        try:
            return chunk.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"byte {place + error.start} is not UTF-8 (0x{chunk[error.start]:02x}): this SentencePiece model has no pieces for bytes; "
                "mend the text, or learn a vocabulary here, which has them"
            ) from error

    def _encode_text(self, texts: list[str]) -> np.ndarray:
        """Ids of texts one after another; what SentencePiece would change (see `_LITERAL`) byte by byte."""
        parts: list[str] = []
        literals: dict[int, str] = {}  # what stands in front of part number i
        for text in texts:
            start = 0
            for match in _LITERAL.finditer(text) if len(self._byte_ids) == 256 else ():
                parts.append(text[start : match.start()])
                literals[len(parts)] = match.group()
                start = match.end()
            parts.append(text[start:])
        ids: list[int] = []
        # The result does not depend on the number of threads.
        for i, encoded in enumerate(self._processor.encode(parts, num_threads=os.cpu_count() or 1)):
            ids += [self._byte_ids[bytes([b])] for b in literals.get(i, "").encode("utf-8", "surrogateescape")]
            ids += encoded
        return np.array(ids, dtype=np.int64)


def train_sentencepiece(texts: Iterable[bytes], vocab_size: int) -> SentencePieceTokenizer:
    """Learn a vocabulary from texts, by the official settings: BPE, character coverage 1, no begin token; and a piece for every byte.

    At most the first 1e9 bytes are read, as lines; bytes that are not UTF-8 are passed over. The same texts give the same
    vocabulary. Raises ValueError if `vocab_size` does not suit the texts.
    """
    sentencepiece = sentencepiece_module()
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=out,
            vocab_size=vocab_size,
            model_type="bpe",
            character_coverage=1.0,
            pad_id=SpecialIds.PAD,
            eos_id=SpecialIds.END,
            unk_id=SpecialIds.UNKNOWN,
            bos_id=-1,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            num_threads=16,  # fixed, as the model records it
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"data.tokenizer.vocab_size = {vocab_size}: {_reason(str(error))}") from error
    return SentencePieceTokenizer(out.getvalue())


def sentencepiece_module() -> Any:
    """The package, or ImportError that says how to get it."""
    try:
        import sentencepiece
    except ModuleNotFoundError:
        raise ImportError('a SentencePiece vocabulary needs: pip install "vqkit[sentencepiece]"') from None
    return sentencepiece


def _content(processor: Any, i: int) -> bytes:
    """The bytes that id `i` stands for."""
    piece: str = processor.id_to_piece(i)
    if processor.is_byte(i):
        return bytes([int(piece[3:-1], 16)])
    if processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i):
        return b""
    return piece.replace(SPACE, " ").encode()


def _chunks(pieces: Iterable[bytes]) -> Iterator[bytes]:
    waiting = b""
    for piece in pieces:
        waiting += piece
        start = 0
        while len(waiting) - start > CHUNK:
            stop = _cut(waiting, start)
            yield waiting[start:stop]
            start = stop
        waiting = waiting[start:]
    if waiting:
        yield waiting


def _cut(data: bytes, start: int) -> int:
    """Where the chunk that begins at `start` ends; `data` goes on past the longest one there may be."""
    limit = start + CHUNK
    line_end = data.rfind(b"\n", start, limit)
    if line_end >= 0:
        return line_end + 1
    space = data.rfind(b" ", start + 1, limit)
    if space > start:
        return space
    while limit > start + CHUNK - 4 and data[limit] & 0xC0 == 0x80:  # never within a character
        limit -= 1
    return limit


def _batches(chunks: Iterator[bytes], size: int) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    for chunk in chunks:
        batch.append(chunk)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _sentences(texts: Iterable[bytes]) -> Iterator[str]:
    left = TRAINING_CHARACTERS
    for text in texts:
        for line in text.splitlines(keepends=True):
            for start in range(0, len(line), SENTENCE_BYTES):
                sentence = line[start : start + SENTENCE_BYTES][:left].decode("utf-8", "ignore").replace("\0", "")
                left -= len(sentence)
                if left <= 0:
                    return
                if sentence:
                    yield sentence


def _reason(message: str) -> str:
    """What the trainer complains of, without its places in C++."""
    largest = re.search(r"Please set it to a value <= (\d+)", message)
    needed = re.search(r"required_chars\. \d+ vs (\d+)", message)
    if largest:
        return f"the training split has too little text for it; must be at most {largest[1]}"
    if needed:
        return f"must be at least {needed[1]}, for every character of the training split and every byte"
    return f"SentencePiece cannot learn from the training split: {message.rpartition('] ')[2].strip() or message}"
