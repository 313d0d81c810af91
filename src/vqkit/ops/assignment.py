"""Soft choices of codes: a softmax over the scores of all codes, whose N x C matrix never exists.

A score is minus the euclidean distance, or the cosine (`Metric`). Every pass runs over tiles of vectors; the backward computes the
softmax again, so that forward keeps nothing wider than its arguments, unless that is little. Each pass is one opaque node under compile.

Shapes: N vectors, C codes, K width, G different codebooks, R vectors of a tile.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from vqkit.ops.codebook import by_codebook, directions, gather_codes
from vqkit.ops.distances import Distances, Near, Tile, dense_distances
from vqkit.ops.precision import finite_rows, full_precision, is_traced, is_transformed, known_finite, widest

Metric = Literal["euclidean", "cosine", "product"]
"""The score is minus the euclidean distance, the cosine, or the inner product, which is the cosine of what has length 1."""
SoftEstimator = Literal["straight_through", "reinmax"]

_SCORES_PER_TILE = {"cpu": 1 << 16}  # of a thread, which stay in its cache
_SCORES_PER_TILE_ELSEWHERE = 1 << 24
_FEWEST_ROWS_PER_TILE = 32
_KEPT_SCORES = 1 << 20
"""So many at most, 4 MB in float32, are kept for the backward, which then need not make them again; more would cost memory that counts."""
_ENTRIES_AT_ONCE = {"cpu": 1 << 18}  # of codes
_ENTRIES_AT_ONCE_ELSEWHERE = 1 << 26


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
    run = _draw_opaque if is_traced() else _draw
    indices = run(scored.vectors.detach(), scored.codes.detach(), noise.detach(), temperature, metric)
    return scored.restore(indices if scored.valid is None else indices.where(scored.valid.unsqueeze(-1), -1))


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
    chosen = scored.of_valid(_one_each(indices, x, codebook))
    values = by_codebook(x, codebook.to(scored.codes.dtype))[1]
    inputs = scored.vectors, scored.codes, values, chosen, temperature, metric, estimator == "reinmax"
    return scored.restore(_run(_LOOK_UP, _look_up_opaque, *inputs))


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
    own, of_codes = x.shape[:-2], codebook.shape[:-2]
    shape = (*(own if own == of_codes else torch.broadcast_shapes(own, of_codes)), x.shape[-2], *more)
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
    scored, target = _score_targets(x, codebook, indices, temperature, metric)
    return scored.restore(_run(_CROSS_ENTROPY, _cross_entropy_opaque, scored.vectors, scored.codes, target, temperature, metric))


def mean_assignment_cross_entropy(
    x: Tensor, codebook: Tensor, indices: Tensor, *, temperature: float = 1.0, metric: Metric = "euclidean"
) -> Tensor:
    """The mean of `assignment_cross_entropy` over the finite vectors whose index is not -1, [] float32 or wider; 0 where there are none.

    Forward, which has the softmax at hand, computes the gradients, too.
    """
    scored, target = _score_targets(x, codebook, indices, temperature, metric)
    if is_traced():
        loss = _run(_CROSS_ENTROPY, _cross_entropy_opaque, scored.vectors, scored.codes, target, temperature, metric)
        return loss.sum() / (target >= 0).sum().clamp(min=1)
    if not torch.is_grad_enabled():
        counted = target >= 0
        loss = _cross_entropy(scored.vectors, scored.codes, target, temperature, metric)
        return loss.sum() / counted.sum().clamp_(min=1)
    return _MeanCrossEntropy.apply(*_last((scored.vectors, scored.codes, target, temperature, metric), 2))


def _score_targets(x: Tensor, codebook: Tensor, indices: Tensor, temperature: float, metric: Metric) -> tuple[_Scored, Tensor]:
    """And the targets [G, N], -1 where none counts."""
    _check_places("indices", indices, x, codebook)
    scored = _score(x, codebook, temperature, metric)
    return scored, scored.of_valid(_one_each(indices, x, codebook))


def mean_assignment(
    x: Tensor, codebook: Tensor, mask: Tensor | None = None, *, temperature: float = 1.0, metric: Metric = "euclidean"
) -> Tensor:
    """The mean over vectors of softmax(score / temperature): [G, C], one row for each different codebook; zeros where no vector counts.

    x [..., N, K], codebook [..., C, K], mask [..., N] bool that broadcasts over the leading axes of x. A vector that is masked or not
    finite takes no part. Differentiable in x and codebook.
    """
    scored = _score(x, codebook, temperature, metric)
    counted = scored.vectors.new_ones(scored.vectors.shape[:-1]) if scored.valid is None else scored.valid.to(scored.vectors.dtype)
    if mask is not None:
        mask = mask if mask.shape == x.shape[:-1] else mask.expand(torch.broadcast_shapes(mask.shape, x.shape[:-1]))
        counted = counted * _one_each(mask, x, codebook)
    share = counted / counted.sum(-1, keepdim=True).clamp(min=1.0)
    inputs = scored.vectors, scored.codes, share, temperature, metric
    if is_traced():
        return _run(_MEAN_SOFTMAX, _mean_softmax_opaque, *inputs)
    return _MeanSoftmax.apply(*_last(inputs, 2)) if torch.is_grad_enabled() else _mean_softmax(*inputs)


def _one_each(values: Tensor, x: Tensor, codebook: Tensor) -> Tensor:
    """One value for each vector of x, in its place among those of a codebook: [G, N]."""
    if x.dim() == codebook.dim() == 3 and len(x) == len(codebook) and values.shape == x.shape[:-1]:
        return values
    return by_codebook(values.unsqueeze(-1), codebook[..., :1, :1])[0].squeeze(-1)


def has_scores(x: Tensor, metric: Metric) -> Tensor:
    """Whether vectors x [..., K] are finite and, for distances, not so long that their squares overflow: [...] bool."""
    x = x.detach().to(widest(x))
    return finite_rows(x if metric != "euclidean" else torch.linalg.vector_norm(x, dim=-1, keepdim=True))


class _Scored(NamedTuple):
    vectors: Tensor  # [G, N, K] wide, finite; directions for cosine
    codes: Tensor  # [G, C, K]
    valid: Tensor | None  # [G, N] bool; None: all are
    restore: Callable[[Tensor], Tensor]

    def of_valid(self, indices: Tensor) -> Tensor:
        """Indices [G, N], -1 for vectors that are not valid."""
        return indices if self.valid is None else indices.where(self.valid, -1)


def _score(x: Tensor, codebook: Tensor, temperature: float, metric: Metric) -> _Scored:
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature}: must be positive")
    if metric not in ("euclidean", "cosine", "product"):
        raise ValueError(f'metric = {metric!r}: must be "euclidean", "cosine" or "product"')
    _check_pair(x, codebook)
    dtype = widest(x, codebook)
    vectors, codes, restore = by_codebook(x.to(dtype), codebook.to(dtype))
    lengths = vectors if metric != "euclidean" else torch.linalg.vector_norm(vectors.detach(), dim=-1, keepdim=True)
    valid = None if known_finite(lengths) else finite_rows(lengths)
    if valid is not None:
        vectors = vectors.where(valid.unsqueeze(-1), 0.0)
    if metric == "cosine":
        vectors, codes = directions(vectors), directions(codes)
    return _Scored(vectors, codes, valid, restore)


# The passes over tiles


At = tuple[slice, slice]
"""Of some codebooks some vectors."""


class _Tile(NamedTuple):
    """Of some vectors."""

    at: At  # where it is in [G, N]
    values: Tensor  # [G', R, C] the logits, score / temperature, or their softmax
    distances: Tile | None  # what they were made of, unless of products


class _OfDistances:
    """Logits that are minus the distance over temperature."""

    def __init__(self, x: Tensor, codes: Tensor, temperature: float) -> None:
        self.distances, self.unit = Distances(x, codes), -temperature

    def tile(self, at: At, room: Tensor | None = None) -> _Tile:
        found = self.distances.tile(at[1], room)
        return _Tile(at, found.distances / self.unit, found)

    def soften(self, at: At, room: Tensor | None) -> _Tile:
        tile = self.tile(at, room)
        return tile._replace(values=tile.values.softmax(-1))

    def again(self, at: At, kept: Tensor, near: Near | None, all_near: bool) -> _Tile:
        return _Tile(at, (kept / self.unit).softmax(-1), Tile(at[1], kept, near, all_near))

    def add_gradients_(self, of_logits: Tensor, weight: Tensor, tile: _Tile, of_x: Tensor | None, of_codes: Tensor | None) -> None:
        self.distances.add_gradients_(of_logits, cast(Tile, tile.distances), of_x, of_codes, weight / self.unit)


class _OfProducts:
    """Logits that are the inner product over temperature."""

    def __init__(self, x: Tensor, codes: Tensor, temperature: float) -> None:
        self.x, self.codes, self.temperature = x, codes / temperature, temperature

    def tile(self, at: At) -> _Tile:
        return _Tile(at, self.x[:, at[1]] @ self.codes.mT, None)

    def soften(self, at: At, room: Tensor | None) -> _Tile:
        return _Tile(at, torch.softmax(self.tile(at).values, -1, out=room), None)

    def again(self, at: At, kept: Tensor, *_: object) -> _Tile:
        return _Tile(at, kept, None)

    def add_gradients_(self, of_logits: Tensor, weight: Tensor, tile: _Tile, of_x: Tensor | None, of_codes: Tensor | None) -> None:
        rows = tile.at[1]
        if of_x is not None:
            of_x[:, rows] += (of_logits @ self.codes).mul_(weight)
        if of_codes is not None:
            of_codes += of_logits.mT @ (self.x[:, rows] * (weight / self.temperature))


class _Kept(NamedTuple):
    """What forward keeps of its tiles: of the softmax of products itself, else distances, of which it is made again."""

    room: Tensor  # [G * N * C], tile after tile: in one piece an allocator has it ready the next time
    near: list[Near | None]  # of each tile, as in `Tile`
    all_near: list[bool]


class _Scores:
    """The scores of all codes for vectors x [G, N, K], tile by tile; of some codebooks at a time where all of them are more than a tile."""

    def __init__(self, x: Tensor, codes: Tensor, temperature: float, metric: str) -> None:
        self.x, self.codes, self.temperature, self.metric = x, codes, temperature, metric
        self._kind: Any = _OfDistances if metric == "euclidean" else _OfProducts
        entries = _ENTRIES_AT_ONCE.get(x.device.type, _ENTRIES_AT_ONCE_ELSEWHERE)
        self._together = max(1, entries // max(1, codes.shape[1:].numel()))
        self._last: tuple[slice, Any] | None = None

    def tiles(self) -> Iterator[_Tile]:
        """Of logits."""
        return (self._of(at[0]).tile(at) for at in self._places())

    def softened(self, kept: _Kept | None = None) -> Iterator[_Tile]:
        """Of probabilities; what the backward needs of them is kept."""
        for at, room in self._rooms(kept):
            tile = self._of(at[0]).soften(at, room)
            if kept is not None:
                kept.near.append(tile.distances and tile.distances.near)
                kept.all_near.append(tile.distances is not None and tile.distances.all_near)
            yield tile

    def again(self, kept: _Kept | None) -> Iterator[_Tile]:
        """Of probabilities, of what was kept, if anything was."""
        if kept is None:
            return self.softened()
        return (self._of(at[0]).again(at, room, *own) for (at, room), *own in zip(self._rooms(kept), kept.near, kept.all_near, strict=True))

    def _places(self) -> Iterator[At]:
        budget = _SCORES_PER_TILE["cpu"] * torch.get_num_threads() if self.x.is_cpu else _SCORES_PER_TILE_ELSEWHERE
        for first in range(0, len(self.x), self._together):
            part = slice(first, min(first + self._together, len(self.x)))
            num = max(_FEWEST_ROWS_PER_TILE, budget // max(1, (part.stop - first) * self.codes.shape[1]))
            for start in range(0, self.x.shape[1], num):
                yield part, slice(start, min(start + num, self.x.shape[1]))

    def _rooms(self, kept: _Kept | None) -> Iterator[tuple[At, Tensor | None]]:
        """[G', R, C] for each place, if anything is kept."""
        first = 0
        for at in self._places():
            if kept is None:
                yield at, None
                continue
            shape = (*(along.stop - along.start for along in at), self.codes.shape[1])
            room = kept.room[first : first + math.prod(shape)].view(shape)
            first += room.numel()
            yield at, room

    def _of(self, part: slice) -> Any:
        """What knows the scores of some codebooks."""
        if self._last is None or self._last[0] != part:
            self._last = part, self._kind(self.x[part], self.codes[part], self.temperature)
        return self._last[1]

    def add_gradients_(self, of_logits: Tensor, weight: Tensor, tile: _Tile, of_x: Tensor | None, of_codes: Tensor | None) -> None:
        """Add to those of x and codes, where given, what weight [G', R, 1] times `of_logits` makes of a tile; the latter is overwritten."""
        part = tile.at[0]
        own = (None if gradient is None else gradient[part] for gradient in (of_x, of_codes))
        self._of(part).add_gradients_(of_logits, weight, tile, *own)

    def gradients(
        self, of_logits: Callable[[At, Tensor], tuple[Tensor, Tensor]], needed: Sequence[bool], kept: _Kept | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gradients of x and of codes, [0] where not needed.

        Those of the logits are the product of what `of_logits(at, probabilities)` gives, [G', R, C] and [G', R, 1]; it overwrites nothing.
        """
        if torch.is_grad_enabled():  # the gradients themselves are to be differentiated
            return self._dense_gradients(of_logits, needed)
        of_x, of_codes = (_zeros(own, asked) for own, asked in zip((self.x, self.codes), needed, strict=True))
        asked = (of_x if needed[0] else None, of_codes if needed[1] else None)
        for tile in self.again(kept) if any(needed) else ():
            self.add_gradients_(*of_logits(tile.at, tile.values), tile, *asked)
        return of_x, of_codes

    def _dense_gradients(self, of_logits: Callable[[At, Tensor], tuple[Tensor, Tensor]], needed: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """As `gradients`, of all scores at once, differentiable."""
        logits = _dense_logits(self.x, self.codes, self.temperature, self.metric)
        of_all, weight = of_logits((slice(None), slice(None)), logits.softmax(-1))
        asked = [own for own, asked in zip((self.x, self.codes), needed, strict=True) if asked]
        found = iter(torch.autograd.grad(logits, asked, of_all * weight, create_graph=True) if asked else ())
        return next(found) if needed[0] else _zeros(self.x, False), next(found) if needed[1] else _zeros(self.codes, False)


def _zeros(like: Tensor, asked: bool) -> Tensor:
    return like.new_zeros(like.shape if asked else 0)


def _draw(x: Tensor, codes: Tensor, noise: Tensor, temperature: float, metric: str) -> Tensor:
    """noise [G, N, num] -> [G, N, num]: the first code at which the cumulated probabilities exceed it, those drawn before left out."""
    indices = torch.empty(noise.shape, dtype=torch.int64, device=x.device)
    with full_precision(x.device.type):
        for tile in _Scores(x, codes, temperature, metric).tiles():
            indices[tile.at] = draw_by_logits(noise[tile.at], tile.values)
    return indices


def draw_by_logits(noise: Tensor, logits: Tensor) -> Tensor:
    """noise [..., num] in [0, 1], logits [..., C], of the caller no more -> [..., num]: as `sample_indices` draws."""
    if noise.shape[-1] == 1:
        return _first_above(noise, logits.softmax(-1).cumsum(-1))
    found: list[Tensor] = []
    for own in noise.split(1, dim=-1):
        if found:
            logits.scatter_(-1, found[-1], -torch.inf)
        found.append(_first_above(own, logits.softmax(-1).cumsum(-1)))
    return torch.cat(found, dim=-1)


def _first_above(noise: Tensor, cumulated: Tensor) -> Tensor:
    """noise [..., 1] in [0, 1], cumulated [..., C] -> [..., 1]; never one of probability 0."""
    total = cumulated[..., -1:]
    below = total * (1.0 - 2.0 * torch.finfo(total.dtype).eps)  # less than the total, however a product with noise is rounded
    place = torch.searchsorted(cumulated, noise * below, right=True)
    return place.clamp_(max=cumulated.shape[-1] - 1)  # of what is no number


def _look_up(x: Tensor, codes: Tensor, values: Tensor, indices: Tensor, temperature: float, metric: str, reinmax: bool) -> Tensor:
    """[G, N, K]: rows of `values`, whose gradient is that of a softmax."""
    return gather_codes(values, indices)


def _look_up_backward(
    gradient: Tensor,
    x: Tensor,
    codes: Tensor,
    values: Tensor,
    indices: Tensor,
    temperature: float,
    metric: str,
    reinmax: bool,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, codes and values, [0] where not needed."""
    chosen = indices.clamp(min=0).unsqueeze(-1)
    one, half = x.new_ones(()).expand(chosen.shape), x.new_full((), 0.5).expand(chosen.shape)
    with full_precision(x.device.type):
        gradient = gradient.where(indices.unsqueeze(-1) >= 0, 0.0)
        centred = (values - values.mean(1, keepdim=True)).mT  # what all codes have in common a softmax does not pass on

        def of_logits(at: At, probability: Tensor) -> tuple[Tensor, Tensor]:
            of_weights = gradient[at] @ centred[at[0]]
            if not reinmax:
                return through_softmax(probability, of_weights), one[at]
            halfway = (probability / 2).scatter_add_(-1, chosen[at], half[at])
            return 2 * through_softmax(halfway, of_weights) - through_softmax(probability, of_weights) / 2, one[at]

        of_x, of_codes = _Scores(x, codes, temperature, metric).gradients(of_logits, needed[:2])
        of_values = _zeros(values, needed[2])
        if needed[2]:
            of_values.scatter_add_(1, chosen.expand_as(gradient), gradient)
    return of_x, of_codes, of_values


def _cross_entropy(x: Tensor, codes: Tensor, target: Tensor, temperature: float, metric: str) -> Tensor:
    """[G, N]; 0 for target -1."""
    loss = x.new_empty(x.shape[:-1])
    with full_precision(x.device.type):
        for at, logits, _ in _Scores(x, codes, temperature, metric).tiles():
            found = F.cross_entropy(logits.flatten(0, 1), target[at].flatten(), ignore_index=-1, reduction="none")
            loss[at] = found.view(logits.shape[:-1])
    return loss


def _cross_entropy_and_gradients(
    x: Tensor,
    codes: Tensor,
    target: Tensor,
    temperature: float,
    metric: str,
    share: Tensor,
    of_x: Tensor | None,
    of_codes: Tensor | None,
) -> Tensor:
    """As `_cross_entropy`; adds to `of_x` and `of_codes`, where given, the gradients of the sum of share [G, N] times that."""
    loss = x.new_empty(x.shape[:-1])
    chosen = target.clamp(min=0).unsqueeze(-1)
    minus_one = x.new_full((), -1.0).expand(chosen.shape)
    with full_precision(x.device.type):
        scores = _Scores(x, codes, temperature, metric)
        for tile in scores.tiles():
            at, logits, _ = tile
            probability = logits.softmax(-1)
            log_sum = logits.amax(-1) - probability.amax(-1).log_()  # of the exponentials, without another pass of them
            loss[at] = log_sum - logits.gather(-1, chosen[at]).squeeze(-1)
            of_logits = probability.scatter_add_(-1, chosen[at], minus_one[at])
            scores.add_gradients_(of_logits, share[at].unsqueeze(-1), tile, of_x, of_codes)
    return loss.masked_fill_(target < 0, 0.0)


def _cross_entropy_backward(
    gradient: Tensor, x: Tensor, codes: Tensor, target: Tensor, temperature: float, metric: str, needed: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    weight = gradient.where(target >= 0, 0.0).unsqueeze(-1)
    chosen = target.clamp(min=0).unsqueeze(-1)
    minus_one = x.new_full((), -1.0).expand(chosen.shape)

    def of_logits(at: At, probability: Tensor) -> tuple[Tensor, Tensor]:
        return probability.scatter_add(-1, chosen[at], minus_one[at]), weight[at]

    with full_precision(x.device.type):
        return _Scores(x, codes, temperature, metric).gradients(of_logits, needed)


def _mean_softmax(x: Tensor, codes: Tensor, share: Tensor, temperature: float, metric: str) -> Tensor:
    """[G, C]: the sum over vectors of share [G, N] times softmax."""
    return _sum_softmax(x, codes, share, temperature, metric, None)


def _sum_softmax(x: Tensor, codes: Tensor, share: Tensor, temperature: float, metric: str, kept: _Kept | None) -> Tensor:
    """As `_mean_softmax`; what backward needs of the tiles may be kept."""
    mean = codes.new_zeros(codes.shape[:-1])
    with full_precision(x.device.type):
        for at, probability, _ in _Scores(x, codes, temperature, metric).softened(kept):
            mean[at[0]] += (share[at].unsqueeze(-2) @ probability).squeeze(-2)
    return mean


def _mean_softmax_backward(
    gradient: Tensor, x: Tensor, codes: Tensor, share: Tensor, temperature: float, metric: str, needed: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    return _back_through_mean(gradient, x, codes, share, temperature, metric, needed, None)


def _back_through_mean(
    gradient: Tensor,
    x: Tensor,
    codes: Tensor,
    share: Tensor,
    temperature: float,
    metric: str,
    needed: Sequence[bool],
    kept: _Kept | None,
) -> tuple[Tensor, Tensor]:
    """As `_mean_softmax_backward`, from what `_sum_softmax` kept, if anything."""

    def of_logits(at: At, probability: Tensor) -> tuple[Tensor, Tensor]:
        of_mean = gradient[at[0]].unsqueeze(1)
        return (of_mean - probability @ of_mean.mT).mul_(probability), share[at].unsqueeze(-1)

    with full_precision(x.device.type):
        return _Scores(x, codes, temperature, metric).gradients(of_logits, needed, kept)


def through_softmax(probability: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of the logits, given that of the probabilities."""
    return probability * (gradient - (probability * gradient).sum(-1, keepdim=True))


# In plain operations, of all scores at once: for transforms.


def _dense_logits(x: Tensor, codes: Tensor, temperature: float, metric: str) -> Tensor:
    return dense_distances(x, codes) / -temperature if metric == "euclidean" else x @ codes.mT / temperature


def _plain_look_up(x: Tensor, codes: Tensor, values: Tensor, indices: Tensor, temperature: float, metric: str, reinmax: bool) -> Tensor:
    logits, kept = _dense_logits(x, codes, temperature, metric), (indices >= 0).unsqueeze(-1)
    weights = logits.softmax(-1)
    if reinmax:
        one_hot = F.one_hot(indices.clamp(min=0), codes.shape[1]).to(weights.dtype)
        halfway = ((one_hot + weights.detach()) / 2).log() + logits - logits.detach()
        weights = 2 * halfway.softmax(-1) - weights / 2
    return (gather_codes(values, indices) + (weights - weights.detach()) @ values.detach()).where(kept, 0.0)


def _plain_cross_entropy(x: Tensor, codes: Tensor, target: Tensor, temperature: float, metric: str) -> Tensor:
    logs = _dense_logits(x, codes, temperature, metric).log_softmax(-1)
    return -logs.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1).where(target >= 0, 0.0)


def _plain_mean_softmax(x: Tensor, codes: Tensor, share: Tensor, temperature: float, metric: str) -> Tensor:
    return (share.unsqueeze(-2) @ _dense_logits(x, codes, temperature, metric).softmax(-1)).squeeze(-2)


# As seen by autograd: functions, and inside of graphs opaque operators.


def _lasting(codes: Tensor, x: Tensor) -> Tensor:
    """Codes as they are now: a copy of what an update may overwrite.

    That is no result of an operation and nothing made for single vectors, for which autograd itself refuses to go back after an update.
    """
    owner = codes._base if codes._is_view() else codes
    return codes if x.shape[1] == 1 or (owner is not None and not owner.is_leaf) else codes.clone()


def _last(inputs: Sequence[Any], num: int) -> Sequence[Any]:
    """The inputs of a pass, of which the first `num` are vectors and codebooks, with codebooks as they are now."""
    x, *codebooks = inputs[:num]
    return x, *(_lasting(codes, x) for codes in codebooks), *inputs[num:]


def _keep(ctx: Any, inputs: Sequence[Any], *more: Tensor | None) -> None:
    num = sum(isinstance(given, Tensor) for given in inputs)  # which come first
    ctx.settings = inputs[num:]
    ctx.save_for_backward(*inputs[:num], *more)


class _Pass(NamedTuple):
    """What autograd needs of a pass; the gradients are of its first tensors, vectors and codebooks."""

    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, ...]]
    num_gradients: int
    plain: Callable[..., Tensor]


class _Function(torch.autograd.Function):
    """A pass where nothing is traced, without the cost of an operator."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *given, ctx.passing = inputs
        _keep(ctx, given)
        return ctx.passing.forward(*given)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        return _gradients(ctx, gradients[0], ctx.passing.backward, ctx.passing.num_gradients)


def _gradients(ctx: Any, gradient: Tensor, backward: Callable[..., tuple[Tensor, ...]], num: int) -> tuple[Tensor | None, ...]:
    """Of all inputs."""
    needed = ctx.needs_input_grad[:num]
    found = backward(gradient.contiguous(), *ctx.saved_tensors, *ctx.settings, needed)
    own = [tensor if asked else None for tensor, asked in zip(found, needed, strict=True)]
    return *own, *(None for _ in ctx.needs_input_grad[num:])


_LOOK_UP = _Pass(_look_up, _look_up_backward, 3, _plain_look_up)
_CROSS_ENTROPY = _Pass(_cross_entropy, _cross_entropy_backward, 2, _plain_cross_entropy)
_MEAN_SOFTMAX = _Pass(_mean_softmax, _mean_softmax_backward, 2, _plain_mean_softmax)


class _MeanSoftmax(torch.autograd.Function):
    """As `_MEAN_SOFTMAX`; backward has no softmax to compute where forward kept it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, share: Tensor, temperature: float, metric: str) -> Tensor:
        num = x.shape[:-1].numel() * codes.shape[1]
        kept = _Kept(x.new_empty(num), [], []) if num <= _KEPT_SCORES and any(ctx.needs_input_grad) else None
        mean = _sum_softmax(x, codes, share, temperature, metric, kept)
        ctx.are_near = kept and [(near is not None, all_near) for near, all_near in zip(kept.near, kept.all_near, strict=True)]
        more = () if kept is None else (kept.room, *(pairs for near in kept.near for pairs in near or ()))
        _keep(ctx, (x, codes, share, temperature, metric), *more)
        return mean

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        x, codes, share, *more = ctx.saved_tensors
        (temperature, metric), needed, kept = ctx.settings, ctx.needs_input_grad[:2], None
        if ctx.are_near is not None:
            room, *rest = more
            pairs = iter(rest)
            near = [Near(*itertools.islice(pairs, 3)) if some else None for some, _ in ctx.are_near]
            kept = _Kept(room, near, [all_near for _, all_near in ctx.are_near])
        found = _back_through_mean(gradients[0], x, codes, share, temperature, metric, needed, kept)
        return *(own if asked else None for own, asked in zip(found, needed, strict=True)), None, None, None


class _MeanCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, target: Tensor, temperature: float, metric: str) -> Tensor:
        needed = ctx.needs_input_grad[:2]
        gradients = [own.new_zeros(own.shape) if asked else None for own, asked in zip((x, codes), needed, strict=True)]
        counted = target >= 0
        num = counted.sum().clamp_(min=1)
        if any(needed):
            loss = _cross_entropy_and_gradients(x, codes, target, temperature, metric, counted.to(x.dtype) / num, *gradients)
        else:
            loss = _cross_entropy(x, codes, target, temperature, metric)
        _keep(ctx, (x, codes, target, temperature, metric), *gradients)
        return loss.sum() / num

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        x, codes, target, *known = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient itself is to be differentiated
            each = gradients[0] / (target >= 0).sum().clamp(min=1)
            (temperature, metric), needed = ctx.settings, ctx.needs_input_grad[:2]
            made = _cross_entropy_backward(each.expand(target.shape), x, codes, target, temperature, metric, needed)
            return *(own if asked else None for own, asked in zip(made, needed, strict=True)), None, None, None
        return *(None if own is None else own * gradients[0] for own in known), None, None, None


def _run(passing: _Pass, opaque: Callable[..., Tensor], *inputs: Any) -> Tensor:
    if is_traced():
        return passing.plain(*inputs) if is_transformed() else opaque(*inputs)
    return _Function.apply(*_last(inputs, passing.num_gradients), passing)


def _opaque(name: str, form: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """A form as one node of a graph; `fake` makes its results for tensors without values."""
    operator = torch.library.custom_op(f"vqkit::{name}", form, mutates_args=())
    operator.register_fake(fake)
    return operator


def _differentiable(name: str, passing: _Pass, fake: Callable[..., Tensor]) -> Any:
    def fake_gradients(gradient: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        return tuple(_zeros(like, asked) for like, asked in zip(inputs[: passing.num_gradients], inputs[-1], strict=True))

    forward = _opaque(name, passing.forward, fake)
    backward = _opaque(f"{name}_backward", passing.backward, fake_gradients)
    gradients = functools.partial(_gradients, backward=backward, num=passing.num_gradients)

    def keep(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
        _keep(ctx, _last(inputs, passing.num_gradients))

    forward.register_autograd(gradients, setup_context=keep)
    return forward


_draw_opaque = _opaque("draw_codes", _draw, lambda x, codes, noise, *_: noise.new_empty(noise.shape, dtype=torch.int64))
_look_up_opaque = _differentiable(
    "soft_codes", _LOOK_UP, lambda x, codes, values, indices, *_: values.new_empty(*indices.shape, values.shape[-1])
)
_cross_entropy_opaque = _differentiable("assignment_cross_entropy", _CROSS_ENTROPY, lambda x, *_: x.new_empty(x.shape[:-1]))
_mean_softmax_opaque = _differentiable("mean_softmax", _MEAN_SOFTMAX, lambda x, codes, *_: codes.new_empty(codes.shape[:-1]))
