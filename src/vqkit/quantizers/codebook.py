"""The table of codes: its state, what is pending for it, and the value that a commit of what is pending would give.

No forward writes what it reads. Statistics wait in `pending` until a commit, at one named place, makes them part of the state. With
automatic commits `codes()` and the state dict already show the value after the commit, and write nothing: what is pending names the
commit that it follows, so that committing it early, twice or on one rank alone changes nothing.

Shapes: H heads with a codebook each, N vectors, C codes, K width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn

from vqkit.dist import LocalReducer, Reducer, default_reducer, is_managed, is_sharded
from vqkit.ops.codebook import (
    COUNT_FLOOR,
    CodebookStatistics,
    assignment_stats,
    directions,
    gather_codes,
    largest_keys,
    merge_statistics,
    zero_statistics,
)
from vqkit.ops.kmeans import kmeans
from vqkit.ops.precision import without_autocast
from vqkit.ops.usage import active_fraction, dead_fraction, perplexity, relative_error
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
    Update,
    check_choice,
)
from vqkit.quantizers.layout import check_range
from vqkit.quantizers.update import State, advance, expire, next_count, start_state, stored_codes

_WIDE = (torch.float32, torch.float64)
_MAX_CANDIDATES = 64
_VARIANCE_FLOOR = 1e-12
_AFFINE_NAMES = ("batch_mean", "batch_variance", "code_mean", "code_variance")

CodeWeights = Tensor | Callable[[Tensor, Tensor], Tensor]
"""What 1 - decay of each code is multiplied by at a commit: [C] or [H, C] floating point, or a function that returns it of the sum
[H, C, K] and the number [H, C] of the vectors that chose each code. It is called whenever the codes are read: it must be pure."""


# Whether a forward is the recomputation of another one


@torch.library.custom_op("vqkit::outside_backward", mutates_args=(), tags=torch.Tag.cudagraph_unsafe)
def _outside_backward(like: Tensor) -> Tensor:
    return torch.full((), not _in_backward(), dtype=torch.bool, device=like.device)


@_outside_backward.register_fake
def _(like: Tensor) -> Tensor:
    return like.new_empty((), dtype=torch.bool)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def outside_backward(like: Tensor) -> Tensor | bool:
    """Whether no backward is running: a bool, or inside a compiled graph a bool tensor on the device of `like`, asked at every run."""
    return _outside_backward(like.detach()) if torch.compiler.is_compiling() else not _in_backward()


class Committed(nn.Module):
    """State that changes by commits alone: a counter of the commits, and the commit that what is pending follows.

    On its own it is a clock: the counter, for what must be a function of the number of commits. `updates` [] int64 is a buffer of the
    state dict. With `auto` (set by the quantizer that owns it) readers see the value after the commit of what is pending.
    """

    _version = 1
    updates: Tensor

    def __init__(self, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=device))
        self.follows = torch.full_like(self.updates, -1)
        self.auto = False
        self._entered = False

    # Reading

    def committed_state(self) -> State:
        """What is committed, by name."""
        return {"updates": self.updates}

    def _after_commit(self) -> State:
        """The state after a commit of what is pending."""
        return {"updates": self.updates + 1}

    def _settled(self) -> State:
        """The state as readers see it."""
        state = self.committed_state()
        if not self.auto or self._entered or not self.training:
            return state
        live, after = self.follows == self.updates, self._after_commit()
        return {name: old if after[name] is old else _where_changed(live, after[name], old) for name, old in state.items()}

    @property
    def commits(self) -> Tensor:
        """[] int64: how many commits the state has seen."""
        return self._settled()["updates"]

    # The forward of the outermost quantizer

    def enter_(self, *, learning: bool, frozen: bool = False, reducer: Reducer | None = None) -> None:
        """A forward begins: until `leave_` readers see what is committed, which is what a recomputation of it sees too."""
        self._follow_device_()
        self._entered = True

    def leave_(self) -> None:
        self._entered = False

    @torch.no_grad()
    def settle_(self, outside: Tensor | bool = True) -> None:
        """Commit what is pending, unless it was committed before or, in a recomputation, was added since (`outside` False)."""
        if outside is False or not self.auto:
            return
        self._follow_device_()
        self._write_((self.follows == self.updates) & outside)

    @torch.no_grad()
    def pend_(self, outside: Tensor | bool = True) -> None:
        """What is pending now follows the last commit."""
        if outside is not False:
            self.follows.copy_(torch.where(torch.as_tensor(outside, device=self.follows.device), self.updates, self.follows))

    @torch.no_grad()
    def commit_pending_(self, applied: Tensor | None = None) -> None:
        """Commit what is pending, which is that of all ranks; where `applied` [] bool is False, drop it."""
        self._write_(applied)
        self.discard_pending_()

    def _write_(self, applied: Tensor | None) -> None:
        state, after = self.committed_state(), self._after_commit()
        for name, old in state.items():
            if after[name] is not old:
                old.copy_(after[name] if applied is None else torch.where(applied, after[name], old))

    @torch.no_grad()
    def discard_pending_(self) -> None:
        """Forget what was added since the last commit."""
        self.follows.fill_(-1)

    def forget_pending_(self) -> None:
        """Forget what is pending and what the metrics are made of, whatever these tensors hold."""
        for tensor in self._pending_tensors().values():
            tensor.zero_()
        self.discard_pending_()

    def train(self, mode: bool = True) -> Self:
        if self.training and not mode:
            self.settle_()
        return super().train(mode)

    # Moving and storing

    def _pending_tensors(self) -> dict[str, Tensor]:
        return {}

    def _replace_pending(self, tensors: dict[str, Tensor]) -> None:
        """Other tensors for `_pending_tensors`."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def apply(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if not tensor.is_floating_point() or moved.dtype in _WIDE:
                return moved
            if tensor.is_meta or moved.is_meta:
                return torch.empty_like(tensor, device=moved.device)
            return tensor.to(moved.device)

        super()._apply(apply, recurse)
        meta = self.follows.is_meta
        self._map_pending_(apply)
        if meta and not self.follows.is_meta:
            self.forget_pending_()
        return self

    def _map_pending_(self, fn: Callable[[Tensor], Tensor]) -> None:
        self.follows = fn(self.follows)
        self._replace_pending({name: fn(tensor) for name, tensor in self._pending_tensors().items()})

    def _follow_device_(self) -> None:
        """FSDP2 moves parameters and buffers without asking the module; what is pending goes with them."""
        device = self.updates.device
        if self.follows.device != device:
            self._map_pending_(lambda tensor: tensor.to(device))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.auto:
            destination |= {prefix + name: value.detach() for name, value in self._settled().items() if prefix + name in destination}

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
        version = local_metadata.get("version", self._version)
        if version > self._version:
            error_msgs.append(f"{prefix or 'the codebook'} has format version {version}: this vqkit reads up to {self._version}")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if self.follows.is_meta and not self.updates.is_meta:
            self.follows = torch.full_like(self.updates, -1)
        self.forget_pending_()


