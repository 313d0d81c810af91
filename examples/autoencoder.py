"""A VQ-autoencoder of the handwritten digits that scikit-learn ships: python examples/autoencoder.py [STEPS]

An image of 8 x 8 pixels becomes 2 x 2 indices of 64 codes, 24 bits in all, and back.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

from vqkit.quantizers import EMA, DeadCodes, KMeans, VectorQuantize


def main(steps: str = "300") -> None:
    """Prints how the error falls while the codes stay in use."""
    torch.manual_seed(0)
    pixels, _ = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16  # [1797, 1, 8, 8]
    encoder = nn.Sequential(nn.Conv2d(1, 64, 4, stride=4), nn.GELU(), nn.Conv2d(64, 16, 1))
    quantizer = VectorQuantize(
        16, 64, metric="cosine", layout="first", update=EMA(decay=0.8), init=KMeans(), dead_codes=DeadCodes(threshold=1.0)
    )
    decoder = nn.Sequential(nn.Conv2d(16, 64, 1), nn.GELU(), nn.ConvTranspose2d(64, 1, 4, stride=4))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters()], lr=3e-3)
    for step in range(1, int(steps) + 1):
        batch = images[torch.randint(len(images), (256,))]
        quantized, _, commitment = quantizer(encoder(batch))
        error = (decoder(quantized) - batch).square().mean()
        optimizer.zero_grad()
        (error + commitment).backward()
        optimizer.step()
        if step % 50 == 0:
            health = quantizer.metrics()
            print(
                f"step {step}: squared error {error.item():.4f}, active codes {health['active']:.0%}, perplexity {health['perplexity']:.1f}"
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
