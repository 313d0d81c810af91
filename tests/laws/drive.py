"""How the laws use a quantizer: one way to call, to take a training step, to commit and to read the whole state."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from laws.family import Case
from vqkit.quantizers import LearnableVQ, SimpleVQ, add_statistics_, update_codebooks_

NOTHING = "update_codebooks_: nothing was counted"
EXACT = {"rtol": 0.0, "atol": 0.0, "equal_nan": True}


class Output(NamedTuple):
    """What a call returns, whichever the quantizer."""

    quantized: Tensor
    indices: Tensor
    loss: Tensor


def call(module: Any, x: Tensor, mask: Tensor | None = None, **options: Any) -> Output:
    """`module(x, mask)`; the quantizers of Transformer-VQ return statistics, which are handed in here."""
    if isinstance(module, (LearnableVQ, SimpleVQ)):
        found = module.quantize(x, mask, **({"statistics": module.training} if isinstance(module, LearnableVQ) else {}))
        if found.statistics is not None:
            add_statistics_(module, [found.statistics])
        return Output(found.quantized, found.indices, found.commitment)
    return Output(*module(x, mask, **options))


def commit_(module: nn.Module, reducer: Any = None) -> None:
    """Bring what is pending into the codebooks: by name where that is manual, else as `eval()` does."""
    if is_manual(module):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=NOTHING)  # which is a commit, too
            update_codebooks_(module, reducer)
    else:
        training = module.training
        module.train(False)
        module.train(training)


def is_manual(module: nn.Module) -> bool:
    return getattr(module, "commit", "manual") == "manual"


def objective(output: Output) -> Tensor:
    """A scalar that depends on every entry of the output and on the loss: a mean over the vectors, 0 where there are none."""
    return output.quantized.float().sin().sum() / max(output.quantized.numel(), 1) + output.loss.float()


def backward_(output: Output) -> None:
    """Backward of `objective`, where anything asks for a gradient."""
    total = objective(output)
    if total.requires_grad:
        total.backward()


def books(module: Any) -> list[Any]:
    """The codebooks of a quantizer, in order."""
    if isinstance(module, LearnableVQ):
        return [module]
    return [] if isinstance(module, SimpleVQ) else module.codebooks()


def learn_(module: nn.Module, x: Tensor, mask: Tensor | None = None, *, rate: float = 0.1, **options: Any) -> Output:
    """One training step: forward, backward, a gradient step of every parameter, commit."""
    module.zero_grad()
    output = call(module, x, mask, **options)
    backward_(output)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad
    commit_(module)
    return output


def trained(case: Case, steps: int = 2, **changes: Any) -> Any:
    """A module in training mode after some steps on its own data."""
    module = started(case, **changes)
    for step in range(steps):
        learn_(module, case.input(seed=50 + step))
    return module


def started(case: Case, **changes: Any) -> Any:
    """A new module in training mode; one that waits for k-means has had it."""
    module = case.build(**changes)
    if case.waits:
        module.initialize_(case.input(batch=8, seed=99))
    return module.train()


def twins(module: nn.Module, number: int = 2) -> list[Any]:
    return [copy.deepcopy(module) for _ in range(number)]


def state(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict, by name; what is no tensor is compared by its representation."""
    return {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in module.state_dict().items()}


def committed(module: nn.Module) -> dict[str, Tensor]:
    """The state after what is pending came in, without the pending statistics themselves; for a manual commit, after that commit."""
    commit_(module)
    return {name: value for name, value in state(module).items() if "pending" not in name}


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_same(found: Any, expected: Any, **tolerance: float) -> None:
    """Nested mappings and sequences of tensors are equal: bit by bit, or within a tolerance."""
    if isinstance(expected, Mapping):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            try:
                assert_same(found[name], value, **tolerance)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None
    elif isinstance(expected, Tensor):
        torch.testing.assert_close(found, expected, **(EXACT | tolerance))
    elif isinstance(expected, Iterable) and not isinstance(expected, (str, bytes)):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other, **tolerance)
    else:
        assert found == expected


def differs(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return any(not torch.equal(first[name], second[name]) for name in first if "updates" not in name)
