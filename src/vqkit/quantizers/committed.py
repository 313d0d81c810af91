"""State of a module that commits alone change, and the statistics of vectors that wait for a commit.

No forward writes what it reads. What a forward adds is pending until a commit makes it part of the state. With automatic commits readers
already see the value after the commit, and write nothing: what is pending names the commit that it follows, so that committing it early,
twice or on one rank alone changes nothing.

Shapes: H heads with a codebook each, C codes, K width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from vqkit.dist import Reducer
from vqkit.ops.codebook import CodebookStatistics, merge_statistics
from vqkit.ops.precision import is_traced, may_look
from vqkit.ops.usage import active_fraction, perplexity, relative_error
from vqkit.quantizers.update import State

WIDE = (torch.float32, torch.float64)
"""What the state is kept in, and never made narrower."""

# Whether a forward is the recomputation of another one


@torch.library.custom_op("vqkit::outside_backward", mutates_args=(), tags=torch.Tag.cudagraph_unsafe)
def _outside_backward(like: Tensor) -> Tensor:
    return torch.full((), not in_backward(), dtype=torch.bool, device=like.device)


@_outside_backward.register_fake
def _(like: Tensor) -> Tensor:
    return like.new_empty((), dtype=torch.bool)


def in_backward() -> bool:
    """Whether a backward is running."""
    return torch._C._current_graph_task_id() != -1


def outside_backward(like: Tensor) -> Tensor | bool:
    """Whether no backward is running: a bool, or inside a compiled graph a bool tensor on the device of `like`, asked at every run."""
    return _outside_backward(like.detach()) if torch.compiler.is_compiling() else not in_backward()


class Entered(NamedTuple):
    """What the forward says that a member takes part in."""

    learning: bool
    frozen: bool
    reducer: Reducer | None


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
        self._entered: Entered | None = None

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
        if not self.training or not self.auto or self._entered:
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
        object.__setattr__(self, "_entered", Entered(learning, frozen, reducer))  # in every call: no search for a parameter of the name

    @property
    def is_entered(self) -> bool:
        """Whether a forward has begun, and not ended."""
        return self._entered is not None

    def leave_(self) -> None:
        object.__setattr__(self, "_entered", None)

    def settle_(self, outside: Tensor | bool = True) -> None:
        """Commit what is pending, unless it was committed before or, in a recomputation, was added since (`outside` False)."""
        if outside is False or not self.auto:
            return
        self._follow_device_()
        applied = self.follows == self.updates
        if outside is not True:
            applied = applied & outside
        known = may_look(applied)
        if not known or applied:
            with torch.no_grad():
                self._write_(None if known else applied)

    @torch.no_grad()
    def pend_(self, outside: Tensor | bool = True) -> None:
        """What is pending now follows the last commit."""
        if outside is True:
            self.follows.copy_(self.updates)
        elif outside is not False:
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
        _zero_(self._pending_tensors().values())
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
            if not tensor.is_floating_point() or moved.dtype in WIDE:
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


def _zero_(tensors: Iterable[Tensor]) -> None:
    """In one call of torch."""
    if filled := [tensor for tensor in tensors if tensor.numel()]:
        torch._foreach_zero_(filled)


def _where_changed(live: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` where `live`; what stays as it was keeps its gradient."""
    return torch.where(live & (new != old), new, old)


