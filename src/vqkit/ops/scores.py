"""Soft choices of codes by scores at hand, where these are few or every vector has a codebook of its own.

The same as assignment.py does in tiles, by the same formulas; here the scores of all codes are one tensor, made once for all that is
asked of it, kept, and differentiated by autograd.

Shapes: L vectors with a codebook each, C codes, K width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqkit.ops.assignment import Metric, SoftEstimator, draw_by_logits, through_softmax
from vqkit.ops.codebook import are_chosen, are_ordinary, directions, known_directions
from vqkit.ops.nearest_code import nearest_codes, nearest_index
from vqkit.ops.precision import as_dtype, full_precision, is_traced, known_finite, may_look, widest

_SORTED = 1 << 12
_FEW_DIFFERENCES = 1 << 19
_ENTRIES_AT_ONCE = {"cpu": 1 << 18}  # of codes
_ENTRIES_AT_ONCE_ELSEWHERE = 1 << 26


def few_scores(x: Tensor, codebook: Tensor, metric: Metric) -> Tensor | None:
    """The scores [G, N, C] of finite vectors x [G, N, K] and codebook [G, C, K]; None where they are many, or traced."""
    if is_traced() or x.numel() * codebook.shape[1] > _FEW_DIFFERENCES:
        return None
    return _scores(x, codebook, metric)


def _scores(x: Tensor, codes: Tensor, metric: Metric) -> Tensor:
    """x [G, N, K], for metric "cosine" of length 1 or 0, codes [G, C, K] -> [G, N, C]."""
    dtype = widest(x, codes)
    x, codes = as_dtype(x, dtype), as_dtype(codes, dtype)
    if metric == "euclidean":
        return -torch.cdist(x, codes, compute_mode="donot_use_mm_for_euclid_dist")
    with full_precision(x.device.type):
        return _cosines(x, codes) if metric == "cosine" else torch.bmm(x, codes.mT)


def _cosines(x: Tensor, codes: Tensor) -> Tensor:
    """Without making the directions of many codes: the products are divided by their lengths."""
    length = torch.linalg.vector_norm(codes, dim=-1)
    if are_ordinary(length):
        return torch.bmm(x, codes.mT) / length.unsqueeze(-2)
    return torch.bmm(x, directions(codes).mT)


def draw(scores: Tensor, num: int, temperature: float) -> Tensor:
    """As `sample_indices`: [..., C] -> [..., num]."""
    scores = scores.detach()
    noise = torch.rand(*scores.shape[:-1], num, dtype=scores.dtype, device=scores.device)
    return draw_by_logits(noise, scores / temperature)


def cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    """As `assignment_cross_entropy` at temperature 1: scores [..., C], targets [...] -> [...], 0 where the target is -1."""
    found = F.nll_loss(scores.log_softmax(-1).flatten(0, -2), targets.flatten(), ignore_index=-1, reduction="none")
    return found.reshape(targets.shape)


def mean_cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    """The mean of `cross_entropy` over the targets that are not -1; 0 where there are none."""
    logits, flat = scores.flatten(0, -2), targets.flatten()
    if may_look(flat) and flat.numel() and flat.amax().item() >= 0:
        return F.cross_entropy(logits, flat, ignore_index=-1)
    total = F.cross_entropy(logits, flat, ignore_index=-1, reduction="sum")
    return total / (targets >= 0).sum().clamp(min=1)


def mean_softmax(scores: Tensor, counted: Tensor | None, temperature: float) -> Tensor:
    """As `mean_assignment`: scores [H, N, C], counted [H, N] bool (None: all) -> [H, C]."""
    if counted is None:
        return (scores / temperature).softmax(-1).sum(-2) / max(1, scores.shape[-2])
    counted = counted.to(scores.dtype)
    share = counted / counted.sum(-1, keepdim=True).clamp(min=1.0)
    with full_precision(scores.device.type):
        return (share.unsqueeze(-2) @ (scores / temperature).softmax(-1)).squeeze(-2)


def comparable(scores: Tensor) -> Tensor:
    """Those that are no number are the worst."""
    return scores if known_finite(scores) else scores.nan_to_num(nan=-torch.inf, neginf=-torch.inf)


def _highest(scores: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The `num` highest of scores [L, C], highest first, the first among equals: values and indices [L, num]."""
    if num == 1:
        return scores.max(-1, keepdim=True)
    if num * num > 2 * scores.shape[-1] or scores.numel() <= _SORTED:  # or one after the other takes longer
        values, indices = scores.sort(dim=-1, descending=True, stable=True)
        return values[:, :num], indices[:, :num]
    left, found = scores.clone(), []
    for _ in range(num):
        found.append(left.max(-1, keepdim=True))
        left.scatter_(-1, found[-1].indices, -torch.inf)
    values, indices = (torch.cat(parts, dim=-1) for parts in zip(*found, strict=True))
    return values, indices


