"""How well a model predicts a split: its bits with the state carried through all of it, the use of its codes, the worth of context."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from vqkit.data import Batch, Split, sequences, stream
from vqkit.dist import LocalReducer, Reducer
from vqkit.models import TransformerVQ
from vqkit.train.code_use import code_use
from vqkit.train.state import detached_copy, split_rows
from vqkit.train.step import token_nats
from vqkit.train.units import LossUnit, loss_unit

CHUNK_LEN = 2048
"""Tokens of a lane that one call reads: the result does not depend on it, the speed does."""


@dataclass(frozen=True)
class Evaluation:
    """A split, or as much of it as was asked for, read once. Entries of codes are one a unit, and in that one a head."""

    nats: float
    """Negative log-likelihood of all targets, end tokens included."""
    num_tokens: int
    """Targets, end tokens included."""
    num_bytes: int
    """Targets that are no special ids; of bytes and images, bytes."""
    unit: LossUnit
    """What such data are measured by."""
    code_counts: tuple[tuple[tuple[int, ...], ...], ...]
    """How often each code was chosen: [unit][head][code]."""
    active_codes: tuple[tuple[float, ...], ...]
    """Share of codes with at least 1 / (10 C) of the assignments."""
    perplexity: tuple[tuple[float, ...], ...]
    """exp of the entropy of the assignments."""

    @property
    def bits(self) -> float:
        """Bits of all targets, ends of documents included, in `unit`."""
        return self.unit.bits(self.nats, self.unit.size(self.num_tokens, self.num_bytes))

    @property
    def worst_active_codes(self) -> float | None:
        """Share of active codes in the worst head of the worst unit; None without codebooks."""
        return min((share for unit in self.active_codes for share in unit), default=None)

    @property
    def mean_perplexity(self) -> float | None:
        """Mean over heads and units; None without codebooks."""
        values = [value for unit in self.perplexity for value in unit]
        return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class ContextAblation:
    """The same model at the same positions, with everything before them and with the last `context` tokens alone."""

    context: int
    num_positions: int
    full_bits: float
    cut_bits: float
    unit: LossUnit
    """Of both."""


@torch.no_grad()
def evaluate(
    model: TransformerVQ,
    split: Split,
    *,
    batch_size: int = 16,
    chunk_len: int = CHUNK_LEN,
    segments: bool = True,
    max_tokens: int | None = None,
    sequence_len: int | None = None,
    reducer: Reducer | None = None,
) -> Evaluation:
    """Read `split` as `batch_size` lanes side by side, `chunk_len` tokens a call, with carried state: every token is a target once.

    With `sequence_len` the split is cut into sequences of that length instead, each read from a fresh state, `batch_size` side by side.
    With `segments=False` documents see each other. With `max_tokens` each lane is read from its beginning, for as many calls
    as have at most so many targets, but at least one. The model is in evaluation mode meanwhile, and changed in nothing.
    With several processes each reads its share of the lanes, and `reducer` gives all of them the result of the whole.
    Raises ValueError for an empty split, or lanes that the processes cannot share evenly.
    """
    _check_not_empty(split)
    reducer = reducer or LocalReducer()
    if batch_size % reducer.world_size:
        raise ValueError(f"batch_size = {batch_size}: must be a multiple of the number of processes, {reducer.world_size}")
    nats = torch.zeros((), dtype=torch.float64, device=_device(model))
    num_tokens = num_bytes = 0
    counts = [torch.zeros(quantizer.codebook.shape[:2], dtype=torch.float64, device=nats.device) for quantizer in model.quantizers()]
    with _evaluating(model):
        state = initial = model.initial_state(batch_size // reducer.world_size)
        for batch, begins in _batches(split, batch_size, chunk_len, sequence_len):
            state = initial if begins else state
            if max_tokens is not None and num_tokens > 0 and num_tokens + int(batch.loss_mask.sum()) > max_tokens:
                break
            num_tokens += int(batch.loss_mask.sum())
            num_bytes += batch.num_bytes
            batch = split_rows(batch, reducer.world_size)[reducer.rank].to(nats.device)
            output = model(batch.tokens, state, segments=batch.segment_ids if segments else None, mask=batch.loss_mask, statistics=True)
            state = detached_copy(output.state)
            nats += (token_nats(output.logits, batch.targets) * batch.loss_mask).sum(dtype=torch.float64)
            for total, statistics in zip(counts, output.statistics, strict=True):
                total += statistics.count
    for total in (nats, *counts):
        reducer.all_reduce_(total)
    uses = [code_use(total) for total in counts]
    return Evaluation(
        nats=nats.item(),
        num_tokens=num_tokens,
        num_bytes=num_bytes,
        unit=loss_unit(split),
        code_counts=tuple(tuple(tuple(int(count) for count in head) for head in unit.tolist()) for unit in counts),
        active_codes=tuple(tuple(use.active.tolist()) for use in uses),
        perplexity=tuple(tuple(use.perplexity.tolist()) for use in uses),
    )


def _batches(split: Split, batch_size: int, chunk_len: int, sequence_len: int | None) -> Iterator[tuple[Batch, bool]]:
    """What one call reads, and whether it begins anew."""
    if sequence_len is None:
        yield from ((batch, index == 0) for index, batch in enumerate(stream(split, batch_size, chunk_len)))
        return
    for batch in sequences(split, sequence_len, batch_size):
        for start in range(0, sequence_len, chunk_len):
            part = Batch(*(field[:, start : start + chunk_len] for field in batch))
            if part.loss_mask.any():
                yield part, start == 0


@torch.no_grad()
def context_ablation(
    model: TransformerVQ,
    split: Split,
    *,
    context: int = 4,
    positions: int = 4096,
    batch_size: int = 16,
    chunk_len: int = CHUNK_LEN,
    segments: bool = True,
) -> ContextAblation:
    """Bits at about `positions` evenly spaced targets that are no special ids, with the whole context and with `context` tokens of it.

    Both are measured at the same places, so that their difference is the worth of the context alone.
    Raises ValueError for an empty split, or a `context` that a chunk has no room for.
    """
    _check_not_empty(split)
    if not 1 <= context <= chunk_len:
        raise ValueError(f"context = {context}: must be from 1 to chunk_len = {chunk_len}")
    stride = max(1, split.num_tokens // max(positions, 1))
    full = cut = torch.zeros((), dtype=torch.float64, device=_device(model))
    num = 0
    with _evaluating(model):
        state = model.initial_state(batch_size)
        for index, batch in enumerate(stream(split, batch_size, chunk_len)):
            batch = batch.to(full.device)
            output = model(batch.tokens, state, segments=batch.segment_ids if segments else None, statistics=False)
            state = detached_copy(output.state)
            times = torch.arange(context - 1, chunk_len, device=full.device)
            times = times[(times + index * chunk_len) % stride == 0]
            counted = batch.byte_mask[:, times]
            if not counted.any():
                continue
            num += int(counted.sum())
            full = full + token_nats(output.logits, batch.targets)[:, times][counted].sum(dtype=torch.float64)
            cut = cut + _nats_of_last(model, batch, times, context, segments)[counted].sum(dtype=torch.float64)
    unit = loss_unit(split)
    size = unit.size(num, num)
    return ContextAblation(context, num, unit.bits(full.item(), size), unit.bits(cut.item(), size), unit)


def _nats_of_last(model: TransformerVQ, batch: Batch, times: Tensor, context: int, segments: bool) -> Tensor:
    """Negative log-likelihood [B, len(times)] of the targets at `times`, each from the `context` inputs that end there."""

    def windows(field: Tensor) -> Tensor:
        return field.unfold(1, context, 1)[:, times - (context - 1)].flatten(0, 1)

    output = model(windows(batch.tokens), segments=windows(batch.segment_ids) if segments else None, statistics=False)
    targets = batch.targets[:, times]
    return token_nats(output.logits[:, -1:], targets.reshape(-1, 1)).view_as(targets)


@contextmanager
def _evaluating(model: TransformerVQ) -> Iterator[None]:
    """The model in evaluation mode, and afterwards in the mode that it was in; random numbers drawn meanwhile are not missed later."""
    was_training, device = model.training, _device(model)
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        model.train(was_training)


def _device(model: TransformerVQ) -> torch.device:
    return next(model.parameters()).device


def _check_not_empty(split: Split) -> None:
    if split.num_tokens == 0:
        raise ValueError(f"the {split.name} split is empty: there is nothing to measure")
