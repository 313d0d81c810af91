"""Vectors become their codes: values, squared error and both gradients, each in one pass over the vectors.

The same as `gather_codes` with an estimator and a squared error behind it, which it is proved against, without their intermediate
tensors: forward and backward run over tiles of rows that stay in cache and keep nothing but their arguments. On CPU the gradient of the
rotation is the sum of three rows, of the gradient, the vector and its code, by factors that follow from their products; rows for which
these would lose precision take the long way. Each direction is one opaque node under compile.

Shapes: G codebooks, N vectors, C codes, K width, R rows of a tile.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from vqkit.ops.codebook import gather_codes
from vqkit.ops.estimators import SMALLEST_RATIO, rotation_gradient

_ENTRIES_PER_TILE = 1 << 17
_SMALLEST_ANGLE = 0.05  # of |e + q|^2: below it the factors of the rotation lose more than a digit or two


class Coded(NamedTuple):
    """What vectors become by their codes."""

    quantized: Tensor  # [G, N, K] the codes, exactly; 0 for index -1; the gradient for x is that of the estimator
    squared_error: Tensor  # [G] the sum of |x - code|^2 over vectors with a code; differentiable in x, the codes being constants


def coded(x: Tensor, codebook: Tensor, indices: Tensor, *, estimator: Literal["straight_through", "rotation", "none"]) -> Coded:
    """x [G, N, K] and codebook [G, C, K], both float32 or both float64, indices [G, N] int64 from -1 to C - 1.

    A vector of index -1 may hold anything; it gives 0 and gets no gradient. The codebook gets no gradient. Estimators: "straight_through"
    and "rotation" as the functions of these names; with "none" nothing passes but the gradient of the error.
    """
    codebook = codebook.detach()
    if torch.compiler.is_compiling():
        return Coded(*_code(x, codebook, indices, estimator))
    return Coded(*_Coding.apply(x, codebook, indices, estimator))


def _forward(x: Tensor, codebook: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    quantized, error = x.new_empty(x.shape), x.new_zeros(len(x))
    if x.device.type != "cpu":
        quantized = gather_codes(codebook, indices)
        return quantized, (x - quantized).where(indices.unsqueeze(-1) >= 0, 0.0).square_().sum((1, 2))
    for g in range(len(x)):
        rows = _rows_per_tile(x)
        buffer = x.new_empty(min(rows, x.shape[1]), x.shape[2])
        for start in range(0, x.shape[1], rows):
            here = slice(start, start + rows)
            codes, lost = _look_up(codebook[g], indices[g, here], quantized[g, here])
            difference = torch.sub(x[g, here], codes, out=buffer[: len(codes)])
            if lost is not None:
                difference.masked_fill_(lost, 0.0)
            error[g] += torch.dot(difference.view(-1), difference.view(-1))
    return quantized, error


def _rows_per_tile(x: Tensor) -> int:
    return max(1, _ENTRIES_PER_TILE // max(1, x.shape[-1]))


def _look_up(codebook: Tensor, indices: Tensor, out: Tensor) -> tuple[Tensor, Tensor | None]:
    """Codes [R, K] into `out`, and which rows [R, 1] have none, if any. For CPU, where asking costs nothing."""
    lost = indices < 0
    if not lost.any():
        return torch.index_select(codebook, 0, indices, out=out), None
    lost = lost.unsqueeze(-1)
    return torch.index_select(codebook, 0, indices.clamp(min=0), out=out).masked_fill_(lost, 0.0), lost


def _backward(of_output: Tensor, of_error: Tensor, x: Tensor, codebook: Tensor, indices: Tensor, estimator: str) -> Tensor:
    """The gradient of x [G, N, K], given those of the output [G, N, K] and of the errors [G]."""
    if x.device.type != "cpu":
        return _whole_backward(of_output, of_error, x, codebook, indices, estimator)
    result = x.new_empty(x.shape)
    rows = _rows_per_tile(x)
    for g in range(len(x)):
        pull = float(2.0 * of_error[g])
        buffer = x.new_empty(min(rows, x.shape[1]), x.shape[2])
        for start in range(0, x.shape[1], rows):
            here = slice(start, start + rows)
            vectors, gradient, out = x[g, here], of_output[g, here], result[g, here]
            codes, lost = _look_up(codebook[g], indices[g, here], buffer[: len(vectors)])
            if estimator == "rotation":
                _rotate_back(gradient, vectors, codes, pull, out)
            else:
                torch.sub(vectors, codes, out=out).mul_(pull)
                if estimator == "straight_through":
                    out.add_(gradient)
            if lost is not None:
                out.masked_fill_(lost, 0.0)
    return result


def _whole_backward(of_output: Tensor, of_error: Tensor, x: Tensor, codebook: Tensor, indices: Tensor, estimator: str) -> Tensor:
    """As `_backward` in plain operations: on devices, and where the gradient itself is to be differentiated."""
    kept = indices.unsqueeze(-1) >= 0
    vectors = x.where(kept, 0.0)
    codes = gather_codes(codebook, indices)
    result = 2.0 * of_error[:, None, None] * (vectors - codes)
    if estimator == "rotation":
        result = result + rotation_gradient(of_output, vectors.detach(), codes)
    elif estimator == "straight_through":
        result = result + of_output
    return result.where(kept, 0.0)


def _rotate_back(gradient: Tensor, x: Tensor, codes: Tensor, pull: float, out: Tensor) -> None:
    """Into `out` the gradient of the rotation plus pull * (x - codes), all [R, K].

    With unit vectors e of x and q of the code, m = |e + q|^2 and h = g.(e + q) / m, the transpose of the map of `rotation_trick` is
    scale * (g + 2 (g.q - h) e - 2 h q) + (1 - rotating) * g: a sum of the rows g, x and code.
    """
    dtype = x.dtype
    of_x, of_code = torch.linalg.vector_norm(x, dim=-1), torch.linalg.vector_norm(codes, dim=-1)
    along_e, along_q = torch.linalg.vecdot(gradient, x) / of_x, torch.linalg.vecdot(gradient, codes) / of_code
    angle = 2.0 + 2.0 * torch.linalg.vecdot(x, codes) / (of_x * of_code)
    ratio = of_code / of_x
    turn = (along_e + along_q) / angle
    of_vector = torch.addcmul(turn.new_full((), pull), ratio / of_x, along_q - turn, value=2.0)
    of_codes = torch.addcdiv(turn.new_full((), -pull), turn, of_x, value=-2.0)
    torch.mul(gradient, ratio.unsqueeze(-1), out=out)
    out.addcmul_(x, of_vector.unsqueeze(-1)).addcmul_(codes, of_codes.unsqueeze(-1))
    lengths = torch.stack([of_x, of_code])
    right = (angle > _SMALLEST_ANGLE) & (ratio > SMALLEST_RATIO) & (ratio < 1.0 / SMALLEST_RATIO)
    safe = torch.finfo(dtype).max ** 0.25
    row = (~(right & ((lengths > 1.0 / safe) & (lengths < safe)).all(0))).nonzero().squeeze(-1)
    if row.numel():
        vectors = x[row].where(x[row].isfinite(), 0.0)
        out[row] = rotation_gradient(gradient[row], vectors, codes[row]) + pull * (vectors - codes[row])


class _Coding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codebook: Tensor, indices: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, codebook, indices)
        ctx.estimator = estimator
        return _forward(x, codebook, indices)

    @staticmethod
    def backward(ctx: Any, of_output: Tensor, of_error: Tensor) -> tuple[Tensor | None, ...]:
        run = _whole_backward if torch.is_grad_enabled() else _backward
        return run(of_output, of_error, *ctx.saved_tensors, ctx.estimator), None, None, None


# Under compile


@torch.library.custom_op("vqkit::code", mutates_args=())
def _code(x: Tensor, codebook: Tensor, indices: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    return _forward(x, codebook, indices)


@_code.register_fake
def _(x: Tensor, codebook: Tensor, indices: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:1])


@torch.library.custom_op("vqkit::code_backward", mutates_args=())
def _code_backward(of_output: Tensor, of_error: Tensor, x: Tensor, codebook: Tensor, indices: Tensor, estimator: str) -> Tensor:
    return _backward(of_output, of_error, x, codebook, indices, estimator)


@_code_backward.register_fake
def _(of_output: Tensor, of_error: Tensor, x: Tensor, codebook: Tensor, indices: Tensor, estimator: str) -> Tensor:
    return x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, codebook, indices, ctx.estimator = inputs
    ctx.save_for_backward(x, codebook, indices)


def _differentiate(ctx: Any, of_output: Tensor, of_error: Tensor) -> tuple[Tensor | None, ...]:
    return _code_backward(of_output, of_error, *ctx.saved_tensors, ctx.estimator), None, None, None


_code.register_autograd(_differentiate, setup_context=_keep)
