"""The k-means start of all codebooks of a model, from the keys of one batch."""

from __future__ import annotations

import torch
from torch import Tensor

from vqkit.data import Batch
from vqkit.models import TransformerVQ
from vqkit.models.attention import AttentionUnit
from vqkit.quantizers.learnable import LearnableVQ


@torch.no_grad()
def initialize_codebooks_(model: TransformerVQ, batch: Batch, *, segments: bool = True) -> None:
    """Set each unit's codebook by k-means on its keys, in one pass: those of a unit depend on the codebooks below, set just before."""

    mask = batch.loss_mask if model.config.masked_keys == "left_out" else None

    def begin(unit: AttentionUnit, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(unit.quantizer, LearnableVQ):
            unit.quantizer.initialize_(unit.project(inputs[0]).k, mask)

    hooks = [unit.register_forward_pre_hook(begin) for unit in model.units()]
    try:
        model(batch.tokens, segments=batch.segment_ids if segments else None, statistics=False)
    finally:
        for hook in hooks:
            hook.remove()