class Counting(Committed):
    """Statistics of the vectors that were assigned to `size` codes: those that wait for a commit, and those that the last commit saw.

    `pending` is no buffer, so that nothing broadcasts over it, but moves with the module and stands in the state dict. `last` keeps the
    sums of the vectors out.
    """

    initialized = True
    """Whether codes can be read."""
    frozen: Any = False
    """Whether commits change nothing."""
    added = False
    """Whether statistics were added since the last commit, outside compiled programs."""
    has_counted = False
    """Whether an update by hand has seen any vector that a compiled program added."""

    def __init__(self, size: int, pending: CodebookStatistics, *, device: torch.device | str | None = None) -> None:
        super().__init__(device=device)
        self.size = size
        self.pending = pending
        self.last = pending._replace(**{name: torch.zeros_like(tensor) for name, tensor in pending._asdict().items()})
        self.last = self.last._replace(sum=pending.sum.new_zeros(pending.sum.shape[0], 0, pending.sum.shape[2]))

    def codes(self) -> Tensor:
        """[H, C, K] float32 or float64: what a forward reads."""
        raise NotImplementedError

    def check_commit(self) -> None:
        """Raise ValueError where a commit is impossible."""

    # Counting

    @property
    def counts(self) -> bool:
        """Whether a commit has any use for statistics."""
        return True

    def check_statistics(self, statistics: CodebookStatistics) -> None:
        """Raise ValueError for shapes that are not those of what is pending."""
        for name, new, pending in zip(statistics._fields, statistics, self.pending, strict=True):
            if new.shape != pending.shape:
                raise ValueError(f"statistics.{name} has shape {tuple(new.shape)}: must be {tuple(pending.shape)}")

    @torch.no_grad()
    def add_statistics_(self, statistics: CodebookStatistics, outside: Tensor | bool | None = None) -> None:
        """Add to what is pending; in a recomputation, which runs inside a backward, add nothing."""
        self.check_statistics(statistics)
        if not torch.compiler.is_compiling():
            self.added = True
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
        if outside is True and not is_traced():
            own, found = ([tensor for tensor in tensors if tensor.numel()] for tensors in (self.pending, statistics))
            torch._foreach_copy_(own, found)  # one call of torch in place of one a field
            return
        for pending, new in zip(self.pending, statistics, strict=True):
            if pending.numel():
                pending.copy_(new if outside is True else torch.where(outside, new.to(pending.dtype), pending))

    # Committing

    @torch.no_grad()
    def commit_pending_(self, applied: Tensor | None = None) -> None:
        for last, pending in zip(self.last, self.pending._replace(sum=self.last.sum), strict=True):
            last.copy_(pending if applied is None else torch.where(applied, pending, last))
        super().commit_pending_(applied)

    @torch.no_grad()
    def discard_pending_(self) -> None:
        super().discard_pending_()
        self.added = False
        _zero_(self.pending)

    def forget_pending_(self) -> None:
        _zero_(self.last)
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
        found = {name: value.where(counted.vectors > 0, torch.nan).nanmean() for name, value in self._usage(counted.count).items()}
        if counted.moments.shape[-1]:
            error = relative_error(counted.squared_error, counted.vectors, counted.moments)
            found["relative_error"] = error.where(counted.vectors > 0, torch.nan).nanmean()
        found |= {"non_finite": counted.non_finite.mean(), "vectors": counted.vectors.mean()}
        return {"codes": float(self.size), **{name: value.item() for name, value in found.items()}}

    def _usage(self, count: Tensor) -> dict[str, Tensor]:
        """[H] each, of `pending.count` as the last commit left it."""
        return {"perplexity": perplexity(count), "active": active_fraction(count), "dead": self._dead_fraction(count)}

    def _dead_fraction(self, chosen: Tensor) -> Tensor:
        """[H], of the codes; `chosen` [H, C] as often in the last commit."""
        return rare_fraction(chosen)

    # Moving and storing

    def _pending_tensors(self) -> dict[str, Tensor]:
        pending = {f"pending.{name}": tensor for name, tensor in self.pending._asdict().items()}
        return pending | {f"last.{name}": tensor for name, tensor in self.last._asdict().items()}

    def _replace_pending(self, tensors: dict[str, Tensor]) -> None:
        self.pending = CodebookStatistics(**{name: tensors[f"pending.{name}"] for name in CodebookStatistics._fields})
        self.last = CodebookStatistics(**{name: tensors[f"last.{name}"] for name in CodebookStatistics._fields})

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        nothing = self.auto or self.frozen  # the state is that after the commit
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
        pending = {name: f"{prefix}pending.{name}" for name in self.pending._fields}
        unexpected_keys[:] = [key for key in unexpected_keys if key not in pending.values()]
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


def rare_fraction(count: Tensor) -> Tensor:
    """[H], the share of the codes whose count [H, C] is below a hundredth of an even share."""
    return (count < 0.01 * count.mean(-1, keepdim=True)).to(count.dtype).mean(-1)
