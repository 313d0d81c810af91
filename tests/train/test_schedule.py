"""The schedule: golden values of the official code, continuity, and the constant course."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import golden_arrays
from vqkit.train.config import TrainConfig
from vqkit.train.schedule import schedule_multiplier


@pytest.mark.parametrize("case_id", golden_arrays.case_ids("training", "schedules*"))
def test_golden_cosine(case_id):
    case = golden_arrays.load("training", case_id)
    replayed = 0
    for entry in case.meta["cases"]:
        if entry["lr_schedule"] != "cosine":
            continue
        config = TrainConfig(steps=entry["n_max_step"], warmup_steps=entry["n_warmup_step"], schedule="cosine", final_ratio=0.1)
        multipliers = [schedule_multiplier(config, step) for step in range(entry["steps"])]
        case.check(f"{entry['key']}/multiplier", torch.tensor(multipliers, dtype=torch.float64))
        replayed += 1
    assert replayed == 3


@given(st.integers(0, 50), st.integers(1, 200), st.sampled_from(["cosine", "constant"]), st.floats(0.0, 1.0))
def test_grows_from_zero_then_never_grows_again(warmup, length, schedule, final_ratio):
    config = TrainConfig(steps=warmup + length, warmup_steps=warmup, schedule=schedule, final_ratio=final_ratio)
    course = [schedule_multiplier(config, step) for step in range(warmup + length + 20)]
    assert course[: warmup + 1] == pytest.approx([step / max(warmup, 1) for step in range(warmup)] + [1.0])
    assert all(a >= b - 1e-12 for a, b in zip(course[warmup:], course[warmup + 1 :], strict=False))
    assert course[warmup + length :] == pytest.approx([1.0 if schedule == "constant" else final_ratio] * 20)
