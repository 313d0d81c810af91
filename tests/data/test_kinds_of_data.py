"""Every kind of source and of split is packed whole, in the convention of its ids, or refused by the name of the file."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vqkit.data import ByteTokenizer, DataConfig, Split, SplitSummary, pack, reading
from vqkit.data.config import IdSource, ImageSource, PathSplits, SizedSplits
from vqkit.data.events import Note
from vqkit.data.source import SPLITS

END = ByteTokenizer.END
PICTURE = ImageSource(height=3, width=2, channels=3)
PICTURES = DataConfig(sequence_len=18, source=PICTURE, splits=PathSplits("train", "", ""))


def ids_of(folder: Path, name: str = "train") -> list[int]:
    return Split(folder, name).tokens.tolist()


def packed(config: DataConfig, path: Path, folder: Path) -> dict[str, list[int]]:
    pack(replace(config, path=str(path)), folder)
    return {name: ids_of(folder, name) for name in SPLITS}


def encoded(data: bytes) -> list[int]:
    return ByteTokenizer().encode(data).tolist()


# Text


def test_a_file_is_cut_at_fixed_places_without_end_tokens(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(100)
    (tmp_path / "enwik").write_bytes(data)
    config = DataConfig(path=str(tmp_path / "enwik"), sequence_len=4, splits=SizedSplits(train=90, validation=4, test=6))
    summary = pack(config, tmp_path / "data")
    for name, content in (("train", data[:90]), ("validation", data[90:94]), ("test", data[94:])):
        assert ids_of(tmp_path / "data", name) == encoded(content)
        assert getattr(summary, name) == SplitSummary(1, len(content), len(content), len(content.split()))
        assert Split(tmp_path / "data", name).document(0) == content
    # Without end tokens 256 ids are left: one byte each.
    assert (tmp_path / "data" / "train-00000.tokens").read_bytes() == data[:90]


def test_the_sizes_are_those_of_enwik8_unless_told_otherwise() -> None:
    assert SizedSplits() == SizedSplits(train=90_000_000, validation=5_000_000, test=5_000_000)


@pytest.mark.parametrize(
    ("files", "splits", "message"),
    [
        ({"a": b"x" * 20}, SizedSplits(10, 5, 4), r"train = 10, validation = 5 and test = 4 add up to 19: must be the 20 that .*a holds"),
        ({"a": b"x" * 20, "b": b"y"}, SizedSplits(10, 5, 5), r"holds 2 files; data\.splits\.kind = 'sizes' cuts exactly one"),
        ({"train/a": b"x" * 20}, PathSplits(), r"data\.splits\.validation = 'validation': data\.path = .* there is no such file or folder"),
        (
            {"train/a": b"x" * 20, "validation/b": b""},
            PathSplits(test=""),
            r"data\.splits\.validation = .*holds no files with data .*1 empty",
        ),
        ({"train/a": b"x" * 20}, PathSplits("train", "train/a", ""), r"train/a is in two splits, train and validation"),
        ({"train/a": b"x" * 20, "v": b"yy"}, PathSplits("train", "v", ""), r"the validation split .* has 3 tokens: .* = 4; make it longer"),
    ],
)
def test_splits_that_the_files_do_not_fit_are_named(tmp_path: Path, files: dict[str, bytes], splits: Any, message: str) -> None:
    for name, content in files.items():
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        pack(DataConfig(path=str(tmp_path / "corpus"), sequence_len=4, splits=splits), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_folders_and_files_name_the_splits(tmp_path: Path) -> None:
    for name, content in {"train/2.txt": b"second", "train/1.txt": b"first", "train/x.md": b"no", "elsewhere/valid": b"other"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    splits = PathSplits("train", str(tmp_path / "elsewhere" / "valid"), "")
    config = DataConfig(include=("*.txt",), sequence_len=4, splits=splits)
    found = packed(config, tmp_path, tmp_path / "data")
    assert found == {"train": [*encoded(b"first"), END, *encoded(b"second"), END], "validation": [*encoded(b"other"), END], "test": []}


@given(st.lists(st.binary(min_size=1, max_size=12), min_size=1, max_size=6))
def test_words_are_what_stands_between_ascii_whitespace(pieces: list[bytes]) -> None:
    counts = reading.Counts()
    assert list(counts.text(pieces, lambda number: None)) == pieces
    whole = b"".join(pieces)
    assert (counts.words, counts.bytes) == (len(whole.split()), len(whole))


# Ids


@settings(max_examples=20)
@given(st.lists(st.integers(0, 9), min_size=20, max_size=60), st.sampled_from(["uint8", "uint16", "int64"]), st.booleans())
def test_ids_count_from_three_on_and_a_file_is_a_document(
    tmp_path_factory: pytest.TempPathFactory, ids: list[int], dtype: Any, as_npy: bool
) -> None:
    root = tmp_path_factory.mktemp("ids")
    path = root / ("ids.npy" if as_npy else "ids.bin")
    array = np.array(ids, dtype=dtype)
    if as_npy:
        np.save(path, array)
    else:
        path.write_bytes(array.astype(array.dtype.newbyteorder("<")).tobytes())
    source = IdSource(vocab_size=10, dtype=dtype)
    config = DataConfig(sequence_len=1, source=source, validation_fraction=0.1, test_fraction=0.2)
    assert config.vocab_size == 13
    found = packed(config, path, root / "data")
    test, validation = int(len(ids) * 0.2), int(len(ids) * 0.1)
    train = len(ids) - test - validation
    pieces = {"train": ids[:train], "validation": ids[train : train + validation], "test": ids[train + validation :]}
    assert found == {name: [*(i + 3 for i in piece), END] for name, piece in pieces.items()}
    split = Split(root / "data", "train")
    assert split.document(0).tolist() == ids[:train]
    assert (split.num_bytes, split.num_words, split.num_documents) == (0, 0, 1)
    with pytest.raises(ValueError, match="have no bytes"):
        list(split.byte_pieces())


def test_rows_of_an_array_are_documents(tmp_path: Path) -> None:
    rows = np.arange(8).reshape(4, 2)
    np.save(tmp_path / "ids.npy", rows)
    config = DataConfig(sequence_len=2, source=IdSource(vocab_size=8), validation_fraction=0.25, test_fraction=0.25)
    found = packed(config, tmp_path / "ids.npy", tmp_path / "data")
    assert found == {"train": [3, 4, END, 5, 6, END], "validation": [7, 8, END], "test": [9, 10, END]}


def test_ids_that_include_the_special_ones_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "ids.bin").write_bytes(np.array([5, 2, END, 7, END, 9, 3], dtype="<u2").tobytes())
    config = DataConfig(sequence_len=2, source=IdSource(vocab_size=10, special_ids="included"), splits=SizedSplits(7, 0, 0))
    assert config.vocab_size == 10
    assert packed(config, tmp_path / "ids.bin", tmp_path / "data")["train"] == [5, 2, END, 7, END, 9, 3]
    split = Split(tmp_path / "data", "train")
    assert [split.document(i).tolist() for i in range(split.num_documents)] == [[5, 2], [7], [9, 3]]
    assert split.offsets.tolist() == [0, 3, 5, 7]


@pytest.mark.parametrize(("different", "dtype"), [(256, "u1"), (257, "u2"), (65_536, "u2"), (65_537, "u4")])
def test_ids_take_the_fewest_bytes_that_the_vocabulary_needs(tmp_path: Path, different: int, dtype: str) -> None:
    source = IdSource(vocab_size=different - 2, dtype="int64")  # the end can occur, too, and the unknown
    ids = [0, different - 3, 1, 2]
    (tmp_path / "ids.bin").write_bytes(np.array(ids, dtype="<i8").tobytes())
    config = DataConfig(sequence_len=1, source=source, validation_fraction=0.0, test_fraction=0.0)
    assert packed(config, tmp_path / "ids.bin", tmp_path / "data")["train"] == [*(i + 3 for i in ids), END]
    assert (tmp_path / "data" / "train-00000.tokens").stat().st_size == 5 * np.dtype(dtype).itemsize


def test_wrong_ids_are_named_with_file_and_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BLOCK", 4)
    path = tmp_path / "ids.npy"
    config = DataConfig(path=str(path), sequence_len=1, source=IdSource(vocab_size=10), validation_fraction=0.0, test_fraction=0.0)
    included = replace(config, source=IdSource(vocab_size=10, special_ids="included"))
    for array, wanted, message in (
        (np.array([1, 2, 3, 4, 5, 6, 10, 3]), config, r"ids\.npy has id 10 at place 6: must be from 0 to 9, with data\.source\.vocab_size"),
        (np.array([[1, 2], [3, -1]]), config, r"ids\.npy has id -1 at row 1, place 1: must be from 0 to 9"),
        (np.array([1, 0]), included, r"ids\.npy has id 0 at place 1: must be from 1 to 9, with .*special_ids = 'included'"),
        (np.array([1.0]), config, r"ids\.npy holds float64 of 1 axes: must be integers"),
        (np.zeros((2, 2, 2), dtype=int), config, r"ids\.npy holds int64 of 3 axes"),
        (np.array(["a", None]), config, r"ids\.npy is not an array that numpy wrote, or it is damaged"),
        (np.zeros(0, dtype=int), config, r"holds no files with data \(1 empty"),
    ):
        np.save(path, array)
        with pytest.raises(ValueError, match=message):
            pack(wanted, tmp_path / "data")
        assert not (tmp_path / "data").exists()


def test_files_that_are_no_arrays_are_named(tmp_path: Path) -> None:
    config = DataConfig(sequence_len=1, source=IdSource(vocab_size=10))
    np.save(tmp_path / "whole.npy", np.arange(9))
    (tmp_path / "short.npy").write_bytes((tmp_path / "whole.npy").read_bytes()[:-5])
    (tmp_path / "rubbish.npy").write_bytes(b"\x93NUMPX rubbish")
    (tmp_path / "odd.bin").write_bytes(b"123")
    for name, message in (
        ("short.npy", r"short\.npy is not an array that numpy wrote, or it is damaged"),
        ("rubbish.npy", r"rubbish\.npy is not an array"),
        (
            "odd.bin",
            r"odd\.bin has 3 bytes: must be a multiple of 2 for numbers of data\.source\.dtype = 'uint16'; --data\.source\.dtype ",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            pack(replace(config, path=str(tmp_path / name)), tmp_path / "data")


def test_what_bare_numbers_were_taken_for_is_told(tmp_path: Path) -> None:
    config = DataConfig(sequence_len=1, source=IdSource(vocab_size=70_000), splits=PathSplits("a.bin", "", ""))
    np.array([5, 70, 3], dtype="<u4").tofile(tmp_path / "a.bin")
    for source, told in (
        (config.source, r"6 ids, the largest 70 of data.source.vocab_size = 70,000; numbers without a header were taken for uint16: "),
        (
            IdSource(70_000, "uint32"),
            r"3 ids, the largest 70 of data.source.vocab_size = 70,000; .* taken for uint32: --data.source",
        ),
    ):
        notes: list[Any] = []
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        pack(replace(config, path=str(tmp_path), source=source), folder, on_event=notes.append)
        (note,) = [event.text for event in notes if isinstance(event, Note)]
        assert re.match(told, note)
    wrong = replace(config, path=str(tmp_path), source=IdSource(60))
    with pytest.raises(ValueError, match=r"a\.bin has id 70 at place 2: .*; its numbers were taken for uint16: --data"):
        pack(wrong, tmp_path / "data")
    np.save(tmp_path / "b.npy", np.arange(9))
    notes = []
    pack(replace(config, path=str(tmp_path), splits=PathSplits("b.npy", "", "")), tmp_path / "data", on_event=notes.append)
    assert notes[-1] == Note("9 ids, the largest 8 of data.source.vocab_size = 70,000")  # which such a file says itself


# Images


def pictures(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, size=(number, 3, 2, 3), dtype=np.uint8)


def test_images_of_files_and_arrays_are_rows_of_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BLOCK", 40)  # two images
    images = pictures(7)
    (tmp_path / "corpus" / "train").mkdir(parents=True)
    np.save(tmp_path / "corpus" / "train" / "a.npy", images[:5])
    Image.fromarray(images[5]).save(tmp_path / "corpus" / "train" / "b.png")
    transparent = np.concatenate([images[6], np.full((3, 2, 1), 9, dtype=np.uint8)], axis=-1)
    Image.fromarray(transparent).save(tmp_path / "corpus" / "train" / "c.png")
    summary = pack(replace(PICTURES, path=str(tmp_path / "corpus")), tmp_path / "data")
    split = Split(tmp_path / "data", "train")
    assert split.tokens.tolist() == (images.astype(int) + 3).reshape(-1).tolist()
    assert summary.train == SplitSummary(7, 7 * 18, 7 * 18)
    assert np.array_equal(np.stack([split.document(i) for i in range(7)]), images)
    assert (split.document_len, split.offsets.tolist()) == (18, [18 * i for i in range(8)])
    # One byte each on the disk, no offsets.
    assert (tmp_path / "data" / "train-00000.tokens").read_bytes() == images.tobytes()
    assert not (tmp_path / "data" / "train.offsets").exists()


def test_grey_images_have_one_channel(tmp_path: Path) -> None:
    images = pictures(4)[..., 0]
    np.save(tmp_path / "grey.npy", images)
    config = DataConfig(sequence_len=6, source=ImageSource(height=3, width=2, channels=1))
    found = packed(replace(config, splits=SizedSplits(2, 1, 1)), tmp_path / "grey.npy", tmp_path / "data")
    assert [len(ids) for ids in found.values()] == [12, 6, 6]
    assert found["train"] == (images[:2].astype(int) + 3).reshape(-1).tolist()
    Image.fromarray(images[0]).save(tmp_path / "one.png")
    Image.fromarray(np.repeat(images[1][..., None], 3, axis=-1)).save(tmp_path / "rgb.png")
    for i, name in enumerate(("one.png", "rgb.png")):
        one = replace(config, splits=PathSplits(name, "", ""))
        assert packed(one, tmp_path, tmp_path / f"data of {name}")["train"] == (images[i].astype(int) + 3).reshape(-1).tolist()


def test_wrong_images_are_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3, 2, 3), dtype=np.uint8)
    Image.fromarray(np.concatenate([noise, noise])).save(tmp_path / "tall.png")
    Image.fromarray(noise).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) - 30])
    (tmp_path / "text.png").write_bytes(b"no image at all")
    Image.fromarray(np.zeros((3, 2), dtype=np.uint16)).save(tmp_path / "deep.png")
    np.save(tmp_path / "float.npy", np.zeros((4, 3, 2, 3)))
    np.save(tmp_path / "turned.npy", np.zeros((4, 3, 3, 2), dtype=np.uint8))
    for name, message in (
        ("tall.png", r"tall\.png is an image of 6 by 2 \(height by width\): must be 3 by 2"),
        ("cut.png", r"cut\.png is not an image, or it is damaged"),
        ("text.png", r"text\.png is not an image, or it is damaged: cannot identify"),
        ("deep.png", r"deep\.png is an image of mode I;16: must have 8 bits a channel"),
        ("float.npy", r"float\.npy holds float64 of shape \(4, 3, 2, 3\): must be uint8 of shape \[N, 3, 2, 3\]"),
        ("turned.npy", r"turned\.npy holds uint8 of shape \(4, 3, 3, 2\): must be"),
    ):
        with pytest.raises(ValueError, match=message):
            pack(replace(PICTURES, path=str(tmp_path), splits=PathSplits(name, "", "")), tmp_path / "data")
        assert not (tmp_path / "data").exists()
