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
from vqkit.ops.codebook import gather_codes
from vqkit.ops.estimators import directional, rotation_trick, straight_through
from vqkit.ops.losses import mean_commitment_loss, orthogonality_loss
from vqkit.ops.precision import finite_rows, known_finite, without_autocast
from vqkit.ops.scores import OwnCodes, cross_entropy, draw, mean_cross_entropy, mean_softmax
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
    mask: Tensor | None  # [N] bool, those that count
    kept: Tensor  # [N] bool, those of them that are finite
    whole: bool  # whether it is known that all are kept
    positions: torch.Size


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
        soft = labels is not None or self._asks_for_softmax(temperature, own)
        codes = self._codes(given, constant=freeze_codebook, step=self.training and not freeze_codebook, soft=soft)
        found, chosen, softened = self._choose(given, codes, own, temperature)
        losses = {_LOSS_NAMES[type(loss)]: self._loss(loss, given, codes, found, chosen, softened) for loss in self.losses}
        if labels is not None:
            losses["cross_entropy"] = codes.mean_cross_entropy(labels.where(found >= 0, -1))
        counted = self.training and not freeze_codebook and self.table.counts
        statistics = (self._statistics(given, found, chosen, own),) if counted else None
        output = chosen if softened else pass_gradient(self.estimator, given.vectors, chosen, self.training)
        if self.sync_update > 0:
            output = output + self.sync_update * (chosen - chosen.detach())
        if output is not chosen:
            output = where_kept(found >= 0, output)
        return Quantized(output.reshape(x.shape).to(x.dtype), found.reshape(given.positions), losses, statistics)

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
        indices, codes = self._codes(given).nearest()
        return indices.reshape(given.positions), codes.reshape(x.shape)

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
        wide = rows.to(torch.promote_types(x.dtype, self.table.dtype))
        partial = torch.zeros_like(wide) if partial is None else partial.to(wide.dtype)
        _check_partial(partial, wide)
        lengths = [torch.linalg.vector_norm(own.detach(), dim=-1, keepdim=True) for own in (wide, partial)]  # whose squares may overflow
        if counted is None and all(map(known_finite, lengths)):
            kept, whole = wide.new_ones(positions, dtype=torch.bool), True
        else:
            kept = finite_rows(lengths[0]) & finite_rows(lengths[1])
            kept = kept if counted is None else kept & counted
            whole = is_all(kept)
        vectors, partial = (values if whole else values.where(kept.unsqueeze(-1), 0.0) for values in (wide, partial))
        mask = None if counted is None else counted.reshape(-1)
        return _Given(vectors.reshape(-1, self.dim), partial.reshape(-1, self.dim), mask, kept.reshape(-1), whole, positions)

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

    def _asks_for_softmax(self, temperature: float | None, indices: Tensor | None) -> bool:
        """Whether the losses or the choice need the scores of all codes."""
        soft = any(isinstance(loss, CrossEntropyCommitment | Diversity) for loss in self.losses)
        return soft or self._drawn_at(temperature, indices) > 0

    def _choose(self, given: _Given, codes: _Codes, indices: Tensor | None, temperature: float | None) -> tuple[Tensor, Tensor, bool]:
        """The index [N] and the code [N, D] of each vector, and whether the gradient of the choice is in the code already."""
        temperature = self._drawn_at(temperature, indices)
        if temperature > 0 and not isinstance(self.assignment, str):
            return *codes.draw(self.assignment, temperature), self.assignment.estimator is not None
        if indices is None:
            return *codes.nearest(), False
        indices = indices.where(given.kept, -1)
        return indices, codes.of(indices), False

    def _codes(self, given: _Given, *, constant: bool = False, step: bool = False, soft: bool = False) -> _Codes:
        """Those that the vectors see; in a `step` of the codebook affine ones go by the moments of these vectors. `soft`: whether scores
        of all of them will be asked for."""
        # Training without a graph is the first pass of a checkpoint, which goes the way of the second.
        constant = constant or not (self.training or torch.is_grad_enabled())
        base = self.table.codes_for(given.vectors.unsqueeze(0), given.kept.unsqueeze(0)) if step else self.table.codes()
        # In eval mode a code is made as `decode` makes it; without a softmax it is less work than a backward through all codes.
        kept = _KEPT if soft and self.training else 0
        return _Codes(self.network, base.squeeze(0).to(given.vectors.dtype), given, constant=constant, kept=kept)

    def _loss(self, loss: Loss, given: _Given, codes: _Codes, indices: Tensor, chosen: Tensor, soft: bool) -> Tensor:
        known = indices >= 0
        if isinstance(loss, Commitment):
            own = codes.of(indices) if soft else chosen
            return mean_commitment_loss(given.vectors, own, known, pull=loss.pull)
        if isinstance(loss, CrossEntropyCommitment):
            return codes.mean_cross_entropy(indices)
        if isinstance(loss, Diversity):
            mean = codes.mean_softmax(known, loss.temperature)
            return torch.xlogy(mean, mean.clamp(min=torch.finfo(mean.dtype).tiny)).sum()
        noise = None if self.training else torch.zeros_like(codes.base[:, 0])  # evaluation draws nothing
        active = _active(indices, self.codebook_size) if loss.active_only else None
        return orthogonality_loss(codes.base, active, max_codes=loss.max_codes, noise=noise)

    def _statistics(self, given: _Given, indices: Tensor, chosen: Tensor, own: Tensor | None) -> Any:
        mask = given.mask
        if own is not None:
            mask = own >= 0 if mask is None else mask & (own >= 0)
        # What is not kept stands as 0 in the vectors; NaN is what the statistics count as not finite.
        vectors = given.vectors.detach().where(given.kept.unsqueeze(-1), torch.nan)
        return self.table.statistics(vectors.unsqueeze(0), indices.unsqueeze(0), mask=mask, quantized=chosen.detach().unsqueeze(0))

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

    def __init__(self, network: nn.Module, base: Tensor, given: _Given, *, constant: bool, kept: int) -> None:
        self.network, self.constant = network, constant
        self.base = base.detach() if constant else base
        self.given = given
        self._step = _chunk(network, base)
        self._keeps = len(given.vectors) <= kept // _entries_of(network, base)

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

    def of(self, indices: Tensor) -> Tensor:
        """The codes of indices [N] -> [N, D]; 0 where -1."""
        if self._keeps:
            return self._whole.take(indices.unsqueeze(1)).squeeze(1)
        return where_kept(indices >= 0, self._make(gather_codes(self.base, indices), self.given.partial))

    def nearest(self) -> tuple[Tensor, Tensor]:
        """Indices [N] and codes [N, D] of the nearest."""
        given = self.given
        if self._keeps:
            indices = self._whole.nearest(given.vectors, 1, _comparable(self._scores.detach()))[0].squeeze(1)
            indices = indices if given.whole else indices.where(given.kept, -1)
            return indices, self.of(indices)
        indices, found = (part.squeeze(1) for part in nearest_implicit(self.network, given.vectors, given.partial, self.base))
        if not given.whole:
            indices, found = indices.where(given.kept, -1), found.where(given.kept.unsqueeze(-1), 0.0)
        return indices, found if self.constant else self.of(indices)

    def mean_cross_entropy(self, targets: Tensor) -> Tensor:
        """The mean of -log softmax of targets [N] that are not -1 -> []; 0 where none is."""
        if self._keeps:
            return mean_cross_entropy(self._scores, targets)
        parts = self._in_chunks(lambda _, scores, targets: cross_entropy(scores, targets).sum(), targets)
        return torch.stack(parts).sum() / (targets >= 0).sum().clamp(min=1)

    def mean_softmax(self, counted: Tensor, temperature: float) -> Tensor:
        """The mean over vectors counted [N] -> [C]; 0 where none is."""
        if self._keeps:
            return mean_softmax(self._scores, counted, temperature)

        def of_chunk(_: OwnCodes, scores: Tensor, counted: Tensor) -> Tensor:
            return (scores / temperature).softmax(-1).where(counted.unsqueeze(-1), 0.0).sum(0)

        return torch.stack(self._in_chunks(of_chunk, counted)).sum(0) / counted.sum().clamp(min=1)

    def draw(self, assignment: Gumbel | Softmax, temperature: float) -> tuple[Tensor, Tensor]:
        """Indices [N], drawn or the nearest, and their codes [N, D] with the gradient of the softmax if the assignment says so; -1 and 0
        of vectors that do not count."""
        given = self.given
        drawn, estimator = isinstance(assignment, Gumbel), assignment.estimator
        noise = torch.rand(len(given.kept), 1, dtype=self.base.dtype, device=self.base.device) if drawn else given.partial[:, :1]

        def of_chunk(own: OwnCodes, scores: Tensor, kept: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
            seen = scores.detach()
            indices = draw_by_logits(noise, seen / temperature) if drawn else seen.argmax(-1, keepdim=True)
            indices = indices if given.whole else indices.where(kept.unsqueeze(-1), -1)
            taken = own.take(indices)
            codes = taken if estimator is None else own.soften(taken, scores, indices, temperature, estimator)
            return indices.squeeze(1), codes.squeeze(1)

        found = self._in_chunks(of_chunk, given.kept, noise)
        if len(found) == 1:
            return found[0]
        indices, codes = zip(*found, strict=True)
        return torch.cat(indices), torch.cat(codes)

    def _in_chunks(self, function: Callable[..., Any], *rows: Tensor) -> list[Any]:
        """`function` of the codes, the scores, and `rows` of each chunk of vectors."""
        if self._keeps:
            return [function(self._whole, self._scores, *rows)]

        def of_chunk(x: Tensor, partial: Tensor, *rows: Tensor) -> Any:
            own = self._table(partial)
            return function(own, own.scores(x), *rows)

        parts = (self.given.vectors, self.given.partial, *rows)
        chunks = zip(*(part.split(self._step) for part in parts), strict=True)
        if not torch.is_grad_enabled():
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
    scores = _comparable(own.scores(x))
    if temperature > 0:
        indices = draw(scores, num, temperature)
        indices, complete = indices.where(scores.gather(1, indices).isfinite(), -1), False
    else:
        indices, complete = own.nearest(x, num, scores)
    return indices, own.take(indices, all_known=complete)


def _comparable(scores: Tensor) -> Tensor:
    """Those that are no number are the worst."""
    return scores if known_finite(scores) else scores.nan_to_num(nan=-torch.inf, neginf=-torch.inf)
