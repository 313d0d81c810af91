"""Vectors of bits, each with log odds of its own: what they say of all 2^b codes at once, without a list of these.

Shapes: H heads, N vectors, b bits of a vector; P... positions.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vqkit.ops.losses import mean_commitment_loss
from vqkit.ops.precision import may_keep, without_autocast

_WHOLE = 6
"""The distribution of so many bits is made at once, that of more as a product of two."""
_TINY = {dtype: torch.finfo(dtype).tiny for dtype in (torch.float32, torch.float64)}
_FEW = 2**13
"""Or of more bits, if all vectors together have so few numbers."""
_KEPT = 12
"""The list of all codes of so many bits is kept, 2^17 numbers, that of more is made when it is needed."""


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
    make = _kept_choices if bits <= _KEPT and may_keep(like) else _make_choices
    return make(bits, like.dtype, like.device)


def _ones(bits: int, like: Tensor) -> Tensor:
    """[2^b, b]: 1 where a code has a bit of 1."""
    make = _kept_ones if bits <= _KEPT and may_keep(like) else _make_ones
    return make(bits, like.dtype, like.device)


def _make_choices(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[2 b, 2^b]: 1 where a code has a bit of 0, and then where it has a bit of 1."""
    ones = torch.arange(2**bits, device=device) >> torch.arange(bits, device=device).unsqueeze(-1) & 1
    return torch.cat([1 - ones, ones]).to(dtype)


