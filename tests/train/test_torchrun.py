"""`torchrun -m vqkit train`, the command as it is written: two processes, FSDP2, end at the figures of one, and the first alone speaks."""

import os
import re
import subprocess
import sys

import pytest

from tiny_runs import write_texts
from vqkit.cli import main
from vqkit.train.metrics import read_lines

TINY = """
    --model.dim 8 --model.key-dim 4 --model.value-dim 8 --model.layers 1 --model.codebook-size 8 --model.block-len 8 --model.mem-len 8
    --model.codebook.dead-code-threshold 0 --data.sequence-len 32 --data.validation-fraction 0.2 --data.test-fraction 0.1
    --train.steps 20 --train.warmup-steps 3 --train.batch-size 4 --train.log-every 5 --train.eval-every 10 --train.eval-batch-size 4
    --train.device cpu
"""


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def torchrun(*words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.run([*TORCHRUN, *words], capture_output=True, text=True, timeout=300, env=environment)


ONE_FAILS = """
import os
from vqkit.train.parallel import joined
try:
    with joined("cpu") as processes:
        if processes.rank == 1:
            raise ValueError("of its own")
        processes.wait()
except Exception as error:
    print(f"{os.environ['RANK']}: {error.of_another_process}\\n", end="", flush=True)
"""


def test_who_failed_first_is_known_to_all(tmp_path):
    (tmp_path / "one_fails.py").write_text(ONE_FAILS)
    assert sorted(torchrun(str(tmp_path / "one_fails.py")).stdout.split("\n")) == ["", "0: True", "1: False"]


def test_an_error_is_told_once(tmp_path):
    (tmp_path / "empty").mkdir()
    refused = torchrun(
        "-m", "vqkit", "train", "text", "--data.path", str(tmp_path / "empty"), *TINY.split(), "--run-dir", str(tmp_path / "run")
    )
    said = [line for line in refused.stderr.splitlines() if line.startswith("vqkit: ")]
    assert len(said) == 1 and "holds no files with data" in said[0]
    assert refused.returncode == 1


def test_two_processes_of_torchrun_end_at_the_figures_of_one(tmp_path, capsys):
    texts = write_texts(tmp_path / "texts")
    words = ["train", "text", "--data.path", str(texts), *TINY.split()]
    assert main([*words, "--run", str(tmp_path / "one")]) == 0
    alone = capsys.readouterr().out
    shared = torchrun("-m", "vqkit", *words, "--train.parallel", "fsdp", "--run-dir", str(tmp_path / "two"))
    assert shared.returncode == 0, shared.stderr
    figure = re.compile(r"^test: .*$", re.MULTILINE)
    assert figure.findall(shared.stdout) == figure.findall(alone) != []
    lines, same = read_lines(tmp_path / "two" / "metrics.jsonl"), read_lines(tmp_path / "one" / "metrics.jsonl")
    assert [(line["step"], line["kind"]) for line in lines] == [(line["step"], line["kind"]) for line in same]
    assert [line["bits_per_byte"] for line in lines] == pytest.approx([line["bits_per_byte"] for line in same], rel=1e-5)
