"""A VQ-autoencoder of the handwritten digits that scikit-learn ships: python examples/autoencoder.py [STEPS]

An image of 8 x 8 pixels becomes 2 x 2 indices of 64 codes, 24 bits in all, and back. One image in five is held out of training. A code
is active if it gets at least a tenth of its even share.
"""

import sys

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from vqkit.ops.usage import active_fraction
from vqkit.quantizers import EMA, DeadCodes, KMeans, VectorQuantize


def main(steps: str = "300") -> None:
    """Trains, tells how the codes are doing, and measures on the images held out."""
    torch.manual_seed(0)
    images = torch.tensor(load_digits(return_X_y=True)[0], dtype=torch.float32).view(-1, 1, 8, 8) / 16  # [1797, 1, 8, 8]
    held_out, train = images[torch.randperm(len(images))].tensor_split([len(images) // 5])
    encoder = nn.Sequential(nn.Conv2d(1, 64, 4, stride=4), nn.GELU(), nn.Conv2d(64, 16, 1))
    dead_codes, update = DeadCodes(threshold=1.0), EMA(decay=0.8)
    quantizer = VectorQuantize(16, 64, metric="cosine", layout="first", update=update, init=KMeans(), dead_codes=dead_codes)
    decoder = nn.Sequential(nn.Conv2d(16, 64, 1), nn.GELU(), nn.ConvTranspose2d(64, 1, 4, stride=4))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters()], lr=3e-3)
    for step in range(1, int(steps) + 1):
        batch = train[torch.randint(len(train), (256,))]
        quantized, _, commitment = quantizer(encoder(batch))
        error = F.mse_loss(decoder(quantized), batch)
        optimizer.zero_grad()
        (error + commitment).backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: squared error {error:.4f}, perplexity of the codes {quantizer.metrics()['perplexity']:.1f}")
    quantizer.eval()
    quantized, indices, _ = quantizer(encoder(held_out))
    active = active_fraction(indices.flatten().bincount(minlength=64))
    print(f"held out: squared error {F.mse_loss(decoder(quantized), held_out):.4f}, active codes {active:.0%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
