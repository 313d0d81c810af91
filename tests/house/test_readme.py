"""What the README shows works: its Python runs, its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vqkit.models import ModelConfig, TransformerVQ, save_weights

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig(dim=16, key_dim=8, value_dim=16, layers=1, codebook_size=8, block_len=8, mem_len=8)
    monkeypatch.chdir(tmp_path)
    save_weights(TransformerVQ(config), config, Path("runs/quickstart"))
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
        assert capsys.readouterr().out
    assert getattr(names["again"], "shape", None) == (8, 100, 64)
    assert getattr(names["codes"], "shape", None) == (1000,)


def test_every_target_and_file_that_the_readme_names_exists() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"`?make (?:TORCH_INDEX=\S+ )?([a-z][\w-]*)", README))
    assert named >= {"demo", "test", "help"}
    assert named <= targets
    for link in re.findall(r"\]\(([\w./-]+)\)", README):
        assert link.startswith("http") or (ROOT / link).is_file(), link


def test_every_target_is_told_by_make_help() -> None:
    text = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, flags=re.MULTILINE)
    told = set(re.findall(r'@echo "make ([\w-]+)', text))
    assert told == set(phony.split()) - {"help"}
