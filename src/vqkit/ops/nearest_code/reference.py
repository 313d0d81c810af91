"""The meaning of nearest code: every difference written out. Slow, and of N x C x K memory; for tests."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_index(x: Tensor, codebook: Tensor) -> Tensor:
    """x [G, N, K], codebook [G, C, K], both of one floating type -> [G, N] int64; -1 where the least distance is not finite."""
    distance = (x.unsqueeze(-2) - codebook.unsqueeze(-3)).square().sum(-1)
    smallest = distance.amin(-1, keepdim=True)  # NaN where any is
    code = torch.arange(codebook.shape[-2], device=x.device)
    index = torch.where(distance == smallest, code, code.numel()).amin(-1)  # the lowest among equals
    return torch.where(smallest.squeeze(-1).isfinite(), index, -1)


def nearest_codes(x: Tensor, codebook: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest codes [G, N, k], nearest first, and their squared distances; -1 and 0 where a distance is not finite."""
    distance, code = (x.unsqueeze(-2) - codebook.unsqueeze(-3)).square().sum(-1).sort(dim=-1, stable=True)
    return known(code[..., :k], distance[..., :k])


def known(code: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
    """-1 and 0 where the distance is not finite."""
    finite = distance.isfinite()
    return torch.where(finite, code, -1), torch.where(finite, distance, 0.0)
