"""The examples of training loops run, at a small size: plain, DDP, FSDP2, Lightning, Accelerate."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
METRICS = r"perplexity [\d.]+, active [\d.]+, dead [\d.e-]+, .*relative_error [\d.]+"


def execute(name: str, *words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr("sys.argv", [name, *words])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def launch(name: str, *words: str) -> str:
    """What two processes of torchrun print."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLES / name), *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_plain_loop(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    printed = execute("plain_loop.py", "3", monkeypatch=monkeypatch, capsys=capsys)
    assert re.search(r"5 bits a vector\n" + METRICS, printed)


def test_ddp() -> None:
    printed = launch("ddp.py", "3")
    assert "equal on 2 processes: True" in printed
    assert re.search(METRICS, printed)


def test_fsdp2() -> None:
    printed = launch("fsdp2.py", "3")
    assert "decode(encode(x)) is the output: True; parameters are DTensor" in printed
    assert re.search(METRICS, printed)


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="Lightning is not installed")
def test_lightning(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice of Lightning about this machine
        printed = execute("with_lightning.py", "3", monkeypatch=monkeypatch, capsys=capsys)
    assert "3 optimizer steps, 3 of the codebook" in printed
    assert re.search(METRICS, printed)


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="Accelerate is not installed")
def test_accelerate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        printed = execute("with_accelerate.py", "3", monkeypatch=monkeypatch, capsys=capsys)
    assert "3 steps of the codebook" in printed
    assert re.search(METRICS, printed)
