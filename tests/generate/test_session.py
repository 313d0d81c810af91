"""`load` and text: prompts, UTF-8 pieces, ends of documents."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import vqkit
from vqkit.data import ByteTokenizer
from vqkit.generate.engine import generate
from vqkit.generate.session import LoadedModel, _decode, load
from vqkit.generate.states import row_seeds
from vqkit.models import TransformerVQ
from vqkit.models.config import ModelConfig
from vqkit.models.weights import save_weights

CONFIG = ModelConfig(dim=16, key_dim=8, value_dim=12, layers=1, codebook_size=6, block_len=4, mem_len=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("weights")
    save_weights(TransformerVQ(CONFIG), CONFIG, folder)
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load(folder)


def test_vqkit_load_gives_a_model_that_writes(folder: Path) -> None:
    loaded = vqkit.load(folder)
    assert loaded.config == CONFIG
    assert loaded.path == folder
    assert not loaded.model.training
    assert loaded.generate("def ", 30, seed=1) == loaded.generate(b"def ", 30, seed=1) != ""


def test_generate_is_the_stream_joined(loaded: LoadedModel) -> None:
    pieces = list(loaded.stream("a", 200, seed=3))
    assert len(pieces) > 20
    assert "".join(pieces) == loaded.generate("a", 200, seed=3)


@pytest.mark.parametrize("prompt", [b"", b"xyz"])
def test_a_text_begins_after_an_end_token(loaded: LoadedModel, prompt: bytes) -> None:
    tokens = [ByteTokenizer.END, *ByteTokenizer().encode(prompt).tolist()]
    steps = generate(loaded.model, [tokens], 50, exclude=(0, 2), stop=(1,), seed=4)
    expected = ByteTokenizer().decode([int(step.tokens) for step in steps]).decode(errors="replace")
    assert loaded.generate(prompt, 50, seed=4) == expected


def test_the_end_of_a_document_ends_the_text_or_is_never_chosen(loaded: LoadedModel) -> None:
    model = deepcopy(loaded.model)
    with torch.no_grad():
        model.logits.bias[ByteTokenizer.END] += 4.0  # ends a document every few bytes
    hasty = replace(loaded, model=model)
    options = {"exclude": (0, 2), "seed": 5}
    tokens = [int(step.tokens) for step in generate(model, [[ByteTokenizer.END]], 100, **options)]
    end = tokens.index(ByteTokenizer.END)
    assert 0 < end < 60
    assert hasty.generate("", 100, seed=5) == ByteTokenizer().decode(tokens[:end]).decode(errors="replace")
    endless = [int(step.tokens) for step in generate(model, [[ByteTokenizer.END]], 100, exclude=(0, 1, 2), seed=5)]
    assert hasty.generate("", 100, seed=5, stop_at_end=False) == ByteTokenizer().decode(endless).decode(errors="replace")


def test_several_prompts_are_written_side_by_side_each_as_alone(loaded: LoadedModel) -> None:
    prompts = ["def ", b"", "a longer beginning\n"]
    texts = loaded.generate(prompts, 40, seed=3, repetition_penalty=1.1)
    for prompt, text, seed in zip(prompts, texts, row_seeds(3, 3), strict=True):
        assert loaded.generate(prompt, 40, seed=seed, repetition_penalty=1.1) == text != ""
    assert texts[0] != loaded.generate("def ", 40, seed=3)


def test_misspelled_options_and_a_loaded_model_in_place_of_its_module_are_named(loaded: LoadedModel) -> None:
    options: dict[str, Any] = {"temprature": 1.0}
    with pytest.raises(TypeError, match="unknown option 'temprature': there are temperature, top_k"):
        loaded.generate("a", 3, **options)
    anything: Any = loaded
    with pytest.raises(TypeError, match=r"model is a LoadedModel: must be a torch.nn.Module; pass its .model"):
        vqkit.update_codebooks_(anything)


@pytest.mark.parametrize("text", ["plain", "\u00e9\u20ac\U0001f600", "a\u00e9b\u20acc"])
def test_pieces_never_cut_a_character(text: str) -> None:
    data = text.encode()
    for cut in range(len(data) + 1):
        pieces = list(_decode(data[:cut], (bytes([b]) for b in data[cut:])))
        assert "".join(pieces) == text[len(data[:cut].decode(errors="ignore")) :]
        assert all(len(piece) == 1 for piece in pieces)


def test_bytes_that_are_no_text_are_replaced_at_once_and_at_the_end() -> None:
    assert list(_decode(b"", iter([b"a", b"\xff", b"b", b"\xe2", b"\x82"]))) == ["a", "\ufffd", "b", "\ufffd"]


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist: must be a run, checkpoint or export folder"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 300}, "vocabulary of 300 tokens, the tokenizer of bytes has 259"),
        ({"input": "features"}, 'model.input = "features": a tokenizer needs tokens'),
    ],
)
def test_models_of_other_things_than_text_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    config = replace(CONFIG, **change)
    save_weights(TransformerVQ(config), config, tmp_path)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)
