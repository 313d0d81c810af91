"""Models with the parameters of a golden case of the branch `optimized`, and tensors by our names as arrays of its tree."""

from typing import Any

import torch
from torch import Tensor, nn

from golden_arrays import GoldenCase
from vqkit.models.attention import AttentionUnit
from vqkit.models.config import ModelConfig
from vqkit.models.presets import official_optimized
from vqkit.models.transformer import TransformerVQ
from vqkit.quantizers.config import CodebookConfig

# Below one attention: our parameter -> official kernels, which are stored transposed and, where they are several, as rows of one weight.
KERNELS = {
    "q.weight": ("qkvg_producer/q_proj",),
    "kv.weight": ("qkvg_producer/k_proj", "qkvg_producer/v_proj"),
    "kvg.weight": ("qkvg_producer/k_proj", "qkvg_producer/v_proj", "qkvg_producer/g_proj"),
    "r.weight": ("xl_bias_producer/xl_r_proj",),
    "out.weight": ("res_proj",),
}
# The official "sum" multiplies by triangular matrices of ones, which is what "auto" may do in any way.
REDUCTIONS = {"serial": "serial", "matmul": "matmul", "assoc_scan": "associative", "sum": "auto"}
BIASES = {"content_bias": "xl_bias_producer/xl_u", "position_bias": "xl_bias_producer/xl_v"}
FEED_FORWARD = {"up.weight": "Dense_0", "down.weight": "Dense_1"}


def config_of(golden: GoldenCase) -> ModelConfig:
    """The official configuration in our words."""
    c: dict[str, Any] = golden.config
    config = official_optimized(
        c["head_type"],
        dim=c["d_model"],
        key_dim=c["d_k"],
        block_len=c["block_len"],
        vocab_size=c["n_vocab"],
        layers=c["n_layer"],
        codebook_size=c["n_code"],
        attention=c["attn_type"],
        reduction=REDUCTIONS[c["reduction_type"]] if c["attn_type"] == "vq" else "auto",
        absolute_positions=c["pe_abs"],
        position_base=float(c["pe_lam"]),
        tied=c["e_tie"],
        output_norm=c["e_preln"],
        logit_scale=c["e_scale"],
        codebook=CodebookConfig(decay=c["c_gamma"]),
    )
    assert (config.heads, config.num_key_heads) == (golden.meta["n_query_head"], golden.meta["n_key_value_head"])
    assert config.value_dim == golden.meta["d_v"]
    return config


def unit_arrays(unit: AttentionUnit, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by our names of the parameters of a unit -> by their names and in the form of the official tree."""
    arrays: dict[str, Tensor] = {}
    for ours, tensor in tensors.items():
        if ours in BIASES:
            arrays[BIASES[ours]] = tensor
            continue
        names = KERNELS[ours]
        rows = tensor.split(unit._rows) if len(names) > 1 else [tensor]
        arrays |= {f"{name}/kernel": part.T for name, part in zip(names, rows, strict=True)}
    return arrays


def model_arrays(model: TransformerVQ, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As `unit_arrays` for a whole model; layers are stacked there, with an axis of one behind that of the layers."""
    ends = {"embedding.weight": "token_embed/embedding", "positions.scale": "pos_embed/scale", "logits.bias": "out_proj/bias"}
    arrays = {official: tensors[ours] for ours, official in ends.items() if ours in tensors}
    if "logits.weight" in tensors:
        arrays["out_proj/kernel"] = tensors["logits.weight"].T
    layers: list[dict[str, Tensor]] = []
    for i, layer in enumerate(model.layers):
        own: dict[str, Tensor] = {}
        for j, unit in enumerate(layer.attention):
            prefix = f"layers.{i}.attention.{j}."
            below = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            own |= {f"{attention_name(model.config, j)}/{key}": t for key, t in unit_arrays(unit, below).items()}
        for ours, official in FEED_FORWARD.items():
            if f"layers.{i}.feed_forward.{ours}" in tensors:
                own[f"MultiLayerPerceptron_0/{official}/kernel"] = tensors[f"layers.{i}.feed_forward.{ours}"].T
        layers.append(own)
    arrays |= {f"stack/{key}": torch.stack([layer[key] for layer in layers]).unsqueeze(1) for key in layers[0]}
    return arrays


def attention_name(config: ModelConfig, part: int) -> str:
    """The official name of the attention that is a part of a layer."""
    return f"{'VQ' if config.attention == 'vq' else 'Full'}Attention_{part}"


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """By parameter; one that got none counts as zero."""
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in module.named_parameters()}


def attention_of(golden: GoldenCase) -> AttentionUnit:
    """The unit of a case of the group `attention`."""
    unit = AttentionUnit(config_of(golden)).to(golden.dtype).train(golden.config["is_train"])
    own = dict(unit.named_parameters())
    with torch.no_grad():
        copy_(unit_arrays(unit, own), golden, "params")
        if unit.config.attention == "vq":
            unit.quantizer.sum.copy_(golden["params/quantizer/c_sum"])
            unit.quantizer.count.copy_(golden["params/quantizer/c_count"])
    return unit


def model_of(golden: GoldenCase, prefix: str = "params") -> TransformerVQ:
    """The model of a case that has parameters below `prefix`."""
    config = config_of(golden)
    model = TransformerVQ(config).to(golden.dtype).train(golden.config["is_train"])
    arrays = model_arrays(model, dict(model.named_parameters()))
    with torch.no_grad():
        for i, layer in enumerate(model.layers):
            stacked = {key: golden[f"{prefix}/{key}"][i, 0] for key in arrays if key.startswith("stack/")}
            for j, unit in enumerate(layer.attention):
                below = f"stack/{attention_name(config, j)}/"
                views = unit_arrays(unit, dict(unit.named_parameters()))
                for key, view in views.items():
                    view.copy_(stacked[below + key])
                if config.attention == "vq":
                    unit.quantizer.sum.copy_(golden[f"{prefix}/{below}quantizer/c_sum"][i, 0])
                    unit.quantizer.count.copy_(golden[f"{prefix}/{below}quantizer/c_count"][i, 0])
            if layer.feed_forward is not None:
                layer.feed_forward.up.weight.copy_(stacked["stack/MultiLayerPerceptron_0/Dense_0/kernel"].T)
                layer.feed_forward.down.weight.copy_(stacked["stack/MultiLayerPerceptron_0/Dense_1/kernel"].T)
        copy_({key: view for key, view in arrays.items() if not key.startswith("stack/")}, golden, prefix)
    expected = {key for key in golden.keys(f"{prefix}/") if "/quantizer/" not in key}
    assert expected == {f"{prefix}/{key}" for key in arrays}
    return model


def copy_(views: dict[str, Tensor], golden: GoldenCase, prefix: str) -> None:
    for key, view in views.items():
        value = golden[f"{prefix}/{key}"]
        assert view.shape == value.shape, key
        view.copy_(value)
