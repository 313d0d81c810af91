"""Files of JSON lines: exact numbers, cut to a step in one piece, a torn last line dropped; means of an interval."""

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqkit.train.metrics import Interval, JsonLines, cut_after, read_lines
from vqkit.train.step import Losses, StepResult
from vqkit.train.units import LossUnit


@given(number=st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_read_back_exactly(tmp_path_factory, number):
    path = tmp_path_factory.mktemp("lines") / "metrics.jsonl"
    lines = JsonLines(path)
    lines.write({"step": 1, "loss": number})
    lines.close()
    (line,) = read_lines(path)
    assert line["loss"].hex() == number.hex()


def test_numbers_that_are_none_are_refused_whole(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError):
        lines.write({"step": 1, "loss": math.nan})
    lines.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


@pytest.mark.parametrize("torn", [b"", b'{"step": 5, "lo', b'{"step": 2, "loss": 1}'])
@pytest.mark.parametrize("step", [0, 2, 3, 9])
def test_cut(tmp_path, torn, step):
    path = tmp_path / "metrics.jsonl"
    written = [json.dumps({"step": s, "kind": k}).encode() + b"\n" for s, k in ((1, "a"), (2, "a"), (2, "b"), (4, "a"))]
    path.write_bytes(b"".join(written) + torn)
    cut_after(path, step)
    assert path.read_bytes() == b"".join(written[: {0: 0, 2: 3, 3: 3, 9: 4}[step]])
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_no_file_has_no_lines(tmp_path):
    cut_after(tmp_path / "absent.jsonl", 3)
    assert read_lines(tmp_path / "absent.jsonl") == []
    assert list(tmp_path.iterdir()) == []


NO_STATE: Any = None
BYTES = LossUnit("bits per byte")


def result_of(loss, counts, num_bytes):
    losses = Losses(torch.tensor(loss + 0.1), torch.tensor(loss), torch.tensor(1000.0))
    counts = tuple(torch.tensor(c) for c in counts)
    return StepResult(NO_STATE, losses, torch.tensor(2.0 * loss), torch.tensor(8 * loss), torch.tensor(8), torch.tensor(num_bytes), counts)


def test_an_interval_is_the_mean_of_its_steps_and_comes_back():
    shapes = [torch.Size((1, 2)), torch.Size((2, 2))]
    interval = Interval(shapes, torch.device("cpu"))
    interval.add_(result_of(1.0, ([[4.0, 4.0]], [[8.0, 0.0], [4.0, 4.0]]), 8), BYTES)
    interval.add_(result_of(2.0, ([[4.0, 4.0]], [[8.0, 0.0], [4.0, 4.0]]), 4), BYTES)
    other = Interval(shapes, torch.device("cpu"))
    other.load_state_tensors_({name: tensor.clone() for name, tensor in interval.state_tensors().items()})
    assert other.summary(BYTES) == interval.summary(BYTES)
    summary = interval.summary(BYTES)
    assert summary["loss"] == pytest.approx(1.6)
    assert summary["bits_per_byte"] == pytest.approx((8 * 1.0 + 8 * 2.0) / math.log(2) / 12)
    assert summary["commitment"] == 1000.0
    assert summary["gradient_norm"] == pytest.approx(3.0)
    assert summary["active_codes"] == 0.5
    assert summary["perplexity"] == pytest.approx((2.0 + 1.5) / 2)
    interval.clear_()
    assert not any(tensor.any() for tensor in interval.state_tensors().values())


@pytest.mark.parametrize("loss, finite", [(1.0, True), (math.inf, False), (math.nan, False)])
def test_an_interval_knows_what_is_no_number(loss, finite):
    interval = Interval([torch.Size((1, 2))], torch.device("cpu"))
    interval.add_(result_of(loss, ([[4.0, 4.0]],), 8), BYTES)
    assert interval.is_finite() is finite
