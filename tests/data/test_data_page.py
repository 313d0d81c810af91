"""The page on data does what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vqkit.cli import data as command
from vqkit.cli import train
from vqkit.cli.options import parse
from vqkit.data import DataConfig

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train", "validation", "test"):
        (tmp_path / "books" / name).mkdir(parents=True)
        (tmp_path / "books" / name / "1.txt").write_text("It was the best of times, it was the worst of times.\n" * 20)
    monkeypatch.chdir(tmp_path)
    (code,) = [text for language, text in BLOCKS if language == "python"]
    exec(compile(code, "data.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "DataSummary(path='books'" in printed and "times" in printed


def test_its_commands_are_understood() -> None:
    lines = [line.split() for language, text in BLOCKS if not language for line in text.splitlines()]
    kinds = []
    for _, name, *words in lines:
        if name == "train":
            data = train.requested(words[0], words[1:])[1].data
            kinds.append((data.source.kind, data.splits.kind))
        else:
            cls = {"prepare": command.PrepareOptions, "check": command.CheckOptions}[words[0]]
            parse(cls, words[1:], prog="vqkit data", default=cls(data=DataConfig(sequence_len=1)))
    assert kinds == [("text", "paths"), ("text", "fractions"), ("ids", "fractions")]
    assert len(lines) == 6
