"""How fetching and packing look: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar

from vqkit.cli.console import LINE_SECONDS
from vqkit.data.events import Checking, DataEvent, Downloading, Note, Packing


class DataView:
    """Shows the events of the data. Use it as a context. Events may come from several threads."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console or Console(), clock
        self._lock = threading.Lock()
        self._last_line = -LINE_SECONDS
        figures = TextColumn("{task.description}", markup=False)
        self._bar = Bar(figures, BarColumn(), console=self._console, transient=True) if self._console.is_terminal else None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> DataView:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, event: DataEvent) -> None:
        with self._lock:
            match event:
                case Note():
                    self._say(event.text)
                case Packing():
                    self._progress("packing", event.done, event.total)
                case Checking():
                    self._progress("checking", event.done, event.total)
                case Downloading():
                    self._progress(event.name, event.done, event.total)

    def _progress(self, name: str, done: int, total: int | None) -> None:
        of = f" of {total:,} ({done / max(total, 1):.0%})" if total is not None else ""
        text = f"{name}: {done:,}{of}"
        if self._bar:
            if name not in self._tasks:
                self._tasks[name] = self._bar.add_task(text, total=total)
            self._bar.update(self._tasks[name], completed=done, description=text)
            if done == total:
                self._bar.remove_task(self._tasks.pop(name))
        elif self._clock() - self._last_line >= LINE_SECONDS:
            self._last_line = self._clock()
            self._say(text)

    def _say(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)
