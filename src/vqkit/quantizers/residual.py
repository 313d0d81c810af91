"""Residual quantization: each layer quantizes what the layers before it left over (Juang and Gray, 1982; Zeghidour et al., 2021).

`Residual` combines any quantizers; the output is the sum of theirs. It calls their pure `quantize` alone, so that statistics are added
and committed once a call, and of the chosen path. `ResidualVQ` is the combination of `VectorQuantize`.

Shapes: P positions of the input, N of them flattened, D width of the input, d width of the layers, C codes, Q layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vqkit.dist import Reducer
from vqkit.ops.codebook import CodebookStatistics, are_chosen, merge_statistics
from vqkit.ops.estimators import scale_gradient
from vqkit.ops.precision import as_dtype, finite_rows, known_finite, may_look, widest
from vqkit.ops.scalar import per_scalar
from vqkit.quantizers.base import Quantized, Quantizer, Statistics, changed
from vqkit.quantizers.beam import beam_search
from vqkit.quantizers.codebook import Codebook
from vqkit.quantizers.commit import flatten_statistics
from vqkit.quantizers.committed import Committed, Counting
from vqkit.quantizers.config import (
    MLP,
    BeamSearch,
    Commit,
    DiVeQ,
    Estimator,
    Frozen,
    Gradient,
    Gumbel,
    QuantizeDropout,
    Softmax,
    check_choice,
    check_kind,
    check_positive,
)
from vqkit.quantizers.implicit import ImplicitVQ, check_estimator, check_sync_update, conditions, pass_gradient
from vqkit.quantizers.layout import Layout, check_layout, is_integer, is_nothing, position_mask, require, where_kept, width_back, width_last
from vqkit.quantizers.vector_quantize import VectorQuantize


class _Path(NamedTuple):
    outputs: list[Tensor]  # [P..., d] of each layer; 0 where it has no code
    told_all: bool  # whether a code may hand on all of the gradient of what later layers are told of it
    indices: Tensor  # [P..., Q, ...]
    losses: dict[str, Tensor]
    statistics: Statistics


class Residual(Quantizer):
    """The sum of `layers`, each applied to what is left by those before it; one that stands several times is shared.

    Layers are quantizers of one width d and one `code_shape`, with the width last. A shared layer is stored once; its statistics are the
    sum over its uses. `dim` is the width of the input: where it is not d, linear projections stand around the whole.

    `estimator` says what gradient the input gets through the sum of the codes: one of those of `VectorQuantize`, or "layers", the sum of
    what the layers give it, which alone hands on the gradient of a softmax over codes. `sync_update` of the gradient of the output then
    also goes to the codes of all layers (Huh et al., 2023); with input_gradient=False nothing at all reaches the input.
    `gradient_fraction` of the gradient that later layers (their losses, or with "layers" their outputs) send back into what they are
    left with goes on into the outputs of earlier layers, and so into their codes where these are differentiable; `condition_fraction`
    (None: the same) of the gradient that implicit codebooks send into the partial reconstruction which they are told does so, too.

    Layers that wait for k-means start one after the other in the first eager training forward, each at what those before it leave; one
    that is shared, at what all its uses see. So they do by `initialize_`.

    `soft_clamp`, one number or one a scalar, keeps what the layers see within that value, by a tanh.

    `quantize_dropout` cuts the later layers off in training, `beam` looks for better paths than the greedy one; both may be set for a
    call. Masked vectors give zeros, or with masked="input" themselves.

    Raises ValueError for no layers, layers of different width or code_shape, and choices that do not fit.
    """

    def __init__(
        self,
        layers: Sequence[Quantizer],
        *,
        dim: int | None = None,
        estimator: Estimator | Literal["layers"] = "straight_through",
        gradient_fraction: float = 0.0,
        condition_fraction: float | None = None,
        sync_update: float = 0.0,
        input_gradient: bool = True,
        soft_clamp: float | Sequence[float] | None = None,
        quantize_dropout: QuantizeDropout | None = None,
        beam: BeamSearch | None = None,
        layout: Layout = "last",
        masked: Literal["zero", "input"] = "zero",
        commit: Commit = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(layers, nn.Module) and not isinstance(layers, nn.ModuleList):
            raise TypeError(f"layers is a {type(layers).__name__}: must be a sequence of quantizers")
        layers = [*layers]
        check_parts("layers", layers, alike=("dim", "code_shape"))
        _check_choices(len(layers), estimator, gradient_fraction, sync_update, quantize_dropout, beam, masked)
        _check_fraction("condition_fraction", gradient_fraction if condition_fraction is None else condition_fraction)
        if beam is not None:
            _check_beam(layers)
        check_layout(layout)
        self.layers = nn.ModuleList(dict.fromkeys(layers))
        self._order = [list(self.layers).index(layer) for layer in layers]
        self._slots = codebook_slots(layers)
        uses = [tuple(slots) for slots in self._slots]
        self._shared = {own for own in uses if uses.count(own) > 1}
        self._options = call_options(layers)
        first: Any = layers[0]
        self._code_shape: tuple[int, ...] = (len(layers), *first.code_shape)  # asked for in every call
        self.inner_dim: int = first.dim
        self.dim: int = self.inner_dim if dim is None else dim
        projected = self.dim != self.inner_dim
        self.project_in = nn.Linear(self.dim, self.inner_dim, device=device) if projected else nn.Identity()
        self.project_out = nn.Linear(self.inner_dim, self.dim, device=device) if projected else nn.Identity()
        self.estimator, self.gradient_fraction, self.sync_update = estimator, gradient_fraction, sync_update
        self.condition_fraction = gradient_fraction if condition_fraction is None else condition_fraction
        self.input_gradient = input_gradient
        self.soft_clamp = None if soft_clamp is None else check_positive("soft_clamp", soft_clamp, self.inner_dim)
        self.quantize_dropout, self.beam = quantize_dropout, beam
        self.layout, self.masked = layout, masked
        self.clock = Committed(device=device) if quantize_dropout else None
        self.commit = commit

    def extra_repr(self) -> str:
        own = f"dim={self.dim}, num_quantizers={self.num_quantizers}, estimator={self.estimator!r}"
        layers = changed(
            self, quantize_dropout=None, beam=None, gradient_fraction=0.0, sync_update=0.0, input_gradient=True, soft_clamp=None
        )
        return own + layers + changed(self, layout="last", masked="zero", commit="auto")

    @property
    def num_quantizers(self) -> int:
        """Q, shared layers as often as they are used."""
        return len(self._order)

    def _each(self) -> list[Any]:
        layers = [*self.layers]
        return [layers[number] for number in self._order]

    # What every quantizer says of itself

    def codebooks(self) -> list[Counting]:
        return unique_codebooks(self.layers)

    @property
    def code_shape(self) -> tuple[int, ...]:
        return self._code_shape

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return tuple(size for layer in self._each() for size in layer.codebook_sizes)

    @property
    def loss_weights(self) -> dict[str, float]:
        return {numbered(name, i): weight for i, layer in enumerate(self._each()) for name, weight in layer.loss_weights.items()}

    @property
    def codebook(self) -> Tensor:
        """[Q, ...], the codebooks of the layers; without the first axis that of one layer shared by all.

        Raises ValueError where they have different shapes; then see `layers[i].codebook`.
        """
        return joined_codebook(self.layers)

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        set_joined_codebook(self.layers, codes)

    # Quantizing

    def quantize(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        freeze_codebook: bool = False,
        depth: int | None = None,
        beam_size: int | None = None,
        indices: Tensor | None = None,
        targets: Tensor | None = None,
        **options: Any,
    ) -> Quantized:
        """x [B, ..., D] or, with layout "first", [B, D, ...]; mask [P...] bool or lengths [B].

        Only the first `depth` layers take part, if given (the others are not run: no loss, no step), else all but those that quantize
        dropout cuts off. `beam_size` stands for that of the configuration. `indices` [P..., Q, ...] are taken instead of the nearest
        codes; for `targets` of that shape the cross-entropy is among the losses. Other options go to every layer, and all must know
        them: of `VectorQuantize`, `temperature` and `weights` [P...]. Where the layers draw, a beam search draws the codes that each of
        its paths may go on with. The losses of layer i are named "NAME/i".
        """
        rows = width_last(x, self.dim, self.layout)
        positions = rows.shape[:-1]
        counted = position_mask(positions, mask, lengths)
        paths = {name: path for name, path in (("indices", indices), ("targets", targets)) if path is not None}
        for name, path in paths.items():
            check_path(name, path, positions, self.code_shape, self.codebook_sizes)
        check_options((*paths, *options), self._options, type(self).__name__)
        if indices is not None and beam_size is not None:
            raise ValueError(f"beam_size = {beam_size}: must be None where indices are given, as nothing is searched")
        used = self._used_layers(depth)
        size = self._beam_size(beam_size)
        if not self.input_gradient:
            rows = rows.detach()
        vectors, finite = self._project_in(rows, counted)
        path, output = self._between(vectors, finite, counted, used, size, indices, targets, freeze_codebook, options)
        output = self._project_out(output, path.indices).to(x.dtype)
        if counted is not None and self.masked == "input":
            output = output.where(counted.unsqueeze(-1), rows)
        return Quantized(width_back(output, self.layout), path.indices, path.losses, path.statistics, path.outputs)

    def quantize_vectors(
        self, vectors: Tensor, finite: Tensor | None, *, freeze_codebook: bool = False, depth: int | None = None, **options: Any
    ) -> Quantized:
        """As `quantize`, between the projections: vectors [P..., d] -> the sum of the codes of that shape and dtype.

        finite [P...] bool says which vectors are finite; None: it is known that all are. `options` are those of every layer.
        """
        check_options(options, self._options, type(self).__name__)
        used, size = self._used_layers(depth), self._beam_size(None)
        wide = self._clamp(vectors if self.input_gradient else vectors.detach())
        wide = wide if finite is None else where_kept(finite, wide, torch.nan)
        path, output = self._between(wide, finite, None, used, size, None, None, freeze_codebook, options)
        return Quantized(as_dtype(output, vectors.dtype), path.indices, path.losses, path.statistics, path.outputs)

    def _between(
        self,
        vectors: Tensor,
        finite: Tensor | None,
        counted: Tensor | None,
        used: Tensor | int | None,
        beam_size: int,
        indices: Tensor | None,
        targets: Tensor | None,
        freeze_codebook: bool,
        options: dict[str, Any],
    ) -> tuple[_Path, Tensor]:
        """The path, and the sum of its codes with the gradient that they have."""
        if self._shared:
            self._start_shared(vectors, counted, options)
        if indices is None and beam_size > 1 and all(codebook.initialized for codebook in self.codebooks()):
            indices = self._search(vectors, _or_all(finite, vectors), used, beam_size, options)
            options = {name: value for name, value in options.items() if name != "temperature"}
        positions = vectors.shape[:-1]
        given, aims = _split(indices, positions), _split(targets, positions)
        path = self._walk(vectors, finite is None, counted, used, given, aims, freeze_codebook, options)
        return path, self._estimate(vectors, finite, path)

    def encode(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        depth: int | None = None,
        beam_size: int | None = None,
    ) -> Tensor:
        """x -> indices [P..., Q, ...] int64 of all layers, or of the first `depth` with -1 behind; never dropped at random."""
        rows = width_last(x, self.dim, self.layout)
        counted = position_mask(rows.shape[:-1], mask, lengths)
        used = self._used_layers(self.num_quantizers if depth is None else depth)
        size = self._beam_size(beam_size)
        vectors, finite = self._project_in(rows, counted)
        if size > 1:
            finite = _or_all(finite, vectors)
            kept = finite if counted is None else finite & counted
            return self._search(vectors, finite, used, size).where(kept.reshape(*kept.shape, *(1 for _ in self.code_shape)), -1)
        residual, partial = vectors, torch.zeros_like(vectors)
        found = []
        layers = self._each()
        for number, layer in enumerate(layers[:used] if isinstance(used, int) else layers):
            given = conditions(layer, partial)
            kept = _and(number < used, counted, rows.shape[:-1]) if isinstance(used, Tensor) else counted
            indices, codes = layer.encode_and_decode(residual, kept, **given)
            found.append(indices)
            codes = codes.to(residual.dtype)
            residual, partial = residual - codes, partial + codes
        return self._fill(stacked(found, rows.dim() - 1))

    def decode(self, indices: Tensor) -> Tensor:
        """indices [P..., L, ...] of the first L <= Q layers -> vectors of the layout and width of the input."""
        return width_back(self._project_out(self.decode_codes(indices), indices), self.layout)

    def decode_codes(self, indices: Tensor) -> Tensor:
        """indices [P..., L, ...] of the first L <= Q layers -> the sum of their codes [P..., d]."""
        return _add(self._decode_each(indices))

    def decode_layers(self, indices: Tensor) -> Tensor:
        """indices [P..., L, ...] of the first L <= Q layers -> the codes of each layer [L, P..., d], before the output projection."""
        return torch.stack(self._decode_each(indices))

    def _decode_each(self, indices: Tensor) -> list[Tensor]:
        axis = indices.dim() - len(self.code_shape)
        if not is_integer(indices):
            raise TypeError(f"indices is {indices.dtype}: must be an integer type")
        if axis < 0 or not 1 <= indices.shape[axis] <= self.num_quantizers or indices.shape[axis + 1 :] != self.code_shape[1:]:
            shape = ", ".join(map(str, ("positions", f"1 to {self.num_quantizers}", *self.code_shape[1:])))
            raise ValueError(f"indices has shape {tuple(indices.shape)}: must be [{shape}]")
        layers, chosen = self._each(), indices.movedim(axis, 0).contiguous().unbind()
        if not any(isinstance(layer, ImplicitVQ) for layer in layers):
            return [layer.decode(own) for layer, own in zip(layers, chosen, strict=False)]
        found: list[Tensor] = []
        partial = None
        for layer, own in zip(layers, chosen, strict=False):
            codes = layer.decode(own, **conditions(layer, partial))
            partial = codes if partial is None else partial + codes
            found.append(codes)
        return found

    # The start

    @torch.no_grad()
    def initialize_(
        self, x: Tensor, mask: Tensor | None = None, *, lengths: Tensor | None = None, seed: int = 0, reducer: Reducer | None = None
    ) -> None:
        """k-means of each layer on what the layers before it leave of x; a shared layer then once more, on what all its uses see.

        Arguments as for `quantize`; with several ranks `reducer` makes the result that of all their vectors. Raises ValueError when there
        is no vector to start from.
        """
        rows = width_last(x, self.dim, self.layout)
        counted = position_mask(rows.shape[:-1], mask, lengths)
        vectors, finite = self._project_in(rows, counted)
        finite = _or_all(finite, vectors)
        kept = (finite if counted is None else finite & counted).reshape(-1)
        residual = vectors.reshape(kept.numel(), self.inner_dim)
        partial = torch.zeros_like(residual)
        inputs: dict[tuple[int, ...], list[Tensor]] = {}
        for number, (layer, slots) in enumerate(zip(self._each(), map(tuple, self._slots), strict=True)):
            if slots not in inputs and has_start(layer):
                layer.initialize_(residual, kept, seed=seed + number, reducer=reducer)
            inputs.setdefault(slots, []).append(residual)
            given = conditions(layer, partial)
            codes = layer.decode(layer.encode(residual, **given), **given).to(residual.dtype)
            residual, partial = residual - codes, partial + codes
        for slots, seen in inputs.items():
            if len(seen) > 1 and has_start(self._owner(slots)):
                self._owner(slots).initialize_(torch.cat(seen), kept.repeat(len(seen)), seed=seed, reducer=reducer)

    def _owner(self, slots: tuple[int, ...]) -> Any:
        """The first layer that has these codebooks."""
        return next(layer for layer, own in zip(self._each(), self._slots, strict=True) if tuple(own) == slots)

    @torch.no_grad()
    def _start_shared(self, vectors: Tensor, counted: Tensor | None, options: dict[str, Any]) -> None:
        """Before a training forward: where shared codebooks wait for k-means, start all layers, and these at what all their uses see."""
        codebooks = self.codebooks()
        uses = [tuple(slots) for slots in self._slots]
        waiting = {own for own in self._shared if not all(codebooks[slot].initialized for slot in own)}
        if not waiting:
            return
        residual, partial = vectors, torch.zeros_like(vectors)
        inputs: dict[tuple[int, ...], list[Tensor]] = {own: [] for own in waiting}
        for layer, own in zip(self._each(), uses, strict=True):
            if own in waiting:
                inputs[own].append(residual)
            output = layer.quantize(residual, counted, **conditions(layer, partial), **options).quantized
            residual, partial = residual - output, partial + output
        for own, seen in inputs.items():
            if not all(codebooks[slot].initialized for slot in own):
                continue  # no rank has vectors yet
            for slot in own:
                codebooks[slot].initialized = False  # once more
            mask = None if counted is None else torch.cat([counted] * len(seen))
            self._owner(own).quantize(torch.cat(seen), mask)

    # Steps of `quantize`

    def _used_layers(self, depth: int | None) -> Tensor | int | None:
        """How many layers take part, as given or drawn, [] int64; None for all."""
        if depth is not None:
            if not 1 <= depth <= self.num_quantizers:
                raise ValueError(f"depth = {depth}: must be from 1 to {self.num_quantizers}, the number of layers")
            return None if depth == self.num_quantizers else depth
        if self.clock is None or self.quantize_dropout is None or not self.training:
            return None
        return dropout_depth(self.quantize_dropout, self.clock.commits, self.num_quantizers)

    def _beam_size(self, size: int | None) -> int:
        if size is None:
            return 1 if self.beam is None else self.beam.size_in(self.training)
        if size < 1:
            raise ValueError(f"beam_size = {size}: must be at least 1")
        if size > 1:
            _check_beam(list(self._each()))
        return size

    def _project_in(self, rows: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The vectors [P..., d] that the layers see, float32 or wider, and which of them are finite; all others are NaN.

        None: it is known that all are.
        """
        if counted is None and may_look(rows):
            vectors = _linear(self.project_in, rows)
            if known_finite(vectors):  # and so are the rows: what is not shows in its projection
                return self._clamp(vectors), None
        finite = finite_rows(rows)
        clean = finite if counted is None else finite & counted
        rows = where_kept(clean, rows)  # before the projection, whose weights shall see nothing else
        vectors = _linear(self.project_in, rows)
        if not is_nothing(self.project_in):
            finite = finite & finite_rows(vectors)
        return where_kept(finite, self._clamp(vectors), torch.nan), finite

    def _clamp(self, vectors: Tensor) -> Tensor:
        """Float32 or wider, and within the soft clamp."""
        vectors = as_dtype(vectors, widest(vectors))
        if self.soft_clamp is None:
            return vectors
        limit = self.soft_clamp if isinstance(self.soft_clamp, float) else per_scalar(tuple, self.soft_clamp, vectors)
        return torch.tanh(vectors / limit) * limit

    def _project_out(self, codes: Tensor, indices: Tensor) -> Tensor:
        if is_nothing(self.project_out):
            return codes  # zeros where there is no code
        output = _linear(self.project_out, codes)
        all_have_codes = are_chosen(indices.select(codes.dim() - 1, 0))  # of the first layer, as a rule
        return output if all_have_codes else where_kept(has_code(indices, codes.dim() - 1), output)

    def _fill(self, indices: Tensor) -> Tensor:
        """Those of the first layers [P..., L, ...], with -1 for all others [P..., Q, ...]."""
        axis = indices.dim() - len(self.code_shape)
        missing = self.num_quantizers - indices.shape[axis]
        if missing == 0:
            return indices
        return torch.cat([indices, indices.new_full((*indices.shape[:axis], missing, *self.code_shape[1:]), -1)], dim=axis)

    def _search(
        self, vectors: Tensor, finite: Tensor, used: Tensor | int | None, size: int, options: dict[str, Any] | None = None
    ) -> Tensor:
        """The indices of the best paths, [P..., Q, ...]; those of vectors that are not finite mean nothing.

        With `options`, those of a call, the codes that go on a path are drawn where the layers draw.
        """
        layers = list(self._each())

        def propose(layer: int, residual: Tensor, partial: Tensor, num: int) -> tuple[Tensor, Tensor]:
            part: Any = layers[layer]
            drawn = {} if options is None else _drawn_at(part, options.get("temperature"))
            return part.nearest(residual, num, **conditions(part, partial), **drawn)

        weights = None if self.beam is None else self.beam.weights
        flat = vectors.detach().where(finite.unsqueeze(-1), 0.0).reshape(finite.numel(), self.inner_dim)
        number, drawn = (used, None) if isinstance(used, int) else (self.num_quantizers, used)
        found = beam_search(flat, number, propose, size, weights=weights, depth=drawn)
        return self._fill(found.reshape(*finite.shape, number, *self.code_shape[1:]))

    def _walk(
        self,
        vectors: Tensor,
        known: bool,
        counted: Tensor | None,
        used: Tensor | int | None,
        indices: Sequence[Tensor] | None,
        targets: Sequence[Tensor] | None,
        freeze_codebook: bool,
        options: dict[str, Any],
    ) -> _Path:
        """Every layer in turn, on what is left by those before it. `known`: that all of it is finite, and counts."""
        layers = self._each()
        conditional = any(isinstance(layer, ImplicitVQ) for layer in layers)
        residual, partial = vectors, None
        outputs: list[Tensor] = []
        found: list[Quantized] = []
        walked = layers[:used] if isinstance(used, int) else layers
        for number, layer in enumerate(walked):
            own = conditions(layer, partial)
            if indices is not None:
                own["indices"] = indices[number]
            if targets is not None:
                own["targets"] = targets[number]
            mask = _and(number < used, counted, vectors.shape[:-1]) if isinstance(used, Tensor) else counted
            known = known and mask is None and not own and getattr(layer, "takes_vectors", False)
            if known:
                known = layer.gives_finite  # then so is what it leaves
                part = layer.quantize_vectors(residual, None, freeze_codebook=freeze_codebook, **options)
            else:
                part = layer.quantize(residual, mask, freeze_codebook=freeze_codebook, **own, **options)
            output = part.quantized
            if (masked := getattr(layer, "masked", None)) is None or (masked == "input" and mask is not None):
                output = where_kept(has_code(part.indices, vectors.dim() - 1), output)
            outputs.append(output)
            found.append(part)
            if len(found) == len(walked):
                break
            passed = scale_gradient(output, self.gradient_fraction)
            residual = residual - passed
            if conditional:
                told = passed if self.condition_fraction == self.gradient_fraction else scale_gradient(output, self.condition_fraction)
                partial = told if partial is None else partial + told
        return _Path(
            outputs,
            freeze_codebook or not conditional or self.condition_fraction == 1.0,
            self._fill(stacked([part.indices for part in found], vectors.dim() - 1)),
            {numbered(name, i): loss for i, part in enumerate(found) for name, loss in part.losses.items()},
            self.gather([*(part.statistics for part in found), *[None] * (self.num_quantizers - len(found))]),
        )

    def gather(self, found: Sequence[Statistics]) -> Statistics:
        """The statistics of the layers in order, one entry a codebook: that of a shared one is the sum over its uses."""
        return gather_statistics(self._slots, found)

    def _estimate(self, vectors: Tensor, finite: Tensor | None, path: _Path) -> Tensor:
        """The sum of the codes with the gradient that `estimator` says; vectors without a code are left to the projection behind."""
        if self.estimator == "layers":
            return _add(path.outputs)
        x = vectors if finite is None else where_kept(finite, vectors)
        own = isinstance(self.estimator, DiVeQ) or self.estimator == "none"  # then the codes have a gradient, whatever that of the layers
        if not own and self.sync_update == 0:
            codes = _add([output.detach() for output in path.outputs])
        elif path.told_all and all(_gives_codes(layer) for layer in self._each()):
            codes = _add(path.outputs)
        else:
            codes = self.decode_codes(path.indices).to(x.dtype)
        output = pass_gradient(self.estimator, x, codes, self.training)
        return output + self.sync_update * (codes - codes.detach()) if self.sync_update > 0 else output


