"""Images become ids and come back, one by one and as a PNG of many."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vqkit.data import ImageTokenizer, image_grid, load_tokenizer, save_png

shapes = st.tuples(st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 3]))


@given(shapes, st.integers(0, 99))
def test_decoding_undoes_encoding(shape: tuple[int, int, int], seed: int) -> None:
    tokenizer = ImageTokenizer(*shape)
    image = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    ids = tokenizer.encode(image)
    assert ids.tolist() == [int(b) + 3 for b in image.tobytes()]
    assert np.array_equal(tokenizer.decode(ids), image)
    # What is still missing is black, and so is what is no byte.
    half = ids[: len(ids) // 2]
    assert tokenizer.decode([*half, 2]).tobytes()[: len(half)] == image.tobytes()[: len(half)]
    assert not tokenizer.decode([*half, 2]).reshape(-1)[len(half) :].any()


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    tokenizer = ImageTokenizer(2, 2, 3)
    with pytest.raises(ValueError, match=r"ids are 13: an image of shape \(2, 2, 3\) has 12"):
        tokenizer.decode([5] * 13)
    with pytest.raises(ValueError, match="contain 259: must be from 0 to 258"):
        tokenizer.decode([259])
    with pytest.raises(TypeError, match="data is float64: must be an array of uint8"):
        tokenizer.encode(np.zeros((2, 2, 3)))
    with pytest.raises(ValueError, match=r"data has shape \(2, 3, 2\): must be \(2, 2, 3\)"):
        tokenizer.encode(np.zeros((2, 3, 2), dtype=np.uint8))
    with pytest.raises(ValueError, match="must be at least 1, at least 1, and 1 or 3"):
        ImageTokenizer(2, 2, 4)
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).hash == tokenizer.hash != ImageTokenizer(2, 3, 3).hash


def test_a_grid_holds_every_image_in_its_place(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 2, 3), dtype=np.uint8)
    grid = image_grid(images, gap=1)
    assert grid.shape == (2 * 4 - 1, 3 * 3 - 1, 3)  # five in a square of three by two
    for i, image in enumerate(images):
        top, left = i // 3 * 4, i % 3 * 3
        assert np.array_equal(grid[top : top + 3, left : left + 2], image)
    assert not grid[3].any() and not grid[:, 2].any()
    save_png(tmp_path / "grid.png", images)
    save_png(tmp_path / "one.png", images[0])
    save_png(tmp_path / "grey.png", images[:2, :, :, :1], columns=1)
    read = {path.stem: np.asarray(Image.open(path)) for path in tmp_path.iterdir()}
    assert np.array_equal(read["grid"], image_grid(images))
    assert np.array_equal(read["one"], images[0])
    assert np.array_equal(read["grey"], image_grid(images[:2, :, :, :1], columns=1)[..., 0]) and read["grey"].shape == (8, 2)
    with pytest.raises(ValueError, match=r"images have shape \(0, 3, 2, 3\)"):
        image_grid(images[:0])
