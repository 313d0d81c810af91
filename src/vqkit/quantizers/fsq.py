"""Finite scalar quantization (Mentzer et al., 2023): each scalar is bounded and rounded; nothing is learned, and no code can die.

Shapes: P... positions of the input, H heads, d scalars of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from vqkit.ops.scalar import Bound, Rounded, level_codes, level_steps, list_codes, per_scalar, round_to_levels, side_by_side
from vqkit.quantizers.base import changed
from vqkit.quantizers.config import Commit, check_choice, check_number, check_positive
from vqkit.quantizers.layout import Layout
from vqkit.quantizers.scalar import ScalarQuantizer


class FSQ(ScalarQuantizer):
    """Scalars rounded to `levels[i]` levels each: prod(levels) codes for every one of `heads` vectors of width len(levels).

    The codes are those of the paper, from about -1 to 1, see `round_to_levels`; with `symmetric` those of Parker et al. (2024), from -1
    to 1 for even levels, too. The output has the gradient of the bounded scalars. `noise_dropout` of the scalars are in training not
    rounded but moved by uniform noise as wide as a step (Parker et al.); with noise_on="codes" they are rounded and then moved by
    noise of width 1, within -1 ... 1. Indices do not show it. With `rotation` scalars are those in axes that an orthogonal matrix, drawn
    once, turns. Where heads * len(levels) is not `dim`
    (None: it is), linear projections stand before and behind.

    `scale`, one number or one a scalar, is what the codes are multiplied by, and the scalars divided by: a later layer of a `Residual`
    has a smaller one. There, `bound="clamp"` leaves scalars between the outermost codes as they are, so that codes add up.

    No codes are stored: index arithmetic is int64 and exact for up to 2^63 - 1 codes. Masked positions get index -1 and zeros, or with
    masked="input" themselves; vectors that are not finite get index -1, zeros and no gradient.

    Raises ValueError for levels below 2, for more codes than an index can name and for choices out of range, TypeError for other kinds.
    """

    def __init__(
        self,
        levels: Sequence[int],
        dim: int | None = None,
        *,
        heads: int = 1,
        symmetric: bool = False,
        bound: Bound = "tanh",
        scale: float | Sequence[float] = 1.0,
        noise_dropout: float = 0.0,
        noise_on: Literal["scalars", "codes"] = "scalars",
        rotation: bool = False,
        layout: Layout = "last",
        masked: Literal["zero", "input"] = "zero",
        commit: Commit = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(levels, dim, heads, rotation=rotation, layout=layout, masked=masked, device=device)
        check_choice("bound", bound, get_args(Bound))
        check_number("noise_dropout", noise_dropout)
        if not 0.0 <= noise_dropout <= 1.0:
            raise ValueError(f"noise_dropout = {noise_dropout}: must be from 0 to 1")
        check_choice("noise_on", noise_on, ("scalars", "codes"))
        if bound.startswith("centred") and 2 in self.levels and not symmetric:
            raise ValueError(
                f'bound = "{bound}": must be "tanh" or "clamp", or symmetric = True, for levels = {self.levels} with 2 among them'
            )
        self.symmetric, self.bound, self.noise_dropout, self.noise_on = symmetric, bound, noise_dropout, noise_on
        self.scale = check_positive("scale", scale, self.width)
        self.commit = commit

    def extra_repr(self) -> str:
        rounding = changed(self, symmetric=False, bound="tanh", scale=1.0, noise_dropout=0.0, noise_on="scalars")
        return super().extra_repr() + rounding

    @property
    def takes_vectors(self) -> bool:
        return self.project_in is None

    @property
    def gives_finite(self) -> bool:
        return True

    def _round(self, vectors: Tensor) -> Rounded:
        turned = self._turn(vectors)
        rows = side_by_side(turned)
        values, digits = round_to_levels(rows, self.levels, symmetric=self.symmetric, bound=self.bound, scale=self.scale)
        return Rounded(values, digits) if rows is turned else Rounded(values.view(vectors.shape), digits.view(vectors.shape))

    def _codes(self, digits: Tensor, dtype: torch.dtype) -> Tensor:
        rows = side_by_side(digits)
        codes = level_codes(rows, self.levels, dtype, symmetric=self.symmetric, scale=self.scale)
        return codes if rows is digits else codes.view(digits.shape)

    def _list(self, like: Tensor) -> Tensor | None:
        return list_codes(level_codes, self.levels, like, symmetric=self.symmetric, scale=self.scale)

    def _estimate(self, values: Tensor, codes: Tensor) -> Tensor:
        output = super()._estimate(values, codes)
        if not self.training or self.noise_dropout == 0.0:
            return output
        if self.noise_on == "codes":
            return self._blur(output)
        step = level_steps(self.levels, values, symmetric=self.symmetric, scale=self.scale)
        moved = values + (torch.rand_like(values) - 0.5) * step
        return torch.where(torch.rand_like(values) < self.noise_dropout, moved, output)

    def _blur(self, codes: Tensor) -> Tensor:
        """Some codes moved by up to half of the scale, within the range of codes."""
        in_order = torch.contiguous_format  # a draw a place, whatever the layout of the input
        chosen = torch.empty_like(codes, memory_format=in_order).bernoulli_(self.noise_dropout)
        noise = torch.rand_like(codes, memory_format=in_order).sub_(0.5)
        if isinstance(self.scale, float):
            return torch.addcmul(codes, chosen, noise, value=self.scale).clamp(-self.scale, self.scale)
        scale = per_scalar(tuple, self.scale, codes)
        return torch.addcmul(codes, chosen, noise * scale).clamp(-scale, scale)
