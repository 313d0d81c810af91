"""`vqkit inspect` on weights of every form of model, and on runs whose files are broken."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tiny_models import tiny_model
from vqkit.cli import main
from vqkit.config import to_json
from vqkit.data.config import DataConfig
from vqkit.models.cost import state_bytes
from vqkit.models.weights import save_weights, write_manifest
from vqkit.train.config import RunConfig, TrainConfig


@pytest.fixture
def vqkit(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*words: str | Path) -> tuple[int, str, str]:
        return main([str(word) for word in words]), *capsys.readouterr()

    return call


def write_run(folder: Path, **options) -> Path:
    """A run that stopped at step 3, whose best step was 2."""
    model = tiny_model(vocab_size=259, **options).float()
    for number, quantizer in enumerate(model.quantizers()):
        quantizer.count.copy_(torch.tensor([[1.0, 1, 0, 0, 0], [4, 0, 0, 0, 0]]) * (number + 1))
    weights = folder / "checkpoints" / "step_00000003"
    save_weights(model, model.config, weights)
    write_manifest(weights)
    (folder / "config.json").write_text(to_json(RunConfig("text", model.config, DataConfig(path="x"), TrainConfig())))
    lines = [f'{{"step": {step}, "kind": "validation", "bits_per_byte": {bits}}}\n' for step, bits in ((1, 4.0), (2, 2.5), (3, 3.0))]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("layer", "names"), [("gated", ["layer 0 unit 1", "layer 1 unit 0"]), ("feed_forward", ["layer 0", "layer 1"])])
def test_units_are_named_by_their_layer(vqkit: Callable[..., tuple], tmp_path: Path, layer: str, names: list[str]) -> None:
    run = write_run(tmp_path / "run", layer=layer, layers=2)
    before = contents(run)
    code, out, err = vqkit("inspect", run)
    assert (code, err) == (0, "")
    for name in names:
        assert re.search(rf"^  {name} head 0 +40\.0% +2\.0 of 5 +50\.0%$", out, re.MULTILINE)
        assert re.search(rf"^  {name} head 1 +20\.0% +1\.0 of 5 +100\.0%$", out, re.MULTILINE)
    assert len(re.findall(r"^  layer .* head 0 ", out, re.MULTILINE)) == (4 if layer == "gated" else 2)
    assert "worst: 20.0% of codes active (layer 0" in out
    assert contents(run) == before


def test_the_best_step_is_named_with_what_is_left_of_it(vqkit: Callable[..., tuple], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert "  best: step 2, 2.5 bits per byte, of which no checkpoint is left\n" in vqkit("inspect", run)[1]
    (run / "metrics.jsonl").write_text('{"step": 3, "kind": "validation", "bits_per_byte": 1.5}\n')
    assert "  best: step 3, 1.5 bits per byte, step_00000003\n" in vqkit("inspect", run)[1]


def test_a_plot_is_written_where_it_is_asked_for_and_nothing_else(vqkit: Callable[..., tuple], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    before = contents(run)
    assert f"\nplot: {run / 'plots' / 'codebooks.png'}\n" in vqkit("inspect", run, "--plot", "True")[1]
    plot = run / "plots" / "codebooks.png"
    assert plot.read_bytes().startswith(b"\x89PNG")
    plot.unlink()
    assert contents(run) == before


def test_a_run_without_codebooks(vqkit: Callable[..., tuple], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", attention="full")
    code, out, err = vqkit("inspect", run, "--plot", "True")
    assert (code, err) == (0, "")
    assert '  none: model.attention = "full"\n' in out
    assert "no plot: there is no codebook" in out
    config = tiny_model(vocab_size=259, attention="full").config
    [grows] = re.findall(r"decoding state, bytes per token read +([\d,]+)", out)
    assert int(grows.replace(",", "")) * 10 == state_bytes(config, length=15) - state_bytes(config, length=5)
    assert not (run / "plots").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", b"{", "not JSON"),
        ("config.json", b"\xff", "not JSON"),
        ("config.json", b"[]", r"config\.json"),
        ("config.json", b"{}", r"config\.json"),
        ("metrics.jsonl", b"{\n", "not lines of JSON"),
    ],
)
def test_a_broken_file_is_named(vqkit: Callable[..., tuple], tmp_path: Path, name: str, text: bytes, message: str) -> None:
    run = write_run(tmp_path / "run")
    (run / name).write_bytes(text)
    code, out, err = vqkit("inspect", run)
    assert (code, out) == (1, "")
    assert re.fullmatch(rf"vqkit: {re.escape(str(run / name))}.*\n", err)
    assert re.search(message, err)
