"""The training loop: starts a run or goes on with it, and tells whoever listens; it prints nothing.

A run is a directory: config.json, data/, metrics.jsonl (a function of the configuration and the data alone), timings.jsonl,
checkpoints/. Any run resumes from its directory, bit for bit on one machine, after being killed at any instant.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from vqkit.config import differences, from_json, to_json
from vqkit.data import Batch, DataSummary, SequenceSampler, Split, pack
from vqkit.files import TEMPORARY_SUFFIX, write_text_atomic
from vqkit.models import TransformerVQ
from vqkit.models.weights import broken_checkpoints, newest_whole_checkpoint
from vqkit.train.allocator import reuse_freed_memory
from vqkit.train.checkpoint import Training, checkpoint_path, load_checkpoint, prune_checkpoints, remove_leftovers, save_checkpoint
from vqkit.train.config import RunConfig
from vqkit.train.evaluation import evaluate
from vqkit.train.events import CheckpointSaved, Evaluated, Event, Finished, Progress, Resumed, Started
from vqkit.train.faults import fault_point
from vqkit.train.initialization import initialize_codebooks_, starting_model
from vqkit.train.metrics import METRICS_FILE, JsonLines, cut_after, read_lines
from vqkit.train.pace import paced
from vqkit.train.step import train_step

CONFIG_FILE = "config.json"
DATA_FOLDER = "data"
TIMINGS_FILE = "timings.jsonl"

CHANGEABLE = {
    f"train.{name}"
    for name in ("steps", "minutes", "extra_steps", "log_every", "eval_every", "checkpoint_every", "keep_checkpoints", "device")
}
"""Options that a run may be resumed with other values of: they say how long, how often and where, not what is computed."""


@dataclass(frozen=True)
class TrainResult:
    """A run that has done all its steps."""

    run_dir: Path
    step: int
    checkpoint: Path
    model: TransformerVQ
    validation_bits_per_byte: float | None
    """Of the last evaluation; None if the run has no validation split."""


def train(config: RunConfig, run_dir: str | os.PathLike[str], *, on_event: Callable[[Event], None] | None = None) -> TrainResult:
    """Start the run of `config` in `run_dir`, or go on with it from its newest whole checkpoint, to its last step.

    Raises ValueError if the directory holds something else or a run of another configuration, which it names field by field,
    and RuntimeError if the loss is no longer finite; nothing is overwritten.
    """
    run_dir = Path(run_dir)
    _check_directory(run_dir, config)
    device = resolve_device(config.train.device)
    if device.type == "cpu":
        reuse_freed_memory()
    if config.init_from is not None and newest_whole_checkpoint(run_dir) is None:
        starting_model(config)  # raises before anything is written
    config = paced(config, run_dir / CONFIG_FILE, device)
    run_dir.mkdir(parents=True, exist_ok=True)
    remove_leftovers(run_dir)
    summary = pack(config.data, run_dir / DATA_FOLDER)
    write_text_atomic(run_dir / CONFIG_FILE, to_json(config))
    # The run's random numbers are its own: whoever called finds the global generators as they were.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        run = _Run(config, run_dir, device, summary, on_event or (lambda event: None))
        try:
            return run.complete()
        finally:
            run.close()


def resolve_device(name: str) -> torch.device:
    """The device of `train.device`. Raises ValueError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError('train.device = "cuda": torch finds no CUDA device; use "auto" or "cpu"')
    return torch.device(name)


