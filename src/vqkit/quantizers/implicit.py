"""Implicit neural codebooks (QINCo; Huijben et al., 2024): the codes of a layer depend on what the layers before it already said.

A small network turns each code of a base codebook into one for the vector at hand, given the partial reconstruction of that vector. So
every vector has a codebook of its own, which is built in chunks of vectors, searched, and forgotten; only the chosen code is computed
once more, with a gradient.

Shapes: N vectors, C codes, D width, P nearest codes asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqkit.dist import Reducer
from vqkit.ops.codebook import gather_codes
from vqkit.ops.estimators import directional, rotation_trick, straight_through
from vqkit.ops.losses import mean_commitment_loss
from vqkit.quantizers.base import Quantized, Quantizer
from vqkit.quantizers.codebook import Codebook
from vqkit.quantizers.config import MLP, Commit, Commitment, DeadCodes, DiVeQ, Estimator, Gradient, Init, check_choice
from vqkit.quantizers.layout import check_indices, position_mask, width_last

_ELEMENTS = 2**22
"""About how many numbers one table of codes may hold."""


class ImplicitVQ(Quantizer):
    """A layer of `Residual` whose codes are those of a base codebook after a network that also sees the partial reconstruction.

    Codes and network learn by the optimizer of the model: from the loss "codebook", the mean squared distance of the codes to their
    vectors, which are constants there, of weight 1; `losses` may weigh the commitment of the vectors. Called on its own the partial
    reconstruction is zero. Other arguments as for `VectorQuantize`.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        network: MLP,
        *,
        estimator: Estimator = "rotation",
        init: Init = "uniform",
        dead_codes: DeadCodes | None = None,
        update: Gradient | None = None,
        losses: Sequence[Commitment] = (Commitment(),),
        commit: Commit = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        update = Gradient() if update is None else update
        if not isinstance(update, Gradient):
            raise ValueError(f"update = {update}: must be Gradient(), as codes behind a network learn")
        if not all(isinstance(loss, Commitment) for loss in losses) or len(losses) > 1:
            raise ValueError(f"losses = {tuple(losses)}: must be () or one Commitment")
        check_estimator(estimator)
        self.dim, self.codebook_size, self.estimator, self.losses = dim, codebook_size, estimator, tuple(losses)
        self.table = Codebook(1, codebook_size, dim, update=update, init=init, dead_codes=dead_codes, device=device)
        self.network = ConditionalCodes(dim, network.hidden, network.depth, device=device)
        self.commit = commit

    def extra_repr(self) -> str:
        return f"dim={self.dim}, codebook_size={self.codebook_size}, estimator={self.estimator!r}"

    def codebooks(self) -> list[Codebook]:
        return [self.table]

    @property
    def code_shape(self) -> tuple[int, ...]:
        return ()

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return (self.codebook_size,)

    @property
    def loss_weights(self) -> dict[str, float]:
        return {"codebook": 1.0} | ({"commitment": self.losses[0].weight} if self.losses else {})

    @property
    def codebook(self) -> Tensor:
        """[C, D], the base codebook."""
        return self.table.codes().squeeze(0)

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        if codes.shape != (self.codebook_size, self.dim):
            raise ValueError(f"codebook has shape {tuple(codes.shape)}: must be {(self.codebook_size, self.dim)}")
        self.table.codebook = codes.unsqueeze(0)

    def quantize(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        partial: Tensor | None = None,
        freeze_codebook: bool = False,
        indices: Tensor | None = None,
    ) -> Quantized:
        """x [B, ..., D], mask [B, ...] bool, `partial` the partial reconstruction of the shape of x; `indices` instead of the nearest."""
        rows = width_last(x, self.dim, "last")
        positions = rows.shape[:-1]
        counted = position_mask(positions, mask, None)
        wide = rows.to(torch.promote_types(x.dtype, self.table.dtype))
        partial = torch.zeros_like(wide) if partial is None else partial.to(wide.dtype)
        _check_partial(partial, wide)
        flat = wide.reshape(positions.numel(), self.dim)
        self.table.start_(flat.unsqueeze(0), None if counted is None else counted.reshape(-1))
        if indices is None:
            indices = self._nearest(flat, partial.reshape(flat.shape), 1)[0].reshape(positions)
        else:
            check_indices("indices", indices, self.codebook_size, positions)
            indices = torch.where(wide.detach().isfinite().all(-1), indices, -1)
        if counted is not None:
            indices = torch.where(counted, indices, -1)
        known = indices >= 0
        codes = self.decode(indices, partial=partial.where(known.unsqueeze(-1), 0.0)).to(wide.dtype)
        if freeze_codebook:
            codes = codes.detach()
        wide = wide.where(known.unsqueeze(-1), 0.0)
        losses = {"codebook": mean_commitment_loss(codes, wide, known)}
        if self.losses:
            losses["commitment"] = mean_commitment_loss(wide, codes, known)
        statistics = None
        if self.training and not freeze_codebook:
            chosen = codes.detach().reshape(1, *flat.shape)
            kept = None if counted is None else counted.reshape(-1)
            statistics = (self.table.statistics(flat.unsqueeze(0), indices.reshape(1, -1), mask=kept, quantized=chosen),)
        return Quantized(pass_gradient(self.estimator, wide, codes, self.training).to(x.dtype), indices, losses, statistics)

    def nearest(self, x: Tensor, num: int, *, partial: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The nearest codes of x [N, D], given its partial reconstruction [N, D]: indices [N, P] and codes [N, P, D]; P = min(num, C)."""
        wide = x.to(torch.promote_types(x.dtype, self.table.dtype))
        return self._nearest(wide, torch.zeros_like(wide) if partial is None else partial.to(wide.dtype), num)

    def _nearest(self, x: Tensor, partial: Tensor, num: int) -> tuple[Tensor, Tensor]:
        return nearest_implicit(self.network, x, partial, self.table.codes().squeeze(0).to(x.dtype), num)

    def encode(self, x: Tensor, mask: Tensor | None = None, *, partial: Tensor | None = None) -> Tensor:
        """x [B, ..., D], `partial` of its shape -> indices [B, ...]."""
        rows = width_last(x, self.dim, "last")
        counted = position_mask(rows.shape[:-1], mask, None)
        wide = rows.to(torch.promote_types(x.dtype, self.table.dtype)).reshape(-1, self.dim)
        partial = torch.zeros_like(wide) if partial is None else partial.to(wide.dtype).reshape(wide.shape)
        indices = self._nearest(wide, partial, 1)[0].reshape(rows.shape[:-1])
        return indices if counted is None else torch.where(counted, indices, -1)

    def decode(self, indices: Tensor, *, partial: Tensor | None = None) -> Tensor:
        """indices [B, ...], `partial` [B, ..., D] -> codes [B, ..., D]; -1 gives zeros."""
        check_indices("indices", indices, self.codebook_size)
        base = gather_codes(self.table.codes().squeeze(0), indices.reshape(-1)).reshape(*indices.shape, self.dim)
        partial = torch.zeros_like(base) if partial is None else partial
        _check_partial(partial, base)
        dtype = torch.promote_types(base.dtype, partial.dtype)
        return self.network(base.to(dtype), partial.to(dtype)).where((indices >= 0).unsqueeze(-1), 0.0)

    def decode_codes(self, indices: Tensor, *, partial: Tensor | None = None) -> Tensor:
        """As `decode`."""
        return self.decode(indices, partial=partial)

    @torch.no_grad()
    def initialize_(self, x: Tensor, mask: Tensor | None = None, *, seed: int = 0, reducer: Reducer | None = None) -> None:
        """Set the base codebook to the k-means of x [B, ..., D]."""
        rows = width_last(x, self.dim, "last")
        counted = position_mask(rows.shape[:-1], mask, None)
        kept = None if counted is None else counted.reshape(-1)
        self.table.initialize_(rows.reshape(1, -1, self.dim), kept, seed=seed, reducer=reducer)


def _check_partial(partial: Tensor, like: Tensor) -> None:
    if partial.shape != like.shape:
        raise ValueError(f"partial has shape {tuple(partial.shape)}: must be {tuple(like.shape)}, that of the vectors")


def conditions(layer: nn.Module, partial: Tensor | None) -> dict[str, Any]:
    """What a layer is told beyond its input: the partial reconstruction, if it asks for it."""
    return {"partial": partial} if isinstance(layer, ImplicitVQ) else {}


def check_estimator(estimator: object, *more: str) -> None:
    """Raise ValueError unless it is one of `VectorQuantize`, or of the words in addition."""
    if not isinstance(estimator, DiVeQ):
        check_choice("estimator", estimator, ("straight_through", "rotation", "none", *more))


def pass_gradient(estimator: Estimator, x: Tensor, codes: Tensor, training: bool) -> Tensor:
    """`codes` in value, of the shape and dtype of x, with the gradient that the estimator says; noise only in training."""
    if estimator == "none":
        return codes
    if estimator == "rotation":
        return rotation_trick(x, codes)
    if isinstance(estimator, DiVeQ) and training:
        return directional(x, codes, sigma2=estimator.sigma2)
    return straight_through(x, codes)


class ConditionalCodes(nn.Module):
    """The network: code + linear([code, partial]), then `depth` blocks y + W2 relu(W1 y) of `hidden` units.

    At the start it is the identity in the code. It computes in the dtype of the codes, whatever its weights and autocast say.
    """

    def __init__(
        self, dim: int, hidden: int, depth: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("hidden", hidden), ("depth", depth)):
            if value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        self.dim, self.hidden, self.depth = dim, hidden, depth
        self.join = nn.Linear(2 * dim, dim, device=device, dtype=dtype)
        self.widen = nn.ModuleList(nn.Linear(dim, hidden, device=device, dtype=dtype) for _ in range(depth))
        self.narrow = nn.ModuleList(nn.Linear(hidden, dim, device=device, dtype=dtype) for _ in range(depth))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The usual start of linear layers, but zero where they add to the code."""
        widen: Iterable[Any] = self.widen
        for layer in widen:
            layer.reset_parameters()
        for name, parameter in self.named_parameters():
            if not name.startswith("widen"):
                parameter.zero_()

    def forward(self, codes: Tensor, partial: Tensor) -> Tensor:
        """codes [..., D], partial [..., D], float32 or wider, leading axes that broadcast -> [..., D]."""
        with torch.autocast(codes.device.type, enabled=False):
            of_code, of_partial = self.join.weight.to(codes.dtype).split(self.dim, dim=1)
            y = codes + F.linear(codes, of_code) + F.linear(partial, of_partial, self.join.bias.to(codes.dtype))
            for widen, narrow in zip(self.widen, self.narrow, strict=True):
                y = y + _linear(narrow, _linear(widen, y).relu())
        return y


def _linear(layer: Any, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


@torch.no_grad()
def nearest_implicit(network: ConditionalCodes, x: Tensor, partial: Tensor, codebook: Tensor, num: int = 1) -> tuple[Tensor, Tensor]:
    """The `num` nearest of the codes that each vector has for itself: indices [N, P] int64, nearest first, and these codes [N, P, D].

    x, partial [N, D], codebook [C, D], all of the dtype of the arithmetic; P = min(num, C). Vectors that are not finite get index -1
    and code 0.
    """
    num = min(num, len(codebook))
    step = max(1, _ELEMENTS // (len(codebook) * max(network.dim, network.hidden)))
    found = [_nearest(network, *part, codebook, num) for part in zip(x.split(step), partial.split(step), strict=True)]
    indices, codes = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*found, strict=True))
    return indices, codes


def _nearest(network: ConditionalCodes, x: Tensor, partial: Tensor, codebook: Tensor, num: int) -> tuple[Tensor, Tensor]:
    table = network(codebook, partial.unsqueeze(1))  # [N, C, D]
    error = (x.unsqueeze(1) - table).square().sum(-1)
    error = error.where(error == error, torch.inf)
    # A stable sort takes the lowest index among equals.
    indices = error.argmin(-1, keepdim=True) if num == 1 else error.argsort(dim=-1, stable=True)[:, :num]
    codes = table.gather(1, indices.unsqueeze(-1).expand(-1, -1, table.shape[-1]))
    valid = error.gather(1, indices).isfinite()
    return torch.where(valid, indices, -1), codes.where(valid.unsqueeze(-1), 0.0)
