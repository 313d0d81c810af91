"""The example and the page about official checkpoints: their Python and their commands run, on a checkpoint of a tiny model."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest

from official_files import nested, write
from tiny_models import tiny_model
from vqkit.cli import main
from vqkit.compat.official_names import to_official
from vqkit.models import load_weights

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "official-checkpoints.md").read_text(encoding="utf-8")


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder `checkpoints` of a run of the official code, in the folder that the test works in."""
    model = tiny_model(vocab_size=259, absolute_positions=False).float()
    tree = {"step": 125_000, "opt_state": {}, "params": nested(to_official(model.state_dict(), model.config))}
    write(tree, tmp_path / "checkpoints" / "checkpoint_125000" / "checkpoint")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "checkpoints"


def test_the_example_writes(checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def execute(name: str, *words: str) -> str:
        monkeypatch.setattr("sys.argv", [name, *words])
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    written = execute("from_official.py", str(checkpoints), str(tmp_path / "model"), "The ", "20")
    assert written.startswith("The ")
    assert len(written) > len("The \n")
    assert load_weights(tmp_path / "model")[1].mem_len == 512


def test_the_python_of_the_page_runs(checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len([line for line in blocks[0].splitlines() if line]) == 5
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    assert capsys.readouterr().out.strip()


def test_the_commands_of_the_page_run(checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = re.findall(r"^vqkit (.*)$", PAGE, flags=re.MULTILINE)
    assert [words.split()[0] for words in commands][:2] == ["import-official", "sample"]
    for words in commands:
        if "RUN" not in words and "runs/mine" not in words:  # those need data: tests/cli/test_import_official.py
            assert main(shlex.split(words)) == 0, words
    assert capsys.readouterr().err == ""
