"""A plain loop with gradient accumulation: python examples/plain_loop.py [STEPS]

With commit="auto", the default, each training call is one step of the codebook and nothing has to be called. Whoever accumulates gradients
takes commit="manual" and lets `attach` commit at the optimizer's steps, so that the codebook, too, sees one large batch.
"""

import sys

import torch
from torch import nn

import vqkit
from vqkit.quantizers import attach

MICRO_BATCHES = 4


def main(steps: str = "100") -> None:
    """Vectors around 32 centres, through a layer, a codebook of 32 and a layer."""
    torch.manual_seed(0)
    centres = torch.randn(32, 16)
    encoder, quantizer, decoder = nn.Linear(16, 8), vqkit.VectorQuantize(8, 32, commit="manual"), nn.Linear(8, 16)
    model = nn.ModuleList([encoder, quantizer, decoder])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    attach(model, optimizer)
    for _ in range(int(steps)):
        for _ in range(MICRO_BATCHES):
            x = centres[torch.randint(32, (64,))] + 0.1 * torch.randn(64, 16)
            quantized, _, commitment = quantizer(encoder(x))
            loss = (decoder(quantized) - x).square().mean()
            ((loss + commitment) / MICRO_BATCHES).backward()
        optimizer.step()  # and the codebook with it
        optimizer.zero_grad()
    print(f"squared error {loss.item():.3f}, {quantizer.bits_per_vector:.0f} bits a vector")
    print(", ".join(f"{name} {value:.3g}" for name, value in quantizer.metrics().items()))


if __name__ == "__main__":
    main(*sys.argv[1:])
