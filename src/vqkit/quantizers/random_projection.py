"""Targets for self-supervised training (BEST-RQ; Chiu et al., 2022): a random projection and a random codebook, neither of which learns.

Shapes: P... positions of the input, D width of the input, H codebooks, C codes, K width of a code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqkit.ops.codebook import directions
from vqkit.ops.nearest_code import nearest_index
from vqkit.ops.precision import finite_rows, without_autocast
from vqkit.quantizers.config import check_count
from vqkit.quantizers.layout import Layout, check_layout, position_mask, where_kept, width_last


class RandomProjectionQuantizer(nn.Module):
    """Vectors [B, ..., dim] -> for each of `heads` codebooks the code whose direction is nearest to that of a random projection.

    Vectors are first brought to mean 0 and variance 1 (`norm`). Projections [D, heads * K] (Xavier) and codes [heads, C, K] of length 1
    are drawn once and are buffers of the state dict; there is no parameter, and nothing to decode. Raises ValueError for sizes below 1
    and an unknown layout, TypeError for sizes that are no integers.
    """

    projection: Tensor
    codebook: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int,
        *,
        heads: int = 1,
        norm: bool = True,
        layout: Layout = "last",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("codebook_size", codebook_size), ("codebook_dim", codebook_dim), ("heads", heads)):
            check_count(name, value)
        check_layout(layout)
        self.dim, self.codebook_size, self.codebook_dim, self.heads, self.norm, self.layout = (
            dim,
            codebook_size,
            codebook_dim,
            heads,
            norm,
            layout,
        )
        self.register_buffer("projection", torch.empty(dim, heads * codebook_dim, device=device))
        self.register_buffer("codebook", torch.empty(heads, codebook_size, codebook_dim, device=device))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw projections and codes anew, by the global random generator."""
        self.projection.normal_(std=(2.0 / (self.dim + self.codebook_dim)) ** 0.5)
        self.codebook.normal_()
        self.codebook.copy_(directions(self.codebook))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, codebook_size={self.codebook_size}, codebook_dim={self.codebook_dim}, heads={self.heads}"

    @torch.no_grad()
    def encode(self, x: Tensor, mask: Tensor | None = None, *, lengths: Tensor | None = None) -> Tensor:
        """x [B, ..., D] or, with layout "first", [B, D, ...] -> indices int64 [P...] or [P..., heads]; -1: masked or not finite.

        mask [P...] bool, or lengths [B] of sequences. Arithmetic is float32 or wider, whatever autocast says.
        """
        rows = width_last(x, self.dim, self.layout)
        mask = position_mask(rows.shape[:-1], mask, lengths)
        kept = finite_rows(rows) if mask is None else finite_rows(rows) & mask
        wide = where_kept(kept, rows).to(torch.promote_types(rows.dtype, torch.float32))
        if self.norm:
            wide = F.layer_norm(wide, (self.dim,))
        with without_autocast(wide.device.type):
            projected = wide.reshape(-1, self.dim) @ self.projection.to(wide.dtype)
        vectors = projected.unflatten(-1, (self.heads, self.codebook_dim)).transpose(0, 1)
        indices = nearest_index(vectors, self.codebook.to(wide.dtype), metric="cosine").T.reshape(*rows.shape[:-1], self.heads)
        indices = indices.where(kept.unsqueeze(-1), -1)
        return indices.squeeze(-1) if self.heads == 1 else indices

    forward = encode
