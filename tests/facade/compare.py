"""One class of the peer and of the facade, over some steps of training, evaluation and decoding: how far apart is what they give?

Both start from the peer's state dict and see the same inputs and the same random numbers. A part of the comparison is one of

    raises               the facade raised where the peer did not, but for decoding
    state_layout         names, shapes and dtypes in the state dict at the start, and whether the peer's loads strictly
    state_back           whether the peer loads the state dict at the end strictly
    parameters           their names in order: an optimizer's state goes by it
    output.N, eval.N     what a training step and a call in eval mode return
    input_gradient       of the sum of all that is differentiable in the output, with fixed random weights
    parameter_gradient.NAME   the same, for the parameters; then plain SGD takes a step
    state.KEY            the state dict after each step
    encode.KIND          bits and signs, where there are any
    decode.METHOD        what the indices of the call in eval mode, or these bits, decode to, and indices of dropped layers
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from facade import peer as _peer
from facade.deviations import excused, of_input, of_residuals

RTOL = 1e-5
FLOOR = 1e-2
"""Differences are relative to the largest entry of a tensor, or to this where all are smaller."""
RATE = 0.05
"""Of the optimizer."""
DECODERS = ("get_codes_from_indices", "get_output_from_indices", "indices_to_codes", "decode_bits")


@dataclass
class Comparison:
    """The worst relative difference of each part, and where it was."""

    name: str
    kwargs: dict[str, Any]
    calls: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    worst: dict[str, float] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)

    def note(self, part: str, difference: float, where: str) -> None:
        """Keep it if it is the largest of its part."""
        if part not in self.worst or difference > self.worst[part]:
            self.worst[part], self.where[part] = difference, where

    def check(self, rtol: float = RTOL) -> float:
        """The worst difference of what may not differ; AssertionError where it is above `rtol`."""
        arguments = {**self.kwargs, **self.calls, **self.facts}
        far = {part: worst for part, worst in self.worst.items() if not worst <= rtol}
        far = {part: worst for part, worst in far.items() if not excused(self.name, arguments, part)}
        shown = "\n".join(f"  {part}: {worst:.2e} at {self.where[part]}" for part, worst in far.items())
        assert not far, f"{self.name}({self.kwargs}), called with {self.calls}, is not what the peer is:\n{shown}"
        return max((worst for worst in self.worst.values() if worst <= rtol), default=0.0)


def compare(
    name: str,
    kwargs: Mapping[str, Any],
    x: Tensor | Callable[[int], Tensor],
    *,
    calls: Mapping[str, Any] | None = None,
    eval_calls: Mapping[str, Any] | None = None,
    steps: int = 2,
    seed: int = 0,
    prepare: Callable[[nn.Module], None] | None = None,
    optimize: bool = True,
    rate: float = RATE,
) -> Comparison:
    """Class `name` of both, made with `kwargs`, called with `x` (a tensor, or a function of the step) and `calls`.

    `eval_calls` are the arguments in eval mode (None: `calls`). `prepare` changes each of the two after it is made. Without `optimize`
    gradients are compared, and go no further: what differs in them alone then excuses nothing else. What the peer raises is raised: such
    a case is none.
    """
    kinds = getattr(_peer.peer, name), getattr(_peer.facade, name)
    options = {"steps": steps, "seed": seed, "prepare": prepare, "optimize": optimize, "rate": rate}
    return compare_kinds(name, kinds, kwargs, x, calls=calls, eval_calls=eval_calls, **options)


def compare_kinds(
    name: str,
    kinds: tuple[Callable[..., nn.Module], Callable[..., nn.Module]],
    kwargs: Mapping[str, Any],
    x: Tensor | Callable[[int], Tensor],
    *,
    calls: Mapping[str, Any] | None = None,
    eval_calls: Mapping[str, Any] | None = None,
    steps: int = 2,
    seed: int = 0,
    prepare: Callable[[nn.Module], None] | None = None,
    optimize: bool = True,
    rate: float = RATE,
) -> Comparison:
    """As `compare`, of any two classes, the reference first."""
    calls = dict(calls or {})
    eval_calls = calls if eval_calls is None else dict(eval_calls)
    facts = {"an optimizer": optimize, **of_input(x(0) if callable(x) else x, kwargs, calls), **of_residuals(kwargs, calls)}
    comparison = Comparison(name, dict(kwargs), calls, facts)
    sides = _Sides(comparison)
    reference = _seeded(seed, lambda: kinds[0](**copy.deepcopy(dict(kwargs))))
    made = sides.candidate("construction", lambda: _seeded(seed, lambda: kinds[1](**copy.deepcopy(dict(kwargs)))))
    if made is None:
        return comparison
    if not _load(comparison, reference, made):
        return comparison
    if prepare is not None:
        prepare(reference)
        prepare(made)
    optimizers = [_sgd(module, rate) if optimize else None for module in (reference, made)]
    for step in range(steps):
        given = x(step) if callable(x) else x * (1 + 0.1 * step)
        weights_seed = 1000 * seed + step
        expected = _train_step(reference, optimizers[0], given, calls, weights_seed)
        found = sides.candidate(f"step {step}", lambda given=given, s=weights_seed: _train_step(made, optimizers[1], given, calls, s))
        if found is None:
            return comparison
        _compare_trees(comparison, f"step {step}", expected, found)
        _compare_states(comparison, f"step {step}", reference, made)
        indices = _indices({name: leaf for part in expected.values() for name, leaf in part.items()})
        if indices is not None and (indices == -1).any():  # of layers that were dropped
            _compare_decoding(comparison, sides, reference, made, indices)
    _compare_evaluation(comparison, sides, reference, made, x(0) if callable(x) else x, eval_calls, seed)
    _load_back(comparison, made, _seeded(seed, lambda: kinds[0](**copy.deepcopy(dict(kwargs)))))
    return comparison


@dataclass
class _Sides:
    comparison: Comparison

    def candidate(self, where: str, run: Callable[[], Any], part: str = "raises") -> Any:
        """What the facade gives; None where it raises a ValueError or TypeError, which is noted."""
        try:
            return run()
        except (ValueError, TypeError) as error:
            self.comparison.note(part, float("inf"), f"{where}: {type(error).__name__}: {error}")
            return None


def _seeded(seed: int, make: Callable[[], Any]) -> Any:
    torch.manual_seed(seed)
    random.seed(seed)
    return make()


def _sgd(module: nn.Module, rate: float) -> torch.optim.Optimizer | None:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.optim.SGD(parameters, lr=rate) if parameters else None


def _load(comparison: Comparison, reference: nn.Module, made: nn.Module) -> bool:
    """Whether the state dicts are alike and the peer's loads."""
    expected, found = reference.state_dict(), made.state_dict()
    layouts = [{key: (tuple(t.shape), t.dtype) for key, t in _tensors(state).items()} for state in (expected, found)]
    wrong = sorted(key for key in layouts[0].keys() | layouts[1].keys() if layouts[0].get(key) != layouts[1].get(key))
    told = "; ".join(f"{key}: {layouts[0].get(key)} there, {layouts[1].get(key)} here" for key in wrong)
    comparison.note("state_layout", float("inf") if wrong else 0.0, told)
    names = [[key for key, _ in module.named_parameters()] for module in (reference, made)]
    comparison.note("parameters", 0.0 if names[0] == names[1] else float("inf"), f"{names[0]} there, {names[1]} here")
    try:
        made.load_state_dict(copy.deepcopy(expected), strict=True)
    except RuntimeError as error:
        comparison.note("state_layout", float("inf"), f"loading the peer's: {error}")
        return False
    _compare_states(comparison, "loaded", reference, made)
    return True


