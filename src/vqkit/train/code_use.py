"""How a codebook's codes are used: a collapsed codebook shows here first."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vqkit.models.config import ModelConfig


class CodeUse(NamedTuple):
    """Both [H], float64, one entry a head; 0 where nothing was assigned."""

    active: Tensor
    """Share of codes that have at least 1 / (10 C) of the assignments."""
    perplexity: Tensor
    """exp of the entropy of the assignments: C when all codes are used equally."""


def code_use(counts: Tensor) -> CodeUse:
    """Use of the codes of one attention unit from how often each was chosen, counts [H, C]."""
    counts = counts.double()
    total = counts.sum(-1, keepdim=True)
    share = counts / total.clamp(min=1.0)
    # Compared as integers are, so that a code of exactly the share is active whatever the rounding.
    active = (10 * counts.shape[-1] * counts >= total).double().mean(-1)
    perplexity = torch.special.entr(share).sum(-1).exp()
    used = total.squeeze(-1) > 0
    return CodeUse(active * used, perplexity * used)


def unit_name(index: int, config: ModelConfig) -> str:
    """What attention unit number `index` of a model is called: by its layer, and by its place there where a layer has several."""
    layer, unit = divmod(index, config.attentions_per_layer)
    return f"layer {layer} unit {unit}" if config.attentions_per_layer > 1 else f"layer {layer}"
