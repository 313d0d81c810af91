"""RandomProjectionQuantizer by the names of vector-quantize-pytorch: a random projection before a `VectorQuantize` that never learns.

Shapes: B batch, N positions, H codebooks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vqkit.compat.vector_quantize_pytorch.arguments import in_these_words
from vqkit.compat.vector_quantize_pytorch.rows import rows_of
from vqkit.compat.vector_quantize_pytorch.vector_quantize_pytorch import VectorQuantize


@in_these_words(handed_to=VectorQuantize)
class RandomProjectionQuantizer(nn.Module):
    """As the peer's: x [B, N, dim] -> indices [B, N] or [B, N, H]; with `indices` of that shape the cross-entropy of the choice.

    Nothing here learns: the projections within `vq`, which several codebooks have, are stored and need no gradient.
    """

    rand_projs: Tensor

    def __init__(
        self, *, dim: int, codebook_size: int, codebook_dim: int, num_codebooks: int = 1, norm: bool = True, **kwargs: Any
    ) -> None:
        super().__init__()
        self.dim, self.num_codebooks = dim, num_codebooks
        self.register_buffer("rand_projs", nn.init.xavier_normal_(torch.empty(num_codebooks, dim, codebook_dim)))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False) if norm else nn.Identity()
        self.vq = VectorQuantize(
            dim=codebook_dim * num_codebooks,
            heads=num_codebooks,
            codebook_size=codebook_size,
            use_cosine_sim=True,
            separate_codebook_per_head=True,
            **kwargs,
        )
        self.vq.requires_grad_(False)

    def forward(self, x: Tensor, indices: Tensor | None = None) -> Tensor:
        rows = self.norm(rows_of(x, self.dim, False))
        projected = rows @ self.rand_projs.movedim(0, 1).flatten(1).to(rows.dtype)
        if self.vq.training:
            self.vq.eval()
        if self.vq.is_watched():
            return self.vq(projected, indices=indices)[1]
        native = self.vq.native  # of what a call of `vq` gives, this alone is read
        return native.encode(projected) if indices is None else native.cross_entropy(projected, self.vq._as_positions(indices, projected))