class ResidualVQ(Residual):
    """`num_quantizers` layers of `VectorQuantize`, or one for each of the codebook sizes given.

    The layers work at width `codebook_dim`; the projections, where it is not `dim`, stand around the whole. With `shared_codebook` all
    layers have one. `estimate` says where `estimator` stands: over the "sum" of the codes, or in each of the "layers", whose gradients add
    up; None is "sum", but "layers" where `assignment` brings the gradient of a softmax. With `implicit` the layers behind
    the first have implicit neural codebooks (see `ImplicitVQ`) of such networks, and codebooks learn by gradient; heads, the cosine metric
    and other updates are then refused. All other options are those of `VectorQuantize` and `Residual`.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int | Sequence[int],
        num_quantizers: int | None = None,
        *,
        codebook_dim: int | None = None,
        shared_codebook: bool = False,
        estimator: Estimator = "rotation",
        estimate: Literal["sum", "layers"] | None = None,
        gradient_fraction: float = 0.0,
        condition_fraction: float | None = None,
        sync_update: float = 0.0,
        input_gradient: bool = True,
        quantize_dropout: QuantizeDropout | None = None,
        beam: BeamSearch | None = None,
        implicit: MLP | None = None,
        layout: Layout = "last",
        masked: Literal["zero", "input"] = "zero",
        commit: Commit = "auto",
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        sizes = _layer_sizes(codebook_size, num_quantizers)
        if shared_codebook and len(set(sizes)) > 1:
            raise ValueError(f"codebook_size = {sizes}: must be one size where shared_codebook = True")
        check_estimator(estimator)
        check_sync_update(sync_update)
        in_layers = _in_layers(estimate, options.get("assignment"))
        check_kind("shared_codebook", shared_codebook, bool)
        if implicit is not None:
            check_kind("implicit", implicit, MLP)
            options = _implicit_options(options)
        learns = isinstance(options.get("update"), Gradient) or options.get("transform") is not None
        if sync_update > 0 and not learns:
            raise ValueError(
                f"sync_update = {sync_update}: must be 0 unless the codes learn by gradient (update=Gradient() or a transform)"
            )
        options |= {"estimator": estimator, "sync_update": sync_update} if in_layers else {"estimator": "none"}
        width = dim if codebook_dim is None else codebook_dim
        super().__init__(
            _make_layers(width, sizes, shared_codebook, implicit, {**options, "device": device}),
            dim=dim,
            estimator="layers" if in_layers else estimator,
            gradient_fraction=gradient_fraction,
            condition_fraction=condition_fraction,
            sync_update=0.0 if in_layers else sync_update,
            input_gradient=input_gradient,
            quantize_dropout=quantize_dropout,
            beam=beam,
            layout=layout,
            masked=masked,
            commit=commit,
            device=device,
        )


def _in_layers(estimate: str | None, assignment: object) -> bool:
    """Whether the estimator stands in the layers."""
    soft = isinstance(assignment, Gumbel | Softmax) and assignment.estimator is not None
    if estimate is None:
        return soft
    check_choice("estimate", estimate, ("sum", "layers"))
    if soft and estimate == "sum":
        raise ValueError(f'estimate = "sum": must be "layers" with assignment = {assignment}, whose gradient is that of each layer')
    return estimate == "layers"


def _implicit_options(options: dict[str, Any]) -> dict[str, Any]:
    """Without those that have one value alone beside implicit codebooks; raises ValueError for others."""
    for name, only in {"metric": "euclidean", "heads": 1, "separate_heads": False}.items():
        if (value := options.get(name, only)) != only:
            raise ValueError(f"{name} = {value!r}: must be {only!r} with implicit codebooks")
    if not isinstance(update := options.get("update") or Gradient(), Gradient | Frozen):
        raise ValueError(
            f"update = {update}: must be Gradient() or Frozen() with implicit codebooks, which learn by gradient or not at all"
        )
    return {"update": Gradient()} | {name: value for name, value in options.items() if name not in ("metric", "heads", "separate_heads")}


_OF_CODEBOOK = ("update", "init", "dead_codes", "transform", "affine")
_OF_FIRST = ("on_nonfinite", "projection_norm", "code_weights")  # it sees what is not finite, and refuses the others


def _make_layers(
    width: int, sizes: tuple[int, ...], shared_codebook: bool, implicit: MLP | None, options: dict[str, Any]
) -> Sequence[Quantizer]:
    if implicit is None:
        if shared_codebook:
            return [VectorQuantize(width, sizes[0], **options)] * len(sizes)
        return [VectorQuantize(width, size, **options) for size in sizes]
    first = VectorQuantize(width, sizes[0], **options)
    own = {name: value for name, value in options.items() if name not in _OF_FIRST}
    if shared_codebook:
        own = {name: value for name, value in own.items() if name not in _OF_CODEBOOK} | {"table": first.table}
    return [first, *(ImplicitVQ(width, size, implicit, **own) for size in sizes[1:])]


def _layer_sizes(codebook_size: int | Sequence[int], num_quantizers: int | None) -> tuple[int, ...]:
    if isinstance(codebook_size, int):
        if num_quantizers is None or num_quantizers < 1:
            raise ValueError(f"num_quantizers = {num_quantizers}: must be at least 1 where codebook_size is one number")
        return (codebook_size,) * num_quantizers
    sizes = tuple(codebook_size)
    if not sizes:
        raise ValueError("codebook_size = (): must hold one size a layer")
    if num_quantizers not in (None, len(sizes)):
        raise ValueError(f"num_quantizers = {num_quantizers}: must be {len(sizes)} or left out, as codebook_size = {sizes} says")
    return sizes


# Depth


def dropout_depth(dropout: QuantizeDropout, commits: Tensor | int, num_quantizers: int) -> Any:
    """How many layers take part after `commits` commits, cutoff_index + 1 ... Q; the same on every rank, tensor or int as `commits`.

    Uniform over the numbers of layers above the cutoff, then rounded up to a multiple.
    """
    choices = num_quantizers - dropout.cutoff_index
    depth = dropout.cutoff_index + 1 + scramble(commits ^ scramble(dropout.seed)) % choices
    multiple = dropout.multiple_of
    depth = (depth + multiple - 1) // multiple * multiple
    return depth.clamp(max=num_quantizers) if isinstance(depth, Tensor) else min(depth, num_quantizers)


def scramble(value: Any) -> Any:
    """A hash of 32 bits to 32 bits, within what int64 holds."""
    value = value & 0xFFFFFFFF
    for multiplier in (0x7FEB352D, 0x45D9F3B, 0x2C1B3C6D):
        value = ((value ^ (value >> 16)) * multiplier) & 0xFFFFFFFF
    return value ^ (value >> 16)


# Paths


def _drawn_at(layer: Any, temperature: float | None) -> dict[str, float | None]:
    """What `nearest` of a layer that draws in training is told."""
    draws = layer.training and isinstance(getattr(layer, "assignment", None), Gumbel)
    return {"temperature": temperature} if draws else {}


def has_code(indices: Tensor, num_positions: int) -> Tensor:
    """Whether any index of a position is not -1: indices [P..., ...] with so many axes of positions -> [P...] bool."""
    known = indices >= 0
    return known.flatten(num_positions).any(-1) if known.dim() > num_positions else known


def _gives_codes(layer: Any) -> bool:
    """Whether the output of `layer` is known to be a code, with the gradient of the code, or 1 + sync_update of it, and no other."""
    if not isinstance(layer, VectorQuantize | ImplicitVQ):
        return False
    soft = not isinstance(layer.assignment, str) and layer.assignment.estimator is not None
    return layer.estimator == "none" and not soft


def _split(path: Tensor | None, positions: torch.Size) -> Sequence[Tensor] | None:
    return None if path is None else path.unbind(len(positions))


def _and(used: Tensor, counted: Tensor | None, positions: torch.Size) -> Tensor:
    return used.expand(positions) if counted is None else used & counted


def _add(parts: Sequence[Tensor]) -> Tensor:
    """Their sum in order, so that a prefix is a partial sum of the whole."""
    if len(parts) == 1:
        return parts[0]
    total = parts[0] + parts[1]
    for part in parts[2:]:
        total = total + part if part.requires_grad or total.requires_grad else total.add_(part)
    return total


def stacked(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """As torch has it; of one alone nothing is copied."""
    return parts[0].unsqueeze(dim) if len(parts) == 1 else torch.stack([*parts], dim=dim)


def _or_all(finite: Tensor | None, vectors: Tensor) -> Tensor:
    """Which of vectors [P..., d] are finite; None: all."""
    return vectors.new_ones(vectors.shape[:-1], dtype=torch.bool) if finite is None else finite


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x.to(next((parameter.dtype for parameter in layer.parameters()), x.dtype)))


# Combinators, also grouped ones


def numbered(name: str, number: int) -> str:
    """The name of a part's loss in the whole: "commitment" -> "commitment/2", "commitment/0" -> "commitment/2/0"."""
    first, *rest = name.split("/")
    return "/".join([first, str(number), *rest])


