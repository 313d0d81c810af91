"""Packed data hold every byte once, appear as a whole, and are used again only for what they were made from."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqkit.data import ByteTokenizer, DataConfig, Split, SplitSummary, pack, packing, read_summary
from vqkit.data.config import ByteTokens, SentencePieceTokens
from vqkit.data.source import SPLITS, list_files, split_documents


@pytest.fixture
def corpus(tmp_path: Path) -> DataConfig:
    generator = np.random.default_rng(0)
    folder = tmp_path / "corpus"
    for i in range(30):
        path = folder / f"{i % 3}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(generator.bytes(5 + 7 * i))
    (folder / "empty").touch()
    return DataConfig(path=str(folder), validation_fraction=0.2, test_fraction=0.2, sequence_len=16)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_document_comes_back_in_order_with_an_end_token_after_it(corpus: DataConfig, tmp_path: Path) -> None:
    summary = pack(corpus, tmp_path / "data")
    documents = split_documents(list_files(corpus).files, corpus)
    for name in SPLITS:
        split = Split(tmp_path / "data", name)
        whole = [d.file.path.read_bytes() for d in documents if d.split == name]
        assert [split.document(i) for i in range(split.num_documents)] == whole
        expected = [i for content in whole for i in [*ByteTokenizer().encode(content).tolist(), ByteTokenizer.END]]
        assert split.tokens.tolist() == expected
        assert (split.num_documents, split.num_bytes, split.num_tokens) == (len(whole), len(b"".join(whole)), len(expected))
        words = sum(len(content.split()) for content in whole)
        assert getattr(summary, name) == SplitSummary(split.num_documents, split.num_bytes, split.num_tokens, words)
        assert split.num_words == words
    assert (summary.files, summary.empty_files, summary.short_files) == (30, 1, 0)
    words = sum(len(d.file.path.read_bytes().split()) for d in documents)
    assert summary.total == SplitSummary(30, sum(d.size for d in documents), sum(d.size + 1 for d in documents), words)
    assert read_summary(tmp_path / "data") == summary


@settings(max_examples=20)  # each writes files and waits for the disk
@given(st.binary(min_size=40, max_size=300), st.integers(1, 64))
def test_a_single_file_comes_back_in_pieces_of_any_size(tmp_path_factory: pytest.TempPathFactory, data: bytes, size: int) -> None:
    root = tmp_path_factory.getbasetemp() / "single"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    (root / "file").write_bytes(data)
    pack(DataConfig(path=str(root / "file"), validation_fraction=0.2, test_fraction=0.2, sequence_len=4), root / "data")
    pieces = [piece for name in SPLITS for piece in Split(root / "data", name).byte_pieces(size)]
    assert b"".join(piece.tobytes() for piece in pieces) == data
    assert all(piece.dtype == np.uint8 and len(piece) <= size for piece in pieces)


def test_long_files_are_read_in_pieces(tmp_path: Path, corpus: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pack(corpus, tmp_path / "whole")
    monkeypatch.setattr("vqkit.data.source.PIECE", 3)
    assert pack(corpus, tmp_path / "pieces") == whole
    assert contents(tmp_path / "pieces") == contents(tmp_path / "whole")


def test_a_split_that_is_not_asked_for_is_empty(corpus: DataConfig, tmp_path: Path) -> None:
    summary = pack(replace(corpus, validation_fraction=0.0), tmp_path / "data")
    split = Split(tmp_path / "data", "validation")
    assert summary.validation == SplitSummary(0, 0, 0)
    assert (split.num_tokens, len(split.tokens), split.offsets.tolist(), list(split.byte_pieces())) == (0, 0, [0], [])


def test_the_same_data_are_used_again_untouched(corpus: DataConfig, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    summary = pack(corpus, folder)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    moved = shutil.copytree(corpus.path, tmp_path / "moved")
    for config in (corpus, replace(corpus, path=str(moved)), replace(corpus, sequence_len=8, segments="ignore")):
        assert pack(config, folder) == summary
    shutil.rmtree(corpus.path)
    assert pack(corpus, folder) == summary
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    "change",
    [
        {"include": ("*.txt", "*.md")},
        {"exclude": ()},
        {"min_file_bytes": 2},
        {"validation_fraction": 0.3},
        {"test_fraction": 0.3},
        {"max_validation_bytes": 10**6},
        {"max_test_bytes": 10**6},
    ],
)
def test_data_split_by_other_rules_are_refused(corpus: DataConfig, tmp_path: Path, change: dict[str, Any]) -> None:
    pack(corpus, tmp_path / "data")
    before = contents(tmp_path / "data")
    (field,) = change
    with pytest.raises(ValueError, match=rf"data was packed with data\.{field} = .*, not .*use another folder"):
        pack(replace(corpus, **change), tmp_path / "data")
    assert contents(tmp_path / "data") == before


def test_every_option_but_the_place_and_the_cut_is_a_rule() -> None:
    assert {*packing.SPLIT_RULES, "path", "sequence_len", "segments"} == {*DataConfig.__dataclass_fields__}


def test_data_from_other_files_are_refused(corpus: DataConfig, tmp_path: Path) -> None:
    pack(corpus, tmp_path / "data")
    before = contents(tmp_path / "data")
    (Path(corpus.path) / "0" / "0.txt").write_bytes(b"more")
    with pytest.raises(
        ValueError, match=r"was packed from other data than data\.path = .*: .*0/0\.txt changed \(it had 5 bytes and has 4\); use"
    ):
        pack(corpus, tmp_path / "data")
    assert contents(tmp_path / "data") == before


def test_another_tokenizer_is_named_by_its_kind(tmp_path: Path) -> None:
    (tmp_path / "words").write_text("the quick brown fox " * 50)
    config = DataConfig(path=str(tmp_path / "words"), sequence_len=8, tokenizer=SentencePieceTokens(vocab_size=290))
    pack(config, tmp_path / "data")
    with pytest.raises(ValueError, match=r"was packed with data\.tokenizer\.kind = 'sentencepiece', not 'bytes': ask for the same"):
        pack(replace(config, tokenizer=ByteTokens()), tmp_path / "data")


@pytest.mark.parametrize("name", ["notes.txt", "meta.json"])
def test_a_folder_with_something_else_is_left_alone(corpus: DataConfig, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / name).write_text("mine")
    with pytest.raises(ValueError, match=f"{folder}"):
        pack(corpus, folder)
    assert contents(folder) == {name: b"mine"}


def test_nothing_is_left_of_a_packing_that_fails(corpus: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(packing.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        pack(corpus, tmp_path / "run" / "data")
    assert contents(tmp_path / "run") == {}
    monkeypatch.undo()
    (tmp_path / "run" / "data").mkdir(exist_ok=True)
    pack(corpus, tmp_path / "run" / "data")  # an empty folder is as good as none
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["data"]


@pytest.mark.parametrize("other", [{}, {"exclude": ("0",)}])
def test_of_two_processes_that_pack_at_once_one_is_faster(
    corpus: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, Any]
) -> None:
    sync = packing._sync

    def overtaken(folder: Path) -> None:
        monkeypatch.setattr(packing, "_sync", sync)
        pack(replace(corpus, **other), tmp_path / "data")
        sync(folder)

    monkeypatch.setattr(packing, "_sync", overtaken)
    if other:
        with pytest.raises(ValueError, match=r"data was packed with data\.exclude"):
            pack(corpus, tmp_path / "data")
    else:
        assert pack(corpus, tmp_path / "data") == read_summary(tmp_path / "data")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "data"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence_len": 4000}, r"the train split of '.*' has \d+ tokens: one sequence needs data\.sequence_len = 4000; add files"),
        ({"max_validation_bytes": 14}, r"the validation split of .* has \d+ tokens.*16; .*raise data\.validation_fraction"),
        ({"max_test_bytes": 14}, r"the test split of .* has \d+ tokens.*16; .*raise data\.test_fraction or data\.max_test_bytes"),
    ],
)
def test_a_split_shorter_than_a_sequence_is_named(corpus: DataConfig, tmp_path: Path, change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(replace(corpus, **change), tmp_path / "data")  # type: ignore[arg-type]
    assert not (tmp_path / "data").exists()


def test_packed_data_too_short_for_longer_sequences_are_named(corpus: DataConfig, tmp_path: Path) -> None:
    pack(corpus, tmp_path / "data")
    with pytest.raises(ValueError, match=r"the train split .* needs data\.sequence_len = 4000"):
        pack(replace(corpus, sequence_len=4000), tmp_path / "data")


def test_a_sequence_may_be_as_long_as_the_shortest_split(corpus: DataConfig, tmp_path: Path) -> None:
    summary = pack(corpus, tmp_path / "data")
    shortest = min(summary.train.tokens, summary.validation.tokens, summary.test.tokens)
    pack(replace(corpus, sequence_len=shortest), tmp_path / "data")
    with pytest.raises(ValueError, match="shorten"):
        pack(replace(corpus, sequence_len=shortest + 1), tmp_path / "data")


def test_splits_are_asked_for_by_name(corpus: DataConfig, tmp_path: Path) -> None:
    pack(corpus, tmp_path / "data")
    with pytest.raises(ValueError, match="name = 'valid': must be one of train, validation, test"):
        Split(tmp_path / "data", "valid")
    with pytest.raises(ValueError, match="holds no packed data"):
        Split(tmp_path / "corpus", "train")
    split = Split(tmp_path / "data", "train")
    with pytest.raises(ValueError, match=rf"index = {split.num_documents}: the train split has documents 0 to"):
        split.document(split.num_documents)


@pytest.mark.parametrize("name", ["train-00000.tokens", "test.offsets"])
def test_a_damaged_file_is_named(corpus: DataConfig, tmp_path: Path, name: str) -> None:
    pack(corpus, tmp_path / "data")
    path = tmp_path / "data" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{name} has \d+ bytes: meta\.json speaks of \d+; the file is damaged"):
        Split(tmp_path / "data", re.split("[-.]", name)[0])


@pytest.mark.parametrize("text", ['{"format": 3, "rules": {}, "summary": {}}', '{"format": 2, "rules": {}}', "[]", "1"])
def test_another_format_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(ValueError, match=r"meta\.json is not the description of packed data of format 2"):
        read_summary(tmp_path)
