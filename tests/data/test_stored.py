"""Packed data are read across shards, taken over as they are, and every change of theirs or of their files is named."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqkit.data import ByteTokenizer, DataConfig, Split, SplitSummary, find_defects, is_packed, pack, packing, read_rules, read_summary
from vqkit.data.config import ImageSource, SizedSplits
from vqkit.data.events import Checking, DataEvent, Packing
from vqkit.data.source import find_documents, list_files
from vqkit.data.stored import StoredIds

SPLITS = ("train", "validation", "test")


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    for i in range(20):
        path = tmp_path / "corpus" / f"{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(np.random.default_rng(i).bytes(10 + i))
        os.utime(path, (1_600_000_000, 1_600_000_000))
    return DataConfig(path=str(tmp_path / "corpus"), sequence_len=8, validation_fraction=0.2, test_fraction=0.2)


def tokens(folder: Path) -> dict[str, list[int]]:
    return {name: Split(folder, name).tokens.tolist() for name in SPLITS}


# Shards


@given(st.lists(st.integers(0, 5), min_size=0, max_size=6), st.integers(-3, 30), st.integers(-3, 30))
def test_ids_are_one_row_whatever_shards_they_lie_in(lengths: list[int], start: int, stop: int) -> None:
    shards = [np.arange(sum(lengths[:i]), sum(lengths[: i + 1]), dtype=np.uint8) for i in range(len(lengths))]
    ids = StoredIds(shards, first_id=3)
    whole = [i + 3 for i in range(sum(lengths))]
    assert ids[start:stop].dtype == np.int64
    assert (len(ids), ids.tolist(), ids[start:stop].tolist(), ids[:].tolist()) == (len(whole), whole, whole[start:stop], whole)


def test_large_data_lie_in_several_files(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(config, tmp_path / "one")
    monkeypatch.setattr(packing, "SHARD_BYTES", 20)  # ten ids
    summary = pack(config, tmp_path / "many")
    files = sorted((tmp_path / "many").glob("train-*.tokens"))
    assert len(files) == -(-summary.train.tokens // 10) > 3
    assert {file.stat().st_size for file in files[:-1]} == {20}
    assert b"".join(file.read_bytes() for file in files) == (tmp_path / "one" / "train-00000.tokens").read_bytes()
    assert tokens(tmp_path / "many") == tokens(tmp_path / "one")
    split = Split(tmp_path / "many", "train")
    assert split.document(3) == Split(tmp_path / "one", "train").document(3)
    assert find_defects(tmp_path / "many") == []


def test_progress_is_told_to_the_end(config: DataConfig, tmp_path: Path) -> None:
    events: list[DataEvent] = []
    summary = pack(config, tmp_path / "data", on_event=events.append)
    progress = [event for event in events if isinstance(event, Packing)]
    assert [event.done for event in progress] == sorted({event.done for event in progress})
    assert progress[-1] == Packing(summary.total.bytes, summary.total.bytes)
    events.clear()
    pack(config, tmp_path / "data", on_event=events.append)
    assert events == [event for event in events if isinstance(event, Checking)]
    assert events[-1] == Checking(events[-1].total, sum(path.stat().st_size for path in (tmp_path / "data").glob("*[!n]")))


# Damage


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["train-00000.tokens", "validation.offsets", "files.jsonl"])
def test_a_changed_byte_is_found_and_named(config: DataConfig, tmp_path: Path, name: str) -> None:
    pack(config, tmp_path / "data")
    assert find_defects(tmp_path / "data") == []
    damage(tmp_path / "data" / name)
    assert find_defects(tmp_path / "data") == [f"{tmp_path / 'data' / name} is damaged: its content is not what was written"]
    (tmp_path / "data" / name).unlink()
    assert find_defects(tmp_path / "data") == [f"{tmp_path / 'data' / name} is missing"]


def test_a_foreign_tokenizer_is_found(config: DataConfig, tmp_path: Path) -> None:
    pack(config, tmp_path / "data")
    path = tmp_path / "data" / "tokenizer.json"
    entries = json.loads(path.read_text())
    for change, message in (
        ({"kind": "ids", "options": {"num_ids": 9, "shift": 3}}, "speaks of another tokenizer"),
        ({"kind": "words"}, "kind = 'words': must be bytes, ids, images or sentencepiece"),
        ({"options": {"size": 3}}, "wrong options of a tokenizer of kind 'bytes'"),
        ({"format": 7}, "is not the description of a tokenizer of format 1"),
    ):
        path.write_text(json.dumps(entries | change))
        (defect,) = find_defects(tmp_path / "data")
        assert message in defect
        with pytest.raises(ValueError, match=message):
            Split(tmp_path / "data", "train")
    path.unlink()
    assert find_defects(tmp_path / "data") == [f"{tmp_path / 'data'} holds no tokenizer: there is no tokenizer.json in it"]


# Files that change


def change_content(corpus: Path) -> str:
    damage(corpus / "3.txt")
    return r"3\.txt changed \(its content has another hash\); use another folder"


def change_length(corpus: Path) -> str:
    (corpus / "3.txt").write_bytes(b"short")
    return r"3\.txt changed \(it had 13 bytes and has 5\); use"


def add(corpus: Path) -> str:
    (corpus / "new.txt").write_bytes(b"new")
    return r"new\.txt is new; use"


def remove(corpus: Path) -> str:
    (corpus / "3.txt").unlink()
    (corpus / "4.txt").unlink()
    return r"3\.txt is gone and 1 more; use"


@pytest.mark.parametrize("change", [change_content, change_length, add, remove])
def test_a_file_that_changed_since_is_named(config: DataConfig, tmp_path: Path, change: Any) -> None:
    pack(config, tmp_path / "data")
    message = change(tmp_path / "corpus")
    with pytest.raises(ValueError, match=rf"data was packed from other data than data\.path = .* holds now: .*{message}"):
        pack(config, tmp_path / "data")


def test_files_are_read_again_only_where_their_time_changed(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = pack(config, tmp_path / "data")
    read: list[str] = []
    monkeypatch.setattr(packing, "_hash_of", lambda file: read.append(file.name))
    assert pack(config, tmp_path / "data") == summary
    assert read == []
    os.utime(tmp_path / "corpus" / "3.txt")
    with pytest.raises(ValueError, match=r"3\.txt changed"):
        pack(config, tmp_path / "data")
    assert read == ["3.txt"]


def test_a_file_that_was_new_when_it_was_packed_is_read_again(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.utime(tmp_path / "corpus" / "3.txt")  # now: it might change within the same tick of the clock
    pack(config, tmp_path / "data")
    stamp = (tmp_path / "corpus" / "3.txt").stat()
    damage(tmp_path / "corpus" / "3.txt")
    os.utime(tmp_path / "corpus" / "3.txt", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with pytest.raises(ValueError, match=r"3\.txt changed \(its content"):
        pack(config, tmp_path / "data")


# Packed data as a source


def test_packed_data_are_taken_over_by_a_run(config: DataConfig, tmp_path: Path) -> None:
    summary = pack(config, tmp_path / "prepared")
    shutil.rmtree(tmp_path / "corpus")
    taken = replace(config, path=str(tmp_path / "prepared"))
    assert is_packed(tmp_path / "prepared") and not is_packed(tmp_path)
    assert pack(taken, tmp_path / "run" / "data") == summary
    assert tokens(tmp_path / "run" / "data") == tokens(tmp_path / "prepared")
    shard = "train-00000.tokens"
    assert os.path.samefile(tmp_path / "prepared" / shard, tmp_path / "run" / "data" / shard), "the data were copied"
    assert pack(taken, tmp_path / "run" / "data") == summary
    with pytest.raises(ValueError, match=r"prepared was packed with data\.test_fraction = 0\.2, not 0\.3"):
        pack(replace(taken, test_fraction=0.3), tmp_path / "other")
    with pytest.raises(ValueError, match=r"data\.sequence_len = 5000"):
        pack(replace(taken, sequence_len=5000), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_run_notices_that_the_prepared_data_are_others(config: DataConfig, tmp_path: Path) -> None:
    pack(config, tmp_path / "prepared")
    taken = replace(config, path=str(tmp_path / "prepared"))
    pack(taken, tmp_path / "data")
    shutil.rmtree(tmp_path / "prepared")
    (tmp_path / "corpus" / "3.txt").write_bytes(b"other")
    pack(config, tmp_path / "prepared")
    with pytest.raises(ValueError, match=r"was packed from other data .*it was packed from other files \(hash [0-9a-f]{32}, not"):
        pack(taken, tmp_path / "data")


def test_damaged_prepared_data_are_not_taken_over(config: DataConfig, tmp_path: Path) -> None:
    pack(config, tmp_path / "prepared")
    for name, change, message in (
        ("test-00000.tokens", lambda path: path.write_bytes(b""), r"test-00000\.tokens has 0 bytes"),
        ("train-00000.tokens", damage, r"prepared/train-00000\.tokens is damaged: its content is not what was written; put it back"),
        ("meta.json", lambda path: path.write_text(path.read_text().replace('"files": 20', '"files": 21')), r"meta\.json is damaged"),
        ("meta.json", lambda path: path.write_text("{"), r"meta\.json is not JSON"),
    ):
        shutil.copytree(tmp_path / "prepared", tmp_path / "copy")
        change(tmp_path / "copy" / name)
        assert is_packed(tmp_path / "copy")  # hence never read as text
        with pytest.raises(ValueError, match=message.replace("prepared", "copy")):
            pack(replace(config, path=str(tmp_path / "copy")), tmp_path / "data")
        with pytest.raises(ValueError, match=message.replace("prepared", "copy")):
            pack(config, tmp_path / "copy")
        assert not (tmp_path / "data").exists()
        shutil.rmtree(tmp_path / "copy")


def test_the_rules_of_packed_data_come_back(config: DataConfig, tmp_path: Path) -> None:
    pack(config, tmp_path / "data")
    assert replace(read_rules(tmp_path / "data"), path=config.path, sequence_len=8) == config
    np.save(tmp_path / "images.npy", np.zeros((5, 2, 2, 3), dtype=np.uint8))
    images = DataConfig(path=str(tmp_path / "images.npy"), sequence_len=12, source=ImageSource(2, 2, 3), splits=SizedSplits(3, 1, 1))
    pack(images, tmp_path / "pictures")
    assert replace(read_rules(tmp_path / "pictures"), path=images.path) == images


# The format before this one


def test_data_of_the_first_format_are_still_read_and_checked(config: DataConfig, tmp_path: Path) -> None:
    """Bytes and ends as uint16, one file a split, rules without kinds."""
    summary = pack(config, tmp_path / "new")
    folder = tmp_path / "old"
    folder.mkdir()
    entries: dict[str, Any] = {}
    for name in SPLITS:
        split = Split(tmp_path / "new", name)
        (folder / f"{name}.tokens").write_bytes(split.tokens.astype("<u2").tobytes())
        (folder / f"{name}.offsets").write_bytes(np.asarray(split.offsets).astype("<i8").tobytes())
        entries[name] = {"documents": split.num_documents, "bytes": split.num_bytes, "tokens": split.num_tokens}
    counts = {"path": config.path, "corpus_hash": summary.corpus_hash, "files": 20, "empty_files": 0, "short_files": 0}
    names = ("min_file_bytes", "validation_fraction", "test_fraction", "max_validation_bytes", "max_test_bytes")
    rules = {"include": ["*"], "exclude": list(config.exclude), **{name: getattr(config, name) for name in names}}
    (folder / "meta.json").write_text(json.dumps({"format": 1, "rules": rules, "summary": {**counts, **entries}}))
    assert tokens(folder) == tokens(tmp_path / "new")
    assert Split(folder, "train").tokenizer.kind == ByteTokenizer.kind
    assert pack(config, folder) == read_summary(folder)
    assert read_summary(folder).train == SplitSummary(**entries["train"])
    (tmp_path / "corpus" / "3.txt").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"old was packed from other data .*hash [0-9a-f]{32}, not [0-9a-f]{32}"):
        pack(config, folder)


def test_a_corpus_has_the_hash_that_it_always_had(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12")
    (tmp_path / "b").write_bytes(b"345")
    config = DataConfig(path=str(tmp_path), sequence_len=1, validation_fraction=0.0, test_fraction=0.0)
    assert pack(config, tmp_path / "data").corpus_hash == "0e7e1d112865056e9c71ae768911f7d8"
    assert find_documents(replace(config, exclude=("data",)))[0] == list_files(replace(config, exclude=("data",)))
