"""The VQ-autoencoder of real images learns, and its codes stay in use on images that it has not seen."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "autoencoder.py"


def execute(name: str, *words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr("sys.argv", [name, *words])
    runpy.run_path(str(EXAMPLE.with_name(name)), run_name="__main__")
    return capsys.readouterr().out


def test_it_learns_and_codes_stay_active_on_held_out_images(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn, whose digits these are, is not installed")
    printed = execute("autoencoder.py", "150", monkeypatch=monkeypatch, capsys=capsys)
    found = re.findall(r"^step (\d+): squared error ([\d.]+), perplexity of the codes ([\d.]+)$", printed, re.MULTILINE)
    assert [int(step) for step, *_ in found] == [50, 100, 150]
    assert float(found[-1][1]) < float(found[0][1])
    (held_out,) = re.findall(r"^held out: squared error ([\d.]+), active codes (\d+)%$", printed, re.MULTILINE)
    assert int(held_out[1]) > 90
    assert float(held_out[0]) < 0.03  # the mean image errs by 0.073
