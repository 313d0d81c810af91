"""The conventions of the two branches of the official Transformer-VQ, and the twin of a model with ordinary attention.

Where the official code is at fault (statistics of codes many times too large, counts in bfloat16) no preset follows it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from vqkit.models.config import ModelConfig


def official_main(**options: Any) -> ModelConfig:
    """The conventions of branch `main`: gated layers, norms with gain and bias, scaled logits, a bias also where the output is tied.

    `options` are fields of ModelConfig, and win.
    """
    conventions: dict[str, Any] = {
        "layer": "gated",
        "norm": "affine",
        "tied_bias": True,
        "logit_scale_at": "logits",
        "masked_keys": "left_out",
    }
    return ModelConfig(**{**conventions, **options})


def official_optimized(head_type: Literal["shga", "mqa", "mha"], *, dim: int, key_dim: int, block_len: int, **options: Any) -> ModelConfig:
    """The conventions of branch `optimized`: norms without parameters, a scaled input of the output projection, padding that counts.

    The head type gives the number of heads and all widths, and the window is as long as a block. `options` are other fields of
    ModelConfig, and win. Raises ValueError for an unknown head type and for a `dim` that `key_dim` does not divide.
    """
    if head_type not in ("shga", "mqa", "mha"):
        raise ValueError(f'head_type = {head_type!r}: must be "shga", "mqa" or "mha"')
    if dim % key_dim:
        raise ValueError(f"dim = {dim}: must be a multiple of key_dim = {key_dim}")
    forms: dict[str, dict[str, Any]] = {
        "shga": {"layer": "gated", "heads": 1, "value_dim": 2 * dim},
        "mqa": {"layer": "feed_forward", "heads": dim // key_dim, "key_heads": 1, "value_dim": key_dim, "feed_forward_dim": 5 * dim},
        "mha": {"layer": "feed_forward", "heads": dim // key_dim, "value_dim": key_dim, "feed_forward_dim": 4 * dim},
    }
    conventions: dict[str, Any] = {
        "dim": dim,
        "key_dim": key_dim,
        "block_len": block_len,
        "mem_len": block_len,
        "norm": "plain",
        "tied_bias": not options.get("tied", False),
        "logit_scale_at": "input",
        "masked_keys": "counted",
    }
    return ModelConfig(**{**conventions, **forms[head_type], **options})


def full_attention_twin(config: ModelConfig, *, relative_positions: bool | None = None) -> ModelConfig:
    """The same network with ordinary attention: the same parameters but for the codebooks.

    relative_positions: False for the twin of speed, which leaves scores to the fast path of scaled_dot_product_attention; None as before.
    """
    with_positions = config.relative_positions if relative_positions is None else relative_positions
    return replace(
        config,
        attention="full",
        cache=True,
        cache_gradient=True,
        reduction="auto",
        quantizer="learnable",
        codebook=replace(config.codebook, init="normal", dead_code_threshold=0.0),
        relative_positions=with_positions,
        sinusoid_dropout=config.sinusoid_dropout if with_positions else 0.0,
    )