class _Run:
    """The loop at work in one process."""

    def __init__(self, config: RunConfig, run_dir: Path, device: torch.device, summary: DataSummary, emit: Callable[[Event], None]) -> None:
        self.config, self.run_dir, self.emit = config, run_dir, emit
        data = run_dir / DATA_FOLDER
        self.sampler = SequenceSampler(Split(data, "train"), config.data.sequence_len, config.train.batch_size, config.train.seed)
        self.validation = Split(data, "validation")
        self.training = self._resume(device) or self._start(device, summary)
        cut_after(run_dir / METRICS_FILE, self.training.step)
        self.metrics, self.timings = JsonLines(run_dir / METRICS_FILE), JsonLines(run_dir / TIMINGS_FILE)
        self._sequence: tuple[int, Batch] | None = None
        self._began, self._first_step = time.perf_counter(), self.training.step
        self._stepping = 0.0  # seconds in steps since the last log line
        self._logged = self.training.step

    def complete(self) -> TrainResult:
        """All steps that remain."""
        train_config, training = self.config.train, self.training
        total = train_config.total_steps
        if training.step == 0 and self.config.init_from is not None:
            self._save()  # from here on the run needs nothing but its own directory
        while training.step < total:
            self._step()
            fault_point("after_step")
            if self._due(train_config.log_every):
                self._log()
            if self.validation.num_tokens and self._due(train_config.eval_every):
                self._evaluate()
            if self._due(train_config.checkpoint_every):
                self._save()
        self.emit(Finished(training.step, self.run_dir, time.perf_counter() - self._began))
        evaluations = [line for line in read_lines(self.run_dir / METRICS_FILE) if line["kind"] == "validation"]
        return TrainResult(
            run_dir=self.run_dir,
            step=training.step,
            checkpoint=checkpoint_path(self.run_dir, training.step),
            model=training.model,
            validation_bits_per_byte=evaluations[-1]["bits_per_byte"] if evaluations else None,
        )

    def close(self) -> None:
        self.metrics.close()
        self.timings.close()

    def _start(self, device: torch.device, summary: DataSummary) -> Training:
        config = self.config
        torch.manual_seed(config.train.seed)
        training = Training.of(config, starting_model(config).to(device))
        self.emit(
            Started(
                run_dir=self.run_dir,
                parameters=sum(parameter.numel() for parameter in training.model.parameters()),
                training_bytes=summary.train.bytes,
                validation_bytes=summary.validation.bytes,
                test_bytes=summary.test.bytes,
                data_hash=summary.corpus_hash,
                steps=config.train.total_steps,
                device=str(device),
            )
        )
        return training

    def _resume(self, device: torch.device) -> Training | None:
        broken = [f"{path.name} passed over: {defect}" for path, defect in broken_checkpoints(self.run_dir)]
        newest = newest_whole_checkpoint(self.run_dir)
        if newest is None and not broken:
            return None
        if newest is None:
            raise ValueError(f"{self.run_dir} has no whole checkpoint to resume from ({'; '.join(broken)}); use another directory")
        training, notes = load_checkpoint(newest, self.config, device)
        prune_checkpoints(self.run_dir, self.config.train.keep_checkpoints, training.step)  # the last process may have died before it did
        self.emit(Resumed(self.run_dir, training.step, self.config.train.total_steps, (*broken, *notes)))
        return training

    def _step(self) -> None:
        training, config = self.training, self.config
        began = time.perf_counter()
        sequence, part = divmod(training.step, config.updates_per_sequence)
        batch = self._part_of_sequence(sequence, part)
        segments = config.data.segments == "isolate"
        if training.step == 0 and config.model.codebook.init == "kmeans" and config.init_from is None:
            initialize_codebooks_(training.model, batch, segments=segments)
        training.model.train()
        state = training.model.initial_state(config.train.batch_size) if training.state is None else training.state
        try:
            result = train_step(training.model, training.optimizer, batch, state, training.step, segments=segments)
        except (ValueError, RuntimeError):
            self._check_finite()  # says what the error is a consequence of, if parameters are no numbers any more
            raise
        training.interval.add_(result, batch)
        training.step += 1
        training.state = None if training.step % config.updates_per_sequence == 0 else result.state
        self._stepping += time.perf_counter() - began

    def _part_of_sequence(self, sequence: int, part: int) -> Batch:
        """Part number `part`, of `update_len` positions, of sequences number `sequence`."""
        if self._sequence is None or self._sequence[0] != sequence:
            self._sequence = sequence, self.sampler.batch(sequence).to(self.training.device)
        length = self.config.update_len
        return Batch(*(field[:, part * length : (part + 1) * length] for field in self._sequence[1]))

    def _due(self, every: int) -> bool:
        step = self.training.step
        return step == self.config.train.total_steps or (every > 0 and step % every == 0)

    def _log(self) -> None:
        training, total = self.training, self.config.train.total_steps
        self._check_finite()
        summary = training.interval.summary()
        training.interval.clear_()
        rate = training.optimizer.learning_rate(training.step - 1)
        self.metrics.write({"step": training.step, "kind": "train", "learning_rate": rate, **summary})
        tokens = (training.step - self._logged) * self.config.train.batch_size * self.config.update_len
        speed = tokens / max(self._stepping, 1e-9)
        elapsed = time.perf_counter() - self._began
        left = elapsed / (training.step - self._first_step) * (total - training.step)
        self._stepping, self._logged = 0.0, training.step
        self.timings.write({"step": training.step, "session_seconds": elapsed, "tokens_per_second": speed})
        self.emit(
            Progress(
                step=training.step,
                steps=total,
                loss=summary["loss"],
                bits_per_byte=summary["bits_per_byte"],
                tokens_per_second=speed,
                seconds_left=left,
                active_codes=summary.get("active_codes"),
                learning_rate=rate,
                gradient_norm=summary["gradient_norm"],
            )
        )

    def _evaluate(self) -> None:
        self._check_finite()
        config, step = self.config, self.training.step
        result = evaluate(
            self.training.model,
            self.validation,
            batch_size=config.train.eval_batch_size,
            segments=config.data.segments == "isolate",
            max_tokens=config.train.eval_tokens,
        )
        active, perplexity = result.worst_active_codes, result.mean_perplexity
        record = {"bits_per_byte": result.bits_per_byte}
        if active is not None and perplexity is not None:
            record |= {"active_codes": active, "perplexity": perplexity}
        self.metrics.write({"step": step, "kind": "validation", **record})
        self.emit(Evaluated(step, result.bits_per_byte, active))

    def _save(self) -> None:
        self._check_finite()
        self.metrics.sync()
        path = save_checkpoint(self.training, self.run_dir)
        self.emit(CheckpointSaved(self.training.step, path))
        fault_point("before_prune")
        prune_checkpoints(self.run_dir, self.config.train.keep_checkpoints, self.training.step)

    def _check_finite(self) -> None:
        training = self.training
        if not training.interval.is_finite() or not all(bool(p.isfinite().all()) for p in training.model.parameters()):
            raise RuntimeError(
                f"the loss or the parameters were no finite numbers any more at or before step {training.step}: "
                f"train.learning_rate = {self.config.train.learning_rate} may be too high, or train.warmup_steps = "
                f"{self.config.train.warmup_steps} too few; checkpoints before that are kept"
            )


def _check_directory(run_dir: Path, config: RunConfig) -> None:
    """That `run_dir` is absent, empty or the run of `config`; ValueError if it is not."""
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"{run_dir} is a file: a run needs a directory that is its own, empty or absent")
    if not run_dir.exists():
        return
    stored = run_dir / CONFIG_FILE
    if not stored.exists():
        # A run that was killed before it wrote its configuration has at most its data.
        others = [p.name for p in sorted(run_dir.iterdir()) if p.name != DATA_FOLDER and not p.name.endswith(TEMPORARY_SUFFIX)]
        if others:
            raise ValueError(f"{run_dir} holds {others[0]} and no {CONFIG_FILE}: a run needs a directory that is its own, empty or absent")
        return
    found = from_json(RunConfig, stored.read_text(encoding="utf-8"), where=str(stored))
    refused = [difference for difference in differences(found, config) if difference.path not in CHANGEABLE]
    if refused:
        fields = ", ".join(map(str, refused))
        raise ValueError(f"{run_dir} is a run of another configuration: {fields}; use the same one, or another directory")
