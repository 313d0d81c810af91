"""The peer's Codebook: a codebook of vqkit whose state stands in the peer's buffers, and changes when the peer's does.

A training call ends with its step: nothing is pending, what the buffers hold is all that there is, and what is written into them holds
from the next call on. A call that is computed again inside a backward reads what it read the first time, which is kept beside them.
Shapes: H codebooks, C codes, K width, N vectors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from vqkit.compat.vector_quantize_pytorch import functions, translate
from vqkit.compat.vector_quantize_pytorch.arguments import check_as_argument, in_these_words
from vqkit.compat.vector_quantize_pytorch.recall import Recall, may_be_computed_again
from vqkit.compat.vector_quantize_pytorch.settings import Kept, Overridable
from vqkit.dist import LocalReducer, Reducer, is_managed
from vqkit.ops.codebook import CodebookStatistics, largest_keys, merge_statistics
from vqkit.quantizers.codebook import Codebook as _Codebook
from vqkit.quantizers.codebook import most_candidates
from vqkit.quantizers.commit import reduce_in_forward
from vqkit.quantizers.committed import in_backward, outside_backward
from vqkit.quantizers.config import StoredEMA
from vqkit.quantizers.layout import check_indices
from vqkit.quantizers.update import State, expire, follow_averages

_OWN = {"weight": "embed", "count": "cluster_size", "sum": "embed_avg"}
_OF_VECTORS, _OF_CODES = ("batch_mean", "batch_variance"), ("code_mean", "code_variance")
_AFFINE = {**dict(zip(_OF_VECTORS, _OF_VECTORS, strict=True)), "code_mean": "codebook_mean", "code_variance": "codebook_variance"}
"""The peer's names."""
_NEED_INIT = ("codebook_mean_needs_init", "codebook_variance_needs_init")
_BUFFERS = ("initted", "cluster_size", "embed_avg", "embed")
"""In the peer's order."""

_PARTS, _WAITING = 32, 1 << 20
"""So many statistics, and numbers of them, wait at most to be added up."""

_CHANCES = 3
"""After so many steps a code of which no vector was near starts anew, where codes may: far from encoders that move it would stay unused."""

CodeWeights = Tensor | Callable[[Tensor, Tensor], Tensor] | float


class Call(NamedTuple):
    """What one call says of the step that it makes."""

    ema_update: bool | None = None  # None: as the codebook
    weights: CodeWeights | None = None  # what 1 - decay of each code is multiplied by
    accumulate: bool = False  # the statistics wait for the next call that does not say so
    uses: int = 1  # how many steps in turn these statistics stand for, faded by `weight_of_use`
    averages_alone: bool = False  # the codes stay where they are
    checked: bool = False  # the weights are what `weights_of_codes` gave


