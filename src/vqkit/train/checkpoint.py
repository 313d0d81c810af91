"""Checkpoints: everything that changes while a run goes on, in a folder that is whole or absent.

A checkpoint is written under a temporary name, its manifest last, and then renamed; older ones are removed after that. So a run that
is killed at any instant finds a whole one, and goes on from it as if nothing had happened.

Weights are safetensors and JSON always. What the optimizer remembers is one safetensors file, or, where FSDP2 shards it, a folder that all
processes write through torch.distributed.checkpoint; its index is a pickle, which `train` alone opens, of its own run. What each process
keeps for itself (the carried state of its rows, its random generators) is a file of its own. The folder must be on a disk that all share.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.distributed.checkpoint as distributed_checkpoint
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from vqkit.dist import LocalReducer
from vqkit.files import TEMPORARY_SUFFIX, naming, sync_folder, temporary_name, write_bytes_atomic, write_text_atomic
from vqkit.models import TransformerVQ
from vqkit.models.transformer import ModelState
from vqkit.models.weights import CHECKPOINTS_FOLDER, is_whole, load_weights, save_weights, write_manifest
from vqkit.train.config import RunConfig
from vqkit.train.faults import fault_point
from vqkit.train.metrics import Interval
from vqkit.train.optimizer import Optimizer
from vqkit.train.parallel import Processes, distribute, like_parameter, whole_tensor
from vqkit.train.state import from_named_tensors, join_rows, named_tensors, split_rows

TENSORS_FILE = "training.safetensors"
SHARDS_FOLDER = "optimizer"
VALUES_FILE = "training.json"
FORMAT = "vqkit-training"
VERSION = 2


@dataclass
class Training:
    """All that changes while a run goes on; the position in the data is a function of `step`."""

    config: RunConfig
    processes: Processes
    model: TransformerVQ
    called: nn.Module
    """What a step calls in place of the model: `distribute` made it."""
    optimizer: Optimizer
    interval: Interval
    step: int = 0
    """Steps done."""
    state: ModelState | None = None
    """What the next step starts from in the middle of a sequence; None where a sequence begins."""
    data: str = ""
    """The hash of what it is trained on; empty where that is not known."""

    @classmethod
    def of(cls, config: RunConfig, model: TransformerVQ, processes: Processes | None = None) -> Training:
        """A run of `model`, equal on all processes, that has done nothing yet; None: of this process alone, where the model is."""
        processes = processes or Processes(next(model.parameters()).device, LocalReducer())
        shapes = [quantizer.codebook.shape[:2] for quantizer in model.quantizers()]
        called = distribute(model, processes, config.train.parallel)
        return cls(config, processes, model, called, Optimizer(model.named_parameters(), config.train), Interval(shapes, processes.device))

    @property
    def device(self) -> torch.device:
        return self.processes.device

    @property
    def rows(self) -> int:
        """Sequences of a batch that this process works on."""
        return self.config.train.batch_size // self.processes.world_size

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds but a part of the parameters."""
        return self.processes.world_size > 1 and self.config.train.parallel == "fsdp"


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps stands."""
    return run_dir / CHECKPOINTS_FOLDER / f"step_{step:08d}"


def save_checkpoint(training: Training, run_dir: Path) -> Path:
    """Write RUN/checkpoints/step_XXXXXXXX and return it; one of that step that is whole already is left. Every process calls it."""
    processes, path = training.processes, checkpoint_path(run_dir, training.step)
    if processes.from_first(path.exists() and is_whole(path)):
        return path
    fault_point("before_checkpoint")
    path.parent.mkdir(exist_ok=True)
    temporary = Path(processes.from_first(str(temporary_name(path))))
    try:
        with naming(path):
            _write_parts(training, temporary)
            processes.wait()
            if processes.is_first:
                fault_point("after_checkpoint_write")
                write_manifest(temporary)
                if path.exists():  # damaged, or this function had left it
                    _discard(path)
                fault_point("before_rename")
                os.rename(temporary, path)
                sync_folder(path.parent)
            processes.wait()
    finally:
        if processes.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
    return path


def _write_parts(training: Training, folder: Path) -> None:
    processes = training.processes
    weights = {name: whole_tensor(tensor) for name, tensor in training.model.state_dict().items()}
    if processes.is_first:
        save_weights(training.model, training.config.model, folder, tensors=weights)
        fault_point("within_checkpoint")
    processes.wait()
    _write_tensors(folder / _own_file(processes.rank), _own_tensors(training))
    remembered = training.optimizer.state_tensors()
    if training.is_sharded:
        _write_shards(remembered, folder / SHARDS_FOLDER)
    if processes.is_first:
        whole = {} if training.is_sharded else {f"optimizer.{name}": tensor for name, tensor in remembered.items()}
        _write_tensors(folder / TENSORS_FILE, whole | training.interval.state_tensors())
        write_text_atomic(folder / VALUES_FILE, json.dumps(_values(training), indent=2) + "\n")


def load_checkpoint(path: Path, config: RunConfig, processes: Processes) -> tuple[Training, tuple[str, ...]]:
    """The run as it was, and notes on what differs from then. Also sets the state of the global random generators.

    The processes may be more or fewer than those that wrote it, and shard or not. Raises ValueError or FileNotFoundError for a checkpoint
    that is damaged or of another format, before any of that.
    """
    values, tensors = _read_values(path / VALUES_FILE), _read_tensors(path / TENSORS_FILE)
    wrote = values["processes"]
    own = [_read_tensors(path / _own_file(rank)) for rank in _ranks_to_read(processes, wrote)]
    model, _ = load_weights(path, processes.device)
    training = Training.of(config, model, processes)
    training.step, training.data = values["step"], values.get("data", "")
    if values["mid_sequence"]:
        template = model.train().initial_state(config.train.batch_size // wrote)
        states = [from_named_tensors(template, part, "state") for part in own]
        training.state = states[0] if wrote == processes.world_size else _shared_anew(states, processes)
    training.interval.load_state_tensors_(tensors)
    parameters = training.optimizer.parameters
    remembered = _below("optimizer.", tensors)
    if shards := values["shards"]:
        remembered = {name: _empty(name, entry, parameters) for name, entry in shards.items()}
        read_shards_(remembered, path / SHARDS_FOLDER)
    else:
        remembered = {name: _placed(name, tensor, parameters) for name, tensor in remembered.items()}
    training.optimizer.load_state_tensors_(remembered)
    if wrote == processes.world_size:
        _restore_generators(own[0], processes.device)
    else:
        seed_generators(config.train.seed, training.step, processes.rank)
    return training, tuple(_differing(values, processes))


def read_shards_(tensors: dict[str, Tensor], folder: Path) -> None:
    """Fill `tensors`, of which each process may hold but a part, from the shards in `folder`. Raises ValueError where they do not fit."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process reads what several wrote
        try:
            distributed_checkpoint.load(tensors, checkpoint_id=folder)
        except CheckpointException as error:  # no Exception, and a list of what failed where
            raise ValueError(f"{folder}: the shards cannot be read: {_first_failure(error)}") from error


