"""One optimizer step: losses, gradients of all micro-batches, parameters, and then, at this one place, the codebooks."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqkit.data import Batch
from vqkit.dist import LocalReducer, Reducer
from vqkit.models import TransformerVQ
from vqkit.models.transformer import ModelOutput, ModelState
from vqkit.quantizers import add_statistics_, discard_statistics_, update_codebooks_
from vqkit.train.config import TrainConfig
from vqkit.train.optimizer import Optimizer
from vqkit.train.parallel import average_unsharded_gradients_, set_gradient_sync_, whole_tensor
from vqkit.train.state import detached_copy, join_rows, split_rows


class Losses(NamedTuple):
    """Scalars; `total` is what is minimised."""

    total: Tensor
    language: Tensor
    commitment: Tensor


class StepResult(NamedTuple):
    """What a step did, without gradients, on all processes together but for `state`, the rows of this one.

    Losses and norm are of before the step; scalars stay on the device.
    """

    state: ModelState
    losses: Losses
    gradient_norm: Tensor
    """Global norm before clipping; where it is not finite nothing was changed."""
    nats: Tensor
    """Sum of the negative log-likelihood of all targets that count."""
    num_tokens: Tensor
    """Targets that count."""
    num_bytes: Tensor
    """Targets that are no special ids; of bytes and images, bytes."""
    code_counts: tuple[Tensor, ...]
    """[H, C] uses of each code, one tensor an attention unit."""


def composite_loss(output: ModelOutput, batch: Batch, config: TrainConfig) -> Losses:
    """Negative log-likelihood plus weighted commitment loss, in nats, each a mean over all positions of the batch.

    Positions that do not count (`loss_mask`) add 0 and stay in the denominator, as in the official code.
    """
    nats = token_nats(output.logits, batch.targets)
    language = (nats * batch.loss_mask).mean()
    return Losses(language + config.commitment_weight * output.commitment, language, output.commitment)


def token_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood [B, T] of the targets [B, T] under logits [B, T, vocab]."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def train_step(
    model: TransformerVQ,
    optimizer: Optimizer,
    batch: Batch,
    state: ModelState,
    step: int,
    *,
    segments: bool = True,
    reducer: Reducer | None = None,
    called: nn.Module | None = None,
) -> StepResult:
    """Change the model by update number `step` (0, 1, 2, ...), from `batch`, which goes on where `state` ends.

    The batch is worked off in `micro_batches` parts, with the result of the whole; noise that is drawn for each position (dropout of
    embeddings and residuals) is other noise then. With `segments=False` the documents of a row see each other. The returned state
    carries no gradient.

    With several processes, each with as many rows of one batch, `called` is what `distribute` made of the model, whose gradients are
    averaged, and `reducer` sums what codebooks learn from: all take the step of one process on the whole batch. Where the gradients are
    not finite on any process neither parameters nor codebooks change on any: the norm tells.
    """
    config, reducer, called = optimizer.config, reducer or LocalReducer(), called or model
    optimizer.zero_grad()
    state = state._replace(masks=model.sequence_masks(state, *batch.tokens.shape))  # once for all parts
    parts, states, counts = [], [], []
    shares = zip(split_rows(batch, config.micro_batches), split_rows(state, config.micro_batches), strict=True)
    for number, (rows, rows_state) in enumerate(shares, start=1):
        set_gradient_sync_(called, number == config.micro_batches)
        output = called(rows.tokens, rows_state, segments=rows.segment_ids if segments else None, mask=rows.loss_mask, statistics=True)
        losses = composite_loss(output, rows, config)
        (losses.total / config.micro_batches).backward()
        add_statistics_(model, output.statistics)
        parts.append(torch.stack([loss.detach() for loss in losses]))
        states.append(detached_copy(output.state))
        counts.append([statistics.count for statistics in output.statistics])
    average_unsharded_gradients_(called, reducer)
    norm = whole_tensor(optimizer.step_(step))
    if norm.isfinite():
        update_codebooks_(model, reducer)
    else:
        discard_statistics_(model)
    sizes = torch.stack([batch.loss_mask.sum(), batch.byte_mask.sum()])
    means, sizes, code_counts = _over_processes(
        torch.stack(parts).mean(0), sizes, [torch.stack(unit).sum(0) for unit in zip(*counts, strict=True)], reducer
    )
    losses = Losses(*means.unbind())
    nats = losses.language * (batch.targets.numel() * reducer.world_size)
    return StepResult(join_rows(states), losses, norm, nats, sizes[0], sizes[1], tuple(code_counts))


def _over_processes(losses: Tensor, sizes: Tensor, counts: list[Tensor], reducer: Reducer) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Means of the losses, sums of the others, in one reduction."""
    if reducer.world_size == 1:
        return losses, sizes, counts
    entries = [losses / reducer.world_size, sizes, *counts]
    flat = torch.cat([entry.double().reshape(-1) for entry in entries])
    reducer.all_reduce_(flat)
    pieces = flat.split([entry.numel() for entry in entries])
    means, sizes, *sums = (piece.view(entry.shape).to(entry.dtype) for piece, entry in zip(pieces, entries, strict=True))
    return means, sizes, sums