def _load_back(comparison: Comparison, made: nn.Module, fresh: nn.Module) -> None:
    try:
        fresh.load_state_dict(copy.deepcopy(made.state_dict()), strict=True)
    except RuntimeError as error:
        comparison.note("state_back", float("inf"), f"loading into the peer: {error}")


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def _train_step(
    module: nn.Module, optimizer: torch.optim.Optimizer | None, x: Tensor, calls: Mapping[str, Any], seed: int
) -> dict[str, dict[str, Tensor]]:
    """{part: {where: tensor}} of a step."""
    module.train()
    x = x.detach().clone()
    if x.is_floating_point():
        x.requires_grad_()
    for parameter in module.parameters():
        parameter.grad = None
    given = copy.deepcopy(dict(calls))
    output = _seeded(seed, lambda: module(x, **given))
    found = dict(leaves(output, ""))
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(())
    for where, leaf in found.items():
        weights = torch.rand(leaf.shape, generator=generator) + 0.5  # drawn for all, so that both sides have the same
        if leaf.requires_grad and not where.endswith("inplace_optimize"):  # whose backward has run
            total = total + (leaf * weights.to(leaf.dtype)).sum()
    kept = {where: leaf.detach().clone() for where, leaf in found.items()}
    if total.requires_grad:
        total.backward()
    parts = {f"output.{where}": {where: leaf} for where, leaf in kept.items()}
    parts["input_gradient"] = {"x": torch.zeros_like(x) if x.grad is None else x.grad.clone()}
    parts |= {
        f"parameter_gradient.{key}": {key: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()}
        for key, p in module.named_parameters()
        if p.requires_grad
    }
    if optimizer is not None:
        optimizer.step()
    return parts


