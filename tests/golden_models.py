"""Models with the parameters of a golden case, and golden arrays by our names."""

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from golden_arrays import GoldenCase
from vqkit.models.attention import AttentionUnit
from vqkit.models.config import ModelConfig
from vqkit.models.transformer import TransformerVQ
from vqkit.ops.codebook import CodebookStatistics, ema_update
from vqkit.ops.vq_attention import AttentionState
from vqkit.quantizers.config import CodebookConfig

Module = TypeVar("Module", bound=torch.nn.Module)


def config_of(golden: GoldenCase) -> ModelConfig:
    """The official configuration in our words."""
    c: dict[str, Any] = golden.config
    return ModelConfig(
        vocab_size=c["n_vocab"],
        dim=c["d_model"],
        key_dim=c["d_k"],
        value_dim=c["d_v"],
        layers=c["n_layer"],
        heads=c["n_head"],
        codebook_size=c["n_code"],
        block_len=c["block_len"],
        mem_len=c["mem_len"],
        cache=c["agg_cache"],
        cache_gradient=c["grad_thru_cache"],
        input="features" if c["no_emb"] else "tokens",
        absolute_positions=c["pe_abs"],
        position_base=float(c["pe_lam"]),
        tied=c["e_tie"],
        output_norm=c["e_preln"],
        logit_scale=c["e_scale"],
        embedding_dropout=c["p_dropemb"],
        residual_dropout=c["p_dropres"],
        sinusoid_dropout=c["p_dropsin"],
        layer_dropout=c["p_droplyr"],
        codebook=CodebookConfig(decay=c["c_gamma"]),
    )


def attention_names() -> dict[str, tuple[str, bool]]:
    """Our name of each parameter of a unit -> official name, and whether it is stored transposed."""
    return {
        "norm.gain": ("input_ln/g", False),
        "norm.bias": ("input_ln/b", False),
        "q.weight": ("q_proj/kernel", True),
        "kvg.weight": ("kvg_proj/kernel", True),
        "r.weight": ("r_proj/kernel", True),
        "out.weight": ("res_proj/kernel", True),
        "content_bias": ("u", False),
        "position_bias": ("v", False),
    }


def model_names(model: TransformerVQ) -> dict[str, tuple[str, bool]]:
    """As `attention_names`, for the parameters that this model has."""
    names = {
        "embedding.weight": ("token_embedder/embs", False),
        "positions.scale": ("position_embedder/scale", False),
        "norm.gain": ("out_ln/g", False),
        "norm.bias": ("out_ln/b", False),
        "logits.weight": ("out_proj/kernel", True),
        "logits.bias": ("token_embedder/bias_out" if model.config.tied else "out_proj/bias", False),
    }
    for i in range(model.config.layers):
        for j in (0, 1):
            for ours, (official, transposed) in attention_names().items():
                names[f"layers.{i}.attention.{j}.{ours}"] = (f"transformer_layers_{i}/scanned_attn{j + 1}/{official}", transposed)
    own = dict(model.named_parameters())
    return {ours: entry for ours, entry in names.items() if ours in own}


def attention_of(golden: GoldenCase) -> AttentionUnit:
    """The unit of a case of the group `attention`."""
    unit = AttentionUnit(config_of(golden)).to(golden.dtype).train(golden.config["is_train"])
    fill_(unit, attention_names(), golden)
    fill_codebook_(unit, golden, "params/quantizer")
    return in_compute_type_(unit, golden)


def model_of(golden: GoldenCase, prefix: str = "params") -> TransformerVQ:
    """The model of a case that has parameters below `prefix`."""
    model = TransformerVQ(config_of(golden)).to(golden.dtype).train(golden.config["is_train"])
    fill_(model, model_names(model), golden, prefix)
    if not model.config.tied and f"{prefix}/token_embedder/bias_out" in golden:
        assert golden[f"{prefix}/token_embedder/bias_out"].shape == (model.config.vocab_size,)  # exists there, unused
    for unit, name in zip(model.units(), unit_names(model), strict=True):
        fill_codebook_(unit, golden, f"{prefix}/{name}/quantizer")
    return in_compute_type_(model, golden)


