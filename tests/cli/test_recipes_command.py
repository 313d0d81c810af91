"""`vqkit recipes`, and the files that `vqkit train --file` takes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from vqkit.cli import main
from vqkit.cli.errors import UsageError
from vqkit.cli.train import gone_on_with, requested
from vqkit.config import load_toml, to_json
from vqkit.data.config import IdSource, SizedSplits
from vqkit.data.published import PUBLISHED
from vqkit.recipes import DATA, HARDWARE, RECIPES, RESULTS
from vqkit.train.config import RunConfig


@pytest.fixture
def vqkit(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*words: str | Path) -> tuple[int, str, str]:
        return main([str(word) for word in words]), *capsys.readouterr()

    return call


def written(folder: Path, text: str) -> str:
    (folder / "my.toml").write_text(text)
    return str(folder / "my.toml")


def test_the_list_has_every_recipe_with_its_size_data_and_result(vqkit: Callable[..., tuple]) -> None:
    assert set(DATA) == set(RECIPES)
    assert set(RESULTS) == set(PUBLISHED) == {name for name, of in HARDWARE.items() if of == "many GPUs"}
    code, out, err = vqkit("recipes")
    assert (code, err) == (0, "")
    for name in RECIPES:
        cells = re.escape(DATA[name]) + (rf" +{RESULTS[name]}" if name in RESULTS else "")
        assert re.search(rf"^{name} +{HARDWARE[name]} +\d+(\.\d)? [MB]  {cells}$", out, re.MULTILINE)
    assert re.search(r"^enwik8 .* 188 M ", out, re.MULTILINE) and re.search(r"^pg19 .* 1\.3 B ", out, re.MULTILINE)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_as_a_file_is_the_recipe(vqkit: Callable[..., tuple], tmp_path: Path, name: str) -> None:
    code, out, err = vqkit("recipes", name)
    assert (code, err) == (0, "")
    path = tmp_path / "my.toml"
    path.write_text(out)
    assert load_toml(RunConfig, path) == RECIPES[name]()
    data = [] if RECIPES[name]().data.path else ["--data.path", "x"]
    assert requested(name, ["--file", str(path), *data]) == requested(name, data)


def test_a_file_is_written_once(vqkit: Callable[..., tuple], tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    assert vqkit("recipes", "text", "--toml", path)[0] == 0
    assert path.read_text() == vqkit("recipes", "text")[1]
    path.write_text("mine")
    code, out, err = vqkit("recipes", "text", "--toml", path)
    assert (code, out, err) == (1, "", f"vqkit: {path} is there already: must be a new file\n")
    assert path.read_text() == "mine"


def test_values_of_the_file_replace_those_of_the_recipe_and_options_both(tmp_path: Path) -> None:
    file = written(
        tmp_path, 'recipe = "text"\n[model]\ndim = 32\nlayers = 3\n[data]\npath = "x"\n[train]\nclip = "none"\nlearning_rate = 1\n'
    )
    for words in (["--file", file], [f"--file={file}"]):
        _, config = requested("text", [*words, "--model.layers", "5"])
        plain = requested("text", ["--data.path", "x"])[1]
        assert config == replace(
            plain, model=replace(plain.model, dim=32, layers=5), train=replace(plain.train, clip=None, learning_rate=1.0)
        )
    assert main(["train", "--file", file, "--model.dim", "33"]) == 2, "the recipe is that of the file"


def test_a_kind_in_a_file_brings_its_options(tmp_path: Path) -> None:
    text = '[data]\npath = "x"\nsource = { kind = "ids", vocab_size = 9 }\n[data.splits]\nkind = "sizes"\ntrain = 7\n'
    data = requested("text", ["--file", written(tmp_path, text), "--data.splits.test", "3"])[1].data
    assert (data.source, data.splits) == (IdSource(vocab_size=9), SizedSplits(train=7, test=3))
    assert requested("text", ["--file", written(tmp_path, text)])[1].model.vocab_size == 12


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model]\ndimm = 3\n", "my.toml: model.dimm = 3: unknown option; did you mean 'model.dim'?"),
        ("[model]\nlearning_rate = 3\n", "my.toml: model.learning_rate = 3: unknown option; did you mean 'train.learning_rate'?"),
        ("steps = 3\n", "my.toml: steps = 3: unknown option; did you mean 'train.steps'?"),
        ("[model]\ndim = 3.5\n", "my.toml: model.dim = 3.5: must be an integer, not float"),
        ('[model]\ndim = "none"\n', "my.toml: model.dim = 'none': must be an integer, not str"),
        ("[train]\ncompile = 1\n", "my.toml: train.compile = 1: must be true or false, not int"),
        ("[model]\ndim = 33\n", "model.dim = 33: must be even"),
        ("[model\ndim = 32\n", "my.toml: not TOML: "),
        ("dim = = 3\n", "(at line 1, column 7)"),
        ('recipe = "enwik8"\n', "my.toml: recipe = 'enwik8': is for vqkit train enwik8, not for text"),
    ],
)
def test_what_makes_no_sense_in_a_file_is_named(vqkit: Callable[..., tuple], tmp_path: Path, text: str, message: str) -> None:
    code, out, err = vqkit("train", "text", "--data.path", "x", "--file", written(tmp_path, text))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_a_file_that_is_not_there_or_names_no_recipe(vqkit: Callable[..., tuple], tmp_path: Path) -> None:
    assert vqkit("train", "text", "--file", "nowhere.toml")[::2] == (1, "vqkit: nowhere.toml: No such file or directory\n")
    code, _, err = vqkit("train", "--file", written(tmp_path, "[model]\ndim = 32\n"))
    assert code == 2 and "no recipe given: vqkit train RECIPE --file" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("recipes quikstart", "unknown recipe 'quikstart'; did you mean quickstart?"),
        ("recipes --toml x", "--toml: of which recipe?"),
        ("recipes text --tml x", "unknown option --tml; did you mean --toml?"),
    ],
)
def test_words_that_make_no_sense(vqkit: Callable[..., tuple], words: str, message: str) -> None:
    code, out, err = vqkit(*words.split())
    assert (code, out) == (2, "")
    assert message in err


def test_the_warm_up_follows_few_steps_and_the_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--data.path", "x", "--run", str(tmp_path / "run")]
    _, config = requested("text", [*words, "--train.steps", "60"])
    assert (config.train.steps, config.train.warmup_steps) == (60, 6)
    assert capsys.readouterr().err == "vqkit: note: train.steps = 60: a warm-up of 6 steps, not 100\n"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(to_json(config))
    assert requested("text", [*words, "--train.steps", "400"])[1].train.warmup_steps == 6, "it goes on"
    assert requested("text", [*words, "--train.steps", "400", "--train.warmup-steps", "7"])[1].train.warmup_steps == 7
    assert requested("text", ["--data.path", "x", "--train.steps", "400"])[1].train.warmup_steps == 100
    file = written(tmp_path, "[train]\nsteps = 50\n")
    assert requested("text", ["--data.path", "x", "--file", file])[1].train.warmup_steps == 5
    assert requested("text", ["--data.path", "x", "--file", file, "--train.steps", "200"])[1].train.warmup_steps == 100
    with pytest.raises(UsageError, match=r"train\.warmup_steps = 60: must be less than train\.steps = 60"):
        requested("text", ["--data.path", "x", "--train.steps", "60", "--train.warmup-steps", "60"])


def test_a_run_is_gone_on_with_by_its_directory_and_more_steps(tmp_path: Path) -> None:
    config = requested("text", ["--data.path", "x", "--train.minutes", "2"])[1]
    (tmp_path / "config.json").write_text(to_json(config))
    assert gone_on_with(["--run", str(tmp_path)]) == (tmp_path, config)
    _, longer = gone_on_with(["--run", str(tmp_path), "--train.steps", "9000"])
    assert longer == replace(config, train=replace(config.train, steps=9000, minutes=None))
    with pytest.raises(UsageError, match=r"unknown option --train\.stps; did you mean --train\.steps"):
        gone_on_with(["--run", str(tmp_path), "--train.stps", "9000"])
    with pytest.raises(UsageError, match="--init-from: is for a new run"):
        gone_on_with(["--run", str(tmp_path), "--init-from", "x"])
    with pytest.raises(
        UsageError, match=r"recipe text needs data: add --data\.path FOLDER; \S+ is a run already, vqkit train --run \S+ goes on"
    ):
        requested("text", ["--run", str(tmp_path)])
