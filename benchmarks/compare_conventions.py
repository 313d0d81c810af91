"""Which conventions and forms of Transformer-VQ learn better: small models on the same data, for the same steps, from several seeds.

    python benchmarks/compare_conventions.py [--steps 250] [--seeds 0 1] [--only norm output]

Trains on the source code of the running Python's standard library and writes a table and a JSON file to benchmarks/results/. Every line
differs from the first, which has the default conventions of ModelConfig, in what it says and nothing else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, describe

from vqkit.data import SequenceSampler, Split, pack
from vqkit.data.standard_library import python_library
from vqkit.files import write_text_atomic
from vqkit.models import ModelConfig, TransformerVQ
from vqkit.models.presets import full_attention_twin
from vqkit.quantizers.config import CodebookConfig
from vqkit.train.allocator import reuse_freed_memory
from vqkit.train.config import TrainConfig
from vqkit.train.evaluation import evaluate
from vqkit.train.optimizer import Optimizer
from vqkit.train.step import train_step

BASE = ModelConfig(
    dim=128,
    layers=2,
    key_dim=32,
    value_dim=256,
    codebook_size=32,
    block_len=64,
    mem_len=64,
    codebook=CodebookConfig(decay=0.98, dead_code_threshold=1.0),
)
TRAIN = TrainConfig(batch_size=1, learning_rate=3e-3, warmup_steps=50, commitment_weight=1e-2)
TIED = {"tied": True, "logit_scale": 0.05}
WITHOUT_GATE: dict[str, Any] = {"layer": "feed_forward", "key_dim": 32, "value_dim": 32, "heads": 4}

MODELS: dict[str, dict[str, ModelConfig]] = {
    "norm": {
        "the defaults: norms with gain and bias, own output": BASE,
        "norms without gain and bias": replace(BASE, norm="plain"),
    },
    "output": {
        "no norm before the output": replace(BASE, output_norm=False),
        "tied output, logits times 0.05": replace(BASE, **TIED),
        "tied output, its input times 0.05": replace(BASE, **TIED, logit_scale_at="input"),
        "tied output without bias, logits times 0.05": replace(BASE, **TIED, tied_bias=False),
    },
    "positions": {
        "absolute positions as well": replace(BASE, absolute_positions=True),
        "no relative positions": replace(BASE, relative_positions=False),
    },
    "codes": {
        "codes never expire": replace(BASE, codebook=CodebookConfig(decay=0.98)),
        "codes start by k-means": replace(BASE, codebook=replace(BASE.codebook, init="kmeans")),
        "sinusoidal codes": replace(BASE, quantizer="sinusoidal", codebook=CodebookConfig()),
        "no gradient through the cache": replace(BASE, cache_gradient=False),
        "no cache": replace(BASE, cache=False),
    },
    "heads": {
        "4 heads and feed-forward (mha)": replace(BASE, **WITHOUT_GATE),
        "4 heads, 1 key head, feed-forward of 5 widths (mqa)": replace(BASE, **WITHOUT_GATE, key_heads=1, feed_forward_dim=5 * BASE.dim),
        "ordinary attention, gated": full_attention_twin(BASE),
        "ordinary attention, 4 heads and feed-forward": full_attention_twin(replace(BASE, **WITHOUT_GATE)),
    },
}
OPTIMIZERS: dict[str, TrainConfig] = {
    "lion, a tenth of the rate": replace(TRAIN, optimizer="lion", learning_rate=3e-4),
    "adafactor, rate 0.03": replace(TRAIN, optimizer="adafactor", learning_rate=3e-2),
    "linear schedule": replace(TRAIN, schedule="linear"),
    "inverse square root schedule": replace(TRAIN, schedule="inverse_square_root"),
}


def trained(model_config: ModelConfig, train: TrainConfig, seed: int, folder: Path, length: int) -> dict[str, Any]:
    """One run of `train.steps` steps of one sequence each: bits per byte of the validation split, codes in use, seconds."""
    from vqkit.train.initialization import initialize_codebooks_

    torch.manual_seed(seed)
    model = TransformerVQ(model_config).train()
    optimizer = Optimizer(model.named_parameters(), train)
    sampler = SequenceSampler(Split(folder, "train"), length, train.batch_size, seed)
    began = time.perf_counter()
    for step in range(train.steps):
        batch = sampler.batch(step)
        if step == 0 and model_config.codebook.init == "kmeans":
            initialize_codebooks_(model, batch)
        train_step(model, optimizer, batch, model.initial_state(train.batch_size), step)
    seconds = time.perf_counter() - began
    found = evaluate(model, Split(folder, "validation"), batch_size=1, max_tokens=16_384)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"bits": found.bits, "active": found.worst_active_codes, "seconds": seconds, "parameters": parameters}


def line(name: str, group: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of the table, of the runs of all seeds."""
    bits = [run["bits"] for run in runs]
    actives = [run["active"] for run in runs if run["active"] is not None]
    return {
        "name": name,
        "group": group,
        "parameters": runs[0]["parameters"],
        "bits_per_byte": statistics.mean(bits),
        "each_seed": bits,
        "active_codes": statistics.mean(actives) if actives else None,
        "seconds": statistics.mean(run["seconds"] for run in runs),
    }