def leaves(output: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of what a call returned, by their places; the kind of a container is part of the place."""
    if isinstance(output, Tensor):
        yield path or "0", output
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        for name, part in zip(output._fields, output, strict=True):
            yield from leaves(part, f"{path}.{name}".lstrip("."))
    elif isinstance(output, (tuple, list)):
        for number, part in enumerate(output):
            yield from leaves(part, f"{path}.{number}".lstrip("."))
    elif isinstance(output, dict):
        for key, part in output.items():
            yield from leaves(part, f"{path}.{key}".lstrip("."))
    elif output is not None:
        yield path or "0", torch.as_tensor(output)


def _compare_trees(comparison: Comparison, where: str, expected: dict[str, dict[str, Tensor]], found: dict[str, dict[str, Tensor]]) -> None:
    for part in [*expected, *(part for part in found if part not in expected)]:
        there, here = expected.get(part, {}), found.get(part, {})
        for key in there.keys() | here.keys():
            if key in there and key in here:
                comparison.note(part, *_difference(there[key], here[key], f"{where}, {key}"))
            elif part.startswith("parameter_gradient") and not (there.get(key, here.get(key)) != 0).any():
                comparison.note(part, 0.0, f"{where}, {key}")
            else:
                comparison.note(part, float("inf"), f"{where}: {key} is {'there' if key in there else 'here'} alone")


def _compare_states(comparison: Comparison, where: str, reference: nn.Module, made: nn.Module) -> None:
    there, here = _tensors(reference.state_dict()), _tensors(made.state_dict())
    for key in there.keys() & here.keys():
        comparison.note(f"state.{key}", *_difference(there[key], here[key], f"{where}, {key}"))


def _compare_evaluation(
    comparison: Comparison, sides: _Sides, reference: nn.Module, made: nn.Module, x: Tensor, calls: Mapping[str, Any], seed: int
) -> None:
    def evaluate(module: nn.Module) -> Any:
        module.eval()
        with torch.no_grad():
            return _seeded(seed, lambda: module(x.clone(), **copy.deepcopy(dict(calls))))

    expected = evaluate(reference)
    found = sides.candidate("eval", lambda: evaluate(made))
    if found is None:
        return
    there, here = ({f"eval.{k}": {k: leaf} for k, leaf in leaves(output, "")} for output in (expected, found))
    _compare_trees(comparison, "eval", there, here)
    indices = _indices(dict(leaves(expected, "")))
    if hasattr(reference, "encode"):
        for kind, signs in (("bits", False), ("signs", True)):
            told, indices = reference.encode(x, return_signs=signs), made.encode(x, return_signs=signs)
            _compare_trees(comparison, "eval", {f"encode.{kind}": {kind: told}}, {f"encode.{kind}": {kind: indices}})
    if indices is not None:
        _compare_decoding(comparison, sides, reference, made, indices)


def _indices(output: Mapping[str, Tensor]) -> Tensor | None:
    return next((leaf for leaf in output.values() if leaf.dtype in (torch.int64, torch.int32)), None)


def _compare_decoding(comparison: Comparison, sides: _Sides, reference: nn.Module, made: nn.Module, indices: Tensor) -> None:
    if comparison.name == "VectorQuantize":
        indices = indices.clamp(min=0)  # there -1 is the last code
    for decoder in DECODERS:
        if not hasattr(reference, decoder):
            continue
        try:
            codes = getattr(reference, decoder)(indices)
        except Exception:  # what the peer cannot do is nothing to compare with
            continue
        decoded = sides.candidate(decoder, partial(getattr(made, decoder), indices), f"decode.{decoder}")
        if decoded is not None:
            trees = ({f"decode.{decoder}": dict(leaves(output, ""))} for output in (codes, decoded))
            _compare_trees(comparison, "decode", *trees)


def _difference(there: Tensor, here: Tensor, where: str) -> tuple[float, str]:
    """How far apart, relative to the largest entry there; integers: the share that is not equal."""
    if there.shape != here.shape or there.dtype != here.dtype:
        shapes = f"{tuple(there.shape)} {there.dtype} there, {tuple(here.shape)} {here.dtype} here"
        return float("inf"), f"{where}: {shapes}"
    if there.numel() == 0:
        return 0.0, where
    if not there.is_floating_point():
        return (there != here).double().mean().item(), where
    there, here = there.detach().double(), here.detach().double()
    if not torch.equal(there.isfinite(), here.isfinite()):
        return float("inf"), f"{where}: what is not finite stands at other places"
    there, here = there.nan_to_num(), here.nan_to_num()
    return ((there - here).abs().max() / there.abs().max().clamp(min=FLOOR)).item(), where
