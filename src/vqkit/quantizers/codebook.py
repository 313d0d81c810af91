"""The table of codes: its state, and the value that a commit of what is pending for it would give.

Shapes: H heads with a codebook each, N vectors, C codes, K width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn

from vqkit.dist import LocalReducer, Reducer, default_reducer, has_default_group, is_managed, is_sharded
from vqkit.ops.codebook import (
    COUNT_FLOOR,
    CodebookStatistics,
    assignment_stats,
    directions,
    gather_codes,
    largest_keys,
    zero_statistics,
)
from vqkit.ops.kmeans import kmeans
from vqkit.ops.precision import may_look, without_autocast
from vqkit.ops.usage import dead_fraction
from vqkit.quantizers.bridge import Bridge
from vqkit.quantizers.commit import sum_in_forward
from vqkit.quantizers.committed import WIDE, Counting, in_backward, rare_fraction
from vqkit.quantizers.config import (
    EMA,
    MLP,
    Affine,
    ClipEMA,
    DeadCodes,
    Frozen,
    Gradient,
    Init,
    KMeans,
    Metric,
    StoredEMA,
    Update,
    VQBridge,
    check_choice,
)
from vqkit.quantizers.layout import check_range, is_all
from vqkit.quantizers.update import State, advance, expire, next_count, start_state, stored_codes

_MAX_CANDIDATES = 64
_VARIANCE_FLOOR = 1e-12
_AFFINE_NAMES = ("batch_mean", "batch_variance", "code_mean", "code_variance")

CodeWeights = Tensor | Callable[[Tensor, Tensor], Tensor]
"""What 1 - decay of each code is multiplied by at a commit: [C] or [H, C] floating point, or a function that returns it of the sum
[H, C, K] and the number [H, C] of the vectors that chose each code. It is called whenever the codes are read: it must be pure."""


class _Perceptron(nn.Sequential):
    """`depth` hidden layers of width `hidden`."""

    def __init__(self, dim: int, hidden: int, depth: int, dtype: torch.dtype, device: torch.device | str | None) -> None:
        widths = [dim, *[hidden] * depth]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after, dtype=dtype, device=device), nn.SiLU()]
        super().__init__(*layers, nn.Linear(widths[-1], dim, dtype=dtype, device=device))


class Codebook(Counting):
    """`heads` codebooks of `size` codes of width `dim`.

    The state is float32 or float64 and is never made narrower by `.to()`, `.half()` and the like: moving averages `sum` [H, C, K] and
    `count` [H, C] for `EMA` and `ClipEMA`; `weight` [H, C, K], a parameter for `Gradient`, and `count` for the others, with what an
    `OwnOptimizer` remembers; all three for `StoredEMA`; `weight` alone for `Frozen`. `pending` is no buffer, so that nothing broadcasts
    over it, but moves with the module and stands in the state dict. metric="cosine" keeps codes of length 1. `transform` maps the stored
    vectors [H, C, K] to the codes: "linear", `MLP(...)`, `VQBridge(...)` or a module; it learns by the optimizer of the model. With
    `frozen` no commit changes anything. `code_weights` let moving averages follow some codes faster than others: factors of 1 - decay,
    not negative and at most 1 / (1 - decay); of a head that saw no vector they are not asked for. A tensor moves with the module and is
    not in the state dict.

    Raises ValueError for sizes below 1, for choices that contradict each other, and for code weights of another shape or range.
    """

    count: Tensor
    sum: Tensor
    code_weights: Any
    sets_what_is_stored = False
    """Whether a k-means start and dead codes may set what a transform makes the codes of."""

    def __init__(
        self,
        heads: int,
        size: int,
        dim: int,
        *,
        metric: Metric = "euclidean",
        update: Update | None = None,
        init: Init = "uniform",
        dead_codes: DeadCodes | None = None,
        transform: str | MLP | VQBridge | nn.Module | None = None,
        affine: Affine | None = None,
        code_weights: CodeWeights | None = None,
        moments: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        update = EMA() if update is None else update
        for name, value in (("heads", heads), ("codebook_size", size), ("dim", dim)):
            if value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        if dtype not in WIDE:
            raise ValueError(f"dtype = {dtype}: must be torch.float32 or torch.float64")
        check_choice("metric", metric, ("euclidean", "cosine"))
        check_choice("init", init, ("uniform", "normal", "unit"), (KMeans,))
        _check_together(update, init, dead_codes, transform, affine, metric, code_weights, self.sets_what_is_stored)
        num_candidates = most_candidates(size, dead_codes)
        pending = zero_statistics(heads, size, dim, num_candidates=num_candidates, moments=moments, dtype=dtype, device=device)
        super().__init__(size, pending, device=device)
        self.heads, self.dim, self.metric = heads, dim, metric
        self.update, self.init, self.dead_codes, self.affine = update, init, dead_codes, affine
        self.num_candidates = num_candidates
        self._frozen = isinstance(update, Frozen)
        self._code_moments: tuple[Tensor, Tensor] | None = None
        self._followed: tuple[State, Tensor | None] | None = None
        self.initialized = not isinstance(init, KMeans)
        empty = torch.empty(heads, size, dim, dtype=dtype, device=device)
        start = start_state(update, empty, empty.new_empty(heads, size))
        self._rule_names = tuple(start)
        for name, value in start.items():
            if name == "weight" and (isinstance(update, Gradient) or (isinstance(update, StoredEMA) and update.learn)):
                self.weight = nn.Parameter(value)
            else:
                self.register_buffer(name, value)
        for name in _AFFINE_NAMES if affine else ():
            self.register_buffer(name, empty.new_empty(heads, dim))
        if affine:
            self.register_buffer("batch_seen", empty.new_empty(heads))  # 1 where vectors have set the batch mean and variance
        self._names = ("updates", *self._rule_names, *((*_AFFINE_NAMES, "batch_seen") if affine else ()))
        if code_weights is not None and not isinstance(code_weights, Tensor) and not callable(code_weights):
            raise TypeError(f"code_weights = {code_weights!r}: must be a tensor, one a code, or a function of (sum, count) that gives one")
        if isinstance(code_weights, Tensor):
            weights = self._check_code_weights(code_weights).detach().to(dtype=dtype, copy=True)
            self.register_buffer("code_weights", weights if empty.is_meta else weights.to(empty.device), persistent=False)
        else:
            self.code_weights = code_weights
        self.transform = _make_transform(transform, size, dim, dtype, device)
        self.found_dead = torch.zeros_like(self.pending.vectors)
        self._moments = moments
        self.reset_parameters()

    def extra_repr(self) -> str:
        return f"heads={self.heads}, size={self.size}, dim={self.dim}, metric={self.metric!r}, {self.update}" + "".join(
            f", {name}={value}" for name in ("init", "dead_codes", "affine") if (value := getattr(self, name)) not in (None, "uniform")
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A random start, drawn by the global random generator; a k-means start waits for vectors again.

        "uniform": within sqrt(6 / (codes * width)); "normal": standard deviation 1 / sqrt(heads * codes); "unit": 1 / sqrt(width), so
        that codes have about length 1.
        """
        codes = self._draw()
        self.updates.zero_()
        self._set_(codes, codes.new_full((self.heads, self.size), self._start_count), started=False)
        self.forget_pending_()
        self.initialized = not isinstance(self.init, KMeans)

    def _draw(self) -> Tensor:
        """[H, C, K], where codes start."""
        codes = self.pending.sum.new_empty(self.heads, self.size, self.dim)
        if self.init == "normal":
            return codes.normal_(std=(self.heads * self.size) ** -0.5)
        if self.init == "unit":
            return codes.normal_(std=self.dim**-0.5)
        bound = math.sqrt(6 / (self.size * self.dim))
        return codes.uniform_(-bound, bound)

    @property
    def _start_count(self) -> float:
        return max(1.0, self.dead_codes.start_count) if self.dead_codes else 1.0

    @property
    def learns_by_gradient(self) -> bool:
        """Whether the optimizer of the model moves the codes: they are a parameter, or a transform of what is stored."""
        return self.transform is not None or any(True for _ in self.parameters(recurse=False))

    @property
    def counts(self) -> bool:
        """Whether a commit has any use for statistics."""
        return self.dead_codes is not None or self.affine is not None or not isinstance(self.update, StoredEMA) or self.update.count

    @property
    def far_from_vectors(self) -> bool:
        """Whether a forward may read codes far from vectors whose moments the codes are to follow."""
        return self.affine is not None and not self.affine.current

    @property
    def dtype(self) -> torch.dtype:
        """float32 or float64."""
        return self.pending.sum.dtype

    # Reading

    def codes(self) -> Tensor:
        """[H, C, K] float32 or float64: what a forward reads. Differentiable where the codes or a transform of them learn by gradient.

        Raises ValueError before a k-means start.
        """
        if not self._learning and not self.initialized:
            self._raise_not_initialized()
        codes = self._codes(self._settled())
        return codes.detach() if self._entered and self._entered.frozen else codes

    def rows(self, number: int) -> tuple[Tensor, bool]:
        """What to look up so many codes of each head in, [H, C, K], and whether it is `codes()`: of few only these get length 1."""
        few = self.metric == "euclidean" or number <= self.size
        if not few or self.affine or self.transform is not None or not self.initialized:
            return self.codes(), True
        codes = stored_codes(self.update, self._settled())
        detached = self._frozen or (self._entered is not None and self._entered.frozen)
        return codes.detach() if detached else codes, self.metric != "cosine"

    def codes_for(self, x: Tensor, kept: Tensor | None) -> Tensor:
        """`codes()` as a training forward reads them for x [H, N, K], kept [H, N] bool or None: where affine, by the moments of x, too."""
        if not self.affine or not self.affine.current:
            return self.codes()
        state = self._settled()
        followed = self._follow(self.affine, state, state, *self._moments_of(x, kept))
        if not torch.compiler.is_compiling():
            object.__setattr__(self, "_followed", (followed, None))
        return self._codes({**state, **followed})

    def recognize_(self, statistics: CodebookStatistics) -> None:
        """These are of the vectors for which `codes_for` has just been asked, so that a step from them alone follows no others."""
        if self._followed is not None:
            object.__setattr__(self, "_followed", (self._followed[0], statistics.moments))

    @torch.no_grad()
    def _moments_of(self, x: Tensor, kept: Tensor | None) -> tuple[Tensor | None, Tensor, Tensor]:
        """The number [H] of the vectors of all ranks (None: there are some), their mean and variance [H, K]."""
        x, reducer = x.to(self.dtype), self._entered.reducer if self._entered else None
        alone = reducer.world_size == 1 if reducer else not torch.compiler.is_compiling() and not has_default_group()
        if alone and x.shape[1] > 0 and (kept is None or is_all(kept)):
            variance, mean = torch.var_mean(x, 1, correction=0)
            return None, mean, variance
        kept = x.new_ones(x.shape[:2], dtype=torch.bool) if kept is None else kept
        x = x.where(kept.unsqueeze(-1), 0.0)
        counted = torch.cat([kept.sum(-1, keepdim=True).to(x.dtype), x.sum(1)], dim=-1)
        vectors, total = sum_in_forward(counted, reducer).tensor_split([1], dim=-1)
        number = vectors.clamp(min=1)
        mean = total / number
        squares = sum_in_forward((x - _row(mean)).where(kept.unsqueeze(-1), 0.0).square().sum(1), reducer)
        return vectors.squeeze(-1), mean, squares / number

    def _codes(self, state: State) -> Tensor:
        codes = self._to_read(state)
        if self._frozen:
            codes = codes.detach()  # a transform of them may still learn
        if self.affine:
            codes = torch.addcmul(_row(state["batch_mean"]), codes - _row(state["code_mean"]), self._scale(state))
        if self.transform is not None:
            with without_autocast(codes.device.type):
                codes = self.transform(codes)
        return directions(codes) if self.metric == "cosine" else codes

    def _to_read(self, state: State) -> Tensor:
        """What is stored, where no commit writes into it meanwhile: a backward reads what the forward read."""
        codes = stored_codes(self.update, state)
        if codes is not state.get("weight") or isinstance(self.update, Frozen):
            return codes
        made_anew = self._entered is None and (self.affine or self.metric == "cosine")  # of it, at once
        return codes if made_anew and not (codes.requires_grad and torch.is_grad_enabled()) else codes.clone()

    @property
    def codebook(self) -> Tensor:
        """[H, C, K], as `codes()`. Setting it forgets how often each code was used, and what is pending."""
        return self.codes()

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        self.set_codes_(codes)

    @torch.no_grad()
    def set_codes_(self, codes: Tensor) -> None:
        """What setting `codebook` does. Raises ValueError for another shape than [H, C, K] and where a transform makes the codes."""
        shape = (self.heads, self.size, self.dim)
        if codes.shape != shape:
            raise ValueError(f"codebook has shape {tuple(codes.shape)}: must be {shape}")
        if self.transform is not None:
            raise ValueError("codebook is the transform of the stored vectors: set the attribute `weight`, which the transform reads")
        codes = codes.detach().to(self.pending.sum)
        self._set_(codes, codes.new_full(shape[:2], self._start_count), started=True)

    @property
    def frozen(self) -> bool:
        """Whether commits change nothing. Setting it commits what is pending (commit="auto") or drops it."""
        return self._frozen

    @frozen.setter
    def frozen(self, frozen: bool) -> None:
        if isinstance(self.update, Frozen) and not frozen:
            raise ValueError("frozen = False: a codebook with update=Frozen() has no rule to learn by")
        self.settle_()
        self.discard_pending_()
        self._frozen = frozen

    # Counting

    @torch.no_grad()
    def statistics(
        self,
        x: Tensor,
        indices: Tensor,
        weights: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        quantized: Tensor | None = None,
    ) -> CodebookStatistics:
        """What a commit needs of x [..., H, N, K], assigned to indices [..., H, N]; see `assignment_stats`. Changes nothing.

        weights [..., N] or [..., H, N]; mask [..., N] bool. `quantized` are the codes of x, if they are at hand; else they are looked up.
        """
        x = x.detach().to(torch.promote_types(x.dtype, self.dtype))
        if self.metric == "cosine":
            x = directions(x)
        if quantized is None and self._moments:
            quantized = gather_codes(self.codes().detach(), indices)
        return assignment_stats(
            x,
            indices,
            self.size,
            mask,
            weights=weights,
            quantized=quantized,
            num_candidates=self.num_candidates,
            moments=self._moments,
        )

    def replace_statistics_(self, statistics: CodebookStatistics, outside: Tensor | bool | None = None) -> None:
        super().replace_statistics_(statistics, outside)
        if self.affine and self.affine.current and outside is not False:  # an optimizer may move the codes before the commit
            self._code_moments = _mean_and_variance(stored_codes(self.update, self.committed_state()))

    # Committing

    def committed_state(self) -> State:
        return {name: getattr(self, name) for name in self._names}

    @torch.no_grad()
    def _after_commit(self) -> State:
        state = self.committed_state()
        if self._frozen:
            return state
        after = self._learn(state, self.pending, self.update, self.dead_codes, self._code_moments)
        return {**after, "updates": state["updates"] + 1}

    def _learn(
        self,
        state: State,
        statistics: CodebookStatistics,
        rule: Update,
        dead_codes: DeadCodes | None,
        code_moments: tuple[Tensor, Tensor] | None = None,
    ) -> State:
        """The state after a step by `rule`; with affine.current, `code_moments` are those of the codes (None: of `state`)."""
        learned = statistics
        if self.affine and self.affine.current:
            state = {**state, **self._follow_current(self.affine, state, statistics, code_moments)}
        stands = isinstance(rule, StoredEMA) and not rule.count
        if self.affine and not stands:
            statistics = self._without_affine(statistics, state)
        rows = {name: state[name] for name in self._rule_names}
        after = advance(rule, dead_codes, rows, statistics, self._weigh_codes(statistics), unit=self.metric == "cosine")
        if self.metric == "cosine" and isinstance(rule, StoredEMA):
            after = {**after, "weight": directions(after["weight"])}
        if self.affine and not self.affine.current:
            after = after | self._follow(self.affine, state, after, *_mean_of_moments(learned))
        return {**state, **after}

    def _write_(self, applied: Tensor | None) -> None:
        if self.dead_codes and not self._frozen:
            found = self._find_dead(self.dead_codes)
            self.found_dead.copy_(found if applied is None else torch.where(applied, found, self.found_dead))
        super()._write_(applied)

    def check_commit(self) -> None:
        """Raise ValueError where a commit is impossible: expiry writes codes, which a part of a parameter does not hold.

        An automatic commit runs in a forward, for which FSDP2 has gathered the parameter: there any that it manages is refused.
        """
        if self.dead_codes is None:
            return
        codes = self.weight if "weight" in self._names else self.sum
        if is_sharded(codes) or (self.auto and isinstance(codes, nn.Parameter) and is_managed(self)):
            raise ValueError(
                "dead_codes: the codes are a sharded parameter and cannot be replaced; "
                'leave them whole (ignored_params of fully_shard) and take commit = "manual"'
            )

    def _weigh_codes(self, statistics: CodebookStatistics) -> Tensor | None:
        """[H, C] what 1 - decay of each code is multiplied by."""
        if self.code_weights is None:
            return None
        if isinstance(self.code_weights, Tensor):
            return self.code_weights.to(statistics.count)
        seen = statistics.vectors.unsqueeze(-1) > 0
        weights = self.code_weights(statistics.sum, statistics.count)
        return self._check_code_weights(weights, seen).to(statistics.count)

    def _check_code_weights(self, weights: Any, seen: Tensor | None = None) -> Tensor:
        """[H, C], 1 where not `seen`."""
        if not isinstance(weights, Tensor) or not weights.is_floating_point():
            kind = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
            raise TypeError(f"code_weights is {kind}: must be a floating point tensor")
        shapes = ((self.size,), (self.heads, self.size))
        if weights.shape not in shapes:
            raise ValueError(f"code_weights has shape {tuple(weights.shape)}: must be {shapes[0]} or {shapes[1]}, one a code")
        weights = weights if weights.shape == shapes[1] else weights.expand(shapes[1])
        weights = weights if seen is None else weights.where(seen, 1.0)
        decay = self.update.decay if isinstance(self.update, EMA | ClipEMA | StoredEMA) else 0.0
        check_range("code_weights", weights, 0.0, 1 / (1 - decay) if decay < 1 else math.inf)
        return weights

    def codes_to_pull(self, x: Tensor, kept: Tensor | None) -> Tensor:
        """`codes_for(x, kept)` for `add_gradient_`, whatever the mode."""
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)  # hides those of a checkpoint
        with torch.enable_grad(), hooks:
            return self.codes_for(x, kept)

    def add_gradient_(self, codes: Tensor, gradient: Tensor) -> None:
        """Add to the gradients of the parameters what `gradient` [H, C, K] of `codes_to_pull` gives, without any hook of theirs."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        found = torch.autograd.grad(codes, parameters, gradient, allow_unused=True)
        for parameter, part in zip(parameters, found, strict=True):
            if part is not None:
                parameter.grad = part if parameter.grad is None else parameter.grad.add_(part)

    # Affine re-parametrisation

    def _scale(self, state: State) -> Tensor:
        return _row((state["batch_variance"].clamp(min=_VARIANCE_FLOOR) / state["code_variance"].clamp(min=_VARIANCE_FLOOR)).sqrt())

    def _without_affine(self, statistics: CodebookStatistics, state: State) -> CodebookStatistics:
        """Statistics of the vectors mapped to where the stored codes are."""
        scale, batch_mean, code_mean = self._scale(state), _row(state["batch_mean"]), _row(state["code_mean"])
        count = statistics.count.unsqueeze(-1)
        return statistics._replace(
            sum=(statistics.sum - count * batch_mean) / scale + count * code_mean,
            candidates=(statistics.candidates - batch_mean) / scale + code_mean,
        )

    def _follow_current(
        self, affine: Affine, state: State, statistics: CodebookStatistics, code_moments: tuple[Tensor, Tensor] | None
    ) -> State:
        """What `codes_for` has followed, if these are the statistics of its vectors."""
        if self._followed is not None and self._followed[1] is statistics.moments:
            return self._followed[0]
        return self._follow(affine, state, state, *_mean_of_moments(statistics), code_moments)

    @torch.no_grad()
    def _follow(
        self,
        affine: Affine,
        state: State,
        after: State,
        vectors: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        of_codes: tuple[Tensor, Tensor] | None = None,
    ) -> State:
        """Mean and variance of vectors that are new, so many [H] (None: some), and of codes: `of_codes`, or those of `after`.

        The first vectors set those of the vectors at once.
        """
        code_mean, code_variance = _mean_and_variance(stored_codes(self.update, after)) if of_codes is None else of_codes
        seen = now = state["batch_seen"]
        decays: tuple[float | Tensor, float | Tensor] = affine.batch_decay, affine.codebook_decay
        if not (may_look(seen) and seen.min().item() > 0 and (vectors is None or vectors.min().item() > 0)):
            some = torch.ones_like(seen, dtype=torch.bool) if vectors is None else vectors > 0
            decays = torch.where(some, decays[0] * seen, 1.0).unsqueeze(-1), (decays[1] * seen).unsqueeze(-1)
            now = torch.where(some, 1.0, seen)
        return {
            "batch_mean": torch.lerp(mean, state["batch_mean"], decays[0]),
            "batch_variance": torch.lerp(variance, state["batch_variance"], decays[0]),
            "code_mean": torch.lerp(code_mean.to(seen.device), state["code_mean"], decays[1]),
            "code_variance": torch.lerp(code_variance.to(seen.device), state["code_variance"], decays[1]),
            "batch_seen": now,
        }

    # The forward of the outermost quantizer

    @property
    def _learning(self) -> bool:
        return self._entered is not None and self._entered.learning and not self._frozen

    def start_(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Before the codes are read for x [H, N, K] (mask [N] or [H, N] bool): a k-means start, where the codebook still waits for one.

        It happens in an eager training forward, over all ranks, and waits on while these have no vector; anywhere else this raises
        ValueError.
        """
        if self.initialized:
            return
        if not self._learning or torch.compiler.is_compiling():
            self._raise_not_initialized()
        if in_backward():
            return
        reducer = (self._entered.reducer if self._entered else None) or default_reducer()
        valid = x.detach().isfinite().all(-1)
        if self.metric == "cosine":
            valid = valid & x.detach().any(-1)
        present = (valid if mask is None else valid & mask).any(-1).all().to(self.dtype).reshape(1)
        reducer.all_reduce_(present)
        if present.item() > 0:
            self.initialize_(x, mask, reducer=reducer)

    def _raise_not_initialized(self) -> None:
        raise ValueError(
            "the codebook waits for its k-means start (init = KMeans): run a training forward first, without compile and with the "
            "codebook not frozen, or call initialize_(x) of a native quantizer"
        )

    # Setting

    @torch.no_grad()
    def initialize_(self, x: Tensor, mask: Tensor | None = None, *, seed: int = 0, reducer: Reducer | None = None) -> None:
        """Set the codes to the k-means of x [H, N, K] and count to what each code has of them; discards what is pending.

        mask [N] or [H, N] bool. Vectors that are masked or not finite take no part. With several ranks `reducer` makes the result that
        of all their vectors. Raises ValueError when a head has no vector, or when a transform stands between the codes and what is stored.
        """
        if self.transform is not None and not self.sets_what_is_stored:
            raise ValueError("initialize_: the codes are a transform of what is stored, which k-means cannot set")
        if x.dim() != 3 or x.shape[0] != self.heads or x.shape[2] != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}: must be [{self.heads}, vectors, {self.dim}]")
        settings = self.init if isinstance(self.init, KMeans) else KMeans()
        found = kmeans(
            x.detach().to(self.dtype),
            self.size,
            mask=None if mask is None else mask.expand(x.shape[:2]),
            iterations=settings.iterations,
            metric=self.metric,
            start=settings.start,
            generator=torch.Generator(x.device).manual_seed(seed),
            reducer=reducer,
        )
        least = self._start_count if self.dead_codes else COUNT_FLOOR
        self._set_(found.codes, found.count.clamp(min=least), started=True)

    @torch.no_grad()
    def expire_(
        self, x: Tensor, mask: Tensor | None = None, *, threshold: float | None = None, seed: int = 0, reducer: Reducer | None = None
    ) -> None:
        """Replace dead codes by hand: those of a count below `threshold` (None: that of `dead_codes`) by random vectors of x [H, N, K].

        mask [N] or [H, N] bool. Up to as many codes a head as there are vectors; with `reducer`, of all ranks. Discards nothing.
        """
        if "count" not in self._names or (self.transform is not None and not self.sets_what_is_stored):
            raise ValueError("expire_: needs a codebook that counts its codes, and no transform")
        if threshold is None and self.dead_codes is None:
            raise ValueError("threshold = None: must be a count, as the codebook has no dead_codes")
        if threshold is None:
            threshold = self.dead_codes.threshold if self.dead_codes else 0.0
        self.check_commit()
        self.settle_()
        reducer = reducer or LocalReducer()
        x = x.detach().to(self.dtype)
        valid = x.isfinite().all(-1) if mask is None else x.isfinite().all(-1) & mask
        generator = torch.Generator(x.device).manual_seed(seed)
        draws = 1.0 - torch.rand(valid.shape, dtype=x.dtype, device=x.device, generator=generator)
        rows, keys = largest_keys(x.where(valid.unsqueeze(-1), 0.0), draws.where(valid, 0.0), self.size)
        slots = x.new_zeros(reducer.world_size, *keys.shape, self.dim + 1)
        slots[reducer.rank] = torch.cat([rows, keys.unsqueeze(-1)], dim=-1)
        reducer.all_reduce_(slots)
        gathered = slots.movedim(0, 1).flatten(1, 2)
        rows, keys = largest_keys(gathered[..., :-1], gathered[..., -1], self.size)
        if self.metric == "cosine":
            rows = directions(rows)
        state = self.committed_state()
        if self.affine:
            rows = (rows - _row(state["batch_mean"])) / self._scale(state) + _row(state["code_mean"])
        reset = max(threshold, self.dead_codes.start_count) if self.dead_codes else 2 * threshold
        for name, new in expire(self.update, {name: state[name] for name in self._rule_names}, rows, keys, threshold, reset).items():
            state[name].copy_(new)

    def _set_(self, codes: Tensor, count: Tensor, *, started: bool) -> None:
        """Make `codes` [H, C, K] the stored codes, chosen `count` [H, C] times, and forget what was learned about the old ones."""
        state = self.committed_state()
        if is_sharded(state.get("weight", codes)):
            raise ValueError("the codes are a sharded parameter: set them before the model is sharded")
        if self.metric == "cosine":
            codes = directions(codes)
        new = start_state(self.update, codes, count)
        if self.affine:
            mean, variance = codes.mean(1), codes.var(1, correction=0)
            seen = torch.full_like(state["batch_seen"], float(started and not self.affine.current))
            new |= {"batch_mean": mean, "batch_variance": variance, "code_mean": mean, "code_variance": variance, "batch_seen": seen}
        for name, value in new.items():
            state[name].copy_(value)
        self.initialized = self.initialized or started
        self.discard_pending_()

    # Health

    def _dead_fraction(self, chosen: Tensor) -> Tensor:
        """[H], of the codes; `chosen` [H, C] as often in the last commit."""
        if self.dead_codes:
            return self._find_dead(self.dead_codes) if self.auto and bool(self.follows == self.updates) else self.found_dead
        count = self._settled().get("count", chosen)
        return rare_fraction(count)

    def _find_dead(self, dead_codes: DeadCodes) -> Tensor:
        """[H]: the share of the codes that a commit of what is pending finds dead, before it replaces any."""
        count = next_count(self.update, self.count, self.pending.count, self._weigh_codes(self.pending))
        return dead_fraction(count, dead_codes.threshold)

    # Moving and storing

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        weights, meta = self.code_weights, self.updates.is_meta
        super()._apply(fn, recurse)
        if isinstance(weights, Tensor) and (meta or self.updates.is_meta):  # no state dict brings them back
            self.code_weights = weights if self.updates.is_meta else weights.to(self.updates.device)
        return self

    def _pending_tensors(self) -> dict[str, Tensor]:
        return {**super()._pending_tensors(), "found_dead": self.found_dead}

    def _replace_pending(self, tensors: dict[str, Tensor]) -> None:
        super()._replace_pending(tensors)
        self.found_dead = tensors["found_dead"]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}initialized"] = torch.tensor(self.initialized, device="cpu")

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        errors = len(error_msgs)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if any("format version" in message for message in error_msgs[errors:]):
            return
        self.initialized = bool(state_dict.get(f"{prefix}initialized", True))
        unexpected_keys[:] = [key for key in unexpected_keys if key != f"{prefix}initialized"]


