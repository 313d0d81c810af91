"""The facade for vector-quantize-pytorch beside the library itself, every row of the tests' covering arrays: `make bench-facade`.

Each row is timed in a training step, forward and backward, and in an encoding call in eval mode, the two in turn in one process; a ratio
is the library's time over the facade's, medians of the repeats. Rows of which either cannot run at these sizes are listed.
Writes facade.json, facade.md and facade.png to benchmarks/results/; `--classes` measures some and keeps the others' rows.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import vector_quantize_pytorch as peer
from machine import RESULTS, describe
from torch import Tensor

from vqkit.ops.nearest_code import compiled

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

facade = importlib.import_module("vqkit.compat.vector_quantize_pytorch")

WIDTH, CODES, LAYERS, BATCH, TIME = 64, 512, 4, 8, 128
PARTS = ("train", "encode")
MODULES = {
    "ResidualVQ": ("test_residual_vq", "ROWS"),
    "GroupedResidualVQ": ("test_residual_vq", "GROUPED_ROWS"),
}
"""Where the tests have their rows; the classes that are not named are measured with their defaults."""
PLAIN: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "VectorQuantize": ({"dim": WIDTH, "codebook_size": CODES}, (BATCH, TIME, WIDTH)),
    "FSQ": ({"levels": [8, 5, 5, 5], "dim": WIDTH}, (BATCH, TIME, WIDTH)),
    "FSP": ({"levels": [8, 5, 5, 5], "dim": WIDTH}, (BATCH, TIME, WIDTH)),
    "LFQ": ({"codebook_size": 1024, "dim": WIDTH}, (BATCH, TIME, WIDTH)),
    "ResidualFSQ": ({"levels": [8, 5, 5, 3], "num_quantizers": LAYERS, "dim": WIDTH}, (BATCH, TIME, WIDTH)),
    "ResidualLFQ": ({"codebook_size": 256, "num_quantizers": LAYERS, "dim": WIDTH}, (BATCH, TIME, WIDTH)),
    "GroupedResidualFSQ": ({"levels": [8, 5, 5, 3], "num_quantizers": LAYERS, "dim": WIDTH, "groups": 2}, (BATCH, TIME, WIDTH)),
    "GroupedResidualLFQ": ({"codebook_size": 256, "num_quantizers": LAYERS, "dim": WIDTH, "groups": 2}, (BATCH, TIME, WIDTH)),
    "SimVQ": ({"dim": WIDTH, "codebook_size": CODES}, (BATCH, TIME, WIDTH)),
    "ResidualSimVQ": ({"dim": WIDTH, "codebook_size": CODES, "num_quantizers": LAYERS}, (BATCH, TIME, WIDTH)),
    "LatentQuantize": ({"levels": [5, 5, 8], "dim": 16}, (4, 16, 16, 16)),
    "RandomProjectionQuantizer": ({"dim": WIDTH, "codebook_size": CODES, "codebook_dim": 16, "num_codebooks": 4}, (BATCH, TIME, WIDTH)),
    "BinaryMapper": ({"bits": 8}, (BATCH, TIME, 8)),
    "HierarchicalVQ": ({"dim": WIDTH, "codebook_size": CODES, "scales": (8, 32, TIME)}, (BATCH, WIDTH, TIME)),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "cosine": {"use_cosine_sim": True},
    "codebook_dim": {"codebook_dim": 16},
    "heads": {"heads": 4, "codebook_dim": 16},
    "separate heads": {"heads": 4, "codebook_dim": 16, "separate_codebook_per_head": True},
    "straight through": {"rotation_trick": False},
    "learnable": {"learnable_codebook": True, "ema_update": False},
    "expiry": {"threshold_ema_dead_code": 2},
    "drawn": {"stochastic_sample_codes": True},
    "cross-entropy": {"commitment_use_cross_entropy_loss": True},
    "diversity": {"codebook_diversity_loss_weight": 0.1, "codebook_diversity_temperature": 1.0},
    "affine": {"affine_param": True},
    "directional": {"directional_reparam": True, "threshold_ema_dead_code": 2},
}
"""Of VectorQuantize."""


def larger(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A row of the tests at the sizes of the benchmark."""
    sizes: dict[str, Any] = {"dim": WIDTH, "num_quantizers": LAYERS, "codebook_size": CODES}
    if isinstance(kwargs.get("codebook_size"), tuple):
        sizes["codebook_size"] = (CODES, CODES // 2, CODES // 4, CODES // 4)
    if kwargs.get("codebook_dim"):
        sizes["codebook_dim"] = 16
    if kwargs.get("implicit_neural_codebook"):
        sizes["codebook_size"] = (16, 8, 8, 8) if isinstance(sizes["codebook_size"], tuple) else 16
    if kwargs.get("beam_score_quantizer_weights"):
        sizes["beam_score_quantizer_weights"] = [1.0] * LAYERS
    return {**kwargs, **sizes}


def cases(kind: str) -> Iterator[tuple[str, dict[str, Any], dict[str, Any], Tensor]]:
    """Name, arguments of the constructor and of the call, input."""
    if kind in PLAIN:
        kwargs, shape = PLAIN[kind]
        yield "defaults", kwargs, {}, torch.randn(shape)
        for name, options in VARIANTS.items() if kind == "VectorQuantize" else ():
            yield name, {**kwargs, **options}, {}, torch.randn(shape)
        return
    module, rows = MODULES[kind]
    for number, row in enumerate(getattr(importlib.import_module(f"facade.{module}"), rows)):
        kwargs = larger({name: value for name, value in row.items() if not name.startswith("call.")})
        calls = {name[5:]: v for name, v in row.items() if name.startswith("call.") and v is not None and v is not False}
        if "mask" in calls:
            calls["mask"] = torch.arange(TIME).expand(BATCH, TIME) % 3 > 0
        image = kwargs.get("accept_image_fmap")
        if image:
            kwargs["dim"] = 32
        yield f"row {number}", kwargs, calls, torch.randn(1, 32, 32, 32) if image else torch.randn(BATCH, TIME, WIDTH)


def differentiable(output: Any) -> Iterator[Tensor]:
    """The sums of all of it that has a gradient."""
    if isinstance(output, Tensor):
        if output.requires_grad:
            yield output.float().sum()
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from differentiable(part)


def call(module: torch.nn.Module, part: str, x: Tensor, calls: dict[str, Any]) -> Callable[[], None]:
    """A training step, or an encoding."""

    def train() -> None:
        module.zero_grad()
        parts = [*differentiable(module(x.clone().requires_grad_(), **calls))]
        if parts:
            torch.stack(parts).sum().backward()

    def encode() -> None:
        with torch.no_grad():
            module(x, **calls)

    module.train(part == "train")
    return train if part == "train" else encode


def interleaved(runs: list[Callable[[], None]], budget: float) -> list[float]:
    """Median seconds of each, in turn, for at least three rounds and `budget` seconds."""
    for run in runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    start = time.perf_counter()
    while len(times[0]) < 3 or (time.perf_counter() - start < budget and len(times[0]) < 50):
        for run, own in zip(runs, times, strict=True):
            began = time.perf_counter()
            run()
            own.append(time.perf_counter() - began)
    return [statistics.median(own) for own in times]


def measure(kind: str, budget: float) -> Iterator[dict[str, Any]]:
    """The rows of a class."""
    for name, kwargs, calls, x in cases(kind):
        row: dict[str, Any] = {"class": kind, "case": name, "arguments": {k: repr(v)[:60] for k, v in {**kwargs, **calls}.items()}}
        try:
            torch.manual_seed(0)
            modules = [getattr(package, kind)(**copy.deepcopy(kwargs)) for package in (peer, facade)]
            for part in PARTS:
                seconds = interleaved([call(module, part, x, calls) for module in modules], budget)
                row[part] = {"peer": seconds[0], "facade": seconds[1], "ratio": seconds[0] / seconds[1]}
        except Exception as error:
            row["not measured"] = f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
        yield row


def table(result: dict[str, Any]) -> str:
    """The page."""
    rows = result["rows"]
    known = [(row, part) for row in rows for part in PARTS if part in row]
    slower = [(row, part) for row, part in known if row[part]["ratio"] < 1.0]
    worst = min((row[part]["ratio"] for row, part in known), default=float("nan"))
    median = statistics.median(row[part]["ratio"] for row, part in known) if known else float("nan")
    lines = ["# The facade beside vector-quantize-pytorch", ""]
    lines += [", ".join(f"{name} {value}" for name, value in result["machine"].items()), ""]
    lines += [
        f"{len(known)} figures: median ratio {median:.2f}, worst {worst:.2f}, {len(slower)} below 1.0. Ratio: its time over the facade's.",
        "",
    ]
    lines += ["| class | case | train ms | ratio | encode ms | ratio |", "|---|---|---|---|---|---|"]
    for row in rows:
        if "not measured" in row:
            lines.append(f"| {row['class']} | {row['case']} | {row['not measured']} | | | |")
            continue
        cells = [f"{1e3 * row[part]['facade']:.2f} | {row[part]['ratio']:.2f}" for part in PARTS]
        lines.append(f"| {row['class']} | {row['case']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any]) -> None:
    """The sorted ratios."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    for part in PARTS:
        axes.plot(sorted(row[part]["ratio"] for row in result["rows"] if part in row), marker=".", label=part)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set(yscale="log", xlabel="cases, slowest first", ylabel="time of the library / of the facade")
    axes.legend()
    figure.savefig(RESULTS / "facade.png", dpi=120)


def main() -> None:
    """Measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", nargs="*", default=[*PLAIN, *MODULES])
    parser.add_argument("--budget", type=float, default=0.3, help="seconds a figure")
    options = parser.parse_args()
    path = RESULTS / "facade.json"
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [row for row in old if row["class"] not in options.classes]
    for kind in options.classes:
        for row in measure(kind, options.budget):
            rows.append(row)
            print(kind, row["case"], row.get("not measured") or [f"{row[part]['ratio']:.2f}" for part in PARTS], flush=True)
    result = {
        "machine": {**describe(), "peer": importlib.metadata.version("vector-quantize-pytorch"), "compiled search": compiled.is_there()},
        "rows": rows,
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "facade.md").write_text(table(result))
    plot(result)


if __name__ == "__main__":
    main()
