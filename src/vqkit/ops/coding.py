"""Vectors become their codes: values, squared error and both gradients, each in one pass over the vectors.

The same as `gather_codes` with an estimator and a squared error behind it, which it is proved against, without their intermediate
tensors: forward and backward run over tiles of rows that stay in cache and keep nothing but their arguments. Each direction is one
opaque node under compile.

Shapes: G codebooks, N vectors, C codes, K width, R rows of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from vqkit.ops.codebook import CodebookStatistics, draw_candidates, gather_codes, moments_around_mean
from vqkit.ops.estimators import rotate_back_, rotation_gradient, rotation_trick, scale_gradient, straight_through
from vqkit.ops.nearest_code import compiled, triton
from vqkit.ops.precision import is_recorded, is_transformed, may_look

_ENTRIES_PER_TILE = 1 << 18


PlainEstimator = Literal["straight_through", "rotation", "none"]


class Coded(NamedTuple):
    """What vectors become by their codes, and what is to be learned from that; only the first two have a gradient."""

    quantized: Tensor  # [G, N, K] the codes, exactly; 0 for index -1; the gradient for x is that of the estimator
    error: Tensor  # [] the mean of (x - code)^2 over the entries of all vectors with a code, 0 without any
    squared_error: Tensor  # [G] the sum of (x - code)^2
    vectors: Tensor  # [G] vectors with a code
    lost: Tensor  # [G] vectors without
    count: Tensor  # [G, C] vectors per code; [G, 0] where not asked for
    sum: Tensor  # [G, C, K] their sum; [G, 0, K] where not asked for
    moments: Tensor  # [G, 2, K] as in `CodebookStatistics`; [G, 2, 0] where not asked for


def coded(
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    *,
    estimator: PlainEstimator,
    count: bool = False,
    pull: float = 0.0,
    passed: float = 0.0,
) -> Coded:
    """x [G, N, K] and codebook [G, C, K], both float32 or both float64, indices [G, N] int64 from -1 to C - 1.

    A vector of index -1 may hold anything; it gives 0, gets no gradient and is not counted. Estimators: "straight_through" and "rotation"
    as the functions of these names; with "none" nothing passes to x but the gradient of the error. The codebook gets `pull` times its
    gradient of the error and `passed` times the gradient of the output, each vector's at its code. What `torch.jit.trace` makes of it is
    operations of torch alone with "none", which then has no gradient, and one of vqkit otherwise.
    """
    learns = codebook.requires_grad and (pull > 0 or passed > 0)
    codebook = codebook if learns else codebook.detach()
    if is_transformed():
        return _in_plain_operations(x, codebook, indices, estimator, count, pull, passed)
    given = (x, codebook, indices, estimator, count, pull, passed)
    if torch.compiler.is_compiling() or (is_recorded() and estimator != "none"):
        quantized, error, *others = _code(*given)
        found = Coded(quantized, error, *(tensor.detach() for tensor in others))
    else:
        found = _forward(x, codebook, indices, count)
        if not ((x.requires_grad or learns) and torch.is_grad_enabled()) or is_recorded():
            return found
        quantized, error = _Coding.apply(found, *given)
    quantized = quantized.detach() if estimator == "none" and not (learns and passed > 0) else quantized
    return found._replace(quantized=quantized, error=error)


def coded_stats(
    x: Tensor, indices: Tensor, found: Coded, ignored: Tensor | None = None, *, num_candidates: int = 0, far: bool = False
) -> CodebookStatistics:
    """What `assignment_stats` makes of x, without gradient, indices and their codes, moments included, from what was counted of them.

    `ignored` [G, N] bool are vectors of index -1 that do not count as `non_finite`. With `far` moments are taken in a
    pass of their own: of codes far from the vectors, beside how far these are apart, what was counted tells them badly.
    """
    none_lost = num_candidates == 0 or (may_look(found.lost) and not found.lost.any())
    return CodebookStatistics(
        found.count,
        found.sum,
        *draw_candidates(x, None if none_lost else indices < 0, num_candidates),
        vectors=found.vectors,
        squared_error=found.squared_error,
        non_finite=found.lost if ignored is None else found.lost - ignored.sum(-1),
        moments=moments_around_mean(x, indices < 0, found.vectors) if far else found.moments,
    )


def _forward(x: Tensor, codebook: Tensor, indices: Tensor, counting: bool) -> Coded:
    if _is_compiled(x):
        return Coded(*compiled.gather_and_count(x, codebook, indices, count=counting))
    x, codebook = x.detach(), codebook.detach()
    look_up = _look_up_in_tiles if x.is_cpu and not (is_recorded() or is_transformed()) else _look_up_at_once
    quantized, errors = look_up(x, codebook, indices)
    squared_error = errors.sum(1)
    lost = (indices < 0).sum(-1)
    vectors = indices.shape[1] - lost
    error = squared_error.sum() / _share(vectors, x)
    count, total = _count(x, indices, codebook.shape[1] if counting else 0)
    moments = _moments(codebook, count, total, errors) if counting else x.new_zeros(len(x), 2, 0)
    return Coded(quantized, error, squared_error, vectors.to(x.dtype), lost.to(x.dtype), count, total, moments)


def _in_plain_operations(
    x: Tensor, codebook: Tensor, indices: Tensor, estimator: PlainEstimator, count: bool, pull: float, passed: float
) -> Coded:
    """As `coded`: what is meant, and for transforms."""
    kept = (indices >= 0).unsqueeze(-1)
    vectors, codes = x.where(kept, 0.0), gather_codes(codebook, indices)
    output = {"straight_through": straight_through, "rotation": rotation_trick, "none": lambda _, plain: plain}[estimator](
        vectors, codes.detach()
    )
    output = output + passed * (codes - codes.detach()) if passed > 0 else output
    error = (vectors - scale_gradient(codes, pull)).square().sum() / _share(kept.sum((1, 2)), x)
    return _forward(x, codebook, indices, count)._replace(quantized=output.where(kept, 0.0), error=error)


def _share(vectors: Tensor, x: Tensor) -> Tensor:
    """[]: the number of entries of so many vectors [G] in all, at least one vector's."""
    return vectors.sum().clamp(min=1) * x.shape[-1]