def table(rows: list[dict[str, Any]], settings: dict[str, Any], machine: dict[str, object]) -> str:
    """Markdown."""
    first = rows[0]["bits_per_byte"]
    seeds = ", ".join(map(str, settings["seeds"]))
    made_on = f"{machine['processor']}, {machine['threads']} thread; torch {machine['torch']}"
    lines = [
        "# Conventions and forms compared",
        "",
        f"{made_on}; revision {machine['revision']}; {machine['date']}.",
        "",
        f"Width {BASE.dim}, {BASE.layers} layers, block = window = {BASE.block_len}, {BASE.codebook_size} codes; {settings['steps']} steps",
        f"of one sequence of {settings['length']} bytes of Python's standard library, seeds {seeds}. Bits per byte of 16 KiB of validation",
        "files, mean of the seeds and each; difference to the first line; worst share of active codes; seconds of one run.",
        "",
        "| | parameters | bits per byte | difference | each seed | active codes | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        each = " ".join(f"{bits:.3f}" for bits in row["each_seed"])
        active = "" if row["active_codes"] is None else f"{row['active_codes']:.0%}"
        bits = f"{row['bits_per_byte']:.3f} | {row['bits_per_byte'] - first:+.3f}"
        lines.append(f"| {row['name']} | {row['parameters']:,} | {bits} | {each} | {active} | {row['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """All lines, all seeds; results are written after every line, so that a run that is stopped leaves what it has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=250, help="optimizer steps of every model")
    parser.add_argument("--length", type=int, default=512, help="bytes of a sequence")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="+", choices=[*MODELS, "optimizers"], help="groups of lines beside the first")
    options = parser.parse_args()
    reuse_freed_memory()
    train = replace(TRAIN, steps=options.steps)
    runs = [(group, name, config, train) for group, models in MODELS.items() for name, config in models.items()]
    runs += [("optimizers", name, BASE, replace(other, steps=options.steps)) for name, other in OPTIMIZERS.items()]
    if options.only:
        runs = [run for i, run in enumerate(runs) if i == 0 or run[0] in options.only]
    settings, machine = {"steps": options.steps, "length": options.length, "seeds": options.seeds}, describe()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        pack(replace(python_library(), sequence_len=options.length), folder)
        for group, name, config, own in runs:
            rows.append(line(name, group, [trained(config, own, seed, Path(folder), options.length) for seed in options.seeds]))
            print(f"{name}: {rows[-1]['bits_per_byte']:.3f} ({rows[-1]['seconds']:.0f} s a run)", flush=True)
            write_text_atomic(
                RESULTS / "conventions.json", json.dumps({"machine": machine, "settings": settings, "rows": rows}, indent=2) + "\n"
            )
            write_text_atomic(RESULTS / "conventions.md", table(rows, settings, machine))


if __name__ == "__main__":
    main()
