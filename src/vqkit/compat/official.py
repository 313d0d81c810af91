"""Checkpoints of the official Transformer-VQ as models of ours, without JAX or Flax.

The file forms are those that its launch script writes and reads: one msgpack file, or a folder `checkpoint_N` with the file
`checkpoint` in it; each holds a training state (`step`, `params`, `opt_state`) or the parameters alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vqkit.compat.config import OfficialSettings
from vqkit.compat.flax_file import read_tensors
from vqkit.compat.official_names import from_official, infer_config
from vqkit.compat.official_optimizer import OptimizerState, optimizer_from_official, read_count
from vqkit.models.config import ModelConfig
from vqkit.models.transformer import TransformerVQ


class OfficialModel(NamedTuple):
    """What an official checkpoint holds, in our terms."""

    model: TransformerVQ
    config: ModelConfig
    step: int | None
    """Updates done, where the checkpoint says it."""
    optimizer: OptimizerState | None
    """What the optimizer remembers; None for parameters alone."""


def load_official(path: str | os.PathLike[str], settings: OfficialSettings | ModelConfig) -> OfficialModel:
    """The model in an official checkpoint, in evaluation mode, in float32 (float64 where it is stored so).

    Sizes, tying, norms and positions are read from the shapes of the arrays; what no array tells comes from `settings`. A whole
    `ModelConfig` in their place is compared with every shape. `path` is a file, a folder `checkpoint_N`, or a folder of those, of which
    the newest is taken.

    Raises ImportError without the package msgpack, FileNotFoundError, and ValueError for a file that is damaged, is none of the official
    code, or does not fit: the message names the key, what was expected and what was found.
    """
    file = find_official(path)
    params, opt_state, step = split_tree(read_tensors(file), f"{file}")
    try:
        config = settings if isinstance(settings, ModelConfig) else infer_config(params, settings)
        tensors = from_official(params, config)
        optimizer = optimizer_from_official(opt_state, config)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return OfficialModel(_model(config, tensors), config, step, optimizer)


def find_official(path: str | os.PathLike[str]) -> Path:
    """The msgpack file that `path` names: itself, `checkpoint` in a folder of that form, or the newest `checkpoint_N` in a folder."""
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist: must be an official checkpoint, a file or a folder checkpoint_N")
    if (path / "checkpoint").is_file():
        return path / "checkpoint"
    numbered = {int(m[1]): p for p in path.iterdir() if (m := re.fullmatch(r"checkpoint_(\d{1,18})", p.name))}
    if not numbered:
        raise FileNotFoundError(f"{path}: neither a file named checkpoint in it, nor a file or folder named checkpoint_N")
    newest = numbered[max(numbered)]
    newest = newest if newest.is_file() else newest / "checkpoint"
    if not newest.is_file():
        raise FileNotFoundError(f"{newest} is missing: official checkpoints are one msgpack file, alone or in a folder checkpoint_N")
    return newest


def split_tree(arrays: Mapping[str, Tensor], where: str) -> tuple[dict[str, Tensor], dict[str, Tensor], int | None]:
    """Parameters, optimizer state and step of a training state; of a tree of parameters alone, these, nothing and None."""
    if not any(key == "step" or key.startswith(("params/", "opt_state/")) for key in arrays):
        return dict(arrays), {}, None
    params, opt_state = _below("params/", arrays), _below("opt_state/", arrays)
    for key, array in arrays.items():
        if not key.startswith(("params/", "opt_state/")) and key != "step":
            raise ValueError(f"{where}: key {key!r} of shape {tuple(array.shape)}: a training state holds step, params and opt_state")
    if not params:
        raise ValueError(f"{where}: key 'params' is missing or empty")
    try:
        return params, opt_state, read_count(arrays["step"], "step") if "step" in arrays else None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _below(prefix: str, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}


def _model(config: ModelConfig, tensors: Mapping[str, Tensor]) -> TransformerVQ:
    with torch.random.fork_rng(devices=[]):
        model = TransformerVQ(config)
    if any(tensor.dtype == torch.float64 for tensor in tensors.values()):
        model = model.double()
    # What the official tree does not have is what a codebook without pending statistics starts with.
    missing, unexpected = model.load_state_dict(dict(tensors), strict=False)
    unknown = [*unexpected, *(name for name in missing if name in dict(model.named_parameters()))]
    if unknown:
        raise RuntimeError(f"the mapping of names leaves {unknown[0]!r} out")
    return model.eval()
