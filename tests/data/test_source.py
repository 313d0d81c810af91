"""Which files are found, and that their split depends on names, sizes and contents alone."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqkit.data import DataConfig
from vqkit.data.source import (
    SPLITS,
    Document,
    SourceFile,
    corpus_hash,
    hash_fraction,
    list_files,
    new_digest,
    read_documents,
    split_documents,
)

names = st.lists(st.text("abcdef/.", min_size=1, max_size=8), min_size=2, max_size=60, unique=True)
configs = st.builds(
    DataConfig,
    validation_fraction=st.sampled_from([0.0, 0.05, 0.3]),
    test_fraction=st.sampled_from([0.0, 0.05, 0.3]),
    max_validation_bytes=st.sampled_from([0, 1, 20, 100]),
    max_test_bytes=st.sampled_from([0, 1, 20, 100]),
)


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def found(root: Path, **options: object) -> list[str]:
    return [file.name for file in list_files(DataConfig(path=str(root), **options)).files]  # type: ignore[arg-type]


def sized(names: list[str]) -> list[SourceFile]:
    return [SourceFile(name, Path(name), 1 + len(name) * 3) for name in names]


def split_of(documents: list[Document]) -> dict[str, str]:
    return {document.file.name: document.split for document in documents}


def test_files_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    write(tmp_path, dict.fromkeys(("b.py", "a/z.py", "a/b/c.txt", "a.py", "B.py"), b"x"))
    assert found(tmp_path) == ["B.py", "a.py", "a/b/c.txt", "a/z.py", "b.py"]
    assert found(tmp_path, include=("*.py",)) == ["B.py", "a.py", "a/z.py", "b.py"]
    assert found(tmp_path, include=("a/*.txt", "b*")) == ["a/b/c.txt", "b.py"]
    assert found(tmp_path, exclude=("a", "B.*")) == ["a.py", "b.py"]
    assert found(tmp_path, exclude=("b",)) == ["B.py", "a.py", "a/z.py", "b.py"]


def test_empty_and_short_files_are_skipped_and_counted(tmp_path: Path) -> None:
    write(tmp_path, {"a": b"", "b": b"12", "c": b"123", "d/e": b""})
    every, longer = (list_files(DataConfig(path=str(tmp_path), min_file_bytes=least)) for least in (1, 3))
    assert ([file.name for file in every.files], every.empty_files, every.short_files) == (["b", "c"], 2, 0)
    assert ([file.name for file in longer.files], longer.empty_files, longer.short_files) == (["c"], 2, 1)


def test_links_are_followed_once_and_circles_end(tmp_path: Path) -> None:
    write(tmp_path / "corpus", {"a/one": b"1", "b/two": b"2"})
    write(tmp_path / "elsewhere", {"three": b"3"})
    for link, target in {"a/up": "corpus", "b/away": "elsewhere", "c": "corpus/a", "other": "corpus/b/two", "e": "corpus/e"}.items():
        (tmp_path / "corpus" / link).symlink_to(tmp_path / target)
    by_name = list_files(DataConfig(path=str(tmp_path / "corpus"), include=("*o*", "*thr*"))).files
    assert sorted(file.path.read_bytes() for file in by_name) == [b"1", b"2", b"3"]


def test_what_is_no_file_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path, {"a": b"1"})
    os.mkfifo(tmp_path / "pipe")
    sources = list_files(DataConfig(path=str(tmp_path)))
    assert ([file.name for file in sources.files], sources.empty_files) == (["a"], 0)


@pytest.mark.parametrize("kind", ["link", "permission", "folder"])
def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    write(tmp_path, {"good": b"1", "bad/file": b"2"})
    if kind == "link":
        (tmp_path / "bad" / "gone").symlink_to(tmp_path / "nowhere")
    else:
        # The super-user may read everything, so the refusal is staged.
        target, name = (os, "scandir") if kind == "folder" else (__import__("builtins"), "open")
        original = getattr(target, name)

        def refuse(path: os.PathLike[str], *rest: object) -> object:
            if "bad" in Path(path).name or "bad/file" in str(path):
                raise PermissionError(13, "Permission denied", str(path))
            return original(path, *rest)

        monkeypatch.setattr(target, name, refuse)
    where = {"link": "bad/gone: No such file", "permission": "bad/file: Permission denied", "folder": "bad: Permission denied"}[kind]
    config = DataConfig(path=str(tmp_path))
    with pytest.raises(OSError, match=f"^cannot read {tmp_path}/{where}"):
        corpus_hash(split_documents(list_files(config).files, config))


@pytest.mark.parametrize("change", [b"", b"12", b"12345"])
def test_a_file_that_changes_while_it_is_read_is_named(tmp_path: Path, change: bytes) -> None:
    write(tmp_path, {"a": b"123", "b": b"456"})
    config = DataConfig(path=str(tmp_path))
    documents = split_documents(list_files(config).files, config)
    (tmp_path / "b").write_bytes(change)
    with pytest.raises(OSError, match=f"{tmp_path}/b changed while it was being read: it held 3 bytes"):
        corpus_hash(documents)


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({}, {"path": ""}, r"data\.path is empty: name a file or a folder with --data\.path"),
        ({}, {"path": "missing"}, r"data\.path = '.*missing': there is no such file or folder"),
        ({}, {}, r"holds no files with data that match data\.include = \['\*'\]; at least one is needed"),
        ({"a.txt": b"1"}, {"include": ("*.py",)}, r"no files with data that match data\.include = \['\*\.py'\]; at least one"),
        ({"a": b"", "b": b"1"}, {"min_file_bytes": 2}, r"\(1 empty, 1 below data\.min_file_bytes = 2\); at least one is needed"),
        ({"a": b""}, {"path": "a"}, r"holds no files with data \(1 empty, 0 below"),
    ],
)
def test_a_corpus_without_files_says_why(tmp_path: Path, files: dict[str, bytes], options: dict[str, object], message: str) -> None:
    write(tmp_path, files)
    path = options.pop("path", ".")
    config = DataConfig(path=str(tmp_path / str(path)) if path else "", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message) as caught:
        list_files(config)
    assert "\n" not in str(caught.value)


@given(names, configs, st.randoms())
def test_every_byte_is_in_one_split_whatever_the_order_of_the_files(names: list[str], config: DataConfig, order: random.Random) -> None:
    files = sized(names)
    documents = split_documents(files, config)
    assert {d.split for d in documents} <= set(SPLITS)
    for file, parts in zip(files, ([d for d in documents if d.file == file] for file in files), strict=True):
        assert [parts[0].start, *(d.stop for d in parts)] == [0, *(d.start for d in parts[1:]), file.size]
        assert len(parts) == 1 or [d.split for d in parts] == [split for split in SPLITS if split in {d.split for d in parts}]
    shuffled = order.sample(files, len(files))
    assert {*split_documents(shuffled, config)} == {*documents}


@given(names, configs)
def test_files_are_whole_where_one_fits_the_limit_of_each_split(names: list[str], config: DataConfig) -> None:
    files = sized(names)
    documents = split_documents(files, config)
    cut = {d.file for d in documents if d.start}
    assert not cut or max(file.size for file in cut) == max(d.file.size for d in documents if d.split == "train")
    for split in {d.split for d in documents if d.start}:
        limit = getattr(config, f"max_{split}_bytes")
        assert limit < min(d.file.size for d in documents if d.split == "train")


def test_a_folder_of_long_files_has_all_splits() -> None:
    files = [SourceFile(name, Path(name), 1_100_000 + number) for number, name in enumerate("abc")]
    config = DataConfig(validation_fraction=0.05, test_fraction=0.05, max_validation_bytes=262_144, max_test_bytes=262_144)
    documents = split_documents(files, config)
    assert [(d.split, d.file.name, d.size) for d in documents] == [
        ("train", "a", 1_100_000),
        ("train", "b", 1_100_001),
        ("train", "c", 1_100_002 - 2 * 165_000),
        ("validation", "c", 165_000),
        ("test", "c", 165_000),
    ]


@given(names, configs)
def test_files_go_where_their_hash_says_and_limits_are_kept(names: list[str], config: DataConfig) -> None:
    files = sized(names)
    documents = split_documents(files, config)
    for split, limit in (("validation", config.max_validation_bytes), ("test", config.max_test_bytes)):
        chosen = [d for d in documents if d.split == split]
        assert not limit or sum(d.size for d in chosen) <= limit
        fraction = getattr(config, f"{split}_fraction")
        assert not (chosen and fraction == 0.0)
        low = 0.0 if split == "test" else config.test_fraction
        inside = [d for d in chosen if low <= hash_fraction(d.file.name) < low + fraction]
        assert inside == chosen or len(chosen) == 1
        if not limit and fraction and split == "test":
            assert chosen and len(chosen) >= sum(hash_fraction(name) < fraction for name in names)


@given(names, st.data())
def test_another_file_moves_none_of_the_others(names: list[str], data: st.DataObject) -> None:
    config = DataConfig(validation_fraction=0.3, test_fraction=0.3)
    files = sized(names)
    # The files of lowest hash stand in for empty splits; with files in both, each file is on its own.
    fixed = sized([next(name for name in map(str, range(100)) if low <= hash_fraction(name) < low + 0.3) for low in (0.0, 0.3)])
    kept = data.draw(st.lists(st.sampled_from(files), unique=True))
    whole, part = split_of(split_documents(files + fixed, config)), split_of(split_documents(kept + fixed, config))
    assert part.items() <= whole.items()


def test_the_shares_of_many_files_are_those_asked_for() -> None:
    config = DataConfig(validation_fraction=0.1, test_fraction=0.2)
    splits = list(split_of(split_documents(sized([f"folder/{i}.txt" for i in range(5000)]), config)).values())
    assert splits.count("test") / 5000 == pytest.approx(0.2, abs=0.02)
    assert splits.count("validation") / 5000 == pytest.approx(0.1, abs=0.02)


def test_three_files_suffice_for_three_splits() -> None:
    for names in (["a", "b", "c"], ["x/1", "x/2", "x/3"], ["p.txt", "q.txt", "r.txt"]):
        assert sorted(split_of(split_documents(sized(names), DataConfig())).values()) == sorted(SPLITS)


@given(st.integers(1, 500), configs)
def test_a_single_file_is_split_by_position(size: int, config: DataConfig) -> None:
    file = SourceFile("one", Path("one"), size)
    documents = split_documents([file], config)
    assert [d.split for d in documents] == [split for split in SPLITS if split in {d.split for d in documents}]
    assert [d.start for d in documents] == [0, *(d.stop for d in documents[:-1])]
    assert documents[-1].stop == size and all(d.size > 0 for d in documents)
    for split, limit in (("validation", config.max_validation_bytes), ("test", config.max_test_bytes)):
        wanted = int(size * getattr(config, f"{split}_fraction"))
        assert sum(d.size for d in documents if d.split == split) == (min(wanted, limit) if limit else wanted)


def test_hash_and_split_do_not_depend_on_place_process_or_time(tmp_path: Path) -> None:
    content = {f"d{i % 7}/file {i}": os.urandom(i + 1) for i in range(40)}
    here = write(tmp_path / "here", content)
    there = write(tmp_path / "deep" / "there", dict(reversed(content.items())))
    program = (
        "import sys; from vqkit.data import DataConfig; from vqkit.data.source import *\n"
        "config = DataConfig(path=sys.argv[1], validation_fraction=0.2, test_fraction=0.2)\n"
        "documents = split_documents(list_files(config).files, config)\n"
        "print(corpus_hash(documents), [(d.split, d.file.name) for d in documents])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program, str(path)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for path, seed in ((here, "1"), (there, "2"))
    }
    assert len(outputs) == 1


def test_the_hash_is_of_names_and_contents(tmp_path: Path) -> None:
    def digest(files: dict[str, bytes], **options: float) -> str:
        root = tmp_path / "corpus"
        shutil.rmtree(root, ignore_errors=True)
        config = replace(DataConfig(path=str(write(root, files))), **options)  # type: ignore[arg-type]
        return corpus_hash(split_documents(list_files(config).files, config))

    base = {"a": b"12", "b": b"34"}
    assert digest(base) == digest(base, validation_fraction=0.5) == digest({**base, "empty": b""})
    others = [{"a": b"12", "c": b"34"}, {"a": b"12", "b": b"35"}, {"a": b"123", "b": b"4"}, {"a": b"12"}, {"a": b"34", "b": b"12"}]
    assert len({digest(files) for files in [base, *others]}) == 6


@given(st.binary(min_size=1, max_size=200), configs)
def test_the_hash_of_a_single_file_does_not_depend_on_its_split(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, config: DataConfig
) -> None:
    path = tmp_path_factory.getbasetemp() / "single file"
    path.write_bytes(data)
    config = replace(config, path=str(path))
    documents = split_documents(list_files(config).files, config)
    whole = [Document("train", documents[0].file, 0, len(data))]
    assert corpus_hash(documents) == corpus_hash(whole)
    assert b"".join(b"".join(pieces) for _, pieces in read_documents(documents, new_digest())) == data
