"""Which code, or which few codes, of a codebook are nearest to each vector."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from vqkit.ops.codebook import by_codebook, directions, gather_codes
from vqkit.ops.nearest_code import blocked, compiled, reference, triton
from vqkit.ops.precision import is_recorded, is_transformed, widest

Impl = Literal["auto", "reference", "blocked", "compiled", "triton"]
Metric = Literal["euclidean", "cosine"]


def _best(x: Tensor, codebook: Tensor) -> Tensor:
    """The fastest that is there."""
    if x.is_cuda and triton.is_there():
        return triton.nearest_index(x, codebook)
    if x.device.type == codebook.device.type == "cpu" and compiled.is_there():
        return compiled.nearest_index(x, codebook)
    return blocked.nearest_index(x, codebook)


def _best_few(x: Tensor, codebook: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if k <= _FEW and x.device.type == codebook.device.type == "cpu" and compiled.is_there():
        return compiled.nearest_codes(x, codebook, k)
    return blocked.nearest_codes(x, codebook, k)


_ENTRIES_AT_ONCE = {"cpu": 1 << 18}  # of the directions of codes, where many vectors have a codebook of their own
_ENTRIES_AT_ONCE_ELSEWHERE = 1 << 26
_FEW = 64  # up to here the compiled form is the faster one: it holds that many scores of each vector in order

_BACKENDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "auto": _best,
    "reference": reference.nearest_index,
    "blocked": blocked.nearest_index,
    "compiled": compiled.nearest_index,
    "triton": triton.nearest_index,
}
_BACKENDS_K: dict[str, Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]] = {
    "auto": _best_few,
    "reference": reference.nearest_codes,
    "blocked": blocked.nearest_codes,
    "compiled": compiled.nearest_codes,
}


class NearestCode(NamedTuple):
    """The code of each vector, and how far it is."""

    indices: Tensor  # [..., N] int64, or [..., N, k]; -1 for a vector that is not finite
    squared_distance: Tensor  # the same shape; float32, or float64 for float64 inputs; 0 where the index is -1


def nearest_code(x: Tensor, codebook: Tensor, *, metric: Metric = "euclidean", impl: Impl = "auto") -> NearestCode:
    """The code of least distance for each vector, the lowest index among equals.

    x [..., N, K], codebook [..., C, K]; leading axes broadcast. The arithmetic is float32, or float64 where either input is, whatever
    autocast says. The distance is that of the chosen code by explicit differences. A vector that holds NaN or infinity, or whose
    squared distance overflows, gets index -1 and distance 0, and changes nothing for others. Neither output carries a gradient.

    Metrics: "euclidean"; "cosine" is the euclidean distance of the directions, of vectors and codes alike, whose square is
    2 - 2 * cosine; zero has direction zero. Implementations: "reference" computes all differences, "blocked" works on tiles of scores
    and settles close races by explicit differences, "compiled" does so in C++ (see compiled.py) and "triton" on
    CUDA; "auto" takes these two where they are there (compiled.is_there, triton.is_there), else "blocked". Raises TypeError for tensors
    that are not floating point, ValueError for shapes that do not fit, an empty codebook and an unknown `metric` or `impl`.
    """
    _validate(x, codebook, metric, impl)
    x, codebook = _comparable(*_of_one_dtype(x, codebook), metric)
    indices = _nearest_index(x, codebook, "euclidean", impl)
    with torch.no_grad():
        error = (x - gather_codes(codebook, indices)).square_().sum(-1)
        return NearestCode(indices, error.masked_fill_(indices < 0, 0.0))


def nearest_index(x: Tensor, codebook: Tensor, *, metric: Metric = "euclidean", impl: Impl = "auto") -> Tensor:
    """`nearest_code(x, codebook, metric=metric, impl=impl).indices`, without the cost of the distance."""
    _validate(x, codebook, metric, impl)
    return _nearest_index(*_of_one_dtype(x, codebook), metric, impl)


def nearest_codes(
    x: Tensor, codebook: Tensor, k: int, *, metric: Metric = "euclidean", impl: Literal["auto", "reference", "blocked", "compiled"] = "auto"
) -> NearestCode:
    """The `k` nearest codes of each vector, nearest first, the lower index first among equals: both fields [..., N, k].

    Otherwise as `nearest_code`. Raises ValueError unless 1 <= k <= C.
    """
    _validate(x, codebook, metric, impl, _BACKENDS_K)
    if not 1 <= k <= codebook.shape[-2]:
        raise ValueError(f"k = {k}: must be from 1 to {codebook.shape[-2]}, the size of the codebook")
    vectors, codes, restore = by_codebook(*_of_one_dtype(x, codebook))
    run = _operator_k if torch.compiler.is_compiling() or is_transformed() else _compute_k
    return NearestCode(*(restore(tensor) for tensor in run(vectors, codes, k, metric, impl)))


def _comparable(x: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Such that the euclidean distance is meant."""
    return (directions(x), directions(codebook)) if metric == "cosine" else (x, codebook)


