"""Implicit neural codebooks (QINCo; Huijben et al., 2024): the codes of a layer depend on what the layers before it already said.

A small network turns each code of a base codebook into one for the vector at hand, given the partial reconstruction of that vector. So
every vector has a codebook of its own, which is built in chunks of vectors, searched, and forgotten; only the chosen code is computed
once more, with a gradient. What needs a softmax over all codes (a cross-entropy, a diversity, a draw) has the codes of few vectors made
once and kept; of many it computes the chunks again in the backward.

Shapes: N vectors, C codes, D width, P nearest codes asked for, R vectors of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqkit.dist import Reducer
from vqkit.ops.assignment import draw_by_logits
from vqkit.ops.codebook import CodebookStatistics, are_chosen, gather_codes
from vqkit.ops.coding import coded, coded_stats
from vqkit.ops.estimators import directional, rotation_trick, scale_gradient, straight_through
from vqkit.ops.losses import mean_commitment_loss, negative_entropy, orthogonality_loss
from vqkit.ops.precision import as_dtype, finite_rows, is_finite, is_transformed, without_autocast
from vqkit.ops.scores import OwnCodes, comparable, cross_entropy, draw, mean_cross_entropy, mean_softmax
from vqkit.quantizers.base import Quantized, Quantizer
from vqkit.quantizers.codebook import Codebook
from vqkit.quantizers.config import (
    MLP,
    Affine,
    Assignment,
    Commit,
    Commitment,
    CrossEntropyCommitment,
    DeadCodes,
    DiVeQ,
    Diversity,
    Estimator,
    Frozen,
    Gradient,
    Gumbel,
    Init,
    Loss,
    Orthogonality,
    Softmax,
    StoredEMA,
    VQBridge,
    check_choice,
    check_kind,
)
from vqkit.quantizers.layout import check_indices, is_all, position_mask, where_kept, width_last

_ELEMENTS = {"cpu": 2**19}  # what a cache holds while the network reads it again and again
_ELEMENTS_ELSEWHERE = 2**22
"""About how many numbers one table of codes may hold."""
_KEPT = 2**21
"""So many of them are kept for a backward, where a softmax over all codes is asked for."""

_SOFT = (CrossEntropyCommitment, Diversity)
"""Losses that need the scores of all codes."""
_LOSS_NAMES: dict[type, str] = {
    Commitment: "commitment",
    CrossEntropyCommitment: "cross_entropy_commitment",
    Orthogonality: "orthogonality",
    Diversity: "diversity",
}


class _Given(NamedTuple):
    """An input, ready to have codes assigned."""

    vectors: Tensor  # [N, D] float32 or wider; 0 where not kept
    partial: Tensor  # [N, D] of that dtype
    mask: Tensor | None  # [N] bool, those that count; None: all
    kept: Tensor | None  # [N] bool, those of them that are finite; None: it is known that all are
    positions: torch.Size


class _Chosen(NamedTuple):
    """A code for every vector."""

    indices: Tensor  # [N]
    codes: Tensor  # [N, D]; 0 where there is none
    plain: Tensor | None = None  # the same without the gradient of a softmax, where `codes` has that
    known: Tensor | None = None  # [N] bool, those that have a code; None: it is known that all have


class ImplicitVQ(Quantizer):
    """A layer of `Residual` whose codes are those of a base codebook after a network that also sees the partial reconstruction.

    `network` is an `MLP`, or a module that maps codes [..., D] and partial [..., D], whose leading axes broadcast, to [..., D], and says
    as `hidden` how many numbers it holds at once for each.

    Codes and network learn by the optimizer of the model (with update=Frozen() the network alone), from the losses as in a
    `VectorQuantize` with update=Gradient(). Called on its own the partial reconstruction is zero. `table` is the codebook of another
    layer of the same `Residual`, to be shared: it belongs to that layer, and so do the choices about it. Arguments as for
    `VectorQuantize`.

    There are no heads, no cosine metric (a code that a network makes has no fixed length), no other update (the codes are not where
    the vectors are), no layout, projection and pass-through of masked vectors (`Residual` has these) and no weights of vectors, in which
    only moving averages differ. Raises ValueError for choices that contradict each other.
    """

    masked = "zero"

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        network: MLP | nn.Module,
        *,
        table: Codebook | None = None,
        assignment: Assignment = "nearest",
        estimator: Estimator = "rotation",
        update: Gradient | Frozen | None = None,
        init: Init = "uniform",
        dead_codes: DeadCodes | None = None,
        transform: str | MLP | VQBridge | nn.Module | None = None,
        affine: Affine | None = None,
        losses: Sequence[Loss] = (Commitment(),),
        sync_update: float = 0.0,
        commit: Commit = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(assignment, Gumbel | Softmax):
            check_choice("assignment", assignment, ("nearest",))
        check_estimator(estimator)
        check_sync_update(sync_update)
        _check_losses(losses)
        self.dim, self.codebook_size = dim, codebook_size
        self.assignment, self.estimator, self.losses, self.sync_update = assignment, estimator, tuple(losses), sync_update
        if table is None:
            update = Gradient() if update is None else update
            if not isinstance(update, Gradient | Frozen):
                raise ValueError(
                    f"update = {update}: must be Gradient() or Frozen(), as codes behind a network learn by gradient or not at all"
                )
            self.table = Codebook(
                1, codebook_size, dim, update=update, init=init, dead_codes=dead_codes, transform=transform, affine=affine, device=device
            )
        else:
            _check_table(table, codebook_size, dim, update, init, dead_codes, transform, affine)
            object.__setattr__(self, "table", table)  # no module of this one, so that it is stored once, with its owner
        if not isinstance(network, nn.Module):
            check_kind("network", network, MLP, nn.Module)
            network = ConditionalCodes(dim, network.hidden, network.depth, device=device)
        self.network = network
        self.commit = commit

    def extra_repr(self) -> str:
        return f"dim={self.dim}, codebook_size={self.codebook_size}, assignment={self.assignment!r}, estimator={self.estimator!r}"

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
        return {_LOSS_NAMES[type(loss)]: loss.weight for loss in self.losses} | {"cross_entropy": 1.0}

    @property
    def codebook(self) -> Tensor:
        """[C, D], the base codebook."""
        return self.table.codes().squeeze(0)

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        if codes.shape != (self.codebook_size, self.dim):
            raise ValueError(f"codebook has shape {tuple(codes.shape)}: must be {(self.codebook_size, self.dim)}")
        self.table.codebook = codes.unsqueeze(0)

    # Quantizing

    def quantize(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        partial: Tensor | None = None,
        freeze_codebook: bool = False,
        indices: Tensor | None = None,
        targets: Tensor | None = None,
        temperature: float | None = None,
    ) -> Quantized:
        """x [B, ..., D], mask [B, ...] bool, `partial` the partial reconstruction of the shape of x; other options as `VectorQuantize`."""
        self._check_temperature(temperature, indices)
        given = self._read(x, mask, partial)
        own, labels = (self._flat_indices(*named, given.positions) for named in (("indices", indices), ("targets", targets)))
        self.table.start_(given.vectors.unsqueeze(0), given.kept)
        temperature = self._drawn_at(temperature, own)
        soft = temperature > 0 or labels is not None or any(isinstance(loss, _SOFT) for loss in self.losses)
        codes = self._codes(given, constant=freeze_codebook, step=self.training and not freeze_codebook, soft=soft)
        chosen = self._choose(codes, own, temperature)
        losses = {_LOSS_NAMES[type(loss)]: self._loss(loss, given, codes, chosen) for loss in self.losses}
        if labels is not None:
            losses["cross_entropy"] = codes.mean_cross_entropy(_of_kept(labels, chosen.known))
        counted = self.training and not freeze_codebook and self.table.counts
        statistics = (self._statistics(given, codes.base, chosen, own),) if counted else None
        output = as_dtype(self._estimate(given.vectors, chosen).reshape(x.shape), x.dtype)
        return Quantized(output, chosen.indices.reshape(given.positions), losses, statistics)

    def nearest(self, x: Tensor, num: int, *, partial: Tensor | None = None, temperature: float | None = 0.0) -> tuple[Tensor, Tensor]:
        """The nearest codes of x [N, D], given its partial reconstruction [N, D]: indices [N, P] and codes [N, P, D]; P = min(num, C).

        With `Gumbel` at a `temperature` above 0 (None: its own) so many different codes are drawn instead.
        """
        wide = x.to(torch.promote_types(x.dtype, self.table.dtype))
        partial = torch.zeros_like(wide) if partial is None else partial.to(wide.dtype)
        if isinstance(self.assignment, Gumbel):
            temperature = self.assignment.temperature if temperature is None else temperature
        else:
            temperature = 0.0
        return nearest_implicit(self.network, wide, partial, self.table.codes().squeeze(0).to(wide.dtype), num, temperature)

    def encode(self, x: Tensor, mask: Tensor | None = None, *, partial: Tensor | None = None) -> Tensor:
        """x [B, ..., D], `partial` of its shape -> indices [B, ...]."""
        return self.encode_and_decode(x, mask, partial=partial)[0]

    def encode_and_decode(  # type: ignore[override]
        self, x: Tensor, mask: Tensor | None = None, *, partial: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        given = self._read(x, mask, partial)
        found = self._codes(given).nearest()
        return found.indices.reshape(given.positions), found.codes.reshape(x.shape)

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
        given = self._read(x, mask, None)
        self.table.initialize_(given.vectors.unsqueeze(0), given.kept, seed=seed, reducer=reducer)

    # Steps of `quantize`

    def _read(self, x: Tensor, mask: Tensor | None, partial: Tensor | None) -> _Given:
        rows = width_last(x, self.dim, "last")
        positions = rows.shape[:-1]
        counted = position_mask(positions, mask, None)
        wide = as_dtype(rows, torch.promote_types(x.dtype, self.table.dtype))
        partial = torch.zeros_like(wide) if partial is None else as_dtype(partial, wide.dtype)
        _check_partial(partial, wide)
        kept = None if counted is None and is_finite(wide) and is_finite(partial) else _comparable_rows(wide, partial, counted)
        if kept is not None:
            wide, partial, kept = where_kept(kept, wide), where_kept(kept, partial), None if is_all(kept) else kept.reshape(-1)
        mask = None if counted is None else counted.reshape(-1)
        return _Given(wide.reshape(-1, self.dim), partial.reshape(-1, self.dim), mask, kept, positions)

    def _flat_indices(self, name: str, indices: Tensor | None, positions: torch.Size) -> Tensor | None:
        if indices is None:
            return None
        check_indices(name, indices, self.codebook_size, positions)
        return indices.to(torch.int64).reshape(-1)

    def _drawn_at(self, temperature: float | None, indices: Tensor | None) -> float:
        """The temperature at which codes are drawn; 0 where the nearest ones, or those of `indices`, are taken."""
        if isinstance(self.assignment, str) or not self.training or indices is not None:
            return 0.0
        return self.assignment.temperature if temperature is None else temperature

    def _choose(self, codes: _Codes, indices: Tensor | None, temperature: float) -> _Chosen:
        if temperature > 0 and not isinstance(self.assignment, str):
            return codes.draw(self.assignment, temperature)
        return codes.nearest() if indices is None else codes.of(_of_kept(indices, codes.given.kept))

    def _estimate(self, vectors: Tensor, chosen: _Chosen) -> Tensor:
        """The codes in value, or near them, with the gradient that `estimator` says, if they do not have it already."""
        codes = chosen.codes
        output = codes if chosen.plain is not None else pass_gradient(self.estimator, vectors, codes, self.training)
        if output is codes:
            return scale_gradient(codes, 1.0 + self.sync_update)
        if self.sync_update > 0:
            output = output + self.sync_update * (codes - codes.detach())
        return output if chosen.known is None else output.where(chosen.known.unsqueeze(-1), 0.0)

    def _codes(self, given: _Given, *, constant: bool = False, step: bool = False, soft: bool = False) -> _Codes:
        """Those that the vectors see; in a `step` of the codebook affine ones go by the moments of these vectors. `soft`: whether scores
        of all of them will be asked for."""
        # Training without a graph is the first pass of a checkpoint, which goes the way of the second.
        constant = constant or not (self.training or torch.is_grad_enabled())
        kept = None if given.kept is None else given.kept.unsqueeze(0)
        base = self.table.codes_for(given.vectors.unsqueeze(0), kept) if step else self.table.codes()
        # In eval mode a code is made as `decode` makes it; without a softmax it is less work than a backward through all codes.
        most = _KEPT if soft and self.training else 0
        return _Codes(self.network, as_dtype(base.squeeze(0), given.vectors.dtype), given, constant=constant, most=most)

    def _loss(self, loss: Loss, given: _Given, codes: _Codes, chosen: _Chosen) -> Tensor:
        if isinstance(loss, Commitment):
            own = chosen.codes if chosen.plain is None else chosen.plain
            return mean_commitment_loss(given.vectors, own, chosen.known, pull=loss.pull)
        if isinstance(loss, CrossEntropyCommitment):
            return codes.mean_cross_entropy(chosen.indices)
        if isinstance(loss, Diversity):
            return negative_entropy(codes.mean_softmax(chosen.known, loss.temperature))
        noise = None if self.training else torch.zeros_like(codes.base[:, 0])  # evaluation draws nothing
        active = _active(chosen.indices, self.codebook_size) if loss.active_only else None
        return orthogonality_loss(codes.base, active, max_codes=loss.max_codes, noise=noise)

    @torch.no_grad()
    def _statistics(self, given: _Given, base: Tensor, chosen: _Chosen, own: Tensor | None) -> CodebookStatistics:
        """Counted by index; the error is that of the codes of the vectors themselves."""
        ignored = None if given.mask is None else ~given.mask
        if own is not None:
            ignored = own < 0 if ignored is None else ignored | (own < 0)
        vectors, indices = given.vectors.detach().unsqueeze(0), chosen.indices.unsqueeze(0)
        found = coded(vectors, base.detach().unsqueeze(0), indices, estimator="none", count=True)
        error = (vectors.squeeze(0) - chosen.codes).square_()
        error = error.sum() if chosen.known is None else error.sum(-1).where(chosen.known, 0.0).sum()
        found = found._replace(squared_error=error.unsqueeze(0))
        ignored = None if ignored is None else ignored.unsqueeze(0)
        return coded_stats(vectors, indices, found, ignored, num_candidates=self.table.num_candidates, far=self.table.far_from_vectors)

    def _check_temperature(self, temperature: float | None, indices: Tensor | None) -> None:
        if temperature is None:
            return
        if not isinstance(self.assignment, Gumbel | Softmax):
            raise ValueError(f'temperature = {temperature}: must be None with assignment = "nearest", which has no softmax')
        if not temperature >= 0:
            raise ValueError(f"temperature = {temperature}: must be 0 (the nearest code) or positive")
        if indices is not None:
            raise ValueError(f"temperature = {temperature}: must be None where indices are given, as nothing is drawn")


def _check_losses(losses: Sequence[Loss]) -> None:
    kinds = [type(loss) for loss in losses]
    for loss in losses:
        if type(loss) not in _LOSS_NAMES:
            raise TypeError(f"losses holds {loss!r}: must be of {', '.join(kind.__name__ for kind in _LOSS_NAMES)}")
        if kinds.count(type(loss)) > 1:
            raise ValueError(f"losses holds several of {type(loss).__name__}: must be at most one of each kind")


def _check_table(table: Codebook, size: int, dim: int, update: object, init: Init, *more: object) -> None:
    if (table.heads, table.size, table.dim, table.metric) != (1, size, dim, "euclidean"):
        raise ValueError(f"table is {table.extra_repr()}: must have one head, size={size}, dim={dim}, metric='euclidean'")
    stays = isinstance(table.update, StoredEMA) and not table.update.follow
    if not stays and not isinstance(table.update, Gradient | Frozen):
        raise ValueError(f"table learns by {table.update}: must learn by Gradient() or be Frozen(), as codes behind a network")
    if update is not None or init != "uniform" or any(choice is not None for choice in more):
        raise ValueError("table is given together with update, init, dead_codes, transform or affine: must be left to its owner")


def _active(indices: Tensor, codebook_size: int) -> Tensor:
    """[C] bool: the codes that any of indices [N] chose."""
    chosen = torch.zeros(codebook_size + 1, dtype=torch.bool, device=indices.device)
    return chosen.scatter(0, indices.where(indices >= 0, codebook_size), True)[:-1]


def _comparable_rows(vectors: Tensor, partial: Tensor, counted: Tensor | None) -> Tensor:
    """[*positions] bool: which of those `counted` are finite, and so is what they are told; a length takes squares that overflow."""
    lengths = [torch.linalg.vector_norm(own.detach(), dim=-1, keepdim=True) for own in (vectors, partial)]
    kept = finite_rows(lengths[0]) & finite_rows(lengths[1])
    return kept if counted is None else kept & counted


def _of_kept(indices: Tensor, kept: Tensor | None) -> Tensor:
    """indices [N], -1 where they are not kept."""
    return indices if kept is None else indices.where(kept, -1)


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


def check_sync_update(sync_update: float) -> None:
    """Raise ValueError for what is no fraction."""
    if not 0.0 <= sync_update <= 1.0:
        raise ValueError(f"sync_update = {sync_update}: must be from 0 to 1")


def pass_gradient(estimator: Estimator, x: Tensor, codes: Tensor, training: bool) -> Tensor:
    """`codes` in value, of the shape and dtype of x, with the gradient that the estimator says; noise only in training."""
    if estimator == "none":
        return codes
    if estimator == "rotation":
        return rotation_trick(x, codes)
    if isinstance(estimator, DiVeQ) and training:
        return directional(x, codes, sigma2=estimator.sigma2)
    return straight_through(x, codes)


# The codes of every vector


class _Codes:
    """What a network makes of `base` [C, D] for vectors [N, D] and their partial reconstructions; without gradient if `constant`.

    A softmax is that of minus the distances over a temperature. The codes of few vectors are made once for all that is asked of them and
    kept for the backward; those of many in chunks [R, C, D] each time, and again in the backward. Where nothing `soft` is asked for, the
    chosen codes made once more are less work than a backward through all of them, unless these are very few.
    """

    def __init__(self, network: nn.Module, base: Tensor, given: _Given, *, constant: bool, most: int) -> None:
        self.network, self.constant = network, constant
        self.base = base.detach() if constant else base
        self.given = given
        self._step = _chunk(network, base)
        self._keeps = len(given.vectors) <= most // _entries_of(network, base)

    def _make(self, base: Tensor, partial: Tensor) -> Tensor:
        codes = self.network(base, partial)
        return codes.detach() if self.constant else codes

    @cached_property
    def _whole(self) -> OwnCodes:
        return self._table(self.given.partial)

    @cached_property
    def _scores(self) -> Tensor:
        return self._whole.scores(self.given.vectors)

    def _table(self, partial: Tensor) -> OwnCodes:
        return OwnCodes(self._make(self.base, partial.unsqueeze(1)), "euclidean")

    def of(self, indices: Tensor) -> _Chosen:
        """Those of indices [N]."""
        known = None if are_chosen(indices) else indices >= 0
        if self._keeps:
            return _Chosen(indices, self._whole.take(indices.unsqueeze(1), all_known=known is None).squeeze(1), known=known)
        codes = self._make(gather_codes(self.base, indices, all_known=known is None), self.given.partial)
        return _Chosen(indices, codes if known is None else codes.where(known.unsqueeze(-1), 0.0), known=known)

    def nearest(self) -> _Chosen:
        """The nearest."""
        given = self.given
        if self._keeps:
            indices = self._whole.nearest(given.vectors, 1, self._scores)[0].squeeze(1)
            return self.of(_of_kept(indices, given.kept))
        indices, found = (part.squeeze(1) for part in nearest_implicit(self.network, given.vectors, given.partial, self.base))
        indices = _of_kept(indices, given.kept)
        if not self.constant:
            return self.of(indices)
        known = None if are_chosen(indices) else indices >= 0
        return _Chosen(indices, found if known is None else found.where(known.unsqueeze(-1), 0.0), known=known)

    def mean_cross_entropy(self, targets: Tensor) -> Tensor:
        """The mean of -log softmax of targets [N] that are not -1 -> []; 0 where none is."""
        if self._keeps:
            return mean_cross_entropy(self._scores, targets)
        parts = self._in_chunks(lambda _, scores, targets: cross_entropy(scores, targets).sum(), targets)
        return torch.stack(parts).sum() / (targets >= 0).sum().clamp(min=1)

    def mean_softmax(self, counted: Tensor | None, temperature: float) -> Tensor:
        """The mean over vectors counted [N] (None: all) -> [C]; 0 where none is."""
        if self._keeps:
            return mean_softmax(self._scores, counted, temperature)

        def of_chunk(_: OwnCodes, scores: Tensor, *counted: Tensor) -> Tensor:
            shares = (scores / temperature).softmax(-1)
            return (shares.where(counted[0].unsqueeze(-1), 0.0) if counted else shares).sum(0)

        parts = self._in_chunks(of_chunk, *(() if counted is None else (counted,)))
        return torch.stack(parts).sum(0) / (max(1, len(self.given.vectors)) if counted is None else counted.sum().clamp(min=1))

    def draw(self, assignment: Gumbel | Softmax, temperature: float) -> _Chosen:
        """Drawn ones, or the nearest, with the gradient of the softmax if the assignment says so."""
        given, estimator = self.given, assignment.estimator
        drawn = isinstance(assignment, Gumbel)
        noise = [torch.rand(len(given.vectors), 1, dtype=self.base.dtype, device=self.base.device)] if drawn else []

        def of_chunk(own: OwnCodes, scores: Tensor, *noise: Tensor) -> tuple[Tensor, ...]:
            seen = scores.detach()
            indices = draw_by_logits(noise[0], seen / temperature) if noise else seen.argmax(-1, keepdim=True)
            plain = own.take(indices, all_known=True)
            codes = plain if estimator is None else own.soften(plain, scores, indices, temperature, estimator)
            return tuple(part.squeeze(1) for part in (indices, codes, plain))

        chunks = self._in_chunks(of_chunk, *noise)
        indices, codes, plain = chunks[0] if len(chunks) == 1 else map(torch.cat, zip(*chunks, strict=True))
        if given.kept is not None:
            indices, codes = _of_kept(indices, given.kept), codes.where(given.kept.unsqueeze(-1), 0.0)
        return _Chosen(indices, codes, None if estimator is None else plain, known=given.kept)

    def _in_chunks(self, function: Callable[..., Any], *rows: Tensor) -> list[Any]:
        """`function` of the codes, the scores, and `rows` of each chunk of vectors."""
        if self._keeps:
            return [function(self._whole, self._scores, *rows)]

        def of_chunk(x: Tensor, partial: Tensor, *rows: Tensor) -> Any:
            own = self._table(partial)
            return function(own, own.scores(x), *rows)

        parts = (self.given.vectors, self.given.partial, *rows)
        chunks = zip(*(part.split(self._step) for part in parts), strict=True)
        if not torch.is_grad_enabled() or is_transformed():  # transforms do not make again what is not kept
            return [of_chunk(*chunk) for chunk in chunks]
        return [checkpoint(of_chunk, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]


def _entries_of(network: Any, codebook: Tensor) -> int:
    """How many numbers the codes of one vector take, on the way to them at most."""
    return len(codebook) * max(codebook.shape[-1], network.hidden)


def _chunk(network: Any, codebook: Tensor) -> int:
    elements = _ELEMENTS.get(codebook.device.type, _ELEMENTS_ELSEWHERE)
    return max(1, elements // _entries_of(network, codebook))


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
        with without_autocast(codes.device.type):
            of_code, of_partial = self.join.weight.to(codes.dtype).split(self.dim, dim=1)
            y = codes + F.linear(codes, of_code) + F.linear(partial, of_partial, self.join.bias.to(codes.dtype))
            for widen, narrow in zip(self.widen, self.narrow, strict=True):
                y = y + _linear(narrow, _linear(widen, y).relu())
        return y


def _linear(layer: Any, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


@torch.no_grad()
def nearest_implicit(
    network: nn.Module, x: Tensor, partial: Tensor, codebook: Tensor, num: int = 1, temperature: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The `num` nearest of the codes that each vector has for itself: indices [N, P] int64, nearest first, and these codes [N, P, D].

    At a `temperature` above 0 they are drawn, different ones of each vector, by softmax(-distance / temperature). x, partial [N, D],
    codebook [C, D], all of the dtype of the arithmetic; P = min(num, C). Vectors that are not finite get index -1 and code 0.
    """
    num = min(num, len(codebook))
    step = _chunk(network, codebook)
    found = [_nearest(network, *part, codebook, num, temperature) for part in zip(x.split(step), partial.split(step), strict=True)]
    if len(found) == 1:
        return found[0]
    indices, codes = (torch.cat(parts) for parts in zip(*found, strict=True))
    return indices, codes


def _nearest(network: nn.Module, x: Tensor, partial: Tensor, codebook: Tensor, num: int, temperature: float) -> tuple[Tensor, Tensor]:
    own = OwnCodes(network(codebook, partial.unsqueeze(1)), "euclidean")  # [N, C, D]
    scores = own.scores(x)
    if not temperature > 0:
        indices, complete = own.nearest(x, num, scores)
        return indices, own.take(indices, all_known=complete)
    scores = comparable(scores)
    indices = draw(scores, num, temperature)
    indices = indices.where(scores.gather(1, indices).isfinite(), -1)
    return indices, own.take(indices)
