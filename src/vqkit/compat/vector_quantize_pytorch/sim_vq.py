"""SimVQ by the names of vector-quantize-pytorch: `vqkit.quantizers.SimVQ`, with a table and a map of its own.

Shapes: P... positions of the input, C codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Module

from vqkit.compat.vector_quantize_pytorch.arguments import in_these_words
from vqkit.compat.vector_quantize_pytorch.rows import hide
from vqkit.compat.vector_quantize_pytorch.settings import Settable, draws_nothing
from vqkit.ops.codebook import gather_codes
from vqkit.ops.estimators import rotation_trick, straight_through
from vqkit.quantizers import sim_vq
from vqkit.quantizers.config import Commitment
from vqkit.quantizers.layout import check_indices, width_last


def identity(t: Any) -> Any:
    """What it is given."""
    return t


class _OfTable(Module):
    """The user's map of the codes [C, D], which the native codebook has as [1, C, D]."""

    def __init__(self, transform: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, codes: Tensor) -> Tensor:
        return self.transform(codes.squeeze(0)).unsqueeze(0)


@in_these_words()
class SimVQ(Settable):
    """As the peer's: x [B, ..., dim] or, with `channel_first`, [B, dim, ...] -> (quantized, indices int64 [P...], loss).

    The codes are `codebook_transform` of a table that never changes. Raises ValueError and TypeError for what does not fit.
    """

    made_of = frozenset(("code_transform", "channel_first", "rotation_trick", "input_to_quantize_commit_loss_weight"))
    fixed = frozenset(("dim", "codebook_size"))

    frozen_codebook: Tensor
    native: sim_vq.SimVQ

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_transform: Module | None = None,
        init_fn: Callable[[Tensor], Tensor] = identity,
        channel_first: bool = False,
        rotation_trick: bool = True,
        input_to_quantize_commit_loss_weight: float = 0.25,
        commitment_weight: float = 1.0,
        frozen_codebook_dim: int | None = None,
    ) -> None:
        super().__init__()
        width = dim if frozen_codebook_dim is None else frozen_codebook_dim
        table = init_fn(torch.randn(codebook_size, width) * width**-0.5)
        if codebook_transform is None:
            codebook_transform = nn.Linear(width, dim, bias=False)
        self.dim, self.codebook_size, self.channel_first = dim, codebook_size, channel_first
        self.code_transform = codebook_transform
        self.register_buffer("frozen_codebook", table)
        self.rotation_trick = rotation_trick
        self.input_to_quantize_commit_loss_weight = input_to_quantize_commit_loss_weight
        self.commitment_weight = commitment_weight
        self._build()

    def _build(self) -> None:
        share = self.input_to_quantize_commit_loss_weight
        # Where vectors are not pulled to their codes, the estimator stands outside: the loss then has the gradient of the codes alone.
        both = share > 0
        with draws_nothing():
            native = sim_vq.SimVQ(
                self.dim,
                self.codebook_size,
                transform=_OfTable(self.code_transform),
                estimator="none" if not both else "rotation" if self.rotation_trick else "straight_through",
                losses=(Commitment(pull=1.0 / share if both else 1.0),),
                layout="first" if self.channel_first else "last",
                input_gradient=both,
            )
        native.training = False  # what it counts nobody reads
        hide(self, native=native)

    @property
    def codebook(self) -> Tensor:
        """[C, dim], the codes."""
        return self.code_transform(self.frozen_codebook)

    @property
    def codebook_dim(self) -> int:
        """The width of the codes."""
        return self.dim

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """The `quantized` of the call that gave the indices; -1 gives zeros. Raises ValueError for an index that there is not."""
        check_indices("indices", indices, self.codebook_size)
        codes = gather_codes(self.codebook, indices.reshape(-1)).reshape(*indices.shape, self.dim)
        return codes.movedim(-1, 1) if self.channel_first else codes

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        table: Any = self.native.table
        table.weight = self.frozen_codebook.unsqueeze(0)
        found = self.native.quantize(x)
        loss = found.losses["commitment"]
        share = self.input_to_quantize_commit_loss_weight
        quantized = found.quantized if share > 0 else self._estimate(x, found.quantized)
        if share > 0:
            loss = loss.detach().add(loss, alpha=share)
        quantized = quantized if x.requires_grad else quantized.detach()  # whose gradient has no place to go
        return quantized, found.indices, loss if self.commitment_weight == 1.0 else self.commitment_weight * loss

    def _estimate(self, x: Tensor, quantized: Tensor) -> Tensor:
        layout = self.native.layout
        rows, codes = (width_last(tensor, self.dim, layout) for tensor in (x, quantized))
        output = _rotated(rows, codes) if self.rotation_trick else straight_through(rows, codes)
        return output.movedim(-1, 1) if self.channel_first else output


_rotated = rotation_trick
"""By another name than the argument of `SimVQ`."""