def _of_one_dtype(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """That of the arithmetic."""
    dtype = widest(x, codebook)
    return x.detach().to(dtype), codebook.detach().to(dtype)


def _nearest_index(x: Tensor, codebook: Tensor, metric: str, impl: str) -> Tensor:
    vectors, codes, restore = by_codebook(x, codebook)
    opaque = torch.compiler.is_compiling() or is_transformed()
    run = _operator if opaque else _compute  # one opaque node: its loops depend on values
    return restore(run(vectors, codes, metric, impl))


def _validate(x: Tensor, codebook: Tensor, metric: str, impl: str, backends: Collection[str] = _BACKENDS) -> None:
    for name, tensor in (("x", x), ("codebook", codebook)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}: must be floating point")
        if tensor.dim() < 2:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: must have at least the two axes [vectors or codes, width]")
    if x.shape[-1] != codebook.shape[-1]:
        raise ValueError(f"x has width {x.shape[-1]}: must be {codebook.shape[-1]}, the width of the codebook")
    if codebook.shape[-2] == 0:
        raise ValueError(f"codebook has shape {tuple(codebook.shape)}: must hold at least one code")
    if metric not in ("euclidean", "cosine"):
        raise ValueError(f'metric = {metric!r}: must be "euclidean" or "cosine"')
    if impl not in backends:
        raise ValueError(f"impl = {impl!r}: must be one of {', '.join(map(repr, backends))}")
    if x.shape[:-2] == codebook.shape[:-2]:
        return
    try:
        torch.broadcast_shapes(x.shape[:-2], codebook.shape[:-2])
    except RuntimeError:
        shapes = f"{tuple(x.shape[:-2])} of x and {tuple(codebook.shape[:-2])} of codebook"
        raise ValueError(f"the leading axes {shapes} do not broadcast") from None


def _compute(x: Tensor, codebook: Tensor, metric: str, impl: str) -> Tensor:
    nearest = _BACKENDS["reference" if is_recorded() else impl]
    found = [nearest(*part) for part in _parts(x, codebook, metric)]
    return found[0] if len(found) == 1 else torch.cat(found)


def _compute_k(x: Tensor, codebook: Tensor, k: int, metric: str, impl: str) -> tuple[Tensor, Tensor]:
    nearest = _BACKENDS_K["reference" if is_recorded() else impl]
    found = [nearest(*part, k) for part in _parts(x, codebook, metric)]
    if len(found) == 1:
        return found[0]
    indices, distances = zip(*found, strict=True)
    return torch.cat(indices), torch.cat(distances)


def _parts(x: Tensor, codebook: Tensor, metric: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Such that the euclidean distance is meant; directions of few codebooks at a time."""
    if metric == "euclidean":
        yield x, codebook
        return
    at_once = _ENTRIES_AT_ONCE.get(codebook.device.type, _ENTRIES_AT_ONCE_ELSEWHERE)
    together = max(1, at_once // max(1, codebook.shape[1:].numel()))
    for vectors, codes in zip(x.split(together), codebook.split(together), strict=True):
        yield _comparable(vectors, codes, metric)


@torch.library.custom_op("vqkit::nearest_index", mutates_args=())
def _operator(x: Tensor, codebook: Tensor, metric: str, impl: str) -> Tensor:
    return _compute(x, codebook, metric, impl)


@_operator.register_fake
def _(x: Tensor, codebook: Tensor, metric: str, impl: str) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.int64)


@torch.library.custom_op("vqkit::nearest_codes", mutates_args=())
def _operator_k(x: Tensor, codebook: Tensor, k: int, metric: str, impl: str) -> tuple[Tensor, Tensor]:
    return _compute_k(x, codebook, k, metric, impl)


@_operator_k.register_fake
def _(x: Tensor, codebook: Tensor, k: int, metric: str, impl: str) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], k)
    return x.new_empty(shape, dtype=torch.int64), x.new_empty(shape)


def _batched(run: Callable[..., Any]) -> Callable[..., Any]:
    """An operator as `torch.func.vmap` sees it: more vectors, of the same codebooks or of more of them."""

    def rule(info: Any, in_dims: tuple[int | None, ...], x: Tensor, codebook: Tensor, *given: Any) -> Any:
        num, (of_x, of_codes) = info.batch_size, in_dims[:2]
        vectors = x.expand(num, *x.shape) if of_x is None else x.movedim(of_x, 0)  # [B, G, N, K]
        shared = of_codes is None
        vectors = vectors.transpose(0, 1).flatten(1, 2) if shared else vectors.flatten(0, 1)
        found = run(vectors, codebook if shared else codebook.movedim(of_codes, 0).flatten(0, 1), *given)

        def part(result: Tensor) -> Tensor:
            return result.unflatten(1, (num, -1)).transpose(0, 1) if shared else result.unflatten(0, (num, -1))

        return (part(found), 0) if isinstance(found, Tensor) else (tuple(map(part, found)), (0,) * len(found))

    return rule


_operator.register_vmap(_batched(_operator))
_operator_k.register_vmap(_batched(_operator_k))
