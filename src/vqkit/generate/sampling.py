"""From logits to the next token: pure functions on tensors [..., vocab].

Rules cut logits (a dropped token becomes -inf) in one order: excluded tokens, temperature, top-k, top-p. What is left is sampled
by the Gumbel-max trick, so that a draw is a function of logits and noise, and noise can be given to replay a draw exactly.
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

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"temperature = {self.temperature!r}: must be 0 (greedy) or positive, and finite")
        if self.top_k is not None and (isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 1):
            raise ValueError(f"top_k = {self.top_k!r}: must be an integer of at least 1, or None for all tokens")
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


def apply_rules(logits: Tensor, rules: SamplingRules) -> Tensor:
    """Logits [..., vocab] of the distribution that is sampled from; with temperature 0 only the most probable token is left."""
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


def next_token(logits: Tensor, rules: SamplingRules, *, generator: torch.Generator | None = None, noise: Tensor | None = None) -> Tensor:
    """The next token [...] int64 for logits [..., vocab].

    Randomness is `noise` (Gumbel, the shape of logits) or else drawn from `generator`; greedy rules need neither.
    Raises ValueError when sampling has no source of randomness, or noise of another shape.
    """
    kept = apply_rules(logits, rules)
    if rules.temperature == 0.0:
        return kept.argmax(dim=-1)
    if noise is None:
        if generator is None:
            raise ValueError("generator = None: sampling needs a torch.Generator, or noise, or temperature 0")
        noise = gumbel_noise(tuple(logits.shape), generator)
    if noise.shape != logits.shape:
        raise ValueError(f"noise of shape {tuple(noise.shape)}: must have the shape of logits, {tuple(logits.shape)}")
    return (kept + noise.to(kept.device)).argmax(dim=-1)
