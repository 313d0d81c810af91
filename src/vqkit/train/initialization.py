"""What a run starts from: random weights or those of another run, and the k-means start of codebooks from the keys of one batch."""

from __future__ import annotations

import torch
from torch import Tensor

from vqkit.config import differences
from vqkit.data import Batch
from vqkit.dist import Reducer
from vqkit.models import TransformerVQ
from vqkit.models.attention import AttentionUnit
from vqkit.models.weights import find_and_load_weights
from vqkit.quantizers.learnable import LearnableVQ
from vqkit.train.config import RunConfig

OF_TRAINING = {
    *("embedding_dropout", "residual_dropout", "sinusoid_dropout", "layer_dropout", "recompute", "block_len", "cache_gradient"),
    *("masked_keys", "codebook.decay", "codebook.init", "codebook.dead_code_threshold"),
}
"""Options of a model that say how it is trained, and not what it computes: other ones may be trained on with."""


def starting_model(config: RunConfig) -> TransformerVQ:
    """The model that a run begins with; codebooks that are still to be started by k-means are those of random weights alone.

    Raises ValueError or FileNotFoundError where `config.init_from` holds no weights, or those of another model, field by field.
    """
    model = TransformerVQ(config.model)
    if config.init_from is None:
        return model
    _, source, found = find_and_load_weights(config.init_from)
    refused = [difference for difference in differences(found, config.model) if difference.path not in OF_TRAINING]
    if refused:
        fields = ", ".join(f"model.{path} is {old!r} there and {new!r} here" for path, old, new in refused)
        raise ValueError(f"init_from = {config.init_from!r}: those are weights of another model: {fields}; must be the same")
    # But for what is pending, which is nothing between steps and of a shape that the expiry of codes decides.
    model.load_state_dict({name: tensor for name, tensor in source.state_dict().items() if ".pending." not in name})
    return model


@torch.no_grad()
def initialize_codebooks_(model: TransformerVQ, batch: Batch, *, segments: bool = True, reducer: Reducer | None = None) -> None:
    """Set each unit's codebook by k-means on its keys, in one pass: those of a unit depend on the codebooks below, set just before.

    With several processes the codebooks are those of the keys of all: `batch` has the rows of this one, `reducer` sums.
    """

    mask = batch.loss_mask if model.config.masked_keys == "left_out" else None

    def begin(unit: AttentionUnit, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(unit.quantizer, LearnableVQ):
            unit.quantizer.initialize_(unit.project(inputs[0]).k, mask, reducer=reducer)

    hooks = [unit.register_forward_pre_hook(begin) for unit in model.units()]
    try:
        model(batch.tokens, segments=batch.segment_ids if segments else None, statistics=False)
    finally:
        for hook in hooks:
            hook.remove()
