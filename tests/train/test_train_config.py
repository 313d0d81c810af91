"""A run configuration is refused where it contradicts itself, naming the dotted field and what would be right."""

import subprocess
import sys
from dataclasses import replace

import pytest

from vqkit.config import from_json, to_json
from vqkit.data import ByteTokenizer, DataConfig
from vqkit.models.config import ModelConfig
from vqkit.train.config import RunConfig, TrainConfig

REFUSED = {
    "steps": [0, -1, 2.0, True],
    "minutes": [0.0, -1.0, float("nan"), float("inf")],
    "extra_steps": [-1],
    "batch_size": [0, 3],  # 3: micro_batches = 2 does not divide it
    "update_len": [0, -4, 1.5],
    "micro_batches": [0, 3],
    "optimizer": ["adam"],
    "momentum_dtype": ["float16", "bfloat16"],  # the latter is lion's
    "decayed": ["matrices"],
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
    "eval_context": ["fresh"],
    "checkpoint_every": [-1],
    "keep_checkpoints": [0],
    "keep_best": [1, "yes"],
    "not_finite": ["ignore"],
    "spike_ratio": [1.0, 0.0, float("nan")],
    "parallel": ["dp"],
    "precision": ["float16"],
    "compile": [1, "yes"],
    "device": ["gpu"],
}


def test_every_field_has_a_refusal():
    assert set(REFUSED) == set(TrainConfig.__dataclass_fields__)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_wrong_values_are_refused_by_dotted_name(name, value):
    whole = TrainConfig(steps=1000, batch_size=8, micro_batches=2)
    with pytest.raises(ValueError, match=rf"train\.{name} = |= {value!r}.*must|must.*train\.{name}"):
        replace(whole, **{name: value})


@pytest.mark.parametrize(
    ("optimizer", "name", "value"),
    [("adafactor", "betas", (0.9, 0.98)), ("lion", "eps", 1e-9), ("adafactor", "momentum_dtype", "bfloat16")],
)
def test_an_option_of_another_optimizer_is_refused(optimizer, name, value):
    with pytest.raises(ValueError, match=rf'train\.{name} = .*train\.optimizer = "{optimizer}"'):
        TrainConfig(optimizer=optimizer, **{name: value})


def run_config(model: ModelConfig | None = None, update_len: int | None = None) -> RunConfig:
    return RunConfig("a recipe", model or ModelConfig(), DataConfig(sequence_len=512), TrainConfig(update_len=update_len))


def test_update_len_divides_the_sequence():
    assert (run_config().update_len, run_config().updates_per_sequence) == (512, 1)
    assert (run_config(update_len=128).update_len, run_config(update_len=128).updates_per_sequence) == (128, 4)
    for length in (100, 1024):
        with pytest.raises(ValueError, match=rf"train\.update_len = {length}: must divide data\.sequence_len = 512"):
            run_config(update_len=length)


def test_the_model_must_fit_the_data():
    assert ByteTokenizer.vocab_size == DataConfig().vocab_size
    with pytest.raises(ValueError, match=r"model\.vocab_size = 256: these data need at least 259"):
        run_config(ModelConfig(vocab_size=256))
    with pytest.raises(ValueError, match=r"model\.input"):
        run_config(ModelConfig(input="features"))


def test_a_run_config_comes_back_from_json():
    config = replace(run_config(update_len=64), init_from="runs/other")
    assert from_json(RunConfig, to_json(config)) == config
    with pytest.raises(ValueError, match="init_from = ''"):
        replace(config, init_from="")


def test_config_needs_no_torch():
    program = "import sys, vqkit.train.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
