"""Generation and evaluation against the official implementation: the same tokens from the same noise, the same state at the end."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import golden_arrays
from golden_arrays import GoldenCase
from golden_models import config_of, model_names, model_of, state_arrays, window_documents
from vqkit.generate import SamplingRules, generate
from vqkit.generate.sampling import apply_rules
from vqkit.models.transformer import ModelState, TransformerVQ
from vqkit.train.step import token_nats

GENERATE = golden_arrays.case_ids("generation", "generate_*")
EVALUATE = golden_arrays.case_ids("generation", "evaluate_*")


@pytest.mark.parametrize("mode", ["greedy", "sampled"])
@pytest.mark.parametrize("name", GENERATE)
def test_generation_follows_the_official_one(name: str, mode: str) -> None:
    golden = golden_arrays.load("generation", name)
    model, inputs = _model_of(golden), golden[f"{mode}/inputs"]
    p, length = golden.config["p_nucleus"], inputs.shape[1]
    assert (inputs[:, 0] == golden.meta["eos_id"]).all()
    noise = golden["sampled/gumbel"] if mode == "sampled" else None
    temperature = 1.0 if mode == "sampled" else 0.0
    options = {"temperature": temperature, "top_p": p, "official_nucleus": True, "noise": noise}
    generation = generate(model, inputs[:, :1], length, **options)
    steps = list(generation)

    tokens = torch.stack([step.tokens for step in steps], 1)
    golden.check(f"{mode}/tokens", tokens)
    golden.check(f"{mode}/inputs", torch.cat([inputs[:, :1].long(), tokens[:, :-1]], 1))
    logits = torch.stack([step.logits for step in steps], 1)
    golden.check(f"{mode}/logprobs", logits.log_softmax(-1))
    golden.check(f"{mode}/kept", apply_rules(logits, SamplingRules(top_p=p, official_nucleus=True)).isfinite())
    _check_final_state(golden, mode, model, generation.state().model, golden[f"{mode}/doc_ids"])


@pytest.mark.parametrize("mode", ["greedy", "sampled"])
@pytest.mark.parametrize("name", GENERATE)
def test_one_call_in_blocks_says_the_same(name: str, mode: str) -> None:
    golden = golden_arrays.load("generation", name)
    steps = _model_of(golden)
    blocks = TransformerVQ(replace(steps.config, block_len=golden.meta["config_in_blocks"]["block_len"])).to(golden.dtype).eval()
    blocks.load_state_dict(steps.state_dict())
    with torch.no_grad():
        logprobs = blocks(golden[f"{mode}/inputs"]).logits.log_softmax(-1)
    golden.check(f"{mode}/logprobs", logprobs)
    key = f"{mode}/logprobs_in_blocks"
    assert (key in golden) == (golden.variant == "f32")
    if key in golden:
        golden.check(key, logprobs)


@pytest.mark.parametrize("name", EVALUATE)
def test_evaluation_counts_every_unmasked_token_once(name: str) -> None:
    golden = golden_arrays.load("generation", name)
    model, losses, masks = _model_of(golden), [], []
    for i in range(golden.meta["n_batch"]):
        prefix = f"batch_{i}"
        assert golden[f"{prefix}/doc_ids"].shape == golden[f"{prefix}/inputs"].shape, "carried along by the official code, never used"
        targets, mask = golden[f"{prefix}/targets"].long(), golden[f"{prefix}/loss_mask"].to(golden.dtype)
        with torch.no_grad():
            logits = model(golden[f"{prefix}/inputs"]).logits
        golden.check(f"{prefix}/logprobs", logits.log_softmax(-1))
        loss, counted = _block_means(golden, token_nats(logits, targets) * mask), _block_means(golden, mask)
        golden.check(f"{prefix}/per_block/loss_lm_per_token_unscaled", loss)
        golden.check(f"{prefix}/per_block/loss_mask_per_token", counted)
        golden.check(f"{prefix}/eval_op/loss_lm_per_token_unscaled", loss.mean())
        golden.check(f"{prefix}/eval_op/loss_mask_per_token", counted.mean())
        losses.append(token_nats(logits, targets) * mask)
        masks.append(mask)
    loss, mask = torch.stack(losses), torch.stack(masks)
    golden.check("evaluate/loss_lm_per_token", loss.sum() / mask.sum())
    golden.check("evaluate/total_tokens", mask.sum())


def _model_of(golden: GoldenCase) -> TransformerVQ:
    """The model; its official output bias, which exists even where the output is not tied, is then in no use."""
    model = model_of(golden)
    used = {official for official, _ in model_names(model).values()}
    there = {key.removeprefix("params/") for key in golden.keys("params/") if "/quantizer/" not in key}
    assert there - used <= {"token_embedder/bias_out"}
    assert golden["params/token_embedder/bias_out"].shape == (model.config.vocab_size,)
    return model


def _block_means(golden: GoldenCase, values: Tensor) -> Tensor:
    """Means over batch and block of values [B, T], one a block."""
    return values.unflatten(1, (-1, golden.config["block_len"])).mean(dim=(0, 2))


def _check_final_state(golden: GoldenCase, mode: str, model: TransformerVQ, state: ModelState, doc_ids: Tensor) -> None:
    config, prefix = config_of(golden), f"{mode}/final_attn_state"
    units = [state_arrays(attention, config.codebook_size) for attention in state.attention]

    def by_layer(arrays: list[Tensor]) -> Tensor:
        return torch.stack(arrays).unflatten(0, (model.config.layers, 2))

    for key in units[0]:
        golden.check(f"{prefix}/{key}", by_layer([unit[key] for unit in units]))
    assert (state.position == state.position[0]).all()
    golden.check(f"{prefix}/pos_offset", by_layer([state.position[0]] * len(units)))
    window, left = window_documents(doc_ids, config.mem_len)
    golden.check(f"{prefix}/xlcache/doc_ids", by_layer([window] * len(units)))
    golden.check(f"{prefix}/aggcache/latest_doc_id", by_layer([left] * len(units)))
