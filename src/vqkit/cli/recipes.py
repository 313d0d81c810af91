"""`vqkit recipes`: what recipes there are, and the whole configuration of one, as a file that `vqkit train --file` takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from vqkit.cli.errors import UsageError
from vqkit.cli.options import near_miss, parse
from vqkit.cli.train import example, first_line
from vqkit.config import to_toml
from vqkit.files import write_text_atomic
from vqkit.models.cost import num_codebook_values, num_parameters
from vqkit.recipes import DATA, HARDWARE, RECIPES, RESULTS


@dataclass(frozen=True)
class RecipesOptions:
    """Show what recipes there are; of one that is named, the whole configuration with what each option means, as TOML.
    $ vqkit recipes
    $ vqkit recipes enwik8
    $ vqkit recipes text --toml my.toml
    $ vqkit train text --file my.toml --data.path FOLDER
    """

    name: Annotated[Positional[str], tyro.conf.arg(metavar="NAME")] = ""
    """Which one; empty = a list of all."""
    toml: Path | None = None
    """File to write instead of showing it; never one that is there already."""


def main(words: Sequence[str]) -> int:
    """Parse and run; returns the exit code."""
    options = parse(RecipesOptions, words, prog="vqkit recipes")
    if not options.name:
        if options.toml is not None:
            raise UsageError("--toml: of which recipe? vqkit recipes NAME --toml FILE")
        print(catalog(), end="")
        return 0
    if options.name not in RECIPES:
        raise UsageError(f"unknown recipe {options.name!r}{near_miss(options.name, RECIPES)}")
    text = as_toml(options.name)
    if options.toml is None:
        print(text, end="")
        return 0
    if options.toml.exists():
        raise ValueError(f"{options.toml} is there already: must be a new file")
    write_text_atomic(options.toml, text)
    print(f"{options.toml}: {len(text.splitlines())} lines\n\nwhat next\n  change them, then  {_train(options.name, str(options.toml))}")
    return 0


def catalog() -> str:
    """A table of all recipes, and a line of each on what it is."""
    from vqkit.cli.tables import table

    rows = [(name, HARDWARE[name], short_number(size_of(name)), DATA[name], RESULTS.get(name, "")) for name in RECIPES]
    about = "\n".join(f"  {name}: {first_line(make.__doc__)}" for name, make in RECIPES.items())
    return (
        f"{table(('recipe', 'sized for', 'parameters', 'data', 'published result'), rows, left=(0, 1, 3, 4))}\n\n{about}\n\n"
        "  vqkit recipes NAME              the whole configuration\n"
        "  vqkit train NAME                train by it\n"
        "  vqkit bench train NAME          how fast it would be on this machine\n"
        "  vqkit data download NAME        fetch enwik8, pg19 or imagenet64\n"
    )


def as_toml(name: str) -> str:
    """The file that `vqkit train NAME --file` takes, each option with what it means."""
    result = f", published result {RESULTS[name]}" if name in RESULTS else ""
    head = [
        first_line(RECIPES[name].__doc__),
        f"Sized for {HARDWARE[name]}; {short_number(size_of(name))} parameters, codebooks included; data: {DATA[name]}{result}.",
        f"{_train(name, 'FILE')}    options on the command line replace what stands here; what is left out is as in the recipe",
        'where an option may be None, write "none"',
    ]
    return "".join(f"# {line}\n" for line in head) + "\n" + to_toml(RECIPES[name](), comments=True)


def size_of(name: str) -> int:
    """Parameters and codebook values of a recipe's model."""
    model = RECIPES[name]().model
    return num_parameters(model) + num_codebook_values(model)


def short_number(number: int) -> str:
    """A count in a few characters: 1.3 B, 188 M, 0.9 M."""
    for unit, name in ((10**9, "B"), (10**6, "M")):
        if number >= unit / 2:
            value = number / unit
            return f"{value:.1f} {name}" if value < 10 else f"{value:.0f} {name}"
    return f"{number:,}"


def _train(name: str, file: str) -> str:
    return example(name).partition(" --run")[0].replace(f"train {name}", f"train {name} --file {file}")
