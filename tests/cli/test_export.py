"""`vqkit export`: a folder that samples, loads and evaluates without its run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vqkit as package
from tiny_runs import STEPS, tiny_config, write_texts
from vqkit.cli import main
from vqkit.data.config import IdSource, ImageSource, SentencePieceTokens
from vqkit.models import weights
from vqkit.train import train


@pytest.fixture
def vqkit(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*words: str | Path) -> tuple[int, str, str]:
        return main([str(word) for word in words]), *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    config = tiny_config(write_texts(folder / "texts"))
    config = replace(config, train=replace(config.train, keep_checkpoints=3, eval_every=9))
    return train(config, folder / "run").run_dir


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_that_is_pruned_meanwhile_gives_way_to_another(
    vqkit: Callable[..., tuple], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    load, pruned = weights.load_weights, []

    def load_weights(folder: Path, *rest: Any) -> Any:
        if not pruned:
            pruned.append(folder)
            shutil.rmtree(folder)
        return load(folder, *rest)

    monkeypatch.setattr(weights, "load_weights", load_weights)
    code, out, err = vqkit("export", run, tmp_path / "model")
    assert (code, err) == (0, "")
    assert pruned[0].name == f"step_{STEPS:08d}" and f"model: step_{STEPS - 3:08d} of" in out


def test_what_was_exported_needs_no_run(vqkit: Callable[..., tuple], trained: Path, tmp_path: Path) -> None:
    run, before = Path(shutil.copytree(trained, tmp_path / "run")), contents(trained)
    target = tmp_path / "models" / "mine"
    code, out, err = vqkit("export", run, target)
    assert (code, err) == (0, "")
    assert sorted(path.name for path in target.iterdir()) == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert contents(run) == before
    for path in target.iterdir():
        assert re.search(rf"^  {path.name} +{path.stat().st_size:,} bytes$", out, re.MULTILINE)
    measured = vqkit("eval", target, "--data", run)[1]
    assert measured.splitlines()[0] == vqkit("eval", run)[1].splitlines()[0]
    sample = vqkit("sample", run, "--prompt", "the q", "--num-tokens", "30")[1]
    tensors = package.load(run).model.state_dict()
    shutil.rmtree(run)
    assert vqkit("sample", target, "--prompt", "the q", "--num-tokens", "30")[1] == sample
    for model in (package.load(target).model, package.TransformerVQ.from_pretrained(target)):
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert vqkit("inspect", target)[0] == 0


def test_the_page_has_the_figures_and_no_path(vqkit: Callable[..., tuple], trained: Path, tmp_path: Path) -> None:
    vqkit("export", trained, tmp_path / "out")
    page = (tmp_path / "out" / "README.md").read_text()
    last = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()][-1]
    assert page.startswith("---\nlibrary_name: vqkit\n")
    assert f"| steps | {STEPS} of {STEPS}, each 2 x 8 tokens, adamw |" in page
    assert f"| validation split | {last['bits_per_byte']:.4g} bits per byte (all of it, state carried through) |" in page
    assert re.search(r"^\| data \| texts, [\d,]+ tokens to train on, hash \w+ \|$", page, re.MULTILINE)
    assert str(tmp_path.parent) not in page


def test_which_checkpoint(vqkit: Callable[..., tuple], trained: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    best = min((line["bits_per_byte"], line["step"]) for line in lines if line["kind"] == "validation")[1]
    for which, step in (("last", STEPS), ("best", best), ("21", 21)):
        code, out, _ = vqkit("export", trained, tmp_path / which, "--checkpoint", which)
        assert code == 0 and f"step_{step:08d} of" in out
        found = package.load(tmp_path / which).model.state_dict()
        expected = package.load(trained / "checkpoints" / f"step_{step:08d}").model.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert "validation split" not in (tmp_path / "21" / "README.md").read_text()
    code, _, err = vqkit("export", trained, tmp_path / "x", "--checkpoint", "5")
    assert code == 1 and re.search(r"no checkpoint of step 5 is left; there are those of [\d, ]*21, 24", err)
    assert vqkit("export", trained, tmp_path / "x", "--checkpoint", "bset")[0] == 2
    assert not (tmp_path / "x").exists()


def test_nothing_is_overwritten_and_nothing_half_written_remains(
    vqkit: Callable[..., tuple], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("x")
    for name in ("full", "file"):
        code, out, err = vqkit("export", trained, tmp_path / name)
        assert (code, out) == (1, "") and "holds something already: must be a new folder" in err
    (tmp_path / "empty").mkdir()
    assert vqkit("export", trained, tmp_path / "empty")[0] == 0

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vqkit.files.write_text_atomic", full)
    assert vqkit("export", trained, tmp_path / "new")[::2] == (1, "vqkit: No space left on device\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full"]


@pytest.mark.parametrize("what", ["nowhere", "empty", "weights"])
def test_what_is_no_run_is_refused(vqkit: Callable[..., tuple], trained: Path, tmp_path: Path, what: str) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copytree(trained / "checkpoints" / f"step_{STEPS:08d}", tmp_path / "weights")
    code, out, err = vqkit("export", tmp_path / what, tmp_path / "out")
    assert (code, out) == (1, "")
    assert re.fullmatch(rf"vqkit: \S+/{what} (does not exist|is no run|holds weights and is no run).*\n", err)
    assert not (tmp_path / "out").exists()


def test_other_kinds_of_data_take_their_tokenizer_along(vqkit: Callable[..., tuple], tmp_path: Path) -> None:
    base = tiny_config(write_texts(tmp_path / "texts"), steps=4, batch_size=2)
    pieces = replace(base.data, tokenizer=SentencePieceTokens(vocab_size=300))
    np.save(tmp_path / "ids.npy", np.arange(900) % 7)
    ids = replace(base.data, path=str(tmp_path / "ids.npy"), source=IdSource(vocab_size=7))
    np.save(tmp_path / "images.npy", (np.arange(20 * 32) % 251).astype(np.uint8).reshape(20, 2, 16, 1))
    images = replace(base.data, path=str(tmp_path / "images.npy"), source=ImageSource(2, 16, 1))
    for name, data in {"sentencepiece": pieces, "ids": ids, "images": images}.items():
        config = replace(base, data=data, model=replace(base.model, vocab_size=data.vocab_size))
        train(config, tmp_path / name)
        assert vqkit("export", tmp_path / name, tmp_path / f"{name}.out")[0] == 0
        shutil.rmtree(tmp_path / name)
        loaded = package.load(tmp_path / f"{name}.out")
        assert (loaded.tokenizer.kind, loaded.tokenizer.vocab_size) == (name, data.vocab_size)
    code, out, err = vqkit("sample", tmp_path / "sentencepiece.out", "--prompt", "the", "--num-tokens", "5")
    assert (code, err) == (0, "") and out.startswith("the")
    assert vqkit("sample", tmp_path / "images.out", "--images", "2")[0] == 0
