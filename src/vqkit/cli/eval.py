"""`vqkit eval`: measure a trained model on a split of its data, or of the data of another run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from vqkit.cli.options import parse
from vqkit.cli.train import stored_config


@dataclass(frozen=True)
class EvalOptions:
    """Measure a trained model on a split of its data: bits per byte with the state carried through, and the use of the codes.

    vqkit eval runs/quickstart --split validation
    """

    run: Positional[Path]
    """The folder of a run; with --data also that of exported or imported weights."""
    split: Literal["train", "validation", "test"] = "test"
    """What to measure on."""
    data: Path | None = None
    """The folder of the run whose data to measure on; None = its own."""


def main(words: Sequence[str]) -> int:
    """Parse and run; returns the exit code."""
    options = parse(EvalOptions, words, prog="vqkit eval")
    if options.data is None and not (options.run / "data").is_dir() and (options.run / "model.safetensors").is_file():
        raise ValueError(f"{options.run} holds weights and no data: name a run whose data to measure on, --data RUN")
    of_data = options.data or options.run
    config = stored_config(of_data)
    from vqkit.cli.console import note_broken_checkpoints
    from vqkit.cli.report import code_table, headline, measure
    from vqkit.data import Split
    from vqkit.generate import load

    split = Split(of_data / "data", options.split)
    loaded = load(options.run)
    note_broken_checkpoints(options.run)
    evaluation = measure(loaded.model, split, config)
    print(headline(split, evaluation))
    print(f"{evaluation.num_bytes:,} bytes of {split.num_documents} files, by {loaded.path}\n")
    print(code_table(evaluation))
    return 0