def _make_ones(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _make_choices(bits, dtype, device)[bits:].T


@functools.lru_cache(maxsize=64)
def _kept_choices(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _make_choices(bits, dtype, device)


@functools.lru_cache(maxsize=64)
def _kept_ones(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _kept_choices(bits, dtype, device)[bits:].T


def distribution_entropy(distribution: Tensor, floor: float = 0.0) -> Tensor:
    """[..., C] -> [...], in nats; its gradient is finite also where a code has no probability.

    The logarithm is that of `floor` for smaller probabilities.
    """
    least = max(floor, torch.finfo(distribution.dtype).tiny)
    return -torch.xlogy(distribution, distribution.clamp(min=least)).sum(-1)


# The losses of a batch


class BitLosses(NamedTuple):
    """What a batch of vectors of bits has to pay."""

    commitment: Tensor | None  # [] the mean squared difference of scalars and codes, which are constants
    entropy: Tensor  # [] the mean over vectors and heads of the entropy of a vector's distribution over codes
    diversity: Tensor  # [] minus the mean over heads of the entropy of the mean distribution


class Rule(NamedTuple):
    """How the losses are computed."""

    slope: float  # the log odds of a bit are its scalar times that
    together: int | None
    floor: float


def bit_losses(
    values: Tensor,
    codes: Tensor | None = None,
    kept: Tensor | None = None,
    share: Tensor | None = None,
    *,
    scale: float,
    temperature: float,
    together: int | None,
    floor: float = 0.0,
) -> BitLosses:
    """Of scalars [N, H, b], whose log odds are `bit_logits`, and their codes of that shape (None: no commitment).

    kept [N, H] bool, or [N, 1] for all heads, says which vectors count; None: all. Of these the entropies see those of share, of such a
    shape; None: all. The distribution of `together` bits at a time is made, and the entropies of these groups are added up; None: of
    none, and no diversity. There the logarithm is that of `floor` for smaller probabilities. Differentiable in the scalars.
    """
    rule = Rule(4.0 * scale / temperature, together, floor)
    compiled = torch.compiler.is_compiling()
    if together is None or torch._C._are_functorch_transforms_active() or (compiled and values.device.type != "cpu"):
        return _bit_losses(values, codes, kept, share, rule)
    if not compiled:
        return BitLosses(*_BitLosses.apply(values, codes, kept, share, rule))
    commitment, entropy, diversity = _losses(values, codes, kept, share, *rule)
    return BitLosses(None if codes is None else commitment, entropy, diversity)


def _bit_losses(values: Tensor, codes: Tensor | None, kept: Tensor | None, share: Tensor | None, rule: Rule) -> BitLosses:
    """In plain operations: what is meant, and for transforms, second derivatives and compilers of devices."""
    commitment = None if codes is None else mean_commitment_loss(values, codes, kept)
    share = kept if share is None else share
    seen = torch.ones_like(values[..., 0]) if share is None else share.to(values.dtype).expand(values.shape[:-1])
    logits, seen = (values * rule.slope).transpose(0, 1), seen.T
    entropy = (bits_entropy(logits) * seen).sum() / seen.sum().clamp(min=1)
    if rule.together is None:
        return BitLosses(commitment, entropy, torch.zeros_like(entropy))
    each = seen.sum(-1, keepdim=True).clamp(min=1)
    groups = [distribution_entropy(mean_bit_distribution(group, seen) / each, rule.floor) for group in logits.split(rule.together, dim=-1)]
    return BitLosses(commitment, entropy, -torch.stack(groups).sum(0).mean())


# The same in a fourth of the operations, with the gradient written out. The bits of a group are one part, or two whose distributions are
# multiplied. With P [n, H, C] the distribution of a part, a softmax of sums of log odds, `entropy` has the slope -log P for it, up to a
# constant, which a softmax ignores; so has the entropy of the mean, for the mean. On CPU vectors that do not count are left out.


class _Seen(NamedTuple):
    """Which n <= N vectors a loss sees."""

    rows: Tensor | None  # [n] int64; None: all
    weights: Tensor | None  # [n, H], 0 for a vector that does not count for a head; None: all 1


_EVERY = _Seen(None, None)


class _Found(NamedTuple):
    """What the gradient needs."""

    apart: Tensor | None  # [n, H, b] scalars minus codes, of the vectors that count
    means: list[Tensor]  # [H, C] of each group: the distribution of the batch, the same from `floor` on, and the logarithm of that
    clamped: list[Tensor]
    surprises: list[Tensor]
    logs: list[Tensor]  # [n, H, C] of each part: the logarithm of the distribution of a vector that the entropies see
    chances: list[Tensor]  # [n, H, C] of each part: that distribution


class _BitLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor | None, Tensor, Tensor]:
        losses, counted, seen, (apart, *lists) = _find(*arguments)
        *tensors, ctx.rule = arguments
        ctx.save_for_backward(*tensors, *counted, *seen, apart, *itertools.chain.from_iterable(lists))
        ctx.sizes = [len(own) for own in lists]
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        values, codes, kept, share, rows, weights, *rest = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient itself is to be differentiated
            plain = _bit_losses(values, codes, kept, share, ctx.rule)
            pairs = [(loss, own) for loss, own in zip(plain, gradients, strict=True) if loss is not None]
            return (
                torch.autograd.grad([loss for loss, _ in pairs], values, [own for _, own in pairs], create_graph=True)[0],
                None,
                None,
                None,
                None,
            )
        own_rows, own_weights, apart, *rest = rest
        pieces = iter(rest)
        found = _Found(apart, *([*itertools.islice(pieces, size)] for size in ctx.sizes))
        counted, seen = _Seen(rows, weights), _Seen(own_rows, own_weights)
        return _differentiate(gradients, counted, seen, found, values.shape, ctx.rule, share is None), None, None, None, None


@torch.library.custom_op("vqkit::bit_losses", mutates_args=())
def _losses(
    values: Tensor, codes: Tensor | None, kept: Tensor | None, share: Tensor | None, slope: float, together: int, floor: float
) -> tuple[Tensor, Tensor, Tensor]:
    commitment, entropy, diversity = _find(values, codes, kept, share, Rule(slope, together, floor))[0]
    return values.new_zeros(()) if commitment is None else commitment, entropy, diversity


@_losses.register_fake
def _(values: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return values.new_empty(()), values.new_empty(()), values.new_empty(())


@torch.library.custom_op("vqkit::bit_losses_back", mutates_args=())
def _losses_back(
    gradients: Sequence[Tensor],
    values: Tensor,
    codes: Tensor | None,
    kept: Tensor | None,
    share: Tensor | None,
    slope: float,
    together: int,
    floor: float,
) -> Tensor:
    rule = Rule(slope, together, floor)
    return _differentiate(gradients, *_find(values, codes, kept, share, rule)[1:], values.shape, rule, share is None)


@_losses_back.register_fake
def _(gradients: Sequence[Tensor], values: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, slope, together, floor = inputs
    ctx.save_for_backward(*tensors)
    ctx.rule = slope, together, floor


def _back(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    return _losses_back([*gradients], *ctx.saved_tensors, *ctx.rule), None, None, None, None, None, None


_losses.register_autograd(_back, setup_context=_keep)


def _find(
    values: Tensor, codes: Tensor | None, kept: Tensor | None, share: Tensor | None, rule: Rule
) -> tuple[tuple[Tensor | None, Tensor, Tensor], _Seen, _Seen, _Found]:
    """Without a gradient."""
    seen = counted = _EVERY if codes is None and share is not None else _select(kept, values)
    own = _rows(values, counted)
    apart, commitment = None, None
    if codes is not None:
        apart = own - _rows(codes, counted)
        apart = apart if counted.weights is None else apart * counted.weights.unsqueeze(-1)
        commitment = _product(apart, apart) / (_counts(apart.shape, counted)[0] * values.shape[-1])
    if share is not None:
        seen = _select(share, values)
        own = _rows(values, seen)
    logs = F.logsigmoid(own.unsqueeze(-2) * _signs(rule.slope, values))  # [n, H, 2, b]
    found = _Found(apart, [], [], [], [], [])
    number, each = _counts(logs.shape, seen)
    entropies, diversities = [], []
    least = max(rule.floor, _TINY[values.dtype])
    with without_autocast(values.device.type):
        for group in _groups(logs, rule.together):
            chances = []
            for part in _parts(group):
                own = _of_codes(part)
                chances.append(own.softmax(-1))
                weighed = chances[-1] if seen.weights is None else chances[-1] * seen.weights.unsqueeze(-1)
                entropies.append(_product(weighed, own))
                found.logs.append(own)
            low, *high = chances
            low = low if seen.weights is None else low * seen.weights.unsqueeze(-1)
            mean = _sum_of_products(low, high) / each
            clamped = mean.clamp(min=least)
            surprise = clamped.log()
            diversities.append(_product(mean, surprise))
            found.means.append(mean)
            found.clamped.append(clamped)
            found.surprises.append(surprise)
            found.chances.extend(chances)
    return (commitment, _added(entropies) / -number, _added(diversities) / values.shape[1]), counted, seen, found


def _differentiate(
    gradients: Sequence[Any], counted: _Seen, seen: _Seen, found: _Found, shape: torch.Size, rule: Rule, same: bool
) -> Tensor:
    """Of values of that shape; `same`: the entropies see all vectors that count."""
    commitment, entropy, diversity = gradients
    number, each = _counts(found.logs[0].shape, seen)
    entropy, diversity = entropy * (rule.slope / -number), diversity * (rule.slope / (shape[1] * each))
    parts, pieces = iter(zip(found.logs, found.chances, strict=True)), []
    with without_autocast(entropy.device.type):
        for mean, clamped, surprise in zip(found.means, found.clamped, found.surprises, strict=True):
            slope = (surprise - (mean < clamped).to(mean.dtype)) * diversity
            own = [next(parts)]
            if own[0][0].shape[-1] < slope.shape[-1]:
                own.append(next(parts))
            for (logs, chances), into in zip(own, _to_parts([chances for _, chances in own], slope), strict=True):
                pieces.append(_to_scalars(torch.addcmul(into, logs, entropy), chances))
    result = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
    result = result if seen.weights is None else result * seen.weights.unsqueeze(-1)
    if found.apart is None:
        return _spread(result, seen, shape)
    pull = commitment * (2.0 / (_counts(found.apart.shape, counted)[0] * shape[-1]))
    if same:
        return _spread(torch.addcmul(result, found.apart, pull), seen, shape)
    total = _spread(found.apart * pull, counted, shape)
    return total.add_(result) if seen.rows is None else total.index_add_(0, seen.rows, result)


def _select(kept: Tensor | None, values: Tensor) -> _Seen:
    """Which vectors count, on CPU, where it is known at once how many they are, and for which of their heads."""
    if kept is None:
        return _EVERY
    if not kept.is_cpu:
        return _Seen(None, kept.to(values.dtype).expand(values.shape[:-1]))
    if kept.shape[1] == 1:
        return _Seen(kept.view(-1).nonzero().view(-1), None)
    rows = kept.any(-1).nonzero().view(-1)
    own = kept.index_select(0, rows)
    return _Seen(rows, None if own.all() else own.to(values.dtype))


def _rows(x: Tensor, seen: _Seen) -> Tensor:
    """Those of x [N, ...] that are seen, or [n, ...]."""
    return x if seen.rows is None else x.index_select(0, seen.rows)


def _spread(x: Tensor, seen: _Seen, shape: torch.Size) -> Tensor:
    """The opposite of `_rows`, with zeros between."""
    return x if seen.rows is None else x.new_zeros(shape).index_copy_(0, seen.rows, x)


def _counts(shape: torch.Size, seen: _Seen) -> tuple[Any, Any]:
    """How many of [n, H, ...] count, at least 1: of all heads together, and of each, [H, 1] unless they are equal."""
    if seen.weights is None:
        return max(shape[0] * shape[1], 1), max(shape[0], 1)
    return seen.weights.sum().clamp(min=1), seen.weights.sum(0).clamp(min=1).unsqueeze(-1)


def _signs(slope: float, like: Tensor) -> Tensor:
    """[2, 1]: what makes of a scalar the log odds of its bit to be 0, and of it to be 1."""
    return (_kept_signs if may_keep(like) else _make_signs)(slope, like.dtype, like.device)


def _make_signs(slope: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor([[-slope], [slope]], dtype=dtype, device=device)


@functools.lru_cache(maxsize=64)
def _kept_signs(slope: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _make_signs(slope, dtype, device)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """The sum of all products of entries."""
    return torch.dot(x.flatten(), y.flatten())


def _added(parts: Sequence[Tensor]) -> Any:
    return parts[0] if len(parts) == 1 else sum(parts[1:], parts[0])


def _groups(logs: Tensor, together: int | None) -> Sequence[Tensor]:
    """[n, H, 2, b] in pieces of `together` bits."""
    return (logs,) if together is None or together >= logs.shape[-1] else logs.split(together, dim=-1)


def _parts(logs: Tensor) -> Sequence[Tensor]:
    """Those whose distributions are made, of a group [n, H, 2, b]."""
    bits = logs.shape[-1]
    if bits <= _WHOLE or (bits <= _KEPT and logs.shape[:2].numel() << bits <= _FEW):
        return (logs,)
    return logs.split([bits // 2, bits - bits // 2], dim=-1)


def _of_codes(logs: Tensor) -> Tensor:
    """Logarithms of the chances of bits to be 0 and 1 [n, H, 2, b] -> of codes [n, H, 2^b]."""
    return logs.flatten(-2) @ _choices(logs.shape[-1], logs)


def _sum_of_products(low: Tensor, high: Sequence[Tensor]) -> Tensor:
    """The sum over n of distributions [n, H, C], or of the product of two: [H, C]."""
    return (high[0].permute(1, 2, 0) @ low.transpose(0, 1)).flatten(1) if high else low.sum(0)


def _to_parts(parts: Sequence[Tensor], gradient: Tensor) -> Sequence[Tensor]:
    """The gradient [H, C] of the sum of the products of distributions for each of them, as [n, H, C]."""
    low, *high = parts
    if not high:
        return [gradient]
    gradient = gradient.unflatten(-1, (high[0].shape[-1], low.shape[-1]))
    found = high[0].transpose(0, 1) @ gradient, low.transpose(0, 1) @ gradient.mT
    return [own.transpose(0, 1) for own in found]


def _to_scalars(gradient: Tensor, chances: Tensor) -> Tensor:
    """The gradient [n, H, 2^b] of chances for the log odds [n, H, b] of the bits."""
    bits = chances.shape[-1].bit_length() - 1
    of_sums = torch._softmax_backward_data(gradient, chances, -1, chances.dtype)
    return of_sums @ _ones(bits, chances)
