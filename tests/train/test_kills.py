"""A run that is killed, wherever and whenever, and started again ends as one that never was: bit for bit, every file of it."""

import random
import signal

import pytest

from killed_runs import Launcher, half_written, kill_at_random
from tiny_runs import STEPS, differing, tiny_config, write_texts
from vqkit.train.faults import FAULT_POINTS
from vqkit.train.metrics import read_lines

KILLS = 16


class Runs:
    """Runs of one configuration, and one of them that was left alone."""

    def __init__(self, folder):
        self.launch, self.config = Launcher(), tiny_config(write_texts(folder / "texts"))
        self.unbroken = folder / "unbroken"
        assert self.execute(self.unbroken) == 0

    def execute(self, run_dir, *, fault=None):
        """Run until the end or the fault; returns the exit code, -9 for a killed process."""
        (code,) = self.launch(self.config, run_dir, fault=fault)
        return code


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
    assert half_written(run_dir) == []


def test_killed_at_every_checkpoint_in_turn(runs, tmp_path):
    """A run that lives for one checkpoint at a time still arrives."""
    run_dir = tmp_path / "run"
    while (code := runs.execute(run_dir, fault="before_prune:1")) != 0:
        assert code == -signal.SIGKILL
    assert differing(run_dir, runs.unbroken) == []


def test_killed_at_random_instants(runs, tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    print(f"python tests/train/kill_many.py --count {KILLS} --seed {seed}")
    toll = kill_at_random(runs.launch, runs.config, tmp_path, KILLS, seed)
    assert toll.differing == [], f"seed {seed}"
    assert toll.kills >= KILLS
