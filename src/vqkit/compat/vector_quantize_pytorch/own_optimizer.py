"""The optimizer that a codebook has of its own, in the state dict of the module that owns it, which in the peer has no place for it.

What it remembers stands beside the parameters as NAME.PARAMETER.KEY, in tensors, PARAMETER the number of the parameter, and only where it
remembers anything: SGD without momentum adds no key. Its settings are those that it is made with.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

NAME = "in_place_codebook_optimizer"


def _save(optimizer: Optimizer | None, destination: dict[str, Any], prefix: str) -> None:
    """Add what `optimizer` remembers."""
    state = {} if optimizer is None else optimizer.state_dict()["state"]
    for number, of_parameter in state.items():
        for key, value in of_parameter.items():
            if value is not None:
                destination[f"{prefix}{NAME}.{number}.{key}"] = _stored(value)


def _stored(value: Any) -> Any:
    """A tensor of a tensor or a number; what is neither, as a list of tensors, stays what it is."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return torch.tensor(value) if isinstance(value, (bool, int, float)) else copy.deepcopy(value)


def _load(optimizer: Optimizer | None, state_dict: Mapping[str, Any], prefix: str, unexpected_keys: list[str]) -> None:
    """Let it remember what `state_dict` says, or nothing; without an optimizer the keys stay unexpected."""
    if optimizer is None:
        return
    start = f"{prefix}{NAME}."
    own = {key: value for key, value in state_dict.items() if key.startswith(start)}
    state: dict[int, dict[str, Any]] = {}
    for key, value in own.items():
        number, name = key.removeprefix(start).split(".", 1)
        state.setdefault(int(number), {})[name] = copy.deepcopy(value)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    unexpected_keys[:] = [key for key in unexpected_keys if key not in own]


class OwnsOptimizer(nn.Module):
    """A module with an optimizer of its codebook's own, or None."""

    in_place_codebook_optimizer: Optimizer | None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        _save(self.in_place_codebook_optimizer, destination, prefix)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        _load(self.in_place_codebook_optimizer, state_dict, prefix, unexpected_keys)
