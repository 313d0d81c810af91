"""`vqkit inspect`: show what a run is, without its data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from vqkit.cli.options import parse


@dataclass(frozen=True)
class InspectOptions:
    """Show what a run is: configuration, size and cost, health of the codebooks, last metrics, checkpoints.

    vqkit inspect runs/quickstart
    """

    run: Positional[Path]
    """The folder of a run, a checkpoint or exported weights."""


def main(words: Sequence[str]) -> int:
    """Parse and run; returns the exit code."""
    options = parse(InspectOptions, words, prog="vqkit inspect")
    from vqkit.models.weights import find_weights, load_weights

    folder = find_weights(options.run)
    model, config = load_weights(folder)
    sections = {
        "configuration": _configuration(options.run, config),
        "size and cost": _cost(config),
        "codebooks (from their moving averages)": codebook_table([quantizer.count for quantizer in model.quantizers()]),
        "last metrics": _last_metrics(options.run),
        "checkpoints": _checkpoints(options.run),
    }
    print(f"{options.run}: weights of {folder.name}")
    for title, text in sections.items():
        if text:
            print(f"\n{title}\n" + "\n".join(f"  {line}" for line in text.splitlines()))
    return 0


def codebook_table(counts: Sequence[Any]) -> str:
    """Use of the codes per attention unit and head, from counts [H, C] of each unit."""
    from vqkit.cli.console import table
    from vqkit.train.metrics import code_use

    rows = []
    for i, count in enumerate(counts):
        use = code_use(count.detach())
        for head, (active, perplexity) in enumerate(zip(use.active.tolist(), use.perplexity.tolist(), strict=True)):
            rows.append((f"layer {i // 2} unit {i % 2} head {head}", f"{active:.1%}", f"{perplexity:.1f} of {count.shape[-1]}"))
    return table(("", "active codes", "perplexity"), rows) if rows else ""


def _configuration(run: Path, model: Any) -> str:
    from vqkit.config import to_dict

    path = run / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {"model": to_dict(model)}
    return "\n".join(f"{name} = {value}" for name, value in _flat(config))


def _flat(config: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    entries = []
    for name, value in config.items():
        entries += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return entries


def _cost(config: Any) -> str:
    from vqkit.cli.console import table
    from vqkit.models.cost import flops_per_token, num_codebook_values, num_parameters, state_bytes

    flops = flops_per_token(config)
    rows = [
        ("parameters", f"{num_parameters(config):,}"),
        ("codebook values", f"{num_codebook_values(config):,}"),
        ("FLOPs per token, forward", f"{flops.forward:,}"),
        ("FLOPs per token, training", f"{flops.training:,}"),
        ("decoding state, bytes per text", f"{state_bytes(config):,}"),
    ]
    return table(*[rows[0], rows[1:]])


def _last_metrics(run: Path) -> str:
    """The last line of each kind, say of training and of validation."""
    from vqkit.train.metrics import read_lines

    last = {line["kind"]: line for line in read_lines(run / "metrics.jsonl")}
    return "\n".join(", ".join(f"{name} {_rounded(value)}" for name, value in line.items()) for line in last.values())


def _rounded(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _checkpoints(run: Path) -> str:
    from vqkit.models.weights import find_defect

    folders = sorted(p for p in (run / "checkpoints").glob("step_*") if p.is_dir())
    return "\n".join(f"{folder.name}: {_size(folder):,} bytes, {find_defect(folder) or 'whole'}" for folder in folders)


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