def unique_codebooks(parts: Iterable[Any]) -> list[Counting]:
    """Those of all parts, in order, each once."""
    return list(dict.fromkeys(codebook for part in parts for codebook in part.codebooks()))


def has_start(part: Any) -> bool:
    """Whether `part` has codes that k-means can set."""
    return any(isinstance(codebook, Codebook) for codebook in part.codebooks())


def codebook_slots(parts: Iterable[Any]) -> list[list[int]]:
    """For each part, where its codebooks stand in `unique_codebooks`."""
    parts = list(parts)
    slot = {codebook: number for number, codebook in enumerate(unique_codebooks(parts))}
    return [[slot[codebook] for codebook in part.codebooks()] for part in parts]


def gather_statistics(slots: Sequence[Sequence[int]], found: Sequence[Statistics]) -> Statistics:
    """One entry a codebook, that of a shared one the sum over its uses; None where nothing was counted."""
    if any(slots) and all(statistics is None for statistics in found):
        return None
    merged: dict[int, CodebookStatistics] = {}
    for own, statistics in zip(slots, found, strict=True):
        if statistics is None:
            continue
        for slot, entry in zip(own, flatten_statistics(statistics), strict=True):
            if entry is not None:
                merged[slot] = merge_statistics(merged[slot], entry) if slot in merged else entry
    number = len({slot for own in slots for slot in own})
    return tuple(merged.get(slot) for slot in range(number)) if merged or number == 0 else None