def _moments(codebook: Tensor, count: Tensor, total: Tensor, errors: Tensor) -> Tensor:
    """Around the mean m: sum (x - m)^2 = sum (x - c)^2 + sum over codes of (c - m) (2 (sum_c - n_c c) + n_c (c - m))."""
    of_all, count = total.sum(1), count.unsqueeze(-1)
    mean = (of_all / count.sum(1).clamp(min=1.0)).unsqueeze(1)
    around = codebook - mean
    between = torch.addcmul(total * 2.0, count, around - 2.0 * codebook).mul_(around).sum(1)
    return torch.stack([of_all, (errors + between).clamp_(min=0.0)], dim=1)


def _look_up_at_once(x: Tensor, codebook: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [G, N, K] and errors [G, K]."""
    quantized = gather_codes(codebook, indices)
    return quantized, (x - quantized).where(indices.unsqueeze(-1) >= 0, 0.0).square().sum(1)


def _look_up_in_tiles(x: Tensor, codebook: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    quantized, errors = x.new_empty(x.shape), x.new_zeros(len(x), x.shape[2])
    for g, rows in _tiles(x):
        codes, lost = _look_up(codebook[g], indices[g, rows], quantized[g, rows])
        difference = x[g, rows] - codes
        if lost is not None:
            difference.masked_fill_(lost, 0.0)
        errors[g] += difference.square_().sum(0)
    return quantized, errors


def _count(x: Tensor, indices: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Vectors per code [G, C] and their sum [G, C, K]."""
    if size == 0:
        return x.new_zeros(len(x), 0), x.new_zeros(len(x), 0, x.shape[2])
    if x.is_cuda and triton.is_there():
        return triton.scatter_statistics(x, indices, size)
    row = torch.where(indices < 0, size, indices)  # one row more, for what has no code
    total = x.new_zeros(len(x), size + 1, x.shape[2])
    for g in range(len(x)):
        total[g].index_add_(0, row[g], x[g])
    count = torch.stack([_histogram(own, size + 1) for own in row]).to(x.dtype)
    return count[:, :size].contiguous(), total[:, :size].contiguous()


def _is_compiled(x: Tensor) -> bool:
    return x.is_cpu and compiled.is_there() and not (is_recorded() or is_transformed())


def _histogram(indices: Tensor, size: int) -> Tensor:
    """[N] -> [size]: how often each index is there."""
    if indices.device.type == "cpu":
        return torch.bincount(indices, minlength=size)
    return indices.new_zeros(size).scatter_add_(0, indices, torch.ones_like(indices))  # bincount would wait for the device


def _tiles(x: Tensor) -> Iterator[tuple[int, slice]]:
    """Codebooks and ranges of their vectors."""
    rows = _rows_per_tile(x)
    return ((g, slice(start, start + rows)) for g in range(len(x)) for start in range(0, x.shape[1], rows))


def _rows_per_tile(x: Tensor) -> int:
    return max(1, _ENTRIES_PER_TILE // max(1, x.shape[-1]))


def _look_up(codebook: Tensor, indices: Tensor, out: Tensor) -> tuple[Tensor, Tensor | None]:
    """Codes [R, K] into `out`, and which rows [R, 1] have none, if any. For CPU, where asking costs nothing."""
    lost = indices < 0
    if not lost.any():
        return torch.index_select(codebook, 0, indices, out=out), None
    lost = lost.unsqueeze(-1)
    return torch.index_select(codebook, 0, indices.clamp(min=0), out=out).masked_fill_(lost, 0.0), lost


def _backward(of_output: Tensor | None, of_error: Tensor | None, x: Tensor, codebook: Tensor, indices: Tensor, estimator: str) -> Tensor:
    """The gradient of x [G, N, K], given those of the output [G, N, K] and of the error []; None: 0."""
    if not x.is_cpu:
        return _whole_backward(of_output, of_error, x, codebook, indices, estimator)
    of_output = None if estimator == "none" else of_output
    if _is_compiled(x):
        pull = 0.0 if of_error is None else of_error.item()
        return compiled.code_gradient(of_output, pull, x, codebook, indices, rotate=estimator == "rotation")
    pull = 0.0 if of_error is None else (2.0 * of_error / _share((indices >= 0).sum(-1), x)).item()
    result = x.new_empty(x.shape)
    for g, rows in _tiles(x):
        vectors, out = x[g, rows], result[g, rows]
        codes, lost = _look_up(codebook[g], indices[g, rows], vectors.new_empty(vectors.shape))
        if estimator == "rotation" and of_output is not None:
            rotate_back_(out, of_output[g, rows], vectors, codes, pull)
        else:
            torch.sub(vectors, codes, out=out).mul_(pull)
            if of_output is not None:
                out.add_(of_output[g, rows])
        if lost is not None:
            out.masked_fill_(lost, 0.0)
    return result


def _whole_backward(
    of_output: Tensor | None,
    of_error: Tensor | None,
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    estimator: str,
    pull: float = 0.0,
) -> Tensor:
    """As `_backward` in plain operations: on devices, and where the gradient itself is to be differentiated."""
    kept = indices.unsqueeze(-1) >= 0
    vectors = x.where(kept, 0.0)
    codes = gather_codes(codebook, indices)
    result = torch.zeros_like(vectors)
    if of_error is not None:
        result = 2.0 * of_error / _share(kept.sum((1, 2)), x) * (vectors - scale_gradient(codes, pull))
    if of_output is not None and estimator == "rotation":
        result = result + rotation_gradient(of_output, vectors.detach(), codes)
    elif of_output is not None and estimator == "straight_through":
        result = result + of_output
    return result.where(kept, 0.0)


def _codebook_backward(
    of_output: Tensor | None, of_error: Tensor | None, x: Tensor, codebook: Tensor, indices: Tensor, pull: float, passed: float
) -> Tensor | None:
    """The gradient of the codebook [G, C, K]: that of each vector, added up by code."""
    if not _is_compiled(x):
        return _whole_codebook_backward(of_output, of_error, x, codebook, indices, pull, passed)
    of_output = of_output if passed > 0 else None
    of_error = of_error if pull > 0 else None
    if of_output is None and of_error is None:
        return None
    of_codes = 0.0 if of_error is None else pull * of_error.item()
    return compiled.codebook_gradient(of_output, of_codes, x, codebook, indices, passed=passed)


def _whole_codebook_backward(
    of_output: Tensor | None, of_error: Tensor | None, x: Tensor, codebook: Tensor, indices: Tensor, pull: float, passed: float
) -> Tensor | None:
    """As `_codebook_backward` in plain operations: on devices, and where the gradient itself is to be differentiated."""
    kept = indices >= 0
    parts = []
    if of_error is not None and pull > 0:
        difference = scale_gradient(gather_codes(codebook, indices), pull) - x.where(kept.unsqueeze(-1), 0.0)
        parts.append(2.0 * pull * of_error / _share(kept.sum(-1), x) * difference)
    if of_output is not None and passed > 0:
        parts.append(of_output if passed == 1 else passed * of_output)
    if not parts:
        return None
    groups, size, width = codebook.shape
    row = torch.where(kept, indices, size)  # one row more, for what has no code
    if groups > 1:
        row = row + torch.arange(groups, device=row.device).unsqueeze(-1) * (size + 1)
    rows = (parts[0] + parts[1] if len(parts) > 1 else parts[0]).reshape(-1, width)
    return rows.new_zeros(groups * (size + 1), width).index_add(0, row.flatten(), rows).view(groups, size + 1, width)[:, :size]


_NO_GRADIENT = (None, None, None, None, None)


def _reaches_x(ctx: Any, of_output: Tensor | None, of_error: Tensor | None) -> bool:
    return of_error is not None or (of_output is not None and ctx.estimator != "none")


class _Coding(torch.autograd.Function):
    """Gives the first two of what was found their gradient."""

    @staticmethod
    def forward(ctx: Any, found: Coded, *given: Any) -> tuple[Tensor, Tensor]:
        _keep(ctx, given, found)
        return found.quantized, found.error

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, codebook, indices = ctx.saved_tensors
        of_x = of_codes = None
        if ctx.needs_input_grad[1] and _reaches_x(ctx, *gradients):
            more = (ctx.pull,) if torch.is_grad_enabled() else ()
            run = _whole_backward if torch.is_grad_enabled() else _backward
            of_x = run(gradients[0], gradients[1], x, codebook, indices, ctx.estimator, *more)
        if ctx.needs_input_grad[2]:
            learn = _whole_codebook_backward if torch.is_grad_enabled() else _codebook_backward
            of_codes = learn(gradients[0], gradients[1], x, codebook, indices, ctx.pull, ctx.passed)
        return None, of_x, of_codes, *_NO_GRADIENT


# Under compile


@torch.library.custom_op("vqkit::code", mutates_args=())
def _code(
    x: Tensor, codebook: Tensor, indices: Tensor, estimator: str, counting: bool, pull: float, passed: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(_forward(x, codebook, indices, counting))  # type: ignore[return-value]


@_code.register_fake
def _(x: Tensor, codebook: Tensor, indices: Tensor, estimator: str, counting: bool, pull: float, passed: float) -> tuple[Tensor, ...]:
    groups, _, width = x.shape
    size = codebook.shape[1] if counting else 0
    shapes = (x.shape, (), (groups,), (groups,), (groups,), (groups, size), (groups, size, width), (groups, 2, width if counting else 0))
    return tuple(x.new_empty(shape) for shape in shapes)


@torch.library.custom_op("vqkit::code_backward", mutates_args=())
def _code_backward(
    of_output: Tensor | None, of_error: Tensor | None, x: Tensor, codebook: Tensor, indices: Tensor, estimator: str
) -> Tensor:
    return _backward(of_output, of_error, x, codebook, indices, estimator)


@_code_backward.register_fake
def _(of_output: Tensor | None, of_error: Tensor | None, x: Tensor, codebook: Tensor, indices: Tensor, estimator: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("vqkit::code_codebook_backward", mutates_args=())
def _code_codebook_backward(
    of_output: Tensor | None, of_error: Tensor | None, x: Tensor, codebook: Tensor, indices: Tensor, pull: float, passed: float
) -> Tensor:
    gradient = _codebook_backward(of_output, of_error, x, codebook, indices, pull, passed)
    return torch.zeros_like(codebook) if gradient is None else gradient.contiguous()


@_code_codebook_backward.register_fake
def _(
    of_output: Tensor | None, of_error: Tensor | None, x: Tensor, codebook: Tensor, indices: Tensor, pull: float, passed: float
) -> Tensor:
    return codebook.new_empty(codebook.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    x, codebook, indices, ctx.estimator, _, ctx.pull, ctx.passed = inputs
    ctx.save_for_backward(x, codebook, indices)


def _differentiate(ctx: Any, of_output: Tensor | None, of_error: Tensor | None, *others: Tensor) -> tuple[Tensor | None, ...]:
    x, codebook, indices = ctx.saved_tensors
    of_x = of_codes = None
    if ctx.needs_input_grad[0] and _reaches_x(ctx, of_output, of_error):
        of_x = _code_backward(of_output, of_error, x, codebook, indices, ctx.estimator)
    if ctx.needs_input_grad[1]:
        of_codes = _code_codebook_backward(of_output, of_error, x, codebook, indices, ctx.pull, ctx.passed)
    return of_x, of_codes, *_NO_GRADIENT


_code.register_autograd(_differentiate, setup_context=_keep)
