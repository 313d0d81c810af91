"""Every kind of data is measured in its own unit, by training and by evaluation, and both share the same bits out over the same things."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest

from tiny_runs import WORDS, tiny_config, with_codebook
from vqkit.data import Split
from vqkit.data.config import ByteTokens, IdSource, ImageSource, SentencePieceTokens, TextSource
from vqkit.train.evaluation import context_ablation, evaluate
from vqkit.train.events import Evaluated, Progress
from vqkit.train.loop import train
from vqkit.train.metrics import read_lines
from vqkit.train.units import LossUnit, measured

PIECES = SentencePieceTokens(vocab_size=290)


def write_words(folder):
    folder.mkdir()
    draw = random.Random(0)
    for i in range(12):
        (folder / f"{i}.txt").write_text(" ".join(draw.choices(WORDS, k=300)))


def write_ids(folder):
    folder.mkdir()
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(0, 20, 2000))


def write_images(folder):
    folder.mkdir()
    np.save(folder / "images.npy", np.random.default_rng(0).integers(0, 256, (40, 8, 4, 1), dtype=np.uint8))


KINDS = {
    "bytes": (write_words, TextSource(), ByteTokens(), "bits_per_byte"),
    "sentencepiece": (write_words, TextSource(), PIECES, "bits_per_byte"),
    "ids": (write_ids, IdSource(vocab_size=20, dtype="int64"), ByteTokens(), "bits_per_token"),
    "images": (write_images, ImageSource(height=8, width=4, channels=1), ByteTokens(), "bits_per_dim"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_evaluation_tell_the_unit_of_the_data(kind, tmp_path):
    write, source, tokenizer, key = KINDS[kind]
    write(tmp_path / "files")
    config = with_codebook(tiny_config(tmp_path / "files", steps=4, log_every=4, eval_every=4), init="normal")
    data = replace(config.data, source=source, tokenizer=tokenizer)
    config = replace(config, data=data, model=replace(config.model, vocab_size=data.vocab_size))
    events = []
    result = train(config, tmp_path / "run", on_event=events.append)
    training, validation = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert key in training
    assert list(measured(validation)) == [key.replace("_", " "), validation[key]]
    assert [event.unit.key for event in events if isinstance(event, (Progress, Evaluated))] == [key, key]

    splits = {name: Split(tmp_path / "run" / "data", name) for name in ("train", "validation")}
    units = {name: split.num_bytes if key == "bits_per_byte" else split.num_tokens for name, split in splits.items()}
    nats = training["loss"] - config.train.commitment_weight * training["commitment"]  # per token
    tokens_per_unit = splits["train"].num_tokens / units["train"]
    assert training[key] == pytest.approx(nats / math.log(2) * tokens_per_unit, rel=0.03)  # ends of documents are not spread evenly
    whole = evaluate(result.model, splits["validation"], batch_size=2)
    assert validation[key] == pytest.approx(whole.nats / math.log(2) / units["validation"], rel=1e-6)
    assert result.validation_bits == validation[key]
    ablation = context_ablation(result.model, splits["validation"], positions=100, batch_size=2, chunk_len=32)
    assert ablation.unit.key == key
    assert ablation.full_bits == pytest.approx(validation[key], rel=0.2)


def test_names_of_units():
    assert (LossUnit("bits per dim").key, LossUnit("bits per dim").short) == ("bits_per_dim", "bits/dim")


def test_without_targets_there_are_no_bits():
    assert LossUnit("bits per byte").bits(0.0, 0) == 0.0
