"""The examples run, at a tiny size."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_train_from_python_and_sample_from_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, run = tmp_path / "text", tmp_path / "run"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"line {i} of a song\n" * 20)

    def execute(name: str, *words: str) -> str:
        monkeypatch.setattr("sys.argv", [name, *words])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    assert re.search(
        r"^step 2: .*\ntest: \d\.\d{3} bits per byte;", execute("train_from_python.py", str(folder), str(run), "2"), re.MULTILINE
    )
    written = execute("sample_from_run.py", str(run), "line", "20")
    assert written.startswith("line")
    assert len(written) > len("line\n")


def test_every_example_is_run_by_a_test() -> None:
    names = {path.name for path in EXAMPLES.glob("*.py")}
    texts = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*example*.py")]
    assert names == set(re.findall(r'(?:execute|launch)\("(\w+\.py)"', "".join(texts)))
