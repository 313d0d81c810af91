"""What each of two processes does with the classes of the facade in DDP and FSDP2, one case after the other, and one process with all.

For DDP the modules are made before there is a process group, each process with another seed: it gives all the state of the first.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import vqkit.compat.vector_quantize_pytorch as facade

WORLD, DIM, CODES = 2, 8, 12
LEARNED = {"learnable_codebook": True, "ema_update": False}
sgd = partial(torch.optim.SGD, lr=0.5)


@dataclass(frozen=True)
class Case:
    """A class, what it is made and called with, and the vectors that each process has in each step."""

    kind: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    calls: dict[str, Any] = field(default_factory=dict)
    shares: tuple[tuple[int, int], ...] = ((12, 12), (5, 19), (24, 0))
    learns: bool = False
    of_items: bool = False  # whether it is items that are shared out, not the vectors of one

    def make(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        sizes = {} if "LFQ" in self.kind or "FSQ" in self.kind else {"codebook_size": CODES}
        return getattr(facade, self.kind)(**{"dim": DIM, **sizes, **self.kwargs})


EQUAL = ((12, 12), (8, 8), (16, 16))
ITEMS = ((2, 2), (1, 3), (3, 0))
LEVELS = {"scales": (1, 2, 4), "kmeans_init": False, "channel_first": False, "threshold_ema_dead_code": 0}
ENTROPY = {"entropy_loss_weight": 0.05}  # more, and a layer after another, and rounding alone parts them in three steps
_VQ = partial(Case, "VectorQuantize")
_RVQ = partial(Case, "ResidualVQ")
CASES: dict[str, Case] = {
    "averages": _VQ(),
    "cosine": _VQ({"use_cosine_sim": True}),
    "heads": _VQ({"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True}),
    "affine": _VQ({"affine_param": True}),
    "own optimizer": _VQ({**LEARNED, "in_place_codebook_optimizer": sgd}),
    "projected": _VQ({"codebook_dim": 4}, shares=EQUAL, learns=True),
    "learnable": _VQ(LEARNED, shares=EQUAL, learns=True),
    "k-means": _VQ({"kmeans_init": True, "kmeans_iters": 30, "codebook_size": 4}, shares=((24, 24), (48, 0))),
    "k-means, an empty process": _VQ({"kmeans_init": True, "kmeans_iters": 30, "codebook_size": 4}, shares=((0, 48), (24, 24))),
    "dead codes": _VQ({"threshold_ema_dead_code": 2, "decay": 0.5}),
    "residual": _RVQ({"num_quantizers": 3}),
    "residual, shared": _RVQ({"num_quantizers": 3, "shared_codebook": True}),
    "residual, dropped": _RVQ({"num_quantizers": 3, "quantize_dropout": True}, {"rand_quantize_dropout_fixed_seed": 1}),
    "residual, drawn depth": _RVQ({"num_quantizers": 3, "quantize_dropout": True}),
    "residual, networks": _RVQ({"num_quantizers": 3, "implicit_neural_codebook": True}, shares=EQUAL, learns=True),
    "residual, k-means": _RVQ({"num_quantizers": 2, "kmeans_init": True, "codebook_size": 4}, shares=((24, 24), (48, 0))),
    "groups": Case("GroupedResidualVQ", {"num_quantizers": 2, "groups": 2}),
    "groups, dropped": Case("GroupedResidualVQ", {"num_quantizers": 3, "groups": 2, "quantize_dropout": True}),
    "levels": Case("HierarchicalVQ", {**LEVELS, "shared_codebook": False}, shares=ITEMS, of_items=True),
    "levels, shared": Case("HierarchicalVQ", LEVELS, shares=ITEMS, of_items=True),
    "SimVQ": Case("SimVQ", shares=EQUAL, learns=True),
    "SimVQ, residual": Case("ResidualSimVQ", {"num_quantizers": 2}, shares=EQUAL, learns=True),
    "SimVQ, an empty process": Case("ResidualSimVQ", {"num_quantizers": 2}, learns=True),
    "lookup-free, residual": Case("ResidualLFQ", {"num_quantizers": 2, "codebook_size": 16, **ENTROPY}, shares=EQUAL, learns=True),
    "lookup-free, an empty process": Case("ResidualLFQ", {"num_quantizers": 2, "codebook_size": 16, **ENTROPY}, learns=True),
    "scalars": Case("FSQ", {"levels": [5, 3]}, shares=EQUAL, learns=True),
    "scalars, residual": Case("ResidualFSQ", {"levels": [5, 3], "num_quantizers": 2}, shares=EQUAL, learns=True),
    "scalars, an empty process": Case("ResidualFSQ", {"levels": [5, 3], "num_quantizers": 2}, learns=True),
    "lookup-free": Case("LFQ", {"codebook_size": 16, "entropy_loss_weight": 0.5}, shares=EQUAL, learns=True),
}
SHARDED = (
    "averages",
    "projected",
    "learnable",
    "residual",
    "lookup-free",
    "groups",
    "levels",
    "levels, shared",
    "SimVQ",
    "SimVQ, residual",
    "lookup-free, residual",
    "scalars",
    "scalars, residual",
)
"""Those that FSDP2 is tried with, too."""


class Net(nn.Module):
    """A layer before the quantizer, whose every parameter takes part in every step, as DDP asks for."""

    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.quantizer = quantizer

    def forward(self, x: Tensor, **calls: Any) -> tuple[Tensor, Tensor]:
        """The loss, and the unweighted mean of what the quantizer returns as one."""
        quantized, *found = self.quantizer(x * self.scale, **calls)
        loss = found[1] if len(found) > 1 else quantized.new_zeros(1)
        unused = sum(0.0 * parameter.sum() for parameter in self.parameters())
        total = quantized.sin().mean() if quantized.numel() else quantized.sum()
        return total + loss.sum() + unused, loss.detach().mean()


def vectors(case: Case, step: int) -> Tensor:
    """[1, N, D], those of all processes, or [B, 8, D], their items."""
    generator, number = torch.Generator().manual_seed(step), sum(case.shares[step])
    return torch.randn(*((number, 8) if case.of_items else (1, number)), DIM, generator=generator)


def steps(case: Case, net: Net, call: Callable[..., Any], share: Callable[[Tensor, int], Tensor]) -> Iterator[dict[str, Tensor]]:
    """The state after each step, and its loss."""
    for step in range(len(case.shares)):
        net.zero_grad()
        total, loss = call(share(vectors(case, step), step), **case.calls)
        total.backward()
        if case.learns:
            with torch.no_grad():
                for parameter in net.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.1 * parameter.grad
        yield {name: _whole(value) for name, value in net.state_dict().items()} | {"loss": loss}


def _whole(value: Tensor) -> Tensor:
    value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.detach().clone()


def on_rank(rank: int, folder: str) -> None:
    """All cases, their states in a file."""
    torch.set_num_threads(1)
    nets = {name: Net(case.make(seed=rank)) for name, case in CASES.items()}
    method = f"file://{folder}/group"
    torch_dist.init_process_group("gloo", init_method=method, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    results: dict[str, Any] = {}
    wrapped = [(name, name, nets[name], DistributedDataParallel) for name in CASES]
    wrapped += [(f"{name}, sharded", name, Net(CASES[name].make(seed=0)), fully_shard) for name in SHARDED]
    for key, name, net, wrap in wrapped:
        torch.manual_seed(10 + rank)
        sizes, axis = CASES[name].shares, 0 if CASES[name].of_items else 1
        try:
            results[key] = [*steps(CASES[name], net, wrap(net), lambda x, step, sizes=sizes, axis=axis: x.split(sizes[step], axis)[rank])]
        except Exception:
            results[key] = traceback.format_exc()
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    torch_dist.barrier()
    torch_dist.destroy_process_group()


def alone(case: Case) -> list[dict[str, Tensor]]:
    """The same in one process, with the vectors of all."""
    net = Net(case.make(seed=0))
    torch.manual_seed(10)
    return [*steps(case, net, net, lambda x, step: x)]
