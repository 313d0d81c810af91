"""BinaryMapper by the names of vector-quantize-pytorch: `vqkit.quantizers.BinaryMapper` on logits.

Shapes: P... positions of the input, b bits, C = 2^b codes.
"""

from __future__ import annotations

from math import log
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from vqkit.compat.vector_quantize_pytorch.arguments import in_these_words
from vqkit.compat.vector_quantize_pytorch.functions import default, exists
from vqkit.compat.vector_quantize_pytorch.rows import hide
from vqkit.compat.vector_quantize_pytorch.settings import Settable
from vqkit.ops.bits import bits_entropy
from vqkit.ops.precision import finite_rows, known_finite
from vqkit.ops.scalar import split_digits
from vqkit.quantizers import binary_mapper
from vqkit.quantizers.binary_mapper import check_temperature
from vqkit.quantizers.committed import WIDE
from vqkit.quantizers.layout import check_indices, check_tensor, where_kept

__all__ = ["NAT", "BinaryMapper", "binary_entropy", "default", "exists"]

NAT = log(2)


def binary_entropy(logits: Tensor) -> Tensor:
    """The entropy [...], in nats, of independent bits of log odds [..., b]."""
    return bits_entropy(logits)


@in_these_words()
class BinaryMapper(Settable):
    """As the peer's: logits [..., bits] -> (one-hot [..., C], loss), with `return_indices` (one-hot, indices int64 [...], loss).

    The gradient is that of the chances of all codes at the temperature of the draw. Raises ValueError and TypeError for what does not fit.
    """

    fixed = frozenset(("bits", "num_codes", "power_two", "codes"))

    codes: Tensor
    zero: Tensor
    native: binary_mapper.BinaryMapper

    def __init__(self, bits: int = 1, kl_loss_threshold: float = NAT, deterministic_on_eval: bool = False) -> None:
        super().__init__()
        native = binary_mapper.BinaryMapper(bits, free_bits=None)
        self.bits, self.num_codes = bits, 2**bits
        self.register_buffer("power_two", 2 ** torch.arange(bits), persistent=False)
        self.register_buffer("codes", split_digits(torch.arange(2**bits), native.levels).bool(), persistent=False)
        self.kl_loss_threshold, self.deterministic_on_eval = kl_loss_threshold, deterministic_on_eval
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)
        hide(self, native=native)

    def binary_entropy(self, logits: Tensor) -> Tensor:
        """The entropy [...] of logits [..., bits]."""
        return binary_entropy(logits)

    def calc_aux_loss(self, logits: Tensor, reduce_aux_kl_loss: bool = True) -> Tensor:
        """What the divergence of the bits from fair coins has above the threshold: the mean, or one number a vector [...]."""
        divergence = (self.bits * NAT - self.kl_loss_threshold - binary_entropy(logits)).relu()
        return divergence.mean() if reduce_aux_kl_loss else divergence

    def _loss_of_kept(self, logits: Tensor, kept: Tensor | None, reduce: bool) -> Tensor:
        """`calc_aux_loss` of the vectors that are kept [...], all 0 elsewhere; 0 where there is none."""
        divergence = self.calc_aux_loss(logits, False)
        divergence = divergence if kept is None else divergence.where(kept, 0.0)
        if not reduce:
            return divergence
        return divergence.sum() / (max(divergence.numel(), 1) if kept is None else kept.sum().clamp(min=1))

    def log_prob(self, logits: Tensor, *, indices: Tensor | None = None, one_hot: Tensor | None = None, sum_bits: bool = True) -> Tensor:
        """The log probability [...] of the codes that `indices` [...] or `one_hot` [..., C] name, or of each of their bits [..., bits]."""
        if (indices is None) == (one_hot is None):
            raise ValueError("indices and one_hot: must be given, exactly one of them")
        found = cast(Tensor, indices if one_hot is None else one_hot.argmax(-1))
        check_indices("indices", found, self.num_codes, logits.shape[:-1])
        each = torch.where(self.codes[found], F.logsigmoid(logits), F.logsigmoid(-logits))
        return each.sum(-1) if sum_bits else each

    def forward(
        self,
        logits: Tensor,
        temperature: float = 1.0,
        straight_through: bool | None = None,
        calc_aux_loss: bool | None = None,
        deterministic: bool | None = None,
        return_indices: bool = False,
        reduce_aux_kl_loss: bool = True,
    ) -> Any:
        check_tensor("logits", logits)
        check_temperature(temperature)
        if logits.dim() < 1 or logits.shape[-1] != self.bits:
            raise ValueError(f"logits has shape {tuple(logits.shape)}: must be [..., {self.bits}]")
        native, kept = self.native, None if known_finite(logits) else finite_rows(logits)
        likeliest = default(deterministic, self.deterministic_on_eval and not self.training)
        gradient = default(straight_through, self.training)
        wide = logits if logits.dtype in WIDE else logits.float()
        wide = wide if kept is None else where_kept(kept, wide)
        scaled = wide if temperature == 1.0 else wide / temperature
        indices = native._join(native._bits(scaled, not likeliest))
        if kept is not None:
            indices = indices.where(kept, -1)
        dtype = wide.dtype if gradient else torch.float32
        one_hot = native._one_hot(indices, dtype, scaled if gradient and scaled.requires_grad else None, whole=kept is None)
        if kept is not None and gradient:
            one_hot = where_kept(kept, one_hot)
        loss = self.zero.clone()
        if default(calc_aux_loss, self.training):
            whole = kept is None and logits.numel() > 0
            loss = self.calc_aux_loss(logits, reduce_aux_kl_loss) if whole else self._loss_of_kept(wide, kept, reduce_aux_kl_loss)
        return (one_hot, indices, loss) if return_indices else (one_hot, loss)
