"""Checkpoints of the official code, in every form of file: the same parameters, log-probabilities and attention state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import golden_arrays
from golden_arrays import GoldenCase
from golden_models import config_of, state_arrays, window_documents
from vqkit.compat import OfficialModel, OfficialSettings, load_official
from vqkit.compat.official_names import to_official, unused
from vqkit.models.transformer import ModelState

CASES = golden_arrays.case_ids("checkpoint")
KINDS = {"ckpt_adafactor_tied_posabs": "adafactor", "ckpt_adamw_untied": "adamw", "ckpt_lion_tied": "lion"}
FORMS = {
    "one file": "{}.train_state.msgpack",
    "a folder": "{}.official_save/checkpoint_3",
    "the newest of a folder": "{}.official_save",
    "parameters alone": "{}.params.msgpack",
}


def path_of(golden: GoldenCase, form: str) -> Path:
    return golden_arrays.ROOT / "checkpoint" / FORMS[form].format(golden.case)


def imported(golden: GoldenCase, form: str) -> OfficialModel:
    c = golden.config
    settings = OfficialSettings(
        block_len=c["block_len"],
        mem_len=c["mem_len"],
        logit_scale=c["e_scale"],
        position_base=c["pe_lam"],
        cache=c["agg_cache"],
        cache_gradient=c["grad_thru_cache"],
        decay=c["c_gamma"],
    )
    return load_official(path_of(golden, form), settings)


def test_cases_are_those_of_the_folder() -> None:
    assert [case.rsplit(".", 1) for case in CASES] == [[case, "f32"] for case in KINDS]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case_id", CASES)
def test_a_loaded_checkpoint_says_what_the_official_model_says(case_id: str, form: str) -> None:
    golden = golden_arrays.load("checkpoint", case_id)
    loaded = imported(golden, form)
    assert loaded.config == loaded.model.config == config_of(golden)
    assert not loaded.model.training
    for key, array in to_official(loaded.model.state_dict(), loaded.config).items():
        if key in unused(loaded.config):
            assert golden[f"params/{key}"].shape == array.shape  # without effect there, and not taken over
            continue
        golden.check(f"params/{key}", array)
        assert torch.equal(array, golden[f"params/{key}"]), key  # no rounding on the way
    with torch.no_grad():
        output = loaded.model(golden["inputs"].long())
    golden.check("out/logprobs", output.logits.log_softmax(-1))
    check_state(golden, output.state)
    whole = form != "parameters alone"
    assert loaded.step == (golden.meta["step"] if whole else None)
    assert (loaded.optimizer is not None) == whole
    if loaded.optimizer is not None:
        assert (loaded.optimizer.kind, loaded.optimizer.steps) == (KINDS[golden.case], golden.meta["step"])


def check_state(golden: GoldenCase, state: ModelState) -> None:
    config = config_of(golden)
    units = [state_arrays(attention, config.codebook_size) for attention in state.attention]
    assert (state.position == state.position[0]).all()
    window, left = window_documents(golden["doc_ids"], config.mem_len)
    for unit in units:
        unit |= {"pos_offset": state.position[0], "xlcache/doc_ids": window, "aggcache/latest_doc_id": left}
    for key in units[0]:
        by_layer: Tensor = torch.stack([unit[key] for unit in units]).unflatten(0, (config.layers, 2))
        golden.check(f"out/attn_state/{key}", by_layer)
