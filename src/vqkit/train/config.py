"""Configuration of a run: plain dataclasses, without torch, so that help texts load fast.

A `RunConfig` is all that decides what a run computes; it is stored in the run's directory and compared on resuming.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vqkit.data.config import DataConfig
from vqkit.models.config import ModelConfig


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained. A step is one change of the parameters, from `update_len` positions of `batch_size` sequences."""

    steps: int = 1000
    """Optimizer steps over which the learning rate follows its schedule."""
    minutes: float | None = None
    """Most minutes of training: steps is lowered to what this machine does in that time, measured before the first; None = all steps."""
    extra_steps: int = 0
    """Further steps at the last learning rate of the schedule."""
    batch_size: int = 8
    """Sequences per step."""
    update_len: int | None = None
    """Positions per step; a shorter one than data.sequence_len carries the detached state to the next step. None = data.sequence_len."""
    micro_batches: int = 1
    """Parts that the batch is split into, one after another, to save memory; the result is that of the whole batch."""
    optimizer: Literal["adamw", "lion", "adafactor"] = "adamw"
    """Rule that makes updates of gradients; lion wants a tenth of adamw's learning rate, adafactor's is relative to each parameter."""
    learning_rate: float = 4e-3
    """Learning rate at its highest point."""
    betas: tuple[float, float] | None = None
    """Decay rates of the moments; None = 0.9 0.98 for adamw, 0.95 0.98 for lion; adafactor has none."""
    eps: float | None = None
    """Added to adamw's root mean square gradient or to adafactor's mean square; None = 1e-9 or 1e-30; lion has none."""
    momentum_dtype: Literal["parameter", "bfloat16"] = "parameter"
    """Type of lion's momentum: that of the parameter, or bfloat16 as in the official code, with half the memory."""
    schedule: Literal["cosine", "linear", "inverse_square_root", "constant"] = "cosine"
    """Course of the learning rate after warm-up; inverse_square_root falls as the root of warmup_steps / step."""
    warmup_steps: int = 100
    """Steps over which the learning rate grows linearly, from 0 in the very first step; 0 = no warm-up."""
    final_ratio: float = 0.1
    """Share of the learning rate that cosine and linear end at."""
    weight_decay: float = 0.0
    """Share of the decayed parameters that is taken off per step, whatever the learning rate is."""
    decayed: Literal["all_but_vectors", "all_but_outer_vectors"] = "all_but_vectors"
    """Parameters that weight_decay applies to: of any rank but 1 (official main), or vectors within layers as well (official optimized)."""
    clip: float | None = 1.0
    """Largest global norm of the gradients; None = no clipping."""
    commitment_weight: float = 1e-4
    """Weight of the commitment loss beside the language model loss."""
    seed: int = 0
    """Seed of the parameters and of the order of the data."""
    log_every: int = 10
    """Steps per line of metrics.jsonl."""
    eval_every: int = 500
    """Steps between evaluations on the validation split; 0 = only at the end."""
    eval_batch_size: int = 16
    """Pieces of the validation split that are read side by side."""
    eval_tokens: int | None = None
    """Most tokens of the validation split that one evaluation reads; None = all."""
    eval_context: Literal["carry", "sequence"] = "carry"
    """What evaluations see: the state carried through the split, or every sequence of data.sequence_len from a fresh state."""
    checkpoint_every: int = 500
    """Steps between checkpoints; 0 = only at the end."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    keep_best: bool = True
    """Write and keep a checkpoint of the best evaluation, too."""
    not_finite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradients are not finite: end the run with its checkpoints as they are, or go on without the step."""
    spike_ratio: float = 2.0
    """Report a loss of more than this many times the median of the last twenty logged ones."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several processes: whole parameters on each (DDP), or a share on each (FSDP2)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of matrix products: bfloat16 = mixed precision, with parameters, statistics and losses in float32."""
    compile: bool = False
    """Let torch.compile make one program of the model; costs a minute or so at the start."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto = CUDA where there is one."""

    def __post_init__(self) -> None:
        for name, least in _LEAST_INTEGERS.items():
            value = getattr(self, name)
            if value is None and name in ("update_len", "eval_tokens"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"train.{name} = {value!r}: must be an integer of at least {least}")
        if self.batch_size % self.micro_batches:
            raise ValueError(f"train.micro_batches = {self.micro_batches}: must divide train.batch_size = {self.batch_size}")
        if self.schedule in ("cosine", "linear") and self.warmup_steps >= self.steps:
            raise ValueError(f"train.warmup_steps = {self.warmup_steps}: must be less than train.steps = {self.steps}")
        for name in ("learning_rate", "eps"):
            value = getattr(self, name)
            if not (value is None and name == "eps") and not 0.0 < value < float("inf"):
                raise ValueError(f"train.{name} = {value}: must be positive and finite")
        for name in ("weight_decay", "final_ratio"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"train.{name} = {getattr(self, name)}: must be from 0 to 1")
        if self.betas is not None and (len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas)):
            raise ValueError(f"train.betas = {self.betas}: must be two numbers of at least 0 and below 1")
        if self.minutes is not None and not 0.0 < self.minutes < float("inf"):
            raise ValueError(f"train.minutes = {self.minutes}: must be positive and finite; None = all steps")
        if self.clip is not None and not self.clip > 0.0:
            raise ValueError(f"train.clip = {self.clip}: must be positive; None = no clipping")
        if not 0.0 <= self.commitment_weight < float("inf"):
            raise ValueError(f"train.commitment_weight = {self.commitment_weight}: must be 0 or positive, and finite")
        for name in ("keep_best", "compile"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"train.{name} = {getattr(self, name)!r}: must be True or False")
        if not self.spike_ratio > 1.0:
            raise ValueError(f"train.spike_ratio = {self.spike_ratio}: must be greater than 1")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"train.{name} = {getattr(self, name)!r}: must be one of {', '.join(choices)}")
        for name, without in (("betas", ("adafactor",)), ("eps", ("lion",)), ("momentum_dtype", ("adamw", "adafactor"))):
            value = getattr(self, name)
            if self.optimizer in without and value not in (None, "parameter"):
                raise ValueError(f'train.{name} = {value!r}: train.optimizer = "{self.optimizer}" has no such option; must be left out')

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.steps + self.extra_steps


