"""The binary mapper of the Free Transformer (Fleuret, 2025): logits of bits become one code of 2^bits, as a one-hot vector.

In training the bits are drawn; the output is the one-hot vector in value, with the gradient of the probabilities of all codes.

Shapes: P... positions of the input, D width of the input, H heads, b bits of a head, C = 2^b codes of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from vqkit.ops.bits import bits_entropy, product_distribution
from vqkit.ops.scalar import Rounded, join_digits, split_digits
from vqkit.quantizers.base import Quantized, Quantizer
from vqkit.quantizers.config import Commit, FreeBits, check_count, check_kind, check_number
from vqkit.quantizers.layout import Layout, check_indices, where_kept, width_back
from vqkit.quantizers.scalar import ScalarQuantizer

_MOST_BITS = 24
"""Of a head, whose one-hot vector has 2^24 numbers."""


class BinaryMapper(ScalarQuantizer):
    """Logits of `bits` bits for each of `heads` heads become one-hot vectors of 2^bits numbers a head.

    The input is the logits, of width heads * bits, and the output heads * 2^bits wide; with `dim`, linear layers stand before and behind,
    so that both have that width: the second is a table with a vector for each code of each head. In training bit i is 1 with probability
    sigmoid(logit i / temperature), in evaluation where its logit is above 0; the first bit is the lowest of an index. The gradient is that
    of the probability of each code at that temperature (equation 8 there), as if the output were these.

    `free_bits`, the loss, is the Kullback-Leibler divergence of the bits from fair coins beyond what is free; None: no loss. Masked
    positions and logits that are not finite get index -1 and zeros.

    Raises ValueError for more than 24 bits a head and sizes that do not fit, TypeError for other kinds.
    """

    def __init__(
        self,
        bits: int,
        dim: int | None = None,
        *,
        heads: int = 1,
        free_bits: FreeBits | None = FreeBits(),  # noqa: B008 - frozen
        layout: Layout = "last",
        commit: Commit = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        check_count("bits", bits)
        if bits > _MOST_BITS:
            raise ValueError(f"bits = {bits}: must be at most {_MOST_BITS}, as an output has 2^bits numbers a head; take more heads")
        if dim is not None:
            check_count("dim", dim)
        super().__init__((2,) * bits, None, heads, layout=layout, masked="zero", device=device)
        if free_bits is not None:
            check_kind("free_bits", free_bits, FreeBits)
        self.free_bits = free_bits
        if dim is not None:
            self.dim = dim
            self.project_in = nn.Linear(dim, heads * bits, device=device)
            self.project_out = nn.Linear(heads * self.codebook_size, dim, bias=False, device=device)
        self.commit = commit

    def extra_repr(self) -> str:
        return f"dim={self.dim}, bits={self.width}, heads={self.heads}, free_bits={self.free_bits}"

    @property
    def out_dim(self) -> int:
        """`dim`, or heads * 2^bits where that is not given."""
        return self.heads * self.codebook_size if self.project_out is None else self.dim

    @property
    def loss_weights(self) -> dict[str, float]:
        return {} if self.free_bits is None else {"free_bits": self.free_bits.weight}

    @property
    def codebook(self) -> Tensor:
        """[C, b], the bits of all codes. Raises ValueError for more than 2^20."""
        return self.counts.codes()[0]

    def quantize(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        freeze_codebook: bool = False,
        indices: Tensor | None = None,
        temperature: float = 1.0,
        draw: bool | None = None,
    ) -> Quantized:
        """x [B, ..., D] or, with layout "first", [B, D, ...]; mask [P...] bool, or lengths [B] of sequences.

        `indices` [P..., heads?] are taken instead of drawing; -1: none. `draw` says whether bits are drawn; None: in training. The loss is
        that of the logits, whatever the `temperature`, a positive number.
        """
        check_temperature(temperature)
        given = self._read(x, mask, lengths)
        positions = given.rows.shape[:-1]
        if indices is not None:
            check_indices("indices", indices, self.codebook_size, torch.Size((*positions, *self.code_shape)))
        logits = given.vectors if temperature == 1.0 else given.vectors / temperature
        found = join_digits(self._bits(logits, self.training if draw is None else draw), self.levels)
        kept = None if given.finite is None else given.finite.unsqueeze(-1).expand(found.shape)
        if indices is not None:
            found = indices.to(torch.int64).reshape(found.shape)
            kept = given.kept.unsqueeze(-1) & (found >= 0)
        if kept is not None:
            found = found.where(kept, -1)
        losses = {} if self.free_bits is None else {"free_bits": self._divergence(given.vectors, kept, self.free_bits)}
        output = self._one_hot(found, logits.dtype, logits if logits.requires_grad else None, whole=kept is None)
        if kept is not None and logits.requires_grad:
            output = where_kept(kept, output)  # no gradient where there is no code
        statistics = None
        if self.training and not freeze_codebook:
            chances = torch.sigmoid(logits.detach())
            statistics = self._statistics(given, chances, found, split_digits(found, self.levels).to(logits.dtype), indices)
        found = found.reshape(*positions, *self.code_shape)
        return Quantized(self._write(given, output, None if kept is None else found), found, losses, statistics)

    def decode(self, indices: Tensor) -> Tensor:
        """indices [P...] or [P..., heads] -> one-hot vectors, side by side, or what the layer behind makes of them; zeros for -1."""
        self._look_up(indices)
        found = indices.to(torch.int64)
        one_hot = self._one_hot(found, torch.float32 if self.project_out is None else self.project_out.weight.dtype)
        return width_back(self._project_out(one_hot if self.heads == 1 else one_hot.flatten(-2), indices), self.layout)

    encode_and_decode = Quantizer.encode_and_decode

    def decode_codes(self, indices: Tensor) -> Tensor:
        """indices [P...] or [P..., heads] -> their bits, of width heads * b; zeros for -1."""
        return super().decode_codes(indices)

    def nearest(self, x: Tensor, num: int) -> tuple[Tensor, Tensor]:
        """Raises ValueError: codes are chances of bits, none of them is near a vector."""
        raise ValueError("nearest: a BinaryMapper has no codes that are near a vector; take FSQ or LFQ for a beam search")

    def _bits(self, logits: Tensor, draw: bool) -> Tensor:
        """[..., b], 0 or 1 in the dtype of the logits."""
        logits = logits.detach()
        return torch.bernoulli(torch.sigmoid(logits)) if draw else (logits > 0.0).to(logits.dtype)

    def _one_hot(self, indices: Tensor, dtype: torch.dtype, logits: Tensor | None = None, *, whole: bool = False) -> Tensor:
        """[...] -> [..., C]; -1, of which `whole` says that there is none, gives zeros.

        With the gradient of the chances of all codes that `logits` [..., b] say, if given.
        """
        if logits is None:
            vectors = torch.zeros(*indices.shape, self.codebook_size, dtype=dtype, device=indices.device)
        else:
            chances = product_distribution(logits)
            vectors = chances - chances.detach()
        places = indices.unsqueeze(-1)
        if not whole:
            return vectors.scatter_add(-1, places.clamp(min=0), (places >= 0).to(vectors.dtype))
        if logits is None:
            return vectors.scatter(-1, places, 1.0)
        return vectors.scatter_add(-1, places, vectors.new_ones(()).expand(places.shape))

    def _divergence(self, logits: Tensor, kept: Tensor | None, free: FreeBits) -> Tensor:
        """The mean over vectors and heads."""
        beyond = (self.width * math.log(2.0) - free.threshold - bits_entropy(logits)).relu()
        if kept is None:
            return beyond.sum() / max(beyond.numel(), 1)
        return beyond.where(kept, 0.0).sum() / kept.sum().clamp(min=1)

    def _round(self, vectors: Tensor) -> Rounded:
        return Rounded(vectors, self._bits(vectors, draw=False))

    def _codes(self, digits: Tensor, dtype: torch.dtype) -> Any:
        return digits.to(dtype)


def check_temperature(temperature: float) -> None:
    """Raise TypeError unless it is a number, ValueError unless it is positive and finite."""
    check_number("temperature", temperature)
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature = {temperature}: must be positive and finite")
