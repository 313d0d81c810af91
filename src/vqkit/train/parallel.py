"""One run on several processes: the group, what each process computes, and DDP or FSDP2 around the model. One process needs none of it.

`torchrun --nproc-per-node N -m vqkit train ...` starts N processes that find each other by the environment; everything that must be
equal on all of them goes through `Processes.reducer`. The batch of a step is the same for every number of processes: each takes a
consecutive share of its rows.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from vqkit.dist import LocalReducer, ProcessGroupReducer, Reducer, has_default_group, is_sharded
from vqkit.models import TransformerVQ

Parallel = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class Processes:
    """The processes that train one model, as one of them sees them."""

    device: torch.device
    reducer: Reducer

    @property
    def rank(self) -> int:
        return self.reducer.rank

    @property
    def world_size(self) -> int:
        return self.reducer.world_size

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes what is written once, and speaks."""
        return self.rank == 0

    def wait(self) -> None:
        """Until every process has come here."""
        if self.world_size > 1:
            torch_dist.barrier()

    def from_first(self, value: Any) -> Any:
        """`value` of the first process, on all."""
        if self.world_size == 1:
            return value
        values = [value]
        torch_dist.broadcast_object_list(values, src=0, device=self.device if self.device.type == "cuda" else None)
        return values[0]


@contextlib.contextmanager
def joined(device: str) -> Iterator[Processes]:
    """The processes of this run: those that torchrun started, those of a default group that is there, or this one alone.

    `device` is "auto", "cpu" or "cuda". A group that is made here ends here. An error that leaves it has `of_another_process`, which says
    whether another process failed before: then it is a consequence, or the same once more, and nobody needs to be told of it.
    Raises ValueError for a device that is not there.
    """
    here = resolve_device(device)
    started_by_torchrun = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
    if not has_default_group() and not started_by_torchrun:
        yield Processes(here, LocalReducer())
        return
    if here.type == "cuda":
        here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(here)
    if has_default_group():
        yield Processes(here, ProcessGroupReducer())
        return
    torch_dist.init_process_group("nccl" if here.type == "cuda" else "gloo")
    _never_free(torch_dist.group.WORLD)
    try:
        yield Processes(here, ProcessGroupReducer())
        torch_dist.barrier()  # the first process keeps the address book that the others still need
    except BaseException as error:
        error.of_another_process = not _is_first_to_fail()  # type: ignore[attr-defined]
        raise
    finally:
        torch_dist.destroy_process_group()


def _is_first_to_fail() -> bool:
    """Write this process down as the one that failed, unless another one is written there."""
    own = str(torch_dist.get_rank())
    try:
        return torch_dist.distributed_c10d._get_default_store().compare_set("vqkit/failed", "", own).decode() == own
    except torch_dist.DistError:  # who kept the store is gone, hence failed before
        return False


def _never_free(group: Any) -> None:
    """Keep a group as long as the process lives.

    The reducer of DDP would be the last to let go of it, and would wait, with the interpreter locked, for threads of the group that may
    be waiting for just that lock to free a tensor: seen under load as a process that never ends (gloo, torch 2.13).
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


def resolve_device(name: str) -> torch.device:
    """The device of `train.device`. Raises ValueError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError('train.device = "cuda": torch finds no CUDA device; use "auto" or "cpu"')
    return torch.device(name)


def distribute(model: TransformerVQ, processes: Processes, parallel: Parallel) -> nn.Module:
    """What a training step calls in place of `model`: the model itself where it is alone or sharded, DDP around it else.

    "fsdp" shards the parameters of `model` in place, layer by layer; codebooks are buffers and stay whole on every process.
    """
    if processes.world_size == 1:
        return model
    if parallel == "ddp":
        # Codebooks stay equal by themselves: their statistics are summed where they are committed.
        return DistributedDataParallel(model, forward_sync_buffers=False, gradient_as_bucket_view=True)
    # Layers return views; nothing here writes into an output, which is what torch warns of.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    whole = _unshardable(model)
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model, ignored_params=set(whole))
    return model


def set_gradient_sync_(module: nn.Module, on: bool) -> None:
    """Whether the next backward of what `distribute` returned sums gradients over the processes; off for all but the last micro-batch."""
    if isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = on
    elif isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(on)


def average_unsharded_gradients_(module: nn.Module, reducer: Reducer) -> None:
    """Average over the processes the gradients that FSDP2 leaves alone, those of scalars."""
    if isinstance(module, FSDPModule):
        for parameter in _unshardable(module):
            if parameter.grad is not None:
                reducer.all_reduce_(parameter.grad)
                parameter.grad /= reducer.world_size


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of `tensor`, of which this process may hold a part; every process has to ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def like_parameter(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The whole `tensor` cut and placed as `parameter` is."""
    if not is_sharded(parameter) or tensor.shape != parameter.shape:
        return tensor.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]


def _unshardable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.dim() == 0]