def _write_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    try:
        distributed_checkpoint.save(dict(tensors), checkpoint_id=folder)
    except CheckpointException as error:
        failure = _first_failure(error)
        number, words = getattr(failure, "errno", None) or errno.EIO, getattr(failure, "strerror", None) or str(failure)
        raise OSError(number, words, str(folder)) from error


def _first_failure(error: CheckpointException) -> BaseException:
    return next(iter(error.failures.values()))[0]


def seed_generators(seed: int, step: int, rank: int) -> None:
    """The random generators of a process that has no state of them to go on from."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1))


def prune_checkpoints(run_dir: Path, keep: int, step: int, best: int | None = None) -> None:
    """Remove all checkpoints up to that of `step` but the newest `keep` and that of the step `best`."""
    folders = sorted(path for path in (run_dir / CHECKPOINTS_FOLDER).glob("step_*") if path <= checkpoint_path(run_dir, step))
    for folder in folders[:-keep]:
        if best is None or folder != checkpoint_path(run_dir, best):
            _discard(folder)


def remove_leftovers(run_dir: Path) -> None:
    """Remove what killed processes left half-written in the run's directory and among its checkpoints."""
    for folder in (run_dir, run_dir / CHECKPOINTS_FOLDER):
        for path in folder.glob(f".*{TEMPORARY_SUFFIX}"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _discard(folder: Path) -> None:
    """Remove a folder under another name, so that none of half its files keeps the old one."""
    aside = temporary_name(folder)
    os.rename(folder, aside)
    shutil.rmtree(aside)


def _own_file(rank: int) -> str:
    return f"process_{rank:05d}.safetensors"


def _ranks_to_read(processes: Processes, wrote: int) -> list[int]:
    """Whose files this process needs: its own, or everybody's where the rows are shared out anew."""
    return [processes.rank] if processes.world_size == wrote else list(range(wrote))


def _shared_anew(states: list[ModelState], processes: Processes) -> ModelState:
    return split_rows(join_rows(states), processes.world_size)[processes.rank]


def _own_tensors(training: Training) -> dict[str, Tensor]:
    """What this process alone knows."""
    tensors = {} if training.state is None else named_tensors(training.state, "state")
    tensors["generator.cpu"] = torch.get_rng_state()
    if training.device.type == "cuda":
        tensors["generator.cuda"] = torch.cuda.get_rng_state(training.device)
    return tensors


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    write_bytes_atomic(path, safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def _empty(name: str, entry: dict[str, Any], parameters: dict[str, nn.Parameter]) -> Tensor:
    """Room for a tensor of the optimizer, placed as its parameter is."""
    parameter = parameters[name.rpartition(".")[0]]
    dtype, shape = getattr(torch, entry["dtype"]), tuple(entry["shape"])
    return torch.zeros_like(parameter, dtype=dtype) if shape == tuple(parameter.shape) else torch.zeros(shape, dtype=dtype)


def _placed(name: str, tensor: Tensor, parameters: dict[str, nn.Parameter]) -> Tensor:
    parameter = parameters.get(name.rpartition(".")[0])
    return tensor if parameter is None else like_parameter(tensor, parameter)


def _values(training: Training) -> dict[str, Any]:
    remembered = training.optimizer.state_tensors() if training.is_sharded else {}
    shards = {name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")} for name, t in sorted(remembered.items())}
    position = {"step": training.step, "mid_sequence": training.state is not None, "data": training.data, "shards": shards}
    return {"format": FORMAT, "version": VERSION} | position | _circumstances(training.processes)


def _circumstances(processes: Processes) -> dict[str, Any]:
    """What the bits of a result depend on, beside the configuration."""
    return {"processes": processes.world_size, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _differing(values: dict[str, Any], processes: Processes) -> list[str]:
    return [
        f"{name} was {values[name]}, is {now}: results agree, but not to the last bit"
        for name, now in _circumstances(processes).items()
        if values[name] != now
    ]


def _restore_generators(tensors: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(tensors["generator.cpu"])
    if device.type == "cuda" and "generator.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["generator.cuda"], device)


def _read_values(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text(encoding="utf-8"))
    found = (values.get("format"), values.get("version"))
    if found != (FORMAT, VERSION):
        raise ValueError(f"{path}: format {found[0]!r} version {found[1]!r}, expected {FORMAT!r} version {VERSION}")
    return values


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        # Cloned into memory of their own, which is aligned as that of any tensor.
        return {name: tensor.clone() for name, tensor in safetensors.torch.load_file(path).items()}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from error


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
