"""How things look: the live bar of a training run, tables, and text of unknown content on a terminal."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar

from vqkit.data import read_summary
from vqkit.data.events import Checking, Note, Packing
from vqkit.models.weights import broken_checkpoints, newest_whole_checkpoint
from vqkit.train.events import CheckpointSaved, Evaluated, Event, Finished, Progress, Resumed, Skipped, Spiked, Started

LINE_SECONDS = 5.0
"""Seconds between lines of progress where there is no terminal for a bar."""


class TrainingView:
    """Shows the events of a training run: a bar on a terminal, a line every few seconds elsewhere. Use it as a context."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console()
        self._clock = clock
        self._last_line = -LINE_SECONDS
        self._working_since: float | None = None
        self.seconds = 0.0
        """What `Finished` says."""
        self.steps_done = 0
        """Steps since the run was started or resumed."""
        self._first_step = 0
        what, figures = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[figures]}", markup=False)
        self._bar = Bar(what, BarColumn(), figures, console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._task: TaskID | None = None

    def __enter__(self) -> TrainingView:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, event: Event) -> None:
        match event:
            case Note():
                self._say(event.text)
            case Packing():
                self._before_training("packing", event)
            case Checking():
                self._before_training("checking the data", event)
            case Started():
                data = read_summary(event.run_dir / "data")
                skipped = data.empty_files + data.short_files
                note = f"; {skipped:,} more skipped, empty or short" if skipped else ""
                self._say(f"corpus: {data.files:,} files of {data.path}{note}")
                self._say(f"corpus hash {event.data_hash}")
                what = "bytes" if data.train.bytes else "tokens"
                sizes = (getattr(split, what) for split in (data.train, data.validation, data.test))
                self._say("{}: {:,} to train, {:,} to validate, {:,} to test".format(what, *sizes))
                self._say(f"model: {event.parameters:,} parameters, {event.steps:,} steps, on {_places(event)}")
            case Resumed():
                self._say(f"going on with {event.run_dir} after step {event.step:,} of {event.steps:,}")
                for note in event.notes:
                    self._say(f"note: {note}")
                self._first_step = event.step
            case Progress():
                self._progress(event)
            case Evaluated():
                self._say(f"step {event.step:,}: validation {event.bits:.3f} {event.unit.short}{_activity(event, ', ')}")
            case Skipped():
                self._say(f"step {event.step:,} was not taken: {event.where} was not finite")
            case Spiked():
                self._say(f"step {event.step:,}: the loss is {event.loss:.3f}, where {event.usual:.3f} was usual")
            case CheckpointSaved():
                pass
            case Finished():
                self.seconds, self.steps_done = event.seconds, event.step - self._first_step

    def _progress(self, event: Progress) -> None:
        figures = (
            f"{event.bits:.3f} {event.unit.short}  {event.tokens_per_second:,.0f} tokens/s  "
            f"{duration(event.seconds_left)} left{_activity(event, '  ')}"
        )
        if self._bar:
            self._draw(self._bar, f"step {event.step:,}/{event.steps:,}", event.step, event.steps, figures)
        elif self._clock() - self._last_line >= LINE_SECONDS or event.step == event.steps:
            self._last_line = self._clock()
            self._say(f"step {event.step:,}/{event.steps:,}  {figures}")

    def _before_training(self, what: str, event: Packing | Checking) -> None:
        figures = f"{event.done:,} of {event.total:,}"
        if self._bar:
            self._draw(self._bar, what, event.done, event.total, figures)
        elif self._working_since is None:
            self._working_since = self._clock()  # what is soon done needs no words
        elif self._clock() - self._working_since >= LINE_SECONDS:
            self._working_since = self._clock()
            self._say(f"{what}  {figures}")

    def _draw(self, bar: Bar, what: str, done: int, total: int, figures: str) -> None:
        if self._task is None:
            self._task = bar.add_task(what, figures=figures)
        bar.update(self._task, description=what, completed=done, total=total, figures=figures)
        bar.refresh()

    def _say(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)


def _places(event: Started) -> str:
    return event.device if event.processes == 1 else f"{event.processes} processes, {event.device}"


def _activity(event: Progress | Evaluated, separator: str) -> str:
    """The share of active codes; nothing for a model without codebooks."""
    return "" if event.active_codes is None else f"{separator}{event.active_codes:.0%} codes active"


def duration(seconds: float) -> str:
    """Seconds in words that are short: 42s, 3m05s, 2h10m."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def write_text(text: str) -> None:
    """Text of unknown content to standard output, at once; on a terminal without the control characters that could steer it."""
    out = sys.stdout
    if isinstance(out, io.TextIOWrapper):
        out.reconfigure(errors="replace")
    if out.isatty():
        text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    out.write(text)
    out.flush()


def note_broken_checkpoints(path: str | os.PathLike[str]) -> None:
    """Say on standard error which checkpoints of a run were passed over, being damaged, and which one is used."""
    broken = broken_checkpoints(path)
    if broken:
        used = newest_whole_checkpoint(path)
        what = "; ".join(f"{folder.name}: {defect}" for folder, defect in broken)
        print(f"vqkit: note: {what}; using {used.name if used else 'none'}", file=sys.stderr)
