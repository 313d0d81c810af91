"""The attention unit in all forms of the branch `optimized`: values, inner tensors, losses and gradients."""

import pytest
import torch
from torch import Tensor

import golden_arrays
from golden_arrays import GoldenCase
from golden_models import codebook_gradient
from golden_optimized import attention_of, gradients, unit_arrays
from vqkit.models.attention import AttentionUnit
from vqkit.ops.nearest_code import nearest_code
from vqkit.ops.vq_attention import initial_state

GROUP = "optimized/attention"
CASES = golden_arrays.case_ids(GROUP)
INNER = [name for name in CASES if golden_arrays.load(GROUP, name).keys("mid/")]


def implementations(golden: GoldenCase) -> tuple[str, ...]:
    return ("auto", "reference", "recurrent", "blocked") if golden.config["attn_type"] == "vq" else ("auto", "reference")


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name: str) -> None:
    golden = golden_arrays.load(GROUP, name)
    for impl in implementations(golden):
        for prefix, weight in {"grad": 0.0, "grad_with_vq_losses": 0.25}.items():
            if not golden.keys(f"{prefix}/"):
                continue
            unit = attention_of(golden)
            x = golden["inputs"].to(golden.dtype).requires_grad_()
            out = unit(x, impl=impl)
            result = out.output - x
            golden.check("out/res", result)
            # In evaluation the official code reports no losses.
            golden.check("out/l_commit", out.commitment if unit.training else torch.zeros_like(out.commitment))
            golden.check("out/l_codebook", torch.zeros_like(out.commitment))
            ((result * golden["cotangent"]).sum() + weight * out.commitment).backward()
            golden.check(f"{prefix}/inputs", x.grad)
            for key, gradient in unit_arrays(unit, gradients(unit)).items():
                golden.check(f"{prefix}/params/{key}", gradient)
            if golden.config["attn_type"] == "vq":
                check_codebook_gradient(golden, prefix, unit, [] if weight == 0.0 else [out.statistics])


def check_codebook_gradient(golden: GoldenCase, prefix: str, unit: AttentionUnit, statistics: list) -> None:
    """There the statistics of the whole sequence enter as often as it has blocks, a fault that the factor repeats."""
    factor = golden.config["n_device"] * golden.meta["n_block"]
    total, count = codebook_gradient(unit, statistics, factor)
    golden.check(f"{prefix}/params/quantizer/c_sum", total)
    golden.check(f"{prefix}/params/quantizer/c_count", count)


@pytest.mark.parametrize("name", INNER)
def test_inner_tensors(name: str) -> None:
    golden = golden_arrays.load(GROUP, name)
    unit = attention_of(golden)
    config, x = unit.config, golden["inputs"].to(golden.dtype)
    vq = config.attention == "vq"

    def blocks(tensor: Tensor, axis: int) -> Tensor:
        return tensor.unflatten(axis, (-1, config.block_len)) if vq else tensor

    golden.check("mid/input_ln", blocks(unit.norm(x), 1))
    q, k, v, gate = unit.project(x)
    for key, tensor in {"q": q, "k": k, "v": v}.items():
        golden.check(f"mid/{key}", blocks(tensor, 2))
    assert (gate is not None) == ("mid/g" in golden)
    if gate is not None:
        golden.check("mid/g", blocks(gate, 1))
    golden.check("mid/xl_u", unit.scaled_bias(unit.content_bias)[None])
    golden.check("mid/xl_v", unit.scaled_bias(unit.position_bias)[None])
    distances = 2 * config.block_len if vq else x.shape[1]
    golden.check("mid/xl_r", unit.r(x.dtype, distances).flip(1) * unit.scale)
    if not vq:
        return
    codebook = unit.quantizer.codebook
    golden.check("mid/codebook", codebook)
    keys = unit.quantizer.quantize(k)
    golden.check("mid/k_hat", blocks(keys.quantized, 2))
    golden.check("mid/shortcodes", blocks(keys.indices, 2))
    golden.check("mid/errs2", blocks(nearest_code(k, codebook).squared_distance, 2))
    sizes = (x.shape[0], config.num_key_heads, config.mem_len, config.codebook_size, config.key_dim, config.value_dim)
    states = [initial_state(*sizes, dtype=x.dtype)]
    for block in x.split(config.block_len, 1):
        states.append(unit(block, states[-1]).state)
    golden.check("mid/cache_count", torch.stack([state.count for state in states[:-1]], 2))
    golden.check("mid/cache_mean", torch.stack([state.mean for state in states[:-1]], 2))
