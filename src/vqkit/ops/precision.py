"""Arithmetic that is as wide as it says, whatever the user allows elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


def widest(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 where any of the tensors is."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


@contextlib.contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """No autocast, and no matrix product that rounds float32 to something shorter."""
    matmul = torch.backends.cuda.matmul if device_type == "cuda" else torch.backends.mkldnn.matmul  # pyrefly: ignore[missing-attribute]
    allowed = matmul.fp32_precision
    shorter = allowed in ("bf16", "tf32")
    off = torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else contextlib.nullcontext()
    with off:
        if shorter:
            matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            if shorter:
                matmul.fp32_precision = allowed
