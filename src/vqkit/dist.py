"""The one place that knows process groups: a `Reducer` sums a tensor over all processes that train one model.

Everything that must be equal on all ranks goes through the reducer that its caller was given, so that one process needs no process
group, and tests can bring their own.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


class Reducer(Protocol):
    """Sums over the processes of a group; every rank makes the same calls in the same order."""

    @property
    def world_size(self) -> int:
        """Number of processes."""
        ...

    @property
    def rank(self) -> int:
        """This process among them, from 0."""
        ...

    def all_reduce_(self, flat: Tensor) -> None:
        """Replace `flat`, of equal shape and dtype on every rank, by its sum over the ranks."""
        ...


class LocalReducer:
    """One process: every sum is complete already."""

    world_size = 1
    rank = 0

    def all_reduce_(self, flat: Tensor) -> None:
        pass


class ProcessGroupReducer:
    """The processes of `group`, or of whatever group is the default one when a method is called.

    Raises RuntimeError where there is no process group.
    """

    def __init__(self, group: torch_dist.ProcessGroup | None = None) -> None:
        self.group = group

    @property
    def world_size(self) -> int:
        return torch_dist.get_world_size(self._resolve())

    @property
    def rank(self) -> int:
        return torch_dist.get_rank(self._resolve())

    def all_reduce_(self, flat: Tensor) -> None:
        """See `Reducer`. Raises ValueError when `flat` is not contiguous, before anything is sent."""
        group = self._resolve()
        if not flat.is_contiguous():
            raise ValueError(f"flat has strides {flat.stride()} for shape {tuple(flat.shape)}: must be contiguous")
        torch_dist.all_reduce(flat.detach(), op=torch_dist.ReduceOp.SUM, group=group)

    def _resolve(self) -> torch_dist.ProcessGroup | None:
        if self.group is None and not has_default_group():
            raise RuntimeError("there is no process group: call torch.distributed.init_process_group first, or use LocalReducer")
        return self.group


def default_reducer() -> Reducer:
    """The default process group if there is one now, else this process alone. Ask again rather than keep the answer."""
    return ProcessGroupReducer() if has_default_group() else LocalReducer()


def has_default_group() -> bool:
    """Whether there is a default process group now."""
    return torch_dist.is_available() and torch_dist.is_initialized()


def is_first_process() -> bool:
    """Whether this process is alone, or the first of those that torchrun started: the one that speaks."""
    return int(os.environ.get("RANK", "0")) == 0


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds but a part of `tensor` (a DTensor, as FSDP2 makes of parameters)."""
    return hasattr(tensor, "device_mesh")


def is_managed(module: nn.Module) -> bool:
    """Whether FSDP2 (`fully_shard`) manages what `module` itself holds: its parameters are whole inside a forward, and sharded outside."""
    return module.__dict__.get("_is_fsdp_managed_module", False)  # it is asked in every call, and a search that fails is slow


def own_storage(tensor: Tensor) -> Tensor:
    """`tensor`, copied where it is a view of another: what FSDP2 hands out must be none, as it hooks on to it."""
    return tensor if tensor._base is None else tensor.clone()


def register_forward_methods(module: nn.Module, names: Iterable[str]) -> None:
    """Let these methods of `module` gather its parameters as its forward does, where FSDP2 has sharded it; else nothing happens."""
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    for name in names if isinstance(module, FSDPModule) else ():
        setattr(module, name, _without_views(getattr(module, name)))
        register_fsdp_forward_method(module, name)


def _without_views(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return tree_map_only(Tensor, own_storage, method(*args, **kwargs))

    return call
