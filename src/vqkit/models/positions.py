"""Positions in the model: keys of relative distances for the attention, scaled sinusoids of absolute positions for the embedding."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqkit.models.config import ModelConfig
from vqkit.models.dropout import drop
from vqkit.ops.positions import sinusoids


class PositionKeys(nn.Module):
    """Sinusoids of distances, projected to one key a key head and distance (Transformer-XL, Dai et al. 2019)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dim, self.heads, self.base = config.dim, config.num_key_heads, config.position_base
        self.num_distances = config.mem_len + 1 if config.attention == "vq" else None
        self.weight = nn.Parameter(torch.empty(self.heads * config.key_dim, config.dim))
        # Neither is a buffer: a buffer would lose its precision when a model is narrowed and widened again.
        self._sinusoids: Tensor | None = None
        self._memo: _Memo | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.dim**-0.5)

    def forward(self, dtype: torch.dtype, length: int | None = None, keep: Tensor | None = None, rate: float = 0.0) -> Tensor:
        """[H, length, K] in `dtype`: row d is the key of distance d; `length` is M + 1 with quantized keys, and must be given otherwise.

        keep [>= length, D] bool: entries of the table that are not dropped, at this rate.
        Without gradient, on a CPU, the keys are remembered while the weight stays as it is: projecting them would cost more than all else
        in a step of decoding, comparing the weight costs next to nothing.
        """
        length = self.num_distances if length is None else length
        if length is None:
            raise ValueError("length = None: must be given where the number of distances grows")
        if keep is not None:
            return self._project(drop(self._table(length), rate, keep[:length]), dtype)
        remember = not (torch.is_grad_enabled() or torch.compiler.is_compiling()) and self.weight.device.type == "cpu"
        if not remember:
            return self._project(self._table(length), dtype)
        if self._memo is None or not self._memo.fits(self.weight, dtype, length):
            self._memo = _Memo(self.weight.clone(), self._project(self._table(self._capacity(length)), dtype))
        return self._memo.keys[:, :length]

    def _project(self, table: Tensor, dtype: torch.dtype) -> Tensor:
        return F.linear(table, self.weight).to(dtype).unflatten(-1, (self.heads, -1)).transpose(0, 1)

    def _capacity(self, length: int) -> int:
        """Rows to make for `length`: where they grow by one a token, they are made twice as many at a time."""
        return length if self.num_distances is not None else 1 << (length - 1).bit_length()

    def _table(self, length: int) -> Tensor:
        """Sinusoids [length, D] in the type of the weight, made once."""
        dtype, device = self.weight.dtype, self.weight.device
        table = self._sinusoids
        if table is None or (table.dtype, table.device) != (dtype, device) or table.shape[0] < length:
            with torch.inference_mode(False):  # later calls may want gradients
                table = sinusoids(self._capacity(length), self.dim, self.base, dtype=dtype, device=device)
            if not torch.compiler.is_compiling():
                self._sinusoids = table
        return table[:length]


class _Memo(NamedTuple):
    """Keys, and a copy of the weight they were made from: version counters do not tell of a fused optimizer's step."""

    weight: Tensor
    keys: Tensor

    def fits(self, weight: Tensor, dtype: torch.dtype, length: int) -> bool:
        same = self.keys.dtype == dtype and self.weight.dtype == weight.dtype and self.keys.shape[1] >= length
        return same and torch.equal(self.weight, weight)


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
