"""Recipes are whole configurations, made without torch."""

from __future__ import annotations

import subprocess
import sys
from functools import reduce
from pathlib import Path

import pytest

from vqkit.config import from_json, to_json
from vqkit.data import pack
from vqkit.data.config import SizedSplits
from vqkit.data.source import list_files
from vqkit.models.cost import num_codebook_values, num_parameters
from vqkit.recipes import HARDWARE, RECIPES, TOP_P, quickstart, text
from vqkit.train.config import RunConfig


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_knows_its_name_and_comes_back_from_json(name: str) -> None:
    config = RECIPES[name]()
    assert config.recipe == name
    assert from_json(RunConfig, to_json(config)) == config


def test_quickstart_reads_the_python_library_but_its_tests(tmp_path: Path) -> None:
    config = quickstart()
    files = list_files(config.data).files
    parts = {part for file in files for part in file.name.split("/")}
    assert {"os.py", "json", "decoder.py"} <= parts
    assert not parts & {"test", "site-packages", "dist-packages"}
    assert all(file.name.endswith(".py") for file in files)
    summary = pack(config.data, tmp_path / "data")
    assert 8e6 < summary.total.bytes < 30e6
    assert 200_000 < summary.test.bytes <= 256 * 1024
    assert 200_000 < summary.validation.bytes <= 256 * 1024


def test_text_is_the_quickstart_on_files_that_must_be_named() -> None:
    assert (text().model, text().train) == (quickstart().model, quickstart().train)
    with pytest.raises(ValueError, match=r"data\.path is empty: name a file or a folder with --data\.path"):
        list_files(text().data)


def test_recipes_need_neither_torch_nor_numpy() -> None:
    program = "import sys, vqkit.recipes as r; [recipe() for recipe in r.RECIPES.values()]; print({'torch', 'numpy'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "set()\n"


PUBLISHED = {
    "model.dim": (768, 2048, 2048),
    "model.key_dim": (128, 128, 128),
    "model.value_dim": (1536, 4096, 4096),
    "model.layers": (24, 24, 24),
    "model.layer": ("gated", "gated", "gated"),
    "model.heads": (1, 1, 1),
    "data.sequence_len": (8192, 8192, 12_288),
    "train.update_len": (2048, 2048, 1536),
    "model.block_len": (512, 512, 512),
    "model.mem_len": (512, 512, 512),
    "model.codebook_size": (512, 512, 512),
    "train.batch_size": (128, 128, 128),
    "model.vocab_size": (259, 32_000, 259),
    "model.absolute_positions": (False, False, True),
    "model.position_base": (100_000.0, 100_000.0, 100_000.0),
    "model.embedding_dropout": (0.0, 0.0, 0.0),
    "model.sinusoid_dropout": (0.2, 0.1, 0.1),
    "model.residual_dropout": (0.5, 0.1, 0.0),
    "model.layer_dropout": (0.3, 0.1, 0.0),
    "train.commitment_weight": (1e-4, 1e-4, 1e-4),
    "model.codebook.decay": (0.99, 0.99, 0.99),
    "model.tied": (False, True, True),
    "model.output_norm": (False, True, True),
    "model.logit_scale": (1.0, 0.005, 0.005),
    "train.optimizer": ("adamw", "adafactor", "adafactor"),
    "train.learning_rate": (4e-4, 1e-2, 1e-2),
    "train.schedule": ("cosine", "cosine", "cosine"),
    "train.final_ratio": (0.1, 0.1, 0.1),
    "train.clip": (0.1, None, None),
    "train.weight_decay": (2e-4, 0.0, 0.0),
    "train.warmup_steps": (10_000, 10_000, 10_000),
    "train.steps": (125_000, 500_000, 500_000),
    "train.precision": ("bfloat16", "bfloat16", "bfloat16"),
    "train.eval_context": ("sequence", "sequence", "sequence"),
    "train.eval_tokens": (None, None, None),
    "data.segments": ("ignore", "ignore", "ignore"),
    "data.splits.kind": ("sizes", "paths", "paths"),
    "data.source.kind": ("text", "text", "images"),
    "data.tokenizer.kind": ("bytes", "sentencepiece", "bytes"),
}
NAMES = ("enwik8", "pg19", "imagenet64")


@pytest.mark.parametrize("path", PUBLISHED)
def test_the_published_recipes_have_the_published_settings(path: str) -> None:
    found = tuple(reduce(getattr, path.split("."), RECIPES[name]()) for name in NAMES)
    assert found == PUBLISHED[path]


def test_the_published_recipes_have_the_published_sizes() -> None:
    """Published: 190 M, 1.3 B and 1.2 B. Codebooks are counted here; the first is 188 M."""
    sizes = [num_parameters(model) + num_codebook_values(model) for model in (RECIPES[name]().model for name in NAMES)]
    assert [f"{sizes[0] / 1e6:.0f}", *(f"{size / 1e9:.1f}" for size in sizes[1:])] == ["188", "1.3", "1.2"]


def test_the_sizes_of_the_splits_of_enwik8() -> None:
    assert RECIPES["enwik8"]().data.splits == SizedSplits(90_000_000, 5_000_000, 5_000_000)
    assert TOP_P == {"enwik8": 0.9, "pg19": 0.8, "imagenet64": 0.999}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_fits_its_data_and_says_what_it_is_sized_for(name: str) -> None:
    config = RECIPES[name]()
    assert config.model.vocab_size == config.data.vocab_size
    assert set(HARDWARE) == set(RECIPES)
    if name not in NAMES:
        assert (config.data.segments, config.train.eval_context) == ("isolate", "carry")
        assert num_parameters(config.model) < {"a laptop": 21e6, "one GPU": 40e6}[HARDWARE[name]]
