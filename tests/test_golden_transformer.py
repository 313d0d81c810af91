"""The whole model against the official one: two calls with carried state, losses, metrics, inner tensors, gradients, initialisation."""

import math

import pytest
import torch
from torch import Tensor

import golden_arrays
from golden_arrays import GoldenCase
from golden_models import (
    check_gradients,
    codebook_gradient,
    config_of,
    model_names,
    model_of,
    state_arrays,
    unit_names,
    window_documents,
)
from vqkit.models.dropout import DropoutMasks, SequenceMasks
from vqkit.models.metrics import model_metrics
from vqkit.models.transformer import ModelOutput, ModelState, TransformerVQ

CASES = [name for name in golden_arrays.case_ids("transformer") if not name.startswith("init_stats")]


def run_call(model: TransformerVQ, golden: GoldenCase, call: str, state: ModelState | None, inputs: Tensor, impl: str) -> ModelOutput:
    mask = golden[f"{call}/loss_mask"].bool()
    if not golden.keys(f"{call}/keep/"):
        return model(inputs, state, mask=mask, impl=impl)
    state = model.initial_state(len(inputs)) if state is None else state
    return model(inputs, state._replace(masks=sequence_masks(golden, call)), mask=mask, impl=impl, dropout=dropout_masks(golden, call))


def sequence_masks(golden: GoldenCase, call: str) -> SequenceMasks:
    """What was drawn once for the sequence; the rows of the official table have falling distance, and some that no score uses."""
    layers, mem_len = range(golden.config["n_layer"]), golden.config["mem_len"]
    tables = [golden[f"{call}/keep/transformer_layers_{i}/scanned_attn{j}/dropsin"] for i in layers for j in (1, 2)]
    elements = [golden[f"{call}/keep/transformer_layers_{i}/droplyr{j}"] for i in layers for j in (1, 2)]
    return SequenceMasks(tuple(t.flip(0)[: mem_len + 1] for t in tables), tuple(e[0, :, 0, 0] for e in elements))


def dropout_masks(golden: GoldenCase, call: str) -> DropoutMasks:
    """What was drawn in the call; that of the residual lies by blocks."""
    layers = range(golden.config["n_layer"])
    blocks = [golden[f"{call}/keep/transformer_layers_{i}/scanned_attn{j}/dropres"] for i in layers for j in (1, 2)]
    return DropoutMasks(golden[f"{call}/keep/dropemb"], tuple(b.transpose(0, 1).flatten(1, 2) for b in blocks))


def losses(golden: GoldenCase, call: str, out: ModelOutput, training: bool) -> dict[str, Tensor]:
    """The official loss: a mean over all positions, masked ones adding 0; in evaluation it has no part for the codes."""
    mask = golden[f"{call}/loss_mask"].to(out.logits.dtype)
    log_probability = out.logits.log_softmax(-1).gather(-1, golden[f"{call}/targets"].long()[..., None])[..., 0]
    language = (mask * -log_probability).mean()
    commitment = out.commitment if training else torch.zeros_like(out.commitment)
    return {
        "l_lm_unscaled": language,
        "l_commit": commitment,
        "l_codebook": torch.zeros_like(commitment),
        "loss_composite": language + golden.config["c_beta"] * commitment,
        "metrics/loss_lm_per_token_unscaled": language,
        "metrics/loss_commit_per_token": commitment,
        "metrics/loss_mask_per_token": mask.mean(),
    }


@pytest.mark.parametrize("impl", ["auto", "reference", "recurrent", "blocked"])
@pytest.mark.parametrize("name", CASES)
def test_two_calls(name: str, impl: str) -> None:
    golden = golden_arrays.load("transformer", name)
    model = model_of(golden)
    state: ModelState | None = None
    doc_ids: list[Tensor] = []
    for call in ("call1", "call2"):
        model.zero_grad()
        inputs = golden[f"{call}/inputs"]
        if inputs.is_floating_point():
            inputs.requires_grad_()
        out = run_call(model, golden, call, None if state is None else state.detach(), inputs, impl)
        state = out.state
        doc_ids.append(golden[f"{call}/doc_ids"])

        golden.check(f"{call}/out/logprobs", out.logits.log_softmax(-1))
        found = losses(golden, call, out, model.training)
        for key, value in found.items():
            if f"{call}/out/{key}" in golden or not key.startswith("metrics/"):  # the case with dropout has none of these
                golden.check(f"{call}/out/{key}", value)
        check_state(golden, f"{call}/out/attn_state", state, torch.cat(doc_ids, 1))
        if golden.keys(f"{call}/grad/"):
            found["loss_composite"].backward()
            if inputs.is_floating_point():
                golden.check(f"{call}/grad/inputs", inputs.grad)
            check_model_gradients(golden, f"{call}/grad/params", model, out)


