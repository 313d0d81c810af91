"""The conventions of the Hugging Face hub: folders that come back, the cache of a repository, what is uploaded. No network."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.hub_mixin
import pytest
import torch
from huggingface_hub import ModelCard

import vqkit
from tiny_models import random_tokens, tiny_model
from vqkit.models import hub, load_weights, save_weights
from vqkit.models.config import ModelConfig
from vqkit.models.transformer import TransformerVQ
from vqkit.quantizers.config import CodebookConfig


def assert_equal(found: TransformerVQ, model: TransformerVQ) -> None:
    assert type(found) is TransformerVQ
    assert found.config == model.config
    assert not found.training
    expected = model.state_dict()
    assert found.state_dict().keys() == expected.keys()
    for name, tensor in found.state_dict().items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name
    with torch.no_grad():
        assert torch.equal(found(random_tokens(1, 6)).logits, model.eval()(random_tokens(1, 6)).logits)


def test_a_saved_folder_comes_back_with_its_nested_configuration(tmp_path: Path) -> None:
    model = tiny_model(codebook=CodebookConfig(decay=0.875, dead_code_threshold=0.25), logit_scale=0.5)
    model.save_pretrained(tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert_equal(TransformerVQ.from_pretrained(tmp_path / "model"), model)
    assert_equal(TransformerVQ.from_pretrained(f"{tmp_path / 'model'}"), model)
    assert_equal(load_weights(tmp_path / "model")[0].eval(), model)  # the files are those of `save_weights`


def test_the_card_tells_the_facts_and_is_not_written_over(tmp_path: Path) -> None:
    model = tiny_model(layers=3)
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "vqkit"
    assert {"transformer-vq", "pytorch_model_hub_mixin"} <= set(card.data.tags or [])
    assert card.data.license is None  # whoever trained the weights decides
    assert "| layers, width, heads | 3, 8, 2 |" in card.content
    assert f"| parameters | {sum(p.numel() for p in model.parameters()):,} |" in card.content
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_saving_again_replaces_weights_and_configuration(tmp_path: Path) -> None:
    tiny_model(layers=2).save_pretrained(tmp_path)
    model = tiny_model(seed=5)
    model.save_pretrained(tmp_path)
    assert_equal(TransformerVQ.from_pretrained(tmp_path), model)


def test_a_saved_model_of_bytes_writes(tmp_path: Path) -> None:
    TransformerVQ(ModelConfig(dim=16, key_dim=8, value_dim=16, layers=1, codebook_size=8, block_len=8, mem_len=8)).save_pretrained(tmp_path)
    assert "(bytes)" in (tmp_path / "README.md").read_text()
    assert vqkit.load(tmp_path).generate("a", 5) != ""


def in_cache(model: TransformerVQ, cache: Path, repo_id: str) -> None:
    """A repository in the layout of the hub's cache, as after a download."""
    folder = cache / f"models--{repo_id.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    save_weights(model, model.config, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)


def test_a_repository_is_read_from_the_cache_offline(tmp_path: Path) -> None:
    model = tiny_model()
    in_cache(model, tmp_path, "anna/songs")
    assert_equal(TransformerVQ.from_pretrained("anna/songs", cache_dir=tmp_path, local_files_only=True), model)


@pytest.mark.parametrize("path", ["no/such", "nothing"])
def test_neither_folder_nor_repository(tmp_path: Path, path: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"^{path}: no folder of that name, and no such repository"):
        TransformerVQ.from_pretrained(path, cache_dir=tmp_path, local_files_only=True)


@pytest.mark.parametrize("path", ["./x", "../x/y", "a/b/c", "/x", "x/", "a\\b", "", Path("no/such")], ids=repr)
def test_a_path_is_not_asked_of_a_server(path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_from_repository", lambda *a, **k: pytest.fail("asked"))
    with pytest.raises(FileNotFoundError, match=r"does not exist: must be a folder with weights, or a repository as in user/name|neither"):
        TransformerVQ.from_pretrained(path)


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    in_cache(tiny_model(), tmp_path, "anna/songs")
    (config,) = tmp_path.rglob("config.json")
    config.write_text('{"format": "another"}')
    with pytest.raises(ValueError, match="format 'another'"):
        TransformerVQ.from_pretrained("anna/songs", cache_dir=tmp_path, local_files_only=True)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        TransformerVQ.from_pretrained(tmp_path)


def test_what_is_pushed_is_what_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    class Api:
        def __init__(self, **options: Any) -> None:
            calls.append(("api", options))

        def create_repo(self, **options: Any) -> SimpleNamespace:
            calls.append(("create_repo", options))
            return SimpleNamespace(repo_id=options["repo_id"])

        def upload_folder(self, *, folder_path: Path, **options: Any) -> str:
            calls.append(("upload_folder", options))
            shutil.copytree(folder_path, tmp_path / "uploaded")
            return "the address"

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Api)
    model = tiny_model()
    assert model.push_to_hub("anna/songs", token="hf_x", private=True, branch="b", commit_message="words") == "the address"
    assert [name for name, _ in calls] == ["api", "create_repo", "upload_folder"]
    assert calls[0][1] == {"token": "hf_x"}
    assert calls[1][1] == {"repo_id": "anna/songs", "private": True, "exist_ok": True}
    assert calls[2][1].items() >= {"repo_id": "anna/songs", "revision": "b", "commit_message": "words", "repo_type": "model"}.items()
    assert sorted(p.name for p in (tmp_path / "uploaded").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert_equal(TransformerVQ.from_pretrained(tmp_path / "uploaded"), model)


def test_a_repository_name_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="a b"):
        tiny_model().push_to_hub("a b/c")


def test_without_the_extra_folders_load_and_the_rest_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    save_weights(model, model.config, tmp_path)
    hub._bridge.cache_clear()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert_equal(TransformerVQ.from_pretrained(tmp_path), model)
    for call in (
        lambda: TransformerVQ.from_pretrained("anna/songs"),
        lambda: model.save_pretrained(tmp_path),
        lambda: model.push_to_hub("anna/songs"),
    ):
        with pytest.raises(ImportError, match=r'needs the package huggingface_hub: pip install "vqkit\[hub\]"'):
            call()
