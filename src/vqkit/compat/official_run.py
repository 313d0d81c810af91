"""An official checkpoint as a run of ours, which `vqkit train --run` goes on with: weights, optimizer, position in the schedule."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from vqkit.compat.official import OfficialModel
from vqkit.compat.official_names import branch_of
from vqkit.compat.official_optimizer import OptimizerState
from vqkit.config import to_json
from vqkit.data.config import DataConfig
from vqkit.files import write_text_atomic
from vqkit.train.checkpoint import Training, save_checkpoint
from vqkit.train.config import RunConfig, TrainConfig
from vqkit.train.loop import CONFIG_FILE


def run_config(loaded: OfficialModel, data: DataConfig, train: TrainConfig) -> RunConfig:
    """The configuration of a run that goes on with `loaded`: `train` with the optimizer of the checkpoint.

    Raises ValueError where the checkpoint has no optimizer state or one of another rule than `train.optimizer` asks for, where no steps
    are left to do, and where the checkpoint does not stand between two sequences.
    """
    state = loaded.optimizer
    if state is None:
        raise ValueError("the checkpoint holds no optimizer state to go on with: import the weights alone, without data.path")
    if train.optimizer not in (state.kind, TrainConfig().optimizer):
        raise ValueError(f'train.optimizer = "{train.optimizer}": the checkpoint has the state of {state.kind}; leave it out')
    decayed = "all_but_outer_vectors" if branch_of(loaded.config) == "optimized" else train.decayed
    train = replace(train, optimizer=state.kind, momentum_dtype=_momentum_dtype(state), decayed=decayed, minutes=None)
    config = RunConfig("official", loaded.config, data, train)
    if train.total_steps <= state.steps:
        raise ValueError(f"train.steps = {train.steps}: the checkpoint has done {state.steps:,} updates, must be more than that")
    if state.steps % config.updates_per_sequence:
        raise ValueError(
            f"data.sequence_len = {data.sequence_len} is {config.updates_per_sequence} updates of train.update_len = {config.update_len}: "
            f"the {state.steps:,} updates of the checkpoint must be whole sequences, between which alone it can go on"
        )
    return config


def write_run(loaded: OfficialModel, config: RunConfig, run_dir: str | os.PathLike[str]) -> Path:
    """Write the directory of a run that stands where the official one stood, and return its checkpoint.

    The official checkpoint holds no random numbers and no place in its data, whose order it draws by the clock: ours begins with
    `train.seed`, at the sequence that follows from the number of updates. Raises ValueError for a directory that is not empty.
    """
    run_dir = Path(run_dir)
    if loaded.optimizer is None:
        raise ValueError("the checkpoint holds no optimizer state to go on with")
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise ValueError(f"{run_dir} is there already: a run needs a directory that is its own, empty or absent")
    training = Training.of(config, loaded.model)
    training.optimizer.load_state_tensors_(loaded.optimizer.tensors)
    training.step = loaded.optimizer.steps
    run_dir.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        path = save_checkpoint(training, run_dir)
    write_text_atomic(run_dir / CONFIG_FILE, to_json(config))
    return path


def _momentum_dtype(state: OptimizerState) -> Literal["parameter", "bfloat16"]:
    narrow = state.kind == "lion" and all(tensor.dtype == torch.bfloat16 for tensor in state.tensors.values())
    return "bfloat16" if narrow else "parameter"
