"""FSP by the names of vector-quantize-pytorch: `vqkit.quantizers.FSP` between linear layers.

Shapes: P... positions of the input, N of them flattened, d scalars of a vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from vqkit.compat.vector_quantize_pytorch.arguments import in_these_words
from vqkit.compat.vector_quantize_pytorch.rows import hide, index_dtype, linear, project_out, projected
from vqkit.compat.vector_quantize_pytorch.settings import Settable
from vqkit.ops import perturbation
from vqkit.ops.estimators import straight_through
from vqkit.ops.perturbation import Distribution, cdf, quantile
from vqkit.ops.precision import finite_rows, known_finite
from vqkit.ops.scalar import per_scalar
from vqkit.quantizers import fsp
from vqkit.quantizers.committed import WIDE
from vqkit.quantizers.layout import check_tensor, where_kept
from vqkit.quantizers.scalar import check_levels


def tanh_act(z: Tensor) -> Tensor:
    """The distribution function of a logistic distribution of half the scale."""
    return cdf(z, "tanh")


def tanh_inv_act(p: Tensor) -> Tensor:
    """The inverse of `tanh_act`."""
    return quantile(p, "tanh")


def sigmoid_act(z: Tensor) -> Tensor:
    """The distribution function of the logistic distribution."""
    return cdf(z, "sigmoid")


def sigmoid_inv_act(p: Tensor) -> Tensor:
    """The inverse of `sigmoid_act`."""
    return quantile(p, "sigmoid")


def normal_act(z: Tensor) -> Tensor:
    """The distribution function of the normal distribution."""
    return cdf(z, "normal")


def normal_inv_act(p: Tensor) -> Tensor:
    """The inverse of `normal_act`."""
    return quantile(p, "normal")


def laplace_act(z: Tensor) -> Tensor:
    """The distribution function of the Laplace distribution."""
    return cdf(z, "laplace")


def laplace_inv_act(p: Tensor) -> Tensor:
    """The inverse of `laplace_act`."""
    return quantile(p, "laplace")


def cauchy_act(z: Tensor) -> Tensor:
    """The distribution function of the Cauchy distribution."""
    return cdf(z, "cauchy")


def cauchy_inv_act(p: Tensor) -> Tensor:
    """The inverse of `cauchy_act`."""
    return quantile(p, "cauchy")


_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "tanh": (tanh_act, tanh_inv_act),
    "sigmoid": (sigmoid_act, sigmoid_inv_act),
    "normal": (normal_act, normal_inv_act),
    "laplace": (laplace_act, laplace_inv_act),
    "cauchy": (cauchy_act, cauchy_inv_act),
}


def build_cdf_act(act_name: str) -> tuple[Callable, Callable]:
    """A distribution function and its inverse. Raises ValueError for a name that there is not."""
    if act_name not in _ACTIVATIONS:
        raise ValueError(f"act_name = {act_name!r}: must be one of {', '.join(map(repr, _ACTIVATIONS))}")
    return _ACTIVATIONS[act_name]


def batch_stats(batch: Tensor, eps: float = 1e-8) -> tuple[Tensor, ...]:
    """Mean, variance, skewness and excess kurtosis of [N, ...] along the first axis; standard deviations are at least `eps`."""
    return tuple(perturbation.moments(batch, eps=eps))


def _roots(numbers: Sequence[float]) -> list[float]:
    return [math.sqrt(number) for number in numbers]


@in_these_words()
class VectorNorm(nn.Module):
    """The squared distances of mean, variance, skewness and excess kurtosis of each scalar to targets, weighed."""

    def __init__(
        self,
        l1_target: float = 0.0,
        l1_weight: float = 0.1,
        l2_target: float = 1.0,
        l2_weight: float = 0.07,
        l3_target: float = 0.0,
        l3_weight: float = 0.06,
        l4_target: float = 0.0,
        l4_weight: float = 0.05,
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        self.l1_target, self.l1_weight = l1_target, l1_weight
        self.l2_target, self.l2_weight = l2_target, l2_weight
        self.l3_target, self.l3_weight = l3_target, l3_weight
        self.l4_target, self.l4_weight = l4_target, l4_weight
        self.eps = eps

    def forward(self, z: Tensor) -> tuple[Tensor, dict]:
        """z [N, d] -> the loss, 0 for fewer than two vectors, and the moments [d] by name. Vectors that are not finite are left out."""
        if known_finite(z):
            found = perturbation.moments(z, eps=self.eps)
            return self._loss(found) if len(z) > 1 else z.new_zeros(()), found._asdict()
        kept = finite_rows(z)
        found = perturbation.moments(where_kept(kept, z), kept.to(z.dtype), eps=self.eps)
        return self._loss(found).where(kept.sum() > 1, 0.0), found._asdict()

    def _loss(self, found: perturbation.Moments) -> Tensor:
        weights = (self.l1_weight, self.l2_weight, self.l3_weight, self.l4_weight)
        targets = (self.l1_target, self.l2_target, self.l3_target, self.l4_target)
        terms = [term for term in zip(weights, found, targets, strict=True) if term[0]] or [(0.0, found.mean, 0.0)]
        weights, values, targets = zip(*terms, strict=True)
        away = torch.stack(values, dim=-1)
        away = ((away - per_scalar(tuple, targets, away)) * per_scalar(_roots, weights, away)).flatten()
        return away.dot(away) / found.mean.numel()

    @classmethod
    def build(cls, name: str) -> VectorNorm:
        """That of a name: "none", "var", "kurt", "var_tanh", "var_sigmoid" or "var_laplace"."""
        presets: dict[str, dict[str, float]] = {
            "none": {"l1_weight": 0.0, "l2_weight": 0.0},
            "var": {},
            "kurt": {"l3_weight": 0.06, "l4_weight": 0.05},
            "var_tanh": {"l2_target": 0.8225},
            "var_sigmoid": {"l2_target": 3.29},
            "var_laplace": {"l2_target": 2.0},
        }
        if name not in presets:
            raise ValueError(f"vector_norm = {name!r}: must be one of {', '.join(map(repr, presets))}")
        return cls(**{"l3_weight": 0.0, "l4_weight": 0.0, **presets[name]})


@in_these_words()
class FSP(Settable):
    """As the peer's: z [..., dim] or, with `channel_first`, [B, dim, ...] -> (quantized, indices int32 [P...], loss, what else is known).

    Rounding is in float32 or wider. Raises ValueError and TypeError for what does not fit.
    """

    made_of = frozenset(("act_func", "inv_act_func", "quantize_rate", "need_inv_act"))
    fixed = frozenset(("codebook_dim", "codebook_size", "has_projections"))

    _levels: Tensor
    native: fsp.FSP

    def __init__(
        self,
        levels: Sequence[int],
        dim: int | None = None,
        channel_first: bool = False,
        projection_has_bias: bool = True,
        act_name: str = "tanh",
        quantize_rate: float = 0.0,
        need_inv_act: bool = False,
        vector_norm: str = "var_tanh",
    ) -> None:
        super().__init__()
        self.act_func, self.inv_act_func = build_cdf_act(act_name)
        self.quantize_rate, self.need_inv_act = quantize_rate, need_inv_act
        levels = check_levels(levels)
        self.codebook_dim, self.codebook_size = len(levels), math.prod(levels)
        self.dim = self.codebook_dim if dim is None else dim
        self.channel_first, self.act_name = channel_first, act_name
        dtype = index_dtype(self.codebook_size)
        places = [math.prod(levels[:number]) for number in range(self.codebook_dim)]
        self.register_buffer("_levels", torch.tensor(levels, dtype=torch.int32), persistent=False)
        self.register_buffer("_basis", torch.tensor(places, dtype=dtype), persistent=False)
        self.has_projections = self.dim != self.codebook_dim
        self.project_in = linear(self.dim, self.codebook_dim, self.has_projections, projection_has_bias)
        self.project_out = linear(self.codebook_dim, self.dim, self.has_projections, projection_has_bias)
        self.vector_norm = VectorNorm.build(vector_norm)
        hide(self, _sizes=levels)
        self._build()

    _sizes: tuple[int, ...]

    def _build(self) -> None:
        pairs = {pair[0]: (name, pair[1]) for name, pair in _ACTIVATIONS.items()}
        name, inverse = pairs.get(self.act_func, ("", None))
        if not name or (self.need_inv_act and self.inv_act_func is not inverse):
            raise ValueError("act_func and inv_act_func: must be what build_cdf_act gives for one name")
        native = fsp.FSP(
            self._sizes,
            cdf=cast(Distribution, name),
            output="latent" if self.need_inv_act else "uniform",
            quantize_rate=self.quantize_rate,
            moments=None,
        )
        hide(self, native=native)

    def extra_repr(self) -> str:
        return f"levels={self.native.levels}, dim={self.dim}, act_name={self.act_name!r}, quantize_rate={self.quantize_rate}"

    # The parts of a call

    def quantize_act_value(self, act_z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Probabilities [..., d] -> the middles of their bins, with the gradient of the probabilities, and the bins."""
        digits = perturbation.bins(act_z.clamp(max=1.0 - eps), self.native.levels)
        return straight_through(act_z, perturbation.centres(digits, self.native.levels, act_z.dtype)), digits

    def level_indices_to_indices(self, level_indices: Tensor) -> Tensor:
        """Bins [..., d] -> indices [...]."""
        return self.native._join(level_indices.to(torch.int64)).to(index_dtype(self.codebook_size))

    def indices_to_level_indices(self, indices: Tensor) -> Tensor:
        """Indices [...] -> bins [..., d]."""
        return self.native.digits(indices).to(indices.dtype)

    def indices_to_act_value(self, indices: Tensor) -> Tensor:
        """Indices [...] -> the middles of bins [..., d]."""
        return perturbation.centres(self.native.digits(indices), self.native.levels, torch.float32)

    def indices_to_codes(self, indices: Tensor, eps: float = 1e-6) -> Tensor:
        """The `quantized` of the call in eval mode that gave the indices; -1 gives zeros. Raises ValueError for one that there is not."""
        if isinstance(indices, Tensor) and not indices.dim():
            return self.indices_to_codes(indices.unsqueeze(0), eps).squeeze(0)
        self.native.eps = eps
        codes = self.native.decode_codes(indices)
        weight = next(self.project_out.parameters(), None)
        codes = project_out(self.project_out, codes if weight is None else codes.to(weight.dtype), indices)
        return codes.movedim(-1, 1) if self.channel_first else codes

    def forward(self, z: Tensor, eps: float | None = None) -> tuple[Tensor, Tensor, Tensor, dict]:
        rows, native = self._rows(z), self.native
        if native.eps != (eps or None):
            native.eps = eps or None
        scalars, kept = projected(self.project_in, rows)
        wide = scalars if scalars.dtype in WIDE else scalars.float()
        loss, moments = self.vector_norm(wide.reshape(-1, self.codebook_dim))
        wide = wide if kept is None else where_kept(kept, wide)
        values, digits = native._round(wide)
        place = native._middles(digits, values.dtype)
        indices = native._join(digits)
        told = digits if kept is None else where_kept(kept, digits)
        info: dict[str, Any] = {"level_indices": told.to(scalars.dtype), "norm_info": moments}
        if self.training and self.quantize_rate < 1.0:
            noise = native._draw(values)
            found = native._perturb(values, noise[0])
            info["p_accept_prob"] = found.moved.mean(dtype=torch.float32)
            place = found.places.where(noise[1] > self.quantize_rate, place)
        codes = native._output_at(place)
        if values.requires_grad:
            codes = straight_through(values, codes)
        if kept is not None:
            codes, indices = where_kept(kept, codes), indices.where(kept, -1)
        codes = codes.to(scalars.dtype)
        out = (self.project_out(codes) if kept is None else project_out(self.project_out, codes, indices)).to(z.dtype)
        return out.movedim(-1, 1) if self.channel_first else out, indices.to(index_dtype(self.codebook_size)), loss, info

    def _rows(self, z: Tensor) -> Tensor:
        check_tensor("z", z)
        if not z.is_floating_point():
            raise TypeError(f"z is {z.dtype}: must be floating point")
        axis = 1 if self.channel_first else -1
        if z.dim() < 1 + bool(self.channel_first) or z.shape[axis] != self.dim:
            shape = f"[batch, {self.dim}, ...]" if self.channel_first else f"[..., {self.dim}]"
            raise ValueError(f"z has shape {tuple(z.shape)}: must be {shape}")
        return z.movedim(1, -1).contiguous() if self.channel_first else z
