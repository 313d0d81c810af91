"""How a codebook is used: measures of its health, from counts and from vectors.

Shapes: N vectors, H heads, C codes, K width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqkit.ops.codebook import COUNT_FLOOR, codes_from_ema

_NORM_FLOOR = 0.01
_LARGEST_RELATIVE_ERROR = 10.0
_USUAL_COUNT = (1.0, 1e6)
_NO_PAIR = 1e30


def perplexity(count: Tensor) -> Tensor:
    """exp(entropy) of the codes: count [..., C] -> [...]; C when all are used alike, 1 for a single one, 0 when nothing was counted."""
    count = count.to(torch.promote_types(count.dtype, torch.float32))
    total = count.sum(-1)
    share = count / total.clamp(min=torch.finfo(count.dtype).tiny).unsqueeze(-1)
    return torch.special.entr(share).sum(-1).exp().where(total > 0, 0.0)


def active_fraction(count: Tensor) -> Tensor:
    """Share of the codes that got at least 1 / (10 C) of the assignments: count [..., C] -> [...]; 0 when nothing was counted."""
    count = count.to(torch.promote_types(count.dtype, torch.float32))
    total = count.sum(-1, keepdim=True)
    active = (count * (10 * count.shape[-1]) >= total) & (total > 0)
    return active.to(count.dtype).mean(-1)


def dead_fraction(count: Tensor, threshold: float = 1.0) -> Tensor:
    """Share of the codes whose count is below `threshold`, as for the expiry of dead codes: count [..., C] -> [...]."""
    return (count < threshold).to(torch.promote_types(count.dtype, torch.float32)).mean(-1)


def relative_error(squared_error: Tensor, vectors: Tensor, moments: Tensor) -> Tensor:
    """Root of the share of the vectors' variance that quantization loses: 0 is lossless, 1 no better than one code at the mean.

    As `CodebookStatistics` has them: squared_error [...], vectors [...], moments [..., 2, K] -> [...]; 0 where nothing was counted.
    Where the vectors do not vary by more than the rounding of their mean, the error is taken relative to their length instead.
    """
    total, squares = moments.unbind(-2)
    variance = squares.sum(-1)
    length = variance + total.square().sum(-1) / vectors.clamp(min=1.0)
    trusted = variance > (16 * torch.finfo(moments.dtype).eps) ** 2 * length
    scale = torch.where(trusted, variance, length).clamp(min=torch.finfo(moments.dtype).tiny)
    return (squared_error / scale).sqrt()


@torch.no_grad()
def quantization_metrics(x: Tensor, quantized: Tensor, squared_distance: Tensor, sum: Tensor, count: Tensor) -> dict[str, Tensor]:
    """The metrics that the official Transformer-VQ logs, under its names; each a scalar, no gradient.

    x, quantized [..., N, K], squared_distance [..., N], the moving averages sum [H, C, K] and count [H, C]. `relative_err_*` are minimum,
    mean and maximum over N, then averaged over all leading axes; to get what the official code logs for a sequence of several blocks,
    which averages over blocks too, give it [blocks, batch, heads, block_len, K]. `c_*` describe the codebook: over its codes or pairs of
    codes, then averaged over heads. Count is clipped at 0.01 before anything else, lengths are at least 0.01, a relative error at most
    10; `c_thresh_oob` is the number of codes of a count below 1 or above 1e6, `c_entropy` that of the moving counts, in nats. With a
    single code the similarities and distances have no pairs: minimum 1e30, maximum -1e30, mean NaN.
    """
    codebook = codes_from_ema(sum, count)
    count = count.clamp(min=COUNT_FLOOR)
    length, quantized_length, code_length = _length(x), _length(quantized), _length(codebook)
    relative = (squared_distance.sqrt() / length).clamp(max=_LARGEST_RELATIVE_ERROR)
    direction = codebook / code_length.unsqueeze(-1)
    lowest, highest = _USUAL_COUNT
    return {
        **_spread("relative_err", relative),
        "vec_norm_mean": length.mean(),
        "vec_hat_norm_mean": quantized_length.mean(),
        **_spread("c_norm", code_length),
        **_spread("c_usage", count),
        "c_thresh_oob": ((count < lowest) | (count > highest)).to(count.dtype).sum(-1).mean(),
        "c_entropy": torch.special.entr(count / count.sum(-1, keepdim=True)).sum(-1).mean(),
        **_spread_of_pairs("c_sim", direction @ direction.mT),
        **_spread_of_pairs("c_dist", torch.cdist(codebook, codebook, compute_mode="donot_use_mm_for_euclid_dist")),
    }


def _length(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vectors, dim=-1).clamp(min=_NORM_FLOOR)


def _spread(name: str, values: Tensor) -> dict[str, Tensor]:
    """Minimum, mean and maximum over the last axis, averaged over the others."""
    return {f"{name}_min": values.amin(-1).mean(), f"{name}_mean": values.mean(), f"{name}_max": values.amax(-1).mean()}


def _spread_of_pairs(name: str, matrix: Tensor) -> dict[str, Tensor]:
    """The same over the pairs of different rows of [..., C, C]."""
    size = matrix.shape[-1]
    same = torch.eye(size, dtype=torch.bool, device=matrix.device)
    total = matrix.masked_fill(same, 0.0).sum((-2, -1))
    return {
        f"{name}_min": matrix.masked_fill(same, _NO_PAIR).amin((-2, -1)).mean(),
        f"{name}_mean": (total / (size * (size - 1))).mean(),
        f"{name}_max": matrix.masked_fill(same, -_NO_PAIR).amax((-2, -1)).mean(),
    }
