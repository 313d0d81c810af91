"""Codebooks as functions of statistics: which vectors chose which code, and what the moving averages make of it.

Shapes: N vectors, H heads with a codebook each, C codes, K width, E candidate rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vqkit.ops.precision import may_look

COUNT_FLOOR = 0.01
"""The count at which the official Transformer-VQ clips, so that a code that nobody uses stays where it is."""


class CodebookStatistics(NamedTuple):
    """What a codebook's update and its metrics need of the vectors that were assigned to it; float32, or float64 for float64 vectors.

    `candidates` are a uniform sample without replacement of the vectors of each head, for the expiry of dead codes: the rows with the
    E largest of independent uniform `keys` in (0, 1]; rows of key 0 are absent. So statistics of parts merge into those of the whole.
    `moments` are taken around the mean of the vectors, so that they are exact far from the origin; parts merge by `pool_moments`
    (Chan et al., 1983). All other fields are sums.
    """

    count: Tensor  # [H, C] vectors per code, or the sum of their weights
    sum: Tensor  # [H, C, K] their sum, each times its weight
    candidates: Tensor  # [H, E, K]
    keys: Tensor  # [H, E]
    vectors: Tensor  # [H] vectors that got a code, whatever their weight
    squared_error: Tensor  # [H] sum of their squared distances to their codes; 0 where the codes were not given
    non_finite: Tensor  # [H] vectors that count and got no code
    moments: Tensor  # [H, 2, K] sum of the vectors that got a code, of their squared differences from its mean; [H, 2, 0]: not asked for


SUMMED = tuple(name for name in CodebookStatistics._fields if name not in ("candidates", "keys", "moments"))
"""The fields that are sums over the vectors."""


def zero_statistics(
    heads: int,
    codebook_size: int,
    dim: int,
    *,
    num_candidates: int = 0,
    moments: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> CodebookStatistics:
    """The statistics of no vector, and the shapes of all others."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(heads, *shape, dtype=dtype, device=device)

    return CodebookStatistics(
        count=zeros(codebook_size),
        sum=zeros(codebook_size, dim),
        candidates=zeros(num_candidates, dim),
        keys=zeros(num_candidates),
        vectors=zeros(),
        squared_error=zeros(),
        non_finite=zeros(),
        moments=zeros(2, dim if moments else 0),
    )


def gather_codes(codebook: Tensor, indices: Tensor, *, all_known: bool = False) -> Tensor:
    """codebook [..., C, K], indices [..., N] int64 -> [..., N, K]; index -1 gives zeros (`all_known`: there is none).

    Leading axes broadcast. Differentiable in the codebook. Indices must lie in -1 ... C - 1.
    """
    size, width = codebook.shape[-2:]
    leading = codebook.shape[:-2]
    all_known = all_known or are_chosen(indices)
    row = indices if all_known else indices.clamp(min=0)
    if leading.numel() > 1:
        row = row + torch.arange(0, leading.numel() * size, size, device=indices.device).reshape(*leading, 1)
    found = codebook.reshape(-1, width).index_select(0, row.reshape(-1)).reshape(*row.shape, width)
    return found if all_known else found.where((indices >= 0).unsqueeze(-1), 0.0)


def are_chosen(indices: Tensor) -> bool:
    """Whether it is known, where asking costs nothing, that none of indices is -1."""
    return may_look(indices) and (indices.numel() == 0 or indices.min().item() >= 0)


