"""The fixed codebook of the official Transformer-VQ's SimpleVQ: a table of sinusoids that is never trained.

Shapes: B batch, T time, H heads, C codes, K width.
"""

from __future__ import annotations

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

    Its scale is that of the keys of Transformer-VQ. The codebook is no buffer of the state dict: it follows from the arguments.
    """

    codebook: Tensor

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
        self.heads, self.codebook_size, self.dim = heads, codebook_size, dim
        table = sinusoids(codebook_size, dim, base, dtype=torch.float64, device=device)
        codes = table * (table.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * dim**-0.25
        self.register_buffer("codebook", codes.to(dtype).expand(heads, -1, -1).contiguous(), persistent=False)  # [H, C, K]

    def extra_repr(self) -> str:
        return f"heads={self.heads}, codebook_size={self.codebook_size}, dim={self.dim}"

    def quantize(self, x: Tensor, mask: Tensor | None = None) -> QuantizedKeys:
        """As `LearnableVQ.quantize`; there is nothing to learn, so `statistics` is None."""
        check_vectors(x, mask, self.heads, self.dim)
        indices = nearest_index(x, self.codebook)
        x = x.where(indices.unsqueeze(-1) >= 0, 0.0)
        codes = gather_codes(self.codebook.to(torch.promote_types(x.dtype, self.codebook.dtype)), indices)
        return QuantizedKeys(straight_through(x, codes.to(x.dtype)), indices, commitment_loss(x.to(codes.dtype), codes, mask), None)

    forward = quantize

    def encode(self, x: Tensor) -> Tensor:
        """x [B, H, T, K] -> indices [B, H, T] int64; -1 for a vector that is not finite."""
        check_vectors(x, None, self.heads, self.dim)
        return nearest_index(x, self.codebook)

    def decode(self, indices: Tensor) -> Tensor:
        """indices [B, H, T] -> codes [B, H, T, K]; -1 gives zeros."""
        check_indices("indices", indices, self.codebook_size)
        return gather_codes(self.codebook, indices)
