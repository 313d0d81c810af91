"""Vectors of bits, each with log odds of its own: what they say of all 2^b codes at once, without a list of these.

Shapes: H heads, N vectors, b bits of a vector; P... positions.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vqkit.ops.precision import is_traced, without_autocast

_WHOLE = 6
"""The distribution of so many bits is made at once, that of more as a product of two."""


def bit_logits(x: Tensor, scale: float, temperature: float) -> Tensor:
    """The log odds [..., b] of each bit under softmax(-|x - c|^2 / temperature) over all codes c in {-scale, scale}^b.

    They are 4 scale x / temperature, and the softmax is the product of what they say of each bit (Yu et al., 2023).
    """
    return x * (4.0 * scale / temperature)


def bits_entropy(logits: Tensor) -> Tensor:
    """The entropy [...], in nats, of independent bits of log odds [..., b]: the sum of theirs."""
    away = -logits.abs()
    return (F.softplus(away) - away * torch.sigmoid(away)).sum(-1)


def mean_bit_distribution(logits: Tensor, share: Tensor) -> Tensor:
    """The sum over vectors of the distribution over all 2^b codes that log odds [H, N, b] say: [H, 2^b], for weights `share` [H, N].

    The first bit is the lowest. One product of N x 2^(b/2) with N x 2^(b/2) numbers: no N x 2^b matrix. Differentiable.
    """
    low = logits.shape[-1] // 2
    first, second = product_distribution(logits[..., :low]), product_distribution(logits[..., low:])
    with without_autocast(logits.device.type):
        return ((second * share.unsqueeze(-1)).mT @ first).flatten(1)


def product_distribution(logits: Tensor) -> Tensor:
    """The probabilities [..., 2^b] of all codes of independent bits of log odds [..., b]; the first bit is the lowest. Differentiable."""
    logs = F.logsigmoid(torch.cat([-logits, logits], dim=-1))
    with without_autocast(logits.device.type):
        return (logs @ _choices(logits.shape[-1], logits)).softmax(-1)  # an exp of what is far below 0 is slow


def _choices(bits: int, like: Tensor) -> Tensor:
    make = _make_choices if is_traced() or type(like) is not Tensor else _kept_choices
    return make(bits, like.dtype, like.device)


def _make_choices(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[2 b, 2^b]: 1 where a code has a bit of 0, and then where it has a bit of 1."""
    ones = torch.arange(2**bits, device=device) >> torch.arange(bits, device=device).unsqueeze(-1) & 1
    return torch.cat([1 - ones, ones]).to(dtype)


