"""`vqkit data`: what it fetches, packs and finds, and the words that it refuses."""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from local_server import Server, serve
from vqkit.cli import data as command
from vqkit.cli import main
from vqkit.cli.data_view import DataView
from vqkit.cli.errors import UsageError
from vqkit.cli.options import parse
from vqkit.cli.train import requested
from vqkit.data import DataConfig, Split, read_summary
from vqkit.data.config import IdSource, PathSplits, SentencePieceTokens, SizedSplits
from vqkit.data.events import Downloading, Note, Packing
from vqkit.data.published import HOMES, RemoteFile, ZippedFile, enwik8

CONTENT = b"some text of a wiki, " * 100


@dataclass
class Said:
    """What one call said."""

    code: int
    out: str
    err: str


@pytest.fixture
def vqkit(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    monkeypatch.chdir(tmp_path)

    def call(*words: str | Path) -> Said:
        code = main([str(word) for word in words])
        return Said(code, *capsys.readouterr())

    return call


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    for i in range(12):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"word{i} and more words\n" * (20 + i))
    return tmp_path / "texts"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Where enwik8, or what goes for it, has its home."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("enwik8", CONTENT)

    def digest(data: bytes) -> str:
        return f"sha256:{hashlib.sha256(data).hexdigest()}"

    with serve() as server:
        server.files["/e.zip"] = out.getvalue()
        archive_file = RemoteFile("e.zip", f"{server.url}/e.zip", len(out.getvalue()), digest(out.getvalue()))
        monkeypatch.setitem(command.PUBLISHED, "enwik8", small_enwik8)
        monkeypatch.setitem(HOMES, "enwik8", ZippedFile(archive_file, "enwik8", len(CONTENT), digest(CONTENT)))
        yield server


def small_enwik8(path: str = "data/enwik8/enwik8") -> DataConfig:
    return replace(enwik8(path), sequence_len=64, splits=SizedSplits(1900, 100, 100))


def test_a_data_set_is_fetched_prepared_and_checked(vqkit: Callable[..., Said], server: Server, tmp_path: Path) -> None:
    missing = vqkit("data", "prepare", "enwik8")
    assert (missing.code, missing.err.partition(": vqkit data")[0]) == (1, f"vqkit: enwik8 is not at {tmp_path}/data/enwik8/enwik8")
    assert "vqkit data prepare enwik8" in vqkit("data", "download", "enwik8").out
    assert (tmp_path / "data" / "enwik8" / "enwik8").read_bytes() == CONTENT
    assert vqkit("data", "download", "enwik8").code == 0
    assert len(server.asked) == 1
    assert vqkit("data", "check", "enwik8").out.endswith("data/enwik8: every file is what was fetched\n")
    prepared = vqkit("data", "prepare", "enwik8")
    assert prepared.code == 0, prepared.err
    assert re.search(r"^train +1 +1,900 +1,900 +\d+$", prepared.out, re.MULTILINE)
    assert Split(tmp_path / "packed" / "enwik8", "test").document(0) == CONTENT[2000:]
    (tmp_path / "data" / "enwik8" / "enwik8").write_bytes(CONTENT[:-1] + b"!")
    changed = vqkit("data", "check", "enwik8")
    assert changed.code == 1 and re.match(r"vqkit: \S+/enwik8: its sha256 is", changed.err)


def test_without_a_network_it_says_what_to_put_where(vqkit: Callable[..., Said], server: Server, tmp_path: Path) -> None:
    server.files.clear()
    said = vqkit("data", "download", "enwik8", "--to", "here")
    assert (said.code, said.out) == (1, "")
    assert said.err == f"vqkit: {server.url}/e.zip answers 404 Not Found; fetch it elsewhere and put it at here/e.zip\n"


def test_texts_are_prepared_with_words_for_tokens_and_taken_by_a_run(vqkit: Callable[..., Said], texts: Path, tmp_path: Path) -> None:
    words = ["--data.tokenizer.kind", "sentencepiece", "--data.tokenizer.vocab-size", "290", "--data.test-fraction", "0.2"]
    said = vqkit("data", "prepare", texts, "--to", "packed/t", *words)
    assert said.code == 0, said.err
    assert "learning a vocabulary of 290" in said.out
    assert "vocabulary: sentencepiece, 290 ids, hash " + read_summary(tmp_path / "packed" / "t").tokenizer_hash in said.out
    assert vqkit("data", "prepare", texts, "--to", "packed/t", *words).code == 0
    checked = vqkit("data", "check", "packed/t")
    assert checked.code == 0 and "documents  tokens" in checked.out
    assert vqkit("data", "check", "packed/t", "--data.test-fraction=0.3").code == 2
    elsewhere = vqkit("data", "prepare", texts, "--to", "packed", *words)
    assert elsewhere.code == 1 and "packed holds something else than packed data: --to must name a new folder" in elsewhere.err
    for form in (["--data.path", "packed/t"], ["--data.path=packed/t"]):
        _, config = requested("text", [*form, "--data.segments", "ignore", "--model.vocab-size", "290"])
        assert config.data.tokenizer == SentencePieceTokens(vocab_size=290)
        assert (config.data.test_fraction, config.data.max_test_bytes) == (0.2, 0)
        assert (config.data.path, config.data.segments, config.data.sequence_len) == (str(tmp_path / "packed" / "t"), "ignore", 512)
    (tmp_path / "my.toml").write_text("[data]\ntest_fraction = 0.3\n")
    with pytest.raises(UsageError, match=r"my\.toml: data\.test_fraction = 0\.3: these data are packed with 0\.2; leave it out"):
        requested("text", ["--file", "my.toml", "--data.path", "packed/t"])
    (tmp_path / "my.toml").write_text('[data]\ntest_fraction = 0.2\npath = "packed/t"\nsegments = "ignore"\n')
    assert requested("text", ["--file", "my.toml"])[1].data == config.data
    shard = tmp_path / "packed" / "t" / "train-00000.tokens"
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    damaged = vqkit("data", "check", "packed/t")
    assert (damaged.code, damaged.err) == (1, f"vqkit: {shard} is damaged: its content is not what was written\n")
    (texts / "3.txt").write_text("changed")
    changed = vqkit("data", "prepare", texts, "--to", "packed/t", *words)
    assert changed.code == 1 and f"{texts}/3.txt changed" in changed.err


