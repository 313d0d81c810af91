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
