"""Soft choices of codes: a softmax over the scores of all codes, whose N x C matrix never exists.

A score is minus the euclidean distance, or the cosine. Every pass runs over tiles of vectors; the backward computes the softmax again,
so that forward keeps nothing but its arguments. Each pass is one opaque node under compile.

Shapes: N vectors, C codes, K width, G different codebooks, R vectors of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from vqkit.ops.codebook import by_codebook, directions, gather_codes
from vqkit.ops.precision import finite_rows, full_precision, widest

Metric = Literal["euclidean", "cosine"]
SoftEstimator = Literal["straight_through", "reinmax"]

_SCORES_PER_TILE = {"cpu": 1 << 18}
_SCORES_PER_TILE_ELSEWHERE = 1 << 24


class SampledCodes(NamedTuple):
    """Codes drawn for vectors."""

    quantized: Tensor  # [..., N, K] float32 or wider: the codes, exactly; differentiable in x and in the codebook
    indices: Tensor  # [..., N] int64; -1 for a vector that is not finite, whose code is 0 and which gets no gradient


def sample_codes(
    x: Tensor,
    codebook: Tensor,
    *,
    temperature: float = 1.0,
    estimator: SoftEstimator = "straight_through",
    metric: Metric = "euclidean",
    noise: Tensor | None = None,
) -> SampledCodes:
    """Draw a code for each vector with probabilities softmax(score / temperature), the distribution of Gumbel-max (Jang et al., 2017).

    x [..., N, K], codebook [..., C, K]; leading axes broadcast. `noise` [..., N] as for `sample_indices`, the gradient that of
    `soft_codes`. Arithmetic is float32 or wider, whatever autocast says. Raises ValueError for a temperature that is not positive, an
    unknown estimator, and noise of another shape.
    """
    _check_estimator(estimator)
    shape = _check_places("noise", noise, x, codebook)
    noise = None if noise is None else noise.reshape(*shape, 1)
    indices = sample_indices(x, codebook, 1, temperature=temperature, metric=metric, noise=noise).squeeze(-1)
    quantized = soft_codes(x, codebook, indices, temperature=temperature, estimator=estimator, metric=metric)
    return SampledCodes(quantized, indices)


def sample_indices(
    x: Tensor, codebook: Tensor, num: int = 1, *, temperature: float = 1.0, metric: Metric = "euclidean", noise: Tensor | None = None
) -> Tensor:
    """`num` different codes for each vector, drawn one after the other with probabilities softmax(score / temperature) among those left.

    x [..., N, K], codebook [..., C, K], leading axes broadcast -> [..., N, num] int64, -1 for a vector that is not finite. Their
    distribution is that of the `num` largest scores with Gumbel noise (Kool et al., 2019). `noise` [..., N, num], uniform in [0, 1),
    decides by the inverse of the cumulated probabilities: one number a draw, instead of Gumbel noise for each code; drawn by the global
    random generator where not given. Raises ValueError unless 1 <= num <= C, for a temperature that is not positive, and for noise of
    another shape.
    """
    scored = _score(x, codebook, temperature, metric)
    if not 1 <= num <= codebook.shape[-2]:
        raise ValueError(f"num = {num}: must be from 1 to {codebook.shape[-2]}, the size of the codebook")
    shape = _check_places("noise", noise, x, codebook, num)
    if noise is None:
        noise = torch.rand(shape, dtype=scored.vectors.dtype, device=x.device)
    noise = by_codebook(noise.to(scored.vectors.dtype), codebook[..., :1, :1])[0]
    indices = _draw(scored.vectors.detach(), scored.codes.detach(), noise.detach(), temperature, metric)
    return scored.restore(indices.where(scored.valid.unsqueeze(-1), -1))


def soft_codes(
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    *,
    temperature: float = 1.0,
    estimator: SoftEstimator = "straight_through",
    metric: Metric = "euclidean",
) -> Tensor:
    """The codes of `indices`, with the gradient of a softmax over all codes: [..., N, K] float32 or wider, the codes exactly.

    x [..., N, K], codebook [..., C, K], indices [..., N] int64 of all leading axes. The gradient reaches the row of the codebook, and by
    the scores x and all of the codebook: with p = softmax(score / temperature) and the one-hot D of the index, "straight_through"
    differentiates p in place of D; "reinmax" is the estimator of second order of Liu et al. (2023), algorithm 2: 2 softmax' at
    (D + p) / 2 minus half of softmax' at p, for the logits score / temperature. 0, with no gradient, for index -1 and for a vector that
    is not finite. Raises ValueError for indices of another shape and for what `sample_codes` refuses.
    """
    _check_estimator(estimator)
    _check_places("indices", indices, x, codebook)
    scored = _score(x, codebook, temperature, metric)
    chosen = torch.where(scored.valid, by_codebook(indices.unsqueeze(-1), codebook[..., :1, :1])[0].squeeze(-1), -1)
    values = by_codebook(x, codebook.to(scored.codes.dtype))[1]
    return scored.restore(_soft_codes(scored.vectors, scored.codes, values, chosen, temperature, metric, estimator == "reinmax"))


def _check_estimator(estimator: str) -> None:
    if estimator not in ("straight_through", "reinmax"):
        raise ValueError(f'estimator = {estimator!r}: must be "straight_through" or "reinmax"')


def _check_pair(x: Tensor, codebook: Tensor) -> None:
    for name, tensor in (("x", x), ("codebook", codebook)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}: must be floating point")
    if x.dim() < 2 or codebook.dim() < 2 or x.shape[-1] != codebook.shape[-1]:
        shapes = f"x has shape {tuple(x.shape)} and codebook {tuple(codebook.shape)}"
        raise ValueError(f"{shapes}: must be [..., vectors, width] and [..., codes, width] of one width")


def _check_places(name: str, values: Tensor | None, x: Tensor, codebook: Tensor, *more: int) -> tuple[int, ...]:
    """The shape of one value a vector, or `more` of them, which `values` must have."""
    _check_pair(x, codebook)
    shape = (*torch.broadcast_shapes(x.shape[:-2], codebook.shape[:-2]), x.shape[-2], *more)
    if values is not None and values.shape != shape:
        raise ValueError(f"{name} has shape {tuple(values.shape)}: must be {shape}, one number a {'draw' if more else 'vector'}")
    return shape


def assignment_cross_entropy(
    x: Tensor, codebook: Tensor, indices: Tensor, *, temperature: float = 1.0, metric: Metric = "euclidean"
) -> Tensor:
    """-log softmax(score / temperature) of the code `indices` for each vector.

    x [..., N, K], codebook [..., C, K], indices [..., N] int64 of all leading axes -> [..., N] float32 or wider; 0, with no gradient,
    for index -1 and for a vector that is not finite. Differentiable in x and codebook.
    """
    _check_places("indices", indices, x, codebook)
    scored = _score(x, codebook, temperature, metric)
    grouped = by_codebook(indices.unsqueeze(-1), codebook[..., :1, :1])[0].squeeze(-1)
    target = torch.where(scored.valid, grouped, -1)
    return scored.restore(_cross_entropy(scored.vectors, scored.codes, target, temperature, metric))


def mean_assignment(
    x: Tensor, codebook: Tensor, mask: Tensor | None = None, *, temperature: float = 1.0, metric: Metric = "euclidean"
) -> Tensor:
    """The mean over vectors of softmax(score / temperature): [G, C], one row for each different codebook; zeros where no vector counts.

    x [..., N, K], codebook [..., C, K], mask [..., N] bool that broadcasts over the leading axes of x. A vector that is masked or not
    finite takes no part. Differentiable in x and codebook.
    """
    scored = _score(x, codebook, temperature, metric)
    counted = scored.valid
    if mask is not None:
        mask = mask.expand(torch.broadcast_shapes(mask.shape, x.shape[:-1]))
        counted = counted & by_codebook(mask.unsqueeze(-1), codebook[..., :1, :1])[0].squeeze(-1)
    share = counted.to(scored.vectors.dtype)
    share = share / share.sum(-1, keepdim=True).clamp(min=1.0)
    return _mean_softmax(scored.vectors, scored.codes, share, temperature, metric)


def has_scores(x: Tensor, metric: Metric) -> Tensor:
    """Whether vectors x [..., K] are finite and, for distances, not so long that their squares overflow: [...] bool."""
    x = x.detach().to(widest(x))
    return finite_rows(x) if metric == "cosine" else torch.linalg.vector_norm(x, dim=-1).isfinite()


class _Scored(NamedTuple):
    vectors: Tensor  # [G, N, K] wide, finite; directions for cosine
    codes: Tensor  # [G, C, K]
    valid: Tensor  # [G, N] bool
    restore: Callable[[Tensor], Tensor]


def _score(x: Tensor, codebook: Tensor, temperature: float, metric: Metric) -> _Scored:
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature}: must be positive")
    if metric not in ("euclidean", "cosine"):
        raise ValueError(f'metric = {metric!r}: must be "euclidean" or "cosine"')
    _check_pair(x, codebook)
    dtype = widest(x, codebook)
    vectors, codes, restore = by_codebook(x.to(dtype), codebook.to(dtype))
    valid = has_scores(vectors, metric)
    vectors = vectors.where(valid.unsqueeze(-1), 0.0)
    if metric == "cosine":
        vectors, codes = directions(vectors), directions(codes)
    return _Scored(vectors, codes, valid, restore)


# The passes over tiles


def _tiles(x: Tensor, codes: Tensor) -> list[slice]:
    budget = _SCORES_PER_TILE.get(x.device.type, _SCORES_PER_TILE_ELSEWHERE)
    rows = max(1, budget // max(1, codes.shape[0] * codes.shape[1]))
    return [slice(start, start + rows) for start in range(0, x.shape[1], rows)]


def _scores(x: Tensor, codes: Tensor, metric: str) -> Tensor:
    """[G, R, C]."""
    if metric == "cosine":
        return x @ codes.mT
    return torch.cdist(x, codes, compute_mode="donot_use_mm_for_euclid_dist").neg_()


def _softmax_tiles(x: Tensor, codes: Tensor, temperature: float, metric: str) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows, their scores and their softmax, tile by tile."""
    for rows in _tiles(x, codes):
        scores = _scores(x[:, rows], codes, metric)
        yield rows, scores, (scores / temperature).softmax(-1)


