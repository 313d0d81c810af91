"""Losses of vector quantization, unweighted."""

from __future__ import annotations

from torch import Tensor


def commitment_loss(x: Tensor, quantized: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared distance of the vectors to their codes, which are constants here (van den Oord et al., 2017).

    x, quantized [B, H, T, K], mask [B, T] bool. The squared error is summed over K and over heads and averaged over batch and time;
    masked positions add 0 and stay in the denominator, as in the official Transformer-VQ. A masked vector gets no gradient, whatever
    it holds. Returns a scalar of x's dtype; 0 for an empty input.
    """
    difference = x - quantized.detach()
    if mask is not None:
        difference = difference.where(mask[:, None, :, None], 0.0)
    batch, _, time, _ = x.shape
    return difference.square().sum() / max(batch * time, 1)
