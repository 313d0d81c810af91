"""The workload of decoding: tokens that a model chooses one after another, after so many that it has read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from vqkit.generate.decoder import Decoder
from vqkit.generate.sampling import SamplingRules, next_token
from vqkit.models.config import ModelConfig
from vqkit.models.cost import flops_per_token
from vqkit.models.transformer import TransformerVQ

TOKENS = 32
"""Tokens that one call samples."""
_PIECE = 4096


def sampling(config: ModelConfig, length: int, batch_size: int, device: torch.device) -> tuple[Callable[[], object], int, int]:
    """A call that samples `TOKENS` tokens a row, the tokens of a call over all rows, and model operations per token.

    The model has read `length` random tokens before the first call; every call goes on where the one before stopped.
    """
    torch.manual_seed(0)
    model = TransformerVQ(config).to(device).eval()
    state = model.initial_state(batch_size)
    with torch.inference_mode():
        for start in range(0, length, _PIECE):
            read = torch.randint(config.vocab_size, (batch_size, min(_PIECE, length - start)), device=device)
            state = model(read, state, statistics=False).state
    decoder = Decoder(model, state)
    generator = torch.Generator().manual_seed(0)
    token = torch.zeros(batch_size, dtype=torch.int64, device=device)

    def run() -> None:
        nonlocal token
        for _ in range(TOKENS):
            token = next_token(decoder.read(token), SamplingRules(), generator=generator)

    return run, TOKENS * batch_size, decoding_flops(config, length)


def decoding_flops(config: ModelConfig, length: int) -> int:
    """Model operations of one token after `length` others: it meets the window and itself, or all of them."""
    # Of a sequence twice as long, the average token stands here.
    return flops_per_token(replace(config, block_len=1), 2 * length + 1).forward