def most_candidates(size: int, dead_codes: DeadCodes | None) -> int:
    """How many vectors a step keeps that dead ones of `size` codes may start anew at."""
    return min(size, _MAX_CANDIDATES) if dead_codes else 0


def _row(values: Tensor) -> Tensor:
    """[H, K] -> [H, 1, K]."""
    return values.unsqueeze(1)


def _mean_and_variance(codes: Tensor) -> tuple[Tensor, Tensor]:
    """[H, C, K] -> [H, K] each."""
    variance, mean = torch.var_mean(codes.detach(), 1, correction=0)
    return mean, variance


def _mean_of_moments(statistics: CodebookStatistics) -> tuple[Tensor, Tensor, Tensor]:
    """The number [H] of vectors, their mean and variance [H, K]."""
    mean, variance = (statistics.moments / statistics.vectors.clamp(min=1)[:, None, None]).unbind(1)
    return statistics.vectors, mean, variance


def _make_transform(
    transform: str | MLP | VQBridge | nn.Module | None, size: int, dim: int, dtype: torch.dtype, device: torch.device | str | None
) -> nn.Module | None:
    if transform is None or isinstance(transform, nn.Module):
        return transform
    if isinstance(transform, MLP):
        return _Perceptron(dim, transform.hidden, transform.depth, dtype, device)
    if isinstance(transform, VQBridge):
        return Bridge(transform, size, dim, dtype=dtype, device=device)
    if transform == "linear":
        return nn.Linear(dim, dim, bias=False, dtype=dtype, device=device)
    raise ValueError(f'transform = {transform!r}: must be None, "linear", MLP(...), VQBridge(...) or a module')


