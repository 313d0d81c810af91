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


def test_two_processes_of_torchrun_end_at_the_figures_of_one(tmp_path, capsys):
    texts = write_texts(tmp_path / "texts")
    words = ["train", "text", "--data.path", str(texts), *TINY.split()]
    assert main([*words, "--run", str(tmp_path / "one")]) == 0
    alone = capsys.readouterr().out
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vqkit"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [*torchrun, *words, "--train.parallel", "fsdp", "--run-dir", str(tmp_path / "two")]
    shared = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert shared.returncode == 0, shared.stderr
    figure = re.compile(r"^test: .*$", re.MULTILINE)
    assert figure.findall(shared.stdout) == figure.findall(alone) != []
    lines, same = read_lines(tmp_path / "two" / "metrics.jsonl"), read_lines(tmp_path / "one" / "metrics.jsonl")
    assert [(line["step"], line["kind"]) for line in lines] == [(line["step"], line["kind"]) for line in same]
    assert [line["bits_per_byte"] for line in lines] == pytest.approx([line["bits_per_byte"] for line in same], rel=1e-5)
