"""What `vqkit train` shows from the first step to the last word, and the measurements that it shares with `vqkit eval`."""

from __future__ import annotations

import math
from pathlib import Path

from vqkit.cli.console import TrainingView, duration, write_text
from vqkit.cli.tables import table
from vqkit.data import Split, byte_baselines
from vqkit.data.images import save_png
from vqkit.dist import is_first_process
from vqkit.files import write_text_atomic
from vqkit.generate import LoadedModel, load
from vqkit.generate.session import TEXT
from vqkit.models import TransformerVQ
from vqkit.models.config import ModelConfig
from vqkit.models.weights import newest_whole_checkpoint
from vqkit.recipes import TOP_P
from vqkit.train import Evaluation, TrainResult, context_ablation, evaluate, train
from vqkit.train.code_use import unit_name
from vqkit.train.config import RunConfig
from vqkit.train.plots import PLOTS_FOLDER, save_plots

LARGEST_EXPONENT = 700.0
SAMPLES_FOLDER = "samples"
SAMPLE_BYTES = 400
SAMPLE_IMAGES = 4
SAMPLE_TEMPERATURE = 0.8
CONTEXT = 4
"""Tokens that are left of the context in the ablation."""


def train_and_report(config: RunConfig, run_dir: Path) -> int:
    """Train, or go on, to the end; then measure, write, and say where everything is. Returns the exit code."""
    try:
        with TrainingView() as view:
            result = train(config, run_dir, on_event=view)
    except KeyboardInterrupt as stop:
        stop.args = (_where_it_stands(run_dir),)
        raise
    except OSError as error:  # the disk is full, say
        if error.strerror is None:
            raise
        raise OSError(error.errno, f"{error.strerror}; {_where_it_stands(run_dir)}", error.filename) from error
    if not is_first_process():
        return 0
    print(f"trained: {result.step:,} steps, {view.steps_done:,} of them now, in {duration(view.seconds)}", flush=True)
    _measure(config, result)
    _write(config, result)
    _close(config, result)
    return 0


def measure(model: TransformerVQ, split: Split, config: RunConfig, context: str | None = None, segments: str | None = None) -> Evaluation:
    """The whole split as the run's configuration reads it, or by `context`, "carry" or "sequence", and `segments`."""
    by_sequence = (context or config.train.eval_context) == "sequence"
    return evaluate(
        model,
        split,
        batch_size=config.train.eval_batch_size,
        segments=(segments or config.data.segments) == "isolate",
        sequence_len=config.data.sequence_len if by_sequence else None,
    )


def measures(split: Split, evaluation: Evaluation) -> dict[str, float]:
    """What the likelihood of the whole split amounts to, by unit; the first is the one that such data are measured by."""
    found: dict[str, float] = {evaluation.unit.name: evaluation.bits}
    if split.tokenizer.kind == "sentencepiece":
        found["bits per token"] = evaluation.nats / math.log(2) / evaluation.num_tokens
    if split.num_words:
        nats = evaluation.nats / split.num_words
        found["word-level perplexity"] = math.exp(nats) if nats < LARGEST_EXPONENT else math.inf
    return found | {"nats per token": evaluation.nats / evaluation.num_tokens}


def headline(split: Split, evaluation: Evaluation) -> str:
    """The one line to look for."""
    unit, value = next(iter(measures(split, evaluation).items()))
    return f"{split.name}: {value:.3f} {unit}"


def code_table(evaluation: Evaluation, config: ModelConfig) -> str:
    """Use of the codes per attention unit and head, the worst named below; nothing for a model without codebooks."""
    if not evaluation.code_counts:
        return ""
    rows, worst = [], (2.0, "")
    for i, (shares, perplexities) in enumerate(zip(evaluation.active_codes, evaluation.perplexity, strict=True)):
        for head, (share, perplexity) in enumerate(zip(shares, perplexities, strict=True)):
            name = f"{unit_name(i, config)} head {head}"
            rows.append((name, f"{share:.1%}", f"{perplexity:.1f} of {len(evaluation.code_counts[i][head])}"))
            worst = min(worst, (share, name))
    return table(("codes", "active", "perplexity"), rows) + f"\nworst: {worst[0]:.1%} of codes active ({worst[1]})"


def _measure(config: RunConfig, result: TrainResult) -> None:
    data = result.run_dir / "data"
    model, test, validation = result.model, Split(data, "test"), Split(data, "validation")
    if test.num_tokens:
        print(f"\nreading the test split: {content(test)}", flush=True)
        evaluation = measure(model, test, config)
        print(headline(test, evaluation), flush=True)
        if test.tokenizer.kind == "bytes":
            _compare(test, evaluation, byte_baselines(Split(data, "train"), test))
        if test.document_len is None:
            _ablate(config, model, test)
    use = measure(model, validation, config) if validation.num_tokens else None
    if use:
        print(f"\non the validation split\n{code_table(use, config.model)}", flush=True)
    save_plots(result.run_dir, config.model, use)


