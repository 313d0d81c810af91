"""Positions in the model: keys of relative distances for the attention, scaled sinusoids of absolute positions for the embedding."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqkit.models.config import ModelConfig
from vqkit.ops.positions import sinusoids


class PositionKeys(nn.Module):
    """Sinusoids of the distances 0 ... mem_len, projected to one key a head and distance (Transformer-XL, Dai et al. 2019)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dim, self.heads, self.max_distance, self.base = config.dim, config.heads, config.mem_len, config.position_base
        self.weight = nn.Parameter(torch.empty(config.heads * config.key_dim, config.dim))
        # Neither is a buffer: a buffer would lose its precision when a model is narrowed and widened again.
        self._sinusoids: Tensor | None = None
        self._memo: _Memo | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.dim**-0.5)

    def forward(self, dtype: torch.dtype) -> Tensor:
        """[H, M + 1, K] in `dtype`: row d is the key of distance d.

        Without gradient, on a CPU, the keys are remembered while the weight stays as it is: projecting them would cost more than all else
        in a step of decoding, comparing the weight costs next to nothing.
        """
        remember = not (torch.is_grad_enabled() or torch.compiler.is_compiling()) and self.weight.device.type == "cpu"
        if remember and self._memo is not None and self._memo.fits(self.weight, dtype):
            return self._memo.keys
        keys = F.linear(self._table(), self.weight).to(dtype)
        keys = keys.unflatten(-1, (self.heads, -1)).transpose(0, 1)
        if remember:
            self._memo = _Memo(self.weight.clone(), keys)
        return keys

    def _table(self) -> Tensor:
        """Sinusoids [M + 1, D] in the type of the weight, made once."""
        dtype, device = self.weight.dtype, self.weight.device
        table = self._sinusoids
        if table is None or (table.dtype, table.device) != (dtype, device):
            with torch.inference_mode(False):  # later calls may want gradients
                table = sinusoids(self.max_distance + 1, self.dim, self.base, dtype=dtype, device=device)
            if not torch.compiler.is_compiling():
                self._sinusoids = table
        return table


class _Memo(NamedTuple):
    """Keys, and a copy of the weight they were made from: version counters do not tell of a fused optimizer's step."""

    weight: Tensor
    keys: Tensor

    def fits(self, weight: Tensor, dtype: torch.dtype) -> bool:
        return self.keys.dtype == dtype and self.weight.dtype == weight.dtype and torch.equal(self.weight, weight)


class ScaledSinusoids(nn.Module):
    """A learned scalar, initially 0, times the sinusoids of given positions: sines in the first half, cosines in the second."""

    def __init__(self, dim: int, base: float) -> None:
        super().__init__()
        self.dim, self.base = dim, base
        self.scale = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.scale)

    def forward(self, positions: Tensor) -> Tensor:
        """[...] integers -> [..., D] in the type of the scale. Angles are float64, so that far positions keep their phase."""
        exponent = torch.arange(0, self.dim, 2, dtype=torch.float64, device=positions.device) / self.dim
        angle = positions.double()[..., None] * self.base**-exponent
        return self.scale * torch.cat([angle.sin(), angle.cos()], dim=-1).to(self.scale.dtype)


def count_positions(position: Tensor, segment: Tensor, segments: Tensor) -> Tensor:
    """Positions [B, T] within the document of each token; the first goes on at `position` [B] where it is still `segment` [B]."""
    before = torch.cat([segment[:, None], segments[:, :-1]], 1)
    at = torch.arange(segments.shape[1], device=segments.device)
    starts = torch.where(segments != before, at, -position[:, None]).cummax(1).values
    return at - starts
