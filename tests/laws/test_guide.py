"""The guide to the quantizers: its Python runs, its links lead somewhere, its choices and the tests that its table names exist."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import vqkit.quantizers
from vqkit.quantizers import GroupedResidualVQ, ResidualVQ, VectorQuantize, config

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "quantizers.md").read_text(encoding="utf-8")


@pytest.fixture
def names() -> dict[str, Any]:
    """What the Python of the guide has defined at its end."""
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
    assert len(blocks) >= 4
    names: dict[str, Any] = {}
    exec("\n".join(blocks), names)
    return names


def test_its_python_runs(names: dict[str, Any]) -> None:
    assert names["again"].shape == (8, 100, 64)
    assert names["hardest"].shape == (10,)
    assert names["indices"].shape == (8, 100)


def test_its_metrics_are_those_that_there_are(names: dict[str, Any]) -> None:
    section = GUIDE.split("## Healthy metrics", 1)[1].split("\n## ", 1)[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == sorted(names["quantizer"].metrics())


@pytest.mark.parametrize("kind", [VectorQuantize, ResidualVQ, GroupedResidualVQ])
def test_every_argument_and_choice_is_named(kind: type) -> None:
    written = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`\n]+)`", GUIDE))))
    arguments = {p.name for p in inspect.signature(kind).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD}
    choices = {name for name in vqkit.quantizers.__all__ if getattr(vqkit.quantizers, name).__module__ == config.__name__}
    assert arguments | choices <= written | {"device", "dim", "CodebookConfig"}


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_its_plain_encoder_exports_and_is_encode(names: dict[str, Any], metric: Any) -> None:
    quantizer = VectorQuantize(16, 64, metric=metric)
    quantizer.codebook = torch.randn(64, 16)
    quantizer(torch.randn(4, 50, 16))
    x, other = torch.randn(2, 4, 50, 16)
    program = torch.export.export(names["Encoder"](quantizer.codebook), (x,))
    assert not [node for node in program.graph.nodes if "vqkit" in str(node.target)]
    assert torch.equal(program.module()(other), quantizer.encode(other))


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