def content(split: Split) -> str:
    """How much a split holds."""
    amount = f"{split.num_bytes:,} bytes" if split.num_bytes else f"{split.num_tokens:,} tokens"
    return f"{amount} of {split.num_documents} {'images' if split.tokenizer.kind == 'images' else 'files'}"


def _compare(test: Split, evaluation: Evaluation, others: dict[str, float]) -> None:
    """Bits beside those of other models of bytes."""
    rows = [("Transformer-VQ, this run", evaluation.bits), *others.items()]
    print("\n" + table(("on the same bytes", evaluation.unit.name), [(name, f"{bits:.3f}") for name, bits in rows]), flush=True)


def _ablate(config: RunConfig, model: TransformerVQ, test: Split) -> None:
    """Bits beside those of the same model with hardly any context."""
    ablation = context_ablation(
        model,
        test,
        context=CONTEXT,
        batch_size=config.train.eval_batch_size,
        segments=config.data.segments == "isolate",
    )
    full, cut = ablation.full_bits, ablation.cut_bits
    tokens = "bytes" if test.tokenizer.kind == "bytes" else "tokens"
    print(
        f"\ncontext counts: cut to {CONTEXT} {tokens} the same model needs {cut:.3f} {ablation.unit.name} instead of {full:.3f}, "
        f"{cut - full:+.3f} (at {ablation.num_positions:,} {tokens} of the test split)",
        flush=True,
    )


def _write(config: RunConfig, result: TrainResult) -> None:
    loaded = load(result.checkpoint, device=str(next(result.model.parameters()).device))
    folder = result.run_dir / SAMPLES_FOLDER
    if loaded.tokenizer.kind == "ids":  # which are nothing to look at
        return
    folder.mkdir(exist_ok=True)
    if loaded.tokenizer.kind in TEXT:
        _write_text(loaded, "def " if config.recipe == "quickstart" else "", folder / f"step_{result.step:08d}.txt")
    else:
        path = folder / f"step_{result.step:08d}.png"
        save_png(path, loaded.images(SAMPLE_IMAGES))
        print(f"\n{SAMPLE_IMAGES} images that it painted: {path}", flush=True)


def _write_text(loaded: LoadedModel, prompt: str, path: Path) -> None:
    print(f"\na sample (temperature {SAMPLE_TEMPERATURE}, seed 0)\n" + "-" * 72, flush=True)
    text = prompt
    write_text(prompt)
    for piece in loaded.stream(prompt, SAMPLE_BYTES, temperature=SAMPLE_TEMPERATURE):
        write_text(piece)
        text += piece
    print("\n" + "-" * 72, flush=True)
    write_text_atomic(path, text)


def _close(config: RunConfig, result: TrainResult) -> None:
    run, kind = result.run_dir, Split(result.run_dir / "data", "train").tokenizer.kind
    rows = [
        ("run", f"{run}"),
        ("weights", f"{result.checkpoint}"),
        ("metrics", f"{run / 'metrics.jsonl'}"),
        ("plots", f"{run / PLOTS_FOLDER}"),
    ]
    if kind != "ids":
        rows.append(("samples", f"{run / SAMPLES_FOLDER}"))
    print("\n" + table(("", ""), rows, left=(0, 1)))
    print("\nwhat next\n" + table(("", ""), next_commands(config, run, kind), left=(0, 1)))


def next_commands(config: RunConfig, run: Path, kind: str) -> list[tuple[str, str]]:
    """What is worth doing with a trained run, each with the command for it."""
    prompt = "import " if config.recipe == "quickstart" else "The "
    rows = [("  measure it", f"vqkit eval {run}"), ("  look inside", f"vqkit inspect {run}")]
    name = config.recipe.removesuffix("-small")
    how = f"--top-p {TOP_P[name]}" if name in TOP_P else "--temperature 0.8"  # that of the published samples
    if kind in TEXT:
        rows.insert(0, ("  let it write", f'vqkit sample {run} --prompt "{prompt}" {how}'))
        rows.append(("  from Python", f'vqkit.load("{run}").generate("{prompt}", 200)'))
    elif kind == "images":
        rows.insert(0, ("  let it paint", f"vqkit sample {run} --images 9" + (f" {how}" if name in TOP_P else "")))
    else:
        rows.insert(0, ("  let it go on", f'vqkit sample {run} --prompt "ID ID" --num-tokens 20'))
    rows.append(("  keep the model", f"vqkit export {run} models/{run.name}"))
    if config.recipe == "quickstart":
        rows.append(("  use your own text", "vqkit train text --data.path FOLDER"))
    return rows


def _where_it_stands(run_dir: Path) -> str:
    """Where a stopped run can be taken up again."""
    newest = newest_whole_checkpoint(run_dir)
    if newest is None:
        return f"stopped; {run_dir} has no checkpoint yet, the same command begins anew"
    return f"stopped; {run_dir} goes on from {newest.name}: vqkit train --run {run_dir}"
