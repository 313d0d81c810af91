"""Training batches are a function of (seed, index) and lose nothing; the evaluation stream passes every token once."""

from __future__ import annotations

import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqkit.data import Batch, ByteTokenizer, DataConfig, SequenceSampler, Split, pack, sequences, stream
from vqkit.data.batches import _epoch
from vqkit.data.config import ImageSource, SizedSplits

PAD, END = ByteTokenizer.PAD, ByteTokenizer.END

sequence_lens = st.integers(1, 40)
seeds = st.integers(0, 2**63)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty short documents in which every byte pair of neighbours is rare."""
    root = tmp_path_factory.mktemp("packed")
    generator = np.random.default_rng(1)
    (root / "corpus").mkdir()
    for i in range(40):
        (root / "corpus" / f"{i}").write_bytes(generator.bytes(int(generator.integers(1, 25))))
    pack(DataConfig(path=str(root / "corpus"), validation_fraction=0.3, test_fraction=0.3, sequence_len=40), root / "data")
    shutil.rmtree(root / "corpus")
    return root / "data"


@pytest.fixture(scope="module")
def split(folder: Path) -> Split:
    return Split(folder, "train")


def rows(batch: Batch) -> list[tuple[int, ...]]:
    """The targets of each row, without padding."""
    return [tuple(row[mask].tolist()) for row, mask in zip(batch.targets, batch.loss_mask, strict=True)]


def check_form(batch: Batch) -> None:
    assert [tensor.dtype for tensor in batch] == [torch.int64, torch.int64, torch.int64, torch.bool]
    assert len({tensor.shape for tensor in batch}) == 1
    assert torch.equal(batch.loss_mask, batch.targets != PAD)
    assert not (batch.loss_mask[:, 1:] & ~batch.loss_mask[:, :-1]).any(), "padding is not at the end"
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    assert torch.equal(batch.segment_ids.diff(dim=1), (batch.tokens[:, 1:] == END).long())


@given(seeds, sequence_lens, st.integers(1, 5), st.integers(0, 50))
def test_inputs_are_shifted_and_segments_counted(split: Split, seed: int, sequence_len: int, batch_size: int, index: int) -> None:
    batch = SequenceSampler(split, sequence_len, batch_size, seed).batch(index)
    assert batch.tokens.shape == (batch_size, sequence_len)
    check_form(batch)
    assert (batch.tokens[:, 0] == END).all()
    assert (batch.segment_ids[:, 0] == 0).all()
    assert batch.num_bytes == int(batch.byte_mask.sum()) == sum(token > 2 for row in rows(batch) for token in row)


@given(seeds, sequence_lens, st.integers(1, 5), st.lists(st.integers(0, 200), min_size=1, max_size=5))
def test_a_batch_depends_on_seed_and_index_alone(split: Split, seed: int, sequence_len: int, batch_size: int, indices: list[int]) -> None:
    used, fresh = SequenceSampler(split, sequence_len, batch_size, seed), SequenceSampler(split, sequence_len, batch_size, seed)
    expected = {index: used.batch(index) for index in indices}
    torch.manual_seed(0)
    for index in reversed(indices):
        assert all(map(torch.equal, fresh.batch(index), expected[index]))


@pytest.mark.parametrize(
    ("epoch", "cut", "order"),
    [
        ((5, 0, 7, 100), 32, [6, 3, 2, 4, 5, 1, 0]),
        ((5, 1, 7, 100), 93, [6, 5, 0, 4, 3, 1, 2]),
        ((2**63, 123456, 7, 12687308), 170599, [1, 6, 0, 3, 2, 5, 4]),
    ],
)
def test_the_order_is_the_same_on_every_machine_and_version(epoch: tuple[int, int, int, int], cut: int, order: list[int]) -> None:
    found_cut, found_order = _epoch(*epoch)
    assert (found_cut, found_order.tolist()) == (cut, order)


@given(seeds, sequence_lens, st.integers(0, 3))
def test_an_epoch_takes_every_token_once(split: Split, seed: int, sequence_len: int, epoch: int) -> None:
    sampler = SequenceSampler(split, sequence_len, 1, seed)
    count = sampler.sequences_per_epoch
    assert count == -(-split.num_tokens // sequence_len)
    sequences = [rows(sampler.batch(epoch * count + i))[0] for i in range(count)]
    assert Counter(token for row in sequences for token in row) == Counter(split.tokens.tolist())
    assert sorted(map(len, sequences))[1:] == [sequence_len] * (count - 1)
    # Put together by their order they are the split, read once around the ring.
    ring = split.tokens.tolist()
    assert is_ring(ring, [list(row) for row in sequences])


def is_ring(ring: list[int], pieces: list[list[int]]) -> bool:
    """Whether the pieces, the short one last, tile the ring without overlap from some place on."""
    doubled, wanted = ring + ring, Counter(map(tuple, pieces))
    length, count = max(map(len, pieces)), len(pieces)
    for start in range(len(ring)):
        ends = [min(i * length, len(ring)) for i in range(count + 1)]
        if Counter(tuple(doubled[start + a : start + b]) for a, b in pairwise(ends)) == wanted:
            return True
    return False


@given(seeds, sequence_lens, st.integers(1, 7))
def test_batches_run_on_through_the_epochs_and_drop_nothing(split: Split, seed: int, sequence_len: int, batch_size: int) -> None:
    single, several = SequenceSampler(split, sequence_len, 1, seed), SequenceSampler(split, sequence_len, batch_size, seed)
    number = 2 * single.sequences_per_epoch // batch_size + 1
    one_by_one = [rows(single.batch(i))[0] for i in range(number * batch_size)]
    assert [row for i in range(number) for row in rows(several.batch(i))] == one_by_one


@given(seeds, sequence_lens, st.integers(1, 4), st.integers(1, 3), st.integers(0, 100))
def test_ranks_share_each_batch(split: Split, seed: int, sequence_len: int, world_size: int, share: int, index: int) -> None:
    batch_size = world_size * share
    whole = SequenceSampler(split, sequence_len, batch_size, seed).batch(index)
    parts = [
        SequenceSampler(split, sequence_len, batch_size, seed, rank=rank, world_size=world_size).batch(index) for rank in range(world_size)
    ]
    assert all(len(part.tokens) == share for part in parts)
    for together, field in zip(map(torch.cat, zip(*parts, strict=True)), whole, strict=True):
        assert torch.equal(together, field)


def test_seeds_and_epochs_differ_in_order_and_in_cut(split: Split) -> None:
    sampler = SequenceSampler(split, 8, 1, seed=0)
    count = sampler.sequences_per_epoch
    epochs = [[rows(SequenceSampler(split, 8, 1, seed).batch(e * count + i))[0] for i in range(count)] for seed in (0, 1) for e in (0, 1)]
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert len({tuple(sorted(epoch)) for epoch in epochs}) == 4, "the cut never moves"


@given(st.sampled_from(["train", "validation", "test"]), st.integers(1, 9), st.integers(1, 50))
def test_a_stream_passes_every_token_once_in_lanes(folder: Path, name: str, batch_size: int, chunk_len: int) -> None:
    split = Split(folder, name)
    batches = list(stream(split, batch_size, chunk_len))
    for batch in batches:
        assert batch.tokens.shape == (batch_size, chunk_len)
        check_form(batch)
    lanes = [[token for batch in batches for token in rows(batch)[lane]] for lane in range(batch_size)]
    assert [token for lane in lanes for token in lane] == split.tokens.tolist()
    assert max(map(len, lanes)) - min(map(len, lanes)) <= 1
    assert sum(batch.num_bytes for batch in batches) == split.num_bytes
    assert sum(int(batch.loss_mask.sum()) for batch in batches) == split.num_tokens


@given(st.integers(1, 9), st.integers(1, 50))
def test_a_stream_in_chunks_is_the_stream_in_one(split: Split, batch_size: int, chunk_len: int) -> None:
    longest = -(-split.num_tokens // batch_size)
    (whole,) = stream(split, batch_size, longest)
    parts = [torch.cat(fields, dim=1)[:, :longest] for fields in zip(*stream(split, batch_size, chunk_len), strict=True)]
    assert (whole.tokens[:, 0] == END).all() and (whole.segment_ids[:, 0] == 0).all()
    for part, field in zip(parts, whole, strict=True):
        assert torch.equal(part[whole.loss_mask], field[whole.loss_mask])


def test_a_stream_in_one_lane_counts_the_documents(split: Split) -> None:
    segments = torch.cat([batch.segment_ids[batch.loss_mask] for batch in stream(split, 1, 7)])
    lengths = np.diff(split.offsets)
    assert segments.tolist() == [document for document, length in enumerate(lengths) for _ in range(length)]


def test_an_empty_split_has_an_empty_stream(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(50))
    pack(DataConfig(path=str(tmp_path / "file"), test_fraction=0.0, validation_fraction=0.0, sequence_len=4), tmp_path / "data")
    assert list(stream(Split(tmp_path / "data", "test"), 2, 8)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sequence_len": 10**6}, r"the train split has \d+ tokens: one sequence needs sequence_len = 1000000"),
        ({"sequence_len": 0}, "sequence_len = 0: must be at least 1"),
        ({"batch_size": 0}, "batch_size = 0: must be at least 1"),
        ({"seed": -1}, "seed = -1: must be at least 0"),
        ({"rank": 2, "world_size": 2}, "rank = 2: must be at least 0 and below world_size = 2"),
        ({"batch_size": 3, "world_size": 2}, "batch_size = 3: must be a multiple of world_size = 2"),
    ],
)
def test_a_wrong_argument_is_named(split: Split, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceSampler(split, **{"sequence_len": 8, "batch_size": 2, "seed": 0, **arguments})


def test_a_wrong_place_is_named(split: Split) -> None:
    with pytest.raises(ValueError, match="index = -1: must be at least 0"):
        SequenceSampler(split, 8, 2, 0).batch(-1)
    with pytest.raises(ValueError, match="chunk_len = 0: must be at least 1"):
        next(stream(split, 1, 0))


@given(st.sampled_from(["train", "test"]), st.integers(1, 3), st.integers(1, 3), st.integers(1, 30))
def test_ranks_share_the_lanes_of_a_stream(folder: Path, name: str, world_size: int, share: int, length: int) -> None:
    split, batch_size = Split(folder, name), world_size * share
    for read in (stream, sequences):
        whole = list(read(split, *((batch_size, length) if read is stream else (length, batch_size))))
        parts = [
            list(read(split, *((batch_size, length) if read is stream else (length, batch_size)), rank=rank, world_size=world_size))
            for rank in range(world_size)
        ]
        assert {len(part) for part in parts} == {len(whole)}
        for expected, together in zip(whole, zip(*parts, strict=True), strict=True):
            for field, fields in zip(expected, zip(*together, strict=True), strict=True):
                assert torch.equal(torch.cat(fields), field)


@given(st.integers(1, 40), st.integers(1, 5))
def test_sequences_pass_every_token_once_each_from_a_fresh_start(split: Split, sequence_len: int, batch_size: int) -> None:
    batches = list(sequences(split, sequence_len, batch_size))
    for batch in batches:
        assert batch.tokens.shape == (batch_size, sequence_len)
        check_form(batch)
        assert (batch.tokens[:, 0] == END).all() and (batch.segment_ids[:, 0] == 0).all()
    assert [token for batch in batches for row in rows(batch) for token in row] == split.tokens.tolist()
    assert len(batches) == -(-split.num_tokens // (sequence_len * batch_size))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """Seven images of four bytes; no end token stands between them."""
    root = tmp_path_factory.mktemp("pictures")
    np.save(root / "images.npy", np.arange(100, 128, dtype=np.uint8).reshape(7, 2, 2, 1))
    config = DataConfig(path=str(root / "images.npy"), sequence_len=4, source=ImageSource(2, 2, 1), splits=SizedSplits(7, 0, 0))
    pack(config, root / "data")
    return Split(root / "data", "train")


@given(seeds, st.integers(0, 5), st.integers(1, 3))
def test_images_are_sequences_and_never_cut(pictures: Split, seed: int, epoch: int, batch_size: int) -> None:
    sampler = SequenceSampler(pictures, 4, 1, seed)
    found = [rows(sampler.batch(7 * epoch + i))[0] for i in range(7)]
    assert sorted(found) == [tuple(range(103 + 4 * i, 107 + 4 * i)) for i in range(7)]
    check_form(SequenceSampler(pictures, 4, batch_size, seed).batch(epoch))


@given(st.integers(1, 4), st.integers(1, 9))
def test_in_a_stream_every_image_opens_a_segment(pictures: Split, batch_size: int, chunk_len: int) -> None:
    batches = list(stream(pictures, batch_size, chunk_len))
    lanes = [torch.cat(fields, dim=1) for fields in zip(*batches, strict=True)]
    tokens, targets, segments, mask = lanes
    assert targets[mask].tolist() == pictures.tokens.tolist()
    place = torch.arange(targets.shape[1]).expand_as(targets)
    assert (tokens[place % 4 == 0] == END).all()
    assert torch.equal(tokens[:, 1:][place[:, 1:] % 4 != 0], targets[:, :-1][place[:, 1:] % 4 != 0])
    assert torch.equal(segments, place // 4)
    assert all((int(row.sum()) % 4) == 0 for row in mask), "a lane ends within an image"


def test_images_have_one_length(pictures: Split) -> None:
    for build in (lambda: SequenceSampler(pictures, 5, 1, 0), lambda: next(sequences(pictures, 5, 1))):
        with pytest.raises(ValueError, match="sequence_len = 5: must be 4, the length of every document"):
            build()
    with pytest.raises(ValueError, match="rank = 1: must be at least 0 and below world_size = 1"):
        next(stream(pictures, 2, 4, rank=1))
    with pytest.raises(ValueError, match="batch_size = 3: must be a multiple of world_size = 2"):
        next(sequences(pictures, 4, 3, world_size=2))
