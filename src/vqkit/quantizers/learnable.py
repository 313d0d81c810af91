"""The learnable codebook of Transformer-VQ (Lingle, 2024): moving averages of count and sum per code.

`quantize` is pure: it reads the codebook and returns statistics. They are collected by `add_statistics_` and enter the codebook at one
named place, `update_codebooks_`, once per optimizer step; so recomputation, accumulation and data parallelism count nothing twice.

Shapes: B batch, T time, H heads with a codebook each, C codes, K width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vqkit.dist import Reducer
from vqkit.ops.codebook import CodebookStatistics, assignment_stats, gather_codes
from vqkit.ops.estimators import straight_through
from vqkit.ops.losses import commitment_loss
from vqkit.ops.nearest_code import nearest_index
from vqkit.quantizers.codebook import Codebook
from vqkit.quantizers.commit import add_statistics_ as add_statistics_
from vqkit.quantizers.commit import update_codebooks_ as update_codebooks_
from vqkit.quantizers.config import ClipEMA, CodebookConfig, DeadCodes, KMeans
from vqkit.quantizers.layout import check_indices
from vqkit.quantizers.update import stored_codes


class QuantizedKeys(NamedTuple):
    """What `quantize` makes of x [B, H, T, K]."""

    quantized: Tensor  # [B, H, T, K] in the dtype of x: the codes, with the gradient straight through to x
    indices: Tensor  # [B, H, T] int64; -1 for a vector that is not finite, whose code is 0 and whose gradient is none
    commitment: Tensor  # [] mean over B * T of the squared error summed over K and heads; masked positions add 0
    statistics: CodebookStatistics | None


def check_vectors(x: Tensor, mask: Tensor | None, heads: int, dim: int) -> None:
    """Raise unless x is [B, heads, T, dim] floating point and mask, if any, [B, T] bool."""
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}: must be floating point")
    if x.dim() != 4 or x.shape[1] != heads or x.shape[3] != dim:
        raise ValueError(f"x has shape {tuple(x.shape)}: must be [batch, {heads}, time, {dim}]")
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"mask is {mask.dtype}: must be torch.bool")
    if mask.shape != (x.shape[0], x.shape[2]):
        raise ValueError(f"mask has shape {tuple(mask.shape)}: must be {(x.shape[0], x.shape[2])}, the batch and time of x")


class LearnableVQ(Codebook):
    """`heads` codebooks of `codebook_size` codes of width `dim`: codes = sum / max(count, 0.01). A `Codebook` that quantizes.

    `sum` [H, C, K] and `count` [H, C] are float32 or float64 and are never made narrower by `.to()`, `.half()` and the like. `pending`
    holds the statistics added since the last update; it is no buffer, so that nothing broadcasts over it, but moves with the module and
    stands in the state dict. `updates` counts the updates. At the start sum is normal with standard deviation 1 / sqrt(heads *
    codebook_size) and count is 1, as in the official implementation; with config.init = "kmeans" call `initialize_` first.
    With config.dead_code_threshold, up to 64 dead codes a head and update start anew at random vectors of that update, with a count of
    twice the threshold; where that is above 1 all counts start there, so that no code is dead before its time.
    """

    def __init__(
        self,
        heads: int,
        codebook_size: int,
        dim: int,
        config: CodebookConfig | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        self.config = config or CodebookConfig()
        threshold = self.config.dead_code_threshold
        super().__init__(
            heads,
            codebook_size,
            dim,
            update=ClipEMA(self.config.decay),
            init=KMeans() if self.config.init == "kmeans" else "normal",
            dead_codes=DeadCodes(threshold) if threshold else None,
            moments=False,
            dtype=dtype,
            device=device,
        )

    def extra_repr(self) -> str:
        return f"heads={self.heads}, codebook_size={self.codebook_size}, dim={self.dim}, {self.config}"

    @property
    def codebook_size(self) -> int:
        return self.size

    # Reading

    @property
    def codebook(self) -> Tensor:
        """[H, C, K]; before a k-means start the random codes that it will replace. Setting it forgets counts and what is pending."""
        return stored_codes(self.update, self.committed_state())

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        self.set_codes_(codes)

    def quantize(self, x: Tensor, mask: Tensor | None = None, statistics: bool = True) -> QuantizedKeys:
        """x [B, H, T, K], mask [B, T] bool, True where a position counts. Changes nothing.

        Masked positions are quantized like others but enter neither commitment nor statistics. Raises ValueError for shapes that do
        not fit and before the codebook is initialized, TypeError for a mask that is not bool.
        """
        check_vectors(x, mask, self.heads, self.dim)
        codebook = self.codes()
        indices = nearest_index(x, codebook)
        x = x.where(indices.unsqueeze(-1) >= 0, 0.0)  # what is not finite is 0, as its code, and gets no gradient
        codes = gather_codes(codebook.to(torch.promote_types(x.dtype, codebook.dtype)), indices)
        return QuantizedKeys(
            straight_through(x, codes.to(x.dtype)),
            indices,
            commitment_loss(x.to(codes.dtype), codes, mask),
            assignment_stats(x, indices, self.size, mask, num_candidates=self.num_candidates) if statistics else None,
        )

    forward = quantize

    def encode(self, x: Tensor) -> Tensor:
        """x [B, H, T, K] -> indices [B, H, T] int64; -1 for a vector that is not finite."""
        check_vectors(x, None, self.heads, self.dim)
        return nearest_index(x, self.codes())

    def decode(self, indices: Tensor) -> Tensor:
        """indices [B, H, T] -> codes [B, H, T, K]; -1 gives zeros."""
        if indices.dim() < 2 or indices.shape[-2] != self.heads:
            raise ValueError(f"indices has shape {tuple(indices.shape)}: must be [..., {self.heads}, time]")
        check_indices("indices", indices, self.size)
        return gather_codes(self.codes(), indices)

    # Changing

    @torch.no_grad()
    def initialize_(self, x: Tensor, mask: Tensor | None = None, *, seed: int = 0, reducer: Reducer | None = None) -> None:
        """Set the codebook to the k-means of x [B, H, T, K] and count to what each code has of them; discards what is pending.

        mask [B, T] bool. Vectors that are masked or not finite take no part. With several ranks `reducer` makes the result that of all
        their vectors. Raises ValueError when a head has no vector.
        """
        check_vectors(x, mask, self.heads, self.dim)
        vectors = x.movedim(1, 0).reshape(self.heads, -1, self.dim)
        super().initialize_(vectors, None if mask is None else mask.reshape(-1), seed=seed, reducer=reducer)

    def commit_(self, reducer: Reducer | None = None) -> None:
        """`update_codebooks_` of this module alone."""
        update_codebooks_(self, reducer)
