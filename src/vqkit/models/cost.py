"""What a model costs, from its configuration alone: parameters, floating-point operations per token, bytes of decoding state.

Operations are those of matrix products, a multiplication and an addition counting as two. They are what the model needs, not what
a program happens to execute: recomputed activations never count.
"""

from __future__ import annotations

from dataclasses import dataclass

from vqkit.models.config import ModelConfig

LENGTH = 2048
"""Tokens of a sequence where none are given; they matter to ordinary attention alone."""


@dataclass(frozen=True)
class Flops:
    """Operations per token of each part of the whole model, once forward."""

    projections: int
    """Queries, keys, values, gates and output of all attentions."""
    feed_forward: int
    """Both projections of all feed-forwards."""
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
        return self.projections + self.feed_forward + self.assignment + self.window + self.cache_scores + self.cache_values + self.logits

    @property
    def training(self) -> int:
        """Forward and backward. Assignment has no gradient, and the scores of codes have none to the codebook."""
        thrice = self.projections + self.feed_forward + self.window + self.cache_values + self.logits
        return 3 * thrice + 2 * self.cache_scores + self.assignment


def num_parameters(config: ModelConfig) -> int:
    """Numbers that the optimizer trains; codebooks are not among them."""
    queries, keys = config.heads * config.key_dim, config.num_key_heads * config.key_dim
    norm = 2 * config.dim if config.norm == "affine" else 0
    positions = config.dim * keys + queries if config.relative_positions else 0  # keys of distances, query bias
    attention = norm + config.dim * _projected(config) + queries + positions
    feed_forward = norm + 2 * config.dim * config.feed_forward_width if config.layer == "feed_forward" else 0
    embedding = config.vocab_size * config.dim if config.tied or config.input == "tokens" else 0
    bias = config.vocab_size if config.tied_bias or not config.tied else 0
    output = bias + (0 if config.tied else config.vocab_size * config.dim)
    ends = embedding + output + int(config.absolute_positions) + (norm if config.output_norm else 0)
    return config.layers * (config.attentions_per_layer * attention + feed_forward) + ends


def num_codebook_values(config: ModelConfig) -> int:
    """Numbers kept as moving averages: a sum per code and key dimension, and a count per code; none where no codebook learns."""
    if config.attention == "full" or config.quantizer == "sinusoidal":
        return 0
    return _attentions(config) * config.num_key_heads * config.codebook_size * (config.key_dim + 1)


def flops_per_token(config: ModelConfig, length: int = LENGTH) -> Flops:
    """Model operations per token in a long sequence.

    A query meets the whole tile of its block and window (block_len + mem_len keys, those that causality masks included), mem_len + 1
    position keys and, with the cache, every code. With ordinary attention it meets the keys before it: (length + 1) / 2 on average,
    and as many position keys. The projection of the position keys is shared by a whole call and left out.
    """
    attentions, queries, values = _attentions(config), config.heads * config.key_dim, config.heads * config.value_dim
    full = config.attention == "full"
    # Twice the number of keys, so that half of an odd number stays whole.
    near = length + 1 if full else 2 * (config.block_len + config.mem_len)
    distances = 0 if not config.relative_positions else length + 1 if full else 2 * (config.mem_len + 1)
    codes = 0 if full else config.codebook_size
    cached = codes if config.cache else 0
    return Flops(
        projections=2 * attentions * config.dim * _projected(config),
        feed_forward=4 * config.layers * config.dim * config.feed_forward_width,
        assignment=2 * attentions * codes * config.num_key_heads * config.key_dim,
        window=attentions * (near * (queries + values) + distances * queries),
        cache_scores=2 * attentions * cached * queries,
        cache_values=2 * attentions * cached * values,
        logits=2 * config.dim * config.vocab_size,
    )


def state_bytes(config: ModelConfig, batch: int = 1, element_bytes: int = 4, length: int = LENGTH) -> int:
    """Bytes of a `ModelState` in evaluation; `element_bytes` is the size of one activation.

    With quantized keys it does not matter how many tokens went into it, with ordinary attention they are `length`.
    """
    heads, widths = config.num_key_heads, config.key_dim + config.value_dim
    if config.attention == "full":
        attention = length * (element_bytes * heads * widths + 9)  # segment of each token, and whether there is one
    else:
        wide = max(4, element_bytes)  # counts and means are float32 at least
        window = config.mem_len * (element_bytes * widths + 8)
        cache = wide * config.codebook_size * (1 + config.value_dim)
        attention = heads * (window + cache) + 8 * (config.mem_len + 1)  # segment of each window token and of the cache
    return batch * (_attentions(config) * attention + 16)  # position and segment of the stream


def _attentions(config: ModelConfig) -> int:
    return config.layers * config.attentions_per_layer


def _projected(config: ModelConfig) -> int:
    """Columns that one attention projects from the residual stream, and rows that it projects back."""
    keys_and_values = config.num_key_heads * (config.key_dim + config.value_dim)
    gates_and_output = config.heads * config.value_dim * (2 if config.layer == "gated" else 1)
    return config.heads * config.key_dim + keys_and_values + gates_and_output
