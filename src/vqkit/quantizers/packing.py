"""Indices as bytes and back: each takes as many bits as the codebook needs, none is lost at the borders of bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vqkit.quantizers.config import check_count
from vqkit.quantizers.layout import check_tensor, is_integer


def bits_per_index(codebook_size: int) -> int:
    """How many bits tell the indices 0 ... codebook_size - 1 apart; 0 for one code."""
    check_count("codebook_size", codebook_size)
    return (codebook_size - 1).bit_length()


def pack_indices(indices: Tensor, codebook_size: int) -> bytes:
    """Indices of any shape, integers from 0 to codebook_size - 1, in row-major order: ceil(numel * bits / 8) bytes.

    Each index takes `bits_per_index(codebook_size)` bits, its highest first; zeros fill up the last byte. The shape is not stored. For a
    quantizer whose codebooks differ in size pack each codebook's indices by themselves.
    Raises TypeError for indices that are not integers, ValueError for one out of range: -1, no code, has no place in a stream.
    """
    check_tensor("indices", indices)
    if not is_integer(indices):
        raise TypeError(f"indices is {indices.dtype}: must be integer")
    bits = bits_per_index(codebook_size)
    values = indices.detach().to("cpu", torch.int64).reshape(-1)
    if values.numel():
        lowest, highest = (int(value) for value in values.aminmax())
        if lowest < 0 or highest >= codebook_size:
            raise ValueError(f"indices lie in {lowest} ... {highest}: must lie in 0 ... {codebook_size - 1}")
    digits = torch.zeros(-(-values.numel() * bits // 8) * 8, dtype=torch.uint8, device="cpu")
    table = digits[: values.numel() * bits].view(values.numel(), bits)
    for place in range(bits):
        table[:, place] = values >> (bits - 1 - place) & 1
    return (digits.view(-1, 8) * _places()).sum(-1, dtype=torch.uint8).numpy().tobytes()


def unpack_indices(data: bytes, codebook_size: int, shape: Sequence[int]) -> Tensor:
    """The indices [*shape] int64 that `pack_indices` made `data` of.

    Raises ValueError for data of another length than the shape asks for, with an index out of range, or with bits behind the last index,
    TypeError for what is not bytes, and shapes that are no integers.
    """
    bits = bits_per_index(codebook_size)
    if not isinstance(data, bytes | bytearray | memoryview):
        raise TypeError(f"data is of type {type(data).__name__}: must be bytes")
    if not isinstance(shape, Sequence):
        raise TypeError(f"shape is of type {type(shape).__name__}: must be a sequence of lengths")
    for axis, length in enumerate(shape):
        check_count(f"shape[{axis}]", length, least=0)
    num = math.prod(shape)
    if len(data) != (expected := -(-num * bits // 8)):
        raise ValueError(f"data has {len(data)} bytes: must be {expected} for indices of shape {tuple(shape)} with {bits} bits each")
    stored = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8, device="cpu")
    digits = (stored.unsqueeze(-1) & _places()).ne(0).reshape(-1)
    if digits[num * bits :].any():
        raise ValueError("data has bits behind its last index: it was packed with another codebook_size or shape")
    values = torch.zeros(num, dtype=torch.int64, device="cpu")
    for place in range(bits):
        values = values << 1 | digits[place : num * bits : bits]
    if num and (highest := int(values.max())) >= codebook_size:
        raise ValueError(f"data holds index {highest}: must be below codebook_size = {codebook_size}")
    return values.reshape(tuple(shape))


def _places() -> Tensor:
    """What each bit of a byte is worth, highest first."""
    return torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device="cpu")
