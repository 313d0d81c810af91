"""Runs in processes of their own, one or several ranks, killed at random instants and started again until they are done.

A kill is SIGKILL from outside, of one rank or of all. Half of them fall anywhere, the others while a checkpoint is being written. When one
rank is killed the others are asked to end, as torchrun does.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from torch.distributed import TCPStore

from tiny_runs import differing, train_in_process
from vqkit.train.config import RunConfig

GRACE = 60.0
"""Seconds after which a rank that was asked to end counts as hanging; twice those of torchrun."""
LONGEST = 300.0
"""Seconds that a run of one or two may take."""
HUNG = 137
ATTEMPTS = 4
"""Kills of one run at most, before it is let through to its end."""


class Launcher:
    """Starts the ranks of a run from a warm process, so that each costs what its steps cost."""

    def __init__(self, ranks: int = 1) -> None:
        self.ranks = ranks
        self._meeting: TCPStore | None = None
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["pytest", "torch._dynamo", "vqkit.train.loop", "vqkit.models.weights", "vqkit.ops.kmeans"])
        warm = self._context.Process(target=str)  # the server that all are forked from is up and warm after it
        warm.start()
        warm.join()

    def __call__(self, config: RunConfig, run_dir: Path, *, ranks: int | None = None, fault: str | None = None) -> list[int | None]:
        """Run to the end, or to the fault (see `train_in_process`); exit codes of all ranks, -9 of a killed one."""
        return end(self.start(config, run_dir, ranks=ranks, fault=fault))

    def start(self, config: RunConfig, run_dir: Path, *, ranks: int | None = None, fault: str | None = None) -> list[BaseProcess]:
        """Start all ranks and return them."""
        ranks = ranks or self.ranks
        # The place where the ranks meet is kept here, as by torchrun: a port that is free now may be another's when the first rank asks.
        self._meeting = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if ranks > 1 else None
        port = 0 if self._meeting is None else self._meeting.port
        processes: list[BaseProcess] = [
            self._context.Process(target=_on_rank, args=(rank, ranks, port, config, run_dir, fault)) for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        return processes


def _on_rank(rank: int, ranks: int, port: int, config: RunConfig, run_dir: Path, fault: str | None) -> None:
    if ranks > 1:
        names = (
            "RANK",
            "LOCAL_RANK",
            "WORLD_SIZE",
            "MASTER_ADDR",
            "MASTER_PORT",
            "TORCHELASTIC_USE_AGENT_STORE",
            "TORCHELASTIC_RESTART_COUNT",
        )
        os.environ |= dict(zip(names, map(str, (rank, rank, ranks, "127.0.0.1", port, True, 0)), strict=True))
    # What survivors of a killed rank complain of is expected, and of use only where a test fails.
    os.dup2(os.open(errors_of(run_dir), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    faulthandler.register(signal.SIGUSR1)
    train_in_process(config, run_dir, fault)


def errors_of(run_dir: Path) -> Path:
    """What the ranks of a run said on standard error."""
    return run_dir.with_name(f"{run_dir.name}.errors")


def end(processes: list[BaseProcess]) -> list[int | None]:
    """Wait until all have ended; exit codes, `HUNG` for those that had to be ended.

    Once one was killed, the others are asked to end; once one failed, only if they have not ended by themselves within `GRACE`: what ends
    all may end them one after another. `GRACE` after they were asked they are killed; all are after `LONGEST`. What they were doing is in
    the file of their errors then.
    """
    _wait(processes, LONGEST, until=lambda: _failed(processes))
    _wait(processes, GRACE, until=lambda: any((process.exitcode or 0) < 0 for process in processes) or not _failed(processes))
    limit = time.monotonic()
    if _failed(processes):
        limit = time.monotonic() + GRACE
        for process in processes:
            if process.exitcode is None:
                process.terminate()
    codes = []
    for process in processes:
        process.join(max(limit - time.monotonic(), 0.0))
        hangs = process.exitcode is None
        if hangs and process.pid is not None:
            os.kill(process.pid, signal.SIGUSR1)
            process.join(1.0)
            process.kill()
            process.join()
        codes.append(HUNG if hangs else process.exitcode)
    return codes


def _failed(processes: list[BaseProcess]) -> bool:
    return any(process.exitcode for process in processes)


def _wait(processes: list[BaseProcess], seconds: float, until: Callable[[], bool]) -> None:
    """Until all have ended, `until` holds or the time is over."""
    limit = time.monotonic() + seconds
    while any(process.exitcode is None for process in processes) and not until() and (left := limit - time.monotonic()) > 0:
        wait([process.sentinel for process in processes if process.exitcode is None], left)


@dataclass
class Toll:
    """What was done to runs."""

    kills: int = 0
    while_writing: int = 0
    """Of the kills, those that fell while something was half-written."""
    of_one_rank: int = 0
    runs: int = 0
    hung: int = 0
    """Ranks that did not end after another one had been killed."""
    differing: list[str] = field(default_factory=list)
    """Names of what is not as in the undisturbed run."""


def kill_at_random(launch: Launcher, config: RunConfig, folder: Path, count: int, seed: int, on_run: Callable[[Toll], None] = id) -> Toll:
    """Kill runs of `config` below `folder` until `count` kills have hit, each run up to `ATTEMPTS` times, and compare their ends.

    Stops at the first run that ends otherwise than the undisturbed one, whose folder is left.
    """
    draw, toll = random.Random(seed), Toll()
    undisturbed = folder / "undisturbed"
    began = time.perf_counter()
    assert not any(launch(config, undisturbed)), "the undisturbed run failed"
    seconds = time.perf_counter() - began
    while toll.kills < count and not toll.differing:
        run_dir = folder / f"run_{toll.runs:05d}"
        toll.runs += 1
        assert toll.runs <= 5 * count, f"{toll.kills} kills only: runs end before they are killed"
        for attempt in range(ATTEMPTS):
            began = time.perf_counter()
            codes, writing = _killed(launch.start(config, run_dir), run_dir, draw, seconds)
            toll.hung += codes.count(HUNG)
            if -signal.SIGKILL not in codes:
                # A machine that was busy with something else during the undisturbed run would have every kill fall behind the end.
                seconds = min(seconds, time.perf_counter() - began) if attempt == 0 else seconds
                break
            toll.kills += 1
            toll.of_one_rank += len(codes) > 1 and codes.count(-signal.SIGKILL) == 1
            toll.while_writing += writing
        codes = launch(config, run_dir)
        toll.differing = (
            [f"exit codes {codes}, see {errors_of(run_dir)}"] if any(codes) else [*differing(run_dir, undisturbed), *half_written(run_dir)]
        )
        on_run(toll)
    return toll


def half_written(run_dir: Path) -> list[str]:
    """Files and folders of a run that never got their names."""
    return [path.name for path in (*run_dir.glob(".*"), *(run_dir / "checkpoints").glob(".*"))]


def _killed(processes: list[BaseProcess], run_dir: Path, draw: random.Random, seconds: float) -> tuple[list[int | None], bool]:
    """Kill one rank or all, at an instant from now to when the run should have ended, or soon after a checkpoint was begun.

    Returns the exit codes, and whether something was half-written then.
    """
    instant = draw.uniform(0.0, seconds)
    writing, delay = draw.random() < 0.5, draw.uniform(0.0, 0.01)
    victims = draw.choice([processes, *([process] for process in processes)])
    limit = time.perf_counter() + instant
    while time.perf_counter() < limit and any(process.exitcode is None for process in processes):
        time.sleep(0.001)
    while writing and not half_written(run_dir) and all(process.exitcode is None for process in processes):
        time.sleep(0.0005)
    time.sleep(delay if writing else 0.0)
    found = bool(half_written(run_dir))
    for process in victims:
        process.kill()
    return end(processes), found
