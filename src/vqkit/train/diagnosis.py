"""Where numbers stopped being finite: the first layer whose output is not, or the parameter whose gradient is not."""

from __future__ import annotations

import torch
from torch import Tensor

from vqkit.data import Batch
from vqkit.models import TransformerVQ
from vqkit.models.transformer import ModelState


@torch.no_grad()
def where_not_finite(model: TransformerVQ, batch: Batch, state: ModelState, *, segments: bool = True) -> str:
    """In words, from the model and its gradients as a failed step left them; the step's batch is read once more."""
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            return f"parameter {name}"
    found: list[str] = []

    def watch(name: str, module: torch.nn.Module) -> torch.utils.hooks.RemovableHandle:
        def look(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple) -> None:
            tensor = output if isinstance(output, Tensor) else output[0]
            if not found and not bool(tensor.isfinite().all()):
                found.append(f"the output of {name}")

        return module.register_forward_hook(look)

    watched = [(name, module) for name, module in model.named_children() if name != "layers"]
    watched += [(f"layers.{i}", layer) for i, layer in enumerate(model.layers)]
    handles = [watch(name, module) for name, module in watched]
    try:
        model(batch.tokens, state, segments=batch.segment_ids if segments else None, statistics=False)
    except ValueError as error:  # codes of keys that are no numbers
        found.append(str(error))
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return found[0]
    bad = [name for name, parameter in model.named_parameters() if parameter.grad is not None and not bool(parameter.grad.isfinite().all())]
    return f"the gradient of {bad[-1]}" if bad else "the loss"