@functools.lru_cache(maxsize=64)
def _kept_choices(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _make_choices(bits, dtype, device)


def distribution_entropy(distribution: Tensor, floor: float = 0.0) -> Tensor:
    """[..., C] -> [...], in nats; its gradient is finite also where a code has no probability.

    The logarithm is that of `floor` for smaller probabilities.
    """
    least = max(floor, torch.finfo(distribution.dtype).tiny)
    return -torch.xlogy(distribution, distribution.clamp(min=least)).sum(-1)


# The two entropies of a batch


class Entropies(NamedTuple):
    """What the bits of a batch of vectors say of codes."""

    of_each: Tensor  # [] the mean over vectors and heads of the entropy of a vector's distribution
    of_mean: Tensor  # [] the mean over heads of the entropy of the mean distribution


def batch_entropies(logits: Tensor, share: Tensor | None = None, *, together: int | None, floor: float = 0.0) -> Entropies:
    """Of log odds [H, N, b]; share [H, N], what each vector counts, of the dtype of the logits; None: all 1.

    The distribution of `together` bits at a time is made, and the entropies of these groups are added up; None: of none. In the entropy
    of the mean the logarithm is that of `floor` for smaller probabilities. Differentiable in the logits.
    """
    compiled = torch.compiler.is_compiling()
    if together is None or torch._C._are_functorch_transforms_active() or (compiled and logits.device.type != "cpu"):
        return _batch_entropies(logits, share, together, floor)
    return Entropies(*(_entropies if compiled else _BatchEntropies.apply)(logits, share, together, floor))


def _batch_entropies(logits: Tensor, share: Tensor | None, together: int | None, floor: float) -> Entropies:
    """In plain operations: what is meant, and for transforms, second derivatives and compilers of devices."""
    share = logits.new_ones(logits.shape[:-1]) if share is None else share
    of_each = (bits_entropy(logits) * share).sum() / share.sum().clamp(min=1)
    if together is None:
        return Entropies(of_each, torch.zeros_like(of_each))
    number = share.sum(-1, keepdim=True).clamp(min=1)
    groups = [distribution_entropy(mean_bit_distribution(group, share) / number, floor) for group in logits.split(together, dim=-1)]
    return Entropies(of_each, torch.stack(groups).sum(0).mean())


# The same in a fourth of the operations, with the gradient written out. The bits of a group are one part, or two whose distributions are
# multiplied. With P [H, N, C] the distribution of a part, a softmax of sums of log odds, `of_each` has the slope -log P for it, up to a
# constant, which a softmax ignores; so has `of_mean`, for the mean. On CPU vectors that count nothing are left out.


class _Kept(NamedTuple):
    """What the gradient needs, of n <= N vectors."""

    rows: Tensor | None  # [n] int64, which these are; None: all
    share: Tensor | None  # [H, n]; None: all 1
    slopes: list[Tensor]  # [H, C] of each group: the logarithm of its mean distribution, as far as it moves
    logs: list[Tensor]  # [H, n, C] of each part: the logarithm of its distribution
    chances: list[Tensor]  # [H, n, C] of each part: its distribution


class _BatchEntropies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, share: Tensor | None, together: int, floor: float) -> tuple[Tensor, Tensor]:
        of_each, of_mean, kept = _find(logits, share, together, floor)
        ctx.save_for_backward(logits, share, kept.rows, kept.share, *kept.slopes, *kept.logs, *kept.chances)
        ctx.options = together, floor, len(kept.slopes), len(kept.logs)
        return of_each, of_mean

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        logits, share, rows, own, *kept = ctx.saved_tensors
        together, floor, groups, parts = ctx.options
        if torch.is_grad_enabled():  # the gradient itself is to be differentiated
            found = _batch_entropies(logits, share, together, floor)
            return torch.autograd.grad(found, logits, gradients, create_graph=True)[0], None, None, None
        pieces = _Kept(rows, own, kept[:groups], kept[groups : groups + parts], kept[groups + parts :])
        of_each, of_mean = gradients
        return _differentiate(of_each, of_mean, pieces, logits.shape, together), None, None, None


@torch.library.custom_op("vqkit::batch_entropies", mutates_args=())
def _entropies(logits: Tensor, share: Tensor | None, together: int, floor: float) -> tuple[Tensor, Tensor]:
    return _find(logits, share, together, floor)[:2]


@_entropies.register_fake
def _(logits: Tensor, share: Tensor | None, together: int, floor: float) -> tuple[Tensor, Tensor]:
    return logits.new_empty(()), logits.new_empty(())


@torch.library.custom_op("vqkit::batch_entropies_back", mutates_args=())
def _entropies_back(of_each: Tensor, of_mean: Tensor, logits: Tensor, share: Tensor | None, together: int, floor: float) -> Tensor:
    return _differentiate(of_each, of_mean, _find(logits, share, together, floor)[2], logits.shape, together)


@_entropies_back.register_fake
def _(of_each: Tensor, of_mean: Tensor, logits: Tensor, share: Tensor | None, together: int, floor: float) -> Tensor:
    return logits.new_empty(logits.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor | None, int, float], output: tuple[Tensor, Tensor]) -> None:
    logits, share, *ctx.options = inputs
    ctx.save_for_backward(logits, share)


