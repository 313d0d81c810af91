"""`vqkit train`: train a model by a recipe, or go on with a run; then measure it, let it write, and say what to do next."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vqkit.cli.errors import UsageError
from vqkit.cli.options import near_miss, parse, value_of
from vqkit.config import differences, from_json, overlay, read_toml
from vqkit.data.config import DataConfig
from vqkit.data.published import PUBLISHED
from vqkit.models.config import ModelConfig
from vqkit.recipes import RECIPES
from vqkit.train.config import RunConfig, TrainConfig

HELP = """usage: vqkit train RECIPE [--file FILE] [--run DIR] [OPTIONS]
       vqkit train --run DIR [OPTIONS]

Train a model by a recipe, measure it on the test split, let it write. A run is a directory (runs/RECIPE unless --run says
otherwise) and can be stopped at any time: the same command, or `vqkit train --run DIR`, goes on where it stopped. Then only the number
of steps, the intervals and the device may be others.

recipes (vqkit recipes shows more of them):
{recipes}

examples:
  vqkit train quickstart
  vqkit train text --data.path FOLDER --run runs/mine --train.steps 2000
  vqkit train --run runs/mine --train.steps 4000
  vqkit train text --data.path OTHER --init-from runs/mine --run runs/tuned

A file of your own, in TOML: its values replace those of the recipe, and options replace those of the file.
  vqkit recipes text --toml my.toml
  vqkit train text --file my.toml --data.path FOLDER

on several processes or GPUs (--run-dir is --run, which torchrun takes for an option of its own):
  torchrun --nproc-per-node 2 -m vqkit train quickstart --run-dir runs/mine

vqkit train RECIPE --help shows every option, with the values of that recipe.
"""


UNDER_TORCHRUN = "--run-dir"
"""What --run may be called as well."""


@dataclass(frozen=True)
class TrainOptions:
    """What a recipe is, and what may be changed of it."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    run: Path | None = None
    """Directory of the run; made if absent, gone on with if it is one. None = runs/RECIPE."""
    file: Path | None = None
    """TOML file whose values replace those of the recipe; options replace both. `vqkit recipes RECIPE --toml FILE` writes one."""
    init_from: Path | None = None
    """Run, checkpoint or export folder whose model and weights to start with, under a new optimizer; add --train.extra-steps for steps
    at the last learning rate, or take --train.schedule constant. None = the model of the recipe, with random weights."""


@dataclass(frozen=True)
class ResumeOptions:
    """Go on with a run, by the configuration that it was started with.
    $ vqkit train --run runs/quickstart
    """

    run: Path
    """Directory of the run."""


def main(words: Sequence[str]) -> int:
    """Parse and run; returns the exit code."""
    # torchrun reads the words first, and takes --run for a beginning of its own options.
    words = ["--run" + word.removeprefix(UNDER_TORCHRUN) if word.partition("=")[0] == UNDER_TORCHRUN else word for word in words]
    if not words:
        raise UsageError(f"no recipe given; there are {', '.join(RECIPES)}; see vqkit train --help")
    if words[0] in ("-h", "--help"):
        width = max(map(len, RECIPES))
        print(HELP.format(recipes="\n".join(f"  {name:<{width}}  {first_line(make.__doc__)}" for name, make in RECIPES.items())), end="")
        return 0
    if not words[0].startswith("-"):
        run_dir, config = requested(words[0], words[1:])
    elif words[-1] == "--file":
        raise UsageError("--file: needs a value")
    elif value_of(words, "--file") is not None:
        run_dir, config = requested(_recipe_of(Path(str(value_of(words, "--file")))), words)
    else:
        run_dir, config = gone_on_with(words)

    _check_published(config, run_dir)
    from vqkit.cli.report import train_and_report

    return train_and_report(config, run_dir)


