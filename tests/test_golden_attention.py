"""The attention unit against the official one: values, inner tensors, carried state, losses, metrics and gradients."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import golden_arrays
from golden_arrays import GoldenCase
from golden_models import (
    attention_names,
    attention_of,
    check_gradients,
    codebook_gradient,
    config_of,
    in_activation_type,
    state_arrays,
    window_documents,
)
from vqkit.models.attention import AttentionOutput, AttentionUnit
from vqkit.models.metrics import unit_metrics
from vqkit.models.positions import PositionKeys
from vqkit.ops.vq_attention import initial_state

CASES = golden_arrays.case_ids("attention")


def holding(prefix: str) -> list[str]:
    """Cases that have such arrays; f64 leaves some of them to f64hp."""
    return [name for name in CASES if golden_arrays.load("attention", name).keys(prefix)]


def run_blocks(unit: AttentionUnit, golden: GoldenCase, inputs: Tensor) -> list[AttentionOutput]:
    """One call a block, the state carried, as the official code runs."""
    outputs: list[AttentionOutput] = []
    for x, mask in zip(inputs, golden["loss_mask"].bool(), strict=True):
        outputs.append(unit(x, outputs[-1].state if outputs else None, mask=mask))
    return outputs


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_states_block_by_block(name: str) -> None:
    golden = golden_arrays.load("attention", name)
    unit, config = attention_of(golden), config_of(golden)
    inputs, doc_ids = in_activation_type(golden, golden["inputs"]), golden["doc_ids"]
    outputs = run_blocks(unit, golden, inputs)

    golden.check("out/res", torch.stack([o.output for o in outputs]) - inputs)  # there the layer adds the residual
    # In evaluation the official code reports no losses.
    commitment = torch.stack([o.commitment for o in outputs])
    golden.check("out/l_commit", commitment if unit.training else torch.zeros_like(commitment))
    golden.check("out/l_codebook", torch.zeros_like(commitment))

    sizes = (inputs.shape[1], config.heads, config.mem_len, config.codebook_size, config.key_dim, config.value_dim)
    states = [initial_state(*sizes, dtype=inputs.dtype), *(o.state for o in outputs)]
    arrays = [state_arrays(state, config.codebook_size) for state in states]
    for key in arrays[0]:
        golden.check(f"state/{key}", torch.stack([a[key] for a in arrays]))
    golden.check("state/pos_offset", torch.arange(len(states)) * config.block_len)
    windows = [window_documents(doc_ids[:i].transpose(0, 1).flatten(1), config.mem_len) for i in range(len(states))]
    golden.check("state/xlcache/doc_ids", torch.stack([w for w, _ in windows]))
    golden.check("state/aggcache/latest_doc_id", torch.stack([last for _, last in windows]))


@pytest.mark.parametrize("name", holding("mid/"))
def test_inner_tensors(name: str) -> None:
    golden = golden_arrays.load("attention", name)
    mid = "mid/block_0"
    unit, config = attention_of(golden), config_of(golden)
    x = in_activation_type(golden, golden["inputs"][0])
    golden.check(f"{mid}/input_ln", unit.norm(x))
    q, k, v, gate = unit.project(x)
    for key, tensor in {"q": q, "k": k, "v": v, "g": gate}.items():
        golden.check(f"{mid}/{key}", tensor)
    golden.check(f"{mid}/xl_u", unit.scaled_bias(unit.content_bias)[None])
    golden.check(f"{mid}/xl_v", unit.scaled_bias(unit.position_bias)[None])

    # The official table also has distances that no score uses.
    wider = PositionKeys(replace(config, mem_len=config.mem_len + config.block_len - 1)).to(golden.dtype)
    wider.weight = unit.r.weight
    golden.check(f"{mid}/xl_r", wider(x.dtype).flip(1) * unit.scale)


@pytest.mark.parametrize("name", CASES)
def test_metrics_block_by_block(name: str) -> None:
    golden = golden_arrays.load("attention", name)
    unit = attention_of(golden)
    metrics = [unit_metrics(unit, x) for x in in_activation_type(golden, golden["inputs"])]
    keys = golden.keys("out/metrics/")
    assert {k.removeprefix("out/metrics/") for k in keys} == (set(metrics[0]) if unit.training else set())
    for key in keys:
        golden.check(key, torch.stack([m[key.removeprefix("out/metrics/")] for m in metrics]))


@pytest.mark.parametrize("name", [n for n in CASES if n not in holding("grad/")])
def test_without_gradients_the_cotangent_is_that_of_the_exact_variant(name: str) -> None:
    golden = golden_arrays.load("attention", name)
    golden.check("cotangent", golden_arrays.load("attention", f"{golden.case}.f64hp")["cotangent"])


@pytest.mark.parametrize("impl", ["blocks", "reference", "recurrent", "blocked"])
@pytest.mark.parametrize("name", holding("grad/"))
def test_gradients(name: str, impl: str) -> None:
    golden = golden_arrays.load("attention", name)
    for prefix, weight in {"grad": 0.0, "grad_with_vq_losses": 0.25}.items():
        unit = attention_of(golden)
        weight = weight if unit.training else 0.0
        inputs = in_activation_type(golden, golden["inputs"]).requires_grad_()
        num_blocks = len(inputs)
        if impl == "blocks":
            outputs = run_blocks(unit, golden, inputs)
            result = torch.stack([o.output for o in outputs]) - inputs
            commitment = torch.stack([o.commitment for o in outputs]).sum()
            statistics = [o.statistics for o in outputs]
        else:  # one call over all blocks
            mask = golden["loss_mask"].bool().transpose(0, 1).flatten(1)
            out = unit(inputs.transpose(0, 1).flatten(1, 2), mask=mask, impl=impl)
            result = out.output.unflatten(1, (num_blocks, -1)).transpose(0, 1) - inputs
            golden.check("out/res", result)
            commitment, statistics = out.commitment * num_blocks, None

        ((result * golden["cotangent"]).sum() + weight * commitment).backward()
        golden.check(f"{prefix}/inputs", inputs.grad)
        check_gradients(golden, f"{prefix}/params", unit, attention_names())
        if statistics is not None:
            factor = golden.meta["n_device_in_vq_spec"] * golden.meta["n_block_per_update_in_vq_spec"]
            total, count = codebook_gradient(unit, [s for s in statistics if s is not None], factor)
            learns = bool(weight)  # the attention itself has no gradient to the codebook
            golden.check(f"{prefix}/params/quantizer/c_sum", total * learns)
            golden.check(f"{prefix}/params/quantizer/c_count", count * learns)
