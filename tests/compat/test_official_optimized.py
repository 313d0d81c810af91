"""Checkpoints of branch `optimized`: every head type, with quantized keys and without, there and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from official_files import nested, write
from tiny_models import random_tokens
from vqkit.compat import OfficialSettings, load_official
from vqkit.compat.official_names import branch_of, from_official, infer_config, parameter_places, shapes, to_official
from vqkit.models.config import ModelConfig
from vqkit.models.presets import official_main, official_optimized
from vqkit.models.transformer import TransformerVQ

HEADS: list[Any] = ["shga", "mqa", "mha"]
FORMS: list[dict[str, Any]] = [
    {"layers": 2, "tied": True, "absolute_positions": True, "logit_scale": 0.005},
    {"layers": 3, "output_norm": False, "position_base": 500.0},
]


def config_of(head_type: Any, attention: str, **form: Any) -> ModelConfig:
    sizes = {"dim": 12, "key_dim": 4, "block_len": 4, "vocab_size": 11, "codebook_size": 128 if attention == "full" else 5}
    return official_optimized(head_type, **sizes, attention=attention, **form)


def model_of(config: ModelConfig) -> TransformerVQ:
    model = TransformerVQ(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.6)
    return model


def settings_of(config: ModelConfig, **changes: Any) -> OfficialSettings:
    stated = {"block_len": config.block_len, "logit_scale": config.logit_scale, "position_base": config.position_base}
    needed = config.attention == "full" and config.layer == "feed_forward" and config.num_key_heads == config.heads
    stated |= {"output_norm": config.output_norm, "key_dim": config.key_dim if needed else None}
    return OfficialSettings(**(stated | changes))


@pytest.mark.parametrize("form", FORMS, ids=["tied", "untied"])
@pytest.mark.parametrize("attention", ["vq", "full"])
@pytest.mark.parametrize("head_type", HEADS)
def test_a_model_comes_back_through_its_official_form(tmp_path: Path, head_type: Any, attention: str, form: dict[str, Any]) -> None:
    config = config_of(head_type, attention, **form)
    model = model_of(config)
    assert branch_of(config) == "optimized"
    assert parameter_places(config).keys() == dict(model.named_parameters()).keys()
    arrays = to_official(model.state_dict(), config)
    assert {key: tuple(array.shape) for key, array in arrays.items()} == shapes(config)
    path = write({"params": nested(arrays), "step": 5}, tmp_path / "checkpoint_5")
    loaded = load_official(path, settings_of(config))
    assert loaded.config == config
    expected = model.state_dict()
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    with torch.no_grad():
        assert torch.equal(loaded.model(random_tokens(2, 9)).logits, model(random_tokens(2, 9)).logits)


def test_keys_values_and_gates_are_rows_of_one_weight_and_layers_do_not_mix() -> None:
    config = config_of("shga", "vq", layers=2)
    arrays = to_official(model_of(config).state_dict(), config)
    kernels = {name: torch.full_like(arrays[f"stack/VQAttention_1/qkvg_producer/{name}_proj/kernel"], i) for i, name in enumerate("kvg")}
    for name, kernel in kernels.items():
        kernel[1, 0] += 10
        arrays[f"stack/VQAttention_1/qkvg_producer/{name}_proj/kernel"] = kernel
    weights = [from_official(arrays, config)[f"layers.{layer}.attention.1.kvg.weight"] for layer in (0, 1)]
    rows = torch.cat([torch.full((width,), float(i)) for i, width in enumerate((4, 24, 24))]).double()
    assert torch.equal(weights[0], rows[:, None].expand(-1, 12))
    assert torch.equal(weights[1], weights[0] + 10)


@pytest.mark.parametrize(
    "head_type, attention, changes, message",
    [
        ("mha", "vq", {"output_norm": None}, "output_norm = None: no array of a checkpoint of branch optimized tells it"),
        ("mha", "full", {"key_dim": None}, "key_dim = None: no array of ordinary multi-head attention tells the width of a head"),
        (
            "mha",
            "full",
            {"key_dim": 5},
            "key_dim = 5: key 'stack/FullAttention_0/qkvg_producer/k_proj/kernel' has shape (1, 1, 12, 12), exp",
        ),
        ("mha", "vq", {"key_dim": 6}, "c_sum' has shape (1, 1, 3, 5, 4), expected key_dim = 4"),
        ("mqa", "full", {"key_dim": 6}, "k_proj/kernel' has shape (1, 1, 12, 4), expected key_dim = 4"),
        ("mqa", "vq", {"mem_len": 3}, "mem_len = 3: the window of branch optimized is a block, expected 4 or None"),
    ],
)
def test_settings_that_are_missing_or_wrong(head_type: Any, attention: str, changes: dict[str, Any], message: str) -> None:
    config = config_of(head_type, attention, layers=1)
    with pytest.raises(ValueError) as error:
        infer_config(to_official(model_of(config).state_dict(), config), settings_of(config, **changes))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "key, shape, message",
    [
        ("stack/VQAttention_0/res_proj/kernel", (1, 1, 13, 12), "has shape (1, 1, 13, 12), expected (1, 1, 12, 12)"),
        (
            "stack/VQAttention_0/qkvg_producer/v_proj/kernel",
            (1, 1, 12, 13),
            "has shape (1, 1, 12, 13), expected a multiple of 3 at the end",
        ),
        (
            "stack/VQAttention_0/qkvg_producer/q_proj/kernel",
            (1, 1, 12, 13),
            "has shape (1, 1, 12, 13), expected a multiple of 4 at the end",
        ),
        ("stack/VQAttention_0/qkvg_producer/q_proj/kernel", (1, 12, 12), "has shape (1, 12, 12), expected 4 dimensions"),
        ("stack/VQAttention_0/xl_bias_producer/xl_u", (2, 1, 12), "has shape (2, 1, 12), expected (1, 1, 12)"),
        ("stack/VQAttention_1/xl_bias_producer/xl_u", (1, 1, 12), "of shape (1, 1, 12) belongs to no part of this model"),
    ],
)
def test_a_tree_that_does_not_fit_is_refused_by_name(key: str, shape: tuple[int, ...], message: str) -> None:
    config = config_of("mha", "vq", layers=1)
    arrays = to_official(model_of(config).state_dict(), config) | {key: torch.zeros(shape)}
    with pytest.raises(ValueError) as error:
        infer_config(arrays, settings_of(config))
    assert f"key {key!r} {message}" in str(error.value)


@pytest.mark.parametrize("key", sorted(shapes(config_of("shga", "vq", layers=2))))
def test_every_key_is_needed(key: str) -> None:
    config = config_of("shga", "vq", layers=2)
    arrays = to_official(model_of(config).state_dict(), config)
    del arrays[key]
    with pytest.raises(ValueError, match=r"is missing|belongs to no part"):
        infer_config(arrays, settings_of(config))


@pytest.mark.parametrize(
    "config, option",
    [
        (replace(official_main(dim=12), layer="feed_forward"), "layer"),
        (replace(official_main(dim=12), attention="full"), "attention"),
        (replace(official_main(dim=12), heads=4, key_heads=2), "key_heads"),
        (replace(official_main(dim=12), quantizer="sinusoidal"), "quantizer"),
        (replace(official_main(dim=12), relative_positions=False), "relative_positions"),
        (replace(official_main(dim=12), logit_scale=0.5, logit_scale_at="input"), "logit_scale_at"),
        (replace(config_of("mha", "vq"), mem_len=5), "mem_len"),
        (replace(config_of("shga", "vq"), heads=2), "heads"),
        (replace(config_of("shga", "vq"), input="features"), "input"),
        (replace(config_of("shga", "vq"), tied=True, tied_bias=True), "tied_bias"),
    ],
    ids=str,
)
def test_a_model_that_no_branch_has_is_refused_by_its_option(config: ModelConfig, option: str) -> None:
    with pytest.raises(ValueError, match=rf"^model\.{option} = .*: branch (main|optimized) of the official code has no such model"):
        shapes(config)
