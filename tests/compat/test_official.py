"""Official checkpoints as models: what shapes tell, the way back, and what is refused by name. The arrays are in test_golden_checkpoint."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from official_files import nested, with_lists, write
from tiny_models import random_tokens, tiny_config, tiny_model
from vqkit.compat import OfficialSettings, load_official
from vqkit.compat.official_names import from_official, infer_config, parameter_places, shapes, to_official
from vqkit.models.config import ModelConfig
from vqkit.quantizers.config import CodebookConfig

FORMS: list[dict[str, Any]] = [
    {},
    {"layers": 3, "heads": 1, "absolute_positions": False},
    {"tied": True, "output_norm": False, "logit_scale": 0.005},
    {"input": "features", "position_base": 500.0},
    {"embedding_dropout": 0.1, "residual_dropout": 0.2, "sinusoid_dropout": 0.3, "layer_dropout": 0.4},
    {"input": "features", "tied": True, "cache": False, "cache_gradient": False, "codebook": CodebookConfig(decay=0.9)},
]


def settings_of(config: ModelConfig) -> OfficialSettings:
    return OfficialSettings(
        block_len=config.block_len,
        mem_len=config.mem_len,
        logit_scale=config.logit_scale,
        position_base=config.position_base,
        cache=config.cache,
        cache_gradient=config.cache_gradient,
        decay=config.codebook.decay,
        input=config.input,
        embedding_dropout=config.embedding_dropout,
        residual_dropout=config.residual_dropout,
        sinusoid_dropout=config.sinusoid_dropout,
        layer_dropout=config.layer_dropout,
    )


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_model_comes_back_through_its_official_form(tmp_path: Path, form: dict[str, Any]) -> None:
    model = tiny_model(**form)
    arrays = to_official(model.state_dict(), model.config)
    assert {key: tuple(array.shape) for key, array in arrays.items()} == shapes(model.config)
    assert infer_config(arrays, settings_of(model.config)) == model.config

    path = write(nested({f"params/{key}": array for key, array in arrays.items()}), tmp_path / "checkpoint_7")
    loaded = load_official(tmp_path, settings_of(model.config))
    assert load_official(path, model.config).config == loaded.config == model.config
    assert (loaded.step, loaded.optimizer) == (None, None)
    expected = model.state_dict()
    assert loaded.model.state_dict().keys() == expected.keys()
    for name, tensor in loaded.model.state_dict().items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


def test_every_parameter_has_one_place_of_its_own() -> None:
    for form in FORMS:
        model = tiny_model(**form)
        places = parameter_places(model.config)
        assert places.keys() == dict(model.named_parameters()).keys()
        assert len({place.keys for place in places.values()}) == len(places)


def test_what_is_loaded_is_its_own() -> None:
    model = tiny_model()
    arrays = to_official(model.state_dict(), model.config)
    for tensor in from_official(arrays, model.config).values():
        tensor.zero_()
    assert all(torch.equal(arrays[key], array) for key, array in to_official(model.state_dict(), model.config).items())


def test_narrow_parameters_become_float32(tmp_path: Path) -> None:
    model = tiny_model().float()
    arrays = {key: array.bfloat16() for key, array in to_official(model.state_dict(), model.config).items()}
    loaded = load_official(write(nested(arrays), tmp_path / "params"), model.config).model
    for key, array in to_official(loaded.state_dict(), model.config).items():
        assert array.dtype == torch.float32
        assert torch.equal(array, arrays[key].float())
    assert loaded(random_tokens(1, 5)).logits.isfinite().all()


def test_loading_leaves_the_random_numbers_alone(tmp_path: Path) -> None:
    model = tiny_model()
    path = write(nested(to_official(model.state_dict(), model.config)), tmp_path / "params")
    state = torch.get_rng_state()
    load_official(path, model.config)
    assert torch.equal(torch.get_rng_state(), state)


def test_neither_jax_nor_flax_is_asked_for(tmp_path: Path) -> None:
    model = tiny_model()
    path = write(nested(to_official(model.state_dict(), model.config)), tmp_path / "params")
    code = (
        "import sys\nfor name in ('jax', 'flax', 'optax', 'ml_dtypes', 'pickle5'): sys.modules[name] = None\n"
        "from vqkit.compat import OfficialSettings, load_official\n"
        f"print(load_official({str(path)!r}, OfficialSettings(block_len=4, mem_len=3, logit_scale=1.0)).config.dim)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.strip() == "8", done.stderr


Change = Callable[[dict[str, Tensor]], Any]
UNIT = "transformer_layers_0/scanned_attn2"


def without(*keys: str) -> Change:
    return lambda arrays: [arrays.pop(key) for key in keys]


def put(key: str, value: Any) -> Change:
    return lambda arrays: arrays.update({key: value})


BAD: dict[str, tuple[Change, str]] = {
    "another model": (
        lambda arrays: [arrays.clear(), arrays.update({"dense/kernel": torch.zeros(2, 2)})],
        "no key begins with 'transformer_layers_' or 'stack/': no parameters of a Transformer-VQ (found 'dense')",
    ),
    "nothing": (lambda arrays: arrays.clear(), "(found no array)"),
    "a missing kernel": (without(f"{UNIT}/q_proj/kernel"), f"key '{UNIT}/q_proj/kernel' of shape (8, 8) is missing"),
    "a missing codebook": (
        without("transformer_layers_0/scanned_attn1/quantizer/c_sum"),
        "key 'transformer_layers_0/scanned_attn1/quantizer/c_sum' is missing",
    ),
    "a missing embedding": (
        without("token_embedder/embs"),
        "key 'token_embedder/bias_out' of shape (11,) belongs to no part of this model",
    ),
    "a key more": (
        put(f"{UNIT}/mlp/kernel", torch.zeros(2, 3)),
        f"key '{UNIT}/mlp/kernel' of shape (2, 3) belongs to no part of this model",
    ),
    "another width": (put(f"{UNIT}/input_ln/g", torch.zeros(9)), f"key '{UNIT}/input_ln/g' has shape (9,), expected (8,)"),
    "transposed": (
        lambda arrays: arrays.update({"out_proj/kernel": arrays["out_proj/kernel"].T}),
        "key 'token_embedder/embs' has shape (11, 8), expected (8, 8)",
    ),
    "a flat codebook": (
        put("transformer_layers_0/scanned_attn1/quantizer/c_sum", torch.zeros(5, 4)),
        "c_sum' has shape (5, 4), expected 3 dimensions",
    ),
    "integers": (put("out_proj/bias", torch.zeros(11, dtype=torch.int32)), "key 'out_proj/bias' has type int32, expected floating point"),
    "values of half heads": (
        put("transformer_layers_0/scanned_attn1/res_proj/kernel", torch.zeros(7, 8)),
        "has shape (7, 8), expected a multiple of 2 heads in front",
    ),
    "a gap in the layers": (put("transformer_layers_2/scanned_attn1/u", torch.zeros(8)), "keys 'transformer_layers_1/...' are missing"),
    "an odd width": (
        lambda arrays: arrays.update({key: torch.zeros(12, 7) for key in ("transformer_layers_0/scanned_attn1/res_proj/kernel",)}),
        "model.dim = 7: must be even",
    ),
}


@pytest.mark.parametrize("state", [False, True], ids=["parameters alone", "training state"])
@pytest.mark.parametrize("case", BAD)
def test_a_tree_that_does_not_fit_is_refused_by_name(tmp_path: Path, case: str, state: bool) -> None:
    change, message = BAD[case]
    model = tiny_model()
    arrays = to_official(model.state_dict(), model.config)
    change(arrays)
    if state and not arrays:
        message = "key 'params' is missing or empty"
    tree = {"step": 3, "opt_state": {}, "params": nested(arrays)} if state else nested(arrays)
    path = write(tree, tmp_path / "checkpoint")
    with pytest.raises(ValueError) as error:
        load_official(path, settings_of(model.config))
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"heads": 1}, "q_proj/kernel' has shape (8, 8), expected (8, 4)"),
        ({"layers": 2}, "key 'transformer_layers_1/scanned_attn1/input_ln/g' of shape (8,) is missing"),
        ({"codebook_size": 6}, "c_sum' has shape (2, 5, 4), expected (2, 6, 4)"),
        ({"vocab_size": 12}, "key 'token_embedder/embs' has shape (11, 8), expected (12, 8)"),
        ({"tied": True}, "key 'out_proj/kernel' of shape (8, 11) belongs to no part of this model"),
        ({"output_norm": False}, "key 'out_ln/g' of shape (8,) belongs to no part of this model"),
        ({"absolute_positions": False}, "key 'position_embedder/scale' of shape () belongs to no part of this model"),
    ],
    ids=str,
)
def test_a_wrong_statement_names_key_and_shapes(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    model = tiny_model()
    path = write(nested(to_official(model.state_dict(), model.config)), tmp_path / "params")
    with pytest.raises(ValueError) as error:
        load_official(path, replace(model.config, **change))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "name, value",
    [("block_len", 0), ("mem_len", True), ("logit_scale", 0.0), ("position_base", 1), ("decay", 1), ("layer_dropout", 1.0), ("input", "x")],
)
def test_settings_that_make_no_sense_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} = {value!r}: must be"):
        replace(settings_of(tiny_config()), **{name: value})


def test_what_cannot_be_inferred_is_asked_for() -> None:
    model = tiny_model()
    settings = replace(settings_of(model.config), mem_len=None)
    with pytest.raises(ValueError, match=r"^mem_len = None: no array of a checkpoint of branch main tells it"):
        infer_config(to_official(model.state_dict(), model.config), settings)


@pytest.mark.parametrize(
    "more, message",
    [
        ({"step": 3}, "key 'params' is missing or empty"),
        ({"step": 3, "extra": {"a": 1}}, "key 'extra/a' of shape (): a training state holds step, params and opt_state"),
        ({"params": ..., "step": -1}, "key 'step' has type torch.int64 and shape (), expected one integer of at least 0"),
        (
            {"params": ..., "step": torch.zeros(2, dtype=torch.int32)},
            "key 'step' has type torch.int32 and shape (2,), expected one integer",
        ),
        ({"params": ..., "step": torch.tensor(1.0)}, "key 'step' has type torch.float32"),
    ],
    ids=str,
)
def test_a_training_state_of_another_form_is_refused(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    tree = nested(more)
    if "params" in more:
        tree["params"] = nested(to_official(tiny_model().state_dict(), tiny_config()))
    path = write(tree, tmp_path / "checkpoint")
    with pytest.raises(ValueError) as error:
        load_official(path, settings_of(tiny_config()))
    assert message in str(error.value)


def test_which_file_a_path_means(tmp_path: Path) -> None:
    model = tiny_model()
    other = tiny_model(seed=1)
    for number, at in ((99, model), (100, other)):
        tree = {"step": number, "params": nested(to_official(at.state_dict(), at.config))}
        write(tree, tmp_path / "single" / f"checkpoint_{number}")
        write(with_lists(tree), tmp_path / "folders" / f"checkpoint_{number}" / "checkpoint")
    (tmp_path / "single" / "checkpoint_last").mkdir()
    for path, step in (("single", 100), ("folders", 100), ("single/checkpoint_99", 99), ("folders/checkpoint_99", 99)):
        loaded = load_official(tmp_path / path, model.config)
        assert loaded.step == step
        assert torch.equal(loaded.model.logits.bias, (other if step == 100 else model).logits.bias)

    (tmp_path / "empty" / "checkpoint_5").mkdir(parents=True)
    for path, message in (
        ("nowhere", "does not exist: must be an official checkpoint"),
        ("empty", "checkpoint_5/checkpoint is missing"),
        ("empty/checkpoint_5", "neither a file named checkpoint in it, nor"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            load_official(tmp_path / path, model.config)


def test_the_public_names_of_the_room() -> None:
    import vqkit

    assert vqkit.compat.load_official is load_official
    assert vqkit.compat.__all__ == ["OfficialModel", "OfficialSettings", "load_official", "run_config", "write_run"]
