"""Gradient estimators through the choice of a code."""

from __future__ import annotations

from torch import Tensor


def straight_through(x: Tensor, quantized: Tensor) -> Tensor:
    """`quantized` in value, exactly, with the gradient of the output handed to `x` unchanged (Bengio et al., 2013).

    Both have the same shape and dtype; `quantized` gets no gradient. x must be finite.
    """
    if x.shape != quantized.shape or x.dtype != quantized.dtype:
        raise ValueError(
            f"quantized is {tuple(quantized.shape)} {quantized.dtype}: must have the shape and dtype of x, {tuple(x.shape)} {x.dtype}"
        )
    return quantized.detach() + (x - x.detach())  # the usual x + (quantized - x).detach() would round
