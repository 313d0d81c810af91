"""One run on several processes: DDP, FSDP2 and one process end alike; killed, it resumes bit for bit; on another number of them, alike."""

import multiprocessing
import random
import re
import signal
import sys
import time
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from killed_runs import Launcher, end, errors_of, kill_at_random
from tiny_runs import differing, tiny_config, with_codebook, write_texts
from vqkit.models.weights import is_whole
from vqkit.train.loop import train
from vqkit.train.metrics import read_lines

KILLS = 4


@pytest.fixture(scope="module")
def launch():
    return Launcher(ranks=2)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data") / "texts")


@pytest.fixture(scope="module")
def plain(texts):
    """Nothing is drawn, as draws are those of a process: what is left is equal for every number of processes."""
    config = with_codebook(
        tiny_config(texts, steps=12, batch_size=4, micro_batches=2, eval_every=6), init="normal", dead_code_threshold=0.0
    )
    return replace(config, model=replace(config.model, residual_dropout=0.0, sinusoid_dropout=0.0, layer_dropout=0.0))


@pytest.fixture(scope="module")
def alone(plain, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    train(plain, run_dir)
    return run_dir


def weights(run_dir):
    return safetensors.torch.load_file(sorted((run_dir / "checkpoints").iterdir())[-1] / "model.safetensors")


def assert_alike(run_dir, other):
    a, b = weights(run_dir), weights(other)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    lines, others = read_lines(run_dir / "metrics.jsonl"), read_lines(other / "metrics.jsonl")
    assert [(line["step"], line["kind"]) for line in lines] == [(line["step"], line["kind"]) for line in others]
    for line, same in zip(lines, others, strict=True):
        assert line["bits_per_byte"] == pytest.approx(same["bits_per_byte"], rel=1e-4)


def sharded(config, parallel):
    return replace(config, train=replace(config.train, parallel=parallel))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_end_where_one_does(launch, plain, alone, tmp_path, parallel):
    assert launch(sharded(plain, parallel), tmp_path / "run") == [0, 0]
    assert_alike(tmp_path / "run", alone)
    shards = (tmp_path / "run" / "checkpoints" / "step_00000012" / "optimizer").exists()
    assert shards == (parallel == "fsdp")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_killed_processes_resume_bit_for_bit(launch, texts, tmp_path, parallel):
    """With k-means start and expiry of dead codes on: draws of every process, in the middle of a sequence. At named points and any time."""
    config = sharded(tiny_config(texts, steps=12), parallel)
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    toll = kill_at_random(launch, config, tmp_path, KILLS, seed)
    assert (toll.differing, toll.hung) == ([], 0), f"seed {seed}"
    assert toll.kills >= KILLS
    for fault in ("after_step:8", "before_rename:2"):
        run_dir = tmp_path / fault
        assert -signal.SIGKILL in launch(config, run_dir, fault=fault)
        assert differing(run_dir, tmp_path / "undisturbed") != []
        assert launch(config, run_dir) == [0, 0]
        assert differing(run_dir, tmp_path / "undisturbed") == []


def fail_after(seconds):
    time.sleep(seconds)
    sys.exit(1)


def test_ranks_that_fail_one_after_another_are_not_struck_down():
    """By the launcher of these tests, which asks the others to end where one is killed."""
    processes = [multiprocessing.get_context("forkserver").Process(target=fail_after, args=(seconds,)) for seconds in (0.5, 0.0)]
    for process in processes:
        process.start()
    assert end(processes) == [1, 1]


def test_processes_of_which_one_is_asked_to_stop_stop_together_and_resume(launch, texts, tmp_path):
    config = tiny_config(texts, steps=12, keep_checkpoints=1, keep_best=False)
    assert launch(config, tmp_path / "unbroken") == [0, 0]
    assert launch(config, tmp_path / "run", fault="asked:1:8") == [1, 1]
    assert "stopped by SIGTERM" in errors_of(tmp_path / "run").read_text()
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert checkpoint.name == "step_00000008" and is_whole(checkpoint)
    assert launch(config, tmp_path / "run") == [0, 0]
    assert differing(tmp_path / "run", tmp_path / "unbroken") == []


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_numbers_that_are_none_end_all_processes_by_the_same_words_or_none(launch, texts, tmp_path, parallel):
    """Parameters stay finite, keys do not."""
    wild = tiny_config(texts, steps=6, learning_rate=1e19, clip=None, schedule="constant", warmup_steps=0, eval_every=0, parallel=parallel)
    wild = replace(wild, data=replace(wild.data, validation_fraction=0.0))
    assert launch(wild, tmp_path / "run") == [1, 1]
    words = re.findall(r"^RuntimeError: (.*)$", errors_of(tmp_path / "run").read_text(), re.MULTILINE)
    assert len(words) == 2
    assert words[0] == words[1]
    assert re.search(r"^step \d+: the output of .* is not finite; the step was not taken", words[0])
    skipping = replace(wild, train=replace(wild.train, not_finite="skip"))
    assert launch(skipping, tmp_path / "skipping") == [0, 0]
    kinds = [line["kind"] for line in read_lines(tmp_path / "skipping" / "metrics.jsonl")]
    assert kinds.count("skipped") > 1


def test_a_run_goes_on_with_another_number_of_processes(launch, plain, alone, tmp_path):
    """FSDP2 on two, then DDP on two, then one alone, then FSDP2 again: each from the checkpoint of the one before."""
    run_dir = tmp_path / "run"
    for steps, parallel, processes in ((3, "fsdp", 2), (6, "ddp", 2), (9, "ddp", 1), (12, "fsdp", 2)):
        # The steps of the schedule stay: only how many are done changes, by a fault right after the checkpoint of `steps`.
        fault = None if steps == 12 else "before_prune:1"
        codes = launch(sharded(plain, parallel), run_dir, ranks=processes, fault=fault)
        assert codes == [0, 0] if fault is None else -signal.SIGKILL in codes
        assert max(path.name for path in (run_dir / "checkpoints").glob("step_*")) == f"step_{steps:08d}"
    assert_alike(run_dir, alone)


def test_batches_that_processes_cannot_share_are_refused(launch, texts, tmp_path):
    assert launch(tiny_config(texts, batch_size=3), tmp_path / "run") == [1, 1]
    assert not (tmp_path / "run").exists()
