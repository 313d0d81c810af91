"""Vector quantization (van den Oord et al., 2017): each vector becomes the nearest code of a table that learns to stand where vectors are.

Every choice of `VectorQuantize` is one value; what computes is in `ops`, the table and how it learns in `codebook.py`. Here an input of
any layout is brought into one vector a head, has codes assigned, and is put back.

Shapes: P... positions of the input, N of them flattened, D width of the input, K width of a code, H codebooks, M vectors that each of
them sees (N with separate heads, else N times heads), C codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, cast, get_args, overload

import torch
from torch import Tensor, nn

from vqkit.dist import Reducer
from vqkit.ops.assignment import Metric as ScoreMetric
from vqkit.ops.assignment import SoftEstimator, has_scores, sample_indices, soft_codes
from vqkit.ops.codebook import CodebookStatistics, are_chosen, directions, gather_codes, known_directions
from vqkit.ops.coding import Coded, PlainEstimator, coded, coded_stats
from vqkit.ops.estimators import directional, rotation_trick, straight_through
from vqkit.ops.losses import Reduction, cross_entropy_commitment, diversity_loss, mean_commitment_loss, negative_entropy, orthogonality_loss
from vqkit.ops.nearest_code import nearest_codes, nearest_index
from vqkit.ops.precision import as_dtype, finite_rows, is_finite, may_look
from vqkit.ops.scores import OwnCodes, cross_entropy, draw, few_scores, mean_cross_entropy, mean_softmax
from vqkit.quantizers.base import Quantized, Quantizer, changed
from vqkit.quantizers.codebook import Codebook, CodeWeights
from vqkit.quantizers.commit import sum_in_forward
from vqkit.quantizers.committed import in_backward, outside_backward
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
    Gumbel,
    Init,
    Loss,
    Metric,
    Orthogonality,
    Softmax,
    Update,
    VQBridge,
    check_choice,
    check_count,
    check_kind,
    check_number,
)
from vqkit.quantizers.layout import (
    Layout,
    check_indices,
    check_layout,
    check_range,
    check_tensor,
    has_hooks,
    position_mask,
    require,
    rows_at,
    where_kept,
    width_back,
    width_last,
)
from vqkit.quantizers.peer_keywords import knows_the_peer

Weights = Tensor | Callable[[Tensor, Tensor], Tensor]
"""What each vector weighs in the statistics, not negative: [P...] or [P..., heads] floating point, or a function of the vectors [P..., D]
and their indices that returns it."""

_REDUCTIONS = get_args(Reduction)
_LOSS_NAMES: dict[type, str] = {
    Commitment: "commitment",
    CrossEntropyCommitment: "cross_entropy_commitment",
    Orthogonality: "orthogonality",
    Diversity: "diversity",
}


class _Vectors(NamedTuple):
    """An input, ready to have codes assigned."""

    rows: Tensor  # [P..., D] the input with its width last
    vectors: Tensor  # [H, M, K] float32 or wider; of length 1 for cosine; 0 where not kept
    mask: Tensor | None  # [P...] bool, the positions that count
    kept: Tensor | None  # [P...] bool, those of them that are finite; None: all are, as is known
    dtype: torch.dtype  # of the projected input


class _Chosen(NamedTuple):
    """The code of each vector."""

    indices: Tensor  # [H, M] int64; -1: none
    codes: Tensor  # [H, M, K], 0 where there is none; differentiable where the codes learn by gradient
    plain: Tensor | None = None  # where the gradient of a softmax is in `codes` already: the same without it
    each: int = 1  # so many of them side by side are those of one vector
    complete: bool = False  # whether all are known to have one


@knows_the_peer
class VectorQuantize(Quantizer):
    """`codebook_size` codes for vectors of width `dim`.

    Heads: `heads` vectors of width `codebook_dim` (None: dim / heads) are made of each input, and quantized by one codebook or, with
    `separate_heads`, each by its own. Where heads * codebook_dim is not dim, linear projections stand before and behind, with
    `projection_norm` a layer norm after the first. Inputs are [B, ..., D] or, with layout="first", [B, D, ...].

    Choices: `metric` "euclidean" or "cosine" (codes and what is compared with them have length 1); `assignment` "nearest",
    `Gumbel(...)`, which draws in training, or `Softmax(...)`; `estimator`, the gradient of the output for the input where the assignment
    brings none of its own: "rotation", "straight_through", "none" (the losses have theirs) or `DiVeQ(...)`; how the codebook learns
    (`update`, `code_weights`), starts (`init`), stays alive (`dead_codes`) and is read (`transform`, `affine`): see `Codebook`;
    `losses`, at most one of each kind. A `table` is a codebook made elsewhere, which has its own of these choices. Where the codes learn by
    gradient, the commitment loss pulls them to the vectors, too; `sync_update` of the gradient of the output then also goes to the codes
    (Huh et al., 2023). With input_gradient=False nothing at all reaches the input.

    Masked positions get index -1 and zeros, or with masked="input" themselves. Vectors that are not finite get index -1, zeros, no loss
    and no gradient, and are counted in `metrics()`; with on_nonfinite="raise" they are an error (a ValueError; where the program is
    compiled or not on CPU a RuntimeError of the device).

    Raises ValueError for sizes that do not fit, unknown choices, and choices that contradict each other, TypeError for what is of another
    kind.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        codebook_dim: int | None = None,
        heads: int = 1,
        separate_heads: bool = False,
        metric: Metric = "euclidean",
        assignment: Assignment = "nearest",
        estimator: Estimator = "rotation",
        update: Update | None = None,
        init: Init = "uniform",
        dead_codes: DeadCodes | None = None,
        transform: str | MLP | VQBridge | nn.Module | None = None,
        affine: Affine | None = None,
        code_weights: CodeWeights | None = None,
        losses: Sequence[Loss] = (Commitment(),),
        layout: Layout = "last",
        projection_norm: bool = False,
        masked: Literal["zero", "input"] = "zero",
        on_nonfinite: Literal["drop", "raise"] = "drop",
        input_gradient: bool = True,
        sync_update: float = 0.0,
        commit: Commit = "auto",
        table: Codebook | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(dim=dim, codebook_size=codebook_size, codebook_dim=codebook_dim, heads=heads)
        _check_kinds(update, dead_codes, affine)
        if codebook_dim is None and dim % heads:
            raise ValueError(f"heads = {heads}: must divide dim = {dim} where codebook_dim is not given")
        check_choice("assignment", assignment, ("nearest",), (Gumbel, Softmax))
        check_choice("estimator", estimator, ("rotation", "straight_through", "none"), (DiVeQ,))
        check_layout(layout)
        check_choice("masked", masked, ("zero", "input"))
        check_choice("on_nonfinite", on_nonfinite, ("drop", "raise"))
        self.dim, self.codebook_size, self.heads, self.separate_heads = dim, codebook_size, heads, separate_heads
        self.codebook_dim = dim // heads if codebook_dim is None else codebook_dim
        self.metric, self.assignment, self.estimator, self.losses = metric, assignment, estimator, _sequence("losses", losses)
        self.layout, self.masked, self.on_nonfinite, self.input_gradient = layout, masked, on_nonfinite, input_gradient
        self.sync_update = sync_update
        if table is None:
            self.table = Codebook(
                heads if separate_heads else 1,
                codebook_size,
                self.codebook_dim,
                metric=metric,
                update=update,
                init=init,
                dead_codes=dead_codes,
                transform=transform,
                affine=affine,
                code_weights=code_weights,
                device=device,
            )
        else:
            choices: dict[str, object] = {
                "update": update,
                "dead_codes": dead_codes,
                "transform": transform,
                "affine": affine,
                "code_weights": code_weights,
            }
            self.table = self._check_table(table, choices)
        learns_by_gradient = self.table.learns_by_gradient
        _check_losses(self.losses, learns_by_gradient)
        check_number("sync_update", sync_update)
        if not 0.0 <= sync_update <= 1.0:
            raise ValueError(f"sync_update = {sync_update}: must be from 0 to 1")
        if sync_update > 0 and not learns_by_gradient:
            raise ValueError(
                f"sync_update = {sync_update}: must be 0 unless the codes learn by gradient (update=Gradient() or a transform)"
            )
        inner = heads * self.codebook_dim
        if projection_norm and inner == dim:
            raise ValueError(f"projection_norm = True: must be False where heads * codebook_dim is dim = {dim}: nothing is projected")
        self.project_in = nn.Linear(dim, inner, device=device) if inner != dim else None
        self.norm = nn.LayerNorm(inner, device=device) if projection_norm else None
        self.project_out = nn.Linear(inner, dim, device=device) if inner != dim else None
        self.commit = commit

    def extra_repr(self) -> str:
        own = f"dim={self.dim}, heads={self.heads}, assignment={self.assignment!r}, estimator={self.estimator!r}, losses={self.losses}"
        layout = changed(self, layout="last", masked="zero", on_nonfinite="drop", input_gradient=True)
        return own + layout + changed(self, sync_update=0.0, commit="auto")

    # What every quantizer says of itself

    def codebooks(self) -> list[Codebook]:
        return [self.table]

    @property
    def code_shape(self) -> tuple[int, ...]:
        return () if self.heads == 1 else (self.heads,)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return (self.codebook_size,) * self.heads

    @property
    def loss_weights(self) -> dict[str, float]:
        return {_LOSS_NAMES[type(loss)]: loss.weight for loss in self.losses} | {"cross_entropy": 1.0}

    @property
    def codebook(self) -> Tensor:
        """[C, K], with separate heads [heads, C, K]. Setting it forgets how often each code was used, and what is pending."""
        codes = self.table.codebook
        return codes if self.separate_heads else codes.squeeze(0)

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        check_tensor("codebook", codes)
        if not codes.is_floating_point():
            raise TypeError(f"codebook is {codes.dtype}: must be floating point")
        shape = self.table.pending.sum.shape[0 if self.separate_heads else 1 :]
        if codes.shape != shape:
            raise ValueError(f"codebook has shape {tuple(codes.shape)}: must be {tuple(shape)}")
        what = "codebook holds a value that is not finite: codes must be finite"
        require(codes.isfinite().all(), what, lambda: what)
        self.table.codebook = codes if self.separate_heads else codes.unsqueeze(0)

    # Quantizing

    def quantize(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        freeze_codebook: bool = False,
        indices: Tensor | None = None,
        targets: Tensor | None = None,
        weights: Weights | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        reduction: Reduction = "mean",
        project: bool = True,
        codes_of: Callable[[Tensor], Tensor] | None = None,
    ) -> Quantized:
        """x [B, ..., D] or, with layout "first", [B, D, ...]; mask [P...] bool, or lengths [B] of sequences.

        `indices` [P..., heads?] are taken instead of choosing (-1: none), also for the statistics. For `targets` of that shape the mean
        cross-entropy of a softmax over minus the distances, or the cosines, is among the losses as "cross_entropy" (-1: left out).
        `weights` of the vectors in the statistics. `temperature` stands for that of `Gumbel` or `Softmax`; 0 is the nearest code.

        With `top_k` the k nearest codes of each vector, nearest first, or with `Gumbel` in training k different ones as they are drawn:
        the output is [P..., k, D] (layout "first": [B, D, ..., k]), each candidate with the gradient of a single code; indices are
        [P..., k]; losses are means over all k; nothing enters the codebook. With reduction="none" the losses that are means over vectors
        have the shape of the indices, 0 where there is no code; so has, then, the loss that a call returns.

        With project=False the output is that before the output projection, of width heads * codebook_dim. `codes_of` makes of the codes
        [H, C, K] a codebook for every vector, [H, P..., C, K], among which it chooses.

        Raises ValueError or TypeError for what does not fit, and ValueError before a k-means start.
        """
        self._check_options(indices, weights, temperature, top_k, reduction)
        given = self._read(x, mask, lengths)
        positions = given.rows.shape[:-1]
        if weights is not None and not callable(weights):
            self._check_weights(weights, positions)
        own, labels = self._split_indices("indices", indices, positions), self._split_indices("targets", targets, positions)
        self._refuse_nonfinite(given)
        kept = self._spread(given.kept)
        self.table.start_(given.vectors, kept)
        codes = self.table.codes_for(given.vectors, kept) if self.training and not freeze_codebook else self.table.codes()
        codes = codes.detach() if freeze_codebook and codes.requires_grad else codes
        vectors, several = given.vectors, () if top_k is None else (top_k,)
        temperature = self._temperature(temperature) if own is None else 0.0
        counted = self._counts(freeze_codebook) and top_k is None
        if codes_of is not None:
            options = {"temperature": temperature, "labels": labels, "counted": counted, "project": project}
            return self._quantize_by_own_codes(given, codes_of(codes), codes, several=several, reduction=reduction, **options)
        scores = few_scores(vectors, codes, self._score) if self._by_scores(temperature, labels) else None
        picked = self._pick(vectors, codes, temperature, top_k or 1, scores=scores) if own is None else own
        if not several and weights is None and reduction == "mean" and self._soft_estimator(temperature) is None:
            return self._quantize_plain(given, codes, _of_kept(picked, kept), own, labels, counted, project, scores)
        if top_k is not None:
            vectors = _each(vectors, top_k)
            kept = None if kept is None else _each(kept, top_k)
        chosen = self._take(vectors, codes, _of_kept(picked, kept), temperature)._replace(each=top_k or 1)
        losses = self._losses(vectors, codes, chosen, labels, reduction, scores=scores)
        if reduction == "none":
            losses = self._join_losses(losses, positions, several)
        found = self._give_indices(chosen.indices, positions, several, vectors, codes)
        output = self._write(given, self._estimate(vectors, chosen), found, several, project, chosen.complete)
        if not counted:
            statistics = None
        elif weights is None:
            statistics = self._statistics(given, codes, chosen.indices, own)
        else:
            statistics = self._weighted_statistics(given, chosen, own, weights)
        return Quantized(output, found, losses, statistics)

    def _counts(self, frozen: bool) -> bool:
        """Whether a call gives statistics."""
        return self.training and not frozen and self.table.counts

    def _soft_estimator(self, temperature: float) -> SoftEstimator | None:
        """The gradient of a softmax that the output has, if any."""
        return None if isinstance(self.assignment, str) or not temperature > 0 else self.assignment.estimator

    def _by_scores(self, temperature: float, labels: Tensor | None) -> bool:
        """Whether anything asks for the scores of all codes."""
        if temperature > 0 or labels is not None:
            return True
        return any(isinstance(loss, CrossEntropyCommitment | Diversity) for loss in self.losses)

    def _quantize_by_own_codes(
        self,
        given: _Vectors,
        codes: Tensor,
        table: Tensor,
        *,
        temperature: float,
        labels: Tensor | None,
        counted: bool,
        project: bool,
        several: tuple[int, ...],
        reduction: Reduction,
    ) -> Quantized:
        """As `quantize`, with a codebook [H, P..., C, K] for every vector; `table` are the codes that they are made of."""
        own, shape = self._as_own_codes(codes, given), given.vectors.shape[:-1]
        positions, num = given.rows.shape[:-1], math.prod(several)
        vectors, kept = own.arrange(given.vectors), self._spread(given.kept)
        scores = own.scores(vectors) if self._by_scores(temperature, labels) else None
        chosen = self._choose_own(own, vectors, kept, scores, temperature, num)
        found = [own.restore_each(values, shape) for values in chosen[:3] if values is not None]
        chosen = _Chosen(*found, each=num, complete=chosen.complete)
        vectors = _each(given.vectors, num)
        scores = None if scores is None else own.restore(scores, shape)
        losses = self._losses(vectors, table, chosen, labels, reduction, scores=scores)
        statistics = self._own_statistics(given, table, chosen) if counted else None
        indices = self._give_indices(chosen.indices, positions, several, vectors, codes)
        output = self._write(given, self._estimate(vectors, chosen), indices, several, project, chosen.complete)
        return Quantized(output, indices, self._join_losses(losses, positions, several), statistics)

    def _as_own_codes(self, codes: Tensor, given: _Vectors) -> OwnCodes:
        """[H, P..., C, K]."""
        wanted = (*given.vectors.shape[:-1], self.codebook_size, self.codebook_dim)
        if codes.dim() < 4 or (codes.shape[0], codes.shape[1:-2].numel(), *codes.shape[-2:]) != wanted:
            raise ValueError(f"codes_of returned shape {tuple(codes.shape)}: must be [heads, *positions, codes, width], in all {wanted}")
        return OwnCodes(codes, self.metric)

    def _choose_own(
        self, own: OwnCodes, vectors: Tensor, kept: Tensor | None, scores: Tensor | None, temperature: float, num: int
    ) -> _Chosen:
        """Of vectors [L, K], in the order of their codes, and kept [H, M]: indices [L, num] and codes [L, num, K]."""
        drawn = scores is not None and temperature > 0 and isinstance(self.assignment, Gumbel)
        indices, complete = (draw(scores, num, temperature), False) if drawn else own.nearest(vectors, num, scores)
        indices = indices if kept is None else indices.where(own.arrange(kept).unsqueeze(-1), -1)
        complete = (complete and kept is None) or are_chosen(indices)
        codes, estimator = own.take(indices, all_known=complete), self._soft_estimator(temperature)
        if scores is None or estimator is None:
            return _Chosen(indices, codes, complete=complete)
        return _Chosen(indices, own.soften(codes, scores, indices, temperature, estimator), codes, complete=complete)

    def _own_statistics(self, given: _Vectors, table: Tensor, chosen: _Chosen) -> CodebookStatistics:
        """Counted by index; the error is that of the codes of the vectors themselves."""
        vectors = given.vectors.detach()
        found = coded(vectors, table.detach().to(vectors.dtype), chosen.indices, estimator="none", count=True)
        error = (vectors - chosen.codes.detach()).square_()
        error = error if chosen.complete else error.where((chosen.indices >= 0).unsqueeze(-1), 0.0)
        return self._statistics(given, table, chosen.indices, None, found._replace(squared_error=error.sum((1, 2))))

    def _join_losses(self, losses: dict[str, Tensor], positions: torch.Size, several: tuple[int, ...]) -> dict[str, Tensor]:
        """Those that have a number for each vector [H, M], or for each of several codes of it, in the shape of the indices."""
        ks = {name: () if name == "cross_entropy" else several for name in losses}
        return {name: self._join_indices(loss, positions, ks[name]) if loss.dim() else loss for name, loss in losses.items()}

    def _quantize_plain(
        self,
        given: _Vectors,
        codes: Tensor,
        indices: Tensor,
        own: Tensor | None,
        targets: Tensor | None,
        counted: bool,
        project: bool,
        scores: Tensor | None,
    ) -> Quantized:
        """As the other steps of `quantize` together, in one pass forward and one backward; indices [H, M]."""
        vectors = given.vectors
        codes = codes.to(vectors.dtype)
        moved = isinstance(self.estimator, DiVeQ) and self.training
        estimator: PlainEstimator = "none" if moved else "straight_through" if isinstance(self.estimator, DiVeQ) else self.estimator
        pull = sum(loss.pull for loss in self.losses if isinstance(loss, Commitment))
        passed = (0.0 if moved else self.sync_update) + (estimator == "none")
        found = coded(vectors, codes, indices, estimator=estimator, count=counted, pull=pull, passed=passed)
        chosen = _Chosen(indices, found.quantized)
        losses = self._losses(vectors, codes, chosen, targets, commitment=found.error, scores=scores)
        statistics = self._statistics(given, codes, indices, own, found) if counted else None
        joined = self._give_indices(indices, given.rows.shape[:-1], (), vectors, codes)
        output = self._estimate(vectors, chosen) if moved else found.quantized
        return Quantized(self._write(given, output, joined, (), project), joined, losses, statistics)

    def cross_entropy(self, x: Tensor, targets: Tensor, mask: Tensor | None = None, *, lengths: Tensor | None = None) -> Tensor:
        """The loss "cross_entropy" of `quantize(x, mask, targets=targets)` by itself: no code is chosen."""
        given = self._read(x, mask, lengths)
        labels = cast(Tensor, self._split_indices("targets", targets, given.rows.shape[:-1]))
        self._refuse_nonfinite(given)
        labels = _of_kept(labels, self._spread(given.kept))
        return cross_entropy_commitment(given.vectors, self.table.codes(), labels, metric=self._score)

    def encode(self, x: Tensor, mask: Tensor | None = None, *, lengths: Tensor | None = None) -> Tensor:
        """x -> indices int64 of the nearest codes, [P...] or [P..., heads]; -1: masked or not finite."""
        given = self._read(x, mask, lengths)
        self._refuse_nonfinite(given)
        indices = _of_kept(self._pick(given.vectors, self.table.codes()), self._spread(given.kept))
        return self._join_indices(indices, given.rows.shape[:-1], ())

    def decode(self, indices: Tensor) -> Tensor:
        """indices [P...] or [P..., heads] -> vectors in the layout and width of the input; zeros where all heads are -1."""
        codes, complete = self._look_up(indices)
        return width_back(self._project_out(codes, indices, complete), self.layout)

    def decode_codes(self, indices: Tensor) -> Tensor:
        """As `decode`, without the output projection: of width heads * codebook_dim."""
        return width_back(self._look_up(indices)[0], self.layout)

    @torch.no_grad()
    def nearest(self, x: Tensor, num: int, *, temperature: float | None = 0.0) -> tuple[Tensor, Tensor]:
        """The `num` nearest codes of vectors x [N, D], or all if there are fewer: indices [N, k] int64, nearest first, and what they
        decode to, [N, k, D] of the dtype of x; -1 and zeros for a vector that is not finite. With `Gumbel` at a `temperature` above 0
        (None: its own) so many different codes are drawn instead, else nothing is, in training neither.

        Raises ValueError for more than one head, another shape than [N, D] and num below 1.
        """
        if self.heads > 1:
            raise ValueError(f"nearest needs one head: this has heads = {self.heads}, whose nearest codes do not combine")
        check_tensor("x", x)
        if x.dim() != 2:
            raise ValueError(f"x has shape {tuple(x.shape)}: must be [vectors, {self.dim}]")
        check_count("num", num)
        given = self._read(x, None, None)
        self._refuse_nonfinite(given)
        codes = self.table.codes()
        shape = (len(x), min(num, self.codebook_size))
        drawn_at = self._temperature(None) if temperature is None else temperature
        indices = self._pick(given.vectors, codes, drawn_at, shape[1])
        indices = indices if given.kept is None else indices.where(given.kept.repeat_interleave(shape[1]), -1)
        found = gather_codes(codes, indices).reshape(*shape, self.codebook_dim)
        indices = indices.reshape(shape)
        return indices, self._project_out(found.to(given.dtype), indices).to(x.dtype)

    # Learning by hand

    @torch.no_grad()
    def statistics(self, x: Tensor, mask: Tensor | None = None, *, lengths: Tensor | None = None, indices: Tensor) -> CodebookStatistics:
        """What a commit needs of x, which is as for `quantize`, assigned to indices [P..., heads?] (-1: to none), in any mode."""
        given = self._read(x, mask, lengths)
        check_indices("indices", indices, self.codebook_size, torch.Size((*given.rows.shape[:-1], *self.code_shape)))
        own = _of_kept(self._to_heads(indices.to(torch.int64).reshape(-1, self.heads)), self._spread(given.kept))
        return self._count_once(self.table.statistics(given.vectors, own, (own >= 0).to(given.vectors.dtype)))

    def pull_(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        temperature: float | None = None,
        codes_of: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Add to the gradients of what the codes are made of that of the mean squared error of the vectors of x to their codes.

        For an optimizer of the codebook alone, which is then stepped before x is quantized. x, mask, lengths, temperature, codes_of as for
        `quantize`. Returns the error, [] float32 or wider. With several ranks error and gradients are those of all their vectors. Changes
        nothing in a backward, where a forward is computed again.
        """
        if self.table.is_entered:  # within the forward of another quantizer
            return self._add_pull(x, mask, lengths, temperature, codes_of)
        if self.training and self.commit == "auto":
            self._begin_([self.table], outside_backward(x))
        self.table.enter_(learning=True, reducer=self.reducer)
        try:
            return self._add_pull(x, mask, lengths, temperature, codes_of)
        finally:
            self.table.leave_()

    def _add_pull(
        self,
        x: Tensor,
        mask: Tensor | None,
        lengths: Tensor | None,
        temperature: float | None,
        codes_of: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        with torch.no_grad():
            given = self._read(x, mask, lengths)
            kept = self._spread(given.kept)
            self.table.start_(given.vectors, kept)
            codes = self.table.codes_to_pull(given.vectors, kept)
            error, gradient = self._pull(given, kept, self._temperature(temperature), codes.detach(), codes_of)
        if not in_backward():
            self.table.add_gradient_(codes, gradient)
        return error

    def _pull(
        self, given: _Vectors, kept: Tensor | None, temperature: float, codes: Tensor, codes_of: Callable[[Tensor], Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """The mean squared error of the vectors of all ranks to their codes, and its gradient of the codes [H, C, K]."""
        if codes_of is not None:
            return self._pull_own_codes(given, kept, temperature, codes, codes_of)
        indices = _of_kept(self._pick(given.vectors, codes, temperature), kept)
        found = coded(given.vectors, codes.to(given.vectors.dtype), indices, estimator="none", count=True)
        own = [found.squared_error.sum().reshape(1), found.count.flatten(), found.sum.flatten()]
        error, count, total = sum_in_forward(torch.cat(own), self.reducer).split([len(part) for part in own])
        share = (count.sum() * self.codebook_dim).clamp(min=1)
        gradient = 2 * (count.view_as(found.count).unsqueeze(-1) * codes - total.view_as(found.sum)) / share
        return error.squeeze(0) / share, gradient

    def _pull_own_codes(
        self, given: _Vectors, kept: Tensor | None, temperature: float, codes: Tensor, codes_of: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """As `_pull`, of the codebook that `codes_of` gives every vector."""
        with torch.enable_grad():
            codes.requires_grad_()
            own, shape = self._as_own_codes(codes_of(codes), given), given.vectors.shape[:-1]
            vectors = own.arrange(given.vectors)
            scores = own.scores(vectors).detach() if temperature > 0 else None
            chosen = self._choose_own(own, vectors, kept, scores, temperature, 1)
            taken = own.restore_each(chosen.codes if chosen.plain is None else chosen.plain, shape)
            counted = None if chosen.complete else own.restore_each(chosen.indices, shape) >= 0
            difference = taken.detach() - given.vectors
            difference = difference if counted is None else difference.where(counted.unsqueeze(-1), 0.0)
            (gradient,) = torch.autograd.grad(taken, codes, 2 * difference)
        number = difference.new_full((1,), shape.numel()) if counted is None else counted.sum().to(difference).reshape(1)
        parts = [difference.square().sum().reshape(1), number, gradient.flatten()]
        error, vectors, gradient = sum_in_forward(torch.cat(parts), self.reducer).split([1, 1, gradient.numel()])
        share = (vectors * self.codebook_dim).clamp(min=1)
        return (error / share).squeeze(0), (gradient / share).view_as(codes)

    # Setting

    def initialize_(
        self, x: Tensor, mask: Tensor | None = None, *, lengths: Tensor | None = None, seed: int = 0, reducer: Reducer | None = None
    ) -> None:
        """Set the codebook to the k-means of x, which is as for `quantize`; with `reducer` of the vectors of all ranks."""
        with torch.no_grad():
            given = self._read(x, mask, lengths)
        self.table.initialize_(given.vectors, self._spread(given.kept), seed=seed, reducer=reducer)

    def replace_dead_codes_(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        threshold: float | None = None,
        seed: int = 0,
        reducer: Reducer | None = None,
    ) -> None:
        """Codes of a moving count below `threshold` (None: that of `dead_codes`) start anew at vectors of x, which is as for `quantize`."""
        if threshold is not None:
            check_number("threshold", threshold)
            if not 0 < threshold < math.inf:
                raise ValueError(f"threshold = {threshold}: must be positive and finite, a moving count")
        with torch.no_grad():
            given = self._read(x, mask, lengths)
        self.table.expire_(given.vectors, self._spread(given.kept), threshold=threshold, seed=seed, reducer=reducer)

    # From an input to vectors and back

    def _read(self, x: Tensor, mask: Tensor | None, lengths: Tensor | None) -> _Vectors:
        rows = width_last(x, self.dim, self.layout)
        mask = position_mask(rows.shape[:-1], mask, lengths)
        if not self.input_gradient:
            rows = rows.detach()
        project_in, norm = self._layers_in()
        if mask is None and may_look(rows) and _is_plain(project_in, nn.Linear) and _is_plain(norm, nn.LayerNorm):
            projected = rows if project_in is None else project_in(_for_layer(project_in, rows))
            projected = projected if norm is None else norm(projected)
            vectors = self._known(self._as_vectors(projected))  # what is not finite shows behind the layers
            if vectors is not None:
                return _Vectors(rows, vectors, None, None, projected.dtype)
        # Before the projections, whose gradients what is not finite would reach even with weight 0.
        projected, kept = _keep(rows, mask, finite_rows if project_in is not None else self._has_scores)
        if project_in is not None:
            has_meaning = finite_rows if norm is not None else self._has_scores
            projected, kept = _keep(project_in(_for_layer(project_in, projected)), kept, has_meaning)
        if norm is not None:
            with torch.no_grad():  # a row so long that it has no norm is finite in front of it, and its gradient is not
                normed = finite_rows(norm.forward(projected))
            kept = normed if kept is None else kept & normed
            projected, kept = _keep(norm(where_kept(kept, projected)), kept, self._has_scores)
        vectors = self._as_vectors(projected)
        return _Vectors(rows, directions(vectors) if self.metric == "cosine" else vectors, mask, kept, projected.dtype)

    def _as_vectors(self, projected: Tensor) -> Tensor:
        """[P..., heads * K] -> [H, M, K], as wide as the codes or wider."""
        if projected.dtype is not (dtype := self.table.dtype):
            projected = as_dtype(projected, torch.promote_types(projected.dtype, dtype))
        return self._to_heads(projected.reshape(-1, self.heads, self.codebook_dim)) if self.separate_heads else self._as_one(projected)

    def _known(self, vectors: Tensor) -> Tensor | None:
        """Vectors as they are compared with codes, if it is known that all can be."""
        if self.metric == "cosine":
            return known_directions(vectors)
        return vectors if is_finite(vectors) else None

    def _layers_in(self) -> tuple[nn.Module | None, nn.Module | None]:
        """The projection and its norm, between which what is not finite is left out, also where a Sequential is these two."""
        layer: nn.Module | None = self.project_in
        if type(layer) is not nn.Sequential:
            return layer, self.norm
        parts = tuple(layer._modules.values())
        if [type(part) for part in parts] != [nn.Linear, nn.LayerNorm] or has_hooks(layer):
            return layer, self.norm
        return parts[0], parts[1]

    def _has_scores(self, rows: Tensor) -> Tensor:
        """[P..., heads * K] -> [P...] bool: whether the vectors of all heads can be compared with codes."""
        rows = as_dtype(rows, torch.promote_types(rows.dtype, self.table.dtype))
        return has_scores(rows.unflatten(-1, (self.heads, self.codebook_dim)), self.metric).all(-1)

    def _write(
        self,
        given: _Vectors,
        quantized: Tensor,
        indices: Tensor,
        several: tuple[int, ...],
        project: bool = True,
        complete: bool = False,
    ) -> Tensor:
        """Vectors [H, M, K], or k times as many, to the layout, width and dtype of the input."""
        positions = given.rows.shape[:-1]
        codes = self._from_heads(quantized).reshape(*positions, *several, self.heads * self.codebook_dim)
        output = as_dtype(codes, given.dtype)
        output = as_dtype(self._project_out(output, indices, complete) if project else output, given.rows.dtype)
        if not project:
            return width_back(output, self.layout)
        if given.mask is not None and self.masked == "input":
            mask = given.mask.reshape(*positions, *(1 for _ in several), 1)
            output = output.where(mask, given.rows.unsqueeze(-2) if several else given.rows)
        return width_back(output, self.layout)

    def _project_out(self, codes: Tensor, indices: Tensor, complete: bool = False) -> Tensor:
        """Codes, 0 where no head of a position has one, in the width of the input."""
        layer = self.project_out
        if layer is None:
            return codes
        output = layer(as_dtype(codes, _dtype_of(layer, codes)))
        if complete or are_chosen(indices):
            return output
        valid = indices >= 0 if indices.dim() == codes.dim() - 1 else (indices >= 0).any(-1)
        return where_kept(valid, output)

    def _look_up(self, indices: Tensor) -> tuple[Tensor, bool]:
        """[P...] or [P..., heads] -> codes [P..., heads * K], and whether it is known that no index is -1."""
        check_tensor("indices", indices)
        if indices.dim() < 1 or (self.heads > 1 and (indices.dim() < 2 or indices.shape[-1] != self.heads)):
            shape = "[batch, ...]" if self.heads == 1 else f"[batch, ..., {self.heads}]"
            raise ValueError(f"indices has shape {tuple(indices.shape)}: must be {shape}")
        number, own = indices.numel(), cast(Codebook, self._modules["table"])
        table, as_read = own.rows(number // self.heads if self.separate_heads else number)
        if not self.separate_heads:
            codes, complete = rows_at(table.squeeze(0), indices)
        else:
            complete = check_indices("indices", indices, self.codebook_size)
            chosen = self._to_heads(indices.to(torch.int64).reshape(-1, self.heads))
            codes = self._from_heads(gather_codes(table, chosen, all_known=complete)).reshape(*indices.shape, self.codebook_dim)
        codes = codes if as_read else directions(codes)
        return codes if self.heads == 1 else codes.flatten(-2), complete

    def _to_heads(self, values: Tensor) -> Tensor:
        """[N, heads, ...] -> [H, M, ...]."""
        return values.transpose(0, 1) if self.separate_heads else values.reshape(1, values.shape[0] * values.shape[1], *values.shape[2:])

    def _as_one(self, rows: Tensor) -> Tensor:
        """[P..., heads * K] -> [1, M, K]."""
        return rows.reshape(1, -1, self.codebook_dim)

    def _from_heads(self, values: Tensor) -> Tensor:
        """[H, M, ...] -> in the order of [N, heads, ...]; its shape is for the caller to give."""
        return values.transpose(0, 1) if self.separate_heads else values

    @overload
    def _spread(self, values: Tensor) -> Tensor: ...

    @overload
    def _spread(self, values: None) -> None: ...

    def _spread(self, values: Tensor | None) -> Tensor | None:
        """One value a position [P...] -> one a vector [H, M]."""
        return None if values is None else self._to_heads(values.reshape(-1, 1).expand(-1, self.heads))

    def _split_indices(self, name: str, indices: Tensor | None, positions: torch.Size) -> Tensor | None:
        """[P..., heads?] -> [H, M]."""
        if indices is None:
            return None
        check_indices(name, indices, self.codebook_size, torch.Size((*positions, *self.code_shape)))
        return self._to_heads(indices.to(torch.int64).reshape(positions.numel(), self.heads))

    def _join_indices(self, indices: Tensor, positions: torch.Size, several: tuple[int, ...]) -> Tensor:
        """[H, M] -> [P..., heads?], or [P..., k]."""
        return self._from_heads(indices).reshape(*positions, *several, *self.code_shape)

    def _give_indices(self, indices: Tensor, positions: torch.Size, several: tuple[int, ...], *read: Tensor) -> Tensor:
        """As `_join_indices`; where a backward of what was read needs `indices`, whoever gets them may still write into them."""
        joined = self._join_indices(indices, positions, several)
        return joined.clone() if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in read) else joined

    # Choosing codes

    def _temperature(self, own: float | None) -> float:
        """At which the softmax has a say; 0: the nearest code is taken."""
        if not isinstance(self.assignment, Gumbel | Softmax) or not self.training:
            return 0.0
        return self.assignment.temperature if own is None else own

    @property
    def _score(self) -> ScoreMetric:
        """Of vectors and codes as they are read: for cosine they have length 1."""
        return "product" if self.metric == "cosine" else "euclidean"

    def _pick(self, vectors: Tensor, codes: Tensor, temperature: float = 0.0, num: int = 1, scores: Tensor | None = None) -> Tensor:
        """The code of each vector, [H, M], or several of each side by side, [H, M * num]."""
        if temperature > 0 and isinstance(self.assignment, Gumbel):
            scores = few_scores(vectors, codes, self._score) if scores is None else scores
            if scores is not None:
                return draw(scores, num, temperature).flatten(1)
            return sample_indices(vectors, codes, num, temperature=temperature, metric=self._score).flatten(1)
        if num > 1:
            return nearest_codes(vectors, codes, num).indices.flatten(1)
        return nearest_index(vectors, codes)

    def _take(self, vectors: Tensor, codes: Tensor, indices: Tensor, temperature: float) -> _Chosen:
        """The codes of indices [H, M], with the gradient of a softmax where the assignment brings one."""
        complete = are_chosen(indices)
        plain, estimator = gather_codes(codes, indices, all_known=complete), self._soft_estimator(temperature)
        if estimator is None:
            return _Chosen(indices, plain, complete=complete)
        found = soft_codes(vectors, codes, indices, temperature=temperature, estimator=estimator, metric=self._score)
        return _Chosen(indices, found, plain, complete=complete)

    def _estimate(self, vectors: Tensor, chosen: _Chosen) -> Tensor:
        """The codes in value, or near them, with the gradient that `estimator` says."""
        codes = as_dtype(chosen.codes, vectors.dtype)
        if chosen.plain is not None or self.estimator == "none":
            output = codes
        elif self.estimator == "rotation":
            output = rotation_trick(vectors, codes)
        elif isinstance(self.estimator, DiVeQ) and self.training:
            output = directional(vectors, codes, sigma2=self.estimator.sigma2)
        else:
            output = straight_through(vectors, codes)
        return output + self.sync_update * (codes - codes.detach()) if self.sync_update > 0 and codes.requires_grad else output

    # Losses and statistics

    def _losses(
        self,
        vectors: Tensor,
        codes: Tensor,
        chosen: _Chosen,
        targets: Tensor | None,
        reduction: Reduction = "mean",
        *,
        commitment: Tensor | None = None,
        scores: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """By name: [], or with reduction "none" [H, M] those that are means over vectors; that of commitment may be known, and scores."""
        losses = {}
        for loss in self.losses:
            known = commitment if isinstance(loss, Commitment) else None
            losses[_LOSS_NAMES[type(loss)]] = self._loss(loss, vectors, codes, chosen, reduction, scores) if known is None else known
        if targets is not None:
            own = vectors[:, :: chosen.each]  # one of a vector with several candidates
            known = None if chosen.complete or are_chosen(chosen.indices) else chosen.indices[:, :: chosen.each] >= 0
            losses["cross_entropy"] = self._cross_entropy(own, codes, _of_kept(targets, known), reduction, scores)
        return losses

    def _loss(
        self, loss: Loss, vectors: Tensor, codes: Tensor, chosen: _Chosen, reduction: Reduction, scores: Tensor | None = None
    ) -> Tensor:
        """Of vectors [H, M, K], codes [H, C, K] and, if at hand, scores of one of the `each` of a vector."""
        if isinstance(loss, Commitment):
            own, counted = chosen.codes if chosen.plain is None else chosen.plain, None if chosen.complete else chosen.indices >= 0
            return mean_commitment_loss(vectors, own, counted, pull=loss.pull, reduction=reduction)
        if isinstance(loss, CrossEntropyCommitment):
            return self._cross_entropy(vectors, codes, chosen.indices, reduction, scores)
        if isinstance(loss, Diversity):
            # A mean over vectors is that over their candidates.
            counted = None if chosen.complete else chosen.indices[:, :: chosen.each] >= 0
            if scores is not None:
                return negative_entropy(mean_softmax(scores, counted, loss.temperature))
            return diversity_loss(vectors[:, :: chosen.each], codes, counted, temperature=loss.temperature, metric=self._score)
        noise = None if self.training else torch.zeros_like(codes[..., 0])  # evaluation draws nothing
        active = _active(chosen.indices, self.codebook_size, chosen.complete) if loss.active_only else None
        return orthogonality_loss(codes, active, max_codes=loss.max_codes, noise=noise)

    def _cross_entropy(self, vectors: Tensor, codes: Tensor, targets: Tensor, reduction: Reduction, scores: Tensor | None) -> Tensor:
        """Of targets [H, M], of which several side by side are those of one vector of the scores [H, m, C]."""
        if scores is None:
            return cross_entropy_commitment(vectors, codes, targets, metric=self._score, reduction=reduction)
        if targets.shape[1] > scores.shape[1]:
            targets = targets.unflatten(1, (scores.shape[1], targets.shape[1] // max(1, scores.shape[1])))
            scores = scores.unsqueeze(2).expand(-1, -1, targets.shape[2], -1)
        return mean_cross_entropy(scores, targets) if reduction == "mean" else cross_entropy(scores, targets).flatten(1)

    def _statistics(
        self, given: _Vectors, codes: Tensor, indices: Tensor, own: Tensor | None, found: Coded | None = None
    ) -> CodebookStatistics:
        """Of vectors that chose indices [H, M] of codes [H, C, K], which `found` has counted already; own: the indices that were given."""
        ignored = None if given.mask is None else ~self._spread(given.mask)
        if own is not None:
            ignored = own < 0 if ignored is None else ignored | (own < 0)
        vectors = given.vectors.detach()
        if found is None:
            found = coded(vectors, codes.detach().to(vectors.dtype), indices, estimator="none", count=True)
        statistics = coded_stats(
            vectors, indices, found, ignored, num_candidates=self.table.num_candidates, far=self.table.far_from_vectors
        )
        if own is None:
            self.table.recognize_(statistics)
        return self._count_once(statistics)

    @torch.no_grad()
    def _weighted_statistics(self, given: _Vectors, chosen: _Chosen, indices: Tensor | None, weights: Weights | None) -> CodebookStatistics:
        share = None if given.mask is None else self._spread(given.mask)
        if indices is not None:
            share = indices >= 0 if share is None else share & (indices >= 0)
        if share is not None:
            share = share.to(given.vectors.dtype)
        if weights is not None:
            own = self._weigh_vectors(weights, given.rows, chosen.indices)
            share = own if share is None else share * own
        return self._count_once(self.table.statistics(given.vectors, chosen.indices, share, quantized=chosen.codes.to(given.vectors.dtype)))

    def _count_once(self, found: CodebookStatistics) -> CodebookStatistics:
        """A vector that is not finite counts once, not once a head."""
        if self.heads == self.table.heads:
            return found
        return found._replace(non_finite=found.non_finite * self.table.heads / self.heads)

    def _weigh_vectors(self, weights: Weights, rows: Tensor, indices: Tensor) -> Tensor:
        """[H, M]."""
        positions = rows.shape[:-1]
        if not isinstance(weights, Tensor):
            weights = weights(rows.detach(), self._join_indices(indices, positions, ()))
            self._check_weights(weights, positions)
        if weights.shape == positions:
            return self._spread(weights)
        return self._to_heads(weights.reshape(positions.numel(), self.heads))

    # Checks

    def _check_table(self, table: Codebook, choices: dict[str, object]) -> Codebook:
        """The table, if it is one that this can use, and nothing else says what it has to be."""
        check_kind("table", table, Codebook)
        for name, value in choices.items():
            if value is not None:
                raise ValueError(f"{name} = {value}: must be None where a table is given, which has its own")
        wanted = (self.heads if self.separate_heads else 1, self.codebook_size, self.codebook_dim, self.metric)
        found = (table.heads, table.size, table.dim, table.metric)
        if found != wanted:
            raise ValueError(f"table has (heads, size, dim, metric) = {found}: must have {wanted}")
        return table

    def _check_weights(self, weights: object, positions: torch.Size) -> None:
        if not isinstance(weights, Tensor) or not weights.is_floating_point():
            kind = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
            raise TypeError(f"weights is {kind}: must be a floating point tensor")
        if weights.shape not in (positions, (*positions, *self.code_shape)):
            raise ValueError(f"weights has shape {tuple(weights.shape)}: must be {(*positions, *self.code_shape)}, one a vector")
        check_range("weights", weights, 0.0, torch.finfo(weights.dtype).max)

    def _check_options(
        self,
        indices: Tensor | None,
        weights: Weights | None,
        temperature: float | None,
        top_k: int | None,
        reduction: Reduction,
    ) -> None:
        check_choice("reduction", reduction, _REDUCTIONS)
        if temperature is not None:
            if isinstance(self.assignment, str):
                raise ValueError(f'temperature = {temperature}: must be None with assignment = "nearest", which draws nothing')
            check_number("temperature", temperature)
            if not temperature >= 0:
                raise ValueError(f"temperature = {temperature}: must be 0 (the nearest code) or positive")
        if indices is not None and temperature is not None:
            raise ValueError(f"temperature = {temperature}: must be None where indices are given, as nothing is drawn")
        if top_k is None:
            return
        for name, value in (("indices", indices), ("weights", weights)):
            if value is not None:
                raise ValueError(f"{name} is given together with top_k = {top_k}: must be one of them")
        if self.heads > 1:
            raise ValueError(f"top_k = {top_k}: must be None with heads = {self.heads}, whose nearest codes do not combine")
        check_count("top_k", top_k, least=0)
        if not 1 <= top_k <= self.codebook_size:
            raise ValueError(f"top_k = {top_k}: must be from 1 to {self.codebook_size}, the size of the codebook")

    def _refuse_nonfinite(self, given: _Vectors) -> None:
        if self.on_nonfinite == "drop":
            return
        if given.kept is None or given.kept is given.mask:
            return
        lost = ~given.kept if given.mask is None else given.mask & ~given.kept
        what = 'must be finite, as on_nonfinite = "raise" says'
        require(
            ~lost.any(), f"x holds vectors that are not finite: {what}", lambda: f"x holds {int(lost.sum())} vectors not finite: {what}"
        )


def _keep(x: Tensor, kept: Tensor | None, has_meaning: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor | None]:
    """x [P..., D] with zeros where it is not kept [P...] bool, and what is still kept of it: what `has_meaning`. None: all."""
    if not is_finite(x):
        found = has_meaning(x)
        kept = found if kept is None else kept & found
    return (x, None) if kept is None else (where_kept(kept, x), kept)


def _is_plain(layer: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether it may be called twice, if it is there: it is of this very kind, and nothing else listens."""
    return layer is None or (type(layer) is kind and not has_hooks(layer))


def _for_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """x in its dtype; contiguous, as of strided rows a product takes several times as long."""
    return as_dtype(x, _dtype_of(layer, x)).contiguous()


def _dtype_of(layer: nn.Module, x: Tensor) -> torch.dtype:
    """That of its parameters; of x where it has none."""
    first = next(iter(layer)) if isinstance(layer, nn.Sequential) and len(layer) else layer
    weight = first._parameters.get("weight")
    return weight.dtype if isinstance(weight, Tensor) else next((parameter.dtype for parameter in layer.parameters()), x.dtype)


def _each(values: Tensor, num: int) -> Tensor:
    """Values of the vectors [H, M, ...] once for each of `num` codes, side by side: [H, M * num, ...]."""
    if num == 1:
        return values
    tail = values.shape[2:]
    return values.unsqueeze(2).expand(-1, -1, num, *tail).reshape(len(values), values.shape[1] * num, *tail)


def _of_kept(indices: Tensor, kept: Tensor | None) -> Tensor:
    """indices [H, M], -1 where they are not kept."""
    return indices if kept is None else indices.where(kept, -1)


def _check_sizes(**sizes: int | None) -> None:
    for name, value in sizes.items():
        if value is not None:
            check_count(name, value)


def _check_kinds(update: object, dead_codes: object, affine: object) -> None:
    kinds = {"update": (update, get_args(Update)), "dead_codes": (dead_codes, (DeadCodes,)), "affine": (affine, (Affine,))}
    for name, (value, allowed) in kinds.items():
        if value is not None:
            check_kind(name, value, *allowed)


def _sequence(name: str, values: Sequence[Loss]) -> tuple[Loss, ...]:
    if not isinstance(values, Sequence):
        raise TypeError(f"{name} = {values!r}: must be a sequence, () for none")
    return tuple(values)


def _check_losses(losses: tuple[Loss, ...], learns_by_gradient: bool) -> None:
    kinds = [type(loss) for loss in losses]
    for loss in losses:
        if type(loss) not in _LOSS_NAMES:
            raise TypeError(f"losses holds {loss!r}: must be of {', '.join(kind.__name__ for kind in _LOSS_NAMES)}")
        if kinds.count(type(loss)) > 1:
            raise ValueError(f"losses holds several of {type(loss).__name__}: must be at most one of each kind")
    if Orthogonality in kinds and not learns_by_gradient:
        raise ValueError(
            "losses holds Orthogonality, which moves nothing unless the codes learn by gradient (update=Gradient() or a transform)"
        )


def _active(indices: Tensor, codebook_size: int, complete: bool) -> Tensor:
    """[H, C] bool: the codes that any of indices [H, M] chose; `complete`: none of these is -1."""
    if complete:
        return torch.zeros(len(indices), codebook_size, dtype=torch.bool, device=indices.device).scatter_(1, indices, True)
    chosen = torch.zeros(len(indices), codebook_size + 1, dtype=torch.bool, device=indices.device)
    return chosen.scatter(1, indices.where(indices >= 0, codebook_size), True)[:, :-1]
