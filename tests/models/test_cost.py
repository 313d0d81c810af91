"""The cost model against counted parameters, counted operations and the bytes of a real state."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tiny_models import tiny_config
from vqkit.models.config import ModelConfig
from vqkit.models.cost import flops_per_token, num_codebook_values, num_parameters, state_bytes
from vqkit.models.transformer import TransformerVQ

FORMS: list[dict[str, Any]] = [
    {},
    {"heads": 1, "layers": 3, "tied": True, "absolute_positions": False},
    {"cache": False, "output_norm": False},
    {"input": "features", "block_len": 2, "mem_len": 5},
    {"input": "features", "tied": True, "value_dim": 10},
    {"heads": 4, "key_heads": 2, "relative_positions": False},
    {"layer": "feed_forward", "heads": 4, "key_heads": 1, "norm": "plain", "tied": True, "tied_bias": False},
    {"layer": "feed_forward", "feed_forward_dim": 7, "quantizer": "sinusoidal", "layers": 2},
    {"layer": "feed_forward", "attention": "full", "heads": 4, "key_heads": 2},
    {"attention": "full", "relative_positions": False, "norm": "plain", "layers": 2},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_numbers_and_bytes(form: dict[str, Any]) -> None:
    config = tiny_config(**form)
    model = TransformerVQ(config)
    assert num_parameters(config) == sum(p.numel() for p in model.parameters())
    assert num_codebook_values(config) == sum(q.sum.numel() + q.count.numel() for q in model.quantizers())
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        tokens, features = torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 9, config.dim, dtype=dtype)
        state = model.to(dtype).eval()(features if config.input == "features" else tokens).state
        tensors = [state.position, state.segment, *(t for attention in state.attention for t in attention)]
        assert state_bytes(config, 3, dtype.itemsize, length=9) == sum(t.numel() * t.element_size() for t in tensors)


def plain_products(config: ModelConfig, length: int) -> Tensor:
    """The matrix products of one block of one sequence, or of a whole one, in a plain order, as a scalar to differentiate."""
    heads, key_heads, shared = config.heads, config.num_key_heads, config.heads // config.num_key_heads

    def weights(*shape: int) -> Tensor:
        return torch.ones(shape, requires_grad=True)

    def split(t: Tensor, number: int) -> Tensor:
        return t.view(length, number, -1).transpose(0, 1)

    x = weights(length, config.dim)
    for part in range(2 * config.layers):
        if part % 2 and config.layer == "feed_forward":
            x = x @ weights(config.dim, config.feed_forward_width) @ weights(config.feed_forward_width, config.dim)
            continue
        q = split(x @ weights(config.dim, heads * config.key_dim), heads)
        k = split(x @ weights(config.dim, key_heads * config.key_dim), key_heads)
        v = split(x @ weights(config.dim, key_heads * config.value_dim), key_heads)
        if config.layer == "gated":
            v = v + (x @ weights(config.dim, heads * config.value_dim)).sum()
        attended = whole_sequence(config, q, k, v) if config.attention == "full" else one_block(config, q, k, v, shared, weights)
        x = attended.transpose(0, 1).reshape(length, -1) @ weights(heads * config.value_dim, config.dim)
    return (x @ weights(config.dim, config.vocab_size)).sum()


def one_block(config: ModelConfig, q: Tensor, k: Tensor, v: Tensor, shared: int, weights: Any) -> Tensor:
    k @ torch.ones(len(k), config.key_dim, config.codebook_size)  # distances; their gradient is never asked for
    keys = torch.cat([k, weights(len(k), config.mem_len, config.key_dim)], 1).repeat_interleave(shared, 0)
    values = torch.cat([v, weights(len(v), config.mem_len, config.value_dim)], 1).repeat_interleave(shared, 0)
    scores = q @ keys.mT
    if config.relative_positions:
        scores = scores + (q @ weights(len(q), config.key_dim, config.mem_len + 1)).sum(-1, keepdim=True)
    attended = scores @ values
    if config.cache:
        cached = q @ torch.ones(len(q), config.key_dim, config.codebook_size)  # no gradient to the codebook
        attended = attended + cached @ weights(len(q), config.codebook_size, config.value_dim)
    return attended


def whole_sequence(config: ModelConfig, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each query with the keys up to its own."""
    k, v = (t.repeat_interleave(len(q) // len(t), 0) for t in (k, v))
    rows = []
    for t in range(q.shape[1]):
        scores = q[:, t : t + 1] @ k[:, : t + 1].mT
        if config.relative_positions:
            scores = scores + q[:, t : t + 1] @ torch.ones(len(q), config.key_dim, t + 1, requires_grad=True)
        rows.append(scores @ v[:, : t + 1])
    return torch.cat(rows, 1)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_operations_of_the_plain_products(form: dict[str, Any]) -> None:
    config = tiny_config(**form)
    length = 9 if config.attention == "full" else config.block_len
    with FlopCounterMode(display=False) as forward:
        total = plain_products(config, length)
    with FlopCounterMode(display=False) as backward:
        total.backward()
    flops = flops_per_token(config, length)
    assert flops.forward * length == forward.get_total_flops()
    assert flops.training * length == forward.get_total_flops() + backward.get_total_flops()


@pytest.mark.parametrize("form", [{}, {"layer": "feed_forward", "heads": 4, "key_heads": 2}], ids=str)
def test_the_model_itself_multiplies_little_else(form: dict[str, Any]) -> None:
    """In a long call the recurrent form does what the model needs, position keys and distances aside, which differ by implementation."""
    sizes: dict[str, Any] = {"dim": 32, "key_dim": 16, "value_dim": 48, "codebook_size": 16, "block_len": 16, "mem_len": 16}
    config = tiny_config(**{"heads": 1, **form}, **sizes, vocab_size=40)
    model = TransformerVQ(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 1024, dtype=torch.int64), impl="recurrent", statistics=False)
    assert 0.97 < counter.get_total_flops() / (1024 * flops_per_token(config).forward) < 1.03


def test_ordinary_attention_multiplies_little_else() -> None:
    """The fused kernel counts whole rows, where on average a query needs half of them."""
    config = tiny_config(dim=32, key_dim=16, value_dim=48, heads=2, attention="full", relative_positions=False, vocab_size=40)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        TransformerVQ(config)(torch.zeros(1, 64, dtype=torch.int64))
    flops = flops_per_token(config, 64)
    assert 0.97 < counter.get_total_flops() / (64 * (flops.forward + flops.window)) < 1.03


def test_the_model_of_the_benchmark() -> None:
    config = ModelConfig()
    assert 3.5e6 < num_parameters(config) < 4.0e6
    assert 30e6 < flops_per_token(config).training < 34e6
