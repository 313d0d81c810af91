"""Normalisation over the last axis: the RMS norm of Transformer-VQ, with a gain and a bias, computed in float32 or wider."""

from __future__ import annotations

import torch
from torch import Tensor, nn

EPS = 1e-6


def normalize(x: Tensor, gain: Tensor | None = None, bias: Tensor | None = None, *, center: bool = False, norm: bool = True) -> Tensor:
    """RMS norm of x [..., D] by default: x / sqrt(mean(x^2) + 1e-6) * gain + bias, in the type of x.

    `center` takes the mean off first (a layer norm); `norm=False` leaves the scale alone. gain, bias: [D] or None.
    The arithmetic is float32, or float64 for float64 input (Zhang & Sennrich 2019; the official code has the same switches).
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if center:
        wide = wide - wide.mean(-1, keepdim=True)
    if norm:
        # The norm is one pass over x that stores nothing, where a mean of squares takes two and keeps the squares.
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        wide = wide * torch.rsqrt(length * length / x.shape[-1] + EPS)
    if gain is not None and bias is not None:
        wide = torch.addcmul(bias, wide, gain)
    elif gain is not None:
        wide = wide * gain
    elif bias is not None:
        wide = wide + bias
    return wide.to(x.dtype)


class RMSNorm(nn.Module):
    """`normalize`, with a learned gain, initially 1, and a learned bias, initially 0, if `affine`."""

    def __init__(self, dim: int, *, affine: bool = True) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.empty(dim)) if affine else None
        self.bias = nn.Parameter(torch.empty(dim)) if affine else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.gain is not None and self.bias is not None:
            nn.init.ones_(self.gain)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return normalize(x, self.gain, self.bias)