def _back(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
    return _entropies_back(*gradients, *ctx.saved_tensors, *ctx.options), None, None, None


_entropies.register_autograd(_back, setup_context=_keep)


@torch.no_grad()
def _find(logits: Tensor, share: Tensor | None, together: int, floor: float) -> tuple[Tensor, Tensor, _Kept]:
    logits, share, rows = (logits, None, None) if share is None else _select(logits, share)
    logs = F.logsigmoid(torch.stack([-logits, logits], dim=-2))  # [H, n, 2, b]
    of_each, of_mean, kept = [], [], _Kept(rows, share, [], [], [])
    each_count, count = _counts(logits.shape, share)
    with without_autocast(logits.device.type):
        for group in (logs,) if together >= logs.shape[-1] else logs.split(together, dim=-1):
            own = [_of_codes(part) for part in _parts(group)]
            chances = [part.softmax(-1) for part in own]
            weighted = chances if share is None else [part * share.unsqueeze(-1) for part in chances]
            of_each += [torch.vdot(part.flatten(), logs.flatten()) for part, logs in zip(weighted, own, strict=True)]
            low, *high = weighted[0], *chances[1:]
            mean = (low.sum(-2) if not high else (high[0].mT @ low).flatten(1)) / count
            clamped = mean.clamp(min=max(floor, torch.finfo(mean.dtype).tiny))
            surprise = clamped.log()
            of_mean.append(torch.vdot(mean.flatten(), surprise.flatten()))
            kept.slopes.append(torch.add(surprise, mean < clamped, alpha=-1))
            kept.logs.extend(own)
            kept.chances.extend(chances)
    return sum(of_each[1:], of_each[0]) / -each_count, sum(of_mean[1:], of_mean[0]) / -len(logits), kept


def _differentiate(of_each: Tensor, of_mean: Tensor, kept: _Kept, shape: torch.Size, together: int) -> Tensor:
    bits, logs, chances = shape[-1], iter(kept.logs), iter(kept.chances)
    each_count, count = _counts(kept.logs[0].shape, kept.share)
    of_each, of_mean = of_each / -each_count, of_mean / (-shape[0] * count)
    pieces = []
    with without_autocast(of_each.device.type):
        for number, slope in enumerate(kept.slopes):
            width = min(together, bits - number * together)
            own = [next(chances) for _ in range(_number_of_parts(width))]
            for part, into in zip(own, _to_parts(own, slope * of_mean), strict=True):
                pieces.append(_to_logits(torch.addcmul(into, next(logs), of_each), part))
    result = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
    if kept.share is not None:
        result = result * kept.share.unsqueeze(-1)
    return result if kept.rows is None else result.new_zeros(shape).index_copy_(1, kept.rows, result)


def _select(logits: Tensor, share: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Logits and share of the vectors that count, and which these are: on CPU, where it is known at once how many they are."""
    if share.device.type != "cpu":
        return logits, share, None
    rows = share.any(0).nonzero().squeeze(-1)
    own = share.index_select(1, rows)
    return logits.index_select(1, rows), None if bool((own == 1).all()) else own, rows


def _counts(shape: torch.Size, share: Tensor | None) -> tuple[Any, Any]:
    """How many vectors count, at least 1: of all heads, and of each [H, 1]."""
    if share is None:
        return shape[0] * max(shape[1], 1), max(shape[1], 1)
    return share.sum().clamp(min=1), share.sum(-1, keepdim=True).clamp(min=1)


def _number_of_parts(bits: int) -> int:
    return 1 if bits <= _WHOLE else 2


def _parts(logs: Tensor) -> Sequence[Tensor]:
    """Those whose distributions are made, of a group [H, N, 2, b]."""
    bits = logs.shape[-1]
    return (logs,) if _number_of_parts(bits) == 1 else logs.split([bits // 2, bits - bits // 2], dim=-1)


def _of_codes(logs: Tensor) -> Tensor:
    """Logarithms of the chances of bits to be 0 and 1 [H, N, 2, b] -> of codes [H, N, 2^b]."""
    return logs.flatten(-2) @ _choices(logs.shape[-1], logs)


def _to_parts(parts: Sequence[Tensor], gradient: Tensor) -> Sequence[Tensor]:
    """The gradient [H, C] of the product of distributions for each of them, as [H, N, C]."""
    low, *high = parts
    if not high:
        return [gradient.unsqueeze(-2)]
    gradient = gradient.unflatten(-1, (high[0].shape[-1], low.shape[-1]))
    return [high[0] @ gradient, low @ gradient.mT]


def _to_logits(gradient: Tensor, chances: Tensor) -> Tensor:
    """The gradient [H, N, 2^b] of chances for the log odds [H, N, b] of the bits."""
    bits = chances.shape[-1].bit_length() - 1
    of_sums = torch.ops.aten._softmax_backward_data(gradient, chances, -1, chances.dtype)
    return of_sums @ _choices(bits, chances)[bits:].T
