"""A trained model with its tokenizer, ready to write: what `vqkit.load` returns."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vqkit.data import ByteTokenizer
from vqkit.generate.engine import generate
from vqkit.models import TransformerVQ
from vqkit.models.config import ModelConfig
from vqkit.models.weights import find_weights, load_weights


@dataclass(frozen=True)
class LoadedModel:
    """A model with its weights, in evaluation mode, and the tokenizer that stands between it and text."""

    model: TransformerVQ
    config: ModelConfig
    tokenizer: ByteTokenizer
    path: Path
    """The folder that the weights came from."""

    def generate(
        self,
        prompt: str | bytes,
        num_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        stop_at_end: bool = True,
    ) -> str:
        """The continuation of `prompt` by at most `num_tokens` bytes, without the prompt; see `stream`."""
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "stop_at_end": stop_at_end}
        return "".join(self.stream(prompt, num_tokens, **options))

    def stream(
        self,
        prompt: str | bytes,
        num_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        stop_at_end: bool = True,
    ) -> Iterator[str]:
        """The same, piece by piece as it is written; no piece cuts a UTF-8 character, bytes that are none become U+FFFD.

        `prompt` is the beginning of a document and may be empty. A document that the model ends ends the text; with
        `stop_at_end=False` the end is never chosen. Sampling options are those of `vqkit.generate.SamplingRules`.
        """
        text = prompt.encode() if isinstance(prompt, str) else prompt
        tokenizer = self.tokenizer
        steps = generate(
            self.model,
            [[tokenizer.END, *tokenizer.encode(text).tolist()]],
            num_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            exclude=(tokenizer.PAD, tokenizer.UNKNOWN) if stop_at_end else (tokenizer.PAD, tokenizer.UNKNOWN, tokenizer.END),
            stop=(tokenizer.END,),
        )
        return _decode(text, (tokenizer.decode([token]) for token in (int(step.tokens) for step in steps) if token != tokenizer.END))


def load(path: str | os.PathLike[str], *, device: str = "cpu") -> LoadedModel:
    """The model of a run, a checkpoint or an export folder; of a run, the newest checkpoint that is whole.

    Raises FileNotFoundError or ValueError when there is no such thing at `path`, or what is there is damaged or no model of text.
    """
    folder = find_weights(path)
    model, config = load_weights(folder, device)
    tokenizer = ByteTokenizer()
    if config.input != "tokens":
        raise ValueError(f'{folder}: model.input = "{config.input}": text needs tokens; such a model is for use from Python')
    if config.vocab_size != tokenizer.vocab_size:
        raise ValueError(f"{folder}: a vocabulary of {config.vocab_size} tokens: text needs one of {tokenizer.vocab_size}")
    return LoadedModel(model.eval(), config, tokenizer, Path(folder))


def _decode(prompt: bytes, pieces: Iterator[bytes]) -> Iterator[str]:
    """UTF-8 text of `pieces`; a character that `prompt` began is completed."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.decode(prompt)
    for piece in pieces:
        text = decoder.decode(piece)
        if text:
            yield text
    tail = decoder.decode(b"", final=True)
    if tail:
        yield tail
