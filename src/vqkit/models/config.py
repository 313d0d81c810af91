"""Configuration of the models: plain dataclasses, without torch, so that help texts load fast."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args, get_type_hints

from vqkit.quantizers.config import CodebookConfig

_SIZES = ("vocab_size", "dim", "key_dim", "value_dim", "layers", "heads", "codebook_size", "block_len", "mem_len")
_DROPOUTS = ("embedding_dropout", "residual_dropout", "sinusoid_dropout", "layer_dropout")


@dataclass(frozen=True)
class ModelConfig:
    """The Transformer-VQ of Lingle (2024) in all its forms, and the same network with ordinary attention."""

    vocab_size: int = 259
    """Number of token ids; 259 = 256 bytes after pad, end of document and unknown."""
    dim: int = 256
    """Width of the residual stream (d_model)."""
    key_dim: int = 64
    """Width of queries and keys per head (d_k)."""
    value_dim: int = 512
    """Width of values and gates per head (d_v)."""
    layers: int = 4
    """Number of layers, each of two parts."""
    layer: Literal["gated", "feed_forward"] = "gated"
    """Parts of a layer: two gated attention units, or attention without a gate and then a squared-ReLU feed-forward."""
    feed_forward_dim: int | None = None
    """Inner width of the feed-forward; none = 4 dim."""
    attention: Literal["vq", "full"] = "vq"
    """Quantized keys in linear time, or ordinary attention: the same parameters, but no codebook, in quadratic time."""
    relative_positions: bool = True
    """Add to scores a term of the distance: in the window with quantized keys, at every distance with ordinary attention."""
    heads: int = 1
    """Number of query heads."""
    key_heads: int | None = None
    """Number of key and value heads, each with a codebook of its own, for consecutive query heads: none = as many; 1 = multi-query."""
    quantizer: Literal["learnable", "sinusoidal"] = "learnable"
    """Codes that are learned, or sinusoids that never change."""
    codebook_size: int = 128
    """Codes per key head (n_code)."""
    block_len: int = 128
    """Queries per block (L)."""
    mem_len: int = 128
    """Keys before a block that are still attended one by one (M)."""
    cache: bool = True
    """Attend to everything older than the window through one count and one mean value per code."""
    cache_gradient: bool = True
    """Let gradients flow into earlier blocks through the carried window and cache."""
    reduction: Literal["auto", "serial", "matmul", "associative"] = "auto"
    """How a parallel pass comes by what each block finds in the cache; equal but for rounding."""
    masked_keys: Literal["left_out", "counted"] = "left_out"
    """Whether positions that do not count (padding) enter commitment loss and codebooks."""
    input: Literal["tokens", "features"] = "tokens"
    """Token ids, or float features of width `dim` in their place."""
    absolute_positions: bool = False
    """Add scaled sinusoids of the absolute position to the embeddings."""
    position_base: float = 100_000.0
    """Base of the wavelengths of all sinusoids (pe_lam)."""
    norm: Literal["affine", "plain"] = "affine"
    """RMS norms of the residual stream with gain and bias, or without either."""
    tied: bool = False
    """Share the embedding with the output projection; with float features the table serves the output alone."""
    tied_bias: bool = True
    """Whether a tied output projection has a bias; one of its own always has."""
    output_norm: bool = True
    """RMS norm before the output projection (e_preln)."""
    logit_scale: float = 1.0
    """Factor on the logits (e_scale)."""
    logit_scale_at: Literal["logits", "input"] = "logits"
    """Scale the logits, bias included, or the input of the output projection, so that the bias stays as it is."""
    embedding_dropout: float = 0.0
    """Rate of dropout on the embedded input (p_dropemb)."""
    residual_dropout: float = 0.0
    """Rate of dropout on what an attention adds to the residual stream (p_dropres)."""
    sinusoid_dropout: float = 0.0
    """Rate of dropout on the single entries of the table of distances, the same for a whole sequence (p_dropsin)."""
    layer_dropout: float = 0.0
    """Rate at which a part of a layer is skipped by an element of the batch for a whole sequence (p_droplyr)."""
    recompute: bool = False
    """Keep the inputs of the layers alone and compute the rest again in the backward pass: less memory, a third more work."""
    codebook: CodebookConfig = field(default_factory=CodebookConfig)

    def __post_init__(self) -> None:
        self._check_numbers()
        for name, hint in get_type_hints(ModelConfig).items():
            choices = get_args(hint)
            if choices and all(isinstance(choice, str) for choice in choices) and getattr(self, name) not in choices:
                raise ValueError(f"model.{name} = {getattr(self, name)!r}: must be " + " or ".join(f'"{choice}"' for choice in choices))
        self._check_heads_and_widths()
        self._check_contradictions()

    @property
    def num_key_heads(self) -> int:
        """Key and value heads."""
        return self.heads if self.key_heads is None else self.key_heads

    @property
    def attentions_per_layer(self) -> int:
        """Attention units of a layer."""
        return 2 if self.layer == "gated" else 1

    @property
    def feed_forward_width(self) -> int:
        """Inner width of the feed-forward; 0 where there is none."""
        if self.layer == "gated":
            return 0
        return 4 * self.dim if self.feed_forward_dim is None else self.feed_forward_dim

    def _check_numbers(self) -> None:
        for name in _SIZES:
            _check_size(name, getattr(self, name))
        for name in ("key_heads", "feed_forward_dim"):
            if getattr(self, name) is not None:
                _check_size(name, getattr(self, name))
        if not 1.0 < self.position_base < math.inf:
            raise ValueError(f"model.position_base = {self.position_base}: must be a finite number greater than 1")
        if not 0.0 < self.logit_scale < math.inf:
            raise ValueError(f"model.logit_scale = {self.logit_scale}: must be a finite number greater than 0")
        for name in _DROPOUTS:
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"model.{name} = {getattr(self, name)}: must be at least 0 and below 1")

    def _check_heads_and_widths(self) -> None:
        if self.dim % 2:
            raise ValueError(f"model.dim = {self.dim}: must be even, half sines and half cosines")
        if self.heads % self.num_key_heads:
            raise ValueError(f"model.key_heads = {self.key_heads}: must divide model.heads = {self.heads}")
        if self.quantizer == "sinusoidal" and self.key_dim % 2:
            raise ValueError(f"model.key_dim = {self.key_dim}: must be even for sinusoidal codes, half sines and half cosines")

    def _check_contradictions(self) -> None:
        starts_or_expires = self.codebook.init == "kmeans" or self.codebook.dead_code_threshold > 0.0
        contradictions = {
            "feed_forward_dim": (self.layer == "gated" and self.feed_forward_dim is not None, 'model.layer = "gated" has no feed-forward'),
            "cache": (self.attention == "full" and not self.cache, 'model.attention = "full" sees everything and has no cache'),
            "cache_gradient": (self.attention == "full" and not self.cache_gradient, 'model.attention = "full" has no cache'),
            "reduction": (self.attention == "full" and self.reduction != "auto", 'model.attention = "full" has no cache'),
            "quantizer": (self.attention == "full" and self.quantizer != "learnable", 'model.attention = "full" has no codebook'),
            "codebook": (
                self.attention == "full" and starts_or_expires,
                'model.attention = "full", which has no codebook to start or to expire: '
                'codebook.init must be "normal", codebook.dead_code_threshold 0',
            ),
            "tied_bias": (not self.tied and not self.tied_bias, "model.tied = False: an output projection of its own has a bias"),
            "sinusoid_dropout": (
                not self.relative_positions and self.sinusoid_dropout > 0.0,
                "model.relative_positions = False: there is no table of distances",
            ),
        }
        for name, (contradicts, why) in contradictions.items():
            if contradicts:
                raise ValueError(f"model.{name} = {getattr(self, name)!r}: contradicts {why}")
        if self.quantizer == "sinusoidal" and starts_or_expires:
            raise ValueError(f'model.codebook = {self.codebook!r}: contradicts model.quantizer = "sinusoidal", whose codes never change')


def _check_size(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"model.{name} = {value!r}: must be an integer of at least 1")
