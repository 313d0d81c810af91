"""Codebooks as functions of statistics: which vectors chose which code, and what the moving averages make of it.

Shapes: N vectors, H heads with a codebook each, C codes, K width, E candidate rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

COUNT_FLOOR = 0.01
"""The count at which the official Transformer-VQ clips, so that a code that nobody uses stays where it is."""


class CodebookStatistics(NamedTuple):
    """What a codebook's update needs of the vectors that were assigned to it; float32, or float64 for float64 vectors.

    `candidates` are a uniform sample without replacement of the vectors of each head, for the expiry of dead codes: the rows with the
    E largest of independent uniform `keys` in (0, 1]; rows of key 0 are absent. So statistics of parts merge into those of the whole.
    """

    count: Tensor  # [H, C] vectors per code
    sum: Tensor  # [H, C, K] their sum
    candidates: Tensor  # [H, E, K]
    keys: Tensor  # [H, E]


def gather_codes(codebook: Tensor, indices: Tensor) -> Tensor:
    """codebook [..., C, K], indices [..., N] int64 -> [..., N, K]; index -1 gives zeros.

    Leading axes broadcast. Differentiable in the codebook. Indices must lie in -1 ... C - 1.
    """
    size, width = codebook.shape[-2:]
    leading = codebook.shape[:-2]
    rows = F.pad(codebook, (0, 0, 0, 1)).reshape(-1, width)  # a row of zeros behind each codebook
    row = torch.where(indices < 0, size, indices)
    if leading.numel() > 1:
        first = torch.arange(leading.numel(), device=indices.device).reshape(*leading, 1) * (size + 1)
        row = row + first
    return rows.index_select(0, row.reshape(-1)).reshape(*row.shape, width)


def codes_from_ema(sum: Tensor, count: Tensor, floor: float = COUNT_FLOOR) -> Tensor:
    """Codebook [..., C, K] of the moving averages: sum / max(count, floor) (Lingle, 2024)."""
    return sum / count.clamp(min=floor).unsqueeze(-1)


def assignment_stats(
    x: Tensor, indices: Tensor, codebook_size: int, mask: Tensor | None = None, *, num_candidates: int = 0
) -> CodebookStatistics:
    """Count and sum of the vectors of each code, by scatter-add.

    x [..., H, N, K], indices [..., H, N] int64, mask [..., N] bool. Masked vectors and those of index -1 enter nothing, whatever they
    hold. With `num_candidates`, that many rows a head are drawn by the global random generator. No gradient.
    """
    if indices.shape != x.shape[:-1]:
        raise ValueError(f"indices has shape {tuple(indices.shape)}: must be {tuple(x.shape[:-1])}, that of x without its last axis")
    if mask is not None and mask.shape != (*x.shape[:-3], x.shape[-2]):
        raise ValueError(f"mask has shape {tuple(mask.shape)}: must be {(*x.shape[:-3], x.shape[-2])}, that of x without heads and width")
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    heads, _, width = x.shape[-3:]
    dropped = indices < 0
    if mask is not None:
        dropped = dropped | ~mask.unsqueeze(-2)
    head = torch.arange(heads, device=x.device).unsqueeze(-1)
    row = torch.where(dropped, heads * codebook_size, indices + head * codebook_size).reshape(-1)  # one row more, for the dropped
    rows = x.reshape(-1, width)
    total = x.new_zeros(heads * codebook_size + 1, width).index_add_(0, row, rows)[:-1]
    count = x.new_zeros(heads * codebook_size + 1).index_add_(0, row, x.new_ones(1).expand(row.shape))[:-1]
    return CodebookStatistics(
        count.reshape(heads, codebook_size), total.reshape(heads, codebook_size, width), *_draw_candidates(x, dropped, num_candidates)
    )


def _draw_candidates(x: Tensor, dropped: Tensor, num: int) -> tuple[Tensor, Tensor]:
    heads, _, width = x.shape[-3:]
    if num == 0:
        return x.new_zeros(heads, 0, width), x.new_zeros(heads, 0)
    vectors = x.movedim(-3, 0).reshape(heads, -1, width)
    draws = 1.0 - torch.rand(vectors.shape[:2], dtype=x.dtype, device=x.device)  # (0, 1]: 0 says absent
    keys = draws.masked_fill(dropped.movedim(-2, 0).reshape(heads, -1), 0.0)
    return largest_keys(vectors, keys, num)


def largest_keys(vectors: Tensor, keys: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Of vectors [H, N, K] with keys [H, N] >= 0 the `num` of the largest keys, largest first: rows [H, num, K], keys [H, num].

    A key of 0 says that there is no vector; such rows are zero, and fill up where N < num.
    """
    keys = F.pad(keys, (0, num))
    vectors = F.pad(vectors, (0, 0, 0, num))
    keys, chosen = keys.topk(num, dim=-1)
    rows = vectors.gather(1, chosen.unsqueeze(-1).expand(-1, -1, vectors.shape[-1]))
    return rows.where(keys.unsqueeze(-1) > 0, 0.0), keys


def merge_statistics(first: CodebookStatistics, second: CodebookStatistics) -> CodebookStatistics:
    """Statistics of the vectors of both; as many candidates as `first` holds."""
    candidates, keys = first.candidates, first.keys
    if num := keys.shape[-1]:
        candidates, keys = largest_keys(torch.cat([candidates, second.candidates], dim=1), torch.cat([keys, second.keys], dim=1), num)
    return CodebookStatistics(first.count + second.count, first.sum + second.sum, candidates, keys)


def ema_update(sum: Tensor, count: Tensor, statistics: CodebookStatistics, decay: float) -> tuple[Tensor, Tensor]:
    """New (sum, count): decay * old + (1 - decay) * statistics, in the dtype of the old.

    Equal to one step of SGD with rate 1 on the codebook loss of the official Transformer-VQ, whose gradient is
    (1 - decay) * (old - statistics).
    """
    return (
        torch.lerp(statistics.sum.to(sum.dtype), sum, decay),
        torch.lerp(statistics.count.to(count.dtype), count, decay),
    )


def replace_dead_codes(
    sum: Tensor, count: Tensor, candidates: Tensor, keys: Tensor, threshold: float, reset_count: float
) -> tuple[Tensor, Tensor]:
    """New (sum, count) in which codes of count below `threshold` start anew at candidate vectors, with weight `reset_count`.

    sum [H, C, K], count [H, C], candidates [H, E, K], keys [H, E]. The r-th dead code of a head, by index, takes the head's r-th
    candidate; where there is none, or its key is 0, the code stays as it is. No synchronisation with the host.
    """
    num = keys.shape[-1]
    if num == 0:
        return sum, count
    dead = count < threshold
    rank = dead.cumsum(-1) - 1
    slot = rank.clamp(0, num - 1)
    replaced = dead & (rank < num) & (keys.gather(1, slot) > 0)
    rows = candidates.gather(1, slot.unsqueeze(-1).expand_as(sum)).to(sum.dtype)
    return torch.where(replaced.unsqueeze(-1), rows * reset_count, sum), torch.where(replaced, reset_count, count)