class OwnCodes:
    """A codebook for every vector: codes [*positions, C, K], taken in the order in which they lie in memory.

    So a codebook that stands in another order than the vectors is not copied: vectors, of which there is one to C codes, follow it. Nor are
    directions of many codes made, for metric "cosine": only of those that are taken.
    """

    def __init__(self, codes: Tensor, metric: Metric) -> None:
        self.positions = codes.shape[:-2]
        wide = [axis for axis, length in enumerate(self.positions) if length > 1]
        order = sorted(wide, key=lambda axis: -codes.stride(axis))
        self._order = None if order == wide else [*order, *(axis for axis in range(len(self.positions)) if axis not in wide)]
        if self._order is not None:
            codes = codes.permute(*self._order, -2, -1)
            self._ordered = codes.shape[:-2]
            self._inverse = sorted(range(len(self._order)), key=self._order.__getitem__)
        self.codes = codes.reshape(-1, *codes.shape[-2:])  # [L, C, K]
        self.metric: Metric = metric
        self._of_length_1 = False
        if metric == "cosine" and codes.numel() <= _entries_at_once(codes):
            known = known_directions(self.codes) if may_look(codes) else None
            self.codes, self.metric = directions(self.codes) if known is None else known, "product"
            self._of_length_1 = known is not None

    def arrange(self, values: Tensor) -> Tensor:
        """Values of the vectors [H, M, ...] in the order of the codes, [L, ...]."""
        tail = values.shape[2:]
        if self._order is None:
            return values.reshape(-1, *tail)
        several = range(len(self.positions), len(self.positions) + len(tail))
        return values.reshape(*self.positions, *tail).permute(*self._order, *several).reshape(-1, *tail)

    def restore(self, values: Tensor, shape: torch.Size) -> Tensor:
        """[L, ...] -> [H, M, ...], of which `shape` is (H, M)."""
        tail = values.shape[1:]
        if self._order is None:
            return values.reshape(*shape, *tail)
        several = range(len(self.positions), len(self.positions) + len(tail))
        return values.reshape(*self._ordered, *tail).permute(*self._inverse, *several).reshape(*shape, *tail)

    def restore_each(self, values: Tensor, shape: torch.Size) -> Tensor:
        """[L, n, ...] -> [H, M * n, ...], of which `shape` is (H, M)."""
        if self._order is not None:
            return self.restore(values, shape).flatten(1, 2)
        return values.reshape(shape[0], shape[1] * values.shape[1], *values.shape[2:])

    def scores(self, x: Tensor) -> Tensor:
        """[L, C] of finite vectors x [L, K], for cosines of length 1 or 0. Differentiable in vectors and codes."""
        return _scores(x.unsqueeze(1), self.codes, self.metric).squeeze(1)

    def nearest(self, x: Tensor, num: int, scores: Tensor | None = None) -> tuple[Tensor, bool]:
        """As `nearest_index`, or several as by `nearest_codes`: [L, num] for x [L, K]; `scores` [L, C], if at hand.

        And whether it is known that none of them is -1.
        """
        x, codes = x.detach().unsqueeze(1), self.codes.detach()
        if self.metric == "cosine":
            if num == 1:
                return nearest_index(x, codes, metric="cosine"), False
            return nearest_codes(x, codes, num, metric="cosine").indices.squeeze(1), False
        if scores is None or not (self._of_length_1 or self.metric == "euclidean"):  # of length 0 a code is not one of cosine 0
            scores = _scores(x, codes, self.metric if self._of_length_1 else "euclidean").squeeze(1)
        values, indices = _highest(scores.detach(), num)
        if known_finite(values):  # and so are those that they were the highest of
            return indices, True
        values, indices = _highest(comparable(scores.detach()), num)
        return indices.where(values.isfinite(), -1), False

    def take(self, indices: Tensor, *, all_known: bool = False) -> Tensor:
        """The codes [L, n, K] of indices [L, n], for cosines of length 1; 0 for index -1 (`all_known`: there is none)."""
        all_known = all_known or are_chosen(indices)
        place = (indices if all_known else indices.clamp(min=0)).unsqueeze(-1)
        found = self.codes.gather(1, place.expand(-1, -1, self.codes.shape[2]))
        found = directions(found) if self.metric == "cosine" else found
        return found if all_known else found.where(indices.unsqueeze(-1) >= 0, 0.0)

    def soften(self, taken: Tensor, scores: Tensor, indices: Tensor, temperature: float, estimator: SoftEstimator) -> Tensor:
        """What `take` gave, as `soft_codes`: with the gradient of a softmax of scores [L, C] beside its own."""
        return _Softened.apply(taken, scores / temperature, self.codes, indices, estimator == "reinmax", self.metric == "cosine")


