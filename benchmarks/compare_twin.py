"""What Transformer-VQ gives up, or gains, against the same network with ordinary attention: at equal steps, and in equal time.

    python benchmarks/compare_twin.py [--steps 4000] [--length 512]                        # Python's standard library
    python benchmarks/compare_twin.py --data NAME=FILE                                     # the last twentieth is the test
    python benchmarks/compare_twin.py --data NAME=TRAINING_FILE,TEST_FILE

The model is that of the quickstart. Three runs for each text: Transformer-VQ; the twin for as many steps; the twin for as many steps as
fit into the time of the first (its learning rate falls over its own steps). Time is that of the training steps alone. All are measured on
the whole test split, sequence by sequence from a fresh state, as they were trained; Transformer-VQ also with its state carried through the
split, which costs the twin a cache as long as the split. Rows of earlier runs with other texts or lengths are kept in
benchmarks/results/twin.json; table and plot are made of all rows.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, describe

from vqkit.data import SequenceSampler, Split, pack
from vqkit.data.config import DataConfig, PathSplits
from vqkit.data.standard_library import python_library
from vqkit.files import write_text_atomic
from vqkit.models import ModelConfig, TransformerVQ
from vqkit.models.presets import full_attention_twin
from vqkit.recipes import quickstart
from vqkit.train.allocator import reuse_freed_memory
from vqkit.train.config import TrainConfig
from vqkit.train.evaluation import evaluate
from vqkit.train.optimizer import Optimizer
from vqkit.train.step import train_step

PYTHON = "Python library"
CURVE_POINTS = 40


def data_config(name: str, files: list[str]) -> DataConfig:
    """The files of a text, or Python's standard library where none are named."""
    if not files:
        return python_library()
    if len(files) == 1:
        return DataConfig(path=str(Path(files[0]).absolute()), validation_fraction=0.0)
    if len(files) == 2:
        train, test = (str(Path(file).absolute()) for file in files)
        return DataConfig(path=str(Path(files[0]).absolute().parent), splits=PathSplits(train=train, validation="", test=test))
    raise ValueError(f"--data {name}: {len(files)} files; must be one, or one to train on and one to test on")


