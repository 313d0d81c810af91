"""Images as rows of bytes in raster order, channels last, and back: arrays and PNG files. Files need the extra `images` (Pillow).

Shapes: N images, H height, W width, C channels.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vqkit.data.tokenizer import SpecialIds, checked_ids, digest_of, write_description
from vqkit.files import write_bytes_atomic

FIRST_BYTE = 3
_EIGHT_BITS = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"}


class ImageTokenizer(SpecialIds):
    """Byte b of an image is id b + 3, as of text; an image is H * W * C ids, without an end token."""

    kind: ClassVar[str] = "images"
    vocab_size = 259

    def __init__(self, height: int, width: int, channels: int) -> None:
        if height < 1 or width < 1 or channels not in (1, 3):
            raise ValueError(f"(height, width, channels) = {(height, width, channels)}: must be at least 1, at least 1, and 1 or 3")
        self.height, self.width, self.channels = height, width, channels

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.height, self.width, self.channels

    @property
    def hash(self) -> str:
        """See `Tokenizer`."""
        return digest_of(f"images {self.shape}".encode())

    def encode(self, data: np.ndarray) -> np.ndarray:
        """Ids of an image, uint8 [H, W, C]: int64 [H * W * C]. Raises TypeError or ValueError for any other array."""
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8:
            raise TypeError(f"data is {getattr(data, 'dtype', type(data).__name__)}: must be an array of uint8")
        if data.shape != self.shape:
            raise ValueError(f"data has shape {data.shape}: must be {self.shape}")
        return data.reshape(-1).astype(np.int64) + FIRST_BYTE

    def encode_pieces(self, pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """See `Tokenizer`; every piece is an image."""
        return map(self.encode, pieces)

    def decode(self, ids: Any) -> np.ndarray:
        """The image, uint8 [H, W, C], of at most H * W * C ids; what is missing is 0, and so is a special id."""
        array = checked_ids(ids, self.vocab_size).astype(np.int64)
        size = math.prod(self.shape)
        if len(array) > size:
            raise ValueError(f"ids are {len(array)}: an image of shape {self.shape} has {size}")
        image = np.zeros(size, dtype=np.uint8)
        image[: len(array)] = np.maximum(array - FIRST_BYTE, 0)
        return image.reshape(self.shape)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """See `Tokenizer`."""
        write_description(folder, self, height=self.height, width=self.width, channels=self.channels)


def read_image(data: bytes, shape: tuple[int, int, int], name: str) -> np.ndarray:
    """The image of a file's bytes as uint8 [H, W, C]; transparency is dropped, and colour where C is 1.

    Raises ValueError, with the name, for what is no image, is cut short, has another size or more than 8 bits a channel.
    """
    pillow = pillow_module()
    try:
        with pillow.open(io.BytesIO(data)) as image:
            size, mode = (image.height, image.width), image.mode
            if size != shape[:2]:
                raise ValueError(
                    f"{name} is an image of {size[0]} by {size[1]} (height by width): must be {shape[0]} by {shape[1]}, "
                    "which data.source.height and data.source.width say"
                )
            if mode not in _EIGHT_BITS:
                raise ValueError(f"{name} is an image of mode {mode}: must have 8 bits a channel")
            array = np.array(image.convert("L" if shape[2] == 1 else "RGB"))
    except (OSError, SyntaxError, EOFError, pillow.DecompressionBombError) as error:
        raise ValueError(f"{name} is not an image, or it is damaged: {' '.join(str(error).split())}") from error
    return array.reshape(shape)


def image_grid(images: np.ndarray, *, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Images, uint8 [N, H, W, C], side by side with black lines of `gap` between: uint8 [height, width, C]. Default: a square.

    Raises ValueError for no image, or another shape or dtype.
    """
    if images.ndim != 4 or images.dtype != np.uint8 or not len(images) or images.shape[-1] not in (1, 3):
        raise ValueError(f"images have shape {images.shape} and dtype {images.dtype}: must be uint8 [N, H, W, 1 or 3], N at least 1")
    number, height, width, channels = images.shape
    across = columns or math.ceil(math.sqrt(number))
    if across < 1 or gap < 0:
        raise ValueError(f"columns = {columns}, gap = {gap}: must be at least 1 and at least 0")
    down = math.ceil(number / across)
    grid = np.zeros((down * (height + gap) - gap, across * (width + gap) - gap, channels), dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = i // across * (height + gap), i % across * (width + gap)
        grid[top : top + height, left : left + width] = image
    return grid


def save_png(path: str | os.PathLike[str], images: np.ndarray, *, columns: int | None = None) -> None:
    """One image, uint8 [H, W, C], or a grid of several, [N, H, W, C], as a PNG file that is whole or absent."""
    array = images if images.ndim == 3 else image_grid(images, columns=columns)
    out = io.BytesIO()
    pillow_module().fromarray(np.ascontiguousarray(array[..., 0] if array.shape[-1] == 1 else array)).save(out, "PNG")
    write_bytes_atomic(Path(path), out.getvalue())


def pillow_module() -> Any:
    """`PIL.Image`, or ImportError that says how to get it."""
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise ImportError('image files need: pip install "vqkit[images]"') from None
    return Image
