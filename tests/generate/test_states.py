"""The state of a generation on disk: what was saved goes on as if it had never been, and what does not fit is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from vqkit.generate import generate, load_state, save_state
from vqkit.generate.states import row_seeds
from vqkit.models import TransformerVQ
from vqkit.models.config import ModelConfig

CONFIG = ModelConfig(vocab_size=17, dim=16, key_dim=8, value_dim=12, layers=1, heads=2, codebook_size=6, block_len=4, mem_len=5)


def _model(config: ModelConfig = CONFIG) -> TransformerVQ:
    torch.manual_seed(1)
    return TransformerVQ(config).eval()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    generation = generate(_model(), [[1, 2, 3], [4]], 9, seed=5)
    list(generation)
    save_state(generation.state(), _model(), tmp_path / "state.safetensors")
    return tmp_path / "state.safetensors"


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, attention="full")], ids=["vq", "full"])
def test_saved_and_loaded_it_goes_on_unbroken(tmp_path: Path, config: ModelConfig) -> None:
    model = _model(config)
    unbroken = [step.tokens for step in generate(model, [[1, 2, 3], [4]], 30, seed=5)]
    generation = generate(model, [[1, 2, 3], [4]], 13, seed=5)
    first = [step.tokens for step in generation]
    save_state(generation.state(), model, tmp_path / "state")
    rest = [step.tokens for step in generate(_model(config), load_state(tmp_path / "state", _model(config)), 17)]
    assert torch.equal(torch.stack([*first, *rest]), torch.stack(unbroken))
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]


def test_a_state_of_another_model_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match=r"a state of a model with model.mem_len = 5: this one has 6"):
        load_state(path, _model(replace(CONFIG, mem_len=6)))


def test_damaged_and_foreign_files_are_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_state(tmp_path / "nowhere", _model())
    data = path.read_bytes()
    tensors = safetensors.torch.load(data)
    path.write_bytes(data[:-1])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_state(path, _model())
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(ValueError, match="format None version None, expected 'vqkit-generation' version 1"):
        load_state(path, _model())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"done": None}, "tensor 'done' is missing"),
        ({"model.attention.1.mean": torch.zeros(2, 2, 6, 13)}, r"state.attention\[1\].mean has shape \(2, 2, 6, 13\): this model needs"),
        ({"last": torch.zeros(3, dtype=torch.int64)}, "has 2 rows, expected 3, one a text"),
    ],
)
def test_tensors_that_do_not_fit_are_named(path: Path, change: dict[str, torch.Tensor | None], message: str) -> None:
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {**safetensors.torch.load_file(path), **change}
    safetensors.torch.save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, metadata)
    with pytest.raises(ValueError, match=message):
        load_state(path, _model())


def test_rows_have_seeds_of_their_own_and_the_first_the_one_given() -> None:
    assert row_seeds(7, 3)[0] == 7
    assert row_seeds(7, 3) == row_seeds(7, 5)[:3]
    assert len({*row_seeds(7, 9), *row_seeds(8, 9)}) == 18
    assert row_seeds([3, 3], 2) == [3, 3]