_CHOICES = {
    "optimizer": ("adamw", "lion", "adafactor"),
    "momentum_dtype": ("parameter", "bfloat16"),
    "schedule": ("cosine", "linear", "inverse_square_root", "constant"),
    "decayed": ("all_but_vectors", "all_but_outer_vectors"),
    "device": ("auto", "cpu", "cuda"),
    "not_finite": ("stop", "skip"),
    "parallel": ("ddp", "fsdp"),
    "precision": ("float32", "bfloat16"),
    "eval_context": ("carry", "sequence"),
}

_LEAST_INTEGERS = {
    "steps": 1,
    "extra_steps": 0,
    "batch_size": 1,
    "update_len": 1,
    "micro_batches": 1,
    "warmup_steps": 0,
    "seed": 0,
    "log_every": 1,
    "eval_every": 0,
    "eval_batch_size": 1,
    "eval_tokens": 1,
    "checkpoint_every": 0,
    "keep_checkpoints": 1,
}


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run computes."""

    recipe: str
    """Name of the recipe that this configuration began as."""
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    init_from: str | None = None
    """Run, checkpoint or export folder whose weights and codebooks the run starts with, under a new optimizer; None = random ones."""

    def __post_init__(self) -> None:
        if self.init_from is not None and not self.init_from:
            raise ValueError("init_from = '': must be the path of a run, checkpoint or export folder; None = random weights")
        if self.data.sequence_len % self.update_len:
            raise ValueError(f"train.update_len = {self.update_len}: must divide data.sequence_len = {self.data.sequence_len}")
        if self.model.vocab_size < self.data.vocab_size:
            raise ValueError(f"model.vocab_size = {self.model.vocab_size}: these data need at least {self.data.vocab_size}")
        if self.model.input != "tokens":
            raise ValueError(f'model.input = "{self.model.input}": a run trains on tokens; features are for use from Python')

    @property
    def update_len(self) -> int:
        """Positions per step, `train.update_len` or else the whole sequence."""
        return self.train.update_len or self.data.sequence_len

    @property
    def eval_sequence_len(self) -> int | None:
        """Length of the sequences that an evaluation reads from a fresh state; None where it carries the state."""
        return self.data.sequence_len if self.train.eval_context == "sequence" else None

    @property
    def updates_per_sequence(self) -> int:
        """Steps that one batch of sequences lasts for."""
        return self.data.sequence_len // self.update_len
