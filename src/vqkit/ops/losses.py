"""Losses of vector quantization, unweighted; each is 0 where no vector counts.

Shapes: B batch, T time, N vectors, H heads with a codebook each, C codes, K width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vqkit.ops.assignment import Metric, assignment_cross_entropy, mean_assignment, mean_assignment_cross_entropy
from vqkit.ops.codebook import are_ordinary, directions, known_directions, polar
from vqkit.ops.estimators import scale_gradient
from vqkit.ops.precision import as_dtype, widest, without_autocast

Reduction = Literal["mean", "none"]
"""The mean over the vectors that count, or one number a vector."""


def commitment_loss(x: Tensor, quantized: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared distance of the vectors to their codes, which are constants here (van den Oord et al., 2017).

    x, quantized [B, H, T, K], mask [B, T] bool. The squared error is summed over K and over heads and averaged over batch and time;
    masked positions add 0 and stay in the denominator, as in the official Transformer-VQ. A masked vector gets no gradient, whatever
    it holds. Returns a scalar of x's dtype; 0 for an empty input.
    """
    _check_alike(x, quantized)
    if x.dim() != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}: must be [batch, heads, time, width]")
    batch, _, time, _ = x.shape
    difference = x - quantized.detach()
    if mask is not None:
        if mask.shape != (batch, time):
            raise ValueError(f"mask has shape {tuple(mask.shape)}: must be {(batch, time)}")
        difference = difference.where(mask[:, None, :, None], 0.0)
    return difference.square().sum() / max(batch * time, 1)


def mean_commitment_loss(
    x: Tensor, quantized: Tensor, mask: Tensor | None = None, *, pull: float = 0.0, reduction: Reduction = "mean"
) -> Tensor:
    """The mean squared difference of the vectors and their codes over the vectors that count.

    x, quantized [..., N, K], mask [..., N] bool that broadcasts. The codes get `pull` times their gradient: with 0 they are constants. A
    masked vector gets no gradient, whatever it holds. Returns a scalar, float32 or wider; with reduction="none" the mean over K alone,
    [..., N], 0 where masked.
    """
    _check_reduction(reduction)
    _check_alike(x, quantized)
    dtype = widest(x, quantized)
    x, codes = as_dtype(x, dtype), as_dtype(scale_gradient(quantized, pull), dtype)
    if mask is None:
        if reduction == "none":
            return (x - codes).square().mean(-1)
        return F.mse_loss(x, codes, reduction="sum") / max(x.numel(), 1)
    mask = _spread("mask", mask, x.shape[:-1])
    difference = (x - codes).where(mask.unsqueeze(-1), 0.0)
    if reduction == "none":
        return difference.square().mean(-1)
    return difference.square().sum() / (mask.sum() * x.shape[-1]).clamp(min=1)


def cross_entropy_commitment(
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    metric: Metric = "euclidean",
    reduction: Reduction = "mean",
) -> Tensor:
    """The mean of -log softmax(score / temperature) of `indices`, a score being minus the distance to a code, or the cosine.

    x [..., N, K], codebook [..., C, K], indices [..., N] int64, mask [..., N] bool that broadcasts to them. Vectors that are masked, of
    index -1 or not finite take no part. Differentiable in x and codebook; no N x C matrix is made or kept. Returns a scalar, float32
    or wider; with reduction="none" one number a vector, [..., N], 0 for those that take no part.
    """
    _check_reduction(reduction)
    if mask is not None:
        indices = torch.where(mask, indices, -1)
    loss = assignment_cross_entropy if reduction == "none" else mean_assignment_cross_entropy
    return loss(x, codebook, indices, temperature=temperature, metric=metric)


