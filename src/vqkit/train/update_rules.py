"""Adam, Lion and Adafactor as `torch.optim` optimizers with a decay of their own: a share of the parameter per step, whatever the rate.

Adam is torch's. Lion is not in torch, and the packages that have it keep no momentum in bfloat16 with its factors rounded. Adafactor is
not `torch.optim.Adafactor`, which factors every matrix, lowers the rate to 1 / sqrt(step) and has another epsilon; those of transformers
and timm factor every matrix, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

Groups = Iterable[dict[str, Any]]
"""Parameter groups {"params": [...], "decay": share per step}; a group without "decay" has 0."""


class Adam(torch.optim.Adam):
    """`torch.optim.Adam`, before which the parameters of a group lose their share `decay`, with a gradient or without.

    State of a parameter: exp_avg, exp_avg_sq, step.
    """

    def __init__(self, groups: Groups, lr: float, betas: tuple[float, float] = (0.9, 0.98), eps: float = 1e-9) -> None:
        groups = list(groups)
        fused = all(_can_fuse(parameter) for group in groups for parameter in group["params"])
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=fused)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step from the gradients; parameters without one are decayed alone."""
        for group in self.param_groups:
            _decay_(group)
        super().step()

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of a parameter before its first step."""
        step = torch.zeros((), device=parameter.device if self.defaults["fused"] else "cpu")
        return {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter), "step": step}


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2): steps of one size, against the sign of gradient and momentum interpolated.

    With `momentum_dtype` None the momentum has the type of its parameter. `torch.bfloat16` is the official Transformer-VQ: rounded after
    each step, and so are the factors on it (0.95 is 0.94921875) but not those on the gradient; products and sums have the gradient's type.
    State of a parameter: exp_avg.
    """

    def __init__(
        self, groups: Groups, lr: float, betas: tuple[float, float] = (0.95, 0.98), momentum_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "momentum_dtype": momentum_dtype})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step from the gradients; parameters without one are decayed alone."""
        for group in self.param_groups:
            _decay_(group)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter] = self.state.get(parameter) or self.moments(parameter)
                momentum = state["exp_avg"].to(parameter.grad.dtype)
                (beta, keep), kept_type = group["betas"], state["exp_avg"].dtype
                direction = _share(momentum, beta, kept_type).add_(parameter.grad, alpha=1.0 - beta).sign_()
                parameter.add_(direction, alpha=-group["lr"])
                state["exp_avg"].copy_(_share(momentum, keep, kept_type).add_(parameter.grad, alpha=1.0 - keep))

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of a parameter before its first step."""
        return {"exp_avg": torch.zeros_like(parameter, dtype=self.defaults["momentum_dtype"])}


class Adafactor(torch.optim.Optimizer):
    """Adafactor without momentum (Shazeer and Stern 2018, arXiv 1804.04235, algorithms 4 and 5), with the choices of optax.

    The mean squares of a matrix whose two sizes are at least 128 are kept as those of its rows and of its columns. They decay in step t
    (0, 1, 2, ...; `step` of the group) by 1 - (t + 1)**-0.8. An update is divided by its root mean square where that exceeds 1, and
    multiplied by that of the parameter before the step, at least 0.001.
    State of a parameter: exp_avg_sq, or exp_avg_sq_row [rows] and exp_avg_sq_col [columns].
    """

    SMALLEST_FACTORED = 128
    SMALLEST_SCALE = 1e-3

    def __init__(self, groups: Groups, lr: float, eps: float = 1e-30) -> None:
        super().__init__(groups, {"lr": lr, "eps": eps, "step": 0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step from the gradients; parameters without one are decayed alone."""
        for group in self.param_groups:
            keep = 1.0 - (group["step"] + 1) ** -0.8
            stepped = [parameter for parameter in group["params"] if parameter.grad is not None]
            scales = [_root_mean_square(parameter).clamp(min=self.SMALLEST_SCALE) for parameter in stepped]  # of before the decay
            _decay_(group)
            for parameter, scale in zip(stepped, scales, strict=True):
                state = self.state[parameter] = self.state.get(parameter) or self.moments(parameter)
                update = _normalized(parameter.grad, state, keep, group["eps"])
                parameter.sub_(update * (scale * group["lr"] / _root_mean_square(update).clamp(min=1.0)))
            group["step"] += 1

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of a parameter before its first step."""
        if parameter.ndim != 2 or min(parameter.shape) < self.SMALLEST_FACTORED:
            return {"exp_avg_sq": torch.zeros_like(parameter)}
        rows, columns = parameter.shape
        return {"exp_avg_sq_row": parameter.new_zeros(rows), "exp_avg_sq_col": parameter.new_zeros(columns)}


def _normalized(gradient: Tensor, state: dict[str, Tensor], keep: float, eps: float) -> Tensor:
    """The gradient over the root of its mean square, into which it is counted first."""
    square = gradient.square().add_(eps)
    if "exp_avg_sq" in state:
        return gradient * state["exp_avg_sq"].lerp_(square, 1.0 - keep).rsqrt()
    rows = state["exp_avg_sq_row"].lerp_(square.mean(1), 1.0 - keep)
    columns = state["exp_avg_sq_col"].lerp_(square.mean(0), 1.0 - keep)
    return gradient * (rows / rows.mean()).rsqrt().unsqueeze(1) * columns.rsqrt()


def _decay_(group: dict[str, Any]) -> None:
    if group.get("decay") and group["params"]:
        torch._foreach_mul_(group["params"], 1.0 - group["decay"])


def _root_mean_square(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def _share(momentum: Tensor, factor: float, kept_type: torch.dtype) -> Tensor:
    """`factor * momentum`, the factor rounded where the momentum is kept in a type narrower than float32."""
    narrow = kept_type in (torch.bfloat16, torch.float16)
    return momentum * (float(torch.tensor(factor, dtype=kept_type)) if narrow else factor)


def _can_fuse(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and parameter.device.type in ("cpu", "cuda")
