"""A run configuration is refused where it contradicts itself, naming the dotted field and what would be right."""

import subprocess
import sys
from dataclasses import replace

import pytest

from vqkit.train.config import TrainConfig

REFUSED = {
    "steps": [0, -1, 2.0, True],
    "extra_steps": [-1],
    "batch_size": [0, 3],  # 3: micro_batches = 2 does not divide it
    "update_len": [0, -4, 1.5],
    "micro_batches": [0, 3],
    "learning_rate": [0.0, -1e-3, float("nan"), float("inf")],
    "betas": [(0.9, 1.0), (-0.1, 0.9), (0.9,)],
    "eps": [0.0, float("nan")],
    "schedule": ["cosin"],
    "warmup_steps": [-1, 1000, 1001],
    "final_ratio": [-0.1, 1.1, float("nan")],
    "weight_decay": [-0.1, 1.5, float("nan")],
    "clip": [0.0, -1.0, float("nan")],
    "commitment_weight": [-1.0, float("nan"), float("inf")],
    "seed": [-1, 0.5],
    "log_every": [0],
    "eval_every": [-1],
    "eval_batch_size": [0],
    "eval_tokens": [0],
    "checkpoint_every": [-1],
    "keep_checkpoints": [0],
    "device": ["gpu"],
}


def test_every_field_has_a_refusal():
    assert set(REFUSED) == set(TrainConfig.__dataclass_fields__)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_wrong_values_are_refused_by_dotted_name(name, value):
    whole = TrainConfig(steps=1000, batch_size=8, micro_batches=2)
    with pytest.raises(ValueError, match=rf"train\.{name} = |= {value!r}.*must|must.*train\.{name}"):
        replace(whole, **{name: value})


def test_config_needs_no_torch():
    program = "import sys, vqkit.train.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
