"""The metrics of quantization that the official Transformer-VQ logs, recomputed from the inputs of the units: nothing is paid elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from vqkit.models.attention import AttentionUnit
from vqkit.models.transformer import ModelState, TransformerVQ
from vqkit.ops.usage import quantization_metrics
from vqkit.quantizers.learnable import LearnableVQ


@torch.no_grad()
def model_metrics(
    model: TransformerVQ, inputs: Tensor, state: ModelState | None = None, *, segments: Tensor | None = None
) -> list[dict[str, Tensor]]:
    """`unit_metrics` of each unit, in order, in one call of the model on `inputs` [B, T]."""
    found: list[dict[str, Tensor]] = []
    hooks = [unit.register_forward_pre_hook(lambda unit, args: found.append(unit_metrics(unit, args[0]))) for unit in model.units()]
    try:
        model(inputs, state, segments=segments, statistics=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def unit_metrics(unit: AttentionUnit, x: Tensor) -> dict[str, Tensor]:
    """`vqkit.ops.usage.quantization_metrics` of the keys that a unit makes of its input x [B, T, D], averaged over blocks.

    Raises ValueError for a unit without a codebook that learns.
    """
    quantizer = unit.quantizer
    if not isinstance(quantizer, LearnableVQ):
        raise ValueError(f"unit quantizes by {type(quantizer).__name__}: must have a codebook that learns, a LearnableVQ")
    keys = unit.project(x).k
    codes = quantizer.decode(quantizer.encode(keys)).to(keys.dtype)
    error = (keys - codes).square().sum(-1)
    blocks = [
        quantization_metrics(k, c, e, quantizer.sum, quantizer.count)
        for k, c, e in zip(*(t.split(unit.config.block_len, dim=2) for t in (keys, codes, error)), strict=True)
    ]
    return {name: torch.stack([block[name] for block in blocks]).mean() for name in blocks[0]}
