"""From logits to the next token: pure functions on tensors [..., vocab].

Rules change logits (a dropped token becomes -inf) in one order: repetition penalty, excluded tokens, temperature, top-k, top-p. What is
left is sampled by the Gumbel-max trick, so that a draw is a function of logits and noise, and noise can be given to replay a draw exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

OFFICIAL_SLACK = 1e-4
"""What the official Transformer-VQ takes off top_p before it cuts; with it top_p = 1 drops the tail."""


@dataclass(frozen=True)
class SamplingRules:
    """How the next token is chosen. The default samples from the model's distribution as it is."""

    temperature: float = 1.0
    """Divides the logits; 0 = always the most probable token."""
    top_k: int | None = None
    """Keep the k most probable tokens; None = all."""
    top_p: float = 1.0
    """Keep the smallest set of most probable tokens that holds this much probability; 1 = all, 0 = the most probable one."""
    official_nucleus: bool = False
    """Cut top_p as the official Transformer-VQ does: with a slack of 1e-4, and the higher index first among equals."""
    exclude: tuple[int, ...] = ()
    """Tokens that are never chosen."""
    repetition_penalty: float = 1.0
    """Above 1 tokens of the prompt and of what was generated become less probable: see `penalize`; 1 = as they are."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"temperature = {self.temperature!r}: must be 0 (greedy) or positive, and finite")
        if self.top_k is not None and (isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 1):
            raise ValueError(f"top_k = {self.top_k!r}: must be an integer of at least 1, or None for all tokens")
        if not 0.0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty = {self.repetition_penalty!r}: must be positive and finite; 1 = none")
        if not 0.0 <= self.top_p <= 1.0:
            raise ValueError(f"top_p = {self.top_p!r}: must be from 0 to 1")


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Logits [..., vocab] with all but the `k` largest at -inf; among equals the lower index goes first."""
    if k >= logits.shape[-1]:
        return logits
    order = logits.argsort(dim=-1, descending=True, stable=True)
    return logits.scatter(-1, order[..., k:], -math.inf)


def keep_top_p(logits: Tensor, p: float, *, official: bool = False) -> Tensor:
    """Logits [..., vocab] without the tail: the smallest set of most probable tokens whose probability reaches `p`.

    The most probable token always stays; `p` = 1 keeps everything; among equals the lower index goes first. `official` is the rule
    of the official Transformer-VQ instead (nn/prob.py): `p` less `OFFICIAL_SLACK`, and the higher index first.
    """
    if p >= 1.0 and not official:
        return logits
    order = logits.argsort(dim=-1, stable=True).flip(-1) if official else logits.argsort(dim=-1, descending=True, stable=True)
    probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1).gather(-1, order)
    from_here_on = probabilities.flip(-1).cumsum(dim=-1).flip(-1)  # summed from the smallest up: the tail keeps its precision
    keep = from_here_on > 1.0 - (p - OFFICIAL_SLACK if official else p)
    keep[..., 0] = True
    return logits.masked_fill(~torch.zeros_like(keep).scatter(-1, order, keep), -math.inf)


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits [..., vocab] where those of tokens `seen` [..., vocab] bool are divided by `penalty` if positive, multiplied if negative.

    CTRL (Keskar et al. 2019, arXiv 1909.05858, section 4.1), with the sign taken into account as in common use.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def apply_rules(logits: Tensor, rules: SamplingRules, seen: Tensor | None = None) -> Tensor:
    """Logits [..., vocab] of the distribution that is sampled from; with temperature 0 only the most probable token is left.

    `seen` [..., vocab] bool: tokens of the text so far; a repetition penalty needs them (ValueError).
    """
    if rules.repetition_penalty != 1.0:
        if seen is None:
            raise ValueError(f"seen = None: repetition_penalty = {rules.repetition_penalty} needs the tokens of the text so far")
        logits = penalize(logits, seen, rules.repetition_penalty)
    if rules.exclude:
        logits = logits.index_fill(-1, torch.tensor(rules.exclude, device=logits.device), -math.inf)
    if rules.temperature == 0.0:
        return keep_top_k(logits, 1)
    if rules.temperature != 1.0:
        # Against the largest, so that no temperature, however low, makes an overflow.
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(rules.temperature, torch.finfo(logits.dtype).tiny)
    if rules.top_k is not None:
        logits = keep_top_k(logits, rules.top_k)
    return keep_top_p(logits, rules.top_p, official=rules.official_nucleus)


def gumbel_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise, float32, finite. Drawn on the generator's device: a CPU generator gives the same on every machine."""
    exponential = torch.empty(shape, device=generator.device).exponential_(generator=generator)
    return -exponential.clamp_(min=torch.finfo(torch.float32).tiny).log_()


def next_token(
    logits: Tensor,
    rules: SamplingRules,
    *,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """The next token [...] int64 for logits [..., vocab].

    Randomness is `noise` (Gumbel, the shape of logits) or else drawn from `generator`; greedy rules need neither. `seen` is that of
    `apply_rules`. Raises ValueError when sampling has no source of randomness, or noise of another shape.
    """
    if rules.temperature > 0.0 and noise is None:
        if generator is None:
            raise ValueError("generator = None: sampling needs a torch.Generator, or noise, or temperature 0")
        noise = gumbel_noise(tuple(logits.shape), generator)
    if noise is not None and noise.shape != logits.shape:
        raise ValueError(f"noise of shape {tuple(noise.shape)}: must have the shape of logits, {tuple(logits.shape)}")
    return choose(apply_rules(logits, rules, seen), rules, noise)


def choose(kept: Tensor, rules: SamplingRules, noise: Tensor | None) -> Tensor:
    """The token [...] that `noise` picks from what `apply_rules` left; the most probable one with temperature 0."""
    return kept.argmax(dim=-1) if rules.temperature == 0.0 or noise is None else (kept + noise.to(kept.device)).argmax(dim=-1)
