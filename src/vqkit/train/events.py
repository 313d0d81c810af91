"""What the training loop tells whoever watches it; the loop itself prints nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vqkit.data.events import DataEvent
from vqkit.train.units import LossUnit


@dataclass(frozen=True)
class Started:
    """A new run begins."""

    run_dir: Path
    parameters: int
    training_bytes: int
    validation_bytes: int
    test_bytes: int
    data_hash: str
    steps: int
    device: str
    processes: int


@dataclass(frozen=True)
class Resumed:
    """A run goes on from a checkpoint; `notes` say what is unusual: a damaged checkpoint passed over, another number of threads."""

    run_dir: Path
    step: int
    steps: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Progress:
    """The steps since the last `Progress`: means over them, and the course from here."""

    step: int
    steps: int
    loss: float
    bits: float
    unit: LossUnit
    """Of `bits`."""
    tokens_per_second: float
    seconds_left: float
    active_codes: float | None
    """Share of codes in use in the worst head of the worst layer; None for a model without codebooks."""
    learning_rate: float
    gradient_norm: float


@dataclass(frozen=True)
class Evaluated:
    """The validation split, or the part of it that the configuration asks for, was read."""

    step: int
    bits: float
    unit: LossUnit
    """Of `bits`."""
    active_codes: float | None


@dataclass(frozen=True)
class Skipped:
    """A step was not taken, as its loss or gradients were not finite."""

    step: int
    where: str
    """The layer or parameter where that began."""


@dataclass(frozen=True)
class Spiked:
    """The loss since the last log line is far above the usual one."""

    step: int
    loss: float
    usual: float


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint is whole and has its final name."""

    step: int
    path: Path


@dataclass(frozen=True)
class Finished:
    """The run has done all its steps."""

    step: int
    run_dir: Path
    seconds: float


Event = Started | Resumed | Progress | Evaluated | Skipped | Spiked | CheckpointSaved | Finished | DataEvent
"""Those of the data come first, while they are packed."""
