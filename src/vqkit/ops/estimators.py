"""Gradient estimators through the choice of a code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vqkit.ops.codebook import polar
from vqkit.ops.nearest_code import compiled
from vqkit.ops.precision import is_traced, widest, without_autocast

SMALLEST_RATIO = 0.01
"""Of the lengths of a vector and its code: above it the rotation is whole."""
_SMALLEST_ANGLE = 0.05  # of |e + q|^2: below it the factors of the rotation lose more than a digit or two
_ENTRIES_PER_TILE = 1 << 18


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x, through which `factor` times the gradient passes."""
    if factor == 0.0:
        return x.detach()
    if factor == 1.0 or not x.requires_grad:
        return x
    constant = x.detach()
    return constant + factor * (x - constant)


def straight_through(x: Tensor, quantized: Tensor) -> Tensor:
    """`quantized` in value, exactly, with the gradient of the output handed to `x` unchanged (Bengio et al., 2013).

    Both have the same shape and dtype; `quantized` gets no gradient. x must be finite.
    """
    _check_alike(x, quantized)
    return (x - x.detach()).add_(quantized.detach())  # the usual x + (quantized - x).detach() would round


def rotation_trick(x: Tensor, quantized: Tensor) -> Tensor:
    """`quantized` in value, exactly; the gradient for x is that of the rotation and scaling that takes x to it (Fifty et al., 2024).

    x, quantized [..., K] of the same shape and dtype; `quantized` gets no gradient; x must be finite. With unit vectors e of x, q of
    the code and r of e + q, the map is |code| / |x| (I - 2 r r' + 2 q e'), a constant of the gradient (section 4.2 there).
    Where one of the two lengths falls below 1 / 100 of the other, where that map has no meaning or explodes, it passes smoothly into
    the identity of `straight_through`, which it is when either is zero: no gradient grows by more than a factor of 113.
    """
    _check_alike(x, quantized)
    if torch._C._are_functorch_transforms_active() or (torch.compiler.is_compiling() and x.device.type != "cpu"):
        return _rotated(x, quantized)
    run = _rotate if torch.compiler.is_compiling() else _Rotation.apply
    return run(x, quantized.detach())


def _rotated(x: Tensor, quantized: Tensor) -> Tensor:
    """In plain operations, for functorch transforms and for compilers of devices, which make one of them."""
    dtype = widest(x)
    vector = x.to(dtype)
    e, q, r, scale, rotating = _rotation(vector.detach(), quantized.detach().to(dtype))
    along_r, along_e = ((vector * unit).sum(-1, keepdim=True) for unit in (r, e))
    rotated = scale * (vector - 2.0 * along_r * r + 2.0 * along_e * q) + (1.0 - rotating) * vector
    return quantized.detach() + (rotated - rotated.detach()).to(x.dtype)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Tensor) -> Tensor:
        ctx.save_for_backward(x, quantized)
        return quantized.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        x, quantized = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient itself is to be differentiated
            return rotation_gradient(gradients[0], x, quantized).to(x.dtype), None
        return _rotate_back(gradients[0], x, quantized), None


