"""The peer's Sequential: layers around one quantizer, whose other results are handed through."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from torch import nn

from vqkit.compat.vector_quantize_pytorch.finite_scalar_perturbation import FSP
from vqkit.compat.vector_quantize_pytorch.finite_scalar_quantization import FSQ
from vqkit.compat.vector_quantize_pytorch.hierarchical_vq import HierarchicalVQ
from vqkit.compat.vector_quantize_pytorch.latent_quantization import LatentQuantize
from vqkit.compat.vector_quantize_pytorch.lookup_free_quantization import LFQ
from vqkit.compat.vector_quantize_pytorch.random_projection_quantizer import RandomProjectionQuantizer
from vqkit.compat.vector_quantize_pytorch.residual_fsq import GroupedResidualFSQ, ResidualFSQ
from vqkit.compat.vector_quantize_pytorch.residual_lfq import GroupedResidualLFQ, ResidualLFQ
from vqkit.compat.vector_quantize_pytorch.residual_sim_vq import ResidualSimVQ
from vqkit.compat.vector_quantize_pytorch.residual_vq import GroupedResidualVQ, ResidualVQ
from vqkit.compat.vector_quantize_pytorch.sim_vq import SimVQ
from vqkit.compat.vector_quantize_pytorch.vector_quantize_pytorch import VectorQuantize

QUANTIZE_KLASSES = (
    VectorQuantize,
    ResidualVQ,
    GroupedResidualVQ,
    RandomProjectionQuantizer,
    FSQ,
    LFQ,
    SimVQ,
    ResidualSimVQ,
    ResidualLFQ,
    GroupedResidualLFQ,
    ResidualFSQ,
    GroupedResidualFSQ,
    FSP,
    LatentQuantize,
    HierarchicalVQ,
)
"""What may stand in a `Sequential` as its quantizer."""


class Sequential(nn.Module):
    """Modules one after the other, one of which is a quantizer: its first result goes on, and all others are returned behind the output.

    `kwargs` of a call are the quantizer's. Raises ValueError unless there is exactly one.
    """

    def __init__(self, *fns: nn.Module) -> None:
        super().__init__()
        number = sum(isinstance(fn, QUANTIZE_KLASSES) for fn in fns)
        if number != 1:
            raise ValueError(f"fns holds {number} quantizers: must hold exactly one")
        self.fns = nn.ModuleList(fns)

    def forward(self, x: Any, **kwargs: Any) -> tuple[Any, ...]:
        """x -> (output, the other results of the quantizer)."""
        rest: list[Any] = []
        for fn in cast(Iterable[nn.Module], self.fns):
            if isinstance(fn, QUANTIZE_KLASSES):
                x, *rest = fn(x, **kwargs)
            else:
                x = fn(x)
        return (x, *rest)
