"""Accelerate, with gradient accumulation: accelerate launch examples/with_accelerate.py [STEPS]

Accelerate steps the optimizer at the last micro-batch alone, so the hook of `attach` commits once for each step.
"""

import sys

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import vqkit
from vqkit.quantizers import attach


def main(steps: str = "20") -> None:
    """Two micro-batches a step."""
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    quantizer = vqkit.VectorQuantize(8, 32, commit="manual")
    model = nn.Sequential(nn.Linear(16, 8), quantizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    attach(model, optimizer)
    loader = DataLoader(TensorDataset(torch.randn(64 * int(steps), 4, 16)), batch_size=32)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for (x,) in loader:
        with accelerator.accumulate(model):
            quantized, _, commitment = model(x)
            accelerator.backward((quantized - x[..., :8]).square().mean() + commitment)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.print(f"{quantizer.table.commits.item()} steps of the codebook")
    accelerator.print(", ".join(f"{name} {value:.3g}" for name, value in quantizer.metrics().items()))


if __name__ == "__main__":
    main(*sys.argv[1:])
