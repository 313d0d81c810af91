"""FSDP2 (`fully_shard`): torchrun --nproc-per-node 2 examples/fsdp2.py [STEPS]

`register_fsdp_methods` lets encode, decode and quantize gather the shards of their parameters as forward does.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import vqkit
from vqkit.quantizers import attach, register_fsdp_methods, synchronize_codebooks_


def main(steps: str = "20") -> None:
    """The projections of the quantizer are sharded, its codebook is whole on every process."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    quantizer = vqkit.VectorQuantize(16, 32, codebook_dim=8, commit="manual")
    model = nn.Sequential(nn.Linear(16, 16), quantizer)
    synchronize_codebooks_(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(quantizer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_methods(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    attach(model, optimizer)
    torch.manual_seed(rank)
    for _ in range(int(steps)):
        x = torch.randn(64 + 8 * rank, 4, 16)
        quantized, _, commitment = model(x)
        ((quantized - x).square().mean() + commitment).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        x = torch.randn(4, 16)
        agree = torch.equal(quantizer.decode(quantizer.encode(x)), quantizer.quantize(x).quantized)
    if rank == 0:
        print(f"decode(encode(x)) is the output: {agree}; parameters are {type(next(quantizer.parameters())).__name__}")
        print(", ".join(f"{name} {value:.3g}" for name, value in quantizer.metrics().items()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
