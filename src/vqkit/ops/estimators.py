"""Gradient estimators through the choice of a code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def straight_through(x: Tensor, quantized: Tensor) -> Tensor:
    """`quantized` in value, bit for bit, with the gradient of the output handed to `x` unchanged (Bengio et al., 2013).

    Both have the same shape and dtype; `quantized` gets no gradient.
    """
    if x.shape != quantized.shape or x.dtype != quantized.dtype:
        raise ValueError(
            f"quantized is {tuple(quantized.shape)} {quantized.dtype}: must have the shape and dtype of x, {tuple(x.shape)} {x.dtype}"
        )
    return _StraightThrough.apply(x, quantized)


class _StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, quantized: Tensor) -> Tensor:
        return quantized.view_as(quantized)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
