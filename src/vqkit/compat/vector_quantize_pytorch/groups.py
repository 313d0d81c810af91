"""What the grouped forms share: several residual quantizers, each on its part of the width.

Shapes: P... positions of the input, D its width, G groups, q layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vqkit.compat.vector_quantize_pytorch.arguments import in_these_words
from vqkit.compat.vector_quantize_pytorch.rows import hide
from vqkit.compat.vector_quantize_pytorch.settings import Settable
from vqkit.quantizers.layout import check_tensor


@in_these_words()
class Groups(Settable):
    """`groups` residual quantizers `rvqs`, made for the width dim / groups each. Raises ValueError where that is no width."""

    fixed = frozenset(("dim", "groups", "accept_image_fmap"))

    def __init__(self, dim: int, groups: int, accept_image_fmap: bool, make: Callable[[int], nn.Module]) -> None:
        super().__init__()
        if groups < 1 or dim % groups:
            raise ValueError(f"groups = {groups}: must be at least 1 and divide dim = {dim}")
        self.dim, self.groups, self.accept_image_fmap = dim, groups, accept_image_fmap
        self.rvqs: Any = nn.ModuleList([make(dim // groups) for _ in range(groups)])
        hide(self, native=None)

    @property
    def codebooks(self) -> Tensor:
        """[G, q, C, d]."""
        return torch.stack([rvq.codebooks for rvq in self.rvqs])

    @property
    def split_dim(self) -> int:
        """The axis of the width."""
        return 1 if self.accept_image_fmap else -1

    def get_codes_from_indices(self, indices: Tensor | Sequence[Tensor]) -> Tensor:
        """Indices of a call, one entry a group -> the codes of all layers [G, q, P..., d]."""
        self._check_groups(indices)
        return torch.stack([rvq.get_codes_from_indices(own) for rvq, own in zip(self.rvqs, indices, strict=True)])

    def get_output_from_indices(self, indices: Tensor | Sequence[Tensor]) -> Tensor:
        """Indices of a call, one entry a group -> its output."""
        self._check_groups(indices)
        return torch.cat([rvq.get_output_from_indices(own) for rvq, own in zip(self.rvqs, indices, strict=True)], dim=self.split_dim)

    def _check_groups(self, indices: Tensor | Sequence[Any]) -> None:
        number = 0 if isinstance(indices, Tensor) and not indices.dim() else len(indices)
        if number != self.groups:
            raise ValueError(f"indices has {number} entries: must be {self.groups}, one a group")

    def _pieces(self, x: Tensor) -> Sequence[Tensor]:
        """The part of x for each group. Raises ValueError for another width."""
        check_tensor("x", x)
        axis = self.split_dim
        if x.dim() < 2 or x.shape[axis] != self.dim:
            shape = f"[batch, {self.dim}, ...]" if axis == 1 else f"[batch, ..., {self.dim}]"
            raise ValueError(f"x has shape {tuple(x.shape)}: must be {shape}")
        return x.chunk(self.groups, dim=axis)

    def _joined(self, found: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Any]:
        """What the groups gave: their outputs side by side, and all else by what it is."""
        output, *rest = zip(*found, strict=True)
        return torch.cat(output, dim=self.split_dim), rest