def orthogonality_loss(
    codebook: Tensor, active: Tensor | None = None, *, max_codes: int | None = None, noise: Tensor | None = None
) -> Tensor:
    """The squared cosines of all pairs of different codes of a head, added up and divided by n^2; averaged over heads (Shin et al., 2021).

    Each of the n codes that take part meets the n - 1 others: the value is (n - 1) / n times the mean over pairs, from 0 for orthogonal
    codes to (n - 1) / n for parallel ones. It is their mean squared difference from the identity: a code of length 0, which has cosine 0
    with others and with itself, adds 1 / n^2. Only the codes get a gradient; no vector takes part.

    codebook [..., C, K]; `active` [..., C] bool, the codes that take part. With `max_codes`, at most so many of these, drawn without
    replacement by `noise` [..., C] uniform in [0, 1), from the global random generator where not given. No C x C matrix where K < C.
    Returns a scalar, float32 or wider.
    """
    codes = as_dtype(codebook, widest(codebook))
    if max_codes is not None and active is None and max_codes < codes.shape[-2]:
        _check_max_codes(max_codes)
        drawn = (torch.rand_like(codes[..., 0]) if noise is None else noise).topk(max_codes, dim=-1).indices
        codes = codes.gather(-2, drawn.unsqueeze(-1).expand(*drawn.shape, codes.shape[-1]))
    elif active is not None or max_codes is not None:
        chosen = torch.ones_like(codes[..., 0], dtype=torch.bool) if active is None else _spread("active", active, codes.shape[:-1])
        if max_codes is not None:
            chosen = _draw(chosen, max_codes, torch.rand_like(codes[..., 0]) if noise is None else noise)
        known = known_directions(codes)
        if known is not None:
            num, found = chosen.sum(-1), known * chosen.unsqueeze(-1)
            return ((_gram(found).square().sum((-2, -1)) - num) / num.clamp(min=1).square()).mean()
        return _orthogonality(directions(codes) * chosen.unsqueeze(-1), chosen)
    codes, length = polar(codes)
    if not are_ordinary(length):
        return _orthogonality(codes, torch.ones_like(codes[..., 0], dtype=torch.bool))
    heads, size = codes.shape[:-2].numel(), codes.shape[-2]
    return _gram(codes).square().sum() / (heads * size**2) - 1.0 / size


def _gram(codes: Tensor) -> Tensor:
    """Either of two matrices of the same sum of squares."""
    with without_autocast(codes.device.type):
        return codes.mT @ codes if codes.shape[-1] < codes.shape[-2] else codes @ codes.mT


def _orthogonality(codes: Tensor, chosen: Tensor) -> Tensor:
    """Of codes [..., C, K] of length 1 or 0, 0 where not chosen [..., C] bool."""
    with_itself = codes.square().sum(-1)
    zero = (chosen & (with_itself == 0)).sum(-1)
    pairs = _gram(codes).square().sum((-2, -1)) - with_itself.square().sum(-1)
    return ((pairs + zero) / chosen.sum(-1).clamp(min=1).square()).mean()


def _check_max_codes(num: int) -> None:
    if num < 1:
        raise ValueError(f"max_codes = {num}: must be at least 1")


def _draw(chosen: Tensor, num: int, noise: Tensor) -> Tensor:
    """At most `num` of the chosen, those of the largest noise."""
    _check_max_codes(num)
    if num >= chosen.shape[-1]:
        return chosen
    place = noise.masked_fill(~chosen, -1.0).topk(num, dim=-1).indices
    return torch.zeros_like(chosen).scatter_(-1, place, True) & chosen


def diversity_loss(
    x: Tensor, codebook: Tensor, mask: Tensor | None = None, *, temperature: float = 1.0, metric: Metric = "euclidean"
) -> Tensor:
    """The negative entropy, in nats, of the mean softmax(score / temperature) over all vectors of a codebook; averaged over codebooks.

    Least, -log C, where the vectors share the codes evenly; the same however vectors are arranged over the leading axes. x [..., N, K],
    codebook [..., C, K], mask [..., N] bool that broadcasts. Vectors that are masked or not finite take no part. Differentiable in x and
    codebook; no N x C matrix is made or kept. Returns a scalar, float32 or wider.
    """
    return negative_entropy(mean_assignment(x, codebook, mask, temperature=temperature, metric=metric))


def negative_entropy(shares: Tensor) -> Tensor:
    """Of distributions [..., C], in nats, averaged over them; a distribution of zeros has none."""
    least = (shares * shares.clamp(min=torch.finfo(shares.dtype).tiny).log()).sum()
    return least / max(1, shares.shape[:-1].numel())


def _spread(name: str, mask: Tensor, shape: torch.Size) -> Tensor:
    """A mask that broadcasts to `shape`, in that shape."""
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} is {mask.dtype}: must be torch.bool")
    if mask.dim() > len(shape) or any(own not in (1, length) for own, length in zip(reversed(mask.shape), reversed(shape), strict=False)):
        raise ValueError(f"{name} has shape {tuple(mask.shape)}: must broadcast to {tuple(shape)}")
    return mask.expand(shape)


def _check_alike(x: Tensor, quantized: Tensor) -> None:
    if x.shape != quantized.shape:
        raise ValueError(f"quantized has shape {tuple(quantized.shape)}: must be that of x, {tuple(x.shape)}")


def _check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction = {reduction!r}: must be "mean" or "none"')
