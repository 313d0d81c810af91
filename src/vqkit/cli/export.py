"""`vqkit export`: a trained model with its tokenizer in a folder of its own, that other programs read without the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional

from vqkit.cli.errors import UsageError
from vqkit.cli.options import parse
from vqkit.cli.train import stored_config

if TYPE_CHECKING:
    from vqkit.data import DataSummary
    from vqkit.models import TransformerVQ
    from vqkit.models.config import ModelConfig
    from vqkit.train.config import RunConfig

ABOUT = """---
library_name: vqkit
tags:
- transformer-vq
- vector-quantization
---

"""


@dataclass(frozen=True)
class ExportOptions:
    """Write a run's model into a folder of its own: weights (safetensors), configuration, tokenizer, and a page with its figures.
    $ vqkit export runs/quickstart models/mine
    $ vqkit export runs/quickstart models/best --checkpoint best

    What reads it, beside vqkit.load and vqkit.TransformerVQ.from_pretrained in Python:
    $ vqkit sample models/mine --prompt "The "
    $ vqkit eval models/mine --data runs/quickstart
    $ vqkit train text --data.path FOLDER --init-from models/mine --run runs/tuned
    """

    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The folder of a run."""
    folder: Annotated[Positional[Path], tyro.conf.arg(metavar="DIR")]
    """Folder to make; never one that holds something already."""
    checkpoint: str = "last"
    """Which one: last, best (on the validation split), or the number of a step."""


def main(words: Sequence[str]) -> int:
    """Parse and run; returns the exit code."""
    options = parse(ExportOptions, words, prog="vqkit export")
    run, target = options.run, options.folder
    if (run / "model.safetensors").is_file():
        raise ValueError(f"{run} holds weights and is no run: copy it, or name the run")
    config = stored_config(run)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} holds something already: must be a new folder")
    from vqkit.cli.console import note_broken_checkpoints
    from vqkit.data import read_summary
    from vqkit.models.weights import find_and_load_weights

    folder, model, model_config = find_and_load_weights(_place(run, options.checkpoint))
    step = int(folder.name.removeprefix("step_"))
    summary = read_summary(run / "data")
    files = _write(run, model, model_config, target, card(config, summary, validations(run).get(step), step))
    if options.checkpoint == "last":
        note_broken_checkpoints(run)
    print(f"{target}: {folder.name} of {run}\n{files}\n\nwhat next\n{_what_next(target, summary)}")
    return 0


def _place(run: Path, which: str) -> Path:
    """Where to look for the checkpoint that is asked for: the run for the last one, else its folder."""
    from vqkit.models.weights import CHECKPOINTS_FOLDER

    if which == "last":
        return run
    if which == "best":
        figures = [(*reversed(figure), step) for step, figure in validations(run).items()]
        if not figures:
            raise ValueError(f"{run}: no measurement on a validation split, hence no best checkpoint; --checkpoint last")
        step = min(figures)[-1]
    elif which.isdecimal():
        step = int(which)
    else:
        raise UsageError(f"--checkpoint {which}: must be last, best or the number of a step")
    folder = run / CHECKPOINTS_FOLDER / f"step_{step:08d}"
    if not folder.is_dir():
        there = ", ".join(str(int(path.name.removeprefix("step_"))) for path in sorted((run / CHECKPOINTS_FOLDER).glob("step_*")))
        raise ValueError(f"{run}: no checkpoint of step {step} is left; there are those of {there or 'none'}")
    return folder


def validations(run: Path) -> dict[int, tuple[str, float]]:
    """Unit and figure of every measurement on the validation split, by step. Raises ValueError for a damaged file."""
    from vqkit.train.metrics import METRICS_FILE, read_lines
    from vqkit.train.units import measured

    try:
        return {line["step"]: measured(line) for line in read_lines(run / METRICS_FILE) if line["kind"] == "validation"}
    except ValueError as error:
        raise ValueError(f"{run / METRICS_FILE}: not lines of JSON: {error}") from error


def card(config: RunConfig, data: DataSummary, validation: tuple[str, float] | None, step: int) -> str:
    """The page: where the weights come from, before what the model is. The place of the data is nobody's business but its name."""
    train = config.train
    rows = [
        ("recipe", config.recipe),
        ("steps", f"{step:,} of {train.total_steps:,}, each {train.batch_size:,} x {config.update_len:,} tokens, {train.optimizer}"),
        ("data", f"{Path(data.path).name}, {data.train.tokens:,} tokens to train on, hash {data.corpus_hash}"),
        ("vocabulary", f"{data.tokenizer}, {data.vocab_size:,} ids"),
        ("documents", "do not see each other" if config.data.segments == "isolate" else "see those before them"),
    ]
    if validation:
        part = "all" if train.eval_tokens is None else f"the first {train.eval_tokens:,} tokens"
        how = "state carried through" if train.eval_context == "carry" else "sequence by sequence"
        rows.append(("validation split", f"{validation[1]:.4g} {validation[0]} ({part} of it, {how})"))
    lines = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"## Training\n\n|  |  |\n|---|---|\n{lines}\n"


def _write(run: Path, model: TransformerVQ, config: ModelConfig, target: Path, training: str) -> str:
    """All files, under the name `target` once they are whole; their names and sizes."""
    import shutil

    from vqkit.data.tokenizer import load_tokenizer
    from vqkit.files import sync_folder, temporary_name, write_text_atomic
    from vqkit.models.hub import model_card
    from vqkit.models.weights import save_weights

    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(target)
    try:
        save_weights(model, config, temporary)
        load_tokenizer(run / "data").save(temporary)
        write_text_atomic(temporary / "README.md", f"{ABOUT}{model_card(model)}\n{training}")
        temporary.replace(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(target.parent)
    return "\n".join(f"  {path.name:<20}{path.stat().st_size:>14,} bytes" for path in sorted(target.iterdir()))


def _what_next(target: Path, data: DataSummary) -> str:
    sample = {"images": "--images 9", "ids": '--prompt "ID ID"'}.get(data.tokenizer, '--prompt "The "')
    return f'''  try it       vqkit sample {target} {sample}
  from Python  vqkit.load("{target}"), vqkit.TransformerVQ.from_pretrained("{target}")'''