class _Softened(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, taken: Tensor, logits: Tensor, codes: Tensor, indices: Tensor, reinmax: bool, cosine: bool) -> Tensor:
        ctx.save_for_backward(logits, codes, indices)
        ctx.settings = reinmax, cosine
        return taken.view_as(taken)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        (logits, codes, indices), (reinmax, cosine) = ctx.saved_tensors, ctx.settings
        gradient = gradients[0].where(indices.unsqueeze(-1) >= 0, 0.0)
        if not ctx.needs_input_grad[1]:
            return gradient, None, None, None, None, None
        with full_precision(codes.device.type):
            found = [_of_weights(gradient[part], codes[part], cosine) for part in _parts(codes)]
            of_weights = found[0] if len(found) == 1 else torch.cat(found)
        probability = logits.softmax(-1).unsqueeze(-2).expand_as(of_weights)
        of_logits = through_softmax(probability, of_weights)
        if reinmax:
            chosen = indices.clamp(min=0).unsqueeze(-1)
            halfway = (probability / 2).scatter_add_(-1, chosen, torch.full_like(chosen, 0.5, dtype=logits.dtype))
            of_logits = 2 * through_softmax(halfway, of_weights) - of_logits / 2
        return gradient, of_logits.sum(-2), None, None, None, None


def _of_weights(gradient: Tensor, codes: Tensor, cosine: bool) -> Tensor:
    """[l, n, C]; without what all codes have in common, which a softmax does not pass on."""
    codes = directions(codes) if cosine else codes
    return gradient @ (codes - codes.mean(1, keepdim=True)).mT


def _parts(codes: Tensor) -> Iterator[slice]:
    """Few codebooks at a time."""
    together = max(1, _entries_at_once(codes) // max(1, codes.shape[1:].numel()))
    return (slice(first, first + together) for first in range(0, max(1, len(codes)), together))


def _entries_at_once(codes: Tensor) -> int:
    return _ENTRIES_AT_ONCE.get(codes.device.type, _ENTRIES_AT_ONCE_ELSEWHERE)
