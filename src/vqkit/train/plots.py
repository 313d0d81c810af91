"""Pictures of a run: its loss curve, and how the codes of every codebook are used. Needs matplotlib, when a function is called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vqkit.models.config import ModelConfig
from vqkit.train.code_use import unit_name
from vqkit.train.evaluation import Evaluation
from vqkit.train.metrics import METRICS_FILE, read_lines
from vqkit.train.units import measured

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOTS_FOLDER = "plots"


def save_plots(run_dir: Path, config: ModelConfig, evaluation: Evaluation | None = None) -> list[Path]:
    """Write RUN/plots/loss.png and, given an evaluation of a model of `config` with codes, RUN/plots/codes.png. Returns the paths.

    Older ones are replaced.
    """
    folder = run_dir / PLOTS_FOLDER
    folder.mkdir(exist_ok=True)
    figures = {"loss.png": loss_figure(run_dir)}
    if evaluation is not None and evaluation.code_counts:
        figures["codes.png"] = code_figure(evaluation, config)
    for name, figure in figures.items():
        figure.savefig(folder / name)
    return [folder / name for name in figures]


def loss_figure(run_dir: Path) -> Figure:
    """Bits over the steps, of the training batches and of the validation split, in the unit of the data."""
    lines = read_lines(run_dir / METRICS_FILE)
    figure = _figure(7.0, 4.0)
    axes = figure.add_subplot()
    unit = "bits"
    for kind, style, label in (("train", "-", "training batches"), ("validation", "o-", "validation split")):
        found = [(line["step"], *measured(line)) for line in lines if line["kind"] == kind]
        if found:
            steps, (unit, *_), values = zip(*found, strict=True)
            axes.plot(steps, values, style, markersize=3, linewidth=1, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    return figure


def code_figure(evaluation: Evaluation, config: ModelConfig) -> Figure:
    """The use of the codes over an evaluation: see `use_figure`."""
    uses = zip(evaluation.active_codes, evaluation.perplexity, strict=True)
    titles = [
        f"{unit_name(index, config)}: {min(active):.0%} active, perplexity {min(perplexity):.0f}"
        for index, (active, perplexity) in enumerate(uses)
    ]
    return use_figure(evaluation.code_counts, titles)


def use_figure(units: Sequence[Sequence[Sequence[float]]], titles: Sequence[str]) -> Figure:
    """Share of the assignments of each code, most used first: a panel a unit, a curve a head; dashed where activity begins."""
    columns = min(len(units), 4)
    rows = -(-len(units) // columns)
    figure = _figure(3.0 * columns, 2.4 * rows)
    for index, heads in enumerate(units):
        axes = figure.add_subplot(rows, columns, index + 1)
        for counts in heads:
            total = max(sum(counts), 1)
            axes.plot([count / total for count in sorted(counts, reverse=True)], linewidth=1)
        axes.axhline(1.0 / (10 * len(heads[0])), linestyle="--", linewidth=0.8, color="gray")
        axes.set_yscale("log")
        axes.set_title(titles[index], fontsize=7)
        axes.tick_params(which="both", labelsize=6)
    figure.supxlabel("codes, most used first", fontsize=8)
    figure.supylabel("share of assignments", fontsize=8)
    return figure


def _figure(width: float, height: float) -> Figure:
    # Made without pyplot, which would choose a window system and keep every figure alive.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
