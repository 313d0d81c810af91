"""Plots show the numbers of the run, and matplotlib is loaded when one is drawn."""

import subprocess
import sys

import numpy as np
import pytest

from tiny_models import tiny_model
from vqkit.train.evaluation import Evaluation
from vqkit.train.metrics import JsonLines
from vqkit.train.plots import code_figure, loss_figure, save_plots
from vqkit.train.units import LossUnit


@pytest.fixture
def run_dir(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    for step in (10, 20):
        lines.write({"step": step, "kind": "train", "bits_per_byte": 80 / step})
    lines.write({"step": 20, "kind": "validation", "bits_per_byte": 5.0})
    lines.close()
    return tmp_path


def evaluation(units):
    counts = ((1, 7, 2), (5, 0, 5))
    return Evaluation(1.0, 10, 10, LossUnit("bits per byte"), (counts,) * units, ((1.0, 2 / 3),) * units, ((2.2, 2.0),) * units)


def test_the_loss_curve_holds_the_metrics(run_dir):
    (axes,) = loss_figure(run_dir).axes
    curves = {line.get_label(): np.asarray(line.get_xydata()).tolist() for line in axes.lines}
    assert curves == {"training batches": [[10, 8.0], [20, 4.0]], "validation split": [[20, 5.0]]}


@pytest.mark.parametrize(
    ("units", "layer", "last"), [(2, "gated", "layer 0 unit 1"), (6, "gated", "layer 2 unit 1"), (1, "feed_forward", "layer 0:")]
)
def test_the_use_of_codes_has_a_panel_a_unit_and_a_curve_a_head(units, layer, last):
    axes = code_figure(evaluation(units), tiny_model(layer=layer).config).axes
    assert axes[-1].get_title().startswith(last)
    assert len(axes) == units
    for panel in axes:
        first, second, bound = (np.asarray(line.get_xydata())[:, 1].tolist() for line in panel.lines)
        assert first == [0.7, 0.2, 0.1]
        assert second == [0.5, 0.5, 0.0]
        assert set(bound) == {1 / 30}
        assert "67% active" in panel.get_title()


def test_the_loss_is_named_by_the_unit_of_its_lines(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.write({"step": 1, "kind": "train", "bits_per_dim": 3.5})
    lines.close()
    assert loss_figure(tmp_path).axes[0].get_ylabel() == "bits per dim"


def test_pictures_are_files(run_dir):
    config = tiny_model().config
    paths = save_plots(run_dir, config, evaluation(2))
    assert [path.relative_to(run_dir).as_posix() for path in paths] == ["plots/loss.png", "plots/codes.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert [path.name for path in save_plots(run_dir, config)] == ["loss.png"]


def test_matplotlib_is_loaded_only_to_draw():
    program = "import sys, vqkit.train.plots; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
