"""The training loop: starts a run or goes on with it, and tells whoever listens; it prints nothing.

A run is a directory: config.json, environment.json, data/, metrics.jsonl (a function of the configuration and the data alone),
timings.jsonl, tensorboard/, checkpoints/. Any run resumes from its directory, bit for bit on one machine, after being killed at any
instant. Under torchrun every process runs this loop; the first one alone speaks, and writes what is written once.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vqkit.config import differences, from_json, to_json
from vqkit.data import Batch, DataSummary, SequenceSampler, Split, pack, read_summary
from vqkit.files import TEMPORARY_SUFFIX, write_text_atomic
from vqkit.models import TransformerVQ
from vqkit.models.weights import broken_checkpoints, load_weights, newest_whole_checkpoint
from vqkit.train.allocator import reuse_freed_memory
from vqkit.train.checkpoint import (
    Training,
    checkpoint_path,
    load_checkpoint,
    prune_checkpoints,
    remove_leftovers,
    save_checkpoint,
    seed_generators,
)
from vqkit.train.config import RunConfig
from vqkit.train.diagnosis import where_not_finite
from vqkit.train.environment import environment, note_environment
from vqkit.train.evaluation import evaluate
from vqkit.train.events import CheckpointSaved, Evaluated, Event, Finished, Progress, Resumed, Skipped, Spiked, Started
from vqkit.train.faults import fault_point
from vqkit.train.initialization import initialize_codebooks_, starting_model
from vqkit.train.interruption import Interrupted, StopRequests
from vqkit.train.metrics import METRICS_FILE, JsonLines, cut_after, read_lines
from vqkit.train.pace import paced
from vqkit.train.parallel import Processes, joined
from vqkit.train.step import train_step
from vqkit.train.tensorboard import TENSORBOARD_FOLDER, TensorBoard
from vqkit.train.units import loss_unit, measured

CONFIG_FILE = "config.json"
DATA_FOLDER = "data"
TIMINGS_FILE = "timings.jsonl"

CHANGEABLE = {
    f"train.{name}"
    for name in ("steps", "minutes", "extra_steps", "log_every", "eval_every", "checkpoint_every", "keep_checkpoints", "device", "parallel")
}
"""Options that a run may be resumed with other values of: they say how long, how often and where, not what is computed."""


@dataclass(frozen=True)
class TrainResult:
    """A run that has done all its steps."""

    run_dir: Path
    step: int
    checkpoint: Path
    model: TransformerVQ
    """Whole on every process."""
    validation_bits: float | None
    """Of the last evaluation, in the unit of the data; None if the run has no validation split."""


def train(config: RunConfig, run_dir: str | os.PathLike[str], *, on_event: Callable[[Event], None] | None = None) -> TrainResult:
    """Start the run of `config` in `run_dir`, or go on with it from its newest whole checkpoint, to its last step.

    Raises ValueError if the directory holds something else or a run of another configuration, which it names field by field,
    and RuntimeError if the loss is no longer finite; nothing is overwritten.
    """
    run_dir = Path(run_dir)
    with joined(config.train.device) as processes, contextlib.ExitStack() as stack:
        device = processes.device
        if device.type == "cpu":
            reuse_freed_memory()
        _check_shares(config, processes)
        if processes.is_first:
            _check_directory(run_dir, config)
            if config.init_from is not None and newest_whole_checkpoint(run_dir) is None:
                starting_model(config)  # raises before anything is written
            config = paced(config, run_dir / CONFIG_FILE, device)
            _check_steps(run_dir, config)
            run_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_alone_in(run_dir))
            remove_leftovers(run_dir)
            try:
                pack(config.data, run_dir / DATA_FOLDER, on_event=on_event)
            except (OSError, ValueError):
                with contextlib.suppress(OSError):
                    run_dir.rmdir()  # only if nothing is in it: a run that was refused leaves no trace
                raise
            write_text_atomic(run_dir / CONFIG_FILE, to_json(config))
        config = processes.from_first(config)
        summary = read_summary(run_dir / DATA_FOLDER)
        # The run's random numbers are its own: whoever called finds the global generators as they were.
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        run = _Run(config, run_dir, processes, summary, on_event if on_event and processes.is_first else lambda event: None)
        stack.callback(run.close)
        return run.complete()


@contextlib.contextmanager
def _alone_in(run_dir: Path) -> Iterator[None]:
    """Keeps a second run out of `run_dir` while this one lives: a lock on the folder itself, which dies with the process."""
    try:
        import fcntl
    except ImportError:  # systems without such locks
        yield
        return
    descriptor = os.open(run_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{run_dir} is being trained by another process: wait for it, stop it, or use another directory") from None
        yield
    finally:
        os.close(descriptor)


def _check_shares(config: RunConfig, processes: Processes) -> None:
    """That the processes can share the batches. Raises ValueError."""
    world, train = processes.world_size, config.train
    if train.batch_size % (world * train.micro_batches):
        raise ValueError(
            f"train.batch_size = {train.batch_size}: must be a multiple of {world} processes times "
            f"train.micro_batches = {train.micro_batches}"
        )
    if train.eval_batch_size % world:
        raise ValueError(f"train.eval_batch_size = {train.eval_batch_size}: must be a multiple of the number of processes, {world}")


USUAL_LINES = 20
"""Log lines whose median is the usual loss."""


class _Run:
    """The loop at work in one process."""

    def __init__(self, config: RunConfig, run_dir: Path, processes: Processes, summary: DataSummary, emit: Callable[[Event], None]) -> None:
        self.config, self.run_dir, self.processes, self.emit = config, run_dir, processes, emit
        data = run_dir / DATA_FOLDER
        shares = {"rank": processes.rank, "world_size": processes.world_size}
        self.sampler = SequenceSampler(Split(data, "train"), config.data.sequence_len, config.train.batch_size, config.train.seed, **shares)
        self.validation = Split(data, "validation")
        self.unit = loss_unit(self.sampler.split)
        self.training = self._resume(summary) or self._start(summary)
        self.training.data = summary.content_hash
        step = self.training.step
        if processes.is_first:
            cut_after(run_dir / METRICS_FILE, step)
        processes.wait()
        lines = read_lines(run_dir / METRICS_FILE)
        self._usual = deque((line["loss"] for line in lines if line["kind"] == "train"), maxlen=USUAL_LINES)
        self._evaluations = [(measured(line)[1], line["step"]) for line in lines if line["kind"] == "validation"]
        self.metrics, self.timings, self.tensorboard = None, None, None
        if processes.is_first:
            note_environment(run_dir, step, environment(processes))
            self._prune()  # the last process may have died before it did
            self.metrics, self.timings = JsonLines(run_dir / METRICS_FILE), JsonLines(run_dir / TIMINGS_FILE)
            self.tensorboard = TensorBoard(run_dir / TENSORBOARD_FOLDER, step)
        if config.train.compile:
            self.training.model.compile(fullgraph=True)
        self._sequence: tuple[int, Batch] | None = None
        self._began, self._first_step = time.perf_counter(), step
        self._stepping = 0.0  # seconds in steps since the last log line
        self._logged = step

    def complete(self) -> TrainResult:
        """All steps that remain."""
        train_config, training = self.config.train, self.training
        total = train_config.total_steps
        if training.step == 0 and self.config.init_from is not None:
            self._save()  # from here on the run needs nothing but its own directory
        with StopRequests() as requests:
            while training.step < total:
                self._step()
                fault_point("after_step")
                if self._due(train_config.log_every):
                    self._log()
                best = bool(self.validation.num_tokens) and self._due(train_config.eval_every) and self._evaluate()
                stop = self._agreed(requests.signal_number)
                if self._due(train_config.checkpoint_every) or (best and train_config.keep_best) or stop:
                    self._save()
                if stop and training.step < total:
                    raise Interrupted(stop)
        self.emit(Finished(training.step, self.run_dir, time.perf_counter() - self._began))
        checkpoint = checkpoint_path(self.run_dir, training.step)
        return TrainResult(
            run_dir=self.run_dir,
            step=training.step,
            checkpoint=checkpoint,
            # Shards are of no use to one process alone, as all are after this.
            model=load_weights(checkpoint, training.device)[0].train() if training.is_sharded else training.model,
            validation_bits=self._evaluations[-1][0] if self._evaluations else None,
        )

    def close(self) -> None:
        with contextlib.ExitStack() as stack:  # each, whatever becomes of the others
            for file in (self.metrics, self.timings, self.tensorboard):
                if file is not None:
                    stack.callback(file.close)

    def _start(self, summary: DataSummary) -> Training:
        config = self.config
        torch.manual_seed(config.train.seed)
        training = Training.of(config, starting_model(config).to(self.processes.device), self.processes)
        if not self.processes.is_first:  # which goes on as if it were alone
            seed_generators(config.train.seed, 0, self.processes.rank)
        self.emit(
            Started(
                run_dir=self.run_dir,
                parameters=sum(parameter.numel() for parameter in training.model.parameters()),
                training_bytes=summary.train.bytes,
                validation_bytes=summary.validation.bytes,
                test_bytes=summary.test.bytes,
                data_hash=summary.corpus_hash,
                steps=config.train.total_steps,
                device=str(self.processes.device),
                processes=self.processes.world_size,
            )
        )
        return training

    def _resume(self, summary: DataSummary) -> Training | None:
        newest, broken = self.processes.from_first(_resumable(self.run_dir) if self.processes.is_first else None)
        if newest is None and not broken:
            return None
        if newest is None:
            raise ValueError(f"{self.run_dir} has no whole checkpoint to resume from ({'; '.join(broken)}); use another directory")
        training, notes = load_checkpoint(newest, self.config, self.processes)
        if training.data not in ("", summary.content_hash):
            raise ValueError(
                f"{self.run_dir / DATA_FOLDER} was packed from other data than {newest} was trained on "
                f"(hash {summary.content_hash}, not {training.data}): put those back, or use another directory"
            )
        self.emit(Resumed(self.run_dir, training.step, self.config.train.total_steps, (*broken, *notes)))
        return training

    def _step(self) -> None:
        training, config = self.training, self.config
        began = time.perf_counter()
        sequence, part = divmod(training.step, config.updates_per_sequence)
        batch = self._part_of_sequence(sequence, part)
        segments = config.data.segments == "isolate"
        model, reducer = training.model.train(), self.processes.reducer
        training.called.train()
        if training.step == 0 and config.model.codebook.init == "kmeans" and config.init_from is None:
            initialize_codebooks_(model, batch, segments=segments, reducer=reducer)
        state = model.initial_state(training.rows) if training.state is None else training.state
        try:
            with torch.autocast(self.processes.device.type, torch.bfloat16, enabled=config.train.precision == "bfloat16"):
                result = train_step(
                    model, training.optimizer, batch, state, training.step, segments=segments, reducer=reducer, called=training.called
                )
        except (ValueError, RuntimeError):
            self._check_finite()  # says what the error is a consequence of, if parameters are no numbers any more
            raise
        training.step += 1
        if bool(result.gradient_norm.isfinite()) and bool(result.losses.total.isfinite()):
            training.interval.add_(result, self.unit)
        else:
            self._pass_over(where_not_finite(model, batch, state, segments=segments))
            result = result._replace(state=state)
        training.state = None if training.step % config.updates_per_sequence == 0 else result.state
        self._stepping += time.perf_counter() - began

    def _pass_over(self, where: str) -> None:
        """The step just done changed nothing, as its numbers were not finite: end the run, or note it and go on."""
        step, train = self.training.step, self.config.train
        if train.not_finite == "stop":
            raise RuntimeError(
                f"step {step}: {where} is not finite; the step was not taken, and the checkpoints are as they were. "
                f"train.learning_rate = {train.learning_rate} may be too high, or train.warmup_steps = {train.warmup_steps} too few; "
                f'train.not_finite = "skip" goes on without such steps'
            )
        if self.metrics is not None:
            self.metrics.write({"step": step, "kind": "skipped", "where": where})
        self.emit(Skipped(step, where))

    def _agreed(self, signal_number: int) -> int:
        """The largest number that any process got, so that all stop after the same step."""
        if self.processes.world_size == 1:
            return signal_number
        asked = torch.zeros(self.processes.world_size, device=self.processes.device)
        asked[self.processes.rank] = signal_number
        self.processes.reducer.all_reduce_(asked)
        return int(asked.max())

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
        if not training.interval.steps:  # every step was passed over
            return
        summary = training.interval.summary(self.unit)
        training.interval.clear_()
        self._report_spike(summary["loss"])
        rate = training.optimizer.learning_rate(training.step - 1)
        self._record({"step": training.step, "kind": "train", "learning_rate": rate, **summary})
        tokens = (training.step - self._logged) * self.config.train.batch_size * self.config.update_len
        speed = tokens / max(self._stepping, 1e-9)
        elapsed = time.perf_counter() - self._began
        left = elapsed / (training.step - self._first_step) * (total - training.step)
        self._stepping, self._logged = 0.0, training.step
        if self.timings is not None:
            self.timings.write({"step": training.step, "session_seconds": elapsed, "tokens_per_second": speed})
        self.emit(
            Progress(
                step=training.step,
                steps=total,
                loss=summary["loss"],
                bits=summary[self.unit.key],
                unit=self.unit,
                tokens_per_second=speed,
                seconds_left=left,
                active_codes=summary.get("active_codes"),
                learning_rate=rate,
                gradient_norm=summary["gradient_norm"],
            )
        )

    def _record(self, line: dict[str, Any]) -> None:
        if self.metrics is not None and self.tensorboard is not None:
            self.metrics.write(line)
            self.tensorboard.write(line)

    def _report_spike(self, loss: float) -> None:
        usual = statistics.median(self._usual) if self._usual else loss
        if loss > self.config.train.spike_ratio * usual:
            self.emit(Spiked(self.training.step, loss, usual))
        self._usual.append(loss)

    def _evaluate(self) -> bool:
        """Measure the validation split; whether it is the best measurement so far."""
        self._check_finite()
        config, step = self.config, self.training.step
        with torch.autocast(self.processes.device.type, torch.bfloat16, enabled=config.train.precision == "bfloat16"):
            result = evaluate(
                self.training.model,
                self.validation,
                batch_size=config.train.eval_batch_size,
                segments=config.data.segments == "isolate",
                max_tokens=config.train.eval_tokens,
                sequence_len=config.eval_sequence_len,
                reducer=self.processes.reducer,
            )
        active, perplexity = result.worst_active_codes, result.mean_perplexity
        record = {result.unit.key: result.bits}
        if active is not None and perplexity is not None:
            record |= {"active_codes": active, "perplexity": perplexity}
        self._record({"step": step, "kind": "validation", **record})
        self._evaluations.append((result.bits, step))
        self.emit(Evaluated(step, result.bits, result.unit, active))
        return min(self._evaluations)[1] == step

    def _save(self) -> None:
        self._check_finite()
        if self.metrics is not None:
            self.metrics.sync()
        path = save_checkpoint(self.training, self.run_dir)
        self.emit(CheckpointSaved(self.training.step, path))
        if self.processes.is_first:
            fault_point("before_prune")
            self._prune()

    def _prune(self) -> None:
        best = min(self._evaluations)[1] if self._evaluations and self.config.train.keep_best else None
        prune_checkpoints(self.run_dir, self.config.train.keep_checkpoints, self.training.step, best)

    def _check_finite(self) -> None:
        training = self.training
        if not training.interval.is_finite() or not all(bool(p.isfinite().all()) for p in training.model.parameters()):
            raise RuntimeError(
                f"the loss or the parameters were no finite numbers any more at or before step {training.step}: "
                f"train.learning_rate = {self.config.train.learning_rate} may be too high, or train.warmup_steps = "
                f"{self.config.train.warmup_steps} too few; checkpoints before that are kept"
            )


def _resumable(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, and what is wrong with newer ones."""
    broken = [f"{path.name} passed over: {defect}" for path, defect in broken_checkpoints(run_dir)]
    return newest_whole_checkpoint(run_dir), broken


def _check_steps(run_dir: Path, config: RunConfig) -> None:
    """That a run is not asked to end before where it is; ValueError if it is."""
    end = checkpoint_path(run_dir, config.train.total_steps)
    later = [path for path in end.parent.glob("step_*") if path.name > end.name]
    if later and (newest := newest_whole_checkpoint(run_dir)) in later:
        step = int(newest.name.rpartition("_")[2])
        raise ValueError(f"train.steps = {config.train.steps}: {run_dir} has done {step}; must be at least that, or another directory")


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
    data = config.data.path
    if any(difference.path == "data.path" for difference in refused) and not Path(data).expanduser().exists():
        raise ValueError(f"data.path = {data!r}: there is no such file or folder; {run_dir} is a run of {found.data.path!r}")
    if refused:
        fields = ", ".join(map(str, refused))
        raise ValueError(f"{run_dir} is a run of another configuration: {fields}; use the same one, or another directory")
