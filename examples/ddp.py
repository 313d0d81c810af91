"""DistributedDataParallel with gradient accumulation: torchrun --nproc-per-node 2 examples/ddp.py [STEPS]

commit="manual" and `attach`: the codebook takes one step for each step of the optimizer, from the vectors of all micro-batches of all
processes. It does not matter how unequal the shares of the processes are, nor whether one of them is empty.
"""

import gc
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import vqkit
from vqkit.quantizers import attach

MICRO_BATCHES = 2


def main(steps: str = "20") -> None:
    """A group around the work, which outlives the model: DDP holds on to it, and if it is the last to let go a process may hang."""
    dist.init_process_group("gloo")
    train(int(steps))
    gc.collect()  # DDP is a circle of references: it would stay until some time later
    dist.destroy_process_group()


def train(steps: int) -> None:
    """Vectors around 32 centres; every process draws its own."""
    rank = dist.get_rank()
    torch.manual_seed(rank)  # modules may start differently: DDP makes parameters and codebooks equal
    model = DistributedDataParallel(nn.Sequential(nn.Linear(16, 8), vqkit.VectorQuantize(8, 32, commit="manual")))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    attach(model, optimizer)
    centres = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        for micro_batch in range(MICRO_BATCHES):
            x = centres[torch.randint(32, (64 + 8 * rank, 4))] + 0.1 * torch.randn(64 + 8 * rank, 4, 16)
            model.require_backward_grad_sync = micro_batch == MICRO_BATCHES - 1  # what no_sync() does
            quantized, _, commitment = model(x)
            ((quantized - x[..., :8]).square().mean() + commitment).div(MICRO_BATCHES).backward()
        optimizer.step()
        optimizer.zero_grad()
    quantizer = model.module[1]
    codebooks = [torch.empty_like(quantizer.codebook) for _ in range(dist.get_world_size())]
    dist.all_gather(codebooks, quantizer.codebook)
    if rank == 0:
        print(f"equal on {len(codebooks)} processes: {all(torch.equal(codebooks[0], c) for c in codebooks)}")
        print(", ".join(f"{name} {value:.3g}" for name, value in quantizer.metrics().items()))


if __name__ == "__main__":
    main(*sys.argv[1:])
