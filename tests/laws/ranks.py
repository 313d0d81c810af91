"""What every process of the engine laws does: all cases, one after the other, in one process group.

Each case takes the same steps as the single process of `test_process_laws.py` does on the vectors of all ranks. The states after each
step are written to a file, so that one test a case can compare them.
"""

from __future__ import annotations

import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from laws.drive import call, commit_, committed, objective, started
from laws.family import CASES, Case
from vqkit.dist import default_reducer
from vqkit.quantizers import synchronize_codebooks_

MICRO = 2
UNEVEN = [(3, 1), (2, 2), (1, 3), (2, 1)]  # batch sizes of the micro-batches of each rank


class Net(nn.Module):
    """A layer before the quantizer, whose every parameter takes part in every step, as DDP asks for."""

    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.quantizer = quantizer

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        output = call(self.quantizer, x * self.scale, mask)
        return objective(output) + sum(0.0 * p.sum() for p in self.parameters())


def share(case: Case, variant: str, step: int, rank: int, micro: int) -> tuple[Tensor, Tensor | None]:
    """The vectors and mask of a rank's micro-batch."""
    seed = 1000 * (step + 1) + 10 * rank + micro
    if variant == "equal":
        return case.input(batch=2, seed=seed), None
    size = 0 if step == 2 and rank == 1 else UNEVEN[rank][micro]
    mask = case.some_mask(size, seed=seed)
    return case.input(batch=size, seed=seed), torch.zeros_like(mask) if step == 1 and rank == 1 else mask


def variants(case: Case) -> list[str]:
    """manual: unequal shares; step 1 has a rank that is masked, step 2 one that is empty. auto: the same without accumulation.
    equal: equal shares, and every parameter learns."""
    return ["manual", *(["auto"] if case.commits else []), "equal"]


def build(case: Case, variant: str, seed: int = 0) -> Net:
    return Net(started(case, seed=seed, **({"commit": "auto" if variant == "auto" else "manual"} if case.commits else {})))


def descend_(model: nn.Module, rate: float = 0.1) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad
    model.zero_grad()


def on_rank(rank: int, world: int, folder: str) -> None:
    """All cases in all variants, built before there is a process group, each rank with another seed."""
    torch.set_num_threads(1)
    nets = {(case.name, variant): (case, build(case, variant, seed=rank)) for case in CASES if case.steps for variant in variants(case)}
    torch_dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group{world}", rank=rank, world_size=world, timeout=timedelta(seconds=600)
    )
    results: dict[tuple[str, str], Any] = {}
    for key, (case, net) in nets.items():
        try:
            results[key] = steps(case, key[1], net, rank)
        except Exception:
            results[key] = traceback.format_exc()
    torch.save(results, Path(folder) / f"world{world}-rank{rank}.pt")
    torch_dist.barrier()
    torch_dist.destroy_process_group()


def steps(case: Case, variant: str, net: Net, rank: int) -> list[dict[str, Tensor]]:
    """The states at the start and after each step of this rank's share."""
    synchronize_codebooks_(net)
    model = DistributedDataParallel(net)
    states = [committed(net.quantizer)]
    micros = 1 if variant == "auto" else MICRO
    for step in range(2 if variant == "equal" else 3):
        torch.manual_seed(10 * step + rank)
        for micro in range(micros):
            model.require_backward_grad_sync = micro == micros - 1
            (model(*share(case, variant, step, rank, micro)) / micros).backward()
        if variant == "equal":
            descend_(net)
        net.zero_grad()
        commit_(net.quantizer, default_reducer())
        states.append({name: t.detach().clone() for name, t in committed_net(net).items()})
    return states


def committed_net(net: Net) -> dict[str, Tensor]:
    return {**committed(net.quantizer), "scale": net.scale}


def alone(case: Case, variant: str, world: int) -> list[dict[str, Tensor]]:
    """The same in one process, on the vectors of all ranks at once."""
    net = build(case, variant)
    states = [committed(net.quantizer)]
    micros = 1 if variant == "auto" else MICRO
    for step in range(2 if variant == "equal" else 3):
        shares = [share(case, variant, step, rank, micro) for rank in range(world) for micro in range(micros)]
        mask = None if variant == "equal" else torch.cat([m for _, m in shares if m is not None])
        torch.manual_seed(10 * step)
        net(torch.cat([x for x, _ in shares]), mask).backward()
        if variant == "equal":
            descend_(net)
        net.zero_grad()
        commit_(net.quantizer)
        states.append({name: t.detach().clone() for name, t in committed_net(net).items()})
    return states
