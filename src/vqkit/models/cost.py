"""What a model costs, from its configuration alone: parameters, floating-point operations per token, bytes of decoding state.

Operations are those of matrix products, a multiplication and an addition counting as two. They are what the model needs, not what
a program happens to execute: recomputed activations never count.
"""

from __future__ import annotations

from dataclasses import dataclass

from vqkit.models.config import ModelConfig

ATTENTIONS_PER_LAYER = 2


@dataclass(frozen=True)
class Flops:
    """Operations per token of each part of the whole model, once forward."""

    projections: int
    """Queries, keys, values, gates and output of all attentions."""
    assignment: int
    """Distances of the keys to all codes."""
    window: int
    """Scores, position terms and values of the keys that are attended one by one."""
    cache_scores: int
    """Scores of the codes."""
    cache_values: int
    """Mean values of the codes."""
    logits: int
    """Output projection."""

    @property
    def forward(self) -> int:
        return self.projections + self.assignment + self.window + self.cache_scores + self.cache_values + self.logits

    @property
    def training(self) -> int:
        """Forward and backward. Assignment has no gradient, and the scores of codes have none to the codebook."""
        return 3 * (self.projections + self.window + self.cache_values + self.logits) + 2 * self.cache_scores + self.assignment


def num_parameters(config: ModelConfig) -> int:
    """Numbers that the optimizer trains; codebooks are not among them."""
    keys, values = config.heads * config.key_dim, config.heads * config.value_dim
    norm = 2 * config.dim
    projections = config.dim * (3 * keys + 2 * values) + values * config.dim  # q, k, r; v, g; output
    attention = norm + projections + 2 * keys  # two query biases
    embedding = config.vocab_size * config.dim if config.tied or config.input == "tokens" else 0
    output = config.vocab_size + (0 if config.tied else config.vocab_size * config.dim)
    ends = embedding + output + int(config.absolute_positions) + (norm if config.output_norm else 0)
    return ATTENTIONS_PER_LAYER * config.layers * attention + ends


def num_codebook_values(config: ModelConfig) -> int:
    """Numbers kept as moving averages: a sum per code and key dimension, and a count per code."""
    return ATTENTIONS_PER_LAYER * config.layers * config.heads * config.codebook_size * (config.key_dim + 1)


def flops_per_token(config: ModelConfig) -> Flops:
    """Model operations per token in a long sequence.

    A query meets the whole tile of its block and window (block_len + mem_len keys, those that causality masks included), mem_len + 1
    position keys and, with the cache, every code. The projection of the position keys is shared by a whole call and left out.
    """
    attentions = ATTENTIONS_PER_LAYER * config.layers
    keys, values = config.heads * config.key_dim, config.heads * config.value_dim
    cached = config.codebook_size if config.cache else 0
    return Flops(
        projections=2 * attentions * config.dim * (2 * keys + 3 * values),
        assignment=2 * attentions * config.codebook_size * keys,
        window=2 * attentions * ((config.block_len + config.mem_len) * (keys + values) + (config.mem_len + 1) * keys),
        cache_scores=2 * attentions * cached * keys,
        cache_values=2 * attentions * cached * values,
        logits=2 * config.dim * config.vocab_size,
    )


def state_bytes(config: ModelConfig, batch: int = 1, element_bytes: int = 4) -> int:
    """Bytes of a `ModelState`, however many tokens went into it; `element_bytes` is the size of one activation."""
    wide = max(4, element_bytes)  # counts and means are float32 at least
    window = config.mem_len * (element_bytes * (config.key_dim + config.value_dim) + 8)
    cache = wide * config.codebook_size * (1 + config.value_dim)
    attention = config.heads * (window + cache) + 8 * (config.mem_len + 1)  # segment of each window token and of the cache
    return batch * (ATTENTIONS_PER_LAYER * config.layers * attention + 16)  # position and segment of the stream