def joined_codebook(parts: Iterable[Any]) -> Tensor:
    """The codebooks of several parts, one behind the other; that of a single part, or one that all share, as it is."""
    codebooks = [part.codebook for part in _owners(parts)]
    if len(codebooks) == 1:
        return codebooks[0]
    shapes = {tuple(codebook.shape) for codebook in codebooks}
    if len(shapes) > 1:
        raise ValueError(f"the codebooks have different shapes, {sorted(shapes)}: read and set those of the parts")
    return torch.stack(codebooks)


def _owners(parts: Iterable[Any]) -> list[Any]:
    """Those whose codebooks no part before them has."""
    owners: dict[tuple[Any, ...], Any] = {}
    for part in parts:
        owners.setdefault(tuple(part.codebooks()) or (part,), part)
    return list(owners.values())


def set_joined_codebook(parts: Iterable[Any], codes: Tensor) -> None:
    """Set what `joined_codebook` reads."""
    parts = _owners(parts)
    shape = joined_codebook(parts).shape
    if codes.shape != shape:
        raise ValueError(f"codebook has shape {tuple(codes.shape)}: must be {tuple(shape)}")
    for part, own in zip(parts, [codes] if len(parts) == 1 else codes, strict=True):
        part.codebook = own


# Checks


def check_path(name: str, path: Tensor, positions: torch.Size, code_shape: tuple[int, ...], sizes: Sequence[int]) -> None:
    """Raise unless a path is integers [*positions, *code_shape] of -1 ... size - 1, before any layer has started."""
    if not is_integer(path):
        raise TypeError(f"{name} is {path.dtype}: must be an integer type")
    if path.shape != (*positions, *code_shape):
        raise ValueError(f"{name} has shape {tuple(path.shape)}: must be {(*positions, *code_shape)}")
    bounds = torch.tensor(sizes, device=path.device).reshape(code_shape)
    right = (path >= -1) & (path < bounds)
    what = "must lie in -1 ... codebook_size - 1 of its layer"
    require(right.all(), f"{name} holds a value out of range: {what}", lambda: f"{name} holds {path[~right][0].item()}: {what}")


