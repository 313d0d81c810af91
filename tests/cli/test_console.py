"""What is shown: progress with and without a terminal, tables, durations, text that could steer a terminal."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from vqkit.cli.console import TrainingView, duration, write_text
from vqkit.cli.tables import table
from vqkit.data.events import Checking, Packing
from vqkit.train.events import Finished, Progress, Resumed
from vqkit.train.units import LossUnit


def _progress(step: int, steps: int = 100) -> Progress:
    return Progress(step, steps, 1.0, 2.125, LossUnit("bits per byte"), 12_345.6, 67.0, 0.953, 1e-3, 0.5)


def test_without_a_terminal_a_line_every_few_seconds_and_at_the_end() -> None:
    out, now = io.StringIO(), 0.0
    with TrainingView(Console(file=out, width=200), clock=lambda: now) as view:
        for step in range(1, 101):
            now += 1.0
            view(_progress(step))
    lines = out.getvalue().splitlines()
    assert [int(line.split("/")[0].removeprefix("step ")) for line in lines] == [*range(1, 100, 5), 100]
    assert lines[0] == "step 1/100  2.125 bits/byte  12,346 tokens/s  1m07s left  95% codes active"


def test_a_terminal_gets_one_bar() -> None:
    out = io.StringIO()
    with TrainingView(Console(file=out, width=200, force_terminal=True, color_system=None)) as view:
        for step in (1, 2, 50, 100):
            view(_progress(step))
    shown = out.getvalue()
    for text in ("step 1/100", "step 50/100", "step 100/100", "2.125 bits/byte", "12,346 tokens/s", "1m07s left", "95% codes active"):
        assert text in shown
    assert shown.count("\n") == 1, "each state of the bar overwrites the one before"


@pytest.mark.parametrize(("event", "what"), [(Packing, "packing"), (Checking, "checking the data")])
def test_what_takes_long_before_training_is_shown(event: type[Packing | Checking], what: str) -> None:
    out, now = io.StringIO(), 0.0
    with TrainingView(Console(file=out, width=200), clock=lambda: now) as view:
        for done in range(1_000, 13_000, 1_000):
            view(event(done, 12_000))
            now += 1.0
        view(_progress(1))
    lines = out.getvalue().splitlines()
    assert lines[:2] == [f"{what}  6,000 of 12,000", f"{what}  11,000 of 12,000"] and lines[2].startswith("step 1/100")
    out = io.StringIO()
    with TrainingView(Console(file=out, width=200, force_terminal=True, color_system=None)) as view:
        view(event(1_000, 4_000))
        view(_progress(1))
    assert what in out.getvalue() and "1,000 of 4,000" in out.getvalue() and "step 1/100" in out.getvalue()


def test_notes_of_a_resumed_run_are_shown_as_they_are() -> None:
    out = io.StringIO()
    view = TrainingView(Console(file=out, width=200))
    view(Resumed(Path("run[1]"), 40, 100, ("step_00000050 passed over: [bold]torn[/bold]",)))
    view(Finished(100, Path("run[1]"), 3.0))
    assert out.getvalue() == "going on with run[1] after step 40 of 100\nnote: step_00000050 passed over: [bold]torn[/bold]\n"
    assert (view.steps_done, view.seconds) == (60, 3.0)


def test_columns_are_aligned() -> None:
    assert table(("", "bits"), [("xz", "1.6"), ("order-1", "12.34")]) == "          bits\nxz         1.6\norder-1  12.34"


@pytest.mark.parametrize(("seconds", "text"), [(-3, "0s"), (0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (3599.7, "1h00m"), (7510, "2h05m")])
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_text_cannot_steer_a_terminal_and_goes_unchanged_anywhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for out, expected in ((Terminal(), "[red]\ufffd[31m\n\t\u00e9\ufffd"), (io.StringIO(), "[red]\x1b[31m\n\t\u00e9\x07")):
        monkeypatch.setattr(sys, "stdout", out)
        write_text("[red]\x1b[31m\n\t\u00e9\x07")
        assert out.getvalue() == expected


def test_text_that_the_output_cannot_encode_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    write_text("r\u00eave")
    assert raw.getvalue() == b"r?ve"
