"""The guide to the quantizers: its Python runs, its links lead somewhere, and the tests that its table of defects names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "quantizers.md").read_text(encoding="utf-8")


def test_its_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
    assert len(blocks) >= 2
    exec("\n".join(blocks), {})
    assert "perplexity" in capsys.readouterr().out


def test_its_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([\w./-]+)\)", GUIDE):
        assert (ROOT / "docs" / link).resolve().is_file(), link


def test_every_test_of_the_table_of_defects_exists() -> None:
    table = GUIDE.split("## Defects", 1)[1]
    lines = [line for line in table.splitlines() if re.match(r"\| \d+ \|", line)]
    tests = {
        name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    for line in lines:
        named = re.findall(r"`(test_\w+)`", line)
        assert named or "not of these classes" in line, line
        assert set(named) <= tests, set(named) - tests
    assert sorted({int(line.split("|")[1]) for line in lines}) == list(range(1, 37))