def call_options(parts: Sequence[Any]) -> dict[str, str]:
    """What all parts' `quantize` take by name; of another one's option the part that lacks it: NAME -> "" or "parts[i], a KIND"."""
    each = [_own_options(part) for part in parts]
    found = {}
    for name in dict.fromkeys(name for own in each for name in own):
        lacking = next((i for i, own in enumerate(each) if name not in own), None)
        found[name] = "" if lacking is None else f"part {lacking}, a {type(parts[lacking]).__name__}"
    return found


def _own_options(part: Any) -> set[str]:
    parameters = inspect.signature(part.quantize).parameters.values()
    named = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    return named | {name for name, lacking in getattr(part, "_options", {}).items() if not lacking}


_SEVERAL = ("top_k",)
"""Options that change the shape of a part's output."""


def check_options(options: Iterable[str], known: dict[str, str], owner: str) -> None:
    """Raise TypeError unless every part takes the options of a call, before any of them has started."""
    for name in options:
        if name not in known:
            raise TypeError(f"{name}: is no option of {owner}.quantize, nor of its parts")
        if known[name]:
            raise TypeError(f"{name}: is no option of {known[name]}")
        if name in _SEVERAL:
            raise TypeError(f"{name}: is no option of {owner}.quantize, whose parts give one code each; see beam_size")