@torch.library.custom_op("vqkit::draw_codes", mutates_args=())
def _draw(x: Tensor, codes: Tensor, noise: Tensor, temperature: float, metric: str) -> Tensor:
    """noise [G, N, num] -> [G, N, num]: the first code at which the cumulated probabilities exceed it, those drawn before left out."""
    indices = torch.empty(noise.shape, dtype=torch.int64, device=x.device)
    with torch.no_grad(), full_precision(x.device.type):
        for rows in _tiles(x, codes):
            logits = _scores(x[:, rows], codes, metric).div_(temperature)
            for place in range(noise.shape[-1]):
                cumulated = logits.softmax(-1).cumsum(-1)
                total = cumulated[..., -1:]
                below_total = torch.nextafter(total, torch.zeros_like(total))
                threshold = torch.minimum(noise[:, rows, place : place + 1] * total, below_total)
                drawn = torch.searchsorted(cumulated, threshold, right=True).clamp_(max=codes.shape[1] - 1)
                indices[:, rows, place : place + 1] = drawn
                logits.scatter_(-1, drawn, -torch.inf)
    return indices


@_draw.register_fake
def _(x: Tensor, codes: Tensor, noise: Tensor, temperature: float, metric: str) -> Tensor:
    return x.new_empty(noise.shape, dtype=torch.int64)


