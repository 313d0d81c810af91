"""A run that is killed, wherever and whenever, and started again ends as one that never was: bit for bit, every file of it."""

import multiprocessing
import random
import signal
import time

import pytest

from tiny_runs import STEPS, differing, tiny_config, train_in_process, write_texts
from vqkit.train.faults import FAULT_POINTS
from vqkit.train.metrics import read_lines

KILLS = 20


class Runs:
    """Starts runs in processes forked from a warm one, so that each costs what its steps cost."""

    def __init__(self, folder):
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["pytest", "torch._dynamo", "vqkit.train.loop", "vqkit.models.weights", "vqkit.ops.kmeans"])
        self.config = tiny_config(write_texts(folder / "texts"))
        self.start(str).join()  # the server that all are forked from is up and warm now
        self.unbroken = folder / "unbroken"
        began = time.perf_counter()
        assert self.execute(self.unbroken) == 0
        self.seconds = time.perf_counter() - began

    def execute(self, run_dir, *, fault=None, seconds=None):
        """Run until the end, the fault, or a SIGKILL after some seconds; returns the exit code, -9 for a killed process."""
        process = self.start(train_in_process, self.config, run_dir, fault)
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
        return process.exitcode

    def start(self, target, *args):
        process = self.context.Process(target=target, args=args)
        process.start()
        return process


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


def test_the_unbroken_run_is_worth_comparing_with(runs):
    lines = read_lines(runs.unbroken / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(2, STEPS + 1, 2))
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [10, 20, 24]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(set(losses)) == len(losses)
    assert losses[-1] < losses[0]
    assert sorted(p.name for p in (runs.unbroken / "checkpoints").iterdir()) == ["step_00000021", "step_00000024"]


@pytest.mark.parametrize("fault", [f"{name}:{count}" for name in FAULT_POINTS for count in (1, 4)])
def test_killed_at_a_named_point(runs, tmp_path, fault):
    run_dir = tmp_path / "run"
    assert runs.execute(run_dir, fault=fault) == -signal.SIGKILL
    assert differing(run_dir, runs.unbroken) != []
    assert runs.execute(run_dir) == 0
    assert differing(run_dir, runs.unbroken) == []
    assert leftovers(run_dir) == []


def test_killed_at_every_checkpoint_in_turn(runs, tmp_path):
    """A run that lives for one checkpoint at a time still arrives."""
    run_dir = tmp_path / "run"
    while (code := runs.execute(run_dir, fault="before_prune:1")) != 0:
        assert code == -signal.SIGKILL
    assert differing(run_dir, runs.unbroken) == []


def test_killed_at_random_instants(runs, tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    print(f"kills drawn with seed {seed}")
    draw = random.Random(seed)
    kills = number = 0
    while kills < KILLS:
        run_dir = tmp_path / f"run{number}"
        number += 1
        assert number <= 5 * KILLS, f"{kills} kills only: processes end before they are killed"
        for _ in range(4):
            code = runs.execute(run_dir, seconds=draw.uniform(0.0, runs.seconds))
            assert code in (0, -signal.SIGKILL), f"seed {seed}"
            if code == 0:
                break
            kills += 1
        assert runs.execute(run_dir) == 0, f"seed {seed}"
        assert differing(run_dir, runs.unbroken) == [], f"seed {seed}"
        assert leftovers(run_dir) == [], f"seed {seed}"
    print(f"{kills} kills in {number} runs")


def leftovers(run_dir):
    return [path.name for path in run_dir.rglob(".*")]
