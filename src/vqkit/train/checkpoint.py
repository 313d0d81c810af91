"""Checkpoints: everything that changes while a run goes on, in a folder that is whole or absent.

A checkpoint is written under a temporary name, its manifest last, and then renamed; older ones are removed after that. So a run that
is killed at any instant finds a whole one, and goes on from it as if nothing had happened.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from vqkit.files import TEMPORARY_SUFFIX, sync_folder, temporary_name, write_bytes_atomic, write_text_atomic
from vqkit.models import TransformerVQ
from vqkit.models.transformer import ModelState
from vqkit.models.weights import CHECKPOINTS_FOLDER, is_whole, load_weights, save_weights, write_manifest
from vqkit.train.config import RunConfig
from vqkit.train.faults import fault_point
from vqkit.train.metrics import Interval
from vqkit.train.optimizer import Optimizer
from vqkit.train.state import from_named_tensors, named_tensors

TENSORS_FILE = "training.safetensors"
VALUES_FILE = "training.json"
FORMAT = "vqkit-training"
VERSION = 1


@dataclass
class Training:
    """All that changes while a run goes on; the position in the data is a function of `step`."""

    config: RunConfig
    model: TransformerVQ
    optimizer: Optimizer
    interval: Interval
    step: int = 0
    """Steps done."""
    state: ModelState | None = None
    """What the next step starts from in the middle of a sequence; None where a sequence begins."""

    @classmethod
    def of(cls, config: RunConfig, model: TransformerVQ) -> Training:
        """A run of `model` that has done nothing yet."""
        device = next(model.parameters()).device
        shapes = [quantizer.codebook.shape[:2] for quantizer in model.quantizers()]
        return cls(config, model, Optimizer(model.named_parameters(), config.train), Interval(shapes, device))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps stands."""
    return run_dir / CHECKPOINTS_FOLDER / f"step_{step:08d}"


def save_checkpoint(training: Training, run_dir: Path) -> Path:
    """Write RUN/checkpoints/step_XXXXXXXX and return it; one of that step that is whole already is left as it is."""
    path = checkpoint_path(run_dir, training.step)
    if path.exists() and is_whole(path):
        return path
    fault_point("before_checkpoint")
    path.parent.mkdir(exist_ok=True)
    temporary = temporary_name(path)
    try:
        save_weights(training.model, training.config.model, temporary)
        fault_point("within_checkpoint")
        write_bytes_atomic(temporary / TENSORS_FILE, safetensors.torch.save(_tensors(training)))
        write_text_atomic(temporary / VALUES_FILE, json.dumps(_values(training), indent=2) + "\n")
        fault_point("after_checkpoint_write")
        write_manifest(temporary)
        if path.exists():  # damaged, or this function had left it
            _discard(path)
        fault_point("before_rename")
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(path.parent)
    return path


def load_checkpoint(path: Path, config: RunConfig, device: torch.device) -> tuple[Training, tuple[str, ...]]:
    """The run as it was, and notes on what differs from then. Also sets the state of the global random generators.

    Raises ValueError or FileNotFoundError for a checkpoint that is damaged or of another format, before any of that.
    """
    values, tensors = _read_values(path / VALUES_FILE), _read_tensors(path / TENSORS_FILE)
    model, _ = load_weights(path, device)
    training = Training.of(config, model)
    training.step = values["step"]
    if values["mid_sequence"]:
        template = model.train().initial_state(config.train.batch_size)
        training.state = from_named_tensors(template, tensors, "state")
    training.interval.load_state_tensors_(tensors)
    training.optimizer.load_state_tensors_(_below("optimizer.", tensors))
    _restore_generators(tensors, device)
    return training, tuple(_differing(values))


def prune_checkpoints(run_dir: Path, keep: int, step: int) -> None:
    """Remove all checkpoints up to that of `step` but the newest `keep`."""
    folders = sorted(path for path in (run_dir / CHECKPOINTS_FOLDER).glob("step_*") if path <= checkpoint_path(run_dir, step))
    for folder in folders[:-keep]:
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


def _tensors(training: Training) -> dict[str, Tensor]:
    tensors = {f"optimizer.{name}": tensor for name, tensor in training.optimizer.state_tensors().items()}
    tensors |= training.interval.state_tensors()
    if training.state is not None:
        tensors |= named_tensors(training.state, "state")
    tensors["generator.cpu"] = torch.get_rng_state()
    if training.device.type == "cuda":
        tensors["generator.cuda"] = torch.cuda.get_rng_state(training.device)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _values(training: Training) -> dict[str, Any]:
    return {"format": FORMAT, "version": VERSION, "step": training.step, "mid_sequence": training.state is not None} | _circumstances()


def _circumstances() -> dict[str, Any]:
    """What the bits of a result depend on, beside the configuration."""
    return {"threads": torch.get_num_threads(), "torch": torch.__version__}


def _differing(values: dict[str, Any]) -> list[str]:
    return [
        f"{name} was {values[name]}, is {now}: results agree, but not to the last bit"
        for name, now in _circumstances().items()
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
