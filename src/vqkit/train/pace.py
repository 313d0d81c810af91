"""How many steps fit into a time: a run that is promised to end in minutes measures its machine before it begins."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import torch

from vqkit.config import from_json
from vqkit.data import Batch
from vqkit.models import TransformerVQ
from vqkit.train.config import RunConfig
from vqkit.train.optimizer import Optimizer
from vqkit.train.step import train_step

_WARMUP, _MEASURED = 5, 30


def paced(config: RunConfig, stored: str | os.PathLike[str], device: torch.device) -> RunConfig:
    """`config` with no more steps than fit into `train.minutes`; a run whose configuration is `stored` already keeps its steps."""
    minutes = config.train.minutes
    if minutes is None:
        return config
    if Path(stored).exists():
        steps = from_json(RunConfig, Path(stored).read_text(encoding="utf-8"), where=str(stored)).train.steps
    else:
        fitting = int(60.0 * minutes / seconds_per_step(config, device)) - config.train.extra_steps
        steps = max(min(config.train.steps, fitting), config.train.warmup_steps + 1)
    return replace(config, train=replace(config.train, steps=steps))


def seconds_per_step(config: RunConfig, device: torch.device) -> float:
    """Mean time of a training step of `config` on random tokens, with a model of its own; leaves the global generators as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model = TransformerVQ(replace(config.model, codebook=replace(config.model.codebook, init="normal"))).to(device).train()
        optimizer = Optimizer(model.named_parameters(), config.train)
        shape = (config.train.batch_size, config.update_len)
        tokens = torch.randint(config.model.vocab_size, shape, device=device)
        all_count = torch.ones(shape, dtype=torch.bool, device=device)
        batch = Batch(tokens, tokens, torch.zeros_like(tokens), all_count)
        began = time.perf_counter()
        for step in range(_WARMUP + _MEASURED):
            if step == _WARMUP:
                began = time.perf_counter()
            result = train_step(model, optimizer, batch, model.initial_state(len(tokens)), step)
            result.losses.total.item()  # wait for the device
        return (time.perf_counter() - began) / _MEASURED
