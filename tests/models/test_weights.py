"""Weight files: exact round trips, the newest whole checkpoint, and what damage is called."""

import json
from pathlib import Path

import pytest
import torch

from tiny_models import random_tokens, tiny_config, tiny_model
from vqkit.models.transformer import TransformerVQ
from vqkit.models.weights import (
    broken_checkpoints,
    find_defect,
    find_weights,
    is_whole,
    load_weights,
    newest_whole_checkpoint,
    save_weights,
    write_manifest,
)
from vqkit.quantizers.learnable import add_statistics_


def make_checkpoint(run: Path, step: int, manifest: bool = True) -> Path:
    folder = run / "checkpoints" / f"step_{step:08d}"
    save_weights(tiny_model(), tiny_model().config, folder)
    (folder / "training.json").write_text("{}")
    if manifest:
        write_manifest(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("form", [{}, {"tied": True, "layers": 2}, {"input": "features", "absolute_positions": False}], ids=str)
def test_a_saved_model_comes_back_bit_for_bit(tmp_path: Path, form: dict, dtype: torch.dtype) -> None:
    model = tiny_model(**form).to(dtype)
    if "input" not in form:
        out = model.train()(random_tokens(2, 9))
        add_statistics_(model, out.statistics)  # what is pending belongs to a checkpoint
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_weights(model, model.config, tmp_path)
    loaded, config = load_weights(tmp_path)

    assert config == model.config
    assert loaded.training
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name
    assert [p.requires_grad for p in loaded.parameters()] == [True] * len(list(model.parameters()))
    if "input" not in form:
        assert torch.equal(loaded(random_tokens(1, 7)).logits, model(random_tokens(1, 7)).logits)


def test_loading_leaves_the_random_numbers_alone_and_the_file_free(tmp_path: Path) -> None:
    model = tiny_model()
    save_weights(model, model.config, tmp_path)
    state = torch.get_rng_state()
    loaded, _ = load_weights(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * (tmp_path / "model.safetensors").stat().st_size)
    assert torch.equal(loaded.logits.bias, model.logits.bias)


def test_newest_whole_checkpoint(tmp_path: Path) -> None:
    assert newest_whole_checkpoint(tmp_path) is None
    first, second, third = (make_checkpoint(tmp_path, step) for step in (9, 99_999_999, 100_000_000))  # names stop sorting there
    (tmp_path / "checkpoints" / "step_0000001").mkdir()
    (tmp_path / "checkpoints" / ".step_00000011.tmp").mkdir()
    assert newest_whole_checkpoint(tmp_path) == find_weights(tmp_path) == third
    assert broken_checkpoints(tmp_path) == []

    (third / "model.safetensors").write_bytes(b"short")
    assert newest_whole_checkpoint(tmp_path) == find_weights(tmp_path) == second
    [(folder, defect)] = broken_checkpoints(tmp_path)
    assert folder == third
    assert "model.safetensors has 5 bytes, expected" in defect

    (second / "manifest.json").unlink()
    assert find_weights(tmp_path) == first
    assert [folder for folder, _ in broken_checkpoints(tmp_path)] == [third, second]
    (first / "training.json").unlink()
    with pytest.raises(
        ValueError, match=r"no whole checkpoint under checkpoints; step_100000000: model.*; step_99999999: manifest.json is missing"
    ):
        find_weights(tmp_path)


def test_every_kind_of_damage_is_seen_and_named(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 1)
    assert is_whole(folder)
    manifest = (folder / "manifest.json").read_text()
    assert set(json.loads(manifest)["files"]) == {"config.json", "model.safetensors", "training.json"}
    assert find_weights(folder) == folder

    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for position in (0, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        assert find_defect(folder) == "model.safetensors has another hash than when it was written"
    weights.write_bytes(whole)
    for text in ("", "{", "[]", '{"files": {"config.json": 1}}', '{"files": []}', manifest[: len(manifest) // 2]):
        (folder / "manifest.json").write_text(text)
        assert find_defect(folder) == "manifest.json is damaged"
        assert not is_whole(folder)
    with pytest.raises(ValueError, match=r"step_00000001: the checkpoint is not whole: manifest.json is damaged"):
        find_weights(folder)


def test_a_manifest_lists_neither_itself_nor_temporary_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / ".b.1234.tmp").write_text("b")
    write_manifest(tmp_path)
    write_manifest(tmp_path)
    assert set(json.loads((tmp_path / "manifest.json").read_text())["files"]) == {"a"}


def test_an_export_folder_needs_no_manifest(tmp_path: Path) -> None:
    save_weights(tiny_model(), tiny_model().config, tmp_path)
    assert find_weights(tmp_path) == tmp_path
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither a run \(no checkpoints/\) nor weights \(no model.safetensors\)"):
        find_weights(tmp_path)


def test_places_without_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist: must be a run, checkpoint or export folder"):
        find_weights(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="file is a file: must be"):
        find_weights(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match=r"no config.json"):
        find_weights(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        load_weights(tmp_path)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    model = tiny_model()

    def refused(config, message: str) -> None:
        save_weights(model, config, tmp_path)
        with pytest.raises(ValueError, match=message):
            load_weights(tmp_path)

    refused(tiny_config(value_dim=7), r"tensor 'layers.0.attention.0.kvg.weight' has shape \(32, 8\), expected \(36, 8\)")
    refused(tiny_config(layers=2), r"tensor 'layers.1.attention.0.\S+' of shape \S+ is missing")
    refused(tiny_config(tied=True), r"tensor 'logits.weight' of shape \(11, 8\) belongs to no part of this model")


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "config.json: not JSON"),
        ("[]", "format None version None, expected 'vqkit-model' version 1"),
        ('{"recipe": "quickstart", "model": {}}', "format None"),
        ('{"format": "vqkit-model", "version": 2, "model": {}}', "version 2, expected 'vqkit-model' version 1"),
        (
            '{"format": "vqkit-model", "version": 1, "model": {"head": 2}}',
            r"config.json: model.head = 2: unknown option; did you mean 'heads'",
        ),
    ],
)
def test_a_damaged_configuration_is_named(tmp_path: Path, text: str, message: str) -> None:
    save_weights(tiny_model(), tiny_model().config, tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_weights(tmp_path)


def test_truncated_weights_are_named(tmp_path: Path) -> None:
    model = TransformerVQ(tiny_config())
    save_weights(model, model.config, tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for size in (0, 4, 100, len(whole) - 1):
        (tmp_path / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
            load_weights(tmp_path)


def test_equal_models_are_equal_files(tmp_path: Path) -> None:
    model = tiny_model()
    files = []
    for i in range(8):
        save_weights(model, model.config, tmp_path / str(i))
        files.append((tmp_path / str(i) / "model.safetensors").read_bytes())
    assert len(set(files)) == 1
