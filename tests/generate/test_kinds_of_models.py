"""A loaded run writes or paints with the tokenizer of its data: pieces of words as bytes, images as arrays and PNG; ids are for Python."""

from dataclasses import replace

import numpy as np
import pytest

import vqkit
from tiny_runs import tiny_config, write_texts
from vqkit.cli.app import run as command
from vqkit.data.config import IdSource, ImageSource, SentencePieceTokens
from vqkit.train.loop import train


def trained(config, run_dir, *, vocab_size, data):
    short = replace(config.train, steps=4, warmup_steps=1, update_len=None, eval_every=0)
    train(replace(config, model=replace(config.model, vocab_size=vocab_size), data=replace(config.data, **data), train=short), run_dir)
    return vqkit.load(run_dir)


def test_images_are_painted_by_their_shape(tmp_path, capsys):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "digits.npy", rng.integers(0, 256, (40, 4, 4, 3), dtype=np.uint8))
    config = tiny_config(tmp_path / "digits.npy")
    data = {"source": ImageSource(4, 4, 3), "sequence_len": 48}
    loaded = trained(config, tmp_path / "run", vocab_size=259, data=data)
    images = loaded.images(3, seed=1)
    assert (images.shape, images.dtype) == ((3, 4, 4, 3), np.uint8)
    assert np.array_equal(images, loaded.images(3, seed=1))
    assert not np.array_equal(images, loaded.images(3, seed=2))
    with pytest.raises(ValueError, match="model of images: it writes no text"):
        loaded.generate("a", 3)
    with pytest.raises(ValueError, match="num = 0"):
        loaded.images(0)
    assert command(["sample", str(tmp_path / "run"), "--images", "2", "--out", str(tmp_path / "grid.png")]) == 0
    assert (tmp_path / "grid.png").read_bytes()[:4] == b"\x89PNG"
    assert command(["sample", str(tmp_path / "run"), "--prompt", "a"]) == 2
    said = capsys.readouterr().err
    assert "--prompt: " in said and "model of images" in said


def test_pieces_of_words_are_written_as_text(tmp_path):
    config = tiny_config(write_texts(tmp_path / "texts"))
    loaded = trained(config, tmp_path / "run", vocab_size=300, data={"tokenizer": SentencePieceTokens(vocab_size=300)})
    assert loaded.tokenizer.kind == "sentencepiece"
    text = loaded.generate("the quick", 12, seed=3)
    assert isinstance(text, str)
    assert loaded.generate(["the quick"], 12, seed=3) == [text]
    assert text


def test_ids_are_for_python(tmp_path):
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 50, (60, 20)).astype(np.uint16))
    config = tiny_config(tmp_path / "ids.npy")
    loaded = trained(config, tmp_path / "run", vocab_size=53, data={"source": IdSource(vocab_size=50)})
    with pytest.raises(ValueError, match="model of ids: it writes no text"):
        loaded.generate("a", 3)
    with pytest.raises(ValueError, match="model of ids: it paints no images"):
        loaded.images(1)


def test_a_vocabulary_that_is_too_small_for_the_data_is_refused(tmp_path):
    config = tiny_config(tmp_path)
    with pytest.raises(ValueError, match=r"model\.vocab_size = 259: these data need at least 303"):
        replace(config, data=replace(config.data, source=IdSource(vocab_size=300)))
