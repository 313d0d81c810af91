"""Sinusoidal tables of positions (Vaswani et al., 2017), in the halves layout of Transformer-VQ."""

from __future__ import annotations

import torch
from torch import Tensor


def sinusoids(
    length: int,
    width: int,
    base: float,
    *,
    start: int = 0,
    flip: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Sines in the first half of the columns, cosines in the second; column i of a half has wavelength 2 pi base^(2 i / width).

    Rows are the positions start ... start + length - 1, in falling order with `flip`. The angles are computed in float64, so that
    far positions keep their phase, and the table is rounded once to `dtype`. Returns [length, width].
    Raises ValueError for an odd or empty width, a negative length and a base that is not positive.
    """
    if width < 2 or width % 2:
        raise ValueError(f"width = {width}: must be even and at least 2, half sines and half cosines")
    if length < 0:
        raise ValueError(f"length = {length}: must not be negative")
    if not base > 0:
        raise ValueError(f"base = {base}: must be positive")
    position = torch.arange(start, start + length, dtype=torch.float64, device=device)
    exponent = torch.arange(0, width, 2, dtype=torch.float64, device=device) / width
    angle = position[:, None] * base**-exponent
    table = torch.cat([angle.sin(), angle.cos()], dim=1).to(dtype)
    return table.flip(0) if flip else table