def _where_changed(live: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` where `live`; what stays as it was keeps its gradient."""
    return torch.where(live & (new != old), new, old)


class _Perceptron(nn.Sequential):
    """`depth` hidden layers of width `hidden`."""

    def __init__(self, dim: int, hidden: int, depth: int, dtype: torch.dtype, device: torch.device | str | None) -> None:
        widths = [dim, *[hidden] * depth]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after, dtype=dtype, device=device), nn.SiLU()]
        super().__init__(*layers, nn.Linear(widths[-1], dim, dtype=dtype, device=device))


class Codebook(Committed):
    """`heads` codebooks of `size` codes of width `dim`.

    The state is float32 or float64 and is never made narrower by `.to()`, `.half()` and the like: moving averages `sum` [H, C, K] and
    `count` [H, C] for `EMA` and `ClipEMA`; `weight` [H, C, K], a parameter for `Gradient`, and `count` for the others, with what an
    `OwnOptimizer` remembers; `weight` alone for `Frozen`. `pending` is no buffer, so that nothing broadcasts over it, but moves with the
    module and stands in the state dict. metric="cosine" keeps codes of length 1. `transform` maps the stored vectors [H, C, K] to the
    codes: "linear", `MLP(...)` or a module; it learns by the optimizer of the model. With `frozen` no commit changes anything.
    `code_weights` let moving averages follow some codes faster than others: factors of 1 - decay, not negative and at most
    1 / (1 - decay); of a head that saw no vector they are not asked for. A tensor moves with the module and is not in the state dict.

    Raises ValueError for sizes below 1, for choices that contradict each other, and for code weights of another shape or range.
    """

    count: Tensor
    sum: Tensor
    code_weights: Any

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
        transform: str | MLP | nn.Module | None = None,
        affine: Affine | None = None,
        code_weights: CodeWeights | None = None,
        moments: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(device=device)
        update = EMA() if update is None else update
        for name, value in (("heads", heads), ("codebook_size", size), ("dim", dim)):
            if value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        if dtype not in _WIDE:
            raise ValueError(f"dtype = {dtype}: must be torch.float32 or torch.float64")
        check_choice("metric", metric, ("euclidean", "cosine"))
        check_choice("init", init, ("uniform", "normal"), (KMeans,))
        _check_together(update, init, dead_codes, transform, affine, metric, code_weights)
        self.heads, self.size, self.dim, self.metric = heads, size, dim, metric
        self.update, self.init, self.dead_codes, self.affine = update, init, dead_codes, affine
        self.num_candidates = min(size, _MAX_CANDIDATES) if dead_codes else 0
        self._frozen = isinstance(update, Frozen)
        self._learning = self._frozen_call = False
        self._reducer: Reducer | None = None
        self.initialized = not isinstance(init, KMeans)
        empty = torch.empty(heads, size, dim, dtype=dtype, device=device)
        start = start_state(update, empty, empty.new_empty(heads, size))
        self._rule_names = tuple(start)
        for name, value in start.items():
            if isinstance(update, Gradient) and name == "weight":
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
        self.transform = _make_transform(transform, dim, dtype, device)
        shape = {"num_candidates": self.num_candidates, "moments": moments, "dtype": dtype, "device": empty.device}
        self.pending = zero_statistics(heads, size, dim, **shape)
        self.last = zero_statistics(heads, size, dim, **shape)._replace(sum=empty.new_zeros(heads, 0, dim))
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

        "uniform": within sqrt(6 / (codes * width)); "normal": standard deviation 1 / sqrt(heads * codes).
        """
        codes = self.pending.sum.new_empty(self.heads, self.size, self.dim)
        if self.init == "normal":
            codes.normal_(std=(self.heads * self.size) ** -0.5)
        else:
            bound = math.sqrt(6 / (self.size * self.dim))
            codes.uniform_(-bound, bound)
        self.updates.zero_()
        self._set_(codes, codes.new_full((self.heads, self.size), self._start_count), started=False)
        self.forget_pending_()
        self.initialized = not isinstance(self.init, KMeans)

    @property
    def _start_count(self) -> float:
        return max(1.0, self.dead_codes.start_count) if self.dead_codes else 1.0

    @property
    def dtype(self) -> torch.dtype:
        """float32 or float64."""
        return self.pending.sum.dtype

    # Reading

    def codes(self) -> Tensor:
        """[H, C, K] float32 or float64: what a forward reads. Differentiable where the codes or a transform of them learn by gradient.

        Raises ValueError before a k-means start.
        """
        if not self.initialized and not self._learning:
            self._raise_not_initialized()
        codes = self._codes(self._settled())
        return codes.detach() if self._frozen_call else codes

    def _codes(self, state: State) -> Tensor:
        codes = stored_codes(self.update, state)
        if codes is state.get("weight") and not isinstance(self.update, Frozen):
            codes = codes.clone()  # a backward reads what the forward read, whatever a commit writes meanwhile
        if self._frozen:
            codes = codes.detach()  # a transform of them may still learn
        if self.affine:
            codes = (codes - _row(state["code_mean"])) * self._scale(state) + _row(state["batch_mean"])
        if self.transform is not None:
            with without_autocast(codes.device.type):
                codes = self.transform(codes)
        return directions(codes) if self.metric == "cosine" else codes

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

    def check_statistics(self, statistics: CodebookStatistics) -> None:
        """Raise ValueError for shapes that are not those of what is pending."""
        for name, new, pending in zip(statistics._fields, statistics, self.pending, strict=True):
            if new.shape != pending.shape:
                raise ValueError(f"statistics.{name} has shape {tuple(new.shape)}: must be {tuple(pending.shape)}")

    @torch.no_grad()
    def add_statistics_(self, statistics: CodebookStatistics, outside: Tensor | bool | None = None) -> None:
        """Add to what is pending; in a recomputation, which runs inside a backward, add nothing."""
        self.check_statistics(statistics)
        self._write_pending_(merge_statistics(self.pending, statistics), outside)

    @torch.no_grad()
    def replace_statistics_(self, statistics: CodebookStatistics, outside: Tensor | bool | None = None) -> None:
        """Make `statistics`, summed over all ranks, what is pending after the last commit; in a recomputation do nothing."""
        self.check_statistics(statistics)
        outside = outside_backward(self.updates) if outside is None else outside
        self._write_pending_(statistics, outside)
        self.pend_(outside)

    def _write_pending_(self, statistics: CodebookStatistics, outside: Tensor | bool | None) -> None:
        outside = outside_backward(self.updates) if outside is None else outside
        if outside is False:
            return
        self._follow_device_()
        for pending, new in zip(self.pending, statistics, strict=True):
            pending.copy_(new if outside is True else torch.where(outside, new.to(pending.dtype), pending))

    # Committing

    def committed_state(self) -> State:
        return {name: getattr(self, name) for name in self._names}

    @torch.no_grad()
    def _after_commit(self) -> State:
        state = self.committed_state()
        if self._frozen:
            return state
        statistics = self.pending
        if self.affine:
            statistics = self._without_affine(statistics, state)
        rows = {name: state[name] for name in self._rule_names}
        after = advance(self.update, self.dead_codes, rows, statistics, self._weigh_codes(statistics))
        if self.affine:
            after = after | self._follow(self.affine, state, after)
        return {**state, **after, "updates": state["updates"] + 1}

    def _write_(self, applied: Tensor | None) -> None:
        if self.dead_codes and not self._frozen:
            found = self._find_dead(self.dead_codes)
            self.found_dead.copy_(found if applied is None else torch.where(applied, found, self.found_dead))
        super()._write_(applied)

    @torch.no_grad()
    def commit_pending_(self, applied: Tensor | None = None) -> None:
        for last, pending in zip(self.last, self.pending._replace(sum=self.last.sum), strict=True):
            last.copy_(pending if applied is None else torch.where(applied, pending, last))
        super().commit_pending_(applied)

    @torch.no_grad()
    def discard_pending_(self) -> None:
        super().discard_pending_()
        for tensor in self.pending:
            tensor.zero_()

    def check_commit(self) -> None:
        """Raise ValueError where a commit is impossible: expiry writes codes, which a part of a parameter does not hold.

        An automatic commit runs in a forward, for which FSDP2 has gathered the parameter: there any that it manages is refused.
        """
        if self.dead_codes is None:
            return
        codes = self.committed_state()["weight" if "weight" in self._names else "sum"]
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
        weights = weights.expand(shapes[1])
        weights = weights if seen is None else weights.where(seen, 1.0)
        decay = self.update.decay if isinstance(self.update, EMA | ClipEMA) else 0.0
        check_range("code_weights", weights, 0.0, 1 / (1 - decay))
        return weights

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

    def _follow(self, affine: Affine, state: State, after: State) -> State:
        """The mean and variance of vectors and codes after a commit; the first vectors set those of the vectors at once."""
        vectors, moments = self.pending.vectors, self.pending.moments
        mean, variance = (moments / vectors.clamp(min=1)[:, None, None]).unbind(1)
        codes = stored_codes(self.update, after).detach()
        seen = state["batch_seen"]
        batch_decay = torch.where(vectors > 0, affine.batch_decay * seen, 1.0).unsqueeze(-1)
        code_decay = (affine.codebook_decay * seen).unsqueeze(-1)
        return {
            "batch_mean": torch.lerp(mean, state["batch_mean"], batch_decay),
            "batch_variance": torch.lerp(variance, state["batch_variance"], batch_decay),
            "code_mean": torch.lerp(codes.mean(1), state["code_mean"], code_decay),
            "code_variance": torch.lerp(codes.var(1, correction=0), state["code_variance"], code_decay),
            "batch_seen": torch.where(vectors > 0, 1.0, seen),
        }

    # The forward of the outermost quantizer

    def enter_(self, *, learning: bool, frozen: bool = False, reducer: Reducer | None = None) -> None:
        super().enter_(learning=learning, frozen=frozen, reducer=reducer)
        self._learning, self._frozen_call, self._reducer = learning and not self._frozen, frozen, reducer

    def leave_(self) -> None:
        super().leave_()
        self._learning, self._frozen_call, self._reducer = False, False, None

    def start_(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Before the codes are read for x [H, N, K] (mask [N] or [H, N] bool): a k-means start, where the codebook still waits for one.

        It happens in an eager training forward, over all ranks, and waits on while these have no vector; anywhere else this raises
        ValueError.
        """
        if self.initialized:
            return
        if not self._learning or torch.compiler.is_compiling():
            self._raise_not_initialized()
        if _in_backward():
            return
        reducer = self._reducer or default_reducer()
        valid = x.detach().isfinite().all(-1)
        if self.metric == "cosine":
            valid = valid & x.detach().any(-1)
        present = (valid if mask is None else valid & mask).any(-1).all().to(self.dtype).reshape(1)
        reducer.all_reduce_(present)
        if present.item() > 0:
            self.initialize_(x, mask, reducer=reducer)

    def _raise_not_initialized(self) -> None:
        raise ValueError(
            "the codebook waits for its k-means start (init = KMeans): call initialize_(x) with some vectors first, "
            "or run a training forward without compile and with the codebook not frozen"
        )

    # Setting

    @torch.no_grad()
    def initialize_(self, x: Tensor, mask: Tensor | None = None, *, seed: int = 0, reducer: Reducer | None = None) -> None:
        """Set the codes to the k-means of x [H, N, K] and count to what each code has of them; discards what is pending.

        mask [N] or [H, N] bool. Vectors that are masked or not finite take no part. With several ranks `reducer` makes the result that
        of all their vectors. Raises ValueError when a head has no vector, or when a transform stands between the codes and what is stored.
        """
        if self.transform is not None:
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
        if "count" not in self._names or self.transform is not None:
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
            seen = torch.full_like(state["batch_seen"], float(started))
            new |= {"batch_mean": mean, "batch_variance": variance, "code_mean": mean, "code_variance": variance, "batch_seen": seen}
        for name, value in new.items():
            state[name].copy_(value)
        self.initialized = self.initialized or started
        self.discard_pending_()

    # Health

    def metrics(self) -> dict[str, float]:
        """Of the vectors of the last commit, means over heads; {} before the first. Waits for the device.

        perplexity; active, the share of the codes in use; dead, of those that this commit found dead, whether or not it could replace
        them, or, without expiry, whose moving count is below a hundredth of an even share; relative_error; non_finite, vectors that are
        not; vectors, those that are; codes, the size. NaN for what no vector tells.
        """
        counted = self.pending if self.auto and int(self.follows) >= 0 else self.last
        if not (counted.vectors + counted.non_finite).any() and int(self.commits) == 0:
            return {}
        found = {
            "perplexity": perplexity(counted.count),
            "active": active_fraction(counted.count),
            "dead": self._dead_fraction(counted.count),
        }
        if self._moments:
            found["relative_error"] = relative_error(counted.squared_error, counted.vectors, counted.moments)
        found = {name: value.where(counted.vectors > 0, torch.nan).nanmean() for name, value in found.items()}
        found |= {"non_finite": counted.non_finite.mean(), "vectors": counted.vectors.mean()}
        return {"codes": float(self.size), **{name: value.item() for name, value in found.items()}}

    def _dead_fraction(self, chosen: Tensor) -> Tensor:
        """[H], of the codes; `chosen` [H, C] as often in the last commit."""
        if self.dead_codes:
            return self._find_dead(self.dead_codes) if self.auto and bool(self.follows == self.updates) else self.found_dead
        count = self._settled().get("count", chosen)
        return (count < 0.01 * count.mean(-1, keepdim=True)).to(self.dtype).mean(-1)

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
        pending = {f"pending.{name}": tensor for name, tensor in self.pending._asdict().items()} | {"found_dead": self.found_dead}
        return pending | {f"last.{name}": tensor for name, tensor in self.last._asdict().items()}

    def _replace_pending(self, tensors: dict[str, Tensor]) -> None:
        self.pending = CodebookStatistics(**{name: tensors[f"pending.{name}"] for name in CodebookStatistics._fields})
        self.last = CodebookStatistics(**{name: tensors[f"last.{name}"] for name in CodebookStatistics._fields})
        self.found_dead = tensors["found_dead"]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}initialized"] = torch.tensor(self.initialized, device="cpu")
        nothing = self.auto or self._frozen  # the state is that after the commit
        for name, tensor in self.pending._asdict().items():
            destination[f"{prefix}pending.{name}"] = torch.zeros_like(tensor) if nothing else tensor

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
        pending = {name: f"{prefix}pending.{name}" for name in self.pending._fields}
        known = {f"{prefix}initialized", *pending.values()}
        unexpected_keys[:] = [key for key in unexpected_keys if key not in known]
        for name, key in pending.items():
            own, stored = getattr(self.pending, name), state_dict.get(key)
            if stored is None:
                continue
            if stored.shape != own.shape:
                error_msgs.append(f"{key} has shape {tuple(stored.shape)}: must be {tuple(own.shape)}")
            elif local_metadata.get("assign_to_params_buffers", False):
                self.pending = self.pending._replace(**{name: stored})
            else:
                own.copy_(stored)
        device = self.updates.device  # what came by assignment is no longer on the meta device
        self._map_pending_(lambda tensor: torch.zeros_like(tensor, device=device) if tensor.is_meta else tensor)


def _row(values: Tensor) -> Tensor:
    """[H, K] -> [H, 1, K]."""
    return values.unsqueeze(1)


def _make_transform(
    transform: str | MLP | nn.Module | None, dim: int, dtype: torch.dtype, device: torch.device | str | None
) -> nn.Module | None:
    if transform is None or isinstance(transform, nn.Module):
        return transform
    if isinstance(transform, MLP):
        return _Perceptron(dim, transform.hidden, transform.depth, dtype, device)
    if transform == "linear":
        return nn.Linear(dim, dim, bias=False, dtype=dtype, device=device)
    raise ValueError(f'transform = {transform!r}: must be None, "linear", MLP(...) or a module')


def _check_together(
    update: Update,
    init: Init,
    dead_codes: DeadCodes | None,
    transform: object,
    affine: Affine | None,
    metric: Metric,
    code_weights: CodeWeights | None,
) -> None:
    """Raise ValueError for choices that contradict each other."""
    wrong = ""
    if transform is not None and not isinstance(update, Gradient | Frozen):
        wrong = f"transform with update = {update}: what is stored is not where the vectors are; choose Gradient() or Frozen()"
    elif transform is not None and (dead_codes or affine or isinstance(init, KMeans)):
        wrong = "transform: what is stored is not where the vectors are, so that neither dead_codes, affine nor a k-means start can set it"
    elif isinstance(update, Frozen) and (dead_codes or affine):
        wrong = "update = Frozen(): nothing changes, so that dead_codes and affine must be None"
    elif affine and metric == "cosine":
        wrong = 'affine with metric = "cosine": codes of length 1 have no scale'
    elif code_weights is not None and not isinstance(update, EMA | ClipEMA):
        wrong = f"code_weights with update = {update}: only moving averages weigh what is new; choose EMA() or ClipEMA()"
    if wrong:
        raise ValueError(wrong)
