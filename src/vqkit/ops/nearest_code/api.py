"""Which code of a codebook is nearest to each vector."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vqkit.ops.codebook import gather_codes
from vqkit.ops.nearest_code import blocked, reference

Impl = Literal["auto", "reference", "blocked"]

_BACKENDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "auto": blocked.nearest_index,
    "blocked": blocked.nearest_index,
    "reference": reference.nearest_index,
}


class NearestCode(NamedTuple):
    """The code of each vector, and how far it is."""

    indices: Tensor  # [..., N] int64; -1 for a vector that is not finite
    squared_distance: Tensor  # [..., N] float32, or float64 for float64 inputs; 0 where the index is -1


def nearest_code(x: Tensor, codebook: Tensor, *, impl: Impl = "auto") -> NearestCode:
    """The code of least euclidean distance for each vector, the lowest index among equals.

    x [..., N, K], codebook [..., C, K]; leading axes broadcast. The arithmetic is float32, or float64 where either input is, whatever
    autocast says. The distance is that of the chosen code by explicit differences. A vector that holds NaN or infinity, or whose
    squared distance overflows, gets index -1 and distance 0, and changes nothing for others. Neither output carries a gradient.

    Implementations: "reference" computes all differences, "blocked" works on tiles of scores and settles close races by explicit
    differences. Raises TypeError for tensors that are not floating point, ValueError for shapes that do not fit, an empty codebook
    and an unknown `impl`.
    """
    indices = nearest_index(x, codebook, impl=impl)
    with torch.no_grad():
        dtype = _arithmetic(x, codebook)
        codes = gather_codes(codebook.to(dtype), indices)
        error = (x.to(dtype) - codes).square_().sum(-1)
        return NearestCode(indices, error.masked_fill_(indices < 0, 0.0))


def nearest_index(x: Tensor, codebook: Tensor, *, impl: Impl = "auto") -> Tensor:
    """`nearest_code(x, codebook, impl=impl).indices`, without the cost of the distance."""
    _validate(x, codebook, impl)
    dtype = _arithmetic(x, codebook)
    x, codebook = x.detach().to(dtype), codebook.detach().to(dtype)
    leading = torch.broadcast_shapes(x.shape[:-2], codebook.shape[:-2])
    own = (1,) * (len(leading) - codebook.dim() + 2) + tuple(codebook.shape[:-2])
    # Axes along which the codebook differs go to the front, all others are one more axis of vectors.
    groups = [axis for axis, length in enumerate(own) if length > 1]
    shared = [axis for axis, length in enumerate(own) if length == 1]
    order = [*groups, *shared, len(leading)]
    vectors = x.expand(*leading, *x.shape[-2:]).permute(*order, len(leading) + 1)
    rows = vectors.shape[:-1]
    num_groups = codebook.shape[:-2].numel()
    index = _run(vectors.reshape(num_groups, -1, x.shape[-1]), codebook.reshape(num_groups, *codebook.shape[-2:]), impl)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return index.view(rows).permute(inverse).contiguous()


def _validate(x: Tensor, codebook: Tensor, impl: str) -> None:
    for name, tensor in (("x", x), ("codebook", codebook)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}: must be floating point")
        if tensor.dim() < 2:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: must have at least the two axes [vectors or codes, width]")
    if x.shape[-1] != codebook.shape[-1]:
        raise ValueError(f"x has width {x.shape[-1]}: must be {codebook.shape[-1]}, the width of the codebook")
    if codebook.shape[-2] == 0:
        raise ValueError(f"codebook has shape {tuple(codebook.shape)}: must hold at least one code")
    if impl not in _BACKENDS:
        raise ValueError(f"impl = {impl!r}: must be one of {', '.join(map(repr, _BACKENDS))}")
    try:
        torch.broadcast_shapes(x.shape[:-2], codebook.shape[:-2])
    except RuntimeError:
        shapes = f"{tuple(x.shape[:-2])} of x and {tuple(codebook.shape[:-2])} of codebook"
        raise ValueError(f"the leading axes {shapes} do not broadcast") from None


def _arithmetic(x: Tensor, codebook: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)


def _run(x: Tensor, codebook: Tensor, impl: str) -> Tensor:
    """x [G, N, K], codebook [G, C, K] -> [G, N]; one opaque node under compile, whose loops depend on values."""
    if torch.compiler.is_compiling():
        return _operator(x, codebook, impl)
    return _compute(x, codebook, impl)


def _compute(x: Tensor, codebook: Tensor, impl: str) -> Tensor:
    with torch.no_grad(), _full_precision(x.device.type):
        return _BACKENDS[impl](x, codebook)


@contextlib.contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    """No autocast, and no matrix product that rounds float32 to something shorter, whatever the user allows elsewhere."""
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


@torch.library.custom_op("vqkit::nearest_index", mutates_args=())
def _operator(x: Tensor, codebook: Tensor, impl: str) -> Tensor:
    return _compute(x, codebook, impl)


@_operator.register_fake
def _(x: Tensor, codebook: Tensor, impl: str) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.int64)
