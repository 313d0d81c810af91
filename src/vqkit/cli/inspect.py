"""`vqkit inspect`: show what a run is, without its data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import Positional

from vqkit.cli.options import parse
from vqkit.models.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class InspectOptions:
    """Show what a run is: configuration, size and cost, health of the codebooks, last metrics, checkpoints.
    $ vqkit inspect runs/quickstart
    $ vqkit inspect runs/quickstart --plot True
    """

    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The folder of a run, a checkpoint or exported weights."""
    plot: bool = False
    """Write RUN/plots/codebooks.png, how often each code of each codebook is used. Nothing else is ever changed."""


def main(words: Sequence[str]) -> int:
    """Parse and run; returns the exit code."""
    options = parse(InspectOptions, words, prog="vqkit inspect")
    from vqkit.models.weights import find_and_load_weights

    folder, model, config = find_and_load_weights(options.run)
    counts = [quantizer.count.detach() for quantizer in model.quantizers()]
    sections = {
        "configuration": _configuration(options.run, config),
        "size and cost": _cost(config),
        "codebooks (from their moving averages)": codebook_table(counts, config) or _no_codebooks(config),
        "last metrics": _last_metrics(options.run),
        "checkpoints": _checkpoints(options.run),
    }
    print(f"{options.run}: weights of {folder.name}")
    for title, text in sections.items():
        if text:
            print(f"\n{title}\n" + "\n".join(f"  {line}" for line in text.splitlines()))
    if options.plot:
        print(f"\nplot: {_plot(options.run, counts, config)}" if counts else "\nno plot: there is no codebook that learns")
    return 0


def codebook_table(counts: Sequence[Tensor], config: ModelConfig) -> str:
    """Use of the codes per attention unit and head, from counts [H, C] of each unit; the worst named below. Empty without codebooks."""
    from vqkit.cli.tables import table
    from vqkit.train.code_use import code_use, unit_name

    rows, worst = [], (2.0, "")
    for i, count in enumerate(counts):
        use = code_use(count)
        shares = (count.double() / count.double().sum(-1, keepdim=True).clamp(min=1e-300)).amax(-1)
        for head, (active, perplexity, share) in enumerate(zip(use.active.tolist(), use.perplexity.tolist(), shares.tolist(), strict=True)):
            name = f"{unit_name(i, config)} head {head}"
            rows.append((name, f"{active:.1%}", f"{perplexity:.1f} of {count.shape[-1]}", f"{share:.1%}"))
            worst = min(worst, (active, name))
    if not rows:
        return ""
    return table(("", "active codes", "perplexity", "most used code"), rows) + f"\nworst: {worst[0]:.1%} of codes active ({worst[1]})"


def _no_codebooks(config: ModelConfig) -> str:
    if config.attention == "full":
        return 'none: model.attention = "full"'
    return f'none that learns: model.quantizer = "{config.quantizer}"'


def _plot(run: Path, counts: Sequence[Tensor], config: ModelConfig) -> Path:
    from vqkit.train.code_use import code_use, unit_name
    from vqkit.train.plots import PLOTS_FOLDER, use_figure

    titles = []
    for i, count in enumerate(counts):
        use = code_use(count)
        titles.append(f"{unit_name(i, config)}: {use.active.min().item():.0%} active, perplexity {use.perplexity.min().item():.0f}")
    path = run / PLOTS_FOLDER / "codebooks.png"
    path.parent.mkdir(exist_ok=True)
    use_figure([count.tolist() for count in counts], titles).savefig(path)
    return path


def _configuration(run: Path, model: ModelConfig) -> str:
    from vqkit.config import from_json, to_dict
    from vqkit.train.config import RunConfig

    path = run / "config.json"
    config: dict[str, Any] = {"model": to_dict(model)}
    if (run / "checkpoints").is_dir() and path.is_file():  # that of weights is read already
        try:
            config = to_dict(from_json(RunConfig, path.read_text(encoding="utf-8"), where=str(path)))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not JSON: {error}") from error
    return "\n".join(f"{name} = {value}" for name, value in _flat(config))


def _flat(config: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    entries = []
    for name, value in config.items():
        entries += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return entries


def _cost(config: ModelConfig) -> str:
    from vqkit.cli.tables import table
    from vqkit.models.cost import flops_per_token, num_codebook_values, num_parameters, state_bytes

    flops = flops_per_token(config)
    rows = [
        ("parameters", f"{num_parameters(config):,}"),
        ("codebook values", f"{num_codebook_values(config):,}"),
        ("FLOPs per token, forward", f"{flops.forward:,}"),
        ("FLOPs per token, training", f"{flops.training:,}"),
    ]
    if config.attention == "full":
        per_token = state_bytes(config, length=1) - state_bytes(config, length=0)
        rows = [(name.replace("token,", "token of 2,048,"), number) for name, number in rows]
        rows.append(("decoding state, bytes per token read", f"{per_token:,}"))
    else:
        rows.append(("decoding state, bytes per text", f"{state_bytes(config):,}"))
    return table(*[rows[0], rows[1:]])


def _last_metrics(run: Path) -> str:
    """The last line of each kind, say of training and of validation, and the best of validation."""
    from vqkit.models.weights import is_whole
    from vqkit.train.checkpoint import checkpoint_path
    from vqkit.train.units import measured

    lines = _metrics(run)
    said = [
        ", ".join(f"{name} {_rounded(value)}" for name, value in line.items()) for line in {line["kind"]: line for line in lines}.values()
    ]
    figures = [(*reversed(measured(line)), line["step"]) for line in lines if line["kind"] == "validation"]
    if figures:
        bits, unit, step = min(figures)
        folder = checkpoint_path(run, step)
        said.append(f"best: step {step}, {bits:.4g} {unit}, " + (folder.name if is_whole(folder) else "of which no checkpoint is left"))
    return "\n".join(said)


def _metrics(run: Path) -> list[dict[str, Any]]:
    from vqkit.train.metrics import METRICS_FILE, read_lines

    try:
        return read_lines(run / METRICS_FILE)
    except ValueError as error:
        raise ValueError(f"{run / METRICS_FILE}: not lines of JSON: {error}") from error


def _rounded(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _checkpoints(run: Path) -> str:
    from vqkit.models.weights import find_defect

    folders = sorted(p for p in (run / "checkpoints").glob("step_*") if p.is_dir())
    return "\n".join(f"{folder.name}: {_size(folder):,} bytes, {find_defect(folder) or 'whole'}" for folder in folders)


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
