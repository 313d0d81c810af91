"""Lookup-free quantization (Yu et al., 2023): each scalar becomes its sign, and losses keep all combinations of signs in use.

What the losses ask of all 2^b codes factorises over the bits, exactly: the entropy of a vector is a sum of b numbers, the distribution of
a batch a product of two halves. With `spherical` vectors and codes lie on a sphere (BSQ; Zhao et al., 2024).

Shapes: P... positions of the input, N of them flattened, H heads, b bits of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from vqkit.dist import default_reducer
from vqkit.ops.bits import BitLosses, bit_logits, bit_losses, distribution_entropy, mean_bit_distribution
from vqkit.ops.codebook import directions
from vqkit.ops.losses import mean_commitment_loss
from vqkit.ops.precision import may_look
from vqkit.ops.scalar import Rounded, join_digits, list_codes, per_scalar, sign_codes, split_digits
from vqkit.quantizers.base import Quantized, changed
from vqkit.quantizers.commit import sum_in_forward
from vqkit.quantizers.config import Commit, Commitment, Diversity, Entropy, check_choice, check_count, check_number
from vqkit.quantizers.layout import Layout, position_mask
from vqkit.quantizers.scalar import ScalarQuantizer

_MOST_BITS = 24
"""Of a group whose distribution is made: 2^24 numbers."""

_LOSS_NAMES: dict[type, str] = {Commitment: "commitment", Entropy: "entropy", Diversity: "diversity"}


class LFQ(ScalarQuantizer):
    """`codebook_size` = 2^b codes {-scale, scale}^b for each of `heads` vectors of width b; None: b = dim / heads.

    A scalar above 0 is bit 1; the first scalar is the lowest bit of an index, or with first_bit="highest" the highest. Where heads * b
    is not `dim`, linear projections stand before and behind. With `spherical` vectors are brought to length `scale`, and so are the codes:
    {-1, 1}^b scale / sqrt(b). `soft_clamp` keeps scalars within that value, by a tanh. With `rotation` they are then taken in axes that
    an orthogonal matrix, drawn once, turns. The output has the gradient of the scalars as they are after all this, in training through
    `activation`, if there is one.

    Losses are of `Commitment`, `Entropy` and `Diversity`, at most one of each; here the softmax is that of minus the squared distances
    over the temperature. Yu et al. have `Entropy` and `Diversity` of equal weight: vectors are to be sure of their code, and the batch
    to use all. The distribution of the batch is exact for up to 24 bits; `diversity_bits` takes so many bits at a time instead and adds
    up their entropies, an upper bound that is exact where these groups are independent (1: as in BSQ). With diversity_over="ranks" the
    distribution is the mean over the vectors of all ranks, in training; `reducer` sums, all ranks must call alike, and the mean of the
    gradients over ranks is that of one process on all vectors. Else it is that of this process. `probability_floor` stands for the
    smaller probabilities of that distribution in the logarithm of its entropy. In training `loss_share` below 1 has `Entropy` and
    `Diversity` see a random share of the vectors alone, at least one.

    Masked positions get index -1 and zeros, or with masked="input" themselves; vectors that are not finite get index -1, zeros, no loss
    and no gradient. Raises ValueError for a codebook size that is no power of two or that no index can name, and for choices that
    contradict each other, TypeError for other kinds.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int | None = None,
        *,
        heads: int = 1,
        scale: float = 1.0,
        spherical: bool = False,
        soft_clamp: float | None = None,
        first_bit: Literal["lowest", "highest"] = "lowest",
        rotation: bool = False,
        activation: Callable[[Tensor], Tensor] | None = None,
        losses: Sequence[Commitment | Entropy | Diversity] = (Entropy(weight=0.1), Diversity(weight=0.1)),
        diversity_bits: int | None = None,
        diversity_over: Literal["process", "ranks"] = "process",
        probability_floor: float = 0.0,
        loss_share: float = 1.0,
        layout: Layout = "last",
        masked: Literal["zero", "input"] = "zero",
        commit: Commit = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        bits = _number_of_bits(dim, codebook_size, heads)
        super().__init__((2,) * bits, dim, heads, rotation=rotation, layout=layout, masked=masked, device=device)
        for name, value in (("scale", scale), ("soft_clamp", soft_clamp)):
            if value is not None:
                check_number(name, value)
                if not 0 < value < math.inf:
                    raise ValueError(f"{name} = {value}: must be positive and finite")
        check_choice("diversity_over", diversity_over, ("process", "ranks"))
        check_choice("first_bit", first_bit, ("lowest", "highest"))
        if activation is not None and not callable(activation):
            raise TypeError(f"activation = {activation!r}: must be a function of a tensor, or None")
        for name, value in (("probability_floor", probability_floor), ("loss_share", loss_share)):
            check_number(name, value)
            if not 0 <= value <= 1 or (value == 0 and name == "loss_share"):
                raise ValueError(f"{name} = {value}: must be {'from' if name == 'probability_floor' else 'above'} 0 and at most 1")
        self.first_bit: Literal["lowest", "highest"] = first_bit
        self.activation, self.probability_floor, self.loss_share = activation, probability_floor, loss_share
        self.scale, self.spherical, self.soft_clamp, self.losses = scale, spherical, soft_clamp, _check_losses(losses)
        self.diversity_bits, self.diversity_over = _check_diversity_bits(diversity_bits, bits, self.losses), diversity_over
        self.commit = commit

    def extra_repr(self) -> str:
        own = f"dim={self.dim}, codebook_size={self.codebook_size}, losses={self.losses}"
        more = changed(self, heads=1, scale=1.0, spherical=False, soft_clamp=None, first_bit="lowest", diversity_over="process")
        more += changed(self, probability_floor=0.0, loss_share=1.0)
        return own + more + changed(self, layout="last", masked="zero", commit="auto")

    @property
    def takes_vectors(self) -> bool:
        return self.project_in is None

    @property
    def gives_finite(self) -> bool:
        return self.activation is None or not self.training

    @property
    def loss_weights(self) -> dict[str, float]:
        return {_LOSS_NAMES[type(loss)]: loss.weight for loss in self.losses}

    def quantize(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        freeze_codebook: bool = False,
        indices: Tensor | None = None,
        temperature: float | None = None,
        loss_mask: Tensor | None = None,
    ) -> Quantized:
        """x, mask, lengths and indices as for `FSQ`.

        `temperature` stands for that of `Entropy` and `Diversity`. Of the vectors that count the losses see those of `loss_mask`
        [P...] bool alone.
        """
        return self._quantize(x, mask, lengths, freeze_codebook, indices, temperature=temperature, loss_mask=loss_mask)

    def _join(self, digits: Tensor) -> Tensor:
        return join_digits(digits, self.levels, first=self.first_bit)

    def _split(self, indices: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
        return split_digits(indices, self.levels, dtype, first=self.first_bit)

    def _estimate(self, values: Tensor, codes: Tensor) -> Tensor:
        return super()._estimate(self.activation(values) if self.activation is not None and self.training else values, codes)

    @property
    def _step(self) -> float:
        """What each scalar of a code is, or minus that."""
        return self.scale / math.sqrt(self.width) if self.spherical else self.scale

    def _round(self, vectors: Tensor) -> Rounded:
        if self.soft_clamp is not None:
            vectors = self.soft_clamp * torch.tanh(vectors / self.soft_clamp)
        vectors = self._turn(vectors)
        if self.spherical:
            vectors = self.scale * directions(vectors)
        return Rounded(vectors, torch.heaviside(vectors.detach(), per_scalar(tuple, (0.0,), vectors)))

    def _codes(self, digits: Tensor, dtype: torch.dtype) -> Tensor:
        return sign_codes(digits, self.levels, dtype, step=self._step)

    def _list(self, like: Tensor) -> Tensor | None:
        return list_codes(sign_codes, self.levels, like, first=self.first_bit, step=self._step)

    def _losses(
        self,
        vectors: Tensor,
        values: Tensor,
        codes: Tensor,
        kept: Tensor | None,
        temperature: float | None = None,
        loss_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        if temperature is not None:
            check_number("temperature", temperature)
            if not 0 < temperature < math.inf:
                raise ValueError(f"temperature = {temperature}: must be positive and finite")
        if loss_mask is not None and (seen := position_mask(values.shape[:-2], loss_mask, None)) is not None:
            kept = seen.unsqueeze(-1) if kept is None else kept & seen.unsqueeze(-1)
        if not self.losses:
            return {}
        values = values.flatten(0, -3)
        kept = None if kept is None else kept.flatten(0, -2)
        share = self._draw_share(kept, values) if self.loss_share < 1 and self.training else None
        commits = any(isinstance(loss, Commitment) for loss in self.losses)
        codes = codes.flatten(0, -3) if commits else codes
        found: dict[float, BitLosses] = {}
        losses: dict[str, Tensor] = {}
        for loss in self.losses:
            if not isinstance(loss, Commitment):
                own, name = loss.temperature if temperature is None else temperature, _LOSS_NAMES[type(loss)]
                if own not in found:
                    found[own] = self._of_bits(values, codes if commits and not found else None, kept, share, own)
                losses[name] = getattr(found[own], name)
        if commits:
            first = next(iter(found.values())).commitment if found else None
            losses["commitment"] = mean_commitment_loss(values, codes, kept) if first is None else first
        return losses

    def _draw_share(self, kept: Tensor | None, values: Tensor) -> Tensor:
        """A random share [N, 1] of the vectors [N, H, b] that count, those of kept [N, 1 or H]; of heads that do, [N, H]."""
        number = len(values)
        order = torch.randn(number, device=values.device).argsort()
        if kept is None:
            return (order < max(int(number * self.loss_share), 1)).unsqueeze(-1)
        counted = kept.view(-1) if kept.shape[1] == 1 else kept.any(-1)
        order = order.where(counted, number)
        if number and may_look(counted):
            last = order.kthvalue(max(int(int(counted.sum()) * self.loss_share), 1)).values
            return kept & (order <= last).unsqueeze(-1)
        place = order.argsort().argsort()
        number = (counted.sum(dtype=torch.float64) * self.loss_share).to(torch.int64).clamp(min=1)
        return kept & (place < number).unsqueeze(-1)

    def _of_bits(self, values: Tensor, codes: Tensor | None, kept: Tensor | None, share: Tensor | None, temperature: float) -> BitLosses:
        """The losses of scalars [N, H, b]; see `bit_losses`. No diversity where no loss asks for it."""
        together = self.diversity_bits if any(isinstance(loss, Diversity) for loss in self.losses) else None
        alone = together is None or self.diversity_over == "process" or not self.training or self._is_alone()
        options: dict[str, Any] = {"scale": self._step, "temperature": temperature, "floor": self.probability_floor}
        found = bit_losses(values, codes, kept, share, together=together if alone else None, **options)
        if alone:
            return found
        logits, seen = bit_logits(values, self._step, temperature).transpose(0, 1), kept if share is None else share
        weights = torch.ones_like(logits[..., 0]) if seen is None else seen.T.to(logits.dtype).expand(logits.shape[:-1])
        means = [self._mean_distribution(group, weights) for group in logits.split(together, dim=-1)]
        return found._replace(diversity=-torch.stack([distribution_entropy(mean, self.probability_floor) for mean in means]).sum(0).mean())

    def _is_alone(self) -> bool:
        """Whether there is no other rank; a traced program asks at every run."""
        reducer = default_reducer() if self.reducer is None else self.reducer
        return not torch.compiler.is_compiling() and reducer.world_size == 1

    def _mean_distribution(self, logits: Tensor, share: Tensor) -> Tensor:
        """[H, 2^bits], over all ranks, of log odds [H, N, bits] and share [H, N], 1 for a vector that counts; 0 where none does."""
        number = share.sum(-1, keepdim=True)
        total = mean_bit_distribution(logits, share)
        with torch.no_grad():
            own = torch.cat([total, number, torch.ones_like(number)], dim=-1)
            everywhere, numbers, ranks = sum_in_forward(own, self.reducer).split([total.shape[-1], 1, 1], dim=-1)
            numbers = numbers.clamp(min=1)
        # The gradients of all ranks are averaged, not added: each is worth as many times more as there are ranks.
        return everywhere / numbers + (total - total.detach()) * (ranks / numbers)


def _number_of_bits(dim: int, codebook_size: int | None, heads: int) -> int:
    check_count("dim", dim)
    check_count("heads", heads)
    if codebook_size is None:
        if dim % heads:
            raise ValueError(f"heads = {heads}: must divide dim = {dim} where codebook_size is not given")
        bits = dim // heads
    else:
        check_count("codebook_size", codebook_size, least=2)
        bits = int(codebook_size).bit_length() - 1
        if codebook_size != 1 << bits:
            raise ValueError(f"codebook_size = {codebook_size}: must be a power of two, as {1 << bits} and {2 << bits} are")
    if bits > 62:
        raise ValueError(f"codebook_size = 2^{bits}: must be at most 2^62, what an index (int64) can name; take more heads")
    return bits


def _check_losses(losses: Sequence[Commitment | Entropy | Diversity]) -> tuple[Commitment | Entropy | Diversity, ...]:
    if not isinstance(losses, Sequence):
        raise TypeError(f"losses = {losses!r}: must be a sequence, () for none")
    kinds = [type(loss) for loss in losses]
    for loss in losses:
        if type(loss) not in _LOSS_NAMES:
            raise TypeError(f"losses holds {loss!r}: must be of {', '.join(kind.__name__ for kind in _LOSS_NAMES)}")
        if kinds.count(type(loss)) > 1:
            raise ValueError(f"losses holds several of {type(loss).__name__}: must be at most one of each kind")
    return tuple(losses)


def _check_diversity_bits(together: int | None, bits: int, losses: Sequence[object]) -> int:
    if together is not None:
        check_count("diversity_bits", together)
    together = bits if together is None else min(together, bits)
    if together > _MOST_BITS and any(isinstance(loss, Diversity) for loss in losses):
        raise ValueError(
            f"diversity_bits = {together}: must be at most {_MOST_BITS}, as the distribution of so many bits has 2^{together} numbers; "
            "take fewer at a time, or no Diversity among the losses"
        )
    return together
