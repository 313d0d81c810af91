"""`vqkit sample`: let a trained model write."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import tyro
from tyro.conf import Positional

from vqkit.cli.errors import UsageError
from vqkit.cli.options import parse, value_of

if TYPE_CHECKING:
    from vqkit.generate import LoadedModel
    from vqkit.generate.session import TextOptions


@dataclass(frozen=True)
class SampleOptions:
    """Let a trained model write: prints the prompt and what the model makes of it, as it comes.
    $ vqkit sample runs/quickstart --prompt "def " --num-tokens 400 --temperature 0.8

    The same seed gives the same text. A prompt in a file, several prompts, one a line, and of a model of images a PNG file:
    $ vqkit sample RUN --prompt - < FILE
    $ vqkit sample RUN --prompts-file FILE
    $ vqkit sample RUN --images 9 --out grid.png
    """

    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The folder of a run, a checkpoint or exported weights."""
    prompt: str = ""
    """How the text begins, of a model of ids some ids; "-" reads standard input; empty = the beginning of a document."""
    prompts_file: Path | None = None
    """A file of prompts, one a line, "-" = standard input: each with what the model makes of it, in turn, written side by side."""
    images: int = 4
    """Images to paint, of a model of images."""
    out: Path | None = None
    """PNG file that they go to, as a grid; None = RUN/samples/sample_SEED.png."""
    num_tokens: int = 400
    """Most tokens to write (bytes, or pieces of words); it ends earlier when the model ends the document."""
    temperature: float = 1.0
    """Below 1 safer, above 1 wilder; 0 = always the most probable byte."""
    top_k: int | None = None
    """Choose among the k most probable bytes; None = all."""
    top_p: float = 1.0
    """Choose among the most probable bytes that hold this much probability; 1 = all."""
    repetition_penalty: float = 1.0
    """Above 1 bytes of the text so far become less probable; 1 = as they are."""
    seed: int = 0
    """Seed of the choice."""
    logprobs: int | None = None
    """Instead of the text a line a token, with the logarithm of its probability and so many of the most probable tokens."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto = CUDA where there is one."""


def main(words: Sequence[str]) -> int:
    """Parse and run; returns the exit code."""
    options = parse(SampleOptions, words, prog="vqkit sample")
    from vqkit.cli.console import note_broken_checkpoints, write_text
    from vqkit.generate import load
    from vqkit.train.parallel import resolve_device

    for option in ("prompt", "logprobs"):
        if options.prompts_file is not None and getattr(options, option):
            raise UsageError(f"--{option} and --prompts-file exclude each other")
    loaded = load(options.run, device=str(resolve_device(options.device)))
    note_broken_checkpoints(options.run)
    _refuse_options_of_others(words, options.run, loaded.tokenizer.kind)
    chosen: TextOptions = {
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "repetition_penalty": options.repetition_penalty,
        "seed": options.seed,
    }
    try:
        if loaded.tokenizer.kind == "images":
            return _paint(loaded, options, chosen)
        if options.prompts_file is not None:
            prompts = _lines(options.prompts_file)
            for prompt, text in zip(prompts, loaded.generate(prompts, options.num_tokens, **chosen), strict=True):
                write_text(prompt.decode(errors="ignore") + text + "\n")
            return 0
        prompt = sys.stdin.buffer.read() if options.prompt == "-" else options.prompt.encode(errors="surrogateescape")
        if loaded.tokenizer.kind == "ids":
            return _go_on(loaded, _ids(prompt), options.num_tokens, chosen)
        if options.logprobs is not None:
            return _tell(loaded, prompt, options, chosen)
        pieces = loaded.stream(prompt, options.num_tokens, **chosen)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    write_text(prompt.decode(errors="ignore"))
    for piece in pieces:
        write_text(piece)
    write_text("\n")
    return 0


def _refuse_options_of_others(words: Sequence[str], run: Path, kind: str) -> None:
    """Raise UsageError for an option that says nothing to a model of this kind."""
    others = {
        "images": ("--prompt", "--prompts-file", "--num-tokens", "--logprobs"),
        "ids": ("--images", "--out", "--prompts-file", "--logprobs"),
    }
    for option in others.get(kind, ("--images", "--out")):
        if value_of(words, option):
            raise UsageError(f"{option}: {run} is a model of {kind}, for which the option says nothing")


def _go_on(loaded: LoadedModel, prompt: list[int], num_tokens: int, chosen: TextOptions) -> int:
    """Ids, as they come, on one line."""
    from vqkit.cli.console import write_text

    following = loaded.ids(prompt, num_tokens, **chosen)
    write_text(" ".join(map(str, prompt)))
    for number, token in enumerate(following):
        write_text(f" {token}" if prompt or number else f"{token}")
    write_text("\n")
    return 0


def _ids(prompt: bytes) -> list[int]:
    try:
        return [int(word) for word in prompt.split()]
    except ValueError as error:
        raise UsageError(f"--prompt: must be ids with spaces between, of a model of ids: {error}") from error


def _tell(loaded: LoadedModel, prompt: bytes, options: SampleOptions, chosen: TextOptions) -> int:
    """A line a token: its bytes, what its choice was worth, and what else might have been chosen, by the model as it is."""
    from vqkit.cli.console import write_text
    from vqkit.generate import TokenLogprobs

    def shown(token: int) -> str:
        if token == loaded.tokenizer.END:
            return "end"
        data = loaded.tokenizer.decode([token])
        try:
            return repr(data.decode())
        except UnicodeDecodeError:  # a part of a character, or none
            return repr(data)[1:]

    for step in loaded.steps(prompt, options.num_tokens, logprobs=options.logprobs, **chosen):
        found = cast(TokenLogprobs, step.logprobs)
        others = zip(found.top_tokens[0].tolist(), found.top[0].tolist(), strict=True)
        write_text(f"{shown(int(step.tokens)):<12}{float(found.model):8.3f}   " + "  ".join(f"{shown(t)} {p:.3f}" for t, p in others))
        write_text("\n")
    return 0


def _paint(loaded: LoadedModel, options: SampleOptions, chosen: TextOptions) -> int:
    from vqkit.data.images import save_png

    path = options.out or options.run / "samples" / f"sample_{options.seed}.png"
    images = loaded.images(options.images, **chosen)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(path, images)
    print(f"{len(images)} images of {images.shape[1]} x {images.shape[2]}: {path}")
    return 0


def _lines(path: Path) -> list[bytes]:
    data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    lines = data.splitlines()
    if not lines:
        raise UsageError(f"--prompts-file {path}: is empty; must hold at least one line")
    return lines
