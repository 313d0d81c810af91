"""Recipes are whole configurations, made without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vqkit.config import from_json, to_json
from vqkit.data import pack
from vqkit.data.source import list_files
from vqkit.recipes import RECIPES, quickstart, text
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
