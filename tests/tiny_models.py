"""Small models whose every parameter matters."""

from typing import Any

import torch

from vqkit.models.config import ModelConfig
from vqkit.models.transformer import TransformerVQ


def tiny_config(**options: Any) -> ModelConfig:
    sizes: dict[str, Any] = {"vocab_size": 11, "dim": 8, "key_dim": 4, "value_dim": 6, "layers": 1, "heads": 2, "codebook_size": 5}
    sizes |= {"block_len": 4, "mem_len": 3, "position_base": 100.0, "absolute_positions": True}
    return ModelConfig(**{**sizes, **options})


@torch.no_grad()
def tiny_model(*, seed: int = 0, **options: Any) -> TransformerVQ:
    """In float64, with biases, gains and scales away from their initial 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    model = TransformerVQ(tiny_config(**options)).double()
    for parameter in model.parameters():
        parameter.normal_(0.0, 0.6, generator=generator)
        if parameter.dim() < 2:
            parameter.add_(0.5)
    for quantizer in model.quantizers():
        quantizer.codebook = torch.randn(quantizer.sum.shape, generator=generator, dtype=torch.float64) * 0.7
    return model


def random_tokens(*shape: int, seed: int = 1, vocab_size: int = 11) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))
