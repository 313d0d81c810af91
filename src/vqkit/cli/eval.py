"""`vqkit eval`: measure a trained model on a split of its data, or of the data of another run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import Positional

from vqkit.cli.options import parse
from vqkit.cli.train import stored_config
from vqkit.train.config import RunConfig

if TYPE_CHECKING:
    from vqkit.data import Split


Context = Literal["carry", "sequence"]
Segments = Literal["isolate", "ignore"]


@dataclass(frozen=True)
class EvalOptions:
    """Measure a trained model on a split of its data: bits per byte of text (per dim of images, per token of ids), nats, word-level
    perplexity, and the use of the codes; with the state carried through the split and sequence by sequence, documents apart and not.
    $ vqkit eval runs/quickstart --split validation
    """

    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The folder of a run; with --data also that of exported or imported weights."""
    split: Literal["train", "validation", "test"] = "test"
    """What to measure on."""
    data: Path | None = None
    """The folder of the run whose data to measure on; None = its own."""
    context: Context | None = None
    """Let the state run through the split, or read every sequence from a fresh one; None = both."""
    segments: Segments | None = None
    """Keep documents from seeing each other, or let them; None = both, where the split has several."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto = CUDA where there is one."""


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
    from vqkit.data import Split, find_defects
    from vqkit.models.weights import find_and_load_weights
    from vqkit.train.parallel import resolve_device

    device = resolve_device(options.device)
    split = Split(of_data / "data", options.split)
    if defects := find_defects(of_data / "data", splits=(options.split,)):
        raise ValueError("; ".join(defects))
    folder, model, model_config = find_and_load_weights(options.run, device)
    if model_config.vocab_size < split.tokenizer.vocab_size:
        raise ValueError(f"{folder}: a vocabulary of {model_config.vocab_size} tokens; these data need {split.tokenizer.vocab_size}")
    _refuse_another_vocabulary(options.run, folder, split)
    note_broken_checkpoints(options.run)
    ways = asked_ways(options, config, several=split.num_documents > 1 and split.document_len is None)
    found = {way: measure(model, split, config, *way) for way in ways}
    own = found[ways[0]]
    print(headline(split, own))
    print(f"{content(split)}, by {folder}\n")
    rows = [(*way, *(f"{value:.3f}" for value in measures(split, evaluation).values())) for way, evaluation in found.items()]
    print(table(("context", "documents", *measures(split, own)), rows, left=(0, 1)))
    print(f"\n{conventions(split, config)}\n")
    print(code_table(own, model_config))
    return 0


def _refuse_another_vocabulary(run: Path, weights: Path, split: Split) -> None:
    """Raise ValueError where the ids of the data mean something else to the model."""
    from vqkit.data.tokenizer import TOKENIZER_FILE, load_tokenizer

    found = next((place for place in (weights, run / "data") if (place / TOKENIZER_FILE).is_file()), None)
    if found is not None and (own := load_tokenizer(found)).hash != split.tokenizer.hash:
        raise ValueError(
            f"{run} reads ids of another vocabulary ({own.kind}, {own.vocab_size:,} ids, hash {own.hash}) than these data have "
            f"({split.tokenizer.kind}, {split.tokenizer.vocab_size:,} ids, hash {split.tokenizer.hash})"
        )


def asked_ways(options: EvalOptions, config: RunConfig, *, several: bool) -> list[tuple[Context, Segments]]:
    """How to measure, each a context and what documents see of each other: that of the run first, if it is asked for."""
    contexts: list[Context] = ["carry", "sequence"] if options.context is None else [options.context]
    segments: list[Segments] = [options.segments or config.data.segments]
    if options.segments is None and several:
        segments = ["isolate", "ignore"]
    own = (config.train.eval_context, config.data.segments)
    return sorted(((context, segment) for context in contexts for segment in segments), key=lambda way: way != own)


def conventions(split: Split, config: RunConfig) -> str:
    """How the figures are meant."""
    lanes = config.train.eval_batch_size
    lines = [
        f"carry: the state runs through the split{f', read as {lanes} lanes side by side' if lanes > 1 else ''}",
        f"sequence: every {config.data.sequence_len:,} tokens are read from a fresh state, as the published runs do",
        "isolate: documents do not see those before them; ignore: they do, as in the published runs",
        f"the run itself was trained with {config.data.segments} and validated with {config.train.eval_context}",
        "every token of the split, ends of documents included, is predicted once and counts in the likelihood",
    ]
    if split.num_words:
        lines.append(f"word-level perplexity = exp(nats of all tokens / {split.num_words:,} words of the original text)")
    return "\n".join(lines)