def by_codebook(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """x [..., N, K] and codebook [..., C, K], whose leading axes broadcast, with one leading axis: G different codebooks.

    Returns vectors [G, N', K], codes [G, C, K], and what turns a result [G, N', ...] into [leading axes of both, N, ...].
    """
    if x.dim() == codebook.dim() == 3 and len(x) == len(codebook):
        return x, codebook, Tensor.contiguous
    leading = torch.broadcast_shapes(x.shape[:-2], codebook.shape[:-2])
    own = (1,) * (len(leading) - codebook.dim() + 2) + tuple(codebook.shape[:-2])
    # Axes along which the codebook differs go to the front, all others are one more axis of vectors.
    groups = [axis for axis, length in enumerate(own) if length > 1]
    shared = [axis for axis, length in enumerate(own) if length == 1]
    order = [*groups, *shared, len(leading)]
    vectors = x.expand(*leading, *x.shape[-2:]).permute(*order, len(leading) + 1)
    rows = vectors.shape[:-1]
    inverse = sorted(range(len(order)), key=order.__getitem__)
    num_groups = codebook.shape[:-2].numel()

    def restore(result: Tensor) -> Tensor:
        tail = range(len(order), len(order) + result.dim() - 2)
        return result.view(*rows, *result.shape[2:]).permute(*inverse, *tail).contiguous()

    vectors = vectors.reshape(num_groups, rows.numel() // num_groups, x.shape[-1])
    return vectors, codebook.reshape(num_groups, *codebook.shape[-2:]), restore


_ORDINARY = {dtype: torch.finfo(dtype).tiny ** 0.25 for dtype in (torch.float32, torch.float64)}
"""Lengths from here to its inverse have squares that neither overflow nor underflow."""


def directions(x: Tensor) -> Tensor:
    """x [..., K] scaled to length 1, whatever its length, without overflow or underflow; zero stays zero. Differentiable, also at zero."""
    return polar(x)[0]


def polar(x: Tensor) -> tuple[Tensor, Tensor]:
    """`directions(x)` [..., K] and the lengths [..., 1]."""
    if x.dtype in _ORDINARY and may_look(x):
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        if not length.numel() or _are_ordinary(length):
            return x / length, length
        small = length.detach() <= _ORDINARY[x.dtype]
        divisor = length.masked_fill(small, 1.0)
        if not x.detach().where(small, 0.0).any() and are_ordinary(divisor):  # some are zero
            return x / divisor, length
    scale = x.detach().abs().amax(-1, keepdim=True)
    scale = torch.where(scale == 0, 1.0, scale)
    scale = scale / (2.0 * torch.frexp(scale).mantissa)  # a power of two not above it, which rounds nothing and never overflows
    scaled = x / scale
    length = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return scaled / torch.where(length == 0, 1.0, length), length * scale


def known_directions(x: Tensor) -> Tensor | None:
    """`directions(x)`, if it is known that no vector is 0 and none so long or so short that its square overflows or underflows."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length if are_ordinary(length) else None


def are_ordinary(length: Tensor) -> bool:
    """Whether it is known, where asking costs nothing, that no length is 0 and no square of one overflows or underflows."""
    return length.dtype in _ORDINARY and length.numel() > 0 and may_look(length) and _are_ordinary(length)


def _are_ordinary(length: Tensor) -> bool:
    least, most = torch.aminmax(length.detach() if length.requires_grad else length)
    bound = _ORDINARY[length.dtype]
    return least.item() > bound and most.item() < 1.0 / bound


def codes_from_ema(sum: Tensor, count: Tensor, floor: float = COUNT_FLOOR) -> Tensor:
    """Codebook [..., C, K] of the moving averages: sum / max(count, floor) (Lingle, 2024)."""
    return sum / count.clamp(min=floor).unsqueeze(-1)


def laplace_codes_from_ema(sum: Tensor, count: Tensor, eps: float = 1e-5) -> Tensor:
    """Codebook [..., C, K] of the moving averages, the counts smoothed after Laplace (van den Oord et al., 2017, appendix A.1).

    A count n of the total T becomes (n + eps) / (T + C eps) * T, so that the total stays. Where nothing was ever counted the codes are
    sum / 1, as after a start with count 1.
    """
    total = count.sum(-1, keepdim=True)
    smoothed = (count + eps) / (total + count.shape[-1] * eps) * total
    return sum / torch.where(total > 0, smoothed, 1.0).unsqueeze(-1)


def assignment_stats(
    x: Tensor,
    indices: Tensor,
    codebook_size: int,
    mask: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    quantized: Tensor | None = None,
    num_candidates: int = 0,
    moments: bool = False,
) -> CodebookStatistics:
    """Count and sum of the vectors of each code, by scatter-add, and what else `CodebookStatistics` holds.

    x [..., H, N, K], indices [..., H, N] int64, mask [..., N] bool, weights [..., N] or [..., H, N] floating point, not negative.
    Masked vectors, those of weight 0 and those of index -1 enter nothing, whatever they hold; of the first two kinds the last counts as
    `non_finite`. Weights enter count and sum alone. `quantized`, of the shape of x, are the codes for `squared_error`. With
    `num_candidates`, that many rows a head are drawn by the global random generator. No gradient.
    """
    _check_assignment(x, indices, mask, weights, quantized)
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    heads, _, width = x.shape[-3:]
    if weights is not None:
        weights = (weights if weights.dim() == indices.dim() else weights.unsqueeze(-2)).detach().to(x.dtype).expand_as(indices)
    lost = indices < 0
    ignored = _ignored(indices, mask, weights)
    dropped = lost if ignored is None else lost | ignored
    vectors = _per_head(~dropped).to(x.dtype)
    head = torch.arange(heads, device=x.device).unsqueeze(-1)
    row = torch.where(dropped, heads * codebook_size, indices + head * codebook_size).reshape(-1)  # one row more, for the dropped
    rows = (x if weights is None else x * weights.unsqueeze(-1)).reshape(-1, width)
    share = x.new_ones(1).expand(row.shape) if weights is None else weights.reshape(-1)
    total = x.new_zeros(heads * codebook_size + 1, width).index_add_(0, row, rows)[:-1]
    count = x.new_zeros(heads * codebook_size + 1).index_add_(0, row, share)[:-1]
    return CodebookStatistics(
        count.reshape(heads, codebook_size),
        total.reshape(heads, codebook_size, width),
        *draw_candidates(x, dropped, num_candidates),
        vectors=vectors,
        squared_error=x.new_zeros(heads) if quantized is None else _squared_error(x, quantized, dropped),
        non_finite=_per_head(lost if ignored is None else lost & ~ignored).to(x.dtype),
        moments=moments_around_mean(x, dropped, vectors) if moments else x.new_zeros(heads, 2, 0),
    )


def _check_assignment(x: Tensor, indices: Tensor, mask: Tensor | None, weights: Tensor | None, quantized: Tensor | None) -> None:
    positions = (*x.shape[:-3], x.shape[-2])
    if indices.shape != x.shape[:-1]:
        raise ValueError(f"indices has shape {tuple(indices.shape)}: must be {tuple(x.shape[:-1])}, that of x without its last axis")
    if mask is not None and mask.shape != positions:
        raise ValueError(f"mask has shape {tuple(mask.shape)}: must be {positions}, that of x without heads and width")
    if weights is not None and weights.shape not in (positions, indices.shape):
        raise ValueError(f"weights has shape {tuple(weights.shape)}: must be {positions} or {tuple(indices.shape)}, one a vector")
    if quantized is not None and quantized.shape != x.shape:
        raise ValueError(f"quantized has shape {tuple(quantized.shape)}: must be {tuple(x.shape)}, that of x")


def _ignored(indices: Tensor, mask: Tensor | None, weights: Tensor | None) -> Tensor | None:
    """Whether a vector [..., H, N] is not to count, whatever it holds."""
    masked = None if mask is None else ~mask.unsqueeze(-2).expand_as(indices)
    weightless = None if weights is None else weights == 0
    if masked is None or weightless is None:
        return weightless if masked is None else masked
    return masked | weightless


def _per_head(values: Tensor) -> Tensor:
    """Sum of values [..., H, N] over all axes but heads: [H]."""
    return values.sum((*range(values.dim() - 2), -1))


def _squared_error(x: Tensor, quantized: Tensor, dropped: Tensor) -> Tensor:
    error = (x - quantized.detach().to(x.dtype)).square().sum(-1).masked_fill(dropped, 0.0)
    return _per_head(error)


def moments_around_mean(x: Tensor, dropped: Tensor, vectors: Tensor) -> Tensor:
    """`moments` of x [..., H, N, K] without what is dropped [..., H, N], of which so many vectors [H] are left, wherever they are."""
    axes = (*range(x.dim() - 3), -2)
    kept = ~dropped.unsqueeze(-1)
    total = x.where(kept, 0.0).sum(axes)
    mean = total / vectors.clamp(min=1).unsqueeze(-1)
    squares = (x - mean.unsqueeze(-2)).where(kept, 0.0).square().sum(axes)
    return torch.stack([total, squares], dim=-2)


def pool_moments(vectors: Tensor, moments: Tensor) -> Tensor:
    """The moments [H, 2, K] of all vectors of some parts, from vectors [P, H] and moments [P, H, 2, K] of each."""
    number = vectors.unsqueeze(-1)
    total, squares = moments.unbind(-2)
    mean = total.sum(0) / number.sum(0).clamp(min=1)
    between = number * (total / number.clamp(min=1) - mean).square()
    return torch.stack([total.sum(0), (squares + between).sum(0)], dim=-2)


def draw_candidates(x: Tensor, dropped: Tensor | None, num: int) -> tuple[Tensor, Tensor]:
    """`candidates` and `keys` of x [..., H, N, K], drawn by the global random generator; rows `dropped` [..., H, N], if any, are not."""
    heads, _, width = x.shape[-3:]
    if num == 0:
        return x.new_zeros(heads, 0, width), x.new_zeros(heads, 0)
    if x.dim() > 3:
        x = x.movedim(-3, 0).reshape(heads, -1, width)
        dropped = None if dropped is None else dropped.movedim(-2, 0).reshape(heads, -1)
    draws = torch.rand(x.shape[:2], dtype=x.dtype, device=x.device)
    if dropped is None and x.shape[1] >= num:
        draws, chosen = draws.topk(num, dim=-1, largest=False)
        return x.gather(1, chosen.unsqueeze(-1).expand(-1, -1, width)), 1.0 - draws
    draws = draws.neg_().add_(1.0)  # (0, 1]: 0 says absent
    return largest_keys(x, draws if dropped is None else draws.masked_fill_(dropped, 0.0), num)


def largest_keys(vectors: Tensor, keys: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Of vectors [H, N, K] with keys [H, N] >= 0 the `num` of the largest keys, largest first: rows [H, num, K], keys [H, num].

    A key of 0 says that there is no vector; such rows are zero, and fill up where N < num.
    """
    there = vectors.shape[1]
    if there < num:
        vectors, keys = F.pad(vectors, (0, 0, 0, num - there)), F.pad(keys, (0, num - there))
    keys, chosen = keys.topk(num, dim=-1)
    rows = vectors.gather(1, chosen.unsqueeze(-1).expand(-1, -1, vectors.shape[2]))
    return rows.where(keys.unsqueeze(-1) > 0, 0.0), keys


def merge_statistics(first: CodebookStatistics, *others: CodebookStatistics) -> CodebookStatistics:
    """Statistics of the vectors of all of them; as many candidates as `first` holds."""
    parts = (first, *others)
    candidates, keys = first.candidates, first.keys
    if (num := keys.shape[-1]) and others:
        rows = torch.cat([part.candidates for part in parts], dim=1)
        candidates, keys = largest_keys(rows, torch.cat([part.keys for part in parts], dim=1), num)
    if len(parts) == 2:
        summed = {name: getattr(first, name) + getattr(others[0], name) for name in SUMMED}
        moments = _moments_of_both(first, others[0], summed["vectors"])
    else:
        each = {name: torch.stack([getattr(part, name) for part in parts]) for name in (*SUMMED, "moments")}
        summed, moments = {name: each[name].sum(0) for name in SUMMED}, pool_moments(each["vectors"], each["moments"])
    return CodebookStatistics(**summed, candidates=candidates, keys=keys, moments=moments)


def _moments_of_both(first: CodebookStatistics, second: CodebookStatistics, vectors: Tensor) -> Tensor:
    """`pool_moments` of two parts, which have so many vectors [H] together."""
    moments = first.moments + second.moments
    if moments.shape[-1]:
        of_first, of_second = (own.moments[:, 0] / own.vectors.clamp(min=1).unsqueeze(-1) for own in (first, second))
        weight = first.vectors * second.vectors / vectors.clamp(min=1)
        moments[:, 1].addcmul_(weight.unsqueeze(-1), (of_first - of_second).square_())
    return moments


def ema_update(sum: Tensor, count: Tensor, statistics: CodebookStatistics, decay: float | Tensor) -> tuple[Tensor, Tensor]:
    """New (sum, count): decay * old + (1 - decay) * statistics, in the dtype of the old; `decay` may be one a code, [H, C].

    Equal to one step of SGD with rate 1 on the codebook loss of the official Transformer-VQ, whose gradient is
    (1 - decay) * (old - statistics).
    """
    each = decay.unsqueeze(-1) if isinstance(decay, Tensor) else decay
    return (
        torch.lerp(statistics.sum.to(sum.dtype), sum, each),
        torch.lerp(statistics.count.to(count.dtype), count, decay),
    )


def replace_dead_codes(
    sum: Tensor, count: Tensor, candidates: Tensor, keys: Tensor, threshold: float, reset_count: float
) -> tuple[Tensor, Tensor]:
    """New (sum, count) in which codes of count below `threshold` start anew at candidate vectors, with weight `reset_count`.

    sum [H, C, K], count [H, C], candidates [H, E, K], keys [H, E], those of key 0 last. Where a head has more dead codes than
    candidates, those of the lowest counts are served, of equal counts those of the lowest index; the others stay as they are. Of the codes
    that are served the r-th, by index, takes the head's r-th candidate. No synchronisation with the host.
    """
    if keys.shape[-1] == 0:
        return sum, count
    anew, rows = new_rows(count, candidates, keys, threshold)
    return torch.where(anew.unsqueeze(-1), rows.to(sum.dtype) * reset_count, sum), count.masked_fill(anew, reset_count)


def new_rows(count: Tensor, candidates: Tensor, keys: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """As `replace_dead_codes`, of at least one candidate: which codes start anew, [H, C] bool, and where [H, C, K]; of others any rows."""
    anew = count < threshold
    if not _are_enough(keys, anew):
        num = min(keys.shape[-1], count.shape[-1])
        code = count.masked_fill(~anew, torch.inf).sort(dim=-1, stable=True).indices[:, :num]
        first = torch.arange(num, device=count.device) < (keys[:, :num] > 0).sum(-1, keepdim=True)
        anew = torch.zeros_like(anew).scatter_(1, code, anew.gather(1, code) & first)
    place = anew.cumsum(-1).sub_(1).clamp_(min=0)
    return anew, candidates.gather(1, place.unsqueeze(-1).expand(-1, -1, candidates.shape[-1]))


def _are_enough(keys: Tensor, dead: Tensor) -> bool:
    """Whether it is known, where asking costs nothing, that every head has as many candidates as dead codes [H, C]."""
    if not may_look(keys):
        return False
    if keys.shape[-1] >= dead.shape[-1] and keys.amin().item() > 0:
        return True
    return (dead.sum(-1) <= (keys > 0).sum(-1)).all().item() is True