def trained(model_config: ModelConfig, train: TrainConfig, folder: Path, length: int) -> tuple[TransformerVQ, dict[str, Any]]:
    """A model after `train.steps` steps of one sequence each, and the time that took with the course of its loss."""
    torch.manual_seed(train.seed)
    model = TransformerVQ(model_config).train()
    optimizer = Optimizer(model.named_parameters(), train)
    sampler = SequenceSampler(Split(folder, "train"), length, train.batch_size, train.seed)
    curve, losses, seconds = [], [], 0.0
    for step in range(train.steps):
        batch = sampler.batch(step)
        began = time.perf_counter()
        losses.append(train_step(model, optimizer, batch, model.initial_state(train.batch_size), step).losses.language.item())
        seconds += time.perf_counter() - began
        if (step + 1) % max(1, train.steps // CURVE_POINTS) == 0:
            curve.append((step + 1, seconds, sum(losses) / len(losses) / math.log(2)))
            losses.clear()
    return model, {"steps": train.steps, "seconds": seconds, "tokens_per_second": train.steps * length / seconds, "curve": curve}


def measured(model: TransformerVQ, split: Split, length: int) -> dict[str, Any]:
    """Bits per byte of the whole split, and how the codes were used there: worst head, mean perplexity."""
    found = evaluate(model, split, batch_size=1, sequence_len=length)
    carried = evaluate(model, split, batch_size=1) if model.quantizers() else None
    return {
        "bits_per_byte": found.bits,
        "bits_per_byte_carried": carried and carried.bits,
        "active_codes": found.worst_active_codes,
        "perplexity": found.mean_perplexity,
    }


def compared(name: str, files: list[str], steps: int, length: int) -> list[dict[str, Any]]:
    """The three runs of one text."""
    recipe = quickstart()
    train = replace(recipe.train, steps=steps, minutes=None)
    twin = full_attention_twin(recipe.model)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        pack(replace(data_config(name, files), sequence_len=length), folder)
        split = Split(Path(folder), "test")

        def run(model_config: ModelConfig, what: str, steps: int) -> None:
            model, training = trained(model_config, replace(train, steps=steps), Path(folder), length)
            parameters = sum(parameter.numel() for parameter in model.parameters())
            rows.append({"data": name, "length": length, "what": what, "parameters": parameters, "test_bytes": split.num_bytes})
            rows[-1].update(training, **measured(model, split, length))
            print(f"{name}, {length}: {what}: {rows[-1]['bits_per_byte']:.3f} ({rows[-1]['seconds']:.0f} s)", flush=True)

        run(recipe.model, "Transformer-VQ", steps)
        run(twin, "full attention, equal steps", steps)
        run(twin, "full attention, equal time", round(steps * rows[0]["seconds"] / rows[1]["seconds"]))
    return rows


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "# Transformer-VQ beside its twin with full attention",
        "",
        "The model of the quickstart and the same network with ordinary attention; one sequence a step. Bits per byte of the whole",
        "test split, read as sequences of the training length from a fresh state, and with the state carried through. Codes: share in use",
        "in the worst head, mean perplexity of 32, on the test split. `make bench-twin`.",
        "",
        "| text | sequence | model | steps | seconds | tokens/s | bits per byte | carried | active codes | perplexity |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        codes = "| | " if row["active_codes"] is None else f"| {row['active_codes']:.0%} | {row['perplexity']:.1f} "
        carried = "" if row["bits_per_byte_carried"] is None else f"{row['bits_per_byte_carried']:.3f}"
        lines.append(
            f"| {row['data']} | {row['length']:,} | {row['what']} | {row['steps']:,} | {row['seconds']:.0f} "
            f"| {row['tokens_per_second']:,.0f} | {row['bits_per_byte']:.3f} | {carried} {codes}|"
        )
    lines += ["", "Machines, by text and length:", ""]
    for name, machine in result["machines"].items():
        made_on = f"{machine['processor']}, {machine['threads']} thread(s); torch {machine['torch']}"
        lines.append(f"- {name}: {made_on}; revision {machine['revision']}; {machine['date']}")
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any]) -> None:
    """Training loss over time, one panel for each text and length, as twin.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = list(dict.fromkeys((row["data"], row["length"]) for row in result["rows"]))
    figure, axes = pyplot.subplots(1, len(groups), figsize=(4.2 * len(groups), 3.4), layout="constrained", squeeze=False)
    for axis, group in zip(axes[0], groups, strict=True):
        for row in result["rows"]:
            if (row["data"], row["length"]) == group:
                axis.plot([point[1] for point in row["curve"]], [point[2] for point in row["curve"]], label=row["what"])
        axis.set(title=f"{group[0]}, {group[1]:,}", xlabel="seconds of training", ylabel="training loss, bits per token")
    axes[0][0].legend(fontsize="small")
    figure.savefig(RESULTS / "twin.png", dpi=120)


def main() -> None:
    """Run, put the rows in the place of earlier ones of the same texts and lengths, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps of Transformer-VQ")
    parser.add_argument("--length", type=int, default=512, help="bytes of a sequence")
    parser.add_argument("--data", nargs="+", default=[PYTHON], metavar="NAME=FILE[,TEST_FILE]", help="texts; without: " + PYTHON)
    options = parser.parse_args()
    reuse_freed_memory()
    path = RESULTS / "twin.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": [], "machines": {}}
    for word in options.data:
        name, _, files = word.partition("=")
        rows = compared(name, files.split(",") if files else [], options.steps, options.length)
        others = [row for row in result["rows"] if (row["data"], row["length"]) != (name, options.length)]
        result["rows"] = sorted(others + rows, key=lambda row: (row["data"], row["length"]))
        result["machines"][f"{name}, {options.length:,}"] = describe()
        write_text_atomic(path, json.dumps(result, indent=1) + "\n")
        write_text_atomic(RESULTS / "twin.md", table(result))
        plot(result)


if __name__ == "__main__":
    main()
