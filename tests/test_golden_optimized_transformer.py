"""The whole model in all forms of the branch `optimized`: logits, losses, inner tensors, gradients."""

import math

import pytest
import torch
from torch import Tensor

import golden_arrays
from golden_arrays import GoldenCase
from golden_models import codebook_gradient
from golden_optimized import attention_name, gradients, model_arrays, model_of
from vqkit.models.presets import official_optimized
from vqkit.models.transformer import ModelOutput, TransformerVQ

GROUP = "optimized/transformer"
CASES = golden_arrays.case_ids(GROUP)


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients(name: str) -> None:
    golden = golden_arrays.load(GROUP, name)
    mask = golden["loss_mask"].bool()
    for impl in ("auto", "reference", "recurrent", "blocked") if golden.config["attn_type"] == "vq" else ("auto", "reference"):
        model = model_of(golden)
        out = model(golden["inputs"], mask=mask, impl=impl)
        golden.check("out/logits", out.logits)
        nats = -out.logits.log_softmax(-1).gather(-1, golden["targets"].long()[..., None])[..., 0]
        language = (mask * nats).mean()
        # In evaluation the official code reports no losses for the codes.
        commitment = out.commitment if model.training else torch.zeros_like(out.commitment)
        total = language + golden.config["c_beta"] * commitment
        golden.check("out/l_ce_term_avg", language)
        golden.check("out/l_ce_mask_avg", mask.float().mean())
        golden.check("out/l_commit", commitment)
        golden.check("out/l_codebook", torch.zeros_like(commitment))
        golden.check("out/l_total_avg", total)
        if model.training:
            total.backward()
            for key, gradient in model_arrays(model, gradients(model)).items():
                golden.check(f"grad/params/{key}", gradient)
            check_codebook_gradients(golden, model, out)
        else:
            assert not golden.keys("grad/")


def check_codebook_gradients(golden: GoldenCase, model: TransformerVQ, out: ModelOutput) -> None:
    """There the statistics of the whole sequence enter as often as it has blocks, a fault that the factor repeats."""
    factor = golden.config["n_device"] * golden.meta["n_block"]
    per_layer = model.config.attentions_per_layer
    found = [codebook_gradient(unit, [own], factor) for unit, own in zip(model.units(), out.statistics, strict=False)]
    assert len(found) == (per_layer * model.config.layers if model.config.attention == "vq" else 0)
    for part in range(per_layer if found else 0):
        for i, key in enumerate(("c_sum", "c_count")):
            layers = torch.stack([gradient[i] for gradient in found[part::per_layer]])
            golden.check(f"grad/params/stack/{attention_name(model.config, part)}/quantizer/{key}", layers[:, None])


@pytest.mark.parametrize("name", [n for n in CASES if golden_arrays.load(GROUP, n).keys("mid/")])
def test_inner_tensors(name: str) -> None:
    golden = golden_arrays.load(GROUP, name)
    model = model_of(golden)
    config = model.config
    seen: dict[str, list[Tensor]] = {}

    def record(key: str, value: Tensor) -> None:
        seen.setdefault(key, []).append(value)

    model.embedding.register_forward_hook(lambda _, args, out: record("token_embed", out))
    if model.norm is not None:
        model.norm.register_forward_hook(lambda _, args, out: record("out_ln", out))
    for layer in model.layers:
        layer.register_forward_hook(lambda _, args, out: record("layer_out", out.output))
        layer.register_forward_hook(lambda _, args, out: record("l_commit_after_layer", out.commitment))
        for j, unit in enumerate(layer.attention if config.attention == "vq" else ()):
            own = attention_name(config, j)
            unit.register_forward_hook(lambda _, args, out, own=own: record(f"{own}/l_commit", out.commitment))
            unit.register_forward_pre_hook(
                lambda unit, args, own=own: record(f"{own}/shortcodes", unit.quantizer.encode(unit.project(args[0]).k))
            )
    model(golden["inputs"])
    stacked = {key: torch.stack(values) if key not in ("token_embed", "out_ln") else values[0] for key, values in seen.items()}
    stacked["l_commit_after_layer"] = stacked["l_commit_after_layer"].cumsum(0)
    if not model.training:
        stacked = {key: torch.zeros_like(value) if "l_commit" in key else value for key, value in stacked.items()}
    assert {f"mid/{key}" for key in stacked} == set(golden.keys("mid/"))
    for key, tensor in stacked.items():
        golden.check(f"mid/{key}", tensor.unflatten(-1, (-1, config.block_len)) if key.endswith("shortcodes") else tensor)


@pytest.mark.parametrize("head_type", ["shga", "mqa", "mha"])
@pytest.mark.parametrize("tied", [True, False])
def test_initial_values(head_type: str, tied: bool) -> None:
    """The README beside the arrays names them; here within the noise of one draw."""
    config = official_optimized(head_type, dim=64, key_dim=16, block_len=8, layers=2, codebook_size=64, tied=tied, absolute_positions=True)
    model = TransformerVQ(config)
    arrays = model_arrays(model, {name: p.detach() for name, p in model.named_parameters()})
    assert ("out_proj/bias" in arrays) != tied
    for key, tensor in arrays.items():
        # Kernels are [in, out]; everything that is no kernel and no embedding starts at 0.
        deviation = {"kernel": tensor.shape[-2] ** -0.5 if tensor.dim() > 1 else 0.0, "embedding": 1.0}.get(key.rsplit("/", 1)[1], 0.0)
        assert_normal(tensor, deviation, key)
    for unit in model.units():
        assert_normal(unit.quantizer.sum, (config.num_key_heads * config.codebook_size) ** -0.5, "c_sum")
        assert (unit.quantizer.count == 1).all()


def assert_normal(x: Tensor, deviation: float, name: str) -> None:
    noise = deviation / math.sqrt(x.numel())
    assert abs(x.mean().item()) <= 5 * noise, name
    assert abs(x.std(unbiased=False).item() - deviation) <= 4 * noise, name
