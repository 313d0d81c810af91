"""The schedules: golden values of the official code, continuity, and where the inverse square root is as meant and not as written."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import golden_arrays
from vqkit.train.config import TrainConfig
from vqkit.train.schedule import schedule_multiplier

SCHEDULES = ["cosine", "linear", "inverse_square_root", "constant"]


def course(length, **config):
    return torch.tensor([schedule_multiplier(TrainConfig(**config), step) for step in range(length)], dtype=torch.float64)


@pytest.mark.parametrize("case_id", golden_arrays.case_ids("training", "schedules*"))
def test_golden_cosine_and_linear(case_id):
    case = golden_arrays.load("training", case_id)
    replayed = []
    for entry in case.meta["cases"]:
        schedule = entry["lr_schedule"]
        if schedule == "inv_sqrt":
            continue
        config = {"steps": entry["n_max_step"], "warmup_steps": entry["n_warmup_step"], "schedule": schedule, "final_ratio": 0.1}
        case.check(f"{entry['key']}/multiplier", course(entry["steps"], **config))
        replayed.append(schedule)
    assert replayed == ["cosine", "linear", "cosine", "cosine"]


@pytest.mark.parametrize("case_id", golden_arrays.case_ids("training", "schedules*"))
def test_the_official_inverse_square_root_grows_and_ours_falls(case_id):
    """There it is 0.1 + 0.9 / sqrt(1 - progress), infinite at the last step; ours is sqrt(warm-up / step). Warm-up is the same."""
    case = golden_arrays.load("training", case_id)
    official, warmup, steps = case["case_02/multiplier"].double(), 4, 20
    progress = (torch.arange(30, dtype=torch.float64) - warmup) / (steps - warmup)
    written = torch.where(progress < 1, 0.1 + 0.9 * (1 - progress).clamp(min=0).rsqrt(), torch.inf)
    torch.testing.assert_close(official[warmup:], written[warmup:], rtol=1e-6, atol=0.0)
    ours = course(30, steps=steps, warmup_steps=warmup, schedule="inverse_square_root")
    torch.testing.assert_close(ours[: warmup + 1], official[: warmup + 1])
    torch.testing.assert_close(ours[warmup:steps], (warmup / torch.arange(warmup, steps).double()).sqrt())
    assert (official[warmup + 1 :] > 1).all()
    assert (ours[warmup + 1 :] < 1).all()


@given(st.integers(0, 50), st.integers(1, 200), st.sampled_from(SCHEDULES), st.floats(0.0, 1.0))
def test_grows_from_zero_then_never_grows_again(warmup, length, schedule, final_ratio):
    config = {"steps": warmup + length, "warmup_steps": warmup, "schedule": schedule, "final_ratio": final_ratio}
    values = course(warmup + length + 20, **config).tolist()
    assert values[: warmup + 1] == pytest.approx([step / max(warmup, 1) for step in range(warmup)] + [1.0])
    assert all(a >= b - 1e-12 for a, b in zip(values[warmup:], values[warmup + 1 :], strict=False))
    root = (max(warmup, 1) / (warmup + length)) ** 0.5
    last = {"constant": 1.0, "inverse_square_root": root}.get(schedule, final_ratio)
    assert values[warmup + length :] == pytest.approx([last] * 20)  # the steps that extra_steps adds
