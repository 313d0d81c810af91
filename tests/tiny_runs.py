"""Training runs that take a fraction of a second: a configuration, its data, what a run leaves, and a run that a test may kill."""

import itertools
import json
import os
import random
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from vqkit.data import DataConfig
from vqkit.models.config import ModelConfig
from vqkit.quantizers.config import CodebookConfig
from vqkit.train.checkpoint import SHARDS_FOLDER, read_shards_
from vqkit.train.config import RunConfig, TrainConfig

STEPS = 24
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "then", "sleeps"]


def write_texts(folder: Path) -> Path:
    """Twelve small files of words in a random order."""
    draw = random.Random(0)
    folder.mkdir(parents=True)
    for i in range(12):
        (folder / f"{i}.txt").write_text(" ".join(draw.choices(WORDS, k=60)))
    return folder


def tiny_config(texts: Path, **train) -> RunConfig:
    """Four steps a sequence and a checkpoint every third: most stand in the middle of a sequence, and between two log lines.

    k-means start, expiry of dead codes and dropout are on, so that the run draws random numbers to the end, some for a whole sequence.
    """
    codebook = CodebookConfig(decay=0.9, init="kmeans", dead_code_threshold=0.5)
    settings: dict[str, Any] = {
        "steps": STEPS,
        "batch_size": 2,
        "update_len": 8,
        "warmup_steps": 3,
        "weight_decay": 1e-4,
        "log_every": 2,
        "eval_every": 10,
        "eval_batch_size": 2,
        "checkpoint_every": 3,
        "device": "cpu",
    }
    return RunConfig(
        recipe="tiny",
        model=ModelConfig(
            dim=8,
            key_dim=4,
            value_dim=8,
            layers=1,
            heads=2,
            codebook_size=8,
            block_len=8,
            mem_len=6,
            residual_dropout=0.1,
            sinusoid_dropout=0.2,
            layer_dropout=0.2,
            codebook=codebook,
        ),
        data=DataConfig(path=str(texts), sequence_len=32, validation_fraction=0.2, test_fraction=0.1),
        train=TrainConfig(**(settings | train)),
    )


def with_codebook(config: RunConfig, **changes) -> RunConfig:
    """The same run with other options of the codebook."""
    return replace(config, model=replace(config.model, codebook=replace(config.model.codebook, **changes)))


def traces(run_dir: Path) -> dict[str, bytes]:
    """Every bit of a run that is a function of its configuration: its files, and of safetensors each tensor; by name."""
    paths = [run_dir / "config.json", run_dir / "metrics.jsonl", *(run_dir / "checkpoints").rglob("*")]
    found = {}
    for path in paths:
        name = path.relative_to(run_dir).as_posix()
        if path.parent.name == SHARDS_FOLDER:
            continue
        if path.name == SHARDS_FOLDER:
            found |= {f"{name} {key}": tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for key, tensor in _shards(path).items()}
        elif path.suffix == ".safetensors":
            # The order of the metadata in the head of such a file is chance; so are the hashes of whole files.
            for key, tensor in safetensors.torch.load(path.read_bytes()).items():
                found[f"{name} {key} {tensor.dtype} {tuple(tensor.shape)}"] = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        elif path.is_file() and path.name != "manifest.json":
            found[name] = path.read_bytes()
    return found


def _shards(folder: Path) -> dict[str, torch.Tensor]:
    """The whole tensors that several processes wrote as shards."""
    entries = json.loads((folder.parent / "training.json").read_text())["shards"]
    tensors = {name: torch.zeros(entry["shape"], dtype=getattr(torch, entry["dtype"])) for name, entry in entries.items()}
    read_shards_(tensors, folder)
    return tensors


def differing(run_dir: Path, other: Path) -> list[str]:
    """The names of what differs between two runs."""
    a, b = traces(run_dir), traces(other)
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def _do_not_sync(fd: Any) -> None:
    pass


def train_in_process(config: RunConfig, run_dir: Path, fault: str | None = None) -> None:
    """What a process that a test starts does.

    `fault` names the point at which it is to die, or is "asked:RANK:STEP": then that rank gets SIGTERM after that step.
    """
    torch.set_num_threads(1)
    # What a killed process wrote is not lost; syncing is against the loss of power, and would be most of the time.
    os.fsync = _do_not_sync
    from vqkit.train import loop

    if fault is not None and fault.startswith("asked:"):
        _, rank, step = fault.split(":")
        passed = itertools.count(1)

        def point(name: str) -> None:
            if name == "after_step" and os.environ.get("RANK", "0") == rank and next(passed) == int(step):
                os.kill(os.getpid(), signal.SIGTERM)

        loop.fault_point = point
    elif fault is not None:
        os.environ["VQKIT_FAULT"] = fault
    loop.train(config, run_dir)
