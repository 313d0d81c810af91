"""SentencePiece by the official settings: whatever bytes go in come out, and long texts give the same ids in any pieces."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from vqkit.data import DataConfig, SentencePieceTokenizer, Split, load_tokenizer, pack, pieces, read_summary
from vqkit.data.config import PathSplits, SentencePieceTokens
from vqkit.data.pieces import train_sentencepiece

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "caf\u00e9", "na\u00efve", "\u2014", "end."]
TEXT = "".join(f"{' '.join(random.Random(i).choices(WORDS, k=9))}\n" for i in range(200))
SIZE = 320


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return train_sentencepiece([TEXT.encode()], SIZE)


@pytest.fixture(scope="module")
def normalizing() -> bytes:
    """A model as others make them: it normalizes, puts a space before the first word, and has no pieces for bytes."""
    out = io.BytesIO()
    lines: Iterator[str] = iter(TEXT.splitlines())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=out, vocab_size=80, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, model_type="bpe", minloglevel=2
    )
    return out.getvalue()


texts = st.lists(st.sampled_from([*WORDS, " ", "  ", "\n", "\t", "\u2581", "\0", "\ufb01", "\U0001f600", "</s>", "<0x41>", "A"])).map(
    "".join
)


@given(
    st.one_of(st.binary(max_size=60), texts.map(str.encode), st.tuples(texts, st.binary(max_size=3)).map(lambda t: t[0].encode() + t[1]))
)
def test_any_bytes_come_back_whole(tokenizer: SentencePieceTokenizer, data: bytes) -> None:
    ids = tokenizer.encode(data)
    assert ids.dtype == np.int64 and ids.ndim == 1
    assert tokenizer.decode(ids) == data
    assert not np.isin(ids, [tokenizer.PAD, tokenizer.END, tokenizer.UNKNOWN]).any()


def test_it_is_the_official_vocabulary(tokenizer: SentencePieceTokenizer) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    assert (processor.pad_id(), processor.eos_id(), processor.unk_id(), processor.bos_id()) == (0, 1, 2, -1)
    assert tokenizer.vocab_size == SIZE and tokenizer.is_lossless
    assert tokenizer.encode(TEXT.encode()).tolist() == processor.encode(TEXT)
    assert len(tokenizer.encode(TEXT.encode())) < len(TEXT) / 2, "no words were learned"
    assert train_sentencepiece([TEXT.encode()[:999], TEXT.encode()[999:]], SIZE).vocab_size == SIZE
    assert train_sentencepiece([TEXT.encode()], SIZE).hash == tokenizer.hash, "the same text gave another vocabulary"


@given(st.lists(st.integers(0, 400), max_size=6), st.sampled_from(["lines", "words", "nothing"]))
def test_pieces_of_a_long_text_give_the_ids_of_the_whole(tokenizer: SentencePieceTokenizer, cuts: list[int], kind: str) -> None:
    data = {"lines": TEXT[:300].encode(), "words": TEXT[:300].replace("\n", " ").encode(), "nothing": b"x" + "\u00e9".encode() * 200}[kind]
    borders = [0, *sorted(cuts), len(data)]
    parts = [data[a:b] for a, b in pairwise(borders)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "CHUNK", 64)
        whole = tokenizer.encode(data)
        assert np.concatenate([*tokenizer.encode_pieces(parts)]).tolist() == whole.tolist()
        chunks = list(pieces._chunks(parts))
    assert b"".join(chunks) == data and max(map(len, chunks)) <= 64
    assert all(chunk.decode("utf-8") for chunk in chunks), "a character was cut"
    assert kind != "lines" or all(chunk.endswith(b"\n") for chunk in chunks[:-1])
    assert tokenizer.decode(whole) == data


def test_a_model_that_normalizes_gives_its_normal_form_and_refuses_other_bytes(normalizing: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = SentencePieceTokenizer(normalizing)
    assert not tokenizer.is_lossless
    processor = sentencepiece.SentencePieceProcessor(model_proto=normalizing)
    data = b"the  quick\nbrown fox"
    assert tokenizer.encode(data).tolist() == processor.encode(data.decode())
    assert tokenizer.decode(tokenizer.encode(data)) == b" the quick brown fox"
    with pytest.raises(ValueError, match=r"byte 4 is not UTF-8 \(0xff\): this SentencePiece model has no pieces for bytes"):
        tokenizer.encode(b"the \xff fox")
    monkeypatch.setattr(pieces, "CHUNK", 16)
    with pytest.raises(ValueError, match=r"byte 41 is not UTF-8 \(0xfe\)"):
        list(tokenizer.encode_pieces([b"the quick brown fox ", b"the quick brown fox, \xfe"]))


def test_what_is_no_such_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.tokenizer\.model = '.*gone': there is no such file"):
        SentencePieceTokenizer.from_file(tmp_path / "gone")
    (tmp_path / "bad").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="bad is not a SentencePiece model, or it is damaged"):
        SentencePieceTokenizer.from_file(tmp_path / "bad")
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXT.splitlines()), model_writer=out, vocab_size=40, minloglevel=2)
    with pytest.raises(ValueError, match=r"has padding, end and unknown at \(-1, 2, 0\): must be at \(0, 1, 2\)"):
        SentencePieceTokenizer(out.getvalue())


@pytest.mark.parametrize(
    ("size", "message"),
    [(100, r"vocab_size = 100: must be at least \d+, for every"), (10**6, r"too little text for it; must be at most \d+")],
)
def test_a_vocabulary_that_does_not_suit_the_text_is_named(size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_sentencepiece([TEXT.encode()], size)


def test_only_bytes_are_encoded_and_only_ids_decoded(tokenizer: SentencePieceTokenizer) -> None:
    with pytest.raises(TypeError, match="data is a str: must be bytes"):
        tokenizer.encode("text")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"contain {SIZE}: must be from 0 to {SIZE - 1}"):
        tokenizer.decode([SIZE])


def corpus(root: Path) -> DataConfig:
    for name, text in {"train/a": TEXT, "train/b": TEXT[:500], "test/c": TEXT[70:400] + "unseen \u4e16"}.items():
        path = root / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return DataConfig(
        path=str(root / "corpus"), sequence_len=16, splits=PathSplits(validation=""), tokenizer=SentencePieceTokens(vocab_size=SIZE)
    )


def test_a_vocabulary_is_learned_from_the_training_split_and_kept(tmp_path: Path) -> None:
    config = DataConfig(
        path=corpus(tmp_path).path, sequence_len=16, splits=PathSplits(validation=""), tokenizer=SentencePieceTokens(vocab_size=SIZE)
    )
    summary = pack(config, tmp_path / "data")
    tokenizer = load_tokenizer(tmp_path / "data")
    assert tokenizer.hash == train_sentencepiece([TEXT.encode(), TEXT[:500].encode()], SIZE).hash == summary.tokenizer_hash
    assert (summary.tokenizer, summary.vocab_size) == ("sentencepiece", SIZE)
    for name, files in (("train", ["train/a", "train/b"]), ("test", ["test/c"])):
        contents = [(tmp_path / "corpus" / file).read_bytes() for file in files]
        split = Split(tmp_path / "data", name)
        assert [split.document(i) for i in range(split.num_documents)] == contents
        assert split.tokens.tolist() == [i for content in contents for i in [*tokenizer.encode(content).tolist(), tokenizer.END]]
        assert b"".join(piece.tobytes() for piece in split.byte_pieces(50)) == b"".join(contents)
        assert max(map(len, split.byte_pieces(50))) <= 50
        assert (split.num_bytes, split.num_words) == (sum(map(len, contents)), sum(len(content.split()) for content in contents))
    assert pack(config, tmp_path / "data") == summary == read_summary(tmp_path / "data")


def test_a_model_file_is_used_and_its_change_is_named(tmp_path: Path, tokenizer: SentencePieceTokenizer, normalizing: bytes) -> None:
    path = tmp_path / "words.model"
    path.write_bytes(tokenizer.model)
    base = corpus(tmp_path)
    config = DataConfig(
        path=base.path, sequence_len=16, splits=base.splits, tokenizer=SentencePieceTokens(vocab_size=SIZE, model=str(path))
    )
    assert pack(config, tmp_path / "data").tokenizer_hash == tokenizer.hash
    path.write_bytes(train_sentencepiece([TEXT.encode()], SIZE + 10).model)
    with pytest.raises(ValueError, match=r"was packed from other data .*words\.model changed \(hash"):
        pack(config, tmp_path / "data")
    with pytest.raises(ValueError, match=rf"vocab_size = {SIZE}: data\.tokenizer\.model = .* has {SIZE + 10} ids"):
        pack(config, tmp_path / "other")
    path.write_bytes(normalizing)
    (tmp_path / "corpus" / "train" / "b").write_bytes(b"fox \xfe")
    strict = DataConfig(path=base.path, sequence_len=16, splits=base.splits, tokenizer=SentencePieceTokens(vocab_size=80, model=str(path)))
    with pytest.raises(ValueError, match=r"train/b: byte 4 is not UTF-8 \(0xfe\)"):
        pack(strict, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_binary_rubbish_is_kept_and_cannot_be_learned_from(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    path = tmp_path / "words.model"
    path.write_bytes(tokenizer.model)
    rubbish = np.random.default_rng(0).bytes(300)
    (tmp_path / "rubbish").write_bytes(rubbish)
    config = DataConfig(path=str(tmp_path / "rubbish"), sequence_len=8, validation_fraction=0.0, test_fraction=0.0)
    pack(replace(config, tokenizer=SentencePieceTokens(SIZE, str(path))), tmp_path / "data")
    assert Split(tmp_path / "data", "train").document(0) == rubbish
    (tmp_path / "rubbish").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match=r"data\.tokenizer\.vocab_size = 300: .*training split"):
        pack(replace(config, tokenizer=SentencePieceTokens(300)), tmp_path / "other")
