"""Parameter trees of branch `optimized`, written as a checkpoint and imported: what the official model says, from the shapes alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import golden_arrays
from official_files import nested, write
from vqkit.compat import OfficialSettings, load_official
from vqkit.compat.official_names import to_official

GROUP = "optimized/transformer"
CASES = golden_arrays.case_ids(GROUP)


def test_there_are_cases_of_every_kind() -> None:
    for kind in ("shga_full", "shga_vq", "mqa_full", "mqa_vq", "mha_full", "mha_vq"):
        assert [case for case in CASES if kind in case], kind


@pytest.mark.parametrize("case_id", CASES)
def test_an_imported_model_says_what_the_official_model_says(tmp_path: Path, case_id: str) -> None:
    golden = golden_arrays.load(GROUP, case_id)
    c, params = golden.config, {key: array.to(golden.dtype) for key, array in golden.tree("params/").items()}
    settings = OfficialSettings(
        block_len=c["block_len"],
        logit_scale=c["e_scale"],
        output_norm=c["e_preln"],
        key_dim=c["d_k"] if (c["attn_type"], c["head_type"]) == ("full", "mha") else None,
        position_base=c["pe_lam"],
        decay=c["c_gamma"],
    )
    loaded = load_official(write({"step": 1, "params": nested(params)}, tmp_path / "checkpoint_1"), settings)
    arrays = to_official(loaded.model.state_dict(), loaded.config)
    assert arrays.keys() == params.keys()
    assert all(torch.equal(arrays[key], array) for key, array in params.items())
    with torch.no_grad():
        logits = loaded.model(golden["inputs"].long()).logits
    expected = golden["out/logits"]
    error = float((logits - expected).abs().max() / expected.abs().max().clamp(min=1.0))
    assert error <= golden.tolerance("out/logits")
