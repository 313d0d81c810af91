"""SimVQ (Zhu et al., 2024): the codes are a learned map of a table that never changes, so that every step moves all of them."""

from __future__ import annotations

from typing import Any

from torch import nn

from vqkit.quantizers.config import MLP, Commitment, Frozen, VQBridge
from vqkit.quantizers.vector_quantize import VectorQuantize

_LOSSES = (Commitment(weight=0.25, pull=4.0),)


class SimVQ(VectorQuantize):
    """A `VectorQuantize` whose codes are `transform` ("linear", `MLP(...)`, `VQBridge(...)` or a module) of frozen random vectors.

    The map learns by the optimizer of the model: from the loss, Commitment(weight=0.25, pull=4.0) unless given, which pulls codes to
    vectors four times as much as vectors to codes. `init` is "unit" unless given. Other options are those of `VectorQuantize` but for
    what has no meaning here: `update`, `dead_codes`, `affine` and `code_weights`.
    Raises ValueError and TypeError as `VectorQuantize` does, TypeError for these four.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        transform: str | MLP | VQBridge | nn.Module = "linear",
        **options: Any,
    ) -> None:
        for name in ("update", "dead_codes", "affine", "code_weights"):
            if name in options:
                raise TypeError(f"{name}: is no option of SimVQ, whose table is frozen; take VectorQuantize")
        if transform is None:
            raise ValueError("transform = None: must be one, as the table is frozen")
        options = {"init": "unit", "losses": _LOSSES, **options}
        super().__init__(dim, codebook_size, transform=transform, update=Frozen(), **options)
