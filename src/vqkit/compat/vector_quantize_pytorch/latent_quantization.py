"""LatentQuantize by the names of vector-quantize-pytorch: `vqkit.quantizers.LatentQuantize` between linear layers.

Shapes: P... positions of the input, c codebooks, d scalars of a codebook, L levels of a scalar.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Module
from torch.optim import Optimizer

from vqkit.compat.vector_quantize_pytorch.arguments import in_these_words
from vqkit.compat.vector_quantize_pytorch.own_optimizer import OwnsOptimizer
from vqkit.compat.vector_quantize_pytorch.rows import (
    check_codes,
    hide,
    index_dtype,
    linear,
    project_out,
    projected,
    rows_of,
    without_codebooks,
)
from vqkit.compat.vector_quantize_pytorch.settings import Settable
from vqkit.ops.estimators import scale_gradient, straight_through
from vqkit.ops.losses import mean_commitment_loss
from vqkit.ops.precision import as_dtype
from vqkit.quantizers import latent
from vqkit.quantizers.committed import WIDE, in_backward
from vqkit.quantizers.config import check_number
from vqkit.quantizers.layout import where_kept

_WEIGHTS = ("commitment_loss_weight", "quantization_loss_weight")


class _BadLevels(ValueError, RuntimeError):
    """Levels that are no levels; the peer says RuntimeError."""


class _Fixed(Module):
    """Values that never change and are not stored, but move with the module: a sequence."""

    def __init__(self, values: Sequence[Tensor]) -> None:
        super().__init__()
        for number, own in enumerate(values):
            self.register_buffer(str(number), own, persistent=False)

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Tensor:
        return getattr(self, str(range(len(self))[number]))


@in_these_words()
class LatentQuantize(OwnsOptimizer, Settable):
    """As the peer's: z [B, dim, ...] -> (quantized, indices int32 [P...] or [P..., c], loss).

    The values of the levels learn: `quantization_loss_weight` pulls them to the scalars, `commitment_loss_weight` these to their values,
    both before the output projection. With `in_place_codebook_optimizer`, an optimizer of the values given their parameters, every
    training forward steps them by the first of the two losses before it quantizes. The loss is 0 in eval mode.
    Raises ValueError and TypeError for what does not fit.
    """

    fixed = frozenset(("codebook_dim", "num_codebooks", "effective_codebook_dim", "has_projections", "codebook_size", "implicit_codebook"))

    uncalled = {  # noqa: RUF012
        **dict.fromkeys(("quantize", "quantization_loss", "commitment_loss", "codes_to_indices"), ("forward",)),
        "_scale_and_shift": ("codes_to_indices", "forward"),
        "_scale_and_shift_inverse": ("indices_to_codes",),
    }

    _levels: Tensor
    native: latent.LatentQuantize

    def __init__(
        self,
        levels: list[int] | int,
        dim: int,
        commitment_loss_weight: float | None = 0.1,
        quantization_loss_weight: float | None = 0.1,
        num_codebooks: int = 1,
        codebook_dim: int = -1,
        keep_num_codebooks_dim: bool | None = None,
        optimize_values: bool | None = True,
        in_place_codebook_optimizer: Callable[..., Optimizer] | None = None,
    ) -> None:
        super().__init__()
        for name, weight in (("commitment_loss_weight", commitment_loss_weight), ("quantization_loss_weight", quantization_loss_weight)):
            check_number(name, weight)
        if in_place_codebook_optimizer is not None and not optimize_values:
            raise ValueError(f"optimize_values = {optimize_values}: must be True with in_place_codebook_optimizer, which steps the values")
        sizes = _settled_levels(levels, codebook_dim)
        self.dim, self.num_codebooks = dim, num_codebooks
        self.codebook_dim = len(sizes)
        self.effective_codebook_dim = self.codebook_dim * num_codebooks
        self.keep_num_codebooks_dim = bool(keep_num_codebooks_dim) or num_codebooks > 1
        weights = (float(commitment_loss_weight or 0.0), float(quantization_loss_weight or 0.0))
        for name, weight in zip(_WEIGHTS, weights, strict=True):
            self.register_buffer(name, torch.tensor(weight), persistent=False)
        hide(self, _numbers=weights, _seen=self._stamps())
        places = [math.prod(sizes[:number]) for number in range(len(sizes))]
        self.codebook_size = math.prod(sizes)
        self.register_buffer("_levels", torch.tensor(sizes, dtype=torch.int32), persistent=False)
        self.register_buffer("_basis", torch.tensor(places), persistent=False)
        self.has_projections = dim != self.effective_codebook_dim
        self.project_in = linear(dim, self.effective_codebook_dim, self.has_projections)
        self.project_out = linear(self.effective_codebook_dim, dim, self.has_projections)
        native = latent.LatentQuantize(sizes, heads=num_codebooks, commitment=None)
        values = [own.clone() for own in native.counts.weight.detach().split(sizes)]
        del native.counts.weight
        self.values_per_latent: Any = nn.ParameterList(values) if optimize_values else _Fixed(values)
        self.in_place_codebook_optimizer: Any = None
        if in_place_codebook_optimizer is not None:
            self.in_place_codebook_optimizer = in_place_codebook_optimizer(self.values_per_latent)
        hide(self, native=native)

    _numbers: tuple[float, float]
    _seen: tuple[Any, ...]

    def _stamps(self) -> tuple[Any, ...]:
        found: Any = [self._buffers[name] for name in _WEIGHTS]
        return (found[0], found[1], found[0]._version, found[1]._version)

    @property
    def _weights(self) -> tuple[float, float]:
        """Of the two losses, as the buffers are now; they are looked at where they are others, or were written to."""
        if not torch.compiler.is_compiling():
            stamps, seen = self._stamps(), self._seen
            if not (stamps[0] is seen[0] and stamps[1] is seen[1] and stamps[2:] == seen[2:]):
                numbers = (float(stamps[0]), float(stamps[1]))
                hide(self, _numbers=numbers, _seen=stamps)
        return self._numbers

    def _settle(self) -> latent.LatentQuantize:
        """The native quantizer with the values of now."""
        hide(self.native.counts, weight=torch.cat(self._values()))
        return self.native

    def _values(self) -> list[Tensor]:
        """Those of each scalar, without the price of asking a list of parameters for them."""
        held = cast(Module, self._modules["values_per_latent"])
        return cast(list[Tensor], [*(held._parameters or held._buffers).values()])

    def __getstate__(self) -> Any:
        """Copies hold the values alone: what a call made of them has a graph, which cannot be copied."""
        hide(self.native.counts, weight=self._settle().counts.weight.detach())
        return super().__getstate__()

    @property
    def implicit_codebook(self) -> Tensor:
        """[C, d], all codes, listed anew at every call."""
        native = self._settle()
        return native._codes(native._split(torch.arange(self.codebook_size, device=self._levels.device)), torch.float32)

    # The losses and the parts of quantizing

    def quantization_loss(self, z: Tensor, zhat: Tensor, reduce: str = "mean") -> Tensor:
        """Squared differences, without a gradient for `zhat`."""
        return F.mse_loss(zhat.detach(), z, reduction=reduce)

    def commitment_loss(self, z: Tensor, zhat: Tensor, reduce: str = "mean") -> Tensor:
        """Squared differences, without a gradient for `z`."""
        return F.mse_loss(z.detach(), zhat, reduction=reduce)

    def quantize(self, z: Tensor) -> Tensor:
        """Scalars [..., d] -> the nearest values, with the gradient of the scalars."""
        native = self._settle()
        found = native._round(z)
        return straight_through(found.values, native._codes(found.digits, found.values.dtype))

    def codes_to_indices(self, zhat: Tensor) -> Tensor:
        """Codes [..., d] -> the indices of the nearest ones [...]."""
        check_codes("zhat", zhat, self.codebook_dim)
        native = self._settle()
        return native._join(native._round(zhat).digits).to(index_dtype(self.codebook_size))

    def indices_to_codes(self, indices: Tensor, project_out: bool = True) -> Tensor:
        """What the indices of a call stand for, [B, dim, ...]. Raises ValueError for an index that there is not; -1 gives zeros."""
        found = without_codebooks(indices, self.num_codebooks, self.keep_num_codebooks_dim)
        codes = as_dtype(self._settle().decode_codes(found), self._values()[0].dtype)
        return (_project_out(self.project_out, codes, found) if project_out else codes).movedim(-1, 1)

    def quantize_and_project(self, z: Tensor, is_img_or_video: bool, ps: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """z [B, N, c, d] of positions `ps` -> codes [B, N, c * d], output [B, dim, ...], indices."""
        codes = self.quantize(z)
        indices, codes = self.codes_to_indices(codes), codes.flatten(-2)
        out = self.project_out(codes).unflatten(1, tuple(ps[0])).movedim(-1, 1)
        indices = indices.unflatten(1, tuple(ps[0]))
        return codes, out, indices if self.keep_num_codebooks_dim else indices.squeeze(-1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        vectors, kept = projected(self.project_in, rows_of(z, self.dim, True))
        if kept is not None:
            vectors = where_kept(kept, vectors)
        dtype, vectors = vectors.dtype, vectors.unflatten(-1, (self.num_codebooks, self.codebook_dim))
        vectors = vectors if dtype in WIDE else vectors.float()
        if self.in_place_codebook_optimizer is not None and self.training and not in_backward():
            with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):  # a checkpoint around this call knows nothing of it
                self._step_(vectors.detach(), kept)
        found = self._settle()._round(vectors)
        codes, indices = self.native._codes(found.digits, found.values.dtype), self.native._join(found.digits)
        loss = self._loss(found.values, codes, kept)
        out = (straight_through(found.values, codes) if found.values.requires_grad else codes.detach()).flatten(-2).to(dtype)
        if kept is None:
            out = self.project_out(out)
        else:
            indices = indices.where(kept.unsqueeze(-1), -1)
            out = project_out(self.project_out, where_kept(kept, out), indices)
        indices = indices if self.keep_num_codebooks_dim else indices.squeeze(-1)
        return out.movedim(-1, 1), indices.to(index_dtype(self.codebook_size)), loss

    def _loss(self, vectors: Tensor, codes: Tensor, kept: Tensor | None) -> Tensor:
        """Of vectors and codes [P..., c, d] and the positions [P...] of them that count; None: all."""
        commitment, quantization = self._weights
        if not self.training or commitment == quantization == 0:
            return torch.zeros((), device=vectors.device)
        if commitment == 0:
            return quantization * _apart(codes, vectors, kept)
        apart = _apart(vectors, codes, kept, quantization / commitment)
        return torch.add(commitment * apart, apart.detach(), alpha=quantization)

    @torch.enable_grad()
    def _step_(self, vectors: Tensor, kept: Tensor | None) -> None:
        """A step of the values alone."""
        found = self._settle()._round(vectors)
        loss = self._weights[1] * _apart(self.native._codes(found.digits, vectors.dtype), vectors, kept)
        values = self._values()
        own = [value.grad for value in values]
        for value, gradient in zip(values, torch.autograd.grad(loss, values), strict=True):
            value.grad = gradient
        self.in_place_codebook_optimizer.step()
        for value, before in zip(values, own, strict=True):
            value.grad = before


def _apart(pulled: Tensor, to: Tensor, kept: Tensor | None, pull: float = 0.0) -> Tensor:
    """The mean squared difference of tensors [P..., c, d], which pulls the first, and the second `pull` times as much."""
    if kept is None and pulled.numel():
        return F.mse_loss(pulled, scale_gradient(to, pull))
    return mean_commitment_loss(pulled, to, None if kept is None else kept.unsqueeze(-1), pull=pull)


_project_out = project_out
"""By another name than the argument of `indices_to_codes`."""


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _settled_levels(levels: Sequence[int] | int, codebook_dim: int) -> tuple[int, ...]:
    """One number a scalar. Raises ValueError, which is a RuntimeError too, where the number of scalars is not told."""
    if isinstance(levels, int):
        if codebook_dim < 1:
            raise _BadLevels(f"codebook_dim = {codebook_dim}: must be at least 1 where levels is one number, {levels}")
        return (levels,) * codebook_dim
    levels = tuple(levels)
    if codebook_dim not in (-1, len(levels)):
        raise _BadLevels(f"codebook_dim = {codebook_dim}: must be -1 or {len(levels)}, as levels = {levels} says")
    return levels