def requested(recipe: str, words: Sequence[str]) -> tuple[Path, RunConfig]:
    """Directory and configuration of a recipe with the changes that a file and `words` ask for. Raises UsageError."""
    if recipe not in RECIPES:
        raise UsageError(f"unknown recipe {recipe!r}{near_miss(recipe, RECIPES)}")
    base, file = RECIPES[recipe](), value_of(words, "--file")
    table = {} if file is None else _table(Path(file), recipe)
    over = _overlaid(base, table, file)
    default = TrainOptions(_model(over.model, words), _data(base, over, words, file), _with_warmup_that_fits(base.train, over.train, words))
    options = _options(recipe, words, default)
    init_from = over.init_from
    if options.init_from is not None:
        init_from = str(options.init_from.expanduser().absolute())
    if init_from is not None:
        own = _overlaid(replace(base, model=_model_of(init_from)), table, file)
        options = _options(recipe, words, replace(default, model=own.model))
    run_dir = options.run or Path("runs") / recipe
    if not options.data.path:
        is_run = (run_dir / "config.json").is_file()
        raise UsageError(
            f"recipe {recipe} needs data: add --data.path FOLDER"
            + (f"; {run_dir} is a run already, vqkit train --run {run_dir} goes on with it" if is_run else "")
        )
    train = _as_many_steps_as_named(options.train, base.train, words)
    # Absolute, so that a run means the same files from wherever it is gone on with.
    data = replace(options.data, path=str(Path(options.data.path).expanduser().absolute()))
    model = options.model
    if init_from is None and model.vocab_size == base.model.vocab_size:
        model = replace(model, vocab_size=data.vocab_size)  # whoever names no vocabulary wants that of the data
    try:
        if not _names_warmup(base.train, over.train, words):
            train = _with_warmup_of(run_dir, train, base.train)
        config = RunConfig(recipe, model, data, train, init_from)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return run_dir, config


