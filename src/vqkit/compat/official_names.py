"""The parameter trees of the official Transformer-VQ and our names for the same tensors, as pure functions of dicts.

Two branches of the official code have trees of their own: `main` (`official_main`) and `optimized` (`official_optimized`). The
configuration decides which is meant. Official keys are joined by `/`, without the leading `params/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor

from vqkit.compat import official_main, official_optimized
from vqkit.compat.config import OfficialSettings
from vqkit.compat.official_tree import Place, check_keys_and_shapes, first_names, joined, parted
from vqkit.models.config import ModelConfig

_BRANCHES = {"main": official_main, "optimized": official_optimized}


def branch_of(config: ModelConfig) -> str:
    """The official branch, "main" or "optimized", that has such a model. Raises ValueError where neither has, and names the option."""
    name = "main" if config.norm == "affine" else "optimized"
    for option, value, fits in _BRANCHES[name].demands(config):
        if not fits:
            raise ValueError(f"model.{option} = {value!r}: branch {name} of the official code has no such model")
    return name


def parameter_places(config: ModelConfig) -> dict[str, Place]:
    """Our name of each parameter of the model, and where the official tree holds it."""
    return _branch(config).parameter_places(config)


def codebook_places(config: ModelConfig) -> dict[str, Place]:
    """Our name of each buffer of the codebooks, and where the official tree holds it."""
    return _branch(config).codebook_places(config)


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every array of the official tree of such a model, by its key."""
    return _branch(config).shapes(config)


def unused(config: ModelConfig) -> set[str]:
    """Keys of the official tree that have no effect, and no counterpart here."""
    return shapes(config).keys() - {key for place in _places(config).values() for key in place.keys}


def from_official(arrays: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The arrays of the official parameter tree by our names, in our layout; none shares memory with `arrays`.

    Raises ValueError for a key that is missing or belongs to no part of the model, and for a shape that is not that of `config`; the
    message names key, expected and found shape.
    """
    check_keys_and_shapes(arrays, shapes(config))
    return {ours: joined([arrays[key] for key in place.keys], place) for ours, place in _places(config).items()}


def to_official(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The inverse of `from_official`, from a state dict; what else stands in it is left out, what is unused is 0.

    Raises ValueError for a tensor that is missing.
    """
    expected = shapes(config)
    layers: dict[str, list[Tensor]] = {}
    for ours, place in _places(config).items():
        if ours not in tensors:
            raise ValueError(f"tensor {ours!r} is missing: it would be {' and '.join(place.keys)} of the official tree")
        for key, part in zip(place.keys, parted(tensors[ours].detach(), place, expected), strict=True):
            layers.setdefault(key, []).append(part)
    stacked = {key for place in _places(config).values() if place.layer is not None for key in place.keys}
    arrays = {key: (torch.stack(parts)[:, None] if key in stacked else parts[0]).clone() for key, parts in layers.items()}
    like = next(iter(arrays.values()))
    arrays |= {key: like.new_zeros(expected[key]) for key in unused(config)}
    check_keys_and_shapes(arrays, expected)
    return arrays


def infer_config(arrays: Mapping[str, Tensor], settings: OfficialSettings) -> ModelConfig:
    """The configuration that the shapes of the official parameter tree tell, the rest from `settings`.

    Raises ValueError for a tree that is not that of a Transformer-VQ, for a setting that the tree contradicts, and for one that is
    needed and None; the message names the key, what was expected and what was found.
    """
    for branch in _BRANCHES.values():
        if any(key.startswith(branch.PREFIX) for key in arrays):
            config = branch.infer_config(arrays, settings)
            check_keys_and_shapes(arrays, branch.shapes(config))
            return config
    begin = " or ".join(repr(branch.PREFIX) for branch in _BRANCHES.values())
    raise ValueError(f"no key begins with {begin}: no parameters of a Transformer-VQ (found {first_names(arrays)})")


def _branch(config: ModelConfig) -> ModuleType:
    return _BRANCHES[branch_of(config)]


def _places(config: ModelConfig) -> dict[str, Place]:
    return parameter_places(config) | codebook_places(config)