def check_parts(name: str, parts: Sequence[Any], alike: Sequence[str]) -> None:
    """Raise unless parts are quantizers with the width last that agree in the attributes named."""
    if not parts:
        raise ValueError(f"{name} is empty: must hold at least one quantizer")
    for number, part in enumerate(parts):
        if not isinstance(part, Quantizer):
            raise TypeError(f"{name}[{number}] is a {type(part).__name__}: must be a Quantizer")
        for attribute in alike:
            own, first = getattr(part, attribute), getattr(parts[0], attribute)
            if own != first:
                raise ValueError(f"{name}[{number}].{attribute} = {own}: must be {first}, as that of the first")
        if part.whole_items:
            raise ValueError(f"{name}[{number}] is a {type(part).__name__}: must give indices of vectors, not of whole items")
        if part.out_dim != part.dim:
            raise ValueError(f"{name}[{number}] gives vectors of width {part.out_dim}: must be {part.dim}, the width that it takes")
        if getattr(part, "layout", "last") != "last":
            raise ValueError(f'{name}[{number}].layout = {part.layout!r}: must be "last"; the layout is that of the whole')


def _check_choices(
    num_quantizers: int,
    estimator: object,
    gradient_fraction: float,
    sync_update: float,
    dropout: QuantizeDropout | None,
    beam: BeamSearch | None,
    masked: str,
) -> None:
    check_estimator(estimator, "layers")
    check_sync_update(sync_update)
    if sync_update > 0 and estimator == "layers":
        raise ValueError(f'sync_update = {sync_update}: must be 0 with estimator = "layers", which have their own')
    check_choice("masked", masked, ("zero", "input"))
    _check_fraction("gradient_fraction", gradient_fraction)
    for name, value, kind in (("quantize_dropout", dropout, QuantizeDropout), ("beam", beam, BeamSearch)):
        if value is not None:
            check_kind(name, value, kind)
    if dropout is not None and dropout.multiple_of > num_quantizers:
        raise ValueError(f"QuantizeDropout.multiple_of = {dropout.multiple_of}: must be at most {num_quantizers}, the number of layers")
    if dropout is not None and dropout.cutoff_index >= num_quantizers:
        raise ValueError(f"QuantizeDropout.cutoff_index = {dropout.cutoff_index}: must be below {num_quantizers}, the number of layers")
    if beam is not None and beam.weights is not None and len(beam.weights) != num_quantizers:
        raise ValueError(f"BeamSearch.weights has {len(beam.weights)} entries: must be {num_quantizers}, one a layer")


def _check_fraction(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} = {value}: must be from 0 to 1")


def _check_beam(layers: Iterable[Any]) -> None:
    for number, layer in enumerate(layers):
        if not hasattr(layer, "nearest") or layer.code_shape:
            what = f"{type(layer).__name__} of code_shape {layer.code_shape}"
            raise ValueError(f"layers[{number}] is a {what}: must be able to name the nearest few codes of a vector for a beam search")
