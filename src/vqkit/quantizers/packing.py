"""Indices as bytes and back: each takes as many bits as the codebook needs, none is lost at the borders of bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def bits_per_index(codebook_size: int) -> int:
    """How many bits tell the indices 0 ... codebook_size - 1 apart; 0 for one code."""
    if codebook_size < 1:
        raise ValueError(f"codebook_size = {codebook_size}: must be at least 1")
    return (codebook_size - 1).bit_length()


def pack_indices(indices: Tensor, codebook_size: int) -> bytes:
    """Indices of any shape, integers from 0 to codebook_size - 1, in row-major order: ceil(numel * bits / 8) bytes.

    Each index takes `bits_per_index(codebook_size)` bits, its highest first; zeros fill up the last byte. The shape is not stored. For a
    quantizer whose codebooks differ in size pack each codebook's indices by themselves.
    Raises TypeError for indices that are not integers, ValueError for one out of range: -1, no code, has no place in a stream.
    """
    if indices.dtype == torch.bool or indices.is_floating_point() or indices.is_complex():
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

    Raises ValueError for data of another length than the shape asks for, with an index out of range, or with bits behind the last index.
    """
    bits = bits_per_index(codebook_size)
    if any(length < 0 for length in shape):
        raise ValueError(f"shape = {tuple(shape)}: lengths must not be negative")
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
