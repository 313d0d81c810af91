"""From data of every kind to what is said and shown of them: train, eval, inspect, sample."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tiny_runs import write_texts
from vqkit.cli import main
from vqkit.cli.eval import EvalOptions, asked_ways
from vqkit.cli.report import next_commands
from vqkit.data import Split
from vqkit.generate import load
from vqkit.recipes import RECIPES, enwik8, text
from vqkit.train import Evaluation, evaluate

MODEL = "--model.dim 8 --model.key-dim 4 --model.value-dim 8 --model.layers 1 --model.codebook-size 4 --model.block-len 8 --model.mem-len 8"
TRAIN = "--train.steps 3 --train.warmup-steps 1 --train.log-every 1 --train.eval-every 3 --train.batch-size 2 --train.eval-batch-size 2"
TINY = f"{MODEL} {TRAIN} --train.device cpu --data.validation-fraction 0.2 --data.test-fraction 0.2".split()
LENGTH = ["--data.sequence-len", "16"]
PACK = {
    "bytes": "",
    "sentencepiece": "--data.tokenizer.kind sentencepiece --data.tokenizer.vocab-size 300",
    "ids": "--data.source.kind ids --data.source.vocab-size 7",
    "images": "--data.source.kind images --data.source.height 2 --data.source.width 4 --data.source.channels 1",
}
UNITS = {"bytes": "bits per byte", "sentencepiece": "bits per byte", "ids": "bits per token", "images": "bits per dim"}


@pytest.fixture
def vqkit(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def call(*words: str | Path) -> str:
        code, (out, err) = main([str(word) for word in words]), capsys.readouterr()
        assert (code, err) == (0, "")
        return out

    return call


def write_data(folder: Path, kind: str) -> Path:
    if kind in ("bytes", "sentencepiece"):
        return write_texts(folder / "texts")
    path = folder / f"{kind}.npy"
    np.save(path, np.arange(600).reshape(30, 20) % 7 if kind == "ids" else np.arange(320).reshape(40, 2, 4).astype(np.uint8))
    return path


@pytest.mark.parametrize("kind", PACK)
def test_from_data_to_sample(
    vqkit: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    monkeypatch.setattr("vqkit.cli.report.SAMPLE_BYTES", 12)
    monkeypatch.chdir(tmp_path)
    prepared = vqkit("data", "prepare", write_data(tmp_path, kind), "--to", "packed/x", *PACK[kind].split(), *TINY[-4:])
    [command] = re.findall(r"train on it +vqkit (train \w+ --data\.path packed/x --run runs/x)$", prepared, re.MULTILINE)
    out = vqkit(*command.split(), *([] if kind == "images" else LENGTH), *TINY[:-4])
    unit, run = UNITS[kind], Path("runs/x")
    assert re.search(rf"^step 3/3  \d\.\d{{3}} {unit.replace(' per ', '/')}  ", out, re.MULTILINE)
    for other in {*UNITS.values()} - {unit} - ({"bits per token"} if kind == "sentencepiece" else set()):
        assert other not in out.replace("/", " per "), other
    assert re.search(r"^(bytes|tokens): [1-9][\d,]* to train, [1-9][\d,]* to validate, [1-9][\d,]* to test$", out, re.MULTILINE)
    assert ("cut to 4 bytes" in out, "cut to 4 tokens" in out) == (kind == "bytes", kind in ("sentencepiece", "ids"))
    assert len(list(run.glob("samples/*"))) == (kind != "ids")

    measured = vqkit("eval", run)
    assert measured.splitlines()[0] == re.findall(rf"^test: \d\.\d{{3}} {unit}$", out, re.MULTILINE)[0]
    assert ("word-level perplexity" in measured) == (kind in ("bytes", "sentencepiece"))
    [best] = re.findall(rf"best: step 3, ([0-9.]+) {unit}, step_00000003$", vqkit("inspect", run), re.MULTILINE)
    assert f"step 3: validation {float(best):.3f} {unit.replace(' per ', '/')}," in out
    [next_command] = re.findall(r"^  let it (?:write|paint|go on)  .*vqkit (.*)$", out, re.MULTILINE)
    assert next_command.startswith("sample runs/x --")
    if kind == "images":
        assert vqkit("sample", run, "--images", "3", "--out", "grid.png") == "3 images of 2 x 4: grid.png\n"
        assert Path("grid.png").read_bytes().startswith(b"\x89PNG")
        assert main(["sample", str(run), "--prompt", "a"]) == 2
    elif kind == "ids":
        words = vqkit("sample", run, "--prompt", "5 6", "--num-tokens", "8").split()
        assert words[:2] == ["5", "6"] and words[2:] == [str(i) for i in load(run).ids([5, 6], 8)]
        assert {int(word) for word in words} <= set(range(7))
        assert main(["sample", str(run), "--prompt", "a"]) == main(["sample", str(run), "--prompt", "7"]) == 2
    else:
        assert vqkit("sample", run, "--prompt", "the", "--num-tokens", "5").startswith("the")
        assert main(["sample", str(run), "--images", "3"]) == 2
    capsys.readouterr()
    assert re.search(r"^train +[\d,]+ +[1-9]", vqkit("data", "check", run), re.MULTILINE)


def test_eval_measures_by_the_conventions_that_are_asked_for(vqkit: Callable[..., str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    vqkit("train", "text", "--data.path", write_data(tmp_path, "bytes"), "--run", run, *LENGTH, *TINY)
    rows = [line.split()[:2] for line in vqkit("eval", run).splitlines() if line.startswith(("carry ", "sequence "))]
    assert rows == [["carry", "isolate"], ["carry", "ignore"], ["sequence", "isolate"], ["sequence", "ignore"]]
    figures = set(re.findall(r"^(?:carry|sequence)  .*$", vqkit("eval", run), re.MULTILINE))
    alone = vqkit("eval", run, "--context", "sequence", "--segments", "ignore")
    [row] = re.findall(r"^sequence  .*$", alone, re.MULTILINE)
    assert row in figures and "\ncarry  " not in alone
    assert float(alone.split()[1]) == float(row.split()[2])
    assert Split(run / "data", "test").num_documents > 1


def test_each_way_is_measured_as_it_says(vqkit: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, asked = tmp_path / "run", []
    vqkit("train", "text", "--data.path", write_data(tmp_path, "bytes"), "--run", run, *LENGTH, *TINY)

    def recording(*things: Any, **options: Any) -> Evaluation:
        asked.append((options["sequence_len"], options["segments"]))
        return evaluate(*things, **options)

    monkeypatch.setattr("vqkit.cli.report.evaluate", recording)
    vqkit("eval", run)
    assert asked == [(None, True), (None, False), (16, True), (16, False)]


def test_which_ways_there_are() -> None:
    options, config = EvalOptions(run=Path("x")), text()
    assert asked_ways(options, config, several=False) == [("carry", "isolate"), ("sequence", "isolate")]
    assert asked_ways(options, enwik8(), several=True)[0] == ("sequence", "ignore"), "that of the run comes first"
    assert asked_ways(EvalOptions(Path("x"), context="carry", segments="ignore"), config, several=True) == [("carry", "ignore")]


def test_a_vocabulary_of_another_is_not_measured(vqkit: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two of equal size, each with pieces of its own."""
    for name in ("a", "b"):
        texts = write_data(tmp_path / name, "bytes")
        (texts / "more.txt").write_text(f"{name}{name} {name} " * 300)
        words = [*PACK["sentencepiece"].split(), *LENGTH, *TINY]
        vqkit("train", "text", "--data.path", texts, "--run", tmp_path / f"run_{name}", *words)
    assert main(["eval", str(tmp_path / "run_a"), "--data", str(tmp_path / "run_b")]) == 1
    assert "reads ids of another vocabulary (sentencepiece, 300 ids, hash " in capsys.readouterr().err


def test_runs_by_the_published_recipes_are_sampled_as_the_published_ones() -> None:
    for recipe, kind, sampled in (
        (RECIPES["enwik8"], "bytes", '--prompt "The " --top-p 0.9'),
        (RECIPES["pg19-small"], "sentencepiece", '--prompt "The " --top-p 0.8'),
        (RECIPES["imagenet64"], "images", "--images 9 --top-p 0.999"),
        (RECIPES["enwik8-tiny"], "bytes", '--prompt "The " --temperature 0.8'),
    ):
        assert next_commands(recipe(), Path("r"), kind)[0][1] == f"vqkit sample r {sampled}"