def test_ids_are_prepared(vqkit: Callable[..., Said], tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(100) % 7)
    words = "--data.source.kind ids --data.source.vocab-size 7 --data.splits.kind=sizes --data.splits.train 80"
    said = vqkit("data", "prepare", "ids.npy", *words.split(), "--data.splits.validation", "10", "--data.splits.test", "10")
    assert said.code == 0, said.err
    assert re.search(r"^train +1 +80 +0 +0$", said.out, re.MULTILINE)
    _, config = requested("text", ["--data.path", "packed/ids"])
    assert config.data.source == IdSource(vocab_size=7)


def test_what_is_not_packed_yet_is_looked_through(vqkit: Callable[..., Said], texts: Path) -> None:
    said = vqkit("data", "check", texts, "--data.include", "1*.txt", "--data.test-fraction", "0.3")
    assert said.code == 0, said.err
    assert said.out.startswith(f"{texts}: 3 files to read, not packed yet; skipped: 0 empty, 0 below")
    assert re.search(r"^train +\d +\d+$", said.out, re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("", 2, "data: what is to be done? One of download, prepare, check"),
        ("fetch", 2, "unknown command data 'fetch'; there are download, prepare, check"),
        ("chekc x", 2, "unknown command data 'chekc'; did you mean check?"),
        ("download", 2, "missing: "),
        ("download pg19 --parts tset", 2, "--parts: must be train or validation or test, not 'tset'"),
        ("download enwik9", 2, "unknown data set 'enwik9'; did you mean enwik8?"),
        ("prepare", 2, "missing: a file or folder, or one of enwik8, pg19, imagenet64"),
        ("prepare --to x enwik8", 2, "'enwik8' must come first: vqkit data prepare enwik8"),
        ("prepare x --data.sorce.kind ids", 2, "unknown option --data.sorce.kind; did you mean --data.source.kind?"),
        ("prepare nowhere --data.source.kind images", 1, "nowhere': there is no such file or folder"),
        ("prepare x --data.source.kind images --data.sequence-len 1", 2, "data.sequence_len = 1: must be the 12288 bytes of an image"),
        ("prepare nowhere", 1, "nowhere': there is no such file or folder"),
        ("check pg19", 1, "pg19 is not at "),
        ("check nowhere", 1, "nowhere': there is no such file or folder"),
    ],
)
def test_words_that_make_no_sense_are_refused_in_one_line(vqkit: Callable[..., Said], words: str, code: int, message: str) -> None:
    said = vqkit("data", *words.split())
    assert (said.code, said.out, said.err.count("\n")) == (code, "", 1)
    assert message in said.err


def test_choosing_the_kind_that_is_chosen_changes_nothing() -> None:
    default = command.PrepareOptions(data=DataConfig(splits=SizedSplits(7, 1, 1)))
    same = parse(command.PrepareOptions, ["x", "--data.splits.kind", "sizes"], prog="vqkit", default=default)
    assert same == replace(default, what="x")
    other = parse(command.PrepareOptions, ["x", "--data.splits.kind", "paths"], prog="vqkit", default=default)
    assert other.data.splits == PathSplits()


def test_progress_is_a_line_every_few_seconds_without_a_terminal() -> None:
    out, now = io.StringIO(), [0.0]
    view = DataView(Console(file=out, force_terminal=False), clock=lambda: now[0])
    with view:
        for done in range(0, 101, 10):
            view(Downloading("[a].zip", done * 1000, 100_000))
            now[0] += 1.0
        view(Note("unpacking [a].zip"))
        view(Packing(5, 10))
        now[0] += 60.0
        view(Downloading("b", 7, None))
    assert out.getvalue().splitlines() == [
        "[a].zip: 0 of 100,000 (0%)",
        "[a].zip: 50,000 of 100,000 (50%)",
        "[a].zip: 100,000 of 100,000 (100%)",
        "unpacking [a].zip",
        "b: 7",
    ]


def test_progress_is_a_bar_on_a_terminal() -> None:
    out = io.StringIO()
    with DataView(Console(file=out, force_terminal=True, width=80)) as view:
        view(Downloading("[a].zip", 0, 100))
        view(Downloading("[a].zip", 50, 100))
        view(Packing(10, 10))
        view(Note("done"))
        view._bar.refresh()  # type: ignore[union-attr]
    assert "[a].zip: 50 of 100 (50%)" in out.getvalue() and "done" in out.getvalue()


@pytest.mark.parametrize(
    ("recipe", "parts"), [("enwik8-small", ""), ("pg19-tiny", " --parts validation"), ("imagenet64-tiny", " --parts test")]
)
def test_a_recipe_without_its_data_says_how_to_fetch_them(vqkit: Callable[..., Said], recipe: str, parts: str) -> None:
    said = vqkit("train", recipe)
    name = recipe.partition("-")[0]
    assert (said.code, said.out) == (1, "")
    assert f"data/{name}" in said.err and f"does not exist: vqkit data download {name}{parts} fetches it" in said.err
