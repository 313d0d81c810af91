"""Finite scalar perturbation (VP-VAE, 2026): scalars fall into bins of equal probability; in training noise stands for the choice of one.

Shapes: P... positions of the input, H heads, d scalars of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from vqkit.ops.estimators import straight_through
from vqkit.ops.perturbation import MOMENTS, UNIFORM_STD, Distribution, Perturbed, bin_codes, bins, cdf, centres, moments, output_at, perturb
from vqkit.ops.scalar import Rounded, list_codes
from vqkit.quantizers.base import Quantized, changed
from vqkit.quantizers.config import Commit, Moments, check_choice, check_kind, check_number
from vqkit.quantizers.layout import Layout, check_tensor, width_last
from vqkit.quantizers.scalar import ScalarQuantizer

_NAMES = ("mean", "variance", "skewness", "kurtosis")


class FSP(ScalarQuantizer):
    """Scalars in `levels[i]` bins each: prod(levels) codes for every one of `heads` vectors of width len(levels).

    A scalar goes through the distribution function `cdf` into 0 ... 1, which `levels[i]` bins of equal width share. In training it moves
    by up to half a bin at random, so that what is behind sees all of a bin, with the gradient of the place itself; a `quantize_rate` of
    the scalars, drawn anew in every call, and in evaluation all, are put to the middle of their bin, with that gradient, too. Indices
    always name the bin. With output="uniform" the output is the place in 0 ... 1, brought to mean 0 and variance 1; with "latent" it is
    brought back by the inverse of `cdf`, with the gradient of the scalar.

    `moments`, the loss, keeps the scalars near the distribution for which bins are used alike; None: no loss. `scale` is what scalars are
    divided by, and the output multiplied by. Places stay `eps` away from 0 and 1 (None: as far as their dtype tells them apart). Where
    heads * len(levels) is not `dim` (None: it is), linear projections stand around.

    Masked positions get index -1 and zeros, or with masked="input" themselves; vectors that are not finite get index -1, zeros, no loss
    and no gradient. Raises ValueError for levels below 2, for more codes than an index can name, for choices out of range, and for
    cdf="cauchy", which has no moments, without targets of `moments`; TypeError for other kinds.
    """

    def __init__(
        self,
        levels: Sequence[int],
        dim: int | None = None,
        *,
        heads: int = 1,
        cdf: Distribution = "normal",
        output: Literal["uniform", "latent"] = "uniform",
        quantize_rate: float = 0.0,
        moments: Moments | None = Moments(),  # noqa: B008 - frozen
        scale: float = 1.0,
        eps: float | None = None,
        layout: Layout = "last",
        masked: Literal["zero", "input"] = "zero",
        commit: Commit = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(levels, dim, heads, layout=layout, masked=masked, device=device)
        check_choice("cdf", cdf, get_args(Distribution))
        check_choice("output", output, ("uniform", "latent"))
        for name, value in (("quantize_rate", quantize_rate), ("scale", scale)):
            check_number(name, value)
        if not 0.0 <= quantize_rate <= 1.0:
            raise ValueError(f"quantize_rate = {quantize_rate}: must be from 0 to 1")
        if not 0.0 < scale < math.inf:
            raise ValueError(f"scale = {scale}: must be positive and finite")
        if eps is not None:
            check_number("eps", eps)
            if not 0.0 < eps < 0.5:
                raise ValueError(f"eps = {eps}: must be None or between 0 and 1/2")
        self.eps = eps
        self._noise: Tensor | None = None
        self.cdf: Distribution = cdf
        self.output, self.quantize_rate, self.scale = output, quantize_rate, scale
        self.moments, self.targets = moments, _targets(moments, cdf)
        self.commit = commit

    def extra_repr(self) -> str:
        own = f", cdf={self.cdf!r}, moments={self.moments}"
        return super().extra_repr() + own + changed(self, output="uniform", quantize_rate=0.0, scale=1.0, eps=None)

    @property
    def loss_weights(self) -> dict[str, float]:
        found = {} if self.moments is None else {name: getattr(self.moments, name) for name in _NAMES}
        return {name: weight for name, weight in found.items() if weight > 0}

    def quantize(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        freeze_codebook: bool = False,
        indices: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Quantized:
        """As other quantizers of scalars; `noise` [2, P..., heads * d], uniform from 0 to 1, stands for what training draws.

        The first says where in its bin a scalar goes, the second is compared with `quantize_rate`. Raises ValueError for another shape.
        """
        if noise is not None:
            shape = (2, *width_last(x, self.dim, self.layout).shape[:-1], self.heads * self.width)
            check_tensor("noise", noise)
            if noise.shape != shape:
                raise ValueError(f"noise has shape {tuple(noise.shape)}: must be {shape}")
        self._noise = noise
        try:
            return super().quantize(x, mask, lengths=lengths, freeze_codebook=freeze_codebook, indices=indices)
        finally:
            self._noise = None

    def _round(self, vectors: Tensor) -> Rounded:
        latent = self.output == "latent"
        place = self._place(vectors.detach() if latent else vectors)
        inside = place if self.eps is None else place.detach().clamp(max=1.0 - self.eps)
        return Rounded(vectors if latent else (place - 0.5) * (self.scale / UNIFORM_STD), bins(inside, self.levels))

    def _place(self, vectors: Tensor) -> Tensor:
        """Where in 0 ... 1 scalars are."""
        return cdf(vectors if self.scale == 1.0 else vectors / self.scale, self.cdf)

    def _codes(self, digits: Tensor, dtype: torch.dtype) -> Tensor:
        return bin_codes(digits, self.levels, dtype, distribution=self._told, scale=self.scale, eps=self.eps)

    def _list(self, like: Tensor) -> Tensor | None:
        return list_codes(bin_codes, self.levels, like, distribution=self._told, scale=self.scale, eps=self.eps)

    @property
    def _told(self) -> Distribution | None:
        """That whose scalars the output is; None: it is a standard place."""
        return self.cdf if self.output == "latent" else None

    def _middles(self, digits: Tensor, dtype: torch.dtype) -> Tensor:
        """Of bins: places in 0 ... 1 or, where the output is "uniform", standard ones."""
        return centres(digits, self.levels, dtype, standard=self.output == "uniform")

    def _output_at(self, place: Tensor) -> Tensor:
        """The output for places as of `_middles`."""
        return output_at(place, self._told, scale=self.scale, eps=self.eps)

    def _estimate(self, values: Tensor, codes: Tensor) -> Tensor:
        if self.training and self.quantize_rate < 1.0:
            noise = self._draw(values) if self._noise is None else self._noise.reshape(2, *values.shape).to(values.dtype)
            codes = self._output_at(self._perturb(values, noise[0]).places).where(noise[1] > self.quantize_rate, codes)
        return straight_through(values, codes) if values.requires_grad else codes

    def _draw(self, values: Tensor) -> Tensor:
        """The noise [2, ..., d] of a training call."""
        return torch.rand(2, *values.shape, dtype=values.dtype, device=values.device)

    def _perturb(self, values: Tensor, noise: Tensor) -> Perturbed:
        """Values of `_round` -> places as of `_middles`, moved."""
        values, standard = values.detach(), self.output == "uniform"
        place = values if standard and self.scale == 1.0 else values / self.scale if standard else self._place(values)
        return perturb(place, self.levels, noise, standard=standard)

    def _losses(self, vectors: Tensor, values: Tensor, codes: Tensor, kept: Tensor | None) -> dict[str, Tensor]:
        names = self.loss_weights
        if not names:
            return {}
        kept = vectors.new_ones(vectors.shape[:-1], dtype=torch.bool) if kept is None else kept
        share = kept.flatten(0, -2)
        found = moments((vectors / self.scale).flatten(0, -3), share.to(vectors.dtype))
        enough = share.sum(0).unsqueeze(-1) > 1
        pairs = zip(_NAMES, found, self.targets, strict=True)
        return {name: (value - target).square().where(enough, 0.0).mean() for name, value, target in pairs if name in names}


def _targets(wanted: Moments | None, distribution: Distribution) -> tuple[float, ...]:
    if wanted is None:
        return ()
    check_kind("moments", wanted, Moments)
    if wanted.targets is not None:
        return wanted.targets
    if distribution not in MOMENTS:
        raise ValueError(f'cdf = "{distribution}": must come with moments = None or Moments(targets=...), as it has no moments of its own')
    return MOMENTS[distribution]