def in_compute_type_(module: Module, golden: GoldenCase) -> Module:
    """The types that the official code multiplies in: in bf16 the matrices are bfloat16, vectors and output projection float32."""
    for name, parameter in module.named_parameters():
        if parameter.dim() == 2 and not name.startswith("logits."):
            parameter.data = in_activation_type(golden, parameter.data)
    return module


def in_activation_type(golden: GoldenCase, x: Tensor) -> Tensor:
    """bfloat16 is stored as float32."""
    return x.bfloat16() if golden.variant == "bf16" and x.is_floating_point() else x


def unit_names(model: TransformerVQ) -> list[str]:
    """The official path of each attention unit, in order."""
    return [f"transformer_layers_{i}/scanned_attn{j}" for i in range(model.config.layers) for j in (1, 2)]


@torch.no_grad()
def fill_(module: torch.nn.Module, names: dict[str, tuple[str, bool]], golden: GoldenCase, prefix: str = "params") -> None:
    parameters = dict(module.named_parameters())
    assert parameters.keys() == names.keys()
    for ours, (official, transposed) in names.items():
        value = golden[f"{prefix}/{official}"]
        value = value.T if transposed else value
        assert parameters[ours].shape == value.shape, ours
        parameters[ours].copy_(value)


@torch.no_grad()
def fill_codebook_(unit: AttentionUnit, golden: GoldenCase, prefix: str) -> None:
    unit.quantizer.sum.copy_(golden[f"{prefix}/c_sum"])
    unit.quantizer.count.copy_(golden[f"{prefix}/c_count"])


def check_gradients(golden: GoldenCase, prefix: str, module: torch.nn.Module, names: dict[str, tuple[str, bool]]) -> None:
    """Compare the gradients of all parameters with the arrays below `prefix`; one that got none counts as zero."""
    for ours, parameter in module.named_parameters():
        official, transposed = names[ours]
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        golden.check(f"{prefix}/{official}", gradient.T if transposed else gradient)


def codebook_gradient(unit: AttentionUnit, statistics: Iterable[CodebookStatistics], factor: int) -> tuple[Tensor, Tensor]:
    """Gradient with respect to sum and count of the official codebook loss, summed over blocks.

    One SGD step of rate 1 on that loss is the step of the moving averages, so its gradient is old minus new; `factor` is
    devices times blocks per update, by which the official code multiplies the statistics of a block.
    """
    quantizer = unit.quantizer
    total, count = torch.zeros_like(quantizer.sum), torch.zeros_like(quantizer.count)
    for block in statistics:
        scaled = block._replace(sum=block.sum * factor, count=block.count * factor)
        new_sum, new_count = ema_update(quantizer.sum, quantizer.count, scaled, quantizer.config.decay)
        total += quantizer.sum - new_sum
        count += quantizer.count - new_count
    return total, count


def state_arrays(state: AttentionState, codebook_size: int) -> dict[str, Tensor]:
    """The arrays of an attention state under their official names, but for document ids, which the official code only carries along."""
    return {
        "xlcache/z": torch.where(state.indices < 0, codebook_size, state.indices),
        "xlcache/k_hat": state.k_hat,
        "xlcache/v": state.v,
        "aggcache/lower": state.count,
        "aggcache/upper_div_lower": state.mean,
    }


def window_documents(doc_ids: Tensor, mem_len: int) -> tuple[Tensor, Tensor]:
    """What the official state says of documents after the tokens `doc_ids` [B, T]: those in the window, and the last one that left it."""
    ids = torch.cat([doc_ids.new_zeros(doc_ids.shape[0], mem_len + 1), doc_ids], 1)
    return ids[:, -mem_len:], ids[:, -mem_len - 1]
