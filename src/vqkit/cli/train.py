"""`vqkit train`: train a model by a recipe, or go on with a run; then measure it, let it write, and say what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vqkit.cli.errors import UsageError
from vqkit.cli.options import near_miss, parse
from vqkit.config import from_json
from vqkit.data.config import DataConfig
from vqkit.models.config import ModelConfig
from vqkit.recipes import RECIPES
from vqkit.train.config import RunConfig, TrainConfig

HELP = """usage: vqkit train RECIPE [--run DIR] [OPTIONS]
       vqkit train --run DIR

Train a model by a recipe, measure it on the test split, let it write. A run is a directory (runs/RECIPE unless --run says
otherwise) and can be stopped at any time: the same command, or `vqkit train --run DIR`, goes on where it stopped.

recipes:
{recipes}

examples:
  vqkit train quickstart
  vqkit train text --data.path FOLDER --run runs/mine --train.steps 2000
  vqkit train text --data.path OTHER --init-from runs/mine --run runs/tuned

vqkit train RECIPE --help shows every option, with the values of that recipe.
"""


@dataclass(frozen=True)
class TrainOptions:
    """What a recipe is, and what may be changed of it."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    run: Path | None = None
    """Directory of the run; made if absent, gone on with if it is one. None = runs/RECIPE."""
    init_from: Path | None = None
    """Run, checkpoint or export folder whose model and weights to start with, under a new optimizer; add --train.extra-steps for steps
    at the last learning rate, or take --train.schedule constant. None = the model of the recipe, with random weights."""


@dataclass(frozen=True)
class ResumeOptions:
    """Go on with a run, by the configuration that it was started with.

    vqkit train --run runs/quickstart
    """

    run: Path
    """Directory of the run."""


def main(words: Sequence[str]) -> int:
    """Parse and run; returns the exit code."""
    if not words:
        raise UsageError(f"no recipe given; there are {', '.join(RECIPES)}; see vqkit train --help")
    if words[0] in ("-h", "--help"):
        print(HELP.format(recipes="\n".join(f"  {name:<12}{first_line(recipe.__doc__)}" for name, recipe in RECIPES.items())), end="")
        return 0
    if words[0].startswith("-"):
        run_dir = parse(ResumeOptions, words, prog="vqkit train").run
        config = stored_config(run_dir)
    else:
        run_dir, config = requested(words[0], words[1:])

    from vqkit.cli.report import train_and_report

    return train_and_report(config, run_dir)


def requested(recipe: str, words: Sequence[str]) -> tuple[Path, RunConfig]:
    """Directory and configuration of a recipe with the changes that `words` ask for. Raises UsageError."""
    if recipe not in RECIPES:
        raise UsageError(f"unknown recipe {recipe!r}{near_miss(recipe, RECIPES)}")
    from vqkit.cli.data import with_rules_of_packed

    base = RECIPES[recipe]()
    base_data = with_rules_of_packed(base.data, words)
    options = _options(recipe, words, TrainOptions(base.model, base_data, base.train))
    init_from = None
    if options.init_from is not None:
        init_from = str(options.init_from.expanduser().absolute())
        options = _options(recipe, words, TrainOptions(_model_of(init_from), base_data, base.train))
    if not options.data.path:
        raise UsageError(f"recipe {recipe} needs data: add --data.path FOLDER")
    train = options.train
    if train.steps != base.train.steps and train.minutes == base.train.minutes:
        train = replace(train, minutes=None)  # whoever names a number of steps wants that number
    # Absolute, so that a run means the same files from wherever it is gone on with.
    data = replace(options.data, path=str(Path(options.data.path).expanduser().absolute()))
    model = options.model
    if init_from is None and model.vocab_size == base.model.vocab_size:
        model = replace(model, vocab_size=data.vocab_size)  # whoever names no vocabulary wants that of the data
    try:
        config = RunConfig(recipe, model, data, train, init_from)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return options.run or Path("runs") / recipe, config


def _options(recipe: str, words: Sequence[str], default: TrainOptions) -> TrainOptions:
    description = f"{first_line(RECIPES[recipe].__doc__)}\n\n{example(recipe)}"
    return parse(TrainOptions, words, prog=f"vqkit train {recipe}", description=description, default=default)


def _model_of(path: str) -> ModelConfig:
    """The configuration of the weights in a run, checkpoint or export folder. Raises UsageError."""
    from vqkit.models.weights import find_weights, load_weights

    try:
        return load_weights(find_weights(path))[1]
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(f"--init-from: {error}") from error


def stored_config(run_dir: Path) -> RunConfig:
    """The configuration that a run was started with. Raises FileNotFoundError or ValueError."""
    path = run_dir / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{run_dir} is no run: there is no config.json in it; name a recipe to start one")
    return from_json(RunConfig, path.read_text(encoding="utf-8"), where=str(path))


def first_line(docstring: str | None) -> str:
    """What a recipe says of itself in one line."""
    return (docstring or "").strip().partition("\n")[0]


def example(recipe: str) -> str:
    """One command that is worth a try."""
    data = "" if RECIPES[recipe]().data.path else " --data.path FOLDER"
    return f"vqkit train {recipe}{data} --run runs/mine --train.steps 2000"
