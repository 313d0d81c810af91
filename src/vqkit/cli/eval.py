"""`vqkit eval`: measure a trained model on a split of its data, or of the data of another run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from vqkit.cli.options import parse
from vqkit.cli.train import stored_config
from vqkit.train.config import RunConfig

if TYPE_CHECKING:
    from vqkit.data import Split


@dataclass(frozen=True)
class EvalOptions:
    """Measure a trained model on a split of its data: bits per byte (bits per dim of images, word-level perplexity of text), with
    the state carried through the split and sequence by sequence; and the use of the codes.

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
    from vqkit.cli.report import code_table, content, headline, measure, measures
    from vqkit.cli.tables import table
    from vqkit.data import Split
    from vqkit.models.weights import find_weights, load_weights

    split, folder = Split(of_data / "data", options.split), find_weights(options.run)
    model, model_config = load_weights(folder)
    if model_config.vocab_size < split.tokenizer.vocab_size:
        raise ValueError(f"{folder}: a vocabulary of {model_config.vocab_size} tokens; these data need {split.tokenizer.vocab_size}")
    note_broken_checkpoints(options.run)
    found = {context: measure(model, split, config, context) for context in ("carry", "sequence")}
    own = found[config.train.eval_context]
    print(headline(split, own))
    print(f"{content(split)}, by {folder}\n")
    rows = [(context, *(f"{value:.3f}" for value in measures(split, evaluation).values())) for context, evaluation in found.items()]
    print(table(("context", *measures(split, own)), rows))
    print(f"\n{conventions(split, config)}\n")
    print(code_table(own, model_config))
    return 0


def conventions(split: Split, config: RunConfig) -> str:
    """How the figures are meant."""
    lines = [
        f"carry: the state runs through the split, read as {config.train.eval_batch_size} lanes side by side",
        f"sequence: every {config.data.sequence_len:,} tokens are read from a fresh state, as the published runs do",
        "every token of the split, ends of documents included, is predicted once and counts in the likelihood",
        f"documents {'do not see' if config.data.segments == 'isolate' else 'see'} those before them",
    ]
    if split.num_words:
        lines.append(f"word-level perplexity = exp(nats of all tokens / {split.num_words:,} words of the original text)")
    return "\n".join(lines)