def _check_together(
    update: Update,
    init: Init,
    dead_codes: DeadCodes | None,
    transform: object,
    affine: Affine | None,
    metric: Metric,
    code_weights: CodeWeights | None,
    sets_what_is_stored: bool,
) -> None:
    """Raise ValueError for choices that contradict each other."""
    wrong = ""
    stays = isinstance(update, Gradient | Frozen) or (isinstance(update, StoredEMA) and not update.follow)
    if transform is not None and not stays:
        wrong = f"transform with update = {update}: what is stored is not where the vectors are; choose Gradient() or Frozen()"
    elif transform is not None and (affine or (not sets_what_is_stored and (dead_codes or isinstance(init, KMeans)))):
        wrong = "transform: what is stored is not where the vectors are, so that neither dead_codes, affine nor a k-means start can set it"
    elif isinstance(update, Frozen) and (dead_codes or affine):
        wrong = "update = Frozen(): nothing changes, so that dead_codes and affine must be None"
    elif affine and metric == "cosine":
        wrong = 'affine with metric = "cosine": codes of length 1 have no scale'
    elif code_weights is not None and not isinstance(update, EMA | ClipEMA | StoredEMA):
        wrong = f"code_weights with update = {update}: only moving averages weigh what is new; choose EMA(), ClipEMA() or StoredEMA()"
    if wrong:
        raise ValueError(wrong)
