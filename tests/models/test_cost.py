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
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_numbers_and_bytes(form: dict[str, Any]) -> None:
    config = tiny_config(**form)
    model = TransformerVQ(config)
    assert num_parameters(config) == sum(p.numel() for p in model.parameters())
    assert num_codebook_values(config) == sum(q.sum.numel() + q.count.numel() for q in model.quantizers())
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        state = model.to(dtype).initial_state(3)
        tensors = [state.position, state.segment, *(t for attention in state.attention for t in attention)]
        assert state_bytes(config, 3, dtype.itemsize) == sum(t.numel() * t.element_size() for t in tensors)


def plain_products(config: ModelConfig) -> Tensor:
    """The matrix products of one block of one sequence, in a plain order, as a scalar to differentiate."""
    length, window, heads = config.block_len, config.block_len + config.mem_len, config.heads

    def weights(*shape: int) -> Tensor:
        return torch.ones(shape, requires_grad=True)

    x = weights(length, config.dim)
    for _ in range(2 * config.layers):
        q = x @ weights(config.dim, heads * config.key_dim)
        kvg = x @ weights(config.dim, heads * (config.key_dim + 2 * config.value_dim))
        q = q.view(length, heads, -1).transpose(0, 1)
        k, v, _ = kvg.split([heads * config.key_dim, heads * config.value_dim, heads * config.value_dim], 1)
        k = k.reshape(length, heads, -1).transpose(0, 1)
        k @ torch.ones(heads, config.key_dim, config.codebook_size).requires_grad_(False)  # distances; their gradient is never asked for
        keys = torch.cat([k, weights(heads, config.mem_len, config.key_dim)], 1)
        values = torch.cat([v.reshape(length, heads, -1).transpose(0, 1), weights(heads, config.mem_len, config.value_dim)], 1)
        near = q @ weights(heads, config.key_dim, config.mem_len + 1)
        scores = q @ keys.mT + near.sum(-1, keepdim=True)
        attended = scores @ values
        if config.cache:
            cached = q @ torch.ones(heads, config.key_dim, config.codebook_size)  # no gradient to the codebook
            attended = attended + cached @ weights(heads, config.codebook_size, config.value_dim)
        assert scores.shape[-1] == window
        x = attended.transpose(0, 1).reshape(length, -1) @ weights(heads * config.value_dim, config.dim)
    return (x @ weights(config.dim, config.vocab_size)).sum()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_operations_of_the_plain_products(form: dict[str, Any]) -> None:
    config = tiny_config(**form)
    with FlopCounterMode(display=False) as forward:
        total = plain_products(config)
    with FlopCounterMode(display=False) as backward:
        total.backward()
    flops = flops_per_token(config)
    assert flops.forward * config.block_len == forward.get_total_flops()
    assert flops.training * config.block_len == forward.get_total_flops() + backward.get_total_flops()


def test_the_model_itself_multiplies_little_else() -> None:
    """In a long call the recurrent form does what the model needs, position keys and distances aside, which differ by implementation."""
    config = tiny_config(dim=32, key_dim=16, value_dim=48, codebook_size=16, block_len=16, mem_len=16, vocab_size=40, heads=1)
    model = TransformerVQ(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 1024, dtype=torch.int64), impl="recurrent", statistics=False)
    assert 0.97 < counter.get_total_flops() / (1024 * flops_per_token(config).forward) < 1.03


def test_the_model_of_the_benchmark() -> None:
    config = ModelConfig()
    assert 3.5e6 < num_parameters(config) < 4.0e6
    assert 30e6 < flops_per_token(config).training < 34e6
