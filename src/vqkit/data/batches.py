"""Batches of a split: for training in an order that is a function of (seed, index), for evaluation one after another.

Shapes: B batch, T time. A token's input is the token before it; in front of a sequence, of a whole stream, or of every document of a
split without end tokens whose documents are equally long (images), stands an end token.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vqkit.data.stored import Split
from vqkit.data.tokenizer import ByteTokenizer


class Batch(NamedTuple):
    """Inputs and what to predict from them. Padding has target `PAD`, stands at the end of a row and counts nowhere.

    An input that is an end token belongs to the document that it opens, not to the one that it ends.
    """

    tokens: Tensor  # [B, T] int64, inputs: the targets shifted right
    targets: Tensor  # [B, T] int64
    segment_ids: Tensor  # [B, T] int64, document of each input, counted from 0, never falling along a row
    loss_mask: Tensor  # [B, T] bool, False on padding

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        return Batch(*(tensor.to(device) for tensor in self))

    @property
    def byte_mask(self) -> Tensor:
        """Which targets are no special ids, bool [B, T]; of bytes and images: bytes. End tokens cost bits as well, but are not counted."""
        return self.loss_mask & (self.targets >= ByteTokenizer.FIRST_BYTE)

    @property
    def num_bytes(self) -> int:
        """Number of targets that are no special ids; of bytes and images, of bytes."""
        return int(self.byte_mask.sum())


class SequenceSampler:
    """Training batches: `batch(index)` is a function of the arguments here and of `index` alone, so it can be resumed anywhere.

    Each epoch closes the split to a ring, cuts it at a random place and then every `sequence_len` tokens, and takes the sequences
    in a random order: every token once, in ceil(num_tokens / sequence_len) sequences, of which the last may be shorter and is padded.
    Batches run on from one epoch into the next. Documents that are equally long (images) are never cut: a sequence is one of them.
    With `world_size` ranks, each takes a consecutive share of the rows of every batch: all together have the batch of one rank.
    Raises ValueError for a split shorter than one sequence, or a batch that the ranks cannot share evenly.
    """

    def __init__(self, split: Split, sequence_len: int, batch_size: int, seed: int, *, rank: int = 0, world_size: int = 1) -> None:
        for name, value, least in (("sequence_len", sequence_len, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"{name} = {value}: must be at least {least}")
        if split.num_tokens < sequence_len:
            raise ValueError(f"the {split.name} split has {split.num_tokens} tokens: one sequence needs sequence_len = {sequence_len}")
        if split.document_len is not None and split.document_len != sequence_len:
            raise ValueError(f"sequence_len = {sequence_len}: must be {split.document_len}, the length of every document of these data")
        _check_ranks(batch_size, rank, world_size)
        self.split = split
        self.sequence_len = sequence_len
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.sequences_per_epoch = -(-split.num_tokens // sequence_len)

    def batch(self, index: int) -> Batch:
        """Batch number `index`, from 0 without end; B = batch_size / world_size. Raises ValueError for a negative index."""
        if index < 0:
            raise ValueError(f"index = {index}: must be at least 0")
        share = self.batch_size // self.world_size
        first = index * self.batch_size + self.rank * share
        targets = np.full((share, self.sequence_len), ByteTokenizer.PAD, dtype=np.int64)
        for row, number in zip(targets, range(first, first + share), strict=True):
            sequence = self._sequence(*divmod(number, self.sequences_per_epoch))
            row[: len(sequence)] = sequence
        previous = np.full(share, ByteTokenizer.END)
        return _batch(targets, previous, np.zeros(share, dtype=np.int64))

    def _sequence(self, epoch: int, place: int) -> np.ndarray:
        """Tokens of the sequence that stands at `place` in the order of `epoch`."""
        total = self.split.num_tokens
        offset, order = _epoch(self.seed, epoch, self.sequences_per_epoch, total)
        begin = int(order[place]) * self.sequence_len
        length = min(self.sequence_len, total - begin)
        begin = (begin + offset) % total if self.split.document_len is None else begin
        tokens = self.split.tokens
        return np.concatenate([tokens[begin : begin + length], tokens[: max(begin + length - total, 0)]])


def stream(split: Split, batch_size: int, chunk_len: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    """The whole split for evaluation with carried state: every token is a target exactly once.

    The split is cut into `batch_size` consecutive lanes, one to a row, equally long but for one token (but for one document, where
    these are equally long); all batches have T = chunk_len. Within a lane inputs and segment ids run on from batch to batch; with one
    lane the model sees all that precedes each target. With `world_size` ranks, each takes a consecutive share of the lanes,
    B = batch_size / world_size, and all get equally many batches.
    """
    for name, value in (("batch_size", batch_size), ("chunk_len", chunk_len)):
        if value < 1:
            raise ValueError(f"{name} = {value}: must be at least 1")
    _check_ranks(batch_size, rank, world_size)
    unit = split.document_len or 1
    borders = split.num_tokens // unit * np.arange(batch_size + 1) // batch_size * unit
    longest = int(np.diff(borders).max())
    share = _share(batch_size, rank, world_size)
    begins, stops = borders[:-1][share], borders[1:][share]
    previous = np.full(len(begins), ByteTokenizer.END)
    segment = np.zeros(len(begins), dtype=np.int64)
    for start in range(0, longest, chunk_len):
        targets = np.full((len(begins), chunk_len), ByteTokenizer.PAD, dtype=np.int64)
        for row, begin, stop in zip(targets, begins + start, stops, strict=True):
            tokens = split.tokens[begin : min(begin + chunk_len, stop)]
            row[: len(tokens)] = tokens
        batch = _batch(targets, previous, segment, _openings(split, start, chunk_len))
        yield batch
        opens = _openings(split, start + chunk_len, 1)[0]
        previous = np.full_like(previous, ByteTokenizer.END) if opens else targets[:, -1]
        segment = batch.segment_ids[:, -1].numpy() + (previous == ByteTokenizer.END)


def sequences(split: Split, sequence_len: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    """The whole split cut into consecutive sequences, each to be read from a fresh state: every token is a target exactly once.

    The last sequence is padded, and so is the last batch, with rows of padding alone. With `world_size` ranks, each takes a
    consecutive share of the rows of every batch, B = batch_size / world_size. Raises what `SequenceSampler` does for its arguments.
    """
    for name, value in (("sequence_len", sequence_len), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} = {value}: must be at least 1")
    if split.document_len is not None and split.document_len != sequence_len:
        raise ValueError(f"sequence_len = {sequence_len}: must be {split.document_len}, the length of every document of these data")
    _check_ranks(batch_size, rank, world_size)
    for first in range(0, split.num_tokens, sequence_len * batch_size):
        targets = np.full((batch_size // world_size, sequence_len), ByteTokenizer.PAD, dtype=np.int64)
        for row, number in zip(targets, range(batch_size)[_share(batch_size, rank, world_size)], strict=True):
            begin = first + number * sequence_len
            tokens = split.tokens[begin : begin + sequence_len]
            row[: len(tokens)] = tokens
        yield _batch(targets, np.full(len(targets), ByteTokenizer.END), np.zeros(len(targets), dtype=np.int64))


def _check_ranks(batch_size: int, rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank = {rank}: must be at least 0 and below world_size = {world_size}")
    if batch_size % world_size:
        raise ValueError(f"batch_size = {batch_size}: must be a multiple of world_size = {world_size}")


def _share(rows: int, rank: int, world_size: int) -> slice:
    """The rows of one rank."""
    return slice(rows // world_size * rank, rows // world_size * (rank + 1))


def _openings(split: Split, start: int, length: int) -> np.ndarray:
    """Which of `length` places from `start` on, counted from the beginning of a lane, open a document that no end token announces."""
    if split.document_len is None:
        return np.zeros(length, dtype=bool)
    return np.arange(start, start + length) % split.document_len == 0


def _batch(targets: np.ndarray, previous: np.ndarray, segment: np.ndarray, openings: np.ndarray | None = None) -> Batch:
    """A batch of `targets` [B, T] after tokens `previous` [B], whose segments are `segment` [B]; `openings` [T] get an end as input."""
    tokens = np.concatenate([previous[:, None], targets[:, :-1]], axis=1)
    if openings is not None:
        tokens[:, openings] = ByteTokenizer.END
    opened = np.cumsum(tokens[:, 1:] == ByteTokenizer.END, axis=1)
    segment_ids = segment[:, None] + np.concatenate([np.zeros_like(previous)[:, None], opened], axis=1)
    return Batch(*map(torch.from_numpy, (tokens, targets, segment_ids, targets != ByteTokenizer.PAD)))


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, sequences: int, tokens: int) -> tuple[int, np.ndarray]:
    """Where an epoch cuts the ring, and the order of its sequences."""
    # Raw draws, and a stable sort of them: numpy promises these to be the same in all its versions, shuffles it does not.
    draws = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(sequences + 1)
    return int(draws[0] % tokens), np.argsort(draws[1:], kind="stable")
