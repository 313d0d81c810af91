"""LFQ by the names of vector-quantize-pytorch: `vqkit.quantizers.LFQ` between linear layers.

Shapes: P... positions of the input, c codebooks, d = log2(C) scalars of a codebook of C codes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from math import ceil, log2
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Module

from vqkit.compat.vector_quantize_pytorch.arguments import in_these_words
from vqkit.compat.vector_quantize_pytorch.depth import is_distributed
from vqkit.compat.vector_quantize_pytorch.rows import (
    hide,
    keep_codebooks,
    linear,
    project_out,
    projected,
    rows_of,
    with_codebooks,
    without_codebooks,
)
from vqkit.compat.vector_quantize_pytorch.settings import Settable
from vqkit.dist import default_reducer
from vqkit.ops.codebook import directions
from vqkit.quantizers import lfq
from vqkit.quantizers.commit import sum_in_forward
from vqkit.quantizers.config import Commitment, Diversity, Entropy
from vqkit.quantizers.layout import check_tensor, is_nothing

__all__ = ["LFQ", "CosineSimLinear", "LossBreakdown", "Return", "entropy", "is_distributed", "l2norm", "log", "maybe_distributed_mean"]

_FLOOR = 1e-5
INV_TEMPERATURE = 100.0


class Return(NamedTuple):
    """What a call gives."""

    quantized: Tensor
    indices: Tensor
    entropy_aux_loss: Tensor


class LossBreakdown(NamedTuple):
    """The losses before their weights."""

    per_sample_entropy: Tensor
    batch_entropy: Tensor
    commitment: Tensor


def maybe_distributed_mean(t: Tensor) -> Tensor:
    """The mean of t over all processes; its gradient is such that the mean of the gradients over processes is that of the mean."""
    total = sum_in_forward(t.detach(), None)
    return total / default_reducer().world_size + (t - t.detach())


def l2norm(t: Tensor) -> Tensor:
    """t [..., d] scaled to length 1."""
    return directions(t)


def log(t: Tensor, eps: float = _FLOOR) -> Tensor:
    """The logarithm of max(t, eps)."""
    return t.clamp(min=eps).log()


def entropy(prob: Tensor) -> Tensor:
    """Of distributions [..., C], in nats: [...]. Probabilities below 1e-5 have its logarithm."""
    return -(prob * log(prob)).sum(-1)


@in_these_words()
class CosineSimLinear(Module):
    """The cosines of x [..., dim_in] and the columns of a learned matrix, times `scale`: [..., dim_out]."""

    def __init__(self, dim_in: int, dim_out: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.randn(dim_in, dim_out))

    def forward(self, x: Tensor) -> Tensor:
        return (directions(x) @ directions(self.weight.T).T) * self.scale


@in_these_words()
class LFQ(Settable):
    """As the peer's: x [B, N, dim], images and more [B, dim, ...] -> `Return` (quantized, indices int64 [P...] or [P..., c], loss).

    `mask` [B] or [P...] bool says which vectors the losses see; all are quantized. The losses of entropy are those over all processes, and
    0 in eval mode. Raises ValueError and TypeError for what does not fit.
    """

    made_of = frozenset(
        (
            "activation",
            "frac_per_sample_entropy",
            "commitment_loss_weight",
            "soft_clamp_input_value",
            "orthogonal_rotation",
        )
    )
    fixed = frozenset(
        (
            "codebook_size",
            "codebook_dim",
            "num_codebooks",
            "has_projections",
            "spherical",
            "codebook_scale",
            "codebook",
            "maybe_l2norm",
            "mask",
        )
    )

    uncalled = {"bits_to_codes": ("forward", "indices_to_codes")}  # noqa: RUF012

    mask: Tensor
    zero: Tensor
    native: lfq.LFQ
    quiet: lfq.LFQ
    unweighed: lfq.LFQ

    def __init__(
        self,
        *,
        dim: int | None = None,
        codebook_size: int | None = None,
        entropy_loss_weight: float = 0.1,
        commitment_loss_weight: float = 0.0,
        diversity_gamma: float = 1.0,
        straight_through_activation: Callable[[Tensor], Tensor] = nn.Identity(),  # noqa: B008 - without state
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        codebook_scale: float = 1.0,
        frac_per_sample_entropy: float = 1.0,
        has_projections: bool | None = None,
        projection_has_bias: bool = True,
        soft_clamp_input_value: float | None = None,
        cosine_sim_project_in: bool = False,
        cosine_sim_project_in_scale: float | None = None,
        channel_first: bool | None = None,
        experimental_softplus_entropy_loss: bool = False,
        entropy_loss_offset: float = 5.0,
        spherical: bool = False,
        force_quantization_f32: bool = True,
        orthogonal_rotation: bool = False,
    ) -> None:
        super().__init__()
        self.codebook_dim = _number_of_bits(dim, codebook_size)
        self.codebook_size, self.num_codebooks = 2**self.codebook_dim, num_codebooks
        inner = self.codebook_dim * num_codebooks
        self.dim = inner if dim is None else dim
        self.keep_num_codebooks_dim = keep_codebooks(keep_num_codebooks_dim, num_codebooks)
        self.has_projections = self.dim != inner if has_projections is None else has_projections
        if self.dim != inner and not self.has_projections:
            raise ValueError(f"has_projections = {has_projections}: must be None or True, as dim = {self.dim} is not {inner}")
        if self.has_projections and cosine_sim_project_in:
            scale = codebook_scale if cosine_sim_project_in_scale is None else cosine_sim_project_in_scale
            self.project_in: nn.Module = CosineSimLinear(self.dim, inner, scale)
        else:
            self.project_in = linear(self.dim, inner, self.has_projections, projection_has_bias)
        self.project_out = linear(inner, self.dim, self.has_projections, projection_has_bias)
        self.channel_first, self.activation, self.spherical = channel_first, straight_through_activation, spherical
        self.orthogonal_rotation, self.frac_per_sample_entropy = orthogonal_rotation, frac_per_sample_entropy
        self.diversity_gamma, self.entropy_loss_weight = diversity_gamma, entropy_loss_weight
        self.codebook_scale, self.commitment_loss_weight = codebook_scale, commitment_loss_weight
        self.soft_clamp_input_value, self.entropy_loss_offset = soft_clamp_input_value, entropy_loss_offset
        self.experimental_softplus_entropy_loss = experimental_softplus_entropy_loss
        self.force_quantization_f32 = force_quantization_f32
        self._build()
        if orthogonal_rotation:
            self.register_buffer("orthogonal_rot", self.native.counts.rotation)
        self.register_buffer("mask", 2 ** torch.arange(self.codebook_dim - 1, -1, -1))
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)

    def _build(self) -> None:
        clamp = self.soft_clamp_input_value
        if clamp is not None and clamp < self.codebook_scale:
            raise ValueError(f"soft_clamp_input_value = {clamp}: must be at least codebook_scale = {self.codebook_scale}")
        native = lfq.LFQ(
            self.codebook_dim * self.num_codebooks,
            self.codebook_size,
            heads=self.num_codebooks,
            scale=self.codebook_scale,
            spherical=bool(self.spherical),
            soft_clamp=clamp,
            first_bit="highest",
            rotation=bool(self.orthogonal_rotation),
            activation=self.activation if self._activates() else None,
            losses=_losses(commitment=self.commitment_loss_weight > 0),
            diversity_over="ranks",
            probability_floor=_FLOOR,
            loss_share=self.frac_per_sample_entropy,
        )
        quiet, unweighed = copy.copy(native), copy.copy(native)
        quiet.losses, quiet.training = (), False
        unweighed.losses = native.losses[:-2]
        hide(self, native=native, quiet=quiet, unweighed=unweighed)

    def _activates(self) -> bool:
        return not isinstance(self.activation, nn.Module) or not is_nothing(self.activation)

    def _check_setting(self, name: str, value: Any) -> None:
        if name == "orthogonal_rotation" and value and "orthogonal_rot" not in self._buffers:
            raise ValueError(f"orthogonal_rotation = {value}: must stay False where none was drawn; make another one")

    def settle(self, *, entropies: bool = True) -> lfq.LFQ:
        """The native quantizer for the mode of now, with the rotation of now: in eval mode it has no losses, and no `entropies` if told."""
        if self._activates() is (self.native.activation is None):  # somebody listens to it
            self._build()
        if self.orthogonal_rotation and self.native._rotation is not (rotation := self._buffers["orthogonal_rot"]):
            self.native.counts.rotation = rotation
        if not self.training:
            return self.quiet
        return self.native if entropies else self.unweighed

    # Codes and indices

    @property
    def dtype(self) -> torch.dtype:
        """Of the codes."""
        return self.zero.dtype

    @property
    def codebook(self) -> Tensor:
        """[C, d], the codes before they are brought onto a sphere and turned, listed anew at every call."""
        digits = self.native.digits(torch.arange(self.codebook_size, device=self.mask.device))
        return self.bits_to_codes(digits.to(self.dtype))

    def codes(self) -> Tensor:
        """[C, d], the codes as they come out."""
        return self.settle().codebook.to(self.dtype)

    def maybe_l2norm(self, t: Tensor) -> Tensor:
        """t [..., d] on the sphere on which codes lie, if they do."""
        return l2norm(t) * self.codebook_scale if self.spherical else t

    def bits_to_codes(self, bits: Tensor) -> Tensor:
        """0 and 1 -> the lower and the higher of the two values."""
        return bits * self.codebook_scale * 2 - self.codebook_scale

    def indices_to_codes(self, indices: Tensor, project_out: bool = True) -> Tensor:
        """The `quantized` of the call that gave the indices; -1 gives zeros. Raises ValueError for an index that there is not."""
        found = without_codebooks(indices, self.num_codebooks, self.keep_num_codebooks_dim)
        codes = self.settle().decode_codes(found).to(self.dtype)
        if project_out:
            codes = _project_out(self.project_out, codes, found)
        image = indices.dim() >= 3 + int(self.keep_num_codebooks_dim)
        return codes.movedim(-1, 1) if (image if self.channel_first is None else self.channel_first) else codes

    # Calls

    def forward(
        self, x: Tensor, inv_temperature: float = INV_TEMPERATURE, return_loss_breakdown: bool = False, mask: Tensor | None = None
    ) -> Return | tuple[Return, LossBreakdown]:
        first = x.dim() >= 4 if self.channel_first is None else bool(self.channel_first)
        rows = rows_of(x, self.dim, first)
        if mask is not None:
            check_loss_mask(mask, rows.shape[:-1])
        vectors, finite = projected(self.project_in, rows)
        native = self.settle(entropies=return_loss_breakdown or self.entropy_loss_weight != 0)
        if self.training:
            seen = loss_mask(mask, rows.shape[:-1])
            found = native.quantize_vectors(vectors, finite, freeze_codebook=True, temperature=1.0 / inv_temperature, loss_mask=seen)
        else:
            found = native.quantize_vectors(vectors.detach(), finite)
        out = project_out(self.project_out, found.quantized, None if finite is None else found.indices)
        indices = with_codebooks(found.indices, self.num_codebooks, self.keep_num_codebooks_dim)
        loss = self.weigh(found.losses)
        if self.training and not found.losses:
            loss = loss + found.quantized[..., :0].sum()  # of nothing, so that a backward of the loss alone is none of nothing
        output = Return(out.movedim(-1, 1) if first else out, indices, loss)
        return (output, self._breakdown(found.losses)) if return_loss_breakdown else output

    def weigh(self, losses: dict[str, Tensor]) -> Tensor:
        """The loss of what the native quantizer gives by name."""
        commitment = losses["commitment"] * self.commitment_loss_weight if "commitment" in losses else None
        if "entropy" not in losses:
            return self.zero.clone() if commitment is None else commitment
        auxiliary = torch.add(losses["entropy"], losses["diversity"], alpha=self.diversity_gamma)
        if self.experimental_softplus_entropy_loss:
            auxiliary = F.softplus(auxiliary + self.entropy_loss_offset)
        total = auxiliary * self.entropy_loss_weight
        return total if commitment is None else total + commitment

    def _breakdown(self, losses: dict[str, Tensor]) -> LossBreakdown:
        if not losses:
            return LossBreakdown(self.zero, self.zero, self.zero)
        return LossBreakdown(losses["entropy"], -losses["diversity"], losses.get("commitment", self.zero))


_project_out = project_out
"""By another name than the argument of `indices_to_codes`."""


def check_loss_mask(mask: Tensor, positions: torch.Size) -> None:
    """Raise TypeError for another dtype than bool, ValueError for another shape than [B], [B, positions in a row] or [P...]."""
    check_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask is {mask.dtype}: must be torch.bool")
    if mask.shape != positions and mask.shape not in (positions[:1], (positions[0], positions[1:].numel())):
        raise ValueError(f"mask has shape {tuple(mask.shape)}: must be {tuple(positions)} or {tuple(positions[:1])}, one a batch entry")


def loss_mask(mask: Tensor | None, positions: torch.Size) -> Tensor | None:
    """A mask that was checked, as [P...]."""
    if mask is None or mask.shape == positions:
        return mask
    if mask.shape == positions[:1]:
        return mask.reshape(-1, *(1 for _ in positions[1:])).expand(positions)
    return mask.reshape(positions)


def _losses(*, commitment: bool) -> tuple[Commitment | Entropy | Diversity, ...]:
    return (*((Commitment(),) if commitment else ()), Entropy(), Diversity())


def _number_of_bits(dim: int | None, codebook_size: int | None) -> int:
    if codebook_size is None:
        if dim is None:
            raise ValueError("dim = None and codebook_size = None: must be given, at least one of them")
        return dim
    bits = log2(codebook_size) if codebook_size > 0 else 0.5
    if not bits.is_integer():
        near = 2 ** ceil(bits)
        raise ValueError(f"codebook_size = {codebook_size}: must be a power of 2, as {near} is")
    return int(bits)
