"""`vqkit bench`: its table and files from figures that are given, every kind on a tiny model, refusals."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from vqkit.cli import bench, main
from vqkit.train.benchmark import Row, TooLarge

TINY = "--model.dim 8 --model.key-dim 4 --model.value-dim 6 --model.layers 1 --model.codebook-size 4 --model.block-len 4 --model.mem-len 4"
MACHINE = {"processor": "Abacus 7", "device": "cpu", "threads": 2, "torch": "9.1", "vqkit": "8.2"}


@pytest.fixture
def vqkit(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*words: str | Path) -> tuple[int, str, str]:
        return main([str(word) for word in words]), *capfd.readouterr()

    return call


def test_the_table_says_what_was_measured() -> None:
    _, _, options = bench.requested(["train", "quickstart"])
    row = Row("vq", "mha", 2048, 1500.0, (1000.0, 2000.0), 0.25, (0.2, 0.5), 80.0, 10, 3 * 2**20, 3)
    lines = bench.as_table(bench.described("train", "quickstart", options, [row], MACHINE)).splitlines()
    assert lines[1:3] == ["Abacus 7, 2 threads; torch 9.1, vqkit 8.2", "batch 1, float32"]
    cells = ["vq mha", "2,048", "1,500 (1,000 - 2,000)", "3.0", "25.0% (20.0% - 50.0%)", "80"]
    assert re.split(" {2,}", lines[-1]) == cells


def test_what_does_not_fit_is_a_row_that_says_so() -> None:
    _, _, options = bench.requested(["train", "quickstart"])
    rows = [TooLarge("full", "recipe", 8192, "asked for 9 bytes")]
    result = bench.described("train", "quickstart", options, rows, MACHINE | {"revision": "abc123+"})
    assert result["rows"] == [{"attention": "full", "heads": "recipe", "length": 8192, "does_not_fit": "asked for 9 bytes"}]
    lines = bench.as_table(result).splitlines()
    assert lines[1].endswith("torch 9.1, vqkit 8.2 (abc123+)")
    assert re.split(" {2,}", lines[-1]) == ["full recipe", "8,192", "does not fit"]


def test_the_revision_is_that_of_the_source() -> None:
    """Of this repository where the tests run in it; None in a copy without one."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(bench.__file__).parent)
    assert (bench.revision() or "").rstrip("+") == found.stdout.strip()


@pytest.mark.parametrize("what", ["train", "forward", "sample"])
def test_it_measures_and_writes(vqkit: Callable[..., tuple], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setattr("vqkit.train.benchmark.PRODUCT_SIZE", 16)
    out = tmp_path / "out"
    words = f"bench {what} quickstart --lengths 4 6 --attention vq full --heads recipe --repeats 1 --out {out} {TINY}"
    code, said, err = vqkit(*words.split())
    assert (code, err) == (0, "")
    assert (out / f"{what}.md").read_text() == f"```\n{said}```\n"
    result = json.loads((out / f"{what}.json").read_text())
    assert [(row["attention"], row["length"]) for row in result["rows"]] == [("vq", 4), ("full", 4), ("vq", 6), ("full", 6)]
    for row in result["rows"]:
        rate = row["flops_per_token"] * row["tokens_per_second"]
        assert row["utilisation"] == pytest.approx(rate / (1e9 * row["product_gflops"]))
        assert row["peak_bytes"] > 0
    assert result["machine"]["torch"]
    assert result["model"]["dim"] == 8
    assert (out / f"{what}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "what is to be measured? One of train, forward, sample"),
        ("trian", "unknown command bench 'trian'; did you mean train?"),
        ("train", "no recipe given"),
        ("train quikstart", "unknown recipe 'quikstart'; did you mean quickstart?"),
        ("train quickstart --length 3", "unknown option --length; did you mean --lengths?"),
        ("train quickstart --lengths 0", "--lengths 0: must be at least 1"),
        ("train quickstart --repeats 0", "--repeats 0: must be at least 1"),
        ("train quickstart --out pyproject.toml", "--out pyproject.toml: is a file; must be a folder, or absent"),
        ("train quickstart --attention half", "--attention: must be vq or full, not 'half'"),
        ("train quickstart --heads mha --model.key-dim 50", "model.dim = 192 must be a multiple of model.key_dim = 50"),
    ],
)
def test_words_that_make_no_sense(vqkit: Callable[..., tuple], words: str, message: str) -> None:
    code, out, err = vqkit("bench", *words.split())
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
