"""The parameter tree of the official Transformer-VQ (branch `main`) and our names for the same tensors, as pure functions of dicts.

Official keys are joined by `/`, without the leading `params/`. Kernels are [in, out] there and [out, in] here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from vqkit.compat.config import OfficialSettings
from vqkit.models.config import ModelConfig
from vqkit.quantizers.config import CodebookConfig

UNUSED = "token_embedder/bias_out"
"""Stands in the official tree beside every embedding; where the output is not tied it has neither effect nor gradient, and is dropped."""


class Place(NamedTuple):
    """Where the official tree holds one of our tensors."""

    key: str
    transposed: bool = False


_UNIT = {
    "norm.gain": Place("input_ln/g"),
    "norm.bias": Place("input_ln/b"),
    "q.weight": Place("q_proj/kernel", True),
    "kvg.weight": Place("kvg_proj/kernel", True),
    "r.weight": Place("r_proj/kernel", True),
    "out.weight": Place("res_proj/kernel", True),
    "content_bias": Place("u"),
    "position_bias": Place("v"),
}
_CODEBOOK = {"sum": Place("quantizer/c_sum"), "count": Place("quantizer/c_count")}


def unit_places() -> dict[str, Place]:
    """Our name of each parameter of one attention unit, and its place below the official unit."""
    return dict(_UNIT)


def parameter_places(config: ModelConfig) -> dict[str, Place]:
    """Our name of each parameter of the model, and its place."""
    places: dict[str, Place] = {}
    if config.tied or config.input == "tokens":
        places["embedding.weight"] = Place("token_embedder/embs")
    if config.absolute_positions:
        places["positions.scale"] = Place("position_embedder/scale")
    for ours, official in _unit_names(config):
        places |= {f"{ours}.{name}": Place(f"{official}/{place.key}", place.transposed) for name, place in _UNIT.items()}
    if config.output_norm:
        places |= {"norm.gain": Place("out_ln/g"), "norm.bias": Place("out_ln/b")}
    if not config.tied:
        places["logits.weight"] = Place("out_proj/kernel", True)
    places["logits.bias"] = Place(UNUSED if config.tied else "out_proj/bias")
    return places


def codebook_places(config: ModelConfig) -> dict[str, Place]:
    """Our name of each buffer of the codebooks, and its place."""
    return {
        f"{ours}.quantizer.{name}": Place(f"{official}/{place.key}")
        for ours, official in _unit_names(config)
        for name, place in _CODEBOOK.items()
    }


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every array of the official tree of such a model, by its key."""
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
    there = {place.key for place in parameter_places(config).values()} | _unused(config)
    found = {key: shape for key, shape in ends.items() if key in there}
    for _, official in _unit_names(config):
        found |= {f"{official}/{key}": shape for key, shape in unit.items()}
    return found