def gone_on_with(words: Sequence[str]) -> tuple[Path, RunConfig]:
    """Directory and configuration of the run that `--run` names, with the changes that `words` ask for. Raises UsageError."""
    run = value_of(words, "--run")
    if run is None or "--help" in words or "-h" in words:
        return parse(ResumeOptions, words, prog="vqkit train").run, RECIPES["quickstart"]()
    stored = stored_config(Path(run))
    default = TrainOptions(stored.model, stored.data, stored.train)
    options = parse(TrainOptions, words, prog=f"vqkit train --run {run}", default=default)
    for name in ("file", "init_from"):
        if getattr(options, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')}: is for a new run: vqkit train RECIPE")
    train = _as_many_steps_as_named(options.train, stored.train, words)
    try:
        return Path(run), replace(stored, model=options.model, data=options.data, train=train)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _as_many_steps_as_named(train: TrainConfig, base: TrainConfig, words: Sequence[str]) -> TrainConfig:
    """Without a limit of minutes where a number of steps is named, and no such limit: whoever names it wants that number."""
    if train.minutes != base.minutes or value_of(words, "--train.minutes") is not None:
        return train
    named = value_of(words, "--train.steps") is not None or train.steps != base.steps
    return replace(train, minutes=None) if named else train


def _options(recipe: str, words: Sequence[str], default: TrainOptions) -> TrainOptions:
    description = f"{first_line(RECIPES[recipe].__doc__)}\n$ {example(recipe)}"
    return parse(TrainOptions, words, prog=f"vqkit train {recipe}", description=description, default=default)


def _recipe_of(file: Path) -> str:
    """The recipe that a file names, where the words name none."""
    recipe = _toml(file).get("recipe")
    if not isinstance(recipe, str):
        raise UsageError(f"no recipe given: vqkit train RECIPE --file {file}, or a line in the file, recipe = {next(iter(RECIPES))!r}")
    return recipe


def _toml(file: Path) -> dict[str, Any]:
    try:
        return read_toml(file.expanduser())
    except ValueError as error:
        raise UsageError(str(error)) from error


def _table(file: Path, recipe: str) -> dict[str, Any]:
    table = _toml(file)
    named = table.pop("recipe", recipe)
    if named != recipe:
        raise UsageError(f"{file}: recipe = {named!r}: is for vqkit train {named}, not for {recipe}")
    return table


def _overlaid(base: RunConfig, table: dict[str, Any], file: str | None) -> RunConfig:
    try:
        return overlay(base, table, where=f"{file}: ")
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def _model(over: ModelConfig, words: Sequence[str]) -> ModelConfig:
    """Without what the recipe says of codebooks, where the words choose the same network without any."""
    if value_of(words, "--model.attention") != "full" or over.attention == "full":
        return over
    return overlay(over, {"codebook": {"init": "normal", "dead_code_threshold": 0.0}})


def _data(base: RunConfig, over: RunConfig, words: Sequence[str], file: str | None) -> DataConfig:
    """What the file says of the data; of packed data the rules that they were packed by, which the file must not contradict."""
    from vqkit.cli.data import with_length_of_images, with_rules_of_packed

    data = with_rules_of_packed(over.data, words)
    if data is over.data:
        return with_length_of_images(data, words, named=over.data.sequence_len != base.data.sequence_len)
    asked = {difference.path for difference in differences(base.data, over.data)} - {"path"}
    for difference in differences(over.data, data):
        if difference.path in asked:
            raise UsageError(
                f"{file}: data.{difference.path} = {difference.old!r}: these data are packed with {difference.new!r}; "
                "leave it out, or pack them anew"
            )
    return data


def _names_warmup(base: TrainConfig, over: TrainConfig, words: Sequence[str]) -> bool:
    return over.warmup_steps != base.warmup_steps or value_of(words, "--train.warmup-steps") is not None


def _with_warmup_that_fits(base: TrainConfig, over: TrainConfig, words: Sequence[str]) -> TrainConfig:
    """A tenth of the steps for the warm-up, where fewer steps are asked for than the recipe warms up, and no other warm-up."""
    named = value_of(words, "--train.steps")
    steps = int(named) if named is not None and named.isdecimal() else over.steps
    if _names_warmup(base, over, words) or not 1 <= steps <= over.warmup_steps:
        return over
    return overlay(over, {"warmup_steps": steps // 10})


def _with_warmup_of(run_dir: Path, train: TrainConfig, base: TrainConfig) -> TrainConfig:
    """That of the run, if there is one: it may go on to another number of steps, but not with another warm-up."""
    try:
        return replace(train, warmup_steps=stored_config(run_dir).train.warmup_steps)
    except (OSError, ValueError, TypeError):  # there is none, or it is broken, which is said where it is gone on with
        if train.warmup_steps != base.warmup_steps and os.environ.get("RANK", "0") == "0":
            print(
                f"vqkit: note: train.steps = {train.steps}: a warm-up of {train.warmup_steps} steps, not {base.warmup_steps}",
                file=sys.stderr,
            )
        return train


def _check_published(config: RunConfig, run_dir: Path) -> None:
    """That data which can be fetched are there, or their run has them. Raises FileNotFoundError that says how to fetch them."""
    name, path = config.recipe.partition("-")[0], Path(config.data.path)
    if name not in PUBLISHED or path.exists() or (run_dir / "data").exists():
        return
    parts = {"pg19-tiny": " --parts validation", "imagenet64-tiny": " --parts test"}.get(config.recipe, "")
    raise FileNotFoundError(f"{path} does not exist: vqkit data download {name}{parts} fetches it; --data.path names another place")


def _model_of(path: str) -> ModelConfig:
    """The configuration of the weights in a run, checkpoint or export folder. Raises UsageError."""
    from vqkit.models.weights import find_and_load_weights

    try:
        return find_and_load_weights(path)[2]
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(f"--init-from: {error}") from error


def stored_config(run_dir: Path) -> RunConfig:
    """The configuration that a run was started with. Raises FileNotFoundError or ValueError."""
    path = run_dir / "config.json"
    if not path.is_file():
        lacks = "there is no config.json in it" if run_dir.is_dir() else "it is no folder" if run_dir.exists() else "it does not exist"
        raise FileNotFoundError(f"{run_dir} is no run: {lacks}")
    return from_json(RunConfig, path.read_text(encoding="utf-8"), where=str(path))


def first_line(docstring: str | None) -> str:
    """What a recipe says of itself in one line."""
    return (docstring or "").strip().partition("\n")[0]


def example(recipe: str) -> str:
    """One command that is worth a try."""
    data = "" if RECIPES[recipe]().data.path else " --data.path FOLDER"
    return f"vqkit train {recipe}{data} --run runs/mine --train.steps 2000"