def _rotate_back(gradient: Tensor, x: Tensor, quantized: Tensor) -> Tensor:
    """`rotation_gradient` in the dtype of x; on CPU in one pass, in C++ or in tiles that stay in cache."""
    if not x.is_cpu:
        return rotation_gradient(gradient, x, quantized).to(x.dtype)
    given = [tensor.to(widest(x)).reshape(-1, x.shape[-1]) for tensor in (gradient, x, quantized)]
    if x.numel() and compiled.is_there():
        rows = [tensor.unsqueeze(0) for tensor in given]
        own = torch.arange(rows[1].shape[1]).unsqueeze(0)  # each vector has a code of its own
        return compiled.code_gradient(rows[0], 0.0, rows[1], rows[2], own, rotate=True).reshape(x.shape).to(x.dtype)
    result = torch.empty_like(given[1], memory_format=torch.contiguous_format)
    rows = max(1, _ENTRIES_PER_TILE // max(1, x.shape[-1]))
    for tile in zip(*(tensor.split(rows) for tensor in (result, *given)), strict=True):
        rotate_back_(*tile)
    return result.reshape(x.shape).to(x.dtype)


@torch.library.custom_op("vqkit::rotate", mutates_args=())
def _rotate(x: Tensor, quantized: Tensor) -> Tensor:
    return quantized.clone()


@_rotate.register_fake
def _(x: Tensor, quantized: Tensor) -> Tensor:
    return torch.empty_like(quantized)


@torch.library.custom_op("vqkit::rotate_back", mutates_args=())
def _rotate_back_operator(gradient: Tensor, x: Tensor, quantized: Tensor) -> Tensor:
    return _rotate_back(gradient, x, quantized)


@_rotate_back_operator.register_fake
def _(gradient: Tensor, x: Tensor, quantized: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return _rotate_back_operator(gradient, *ctx.saved_tensors), None


_rotate.register_autograd(_differentiate, setup_context=_keep)


def rotation_gradient(gradient: Tensor, x: Tensor, quantized: Tensor) -> Tensor:
    """What `rotation_trick` makes of the gradient of its output: [..., K] float32 or wider, all of one shape; x must be finite."""
    dtype = widest(x)
    gradient = gradient.to(dtype)
    e, q, r, scale, rotating = _rotation(x.detach().to(dtype), quantized.detach().to(dtype))
    along_r, along_q = ((gradient * unit).sum(-1, keepdim=True) for unit in (r, q))
    return scale * (gradient - 2.0 * along_r * r + 2.0 * along_q * e) + (1.0 - rotating) * gradient


def rotate_back_(out: Tensor, gradient: Tensor, x: Tensor, codes: Tensor, pull: float = 0.0) -> None:
    """Write into `out` `rotation_gradient(gradient, x, codes)` plus pull * (x - codes), all [N, K] and of one dtype; for CPU.

    With unit vectors e of x and q of the code, m = |e + q|^2 and h = g.(e + q) / m, the transpose of the map of `rotation_trick` is
    scale * (g + 2 (g.q - h) e - 2 h q) + (1 - rotating) * g: a sum of the rows g, x and code. Rows for which its factors would lose
    precision take the long way.
    """
    of_x, of_code = torch.linalg.vector_norm(x, dim=-1), torch.linalg.vector_norm(codes, dim=-1)
    with without_autocast(x.device.type):  # a backward may run inside of it
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
    safe = torch.finfo(x.dtype).max ** 0.25
    row = (~(right & ((lengths > 1.0 / safe) & (lengths < safe)).all(0))).nonzero().squeeze(-1)
    if row.numel():
        vectors = x[row].where(x[row].isfinite(), 0.0)
        out[row] = rotation_gradient(gradient[row], vectors, codes[row]) + pull * (vectors - codes[row])


def _rotation(x: Tensor, code: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Unit vectors e of x, q of the code, r of e + q; the scale of the map; its share against the identity."""
    (e, of_x), (q, of_code) = polar(x), polar(code)
    tiny = torch.finfo(x.dtype).tiny
    ratio = torch.minimum(of_x, of_code) / torch.maximum(of_x, of_code).clamp(min=tiny)
    place = (ratio / SMALLEST_RATIO).clamp(max=1.0)
    rotating = place * place * (3.0 - 2.0 * place)
    scale = rotating * (of_code / of_x.clamp(min=tiny)).clamp(max=SMALLEST_RATIO**-2)
    return e, q, polar(e + q)[0], scale, rotating


def directional(x: Tensor, quantized: Tensor, *, sigma2: float = 1e-3, noise: Tensor | None = None) -> Tensor:
    """x moved by the length of its error in a noisy direction towards its code: DiVeQ (Vali et al., 2025), differentiable in both.

    With error d = quantized - x and v = d + sqrt(sigma2) * noise the output is x + |d| * v / |v|, where v / |v| is a constant of the
    gradient: near the code in value, and equal to it for sigma2 = 0 up to rounding. x, quantized [..., K] of the same shape and dtype;
    `noise` of that shape, standard normal, drawn by the global random generator where not given. x must be finite.
    Raises ValueError for a negative sigma2.
    """
    _check_alike(x, quantized)
    if not sigma2 >= 0:
        raise ValueError(f"sigma2 = {sigma2}: must be 0 or positive")
    if noise is not None and noise.shape != x.shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}: must be {tuple(x.shape)}, that of x")
    dtype = widest(x)
    noise = torch.randn_like(x, dtype=dtype) if noise is None else noise.to(dtype)
    moved = _directed if is_traced() else _Directed.apply
    return moved(x.to(dtype), quantized.to(dtype), noise, sigma2**0.5).to(x.dtype)


def _directed(x: Tensor, quantized: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """In plain operations, for compilers and transforms."""
    error = quantized - x
    direction = polar(torch.add(error.detach(), noise, alpha=sigma))[0]
    return torch.addcmul(x, polar(error)[1], direction)


class _Directed(torch.autograd.Function):
    """The output moves with x, and with the length of the error, which grows along the error itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Tensor, noise: Tensor, sigma: float) -> Tensor:
        error = quantized - x
        direction = polar(torch.add(error, noise, alpha=sigma))[0]
        along, length = polar(error)
        ctx.save_for_backward(x, quantized, direction, along)
        return torch.addcmul(x, length, direction)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        x, quantized, direction, along = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient itself is to be differentiated
            along = polar(quantized - x)[0]
        of_quantized = (gradients[0] * direction).sum(-1, keepdim=True) * along
        return gradients[0] - of_quantized, of_quantized, None, None


def _check_alike(x: Tensor, quantized: Tensor) -> None:
    if x.shape != quantized.shape or x.dtype != quantized.dtype:
        raise ValueError(
            f"quantized is {tuple(quantized.shape)} {quantized.dtype}: must have the shape and dtype of x, {tuple(x.shape)} {x.dtype}"
        )
