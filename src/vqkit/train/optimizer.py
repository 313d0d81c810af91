"""Optimizers composed as the official Transformer-VQ composes them: clip, rule with its learning rate, schedule multiplier, decay.

The decay is a share of the parameter per step, scaled by neither learning rate nor schedule. Codebooks are no parameters
of these optimizers: they change in `vqkit.quantizers.update_codebooks_`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vqkit.train.config import TrainConfig
from vqkit.train.schedule import schedule_multiplier
from vqkit.train.update_rules import Adafactor, Adam, Lion

STACK = "layers."
"""What the names of parameters within layers begin with."""


class Optimizer:
    """Steps the named parameters of a model from their gradients.

    Parameters without a gradient are decayed, and else left alone.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], config: TrainConfig) -> None:
        self.config = config
        self.parameters = {name: parameter for name, parameter in named_parameters if parameter.requires_grad}
        decayed = {name for name, parameter in self.parameters.items() if is_decayed(name, parameter, config)}
        self._rule = _rule(
            [
                {"params": [self.parameters[name] for name in self.parameters if name in decayed], "decay": config.weight_decay},
                {"params": [self.parameters[name] for name in self.parameters if name not in decayed], "decay": 0.0},
            ],
            config,
        )

    def zero_grad(self) -> None:
        self._rule.zero_grad(set_to_none=True)

    @torch.no_grad()
    def step_(self, step: int) -> Tensor:
        """Apply the gradients as update number `step` (0, 1, 2, ...) and return their global norm before clipping, a scalar tensor.

        Where that is not finite nothing is changed.
        """
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        norm = clip_(gradients, self.config.clip)
        if not bool(norm.isfinite()):
            return norm
        for group in self._rule.param_groups:
            group["lr"] = self.learning_rate(step)
            if "step" in group:
                group["step"] = step
        self._rule.step()
        return norm

    def learning_rate(self, step: int) -> float:
        """Learning rate of update number `step`."""
        return self.config.learning_rate * schedule_multiplier(self.config, step)

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that `step_` remembers, as `PARAMETER.MOMENT` -> tensor; empty before the first step.

        exp_avg, exp_avg_sq and step of adamw; exp_avg of lion; exp_avg_sq, or exp_avg_sq_row and exp_avg_sq_col, of adafactor.
        """
        return {
            f"{name}.{key}": value
            for name, parameter in self.parameters.items()
            for key, value in self._rule.state.get(parameter, {}).items()
        }

    def load_state_tensors_(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state_tensors` gave. Raises ValueError, and changes nothing, where a name or shape does not fit."""
        names = {full_name.rpartition(".")[0] for full_name in tensors}
        expected = {
            f"{name}.{key}": like
            for name, parameter in self.parameters.items()
            if name in names
            for key, like in self._rule.moments(parameter).items()
        }
        for full_name, value in tensors.items():
            if full_name not in expected:
                raise ValueError(f"optimizer state {full_name!r}: {self.config.optimizer} has no such moment of a parameter of this model")
            if value.shape != expected[full_name].shape:
                found = f"shape {tuple(value.shape)}, expected {tuple(expected[full_name].shape)}"
                raise ValueError(f"optimizer state {full_name!r}: {found}")
        missing = expected.keys() - tensors.keys()
        if missing:
            raise ValueError(f"optimizer state {min(missing)!r}: missing, while others of that parameter are there")
        self._rule.state.clear()
        for full_name, like in expected.items():
            name, _, key = full_name.rpartition(".")
            self._rule.state[self.parameters[name]][key] = tensors[full_name].to(like.device, like.dtype, copy=True)


def is_decayed(name: str, parameter: Tensor, config: TrainConfig) -> bool:
    """Whether `weight_decay` applies to a parameter: one of rank other than 1, or, by "all_but_outer_vectors", any within a layer.

    The official branch `optimized` stacks its layers, so that a vector in one of them has a rank of 3.
    """
    return parameter.ndim != 1 or (config.decayed == "all_but_outer_vectors" and name.startswith(STACK))


def clip_(gradients: list[Tensor], largest: float | None) -> Tensor:
    """Scale the gradients in place so that their global norm is at most `largest`; returns the norm before, a scalar tensor."""
    if not gradients:
        return torch.zeros(())
    norm = torch.nn.utils.get_total_norm(gradients)
    if largest is not None:
        torch._foreach_mul_(gradients, (largest / norm).clamp(max=1.0))
    return norm


def _rule(groups: list[dict[str, Any]], config: TrainConfig) -> Adam | Lion | Adafactor:
    match config.optimizer:
        case "adamw":
            return Adam(groups, lr=config.learning_rate, betas=config.betas or (0.9, 0.98), eps=config.eps or 1e-9)
        case "lion":
            momentum_dtype = torch.bfloat16 if config.momentum_dtype == "bfloat16" else None
            return Lion(groups, lr=config.learning_rate, betas=config.betas or (0.95, 0.98), momentum_dtype=momentum_dtype)
        case "adafactor":
            return Adafactor(groups, lr=config.learning_rate, eps=config.eps or 1e-30)