@torch.library.custom_op("vqkit::soft_codes", mutates_args=())
def _soft_codes(x: Tensor, codes: Tensor, values: Tensor, indices: Tensor, temperature: float, metric: str, reinmax: bool) -> Tensor:
    """[G, N, K]: rows of `values`, whose gradient is that of a softmax."""
    return gather_codes(values, indices)


@_soft_codes.register_fake
def _(x: Tensor, codes: Tensor, values: Tensor, indices: Tensor, temperature: float, metric: str, reinmax: bool) -> Tensor:
    return values.new_empty(*indices.shape, values.shape[-1])


@torch.library.custom_op("vqkit::soft_codes_backward", mutates_args=())
def _soft_codes_backward(
    gradient: Tensor, x: Tensor, codes: Tensor, values: Tensor, indices: Tensor, temperature: float, metric: str, reinmax: bool
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = indices.clamp(min=0).unsqueeze(-1)
    gradient = gradient.where(indices.unsqueeze(-1) >= 0, 0.0)
    centred = (values - values.mean(1, keepdim=True)).mT  # what all codes have in common a softmax does not pass on

    def of_scores(rows: slice, probability: Tensor) -> Tensor:
        of_weights = gradient[:, rows] @ centred
        if not reinmax:
            return _through_softmax(probability, of_weights)
        half = (probability / 2).scatter_add_(-1, chosen[:, rows], probability.new_full((1, 1, 1), 0.5).expand_as(chosen[:, rows]))
        return 2 * _through_softmax(half, of_weights) - _through_softmax(probability, of_weights) / 2

    of_x, of_codes = _score_gradients(x, codes, temperature, metric, of_scores)
    of_values = values.new_zeros(values.shape).scatter_add_(1, chosen.expand_as(gradient), gradient)
    return of_x, of_codes, of_values


@_soft_codes_backward.register_fake
def _(
    gradient: Tensor, x: Tensor, codes: Tensor, values: Tensor, indices: Tensor, temperature: float, metric: str, reinmax: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), _like(codes), _like(values)


@torch.library.custom_op("vqkit::assignment_cross_entropy", mutates_args=())
def _cross_entropy(x: Tensor, codes: Tensor, target: Tensor, temperature: float, metric: str) -> Tensor:
    """[G, N]; 0 for target -1."""
    loss = x.new_empty(x.shape[:-1])
    with torch.no_grad(), full_precision(x.device.type):
        for rows in _tiles(x, codes):
            logits = _scores(x[:, rows], codes, metric).div_(temperature)
            of_target = logits.gather(-1, target[:, rows].clamp(min=0).unsqueeze(-1)).squeeze(-1)
            loss[:, rows] = logits.logsumexp(-1) - of_target
    return loss.masked_fill_(target < 0, 0.0)


@_cross_entropy.register_fake
def _(x: Tensor, codes: Tensor, target: Tensor, temperature: float, metric: str) -> Tensor:
    return x.new_empty(x.shape[:-1])


@torch.library.custom_op("vqkit::assignment_cross_entropy_backward", mutates_args=())
def _cross_entropy_backward(
    gradient: Tensor, x: Tensor, codes: Tensor, target: Tensor, temperature: float, metric: str
) -> tuple[Tensor, Tensor]:
    weight = gradient.where(target >= 0, 0.0).unsqueeze(-1)
    chosen = target.clamp(min=0).unsqueeze(-1)

    def of_scores(rows: slice, probability: Tensor) -> Tensor:
        return (probability * weight[:, rows]).scatter_add_(-1, chosen[:, rows], -weight[:, rows])

    return _score_gradients(x, codes, temperature, metric, of_scores)


@_cross_entropy_backward.register_fake
def _(gradient: Tensor, x: Tensor, codes: Tensor, target: Tensor, temperature: float, metric: str) -> tuple[Tensor, Tensor]:
    return _like(x), _like(codes)


@torch.library.custom_op("vqkit::mean_softmax", mutates_args=())
def _mean_softmax(x: Tensor, codes: Tensor, share: Tensor, temperature: float, metric: str) -> Tensor:
    """[G, C]: the sum over vectors of share [G, N] times softmax."""
    mean = codes.new_zeros(codes.shape[:-1])
    with torch.no_grad(), full_precision(x.device.type):
        for rows, _, probability in _softmax_tiles(x, codes, temperature, metric):
            mean += (share[:, rows].unsqueeze(-2) @ probability).squeeze(-2)
    return mean


@_mean_softmax.register_fake
def _(x: Tensor, codes: Tensor, share: Tensor, temperature: float, metric: str) -> Tensor:
    return codes.new_empty(codes.shape[:-1])


@torch.library.custom_op("vqkit::mean_softmax_backward", mutates_args=())
def _mean_softmax_backward(
    gradient: Tensor, x: Tensor, codes: Tensor, share: Tensor, temperature: float, metric: str
) -> tuple[Tensor, Tensor]:
    def of_scores(rows: slice, probability: Tensor) -> Tensor:
        return _through_softmax(probability, gradient.unsqueeze(1)) * share[:, rows].unsqueeze(-1)

    return _score_gradients(x, codes, temperature, metric, of_scores)


@_mean_softmax_backward.register_fake
def _(gradient: Tensor, x: Tensor, codes: Tensor, share: Tensor, temperature: float, metric: str) -> tuple[Tensor, Tensor]:
    return _like(x), _like(codes)


def _like(tensor: Tensor) -> Tensor:
    return tensor.new_empty(tensor.shape)


# Gradients


def _through_softmax(probability: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of the logits, given that of the probabilities."""
    return probability * (gradient - (probability * gradient).sum(-1, keepdim=True))


def _score_gradients(
    x: Tensor, codes: Tensor, temperature: float, metric: str, of_logits: Callable[[slice, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Gradients of x and codes; `of_logits(rows, probabilities)` is that of the logits of a tile, scores / temperature."""
    of_x, of_codes = x.new_empty(x.shape), codes.new_zeros(codes.shape)
    origin = codes.mean(1, keepdim=True) if metric == "euclidean" else 0.0
    with torch.no_grad(), full_precision(x.device.type):
        vectors, centred = x - origin, codes - origin
        for rows, scores, probability in _softmax_tiles(x, codes, temperature, metric):
            of_scores = of_logits(rows, probability).div_(temperature)
            if metric == "cosine":
                of_x[:, rows] = of_scores @ codes
                of_codes += of_scores.mT @ x[:, rows]
                continue
            pull = torch.where(scores < 0, of_scores / scores, 0.0)  # the score is -|x - c|: its gradient in x is (x - c) / score
            of_x[:, rows] = vectors[:, rows] * pull.sum(-1, keepdim=True) - pull @ centred
            of_codes += centred * pull.sum(1).unsqueeze(-1) - pull.mT @ vectors[:, rows]
    return of_x, of_codes


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the arguments; of the codes a copy, which no update can overwrite before the backward."""
    x, codes, chosen, *settings = inputs
    ctx.save_for_backward(x, codes.clone(), chosen)
    ctx.settings = settings


def _keep_soft_codes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, values, indices, *settings = inputs
    ctx.save_for_backward(x, codes.clone(), values.clone(), indices)
    ctx.settings = settings


def _soft_codes_gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _soft_codes_backward(gradient.contiguous(), *ctx.saved_tensors, *ctx.settings)
    return *gradients, None, None, None, None


def _cross_entropy_gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return *_cross_entropy_backward(gradient, *ctx.saved_tensors, *ctx.settings), None, None, None


def _mean_softmax_gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return *_mean_softmax_backward(gradient, *ctx.saved_tensors, *ctx.settings), None, None, None


_soft_codes.register_autograd(_soft_codes_gradients, setup_context=_keep_soft_codes)
_cross_entropy.register_autograd(_cross_entropy_gradients, setup_context=_keep)
_mean_softmax.register_autograd(_mean_softmax_gradients, setup_context=_keep)
