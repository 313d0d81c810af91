"""How the stored vectors of a codebook follow from its state, and what one commit makes of the state: a function for each rule.

The state is a dict of tensors by name: `sum` and `count` for moving averages; `weight` and `count` for codes that an optimizer steps, with
what the optimizer remembers; `weight` for frozen codes; `sum`, `count` and `weight` for codes beside moving averages. Nothing here changes
a tensor. Shapes: H heads, C codes, K width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqkit.ops.codebook import CodebookStatistics, codes_from_ema, directions, ema_update, laplace_codes_from_ema, new_rows
from vqkit.ops.precision import as_dtype, may_look
from vqkit.quantizers.config import EMA, ClipEMA, DeadCodes, Frozen, OwnOptimizer, StoredEMA, Update

State = dict[str, Tensor]


def start_state(rule: Update, codes: Tensor, count: Tensor) -> State:
    """The state whose codes are `codes` [H, C, K], chosen `count` [H, C] times."""
    if isinstance(rule, EMA | ClipEMA):
        return {"sum": codes * _weights(rule, count).unsqueeze(-1), "count": count}
    if isinstance(rule, Frozen):
        return {"weight": codes}
    state = {"weight": codes, "count": count}
    if isinstance(rule, StoredEMA):
        state["sum"] = codes * _weights(rule, count).unsqueeze(-1)
    if isinstance(rule, OwnOptimizer):
        state |= {"first_moment": torch.zeros_like(codes), "steps": torch.zeros((), dtype=torch.int64, device=codes.device)}
        if rule.name == "adam":
            state["second_moment"] = torch.zeros_like(codes)
    return state


def stored_codes(rule: Update, state: State) -> Tensor:
    """Codes [H, C, K], before any transform."""
    if isinstance(rule, EMA):
        return laplace_codes_from_ema(state["sum"], state["count"], rule.eps)
    if isinstance(rule, ClipEMA):
        return codes_from_ema(state["sum"], state["count"], rule.floor)
    return state["weight"]


def advance(
    rule: Update,
    dead_codes: DeadCodes | None,
    state: State,
    statistics: CodebookStatistics,
    code_weights: Tensor | None = None,
    *,
    unit: bool = False,
) -> State:
    """The state after one commit; moving averages take 1 - decay, times `code_weights` [H, C] if given, of what is new.

    With `unit` codes are read as directions.
    """
    if isinstance(rule, Frozen) or (isinstance(rule, StoredEMA) and not rule.count):
        return state
    if isinstance(rule, EMA | ClipEMA | StoredEMA):
        if isinstance(rule, StoredEMA) and rule.learn and rule.follow:
            state = follow_codes(rule, state, unit=unit)
        decay = rule.decay if code_weights is None else 1 - (1 - rule.decay) * code_weights
        total, count = ema_update(state["sum"], state["count"], statistics, decay)
        state = {**state, "sum": total, "count": count}
        if isinstance(rule, StoredEMA) and rule.follow:
            state = follow_averages(rule, state)
    else:
        state = {**state, "count": torch.lerp(statistics.count.to(state["count"].dtype), state["count"], rule.decay)}
        if isinstance(rule, OwnOptimizer):
            state |= _step(rule, state, statistics)
    if dead_codes is None:
        return state
    return expire(rule, state, statistics.candidates, statistics.keys, dead_codes.threshold, dead_codes.start_count)


def follow_averages(rule: StoredEMA, state: State) -> State:
    """The state with its codes set to its averages."""
    return {**state, "weight": laplace_codes_from_ema(state["sum"], state["count"], rule.eps)}


def follow_codes(rule: StoredEMA, state: State, *, unit: bool = False) -> State:
    """The state with its sums set to what its codes and counts say; with `unit` codes are directions, and sums keep their lengths."""
    if unit:
        return {**state, "sum": directions(state["weight"]) * torch.linalg.vector_norm(state["sum"], dim=-1, keepdim=True)}
    return {**state, "sum": state["weight"] * _weights(rule, state["count"]).unsqueeze(-1)}


def next_count(rule: Update, count: Tensor, chosen: Tensor, code_weights: Tensor | None = None) -> Tensor:
    """The moving count [H, C] after a commit of codes chosen so often, before any is replaced; see `advance`."""
    if isinstance(rule, StoredEMA) and not rule.count:
        return count
    decay = 0.0 if isinstance(rule, Frozen) else rule.decay
    if code_weights is not None:
        return torch.lerp(chosen.to(count.dtype), count, 1 - (1 - decay) * code_weights)
    return torch.lerp(chosen.to(count.dtype), count, decay)


def expire(rule: Update, state: State, candidates: Tensor, keys: Tensor, threshold: float, reset_count: float) -> State:
    """The state in which codes of a count below `threshold` stand at candidates [H, E, K] (keys [H, E]; 0 = absent) with `reset_count`."""
    if may_look(state["count"]) and not (state["count"] < threshold).any():
        return state
    if keys.shape[-1] == 0:
        return state
    anew, rows = new_rows(state["count"], candidates, keys, threshold)
    anew, count = anew.unsqueeze(-1), state["count"].masked_fill(anew, reset_count)
    rows = as_dtype(rows, count.dtype)
    new = {"count": count}
    if "sum" in state:  # smoothing counts a new code a little more or less than reset_count
        weights = _weights(rule, count).unsqueeze(-1) if isinstance(rule, EMA) else reset_count
        new["sum"] = torch.where(anew, rows * weights, state["sum"])
    if "weight" in state:
        new["weight"] = torch.where(anew, rows, state["weight"])
    for name in ("first_moment", "second_moment"):
        if name in state:
            new[name] = state[name].masked_fill(anew, 0.0)
    return {**state, **new}


def _weights(rule: EMA | ClipEMA | StoredEMA, count: Tensor) -> Tensor:
    """What the sums are divided by."""
    if isinstance(rule, ClipEMA):
        return count.clamp(min=rule.floor)
    total = count.sum(-1, keepdim=True)
    return torch.where(total > 0, (count + rule.eps) / (total + count.shape[-1] * rule.eps) * total, 1.0)


def _step(rule: OwnOptimizer, state: State, statistics: CodebookStatistics) -> State:
    """One step of SGD or Adam (Kingma and Ba, 2015) on the mean squared error of the vectors to their codes."""
    weight = state["weight"]
    vectors = statistics.vectors.clamp(min=1).to(weight.dtype)[:, None, None]
    gradient = 2 * (statistics.count.to(weight.dtype).unsqueeze(-1) * weight - statistics.sum) / (vectors * weight.shape[-1])
    steps = state["steps"] + 1
    if rule.name == "sgd":
        first = rule.momentum * state["first_moment"] + gradient
        return {"weight": weight - rule.learning_rate * first, "first_moment": first, "steps": steps}
    beta1, beta2 = rule.betas
    first = torch.lerp(gradient, state["first_moment"], beta1)
    second = torch.lerp(gradient.square(), state["second_moment"], beta2)
    number = steps.to(weight.dtype)
    step = first / (1 - beta1**number) / ((second / (1 - beta2**number)).sqrt() + rule.eps)
    return {"weight": weight - rule.learning_rate * step, "first_moment": first, "second_moment": second, "steps": steps}
