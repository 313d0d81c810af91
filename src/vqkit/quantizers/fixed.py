"""The fixed codebook of the official Transformer-VQ's SimpleVQ: a table of sinusoids that is never trained.

Shapes: B batch, T time, H heads, C codes, K width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vqkit.ops.codebook import gather_codes
from vqkit.ops.estimators import straight_through
from vqkit.ops.losses import commitment_loss
from vqkit.ops.nearest_code import nearest_index
from vqkit.ops.positions import sinusoids
from vqkit.quantizers.layout import check_indices
from vqkit.quantizers.learnable import QuantizedKeys, check_vectors


class SimpleVQ(nn.Module):
    """`codebook_size` codes of width `dim`, equal for all heads: RMS-normalised sinusoids of the code's number, times dim^(-1/4).

    Its scale is that of the keys of Transformer-VQ. The codebook is no buffer: it follows from the arguments, on any device, and in
    float32, or in float64 where the module was made or moved so.
    """

    def __init__(
        self,
        heads: int,
        codebook_size: int,
        dim: int,
        base: float = 100_000.0,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("heads", heads), ("codebook_size", codebook_size)):
            if value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        if dim < 2 or dim % 2:
            raise ValueError(f"dim = {dim}: must be even and at least 2, half sines and half cosines")
        self.heads, self.codebook_size, self.dim, self.base = heads, codebook_size, dim, base
        self._like = torch.empty(0, dtype=dtype, device=device)
        self._made: Tensor | None = None

    def extra_repr(self) -> str:
        return f"heads={self.heads}, codebook_size={self.codebook_size}, dim={self.dim}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        moved = fn(self._like)
        self._like = moved.to(torch.promote_types(moved.dtype, torch.float32))
        return super()._apply(fn, recurse)

    @property
    def codebook(self) -> Tensor:
        """[H, C, K] on the device of the module; on the CPU where it was made on the meta device and not moved since."""
        return self.codes(torch.device("cpu") if self._like.is_meta else self._like.device)

    def codes(self, device: torch.device) -> Tensor:
        """The codebook on a device."""
        dtype = self._like.dtype
        made = self._made
        if made is None or (made.dtype, made.device) != (dtype, device):
            with torch.inference_mode(False):  # later calls may want gradients
                table = sinusoids(self.codebook_size, self.dim, self.base, dtype=torch.float64, device=device)
                codes = table * (table.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.dim**-0.25
                made = codes.to(dtype).expand(self.heads, -1, -1).contiguous()
            if not torch.compiler.is_compiling():
                self._made = made
        return made

    def quantize(self, x: Tensor, mask: Tensor | None = None) -> QuantizedKeys:
        """As `LearnableVQ.quantize`; there is nothing to learn, so `statistics` is None."""
        check_vectors(x, mask, self.heads, self.dim)
        codebook = self.codes(x.device)
        indices = nearest_index(x, codebook)
        x = x.where(indices.unsqueeze(-1) >= 0, 0.0)
        codes = gather_codes(codebook.to(torch.promote_types(x.dtype, codebook.dtype)), indices)
        return QuantizedKeys(straight_through(x, codes.to(x.dtype)), indices, commitment_loss(x.to(codes.dtype), codes, mask), None)

    forward = quantize

    def encode(self, x: Tensor) -> Tensor:
        """x [B, H, T, K] -> indices [B, H, T] int64; -1 for a vector that is not finite."""
        check_vectors(x, None, self.heads, self.dim)
        return nearest_index(x, self.codes(x.device))

    def decode(self, indices: Tensor) -> Tensor:
        """indices [B, H, T] -> codes [B, H, T, K]; -1 gives zeros."""
        check_indices("indices", indices, self.codebook_size)
        return gather_codes(self.codes(indices.device), indices)
