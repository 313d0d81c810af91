"""Lightning, with gradient accumulation: python examples/with_lightning.py [STEPS]

`attach` in configure_optimizers is all that a LightningModule needs.
"""

import sys

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import vqkit
from vqkit.quantizers import attach


class Autoencoder(lightning.LightningModule):
    """A layer, a codebook that learns once for each optimizer step, a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(16, 8), nn.Linear(8, 16)
        self.quantizer = vqkit.VectorQuantize(8, 32, commit="manual")

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """The loss of a micro-batch."""
        (x,) = batch
        quantized, _, commitment = self.quantizer(self.encoder(x))
        return (self.decoder(quantized) - x).square().mean() + commitment

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer, at whose steps the codebook commits."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        attach(self, optimizer)
        return optimizer


def main(steps: str = "20") -> None:
    """Two micro-batches a step."""
    lightning.seed_everything(0, verbose=False)
    model = Autoencoder()
    trainer = lightning.Trainer(
        max_steps=int(steps),
        accumulate_grad_batches=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(torch.randn(1024, 4, 16)), batch_size=32))
    print(f"{trainer.global_step} optimizer steps, {model.quantizer.table.commits.item()} of the codebook")
    print(", ".join(f"{name} {value:.3g}" for name, value in model.quantizer.metrics().items()))


if __name__ == "__main__":
    main(*sys.argv[1:])
