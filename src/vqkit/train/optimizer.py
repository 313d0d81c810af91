"""AdamW composed as the official Transformer-VQ composes it: clip, Adam with its learning rate, schedule multiplier, decay.

The decay is a share of the parameter per step, scaled by neither learning rate nor schedule. Codebooks are no parameters
of this optimizer: they change in `vqkit.quantizers.update_codebooks_`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vqkit.train.config import TrainConfig
from vqkit.train.schedule import schedule_multiplier


class Optimizer:
    """Steps the named parameters of a model from their gradients.

    Parameters without a gradient are decayed, and else left alone.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], config: TrainConfig) -> None:
        self.config = config
        self.parameters = {name: parameter for name, parameter in named_parameters if parameter.requires_grad}
        self._decayed: list[Tensor] = [parameter for parameter in self.parameters.values() if parameter.ndim != 1]
        self._adam = torch.optim.Adam(
            self.parameters.values(), lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=_can_fuse(self.parameters.values())
        )

    def zero_grad(self) -> None:
        self._adam.zero_grad(set_to_none=True)

    @torch.no_grad()
    def step_(self, step: int) -> Tensor:
        """Apply the gradients as update number `step` (0, 1, 2, ...) and return their global norm before clipping, a scalar tensor."""
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        norm = clip_(gradients, self.config.clip)
        if self.config.weight_decay and self._decayed:
            # Before Adam, whose update does not read the parameter: p - decay * p - update.
            torch._foreach_mul_(self._decayed, 1.0 - self.config.weight_decay)
        for group in self._adam.param_groups:
            group["lr"] = self.learning_rate(step)
        self._adam.step()
        return norm

    def learning_rate(self, step: int) -> float:
        """Learning rate of update number `step`."""
        return self.config.learning_rate * schedule_multiplier(self.config, step)

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that `step_` remembers, as `PARAMETER.MOMENT` -> tensor; empty before the first step."""
        return {
            f"{name}.{key}": value
            for name, parameter in self.parameters.items()
            for key, value in self._adam.state.get(parameter, {}).items()
        }

    def load_state_tensors_(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state_tensors` gave. Raises ValueError, and changes nothing, where a name or shape does not fit."""
        states: dict[nn.Parameter, dict[str, Tensor]] = {}
        for full_name, value in tensors.items():
            name, _, key = full_name.rpartition(".")
            parameter = self.parameters.get(name)
            if parameter is None or key not in ("step", "exp_avg", "exp_avg_sq"):
                raise ValueError(f"optimizer state {full_name!r}: no such parameter or moment in this model")
            if key != "step" and value.shape != parameter.shape:
                raise ValueError(f"optimizer state {full_name!r}: shape {tuple(value.shape)}, the parameter has {tuple(parameter.shape)}")
            on = parameter.device if key != "step" or self._adam.defaults["fused"] else torch.device("cpu")
            states.setdefault(parameter, {})[key] = value.to(on, copy=True)
        self._adam.state.clear()
        for parameter, state in states.items():
            self._adam.state[parameter] = state


def clip_(gradients: list[Tensor], largest: float | None) -> Tensor:
    """Scale the gradients in place so that their global norm is at most `largest`; returns the norm before, a scalar tensor."""
    if not gradients:
        return torch.zeros(())
    norm = torch.nn.utils.get_total_norm(gradients)
    if largest is not None:
        torch._foreach_mul_(gradients, (largest / norm).clamp(max=1.0))
    return norm


def _can_fuse(parameters: Iterable[Tensor]) -> bool:
    return all(parameter.is_floating_point() and parameter.device.type in ("cpu", "cuda") for parameter in parameters)
