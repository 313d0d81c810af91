"""The parameter tree of branch `main` of the official Transformer-VQ: gated layers, each unit with keys of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from vqkit.compat.config import OfficialSettings
from vqkit.compat.official_tree import Place, at, check_stated, shape_of
from vqkit.models.config import ModelConfig
from vqkit.models.presets import official_main
from vqkit.quantizers.config import CodebookConfig

PREFIX = "transformer_layers_"
UNUSED = "token_embedder/bias_out"
"""Stands in the official tree beside every embedding; where the output is not tied it has neither effect nor gradient."""

UNIT = {
    "norm.gain": at("input_ln/g"),
    "norm.bias": at("input_ln/b"),
    "q.weight": at("q_proj/kernel", True),
    "kvg.weight": at("kvg_proj/kernel", True),
    "r.weight": at("r_proj/kernel", True),
    "out.weight": at("res_proj/kernel", True),
    "content_bias": at("u"),
    "position_bias": at("v"),
}
"""Our name of each parameter of one attention unit, and its place below the official unit."""

_CODEBOOK = {"sum": "quantizer/c_sum", "count": "quantizer/c_count"}


def demands(config: ModelConfig) -> list[tuple[str, object, bool]]:
    """Options that a model of this branch has one value of: name, value, and whether it is that."""
    return [
        ("layer", config.layer, config.layer == "gated"),
        ("attention", config.attention, config.attention == "vq"),
        ("key_heads", config.key_heads, config.num_key_heads == config.heads),
        ("quantizer", config.quantizer, config.quantizer == "learnable"),
        ("relative_positions", config.relative_positions, config.relative_positions),
        ("tied_bias", config.tied_bias, config.tied_bias),
        ("logit_scale_at", config.logit_scale_at, config.logit_scale_at == "logits" or config.logit_scale == 1.0),
    ]


def parameter_places(config: ModelConfig) -> dict[str, Place]:
    """Our name of each parameter, and its place."""
    places: dict[str, Place] = {}
    if config.tied or config.input == "tokens":
        places["embedding.weight"] = at("token_embedder/embs")
    if config.absolute_positions:
        places["positions.scale"] = at("position_embedder/scale")
    for ours, official in _unit_names(config):
        places |= {f"{ours}.{name}": at(f"{official}/{place.keys[0]}", place.transposed) for name, place in UNIT.items()}
    if config.output_norm:
        places |= {"norm.gain": at("out_ln/g"), "norm.bias": at("out_ln/b")}
    if not config.tied:
        places["logits.weight"] = at("out_proj/kernel", True)
    places["logits.bias"] = at(UNUSED if config.tied else "out_proj/bias")
    return places


def codebook_places(config: ModelConfig) -> dict[str, Place]:
    """Our name of each buffer of the codebooks, and its place."""
    return {
        f"{ours}.quantizer.{name}": at(f"{official}/{key}") for ours, official in _unit_names(config) for name, key in _CODEBOOK.items()
    }


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every array, by its key."""
    keys, values = config.heads * config.key_dim, config.heads * config.value_dim
    unit: dict[str, tuple[int, ...]] = {
        "input_ln/g": (config.dim,),
        "input_ln/b": (config.dim,),
        "q_proj/kernel": (config.dim, keys),
        "kvg_proj/kernel": (config.dim, keys + 2 * values),
        "r_proj/kernel": (config.dim, keys),
        "res_proj/kernel": (values, config.dim),
        "u": (keys,),
        "v": (keys,),
        "quantizer/c_sum": (config.heads, config.codebook_size, config.key_dim),
        "quantizer/c_count": (config.heads, config.codebook_size),
    }
    ends: dict[str, tuple[int, ...]] = {
        "token_embedder/embs": (config.vocab_size, config.dim),
        "position_embedder/scale": (),
        "out_ln/g": (config.dim,),
        "out_ln/b": (config.dim,),
        "out_proj/kernel": (config.dim, config.vocab_size),
        "out_proj/bias": (config.vocab_size,),
        UNUSED: (config.vocab_size,),
    }
    there = {place.keys[0] for place in parameter_places(config).values()}
    if "token_embedder/embs" in there:
        there.add(UNUSED)
    found = {key: shape for key, shape in ends.items() if key in there}
    for _, official in _unit_names(config):
        found |= {f"{official}/{key}": shape for key, shape in unit.items()}
    return found


def infer_config(arrays: Mapping[str, Tensor], settings: OfficialSettings) -> ModelConfig:
    """What the shapes tell, the rest from `settings`; raises ValueError for a contradiction."""
    layers = _count_layers(arrays)
    if settings.mem_len is None:
        raise ValueError("mem_len = None: no array of a checkpoint of branch main tells it; say what --mem_len of the official run was")
    c_sum, res_proj = f"{PREFIX}0/scanned_attn1/quantizer/c_sum", f"{PREFIX}0/scanned_attn1/res_proj/kernel"
    heads, codebook_size, key_dim = shape_of(arrays, c_sum, 3)
    values, dim = shape_of(arrays, res_proj, 2)
    if values % heads:
        raise ValueError(f"key {res_proj!r} has shape {(values, dim)}, expected a multiple of {heads} heads in front")
    output_norm = "out_ln/g" in arrays
    check_stated("key_dim", settings.key_dim, key_dim, c_sum, (heads, codebook_size, key_dim))
    check_stated("output_norm", settings.output_norm, output_norm, "out_ln/g", tuple(arrays["out_ln/g"].shape) if output_norm else None)
    tied = "out_proj/kernel" not in arrays
    return official_main(
        vocab_size=shape_of(arrays, "token_embedder/embs", 2)[0] if tied else shape_of(arrays, "out_proj/kernel", 2)[1],
        dim=dim,
        key_dim=key_dim,
        value_dim=values // heads,
        layers=layers,
        heads=heads,
        codebook_size=codebook_size,
        block_len=settings.block_len,
        mem_len=settings.mem_len,
        cache=settings.cache,
        cache_gradient=settings.cache_gradient,
        input=settings.input if "token_embedder/embs" in arrays else "features",
        absolute_positions="position_embedder/scale" in arrays,
        position_base=settings.position_base,
        tied=tied,
        output_norm=output_norm,
        logit_scale=settings.logit_scale,
        codebook=CodebookConfig(decay=settings.decay),
        **settings.dropouts,
    )


def _unit_names(config: ModelConfig) -> list[tuple[str, str]]:
    """Our name of each attention unit and the official one, in order."""
    return [(f"layers.{i}.attention.{j}", f"{PREFIX}{i}/scanned_attn{j + 1}") for i in range(config.layers) for j in (0, 1)]


def _count_layers(arrays: Mapping[str, Tensor]) -> int:
    numbers = {int(match[1]) for key in arrays if (match := re.match(rf"{PREFIX}(\d{{1,6}})/", key))}
    if numbers != set(range(len(numbers))) or not numbers:
        gap = min(set(range(max(numbers, default=0) + 1)) - numbers)
        raise ValueError(f"keys '{PREFIX}{gap}/...' are missing; there are layers up to {max(numbers, default='no number')}")
    return len(numbers)