def from_official(arrays: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The arrays of the official parameter tree by our names, in our layout; none shares memory with `arrays`.

    Raises ValueError for a key that is missing or belongs to no part of the model, and for a shape that is not that of `config`; the
    message names key, expected and found shape.
    """
    check_keys_and_shapes(arrays, shapes(config))
    places = parameter_places(config) | codebook_places(config)
    return {ours: _flipped(arrays[place.key], place).clone(memory_format=torch.contiguous_format) for ours, place in places.items()}


def to_official(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The inverse of `from_official`, from a state dict; what else stands in it is left out. Raises ValueError for what is missing."""
    arrays = {}
    for ours, place in (parameter_places(config) | codebook_places(config)).items():
        if ours not in tensors:
            raise ValueError(f"tensor {ours!r} is missing: it would be {place.key!r} of the official tree")
        arrays[place.key] = _flipped(tensors[ours].detach(), place).clone(memory_format=torch.contiguous_format)
    like = tensors["logits.bias"].detach()
    arrays |= {key: torch.zeros_like(like) for key in _unused(config)}
    check_keys_and_shapes(arrays, shapes(config))
    return arrays


def infer_config(arrays: Mapping[str, Tensor], settings: OfficialSettings) -> ModelConfig:
    """The configuration that the shapes of the official parameter tree tell, the rest from `settings`.

    Raises ValueError for a tree that is not that of a Transformer-VQ: the message names the key and its shape.
    """
    layers = _count_layers(arrays)
    if settings.mem_len is None:
        raise ValueError("mem_len = None: no array of a checkpoint of branch main tells it; say what --mem_len of the official run was")
    first = "transformer_layers_0/scanned_attn1"
    heads, codebook_size, key_dim = _shape(arrays, f"{first}/quantizer/c_sum", 3)
    values, dim = _shape(arrays, f"{first}/res_proj/kernel", 2)
    if values % heads:
        raise ValueError(f"key {f'{first}/res_proj/kernel'!r} has shape {(values, dim)}, expected a multiple of {heads} heads in front")
    tied = "out_proj/kernel" not in arrays
    vocab_size = _shape(arrays, "token_embedder/embs", 2)[0] if tied else _shape(arrays, "out_proj/kernel", 2)[1]
    config = ModelConfig(
        vocab_size=vocab_size,
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
        output_norm="out_ln/g" in arrays,
        logit_scale=settings.logit_scale,
        codebook=CodebookConfig(decay=settings.decay),
    )
    check_keys_and_shapes(arrays, shapes(config))
    return config


def check_keys_and_shapes(arrays: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless `arrays` has exactly the expected keys and shapes, all floating point."""
    for key, shape in expected.items():
        if key not in arrays:
            raise ValueError(f"key {key!r} of shape {shape} is missing")
        if tuple(arrays[key].shape) != shape:
            raise ValueError(f"key {key!r} has shape {tuple(arrays[key].shape)}, expected {shape}")
        if not arrays[key].is_floating_point():
            raise ValueError(f"key {key!r} has type {_type(arrays[key])}, expected floating point")
    for key, array in arrays.items():
        if key not in expected:
            raise ValueError(f"key {key!r} of shape {tuple(array.shape)} belongs to no part of this model")


def _unit_names(config: ModelConfig) -> Iterable[tuple[str, str]]:
    """Our name of each attention unit and the official one, in order."""
    return [(f"layers.{i}.attention.{j}", f"transformer_layers_{i}/scanned_attn{j + 1}") for i in range(config.layers) for j in (0, 1)]


def _unused(config: ModelConfig) -> set[str]:
    return {UNUSED} if config.input == "tokens" and not config.tied else set()


def _type(array: Tensor) -> str:
    return str(array.dtype).removeprefix("torch.")


def _flipped(array: Tensor, place: Place) -> Tensor:
    return array.T if place.transposed else array


def _count_layers(arrays: Mapping[str, Tensor]) -> int:
    numbers = {int(match[1]) for key in arrays if (match := re.match(r"transformer_layers_(\d{1,6})/", key))}
    if not numbers:
        found = ", ".join(repr(key) for key in list(dict.fromkeys(key.split("/")[0] for key in arrays))[:8])
        raise ValueError(f"no key begins with 'transformer_layers_0/': no parameters of a Transformer-VQ (found {found or 'no array'})")
    if numbers != set(range(len(numbers))):
        gap = min(set(range(max(numbers) + 1)) - numbers)
        raise ValueError(f"keys 'transformer_layers_{gap}/...' are missing, though there are layers up to {max(numbers)}")
    return len(numbers)


def _shape(arrays: Mapping[str, Tensor], key: str, dimensions: int) -> tuple[int, ...]:
    if key not in arrays:
        raise ValueError(f"key {key!r} is missing, from which sizes of the model are read")
    shape = tuple(arrays[key].shape)
    if len(shape) != dimensions:
        raise ValueError(f"key {key!r} has shape {shape}, expected {dimensions} dimensions")
    return shape