class _Setting:
    """An attribute that every step is computed with, by the value of the moment."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, codebook: Any, owner: type | None = None) -> Any:
        if codebook is None:
            return self
        if self.name not in codebook._settings:
            raise AttributeError(self.name)
        return codebook._settings[self.name]

    def __set__(self, codebook: Codebook, value: Any) -> None:
        codebook._take({**codebook._settings, self.name: check_as_argument(Codebook, self.name, value)})


class _Fixed(_Setting):
    """An attribute that the codebook is made with. Raises ValueError where it is set to another value."""

    def __set__(self, codebook: Codebook, value: Any) -> None:
        if value != (made := codebook._settings.get(self.name)):
            raise ValueError(
                f"{self.name} = {value!r}: must stay {made!r}, with which this codebook is made; make another and load its state"
            )


@in_these_words()
class Codebook(Overridable, _Codebook):
    """A codebook of `codebook_size` codes of width `dim`, or `num_codebooks` of them, with the peer's arguments.

    Buffers: `initted` [] bool; `cluster_size` [H, C] and `embed_avg` [H, C, K], the moving averages; `embed` [H, C, K], the codes, a
    parameter where they are learnable; with affine_param `codebook_mean`, `codebook_variance` and, once vectors have set them,
    `batch_mean`, `batch_variance` [H, 1, K]. The state dict has these, and while calls accumulate what waits for a step, `pending.*`,
    which the peer does not know. What the peer reads in every call may be set at any time; what it is made with raises ValueError.
    """

    initted: Tensor
    embed: Tensor
    embed_avg: Tensor
    cluster_size: Tensor

    uncalled = dict.fromkeys(
        (
            "init_embed_",
            "update_codebook",
            "track_cluster_size_and_embed_avg",
            "update_ema",
            "expire_codes_",
            "replace",
            "update_affine",
            "update_with_decay",
        ),
        (),
    )

    sets_what_is_stored = True
    synchronizes = True
    """Whether `update_indices` is a step of all processes."""
    recalls = False
    """Whether codes are read as the last forward in training has read them, or the one that is computed again."""
    _within = False
    """Whether a forward is a part of another one, which alone is told apart."""
    _recalled: State | None = None
    _written = 0
    """The version of `initted` that was looked at last."""

    decay, eps, ema_update, manual_ema_update, kmeans_iters = _Setting(), _Setting(), _Setting(), _Setting(), _Setting()
    threshold_ema_dead_code, has_dead_code_replacement, reset_cluster_size = _Setting(), _Setting(), _Setting()
    affine_param_batch_decay, affine_param_codebook_decay = _Setting(), _Setting()
    codebook_size, num_codebooks, learnable_codebook, use_cosine_sim, affine_param = _Fixed(), _Fixed(), _Fixed(), _Fixed(), _Fixed()
    gumbel_sample, transform_input = _Fixed(), _Fixed()

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        num_codebooks: int = 1,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sync_kmeans: bool = True,
        decay: float = 0.8,
        eps: float = 1e-5,
        threshold_ema_dead_code: float = 2,
        reset_cluster_size: float | None = None,
        use_ddp: bool = False,
        learnable_codebook: bool = False,
        gumbel_sample: Callable[..., tuple[Tensor, Tensor]] = functions.gumbel_sample,
        sample_codebook_temp: float = 1.0,
        ema_update: bool = True,
        manual_ema_update: bool = False,
        affine_param: bool = False,
        sync_affine_param: bool = False,
        affine_param_batch_decay: float = 0.99,
        affine_param_codebook_decay: float = 0.9,
        use_cosine_sim: bool = False,
        vq_bridge: nn.Module | None = None,
    ) -> None:
        if not callable(gumbel_sample):
            raise TypeError(f"gumbel_sample = {gumbel_sample!r}: must be a function of logits that gives indices and their one-hot rows")
        self._settings: dict[str, Any] = {
            "decay": decay,
            "eps": eps,
            "ema_update": ema_update,
            "manual_ema_update": manual_ema_update,
            "kmeans_iters": kmeans_iters,
            "threshold_ema_dead_code": threshold_ema_dead_code,
            "has_dead_code_replacement": threshold_ema_dead_code > 0,
            "reset_cluster_size": threshold_ema_dead_code if reset_cluster_size is None else reset_cluster_size,
            "codebook_size": codebook_size,
            "num_codebooks": num_codebooks,
            "learnable_codebook": learnable_codebook,
            "use_cosine_sim": use_cosine_sim,
            "affine_param": affine_param,
            "gumbel_sample": gumbel_sample,
            "transform_input": functions.l2norm if use_cosine_sim else functions.identity,
        }
        if affine_param:
            of_affine = {"affine_param_batch_decay": affine_param_batch_decay, "affine_param_codebook_decay": affine_param_codebook_decay}
            self._settings |= of_affine
        self._waits, self._waiting = kmeans_init, cast(list[CodebookStatistics], [])
        options = translate.codebook_options(self._settings, kmeans_init=kmeans_init, vq_bridge=vq_bridge)
        super().__init__(num_codebooks, codebook_size, dim, **options)
        self.use_ddp, self.sync_affine_param, self.sample_codebook_temp = use_ddp, sync_affine_param, sample_codebook_temp
        self.call: Call | None = None
        self._accumulating = False

    def _take(self, settings: dict[str, Any]) -> None:
        """Let steps be computed with these."""
        options = translate.codebook_options(settings, kmeans_init=self.init != "uniform", vq_bridge=None)
        self._settings = settings
        self.update, self.dead_codes, self.affine, self.init = (options[name] for name in ("update", "dead_codes", "affine", "init"))
        if (number := most_candidates(self.size, self.dead_codes)) != self.num_candidates:
            self.num_candidates = number
            rows = self.sum.new_zeros(self.heads, number, self.dim)
            self.pending = self.pending._replace(candidates=rows, keys=rows[..., 0].clone())

    def extra_repr(self) -> str:
        """As the peer's."""
        return ""

    # The state

    def reset_parameters(self) -> None:
        """As in vqkit; codes and averages that wait for a k-means start are 0."""
        if "initted" not in self._buffers:
            self._rename()
        super().reset_parameters()

    def _draw(self) -> Tensor:
        """Nothing is drawn that a k-means start would replace."""
        return super()._draw() if self.init == "uniform" else self.pending.sum.new_zeros(self.heads, self.size, self.dim)

    def _rename(self) -> None:
        """Parameters, buffers and parts under the peer's names and in its order, and beside them what is no part of the state."""
        parameters, found = cast(dict[str, Any], self._parameters), cast(dict[str, Any], {**self._buffers})
        self.vq_bridge = self._modules.pop("transform", None)
        if "weight" in parameters:
            parameters["embed"] = parameters.pop("weight")
        self._buffers.clear()
        self.updates = found.pop("updates")
        found["initted"] = torch.tensor(not self._waits, device=self.updates.device)
        found |= {there: found.pop(name) for name, there in _OWN.items() if name in found}
        self._buffers |= {name: found[name] for name in _BUFFERS if name in found}
        codes = found["embed_avg"]
        self._read, self._recent, self._unseen = {"weight": torch.empty_like(codes)}, cast(State, {}), cast(State, {})
        self._recall = Recall()
        if self.affine:
            self._unseen |= {name: found[name].unsqueeze(1) for name in _OF_VECTORS}
            self._buffers |= dict.fromkeys(_OF_VECTORS)
            for name in _OF_CODES:
                there = _AFFINE[name]
                self._buffers |= {f"{there}_needs_init": torch.ones_like(found["initted"]), there: found[name].unsqueeze(1)}
            self._read |= {name: torch.empty_like(found[name]) for name in _AFFINE} | {"batch_seen": codes.new_empty(())}

    def _stored(self, name: str) -> Tensor:
        """The parameter or buffer."""
        found = self._parameters.get(name)
        found = self._buffers.get(name) if found is None else found
        if found is None:
            raise AttributeError(name)
        return found

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self._stored("embed")

    @property
    def sum(self) -> Tensor:  # type: ignore[override]
        return self._stored("embed_avg")

    @property
    def count(self) -> Tensor:  # type: ignore[override]
        return self._stored("cluster_size")

    def committed_state(self) -> State:
        buffers: dict[str, Any] = self._buffers
        codes = self._parameters.get("embed")
        state = {"weight": buffers["embed"] if codes is None else codes, "count": buffers["cluster_size"], "sum": buffers["embed_avg"]}
        if self.affine:
            found = buffers | self._unseen
            state |= {name: found[there].squeeze(1) for name, there in _AFFINE.items()}
            state["batch_seen"] = (~found[_NEED_INIT[0]]).to(self.dtype)
        return state

    def _see(self, seen: bool) -> None:
        """Whether vectors have set their mean and variance: until then these are no buffers."""
        for name in _OF_VECTORS:
            if seen and name in self._unseen:
                self._buffers[name] = self._unseen.pop(name)
            elif not seen and name not in self._unseen:
                self._unseen[name], self._buffers[name] = self._stored(name), None

    @property
    def transform(self) -> nn.Module | None:  # type: ignore[override]
        return self._modules.get("vq_bridge", self._modules.get("transform"))

    @transform.setter
    def transform(self, module: nn.Module | None) -> None:
        """Only for what is no module: that is registered without asking here."""

    @property
    def commits(self) -> Tensor:
        return self.updates

    @property
    def _start_count(self) -> float:
        """So much that a code that was merely not yet used is not dead after the first step, but after `_CHANCES`, or at half of it."""
        if self.dead_codes is None:
            return 1.0
        return max(1.0, self.dead_codes.threshold / max(0.5, cast(StoredEMA, self.update).decay ** _CHANCES))

    @property
    def initialized(self) -> bool:  # type: ignore[override]
        """As `initted` says. Where that waits for a device it is asked while a start is due, and when it was written in place."""
        stored = self._buffers.get("initted")
        if stored is None or torch.compiler.is_compiling():
            return not self._waits
        if stored.is_cpu:
            if bool(stored) is self._waits:
                self._waits = not self._waits
        elif not stored.is_meta and not stored.is_inference() and (self._waits or self._written != stored._version):
            self._waits, self._written = not bool(stored), stored._version
        return not self._waits

    @initialized.setter
    def initialized(self, value: bool) -> None:
        self._waits = not value
        if (stored := self._buffers.get("initted")) is not None:
            stored.fill_(value)

    # Reading

    def enter_(self, *, learning: bool, frozen: bool = False, reducer: Reducer | None = None) -> None:
        """As in vqkit; and a forward in training keeps what it reads, a recomputation reads what was kept."""
        super().enter_(learning=learning, frozen=frozen, reducer=reducer)
        if self._recalled is not None:
            self._recalled = None
        if not self.training:
            return
        outside = outside_backward(self.count)
        if outside is True:
            self._recall.begin()
        if outside is not True:
            self.recalls = True
        if isinstance(outside, Tensor):
            self._keep(outside)

    def leave_(self) -> None:
        super().leave_()
        if self.recalls:
            self.recalls = False

    def _keep(self, outside: Tensor) -> None:
        """In a compiled program, which makes no attributes."""
        state = self.committed_state()
        for name in self._kept_names():
            kept, now = self._read[name], state[name].detach()
            kept.copy_(torch.where(outside, now, kept))

    def start_(self, x: Tensor, mask: Tensor | None = None) -> None:
        """As in vqkit; and this is how calls that are computed again are told apart."""
        super().start_(x, mask)
        if not self.training or not self._entered or self._within or torch.compiler.is_compiling():
            return
        if not in_backward():
            if may_be_computed_again():
                self._recall.see(x)
        elif self._recalled is None:
            self._recalled = self._recall.find(x)

    @contextmanager
    def pulling(self) -> Iterator[None]:
        """Around a forward for an optimizer of its own, which steps before the codes are read."""
        self._within = True
        try:
            yield
        finally:
            self._within = False

    def _kept_names(self) -> list[str]:
        """What is read and may be changed by the step of a call: codes that only an optimizer moves stay as they are until the backward."""
        follows = cast(StoredEMA, self.update).follow or (self.call is not None and bool(self.call.ema_update))
        moves = follows or self.dead_codes is not None or not self.learnable_codebook
        return [name for name in self._read if moves or name != "weight"]

    def _to_read(self, state: State) -> Tensor:
        codes = super()._to_read(state)
        if self.training and self._entered is not None and not self.recalls and not torch.compiler.is_compiling():
            recent = {"weight": codes.detach()}
            for name in self._read if self.affine else ():
                recent.setdefault(name, state[name].clone() if state[name]._is_view() else state[name])  # a view is one of a buffer
            object.__setattr__(self, "_recent", recent)
            self._recall.keep(recent)
        return codes

    def codes_for(self, x: Tensor, kept: Tensor | None) -> Tensor:
        """As in vqkit; what was kept has followed these vectors."""
        return self.codes() if self.recalls and not torch.compiler.is_compiling() else super().codes_for(x, kept)

    def _settled(self) -> State:
        state = self.committed_state()
        if not self.recalls:
            return state
        found = (
            {name: self._read[name] for name in self._kept_names()}
            if torch.compiler.is_compiling()
            else {**(self._recent if self._recalled is None else self._recalled)}
        )
        if "weight" in found and (weight := state["weight"]).requires_grad:
            found["weight"] = found["weight"] + (weight - weight.detach())  # 0, with the gradient of the parameter
        return {**state, **found}

    def settle_(self, outside: Tensor | bool = True) -> None:
        """Nothing is ever pending."""

    def check_stored(self) -> None:
        """Raise ValueError for codes of another shape, which have been written into the tensor."""
        right, found = (self.num_codebooks, self.codebook_size, self.dim), tuple(self._stored("embed").shape)
        if found != right:
            raise ValueError(f"_codebook.embed has shape {found}: must be {right}, of codebooks, codes and their width")

    def _raise_not_initialized(self) -> None:
        raise ValueError(
            "kmeans_init = True: the codes wait for the k-means of the first vectors: make a call in training mode first, neither frozen "
            "nor compiled, or call _codebook.init_embed_(vectors); where a trainer validates first, tell it not to"
        )

    # One step

    def check_commit(self) -> None:
        super().check_commit()
        rule = cast(StoredEMA, self.update)
        if rule.learn and rule.follow and is_managed(self):
            raise ValueError(
                "ema_update = True: must be False where fully_shard manages codes that are a parameter, as averages cannot be written there"
            )

    def _rule_of_call(self) -> StoredEMA:
        rule, call = cast(StoredEMA, self.update), self.call
        if call is None:
            return rule
        moves = self.ema_update if call.ema_update is None else bool(call.ema_update)
        follow = moves and not self.manual_ema_update and not call.averages_alone
        count = moves or self.has_dead_code_replacement
        if (call.uses, follow, count) == (1, rule.follow, rule.count):
            return rule
        return dataclasses.replace(rule, decay=rule.decay**call.uses, follow=follow, count=count)

    @property
    def counts(self) -> bool:
        return self._rule_of_call().count or self.affine is not None

    def weight_of_use(self, number: int, uses: int) -> float:
        """Of the statistics of one of several uses, in a step of decay^uses, so that it is that of one step after each use."""
        decay = self.decay
        if decay == 1:
            return 1 / uses  # of nothing
        return (1 - decay) * decay ** (uses - 1 - number) / (1 - decay**uses)

    def _weigh_codes(self, statistics: CodebookStatistics) -> Tensor | None:
        weights = None if self.call is None else self.call.weights
        if weights is None or (self.call is not None and self.call.checked):
            return cast(Tensor | None, weights)
        return self.weights_of_codes(weights(statistics.sum, statistics.count) if callable(weights) else weights)

    def weights_of_codes(self, weights: Tensor | float) -> Tensor:
        """[H, C] of a number for all codes, or of numbers or bool (which codes move) [C] or [H, C]. Raises ValueError and TypeError."""
        if isinstance(weights, Real):
            weights = self.updates.new_full((self.size,), float(weights), dtype=self.dtype)
        elif isinstance(weights, Tensor) and not weights.is_complex():
            weights = weights.to(self.updates.device, self.dtype)
        return self._check_code_weights(weights)

    @torch.no_grad()
    def replace_statistics_(self, statistics: CodebookStatistics, outside: Tensor | bool | None = None) -> None:
        """A step from `statistics`, summed over all ranks, or a part of what a later call takes; in a recomputation nothing."""
        outside = outside_backward(self.count) if outside is None else outside
        if outside is False:
            return
        call = self.call or Call()
        if call.accumulate:
            self._accumulate_(statistics, outside)
            return
        if self._accumulating:
            statistics = merge_statistics(*self._accumulated(), statistics)
        expires = self.dead_codes if self.training and not call.averages_alone else None
        state = self.committed_state()
        after = self._learn(state, statistics, self._rule_of_call(), expires)  # what weights are not raises before anything changes
        if self._accumulating:
            self._accumulating = False
            self._waiting.clear()
        if not torch.compiler.is_compiling():
            object.__setattr__(self, "last", statistics._replace(sum=self.last.sum))  # for the metrics
        for name, old in state.items():
            if after[name] is not old and name != "batch_seen":
                _write_(old, after[name], outside)
        if self.affine and (self._unseen or outside is not True):
            self._note_seen_(after["batch_seen"], outside)

    def _accumulated(self) -> list[CodebookStatistics]:
        """The parts of what waits for a step: in eager calls a list, so that they are added up many at a time."""
        return [*self._waiting] or ([self.pending] if self._accumulating else [])

    def _accumulate_(self, statistics: CodebookStatistics, outside: Tensor | bool) -> None:
        if outside is not True:
            self._settle_waiting_()
        parts = [*self._accumulated(), statistics]
        if outside is not True:
            self._write_pending_(merge_statistics(*parts), outside)
        else:
            few = len(parts) <= _PARTS and len(parts) * statistics.sum.numel() <= _WAITING and parts[0] is not self.pending
            self._waiting[:] = parts if few else [merge_statistics(*parts)]
        if not self._accumulating:
            self._accumulating = True

    def _settle_waiting_(self) -> None:
        """Let `pending` hold all that waits."""
        if self._waiting:
            self._write_pending_(merge_statistics(*self._waiting), True)
            self._waiting.clear()

    def _note_seen_(self, seen: Tensor, outside: Tensor | bool) -> None:
        unseen = ~seen.all()
        for there in _NEED_INIT:
            _write_(self._stored(there), unseen, outside)
        if outside is True and self._unseen and not bool(unseen):
            self._see(True)

    def discard_pending_(self) -> None:
        super().discard_pending_()
        self._accumulating = False
        self._waiting.clear()

    # Moving and storing

    def _map_pending_(self, fn: Callable[[Tensor], Tensor]) -> None:
        self._settle_waiting_()
        super()._map_pending_(fn)
        self.updates, self._recall = fn(self.updates), Recall()
        for tensors in (self._read, self._recent, self._unseen):
            tensors.update({name: fn(tensor) for name, tensor in tensors.items()})

    def _follow_device_(self) -> None:
        device = self.count.device
        if self.updates.device != device:
            self._map_pending_(lambda tensor: torch.zeros_like(tensor, device=device) if tensor.is_meta else tensor.to(device))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.affine and self._unseen and not self.weight.is_meta:  # a compiled program does not make buffers
            self._see(not bool(self._stored(_NEED_INIT[0])))
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        if self._accumulating:
            self._settle_waiting_()
            destination |= {f"{prefix}pending.{name}": tensor.clone() for name, tensor in self.pending._asdict().items()}

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
        if self.affine:
            self._see(all(f"{prefix}{name}" in state_dict for name in _OF_VECTORS))
        arguments = (state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        nn.Module._load_from_state_dict(self, *arguments)
        self._follow_device_()
        self.forget_pending_()
        waiting = {name: state_dict[key] for name in self.pending._fields if (key := f"{prefix}pending.{name}") in state_dict}
        known = {f"{prefix}pending.{name}" for name in waiting}
        unexpected_keys[:] = [key for key in unexpected_keys if key not in known]
        for name, value in waiting.items():
            own = getattr(self.pending, name)
            if own.shape != value.shape:
                error_msgs.append(f"{prefix}pending.{name} has shape {tuple(value.shape)}: must be {tuple(own.shape)}")
            else:
                own.copy_(value)
        self._accumulating = bool(waiting)
        self._waits = not self._stored("initted").is_meta and not bool(self._stored("initted"))
        if self.affine and self._unseen:
            self._center_()

    @torch.no_grad()
    def _center_(self) -> None:
        """Let mean and variance of codes and vectors be equal, so that codes are read as they are."""
        state = self.committed_state()
        for of in ("code", "batch"):
            state[f"{of}_mean"].copy_(state["weight"].mean(1))
            state[f"{of}_variance"].copy_(state["weight"].var(1, correction=0))

    @torch.no_grad()
    def _set_(self, codes: Tensor, count: Tensor, *, started: bool) -> None:
        super()._set_(codes, count, started=started)
        if self.affine:
            self._see(False)
            for there in _NEED_INIT:
                self._stored(there).fill_(True)

    @torch.no_grad()
    def initialize_(self, x: Tensor, mask: Tensor | None = None, *, seed: int = 0, reducer: Reducer | None = None) -> None:
        """As in vqkit; the averages are then sum and number of the vectors of each code, and the codes follow them."""
        super().initialize_(x, mask, seed=seed, reducer=reducer)
        self.sum.copy_(self.weight * self.count.unsqueeze(-1))
        self.update_ema()

    # The peer's methods

    @torch.no_grad()
    def init_embed_(self, data: Tensor, mask: Tensor | None = None) -> None:
        """The k-means start from data [H, N, K] (mask [H, N] bool), if it has not been made."""
        if not self.initialized:
            self.initialize_(data, mask)

    @torch.no_grad()
    def update_ema(self) -> None:
        """Set the codes to the moving averages."""
        if in_backward():
            return
        codes = follow_averages(cast(StoredEMA, self.update), self.committed_state())["weight"]
        self.weight.data.copy_(functions.l2norm(codes) if self.use_cosine_sim else codes)

    @torch.no_grad()
    def expire_codes_(self, batch_samples: Tensor, seq_mask: Tensor | None = None) -> None:
        """In training, codes of a moving count below the threshold start anew at vectors of batch_samples [H, ..., K]; seq_mask [H, N]."""
        if self.dead_codes is None or not self.training or in_backward():
            return
        rows = batch_samples.flatten(1, -2)
        self.expire_(rows, seq_mask, seed=int(torch.randint(2**31, ())))

    @torch.no_grad()
    def update_with_decay(self, buffer_name: str, new_value: Tensor, decay: float) -> None:
        """Let a buffer follow a value: decay * old + (1 - decay) * new; the first value sets it."""
        if buffer_name in self._unseen:
            self._see(True)
        buffer, needs_init = self._stored(buffer_name), self._buffers.get(f"{buffer_name}_needs_init")
        first = buffer_name in _OF_VECTORS if needs_init is None else bool(needs_init)
        if needs_init is not None:
            needs_init.fill_(False)
        new = new_value.detach().to(buffer).reshape(buffer.shape)
        buffer.copy_(new if first else torch.lerp(new, buffer, decay))

    @torch.no_grad()
    def replace(self, batch_samples: Tensor, batch_mask: Tensor, seq_mask: Tensor | None = None) -> None:
        """Let the codes of batch_mask [H, C] bool start anew at vectors of batch_samples [H, N, K]; seq_mask [H, N] bool.

        No vector is taken twice: where there are too few, codes stay as they are.
        """
        if in_backward():
            return
        samples = functions.l2norm(batch_samples) if self.use_cosine_sim else batch_samples
        draws = 1.0 - torch.rand(samples.shape[:2], device=samples.device)
        draws = draws if seq_mask is None else draws.where(seq_mask, 0.0)
        rows, keys = largest_keys(samples.to(self.sum), draws, self.codebook_size)
        wanted = 1.0 - batch_mask.to(self.count.dtype)  # expiry takes those that count least
        state = {"weight": self.weight, "sum": self.sum, "count": wanted}
        after = expire(cast(StoredEMA, self.update), state, rows, keys, 0.5, max(self.reset_cluster_size, 1.0))
        replaced = (after["count"] != wanted) & batch_mask
        self.weight.data.copy_(after["weight"])
        self.count.copy_(torch.where(replaced, float(self.reset_cluster_size), self.count))
        self.sum.copy_(torch.where(replaced.unsqueeze(-1), after["weight"] * self.reset_cluster_size, self.sum))

    def update_codebook(
        self,
        flatten: Tensor,
        embed_onehot: Tensor,
        mask: Tensor | None = None,
        ema_update_weight: CodeWeights | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> None:
        """One step from vectors [H, N, K] and the one-hot rows [H, N, C] of their codes; mask [H, N] bool."""
        self._learn_from_(flatten, embed_onehot.argmax(-1), mask, Call(ema_update, ema_update_weight, accum_ema_update))

    def track_cluster_size_and_embed_avg(
        self,
        flatten: Tensor,
        embed_onehot: Tensor,
        mask: Tensor | None = None,
        ema_update_weight: CodeWeights | None = None,
        accum_ema_update: bool = False,
    ) -> None:
        """As `update_codebook`, of the averages alone."""
        call = Call(True, ema_update_weight, accum_ema_update, averages_alone=True)
        self._learn_from_(flatten, embed_onehot.argmax(-1), mask, call)

    def update_indices(
        self,
        x: Tensor,
        embed_ind: Tensor,
        mask: Tensor | None = None,
        ema_update_weight: CodeWeights | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> None:
        """One step, in eval mode too, from vectors x [..., K], [H, ..., K] where of rank 4, that chose embed_ind; mask [B, T] bool.

        Index -1 counts nothing. Raises ValueError for indices outside -1 ... codebook_size - 1.
        """
        if x.dim() < 4:
            x, embed_ind = x.unsqueeze(0), embed_ind.unsqueeze(0)
        rows, indices = x.flatten(1, -2), embed_ind.flatten(1)
        if mask is not None:
            repeats = rows.shape[1] // mask.numel()
            mask = mask.repeat_interleave(repeats, 0).reshape(1, -1).expand(rows.shape[:2])
        self._learn_from_(rows, indices, mask, Call(ema_update, ema_update_weight, accum_ema_update))

    update_ema_indices = update_indices

    @torch.no_grad()
    def _learn_from_(self, rows: Tensor, indices: Tensor, mask: Tensor | None, call: Call) -> None:
        check_indices("indices", indices, self.codebook_size, rows.shape[:-1])
        if not in_backward():
            indices = indices if mask is None else indices.where(mask, -1)
            self.learn_by_hand_(self.statistics(rows, indices, (indices >= 0).to(self.dtype)), call)

    @torch.no_grad()
    def learn_by_hand_(self, statistics: CodebookStatistics, call: Call) -> None:
        """A step from `statistics`, of all processes, in any mode."""
        self.call = call
        try:
            if self.counts:
                (reduced,) = reduce_in_forward([statistics], None if self.synchronizes else LocalReducer())
                self.replace_statistics_(reduced)
        finally:
            self.call = None

    @torch.no_grad()
    def update_affine(self, data: Tensor, embed: Tensor, mask: Tensor | None = None) -> None:
        """Let mean and variance follow those of data [H, ..., K] (mask bool) and of codes embed [H, ..., K].

        Raises ValueError without affine_param.
        """
        if not self.affine:
            raise ValueError("update_affine: must come with affine_param = True")
        rows, codes = data.flatten(1, -2), embed.flatten(1, -2)
        if mask is not None:
            rows = rows[mask.expand(rows.shape[:2])].unflatten(0, (len(rows), -1))
        for name, values, decay in (("codebook", codes, self.affine.codebook_decay), ("batch", rows, self.affine.batch_decay)):
            self.update_with_decay(f"{name}_mean", values.mean(1), decay)
            self.update_with_decay(f"{name}_variance", values.var(1, correction=0), decay)

    def forward(
        self,
        x: Tensor,
        sample_codebook_temp: float | None = None,
        mask: Tensor | None = None,
        freeze_codebook: bool = False,
        codebook_transform_fn: Callable[[Tensor], Tensor] | None = None,
        ema_update_weight: CodeWeights | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
        topk: int | None = None,
        update_usage: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, N, K], or [H, B, N, K] -> its codes, their indices and the scores [..., C] of all codes; in training one step.

        For those who call a codebook by itself: VectorQuantize does not, as the scores are a matrix of all vectors by all codes.
        `codebook_transform_fn` makes codes [H, B, N, C, K] of [H, C, K]. The rest is as for VectorQuantize.
        """
        given = (x if x.dim() == 4 else x.unsqueeze(0)).to(torch.promote_types(x.dtype, torch.float32))
        rows = given.flatten(1, -2)
        mask = None if mask is None else mask.repeat_interleave(rows.shape[1] // mask.numel(), 0).reshape(1, -1).expand(rows.shape[:2])
        learning = self.training and update_usage and not freeze_codebook and topk is None
        self.enter_(learning=learning, frozen=freeze_codebook)
        try:
            self.start_(rows, mask)
            codes = self.codes()
        finally:
            self.leave_()
        own = codes.unsqueeze(1) if codebook_transform_fn is None else codebook_transform_fn(codes).flatten(1, 2)  # [H, N or 1, C, K]
        if self.use_cosine_sim:
            scores = (functions.l2norm(own) @ rows.unsqueeze(-1)).squeeze(-1)
        else:
            scores = -(torch.cdist(rows, codes) if own.shape[1] == 1 else torch.cdist(rows.unsqueeze(-2), own).squeeze(-2))
        temperature = self.sample_codebook_temp if sample_codebook_temp is None else sample_codebook_temp
        index, chosen = self.gumbel_sample(scores, dim=-1, topk=topk, temperature=temperature, training=self.training)
        several = chosen if topk is not None else chosen.unsqueeze(-2)
        quantized = several @ own
        quantized = quantized if topk is not None else quantized.squeeze(-2)
        if learning:
            self._learn_from_(rows.detach(), index, mask, Call(ema_update, ema_update_weight, accum_ema_update))
        results = [found.unflatten(1, given.shape[1:-1]) for found in (quantized, index, scores)]
        return cast(Any, (*(found if x.dim() == 4 else found.squeeze(0) for found in results[:2]), results[2]))


for _name in Codebook.uncalled:
    setattr(Codebook, _name, Kept(vars(Codebook)[_name]))  # and no __setattr__, which all that a call writes would go through


def _write_(old: Tensor, new: Tensor, outside: Tensor | bool) -> None:
    """As the peer writes: what a user's own graph has kept of the buffer is no error."""
    if outside is True:
        old.data.copy_(new)
    else:
        old.copy_(torch.where(cast(Tensor, outside), new, old))