def check_state(golden: GoldenCase, prefix: str, state: ModelState, doc_ids: Tensor) -> None:
    config = config_of(golden)

    def stacked(tensors: list[Tensor]) -> Tensor:
        return torch.stack(tensors).unflatten(0, (config.layers, 2))

    units = [state_arrays(s, config.codebook_size) for s in state.attention]
    for key in units[0]:
        golden.check(f"{prefix}/{key}", stacked([unit[key] for unit in units]))
    window, latest = window_documents(doc_ids, config.mem_len)
    golden.check(f"{prefix}/xlcache/doc_ids", stacked([window] * len(units)))
    golden.check(f"{prefix}/aggcache/latest_doc_id", stacked([latest] * len(units)))
    assert (state.position == doc_ids.shape[1]).all()
    golden.check(f"{prefix}/pos_offset", stacked([state.position[0]] * len(units)))


def check_model_gradients(golden: GoldenCase, prefix: str, model: TransformerVQ, out: ModelOutput) -> None:
    check_gradients(golden, prefix, model, model_names(model))
    if f"{prefix}/token_embedder/bias_out" in golden and not model.config.tied:  # there it exists, unused
        golden.check(f"{prefix}/token_embedder/bias_out", torch.zeros(model.config.vocab_size))
    # Every block's loss counts n_block times the statistics of the block, and the losses are averaged over blocks.
    for unit, name, statistics in zip(model.units(), unit_names(model), out.statistics, strict=True):
        total, count = codebook_gradient(unit, [statistics], golden.meta.get("n_device_in_vq_spec", 1))
        golden.check(f"{prefix}/{name}/quantizer/c_sum", total)
        golden.check(f"{prefix}/{name}/quantizer/c_count", count)


@pytest.mark.parametrize("name", [n for n in CASES if golden_arrays.load("transformer", n).keys("call1/out/metrics/c_")])
def test_metrics(name: str) -> None:
    golden = golden_arrays.load("transformer", name)
    model = model_of(golden)
    state = None
    for call in ("call1", "call2"):
        units = model_metrics(model, golden[f"{call}/inputs"], state)
        state = run_call(model, golden, call, state, golden[f"{call}/inputs"], "auto").state
        official = {key.rsplit("/", 1)[1] for key in golden.keys(f"{call}/out/metrics/")}
        assert {metric for metric in official if not metric.startswith("loss_")} == units[0].keys()
        for metric in units[0]:
            golden.check(f"{call}/out/metrics/{metric}", torch.stack([unit[metric] for unit in units]).mean())


@pytest.mark.parametrize("name", [n for n in CASES if golden_arrays.load("transformer", n).keys("call1/mid/")])
def test_inner_tensors(name: str) -> None:
    golden = golden_arrays.load("transformer", name)
    model, config = model_of(golden), config_of(golden)
    seen: dict[str, Tensor] = {}
    modules = {"token_embedder": model.embedding, "position_embedder": model.positions, "out_ln": model.norm}
    for key, module in modules.items():
        if module is not None:
            module.register_forward_hook(lambda _, args, out, key=key: seen.__setitem__(key, out))
    for i, layer in enumerate(model.layers):
        key = f"transformer_layers_{i}/output_features"
        layer.register_forward_hook(lambda _, args, out, key=key: seen.__setitem__(key, out.output))
    state = None
    for call in ("call1", "call2"):
        seen.clear()
        state = run_call(model, golden, call, state, golden[f"{call}/inputs"], "auto").state
        assert {f"{call}/mid/{key}" for key in seen} == set(golden.keys(f"{call}/mid/"))
        for key, tensor in seen.items():
            if key == "position_embedder":
                tensor = tensor[0]  # there all rows share their positions
            if key.endswith("output_features"):
                tensor = tensor.unflatten(1, (-1, config.block_len)).transpose(0, 1)
            golden.check(f"{call}/mid/{key}", tensor)


@pytest.mark.parametrize("name", golden_arrays.case_ids("transformer", "init_stats*"))
def test_initialisation(name: str) -> None:
    """Mean and standard deviation of many numbers agree with those of the official draw within the noise of both draws."""
    golden = golden_arrays.load("transformer", name)
    config = config_of(golden)
    model = TransformerVQ(config)
    parameters: dict[str, Tensor] = {
        official: parameter for ours, parameter in model.named_parameters() for official, _ in [model_names(model)[ours]]
    }
    for unit, path in zip(model.units(), unit_names(model), strict=True):
        parameters[f"{path}/quantizer/c_sum"] = unit.quantizer.sum
        parameters[f"{path}/quantizer/c_count"] = unit.quantizer.count
    official = {key.removeprefix("mean/") for key in golden.keys("mean/")}
    if not config.tied:
        official.remove("token_embedder/bias_out")  # exists there, unused
        assert golden["mean/token_embedder/bias_out"] == golden["std/token_embedder/bias_out"] == 0
    assert parameters.keys() == official

    for key, parameter in parameters.items():
        shape = golden.meta["parameter_table"][key]["shape"]
        assert list(parameter.shape) in (shape, shape[::-1]), key
        mean, std = golden[f"mean/{key}"].item(), golden[f"std/{key}"].item()
        spread = std / math.sqrt(parameter.numel())
        assert abs(parameter.mean().item() - mean) <= 6 * spread, key
        assert abs(parameter.std(unbiased=False).item() - std) <= 4 * spread, key
