"""Arithmetic that is as wide as it says, whatever the user allows elsewhere."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def widest(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 where any of the tensors is."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor.dtype is not dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`; itself where it has that, without the price of asking torch."""
    return x if x.dtype is dtype else x.to(dtype)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """Autocast switched off, where it is on; the meta device knows none."""
    known = device_type == "cpu" or torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if known and torch.is_autocast_enabled(device_type) else _NOTHING


_NOTHING = contextlib.nullcontext()


def full_precision(device_type: str) -> contextlib.AbstractContextManager[object]:
    """No autocast, and no matrix product that rounds float32 to something shorter."""
    matmul = torch.backends.cuda.matmul if device_type == "cuda" else torch.backends.mkldnn.matmul  # pyrefly: ignore[missing-attribute]
    allowed = matmul.fp32_precision
    return _ieee(matmul, allowed, device_type) if allowed in ("bf16", "tf32") else without_autocast(device_type)


@contextlib.contextmanager
def _ieee(matmul: Any, allowed: str, device_type: str) -> Iterator[None]:
    with without_autocast(device_type):
        matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = allowed


def is_finite(x: Tensor) -> bool:
    """Whether it is known, where asking costs nothing, that all of x and the sum of its squares are finite."""
    return may_look(x) and math.isfinite(torch.linalg.vector_norm(x.detach() if x.requires_grad else x, dtype=widest(x)))


def finite_rows(x: Tensor) -> Tensor:
    """[..., K] -> [...] bool: whether all of a row is finite. Several times as fast as `isfinite().all(-1)`."""
    if known_finite(x):
        return x.new_ones(x.shape[:-1], dtype=torch.bool)
    return (x.detach() * 0.0).sum(-1) == 0.0


def known_finite(x: Tensor) -> bool:
    """Whether it is known, where asking costs nothing, that all of x is finite: in one pass over it, the usual case."""
    return may_look(x) and math.isfinite(x.detach().sum())


def may_look(x: Tensor) -> bool:
    """Whether a value of x can be asked for at no cost: not in programs that are traced, and not where that waits for a device."""
    return x.is_cpu and not is_traced()


def may_keep(x: Tensor) -> bool:
    """Whether a constant that is made beside x may serve other calls: one that is traced, or of another kind, is of its program alone."""
    return type(x) is Tensor and not is_traced()


def is_traced() -> bool:
    """Whether a compiler, an exporter, a functorch transform or `torch.jit.trace` sees what is done."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch._C._is_tracing()


def is_recorded() -> bool:
    """Whether `torch.jit.trace`, or an exporter by it, keeps the operations of torch, and as a constant what is done elsewhere."""
    return torch._C._is_tracing()


def is_transformed() -> bool:
    """Whether a transform of `torch.func` sees what is done."""
    return torch._C._are_functorch_transforms_active()


def holds_in_all(right: Tensor) -> bool:
    """Whether `right` [] bool holds in each of the calls that transforms of `torch.func` make one."""
    layers: Any = torch._C._functorch
    while layers.is_functorch_wrapped_tensor(right):
        right = layers.get_unwrapped(right)
    return bool(right.all())
