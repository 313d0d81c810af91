"""Commits: the places where the codebooks of a whole model change, and where the processes that train it meet.

Every rank takes part in every sum, with zeros when it saw nothing.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vqkit.dist import Reducer, default_reducer, is_sharded, register_forward_methods
from vqkit.ops.codebook import CodebookStatistics, largest_keys, pool_moments
from vqkit.ops.precision import is_traced, may_look
from vqkit.quantizers.committed import Committed, Counting
from vqkit.quantizers.config import Commit, check_choice

_SLOTTED = ("candidates", "keys", "vectors", "moments")
"""What the statistics of the ranks are merged by, one by one."""

Statistics: TypeAlias = "CodebookStatistics | Sequence[Statistics] | None"
"""One entry a codebook, nested as the quantizers are; None where nothing was counted."""


_ATTACHED: weakref.WeakKeyDictionary[Committed, RemovableHandle] = weakref.WeakKeyDictionary()
"""The step hook that commits each codebook."""


class Committing(nn.Module):
    """A module with a choice of when its codebooks change."""

    _commit: Commit = "auto"

    @property
    def commit(self) -> Commit:
        """ "auto": after every training forward, as seen from outside; "manual": by `update_codebooks_`. Setting it reaches all parts."""
        return self._commit

    @commit.setter
    def commit(self, commit: Commit) -> None:
        check_choice("commit", commit, ("auto", "manual"))
        for module in self.modules():
            if isinstance(module, Committing):
                module._commit = commit
            if isinstance(module, Committed) and module.auto != (commit == "auto"):
                module.settle_()
                module.discard_pending_()
                module.auto = commit == "auto"


def flatten_statistics(statistics: Statistics) -> list[CodebookStatistics | None]:
    """The entries of nested statistics, in order."""
    if statistics is None or isinstance(statistics, CodebookStatistics):
        return [statistics]
    return [entry for part in statistics for entry in flatten_statistics(part)]


def add_statistics_(model: nn.Module, statistics: Statistics) -> None:
    """Add one micro-batch's statistics, one entry a codebook in the order of `model.modules()`; an entry None adds nothing.

    For models that return statistics as outputs. A quantizer that is called adds its own.
    """
    codebooks = [module for module in model.modules() if isinstance(module, Counting)]
    entries = flatten_statistics(statistics)
    if len(entries) != len(codebooks):
        raise ValueError(f"statistics has {len(entries)} entries: must be {len(codebooks)}, one a quantizer of the model")
    pairs = [(codebook, entry) for codebook, entry in zip(codebooks, entries, strict=True) if entry is not None]
    for codebook, entry in pairs:
        codebook.check_statistics(entry)
    for codebook, entry in pairs:
        codebook.add_statistics_(entry)


def update_codebooks_(model: nn.Module, reducer: Reducer | None = None) -> None:
    """The one place where codebooks change: call it once per optimizer step, on every rank.

    Sums what is pending over the ranks of `reducer` (one all-reduce for all codebooks; None: the default process group if there is one
    now, else this process alone), makes one step of each codebook, replaces dead codes where the configuration says so, counts the
    update and empties what is pending. Raises ValueError for quantizers that commit by themselves (commit="auto"), TypeError for what is
    no module; warns where no rank has counted anything since the last update, which then only shrinks the moving averages.
    """
    if not isinstance(model, nn.Module):
        inner = "; pass its .model" if isinstance(getattr(model, "model", None), nn.Module) else ""
        raise TypeError(f"model is a {type(model).__name__}: must be a torch.nn.Module{inner}")
    _update_(model, reducer, None)


def _warn_of_nothing(codebooks: Sequence[Counting], statistics: Sequence[CodebookStatistics], reducer: Reducer) -> None:
    """Warn where nothing was added to any codebook. A device is waited for until something was, and only after compiled forwards."""
    learning = [(codebook, entry) for codebook, entry in zip(codebooks, statistics, strict=True) if codebook.counts and not codebook.frozen]
    if is_traced() or not learning or any(codebook.added for codebook, _ in learning):
        return
    if all(codebook.has_counted for codebook, _ in learning) and not may_look(learning[0][1].vectors):
        return
    counted = [bool((entry.vectors + entry.non_finite).any()) for _, entry in learning]
    for (codebook, _), found in zip(learning, counted, strict=True):
        codebook.has_counted = codebook.has_counted or found
    if not any(counted) and reducer.rank == 0:
        warnings.warn(
            "update_codebooks_: nothing was counted since the last update, so this one only makes moving averages smaller: call it once "
            "for each step, after forwards in training mode; where a model returns its statistics, after add_statistics_(model, them)",
            stacklevel=5,
        )


def discard_statistics_(model: nn.Module) -> None:
    """Drop what is pending in all codebooks of the model: that of a step which is not taken. Every rank or none."""
    for module in model.modules():
        if isinstance(module, Committed):
            module.discard_pending_()


@torch.no_grad()
def _update_(model: nn.Module, reducer: Reducer | None, refused: Tensor | None) -> None:
    """As `update_codebooks_`; where any rank's `refused` is not 0, what is pending is dropped instead."""
    members = [module for module in model.modules() if isinstance(module, Committed)]
    codebooks = [member for member in members if isinstance(member, Counting)]
    for member in members:
        if member.auto:
            raise ValueError('commit = "auto": these quantizers commit by themselves; make them with commit="manual", or call attach first')
    for codebook in codebooks:
        codebook.check_commit()
    reducer = default_reducer() if reducer is None else reducer
    flags = [] if refused is None or not members else [refused.detach().reshape(1).to(members[0].updates.device)]
    reduced, flags = _reduce([codebook.pending for codebook in codebooks], flags, reducer)
    applied = flags[0].squeeze(0) == 0 if flags else None
    if refused is None:  # by hand, not by the hook of an optimizer
        _warn_of_nothing(codebooks, reduced, reducer)
    for codebook, statistics in zip(codebooks, reduced, strict=True):
        if statistics is not codebook.pending:
            codebook.replace_statistics_(statistics, True)
        codebook.commit_pending_(applied)
    for member in members:
        if not isinstance(member, Counting):
            member.commit_pending_(applied)


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    scaler: torch.amp.GradScaler | None = None,
    reducer: Reducer | None = None,
) -> RemovableHandle:
    """Commit the codebooks of `model` after every step of `optimizer`, by a hook; call it on every rank, once a model.

    Switches the quantizers of the model to commit="manual" and makes the codebooks equal on all ranks. Where several optimizers train
    the model, as in a GAN, attach to the one whose steps the codebooks are to follow. Remove the handle to end it. `reducer` as for
    `update_codebooks_`, asked at every step.

    A step that a GradScaler skips, as gradients are not finite, commits nothing and drops what is pending, on all ranks if on any. An
    optimizer that takes the scale itself (fused) is told of it; any other is not even called, so name the `scaler`, whose method `step`
    is watched. Without it what is pending waits for the next step, as if the skipped batch had been accumulated.

    Raises ValueError, and changes nothing, where the model has no quantizer and where an optimizer commits any of its codebooks already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: must be a module, and the optimizer the second argument")
    members = [module for module in model.modules() if isinstance(module, Committed)]
    if not members:
        raise ValueError(f"model is a {type(model).__name__} without a quantizer: there is nothing to commit")
    if any(_is_live(_ATTACHED.get(member)) for member in members):
        raise ValueError(
            "model: an optimizer commits its codebooks already, and two would commit twice a step; "
            "attach to one optimizer alone, or first remove() the handle that attach returned"
        )
    for module in model.modules():
        if isinstance(module, Committing):
            module.commit = "manual"
    synchronize_codebooks_(model, reducer)
    known = weakref.ref(model)

    def commit(refused: Tensor) -> None:
        if (model := known()) is not None:
            _update_(model, reducer, refused)

    def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        found = getattr(optimizer, "found_inf", None)  # set by a GradScaler around a step that takes the scale itself
        commit(torch.zeros(()) if found is None else found)

    handle = optimizer.register_step_post_hook(after_step)
    _ATTACHED.update(dict.fromkeys(members, handle))
    if scaler is not None:
        _watch_skipped(scaler, optimizer, handle, lambda: commit(torch.ones(())))
    return handle


def _is_live(handle: RemovableHandle | None) -> bool:
    """Whether the hook is still there, and its optimizer."""
    hooks = None if handle is None else handle.hooks_dict_ref()
    return handle is not None and hooks is not None and handle.id in hooks


def _watch_skipped(
    scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer, handle: RemovableHandle, skipped: Callable[[], None]
) -> None:
    """Call `skipped` after each `scaler.step(optimizer)` that does not call the optimizer, as long as `handle` is not removed."""
    step, own = scaler.step, weakref.ref(optimizer)

    @functools.wraps(step)
    def watched(stepped: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        if stepped is not own() or not _is_live(handle):
            return step(stepped, *args, **kwargs)
        calls: list[bool] = []
        hook = stepped.register_step_pre_hook(lambda *_: calls.append(True))
        try:
            result = step(stepped, *args, **kwargs)
        finally:
            hook.remove()
        if not calls:
            skipped()
        return result

    scaler.step = watched


@torch.no_grad()
def synchronize_codebooks_(model: nn.Module, reducer: Reducer | None = None) -> None:
    """Give all ranks the codebooks of the first one: once at the start, where nothing else does it (DDP does, FSDP2 does not).

    Parameters that are sharded are equal by nature and left alone. What is pending stays with its rank.
    """
    reducer = default_reducer() if reducer is None else reducer
    members = [module for module in model.modules() if isinstance(module, Committed)]
    if reducer.world_size == 1 or not members:
        return
    for member in members:
        member.settle_()
    tensors = [tensor for member in members for tensor in member.committed_state().values() if not is_sharded(tensor)]
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        alike = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in alike])
        if reducer.rank != 0:
            flat.zero_()
        reducer.all_reduce_(flat)
        for tensor, value in zip(alike, flat.split([tensor.numel() for tensor in alike]), strict=True):
            tensor.copy_(value.view(tensor.shape))
    codebooks = [member for member in members if isinstance(member, Counting)]
    flags = torch.tensor([float(codebook.initialized and reducer.rank == 0) for codebook in codebooks], device=tensors[0].device)
    reducer.all_reduce_(flags)
    for codebook, flag in zip(codebooks, flags.tolist(), strict=True):
        codebook.initialized = flag > 0


def register_fsdp_methods(model: nn.Module) -> None:
    """Let `encode`, `decode`, `decode_codes` and `quantize` work on the quantizers of `model` that `fully_shard` has wrapped."""
    for module in model.modules():
        names = [name for name in ("encode", "decode", "decode_codes", "quantize") if callable(getattr(type(module), name, None))]
        if names and any(isinstance(part, Committed) for part in module.modules()):
            register_forward_methods(module, names)


# Sums over the ranks


def reduce_in_forward(entries: list[CodebookStatistics], reducer: Reducer | None) -> list[CodebookStatistics]:
    """The statistics of all ranks, summed inside a forward: one all-reduce over `reducer`, or over the default group of this moment."""
    if not entries or (reducer is not None and reducer.world_size == 1):
        return entries
    if reducer is None and torch.compiler.is_compiling():
        fields = len(CodebookStatistics._fields)
        flat = torch.ops.vqkit.reduce_statistics([tensor for entry in entries for tensor in entry])
        return [CodebookStatistics(*flat[i : i + fields]) for i in range(0, len(flat), fields)]
    return _reduce(entries, [], default_reducer() if reducer is None else reducer)[0]


def sum_in_forward(values: Tensor, reducer: Reducer | None) -> Tensor:
    """`values` summed over the ranks inside a forward, and again in its recomputation, which needs them, too: all ranks call it alike."""
    if reducer is None and torch.compiler.is_compiling():
        return torch.ops.vqkit.sum_over_ranks(values)
    total = values.clone()
    (default_reducer() if reducer is None else reducer).all_reduce_(total)
    return total


@torch.library.custom_op("vqkit::sum_over_ranks", mutates_args=(), tags=torch.Tag.cudagraph_unsafe)
def _sum_over_ranks(values: Tensor) -> Tensor:
    total = values.clone(memory_format=torch.contiguous_format)
    default_reducer().all_reduce_(total)
    return total


@_sum_over_ranks.register_fake
def _(values: Tensor) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


@torch.library.custom_op("vqkit::reduce_statistics", mutates_args=(), tags=torch.Tag.cudagraph_unsafe)
def _reduce_statistics(tensors: Sequence[Tensor]) -> list[Tensor]:
    """One opaque step of a compiled graph, so that the process group is asked for at every run; nothing is sent in a recomputation."""
    reducer = default_reducer()
    if reducer.world_size == 1 or torch._C._current_graph_task_id() != -1:
        return [tensor.clone() for tensor in tensors]
    fields = len(CodebookStatistics._fields)
    entries = [CodebookStatistics(*tensors[i : i + fields]) for i in range(0, len(tensors), fields)]
    return [tensor.clone() for entry in _reduce(entries, [], reducer)[0] for tensor in entry]


@_reduce_statistics.register_fake
def _(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in tensors]


def _reduce(entries: list[CodebookStatistics], flags: list[Tensor], reducer: Reducer) -> tuple[list[CodebookStatistics], list[Tensor]]:
    """What all ranks have: flags and sums added up; what is no sum stands in a slot of each rank's own, and is merged afterwards."""
    if reducer.world_size == 1 or not (entries or flags):
        return entries, flags
    dtype = torch.float64 if any(entry.sum.dtype == torch.float64 for entry in entries) else torch.float32
    slots = [entry._replace(**{name: _in_slot(getattr(entry, name), reducer) for name in _SLOTTED}) for entry in entries]
    parts = [*flags, *(tensor for entry in slots for tensor in entry)]
    flat = torch.cat([part.reshape(-1).to(dtype) for part in parts])
    reducer.all_reduce_(flat)
    summed = [piece.view(part.shape) for piece, part in zip(flat.split([part.numel() for part in parts]), parts, strict=True)]
    flags, summed = summed[: len(flags)], summed[len(flags) :]
    fields = len(CodebookStatistics._fields)
    return [_merge_slots(CodebookStatistics(*summed[i : i + fields])) for i in range(0, len(summed), fields)], flags


def _in_slot(rows: Tensor, reducer: Reducer) -> Tensor:
    slots = rows.new_zeros((reducer.world_size, *rows.shape))
    slots[reducer.rank] = rows
    return slots


def _merge_slots(summed: CodebookStatistics) -> CodebookStatistics:
    """One choice of candidates, one mean: of statistics whose `_SLOTTED` fields have an axis of ranks in front."""
    candidates, keys = (slots.movedim(0, 1).flatten(1, 2) for slots in (summed.candidates, summed.keys))
    candidates, keys = largest_keys(candidates, keys, summed.keys.shape[-1])
    moments = pool_moments(summed.vectors, summed.moments)
    return summed._replace(candidates=candidates, keys=keys, vectors=summed.vectors.sum(0), moments=moments)
