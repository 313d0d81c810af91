"""A trained model with its tokenizer, ready to write text or to paint: what `vqkit.load` returns."""

from __future__ import annotations

import codecs
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack, overload

import numpy as np

from vqkit.data import ByteTokenizer, Tokenizer, load_tokenizer
from vqkit.data.images import ImageTokenizer
from vqkit.data.tokenizer import TOKENIZER_FILE, IdTokenizer
from vqkit.generate.engine import Generation, generate
from vqkit.models import TransformerVQ
from vqkit.models.config import ModelConfig
from vqkit.models.weights import find_and_load_weights

TEXT = ("bytes", "sentencepiece")
"""Kinds of tokenizers whose items are bytes of text."""


class TextOptions(TypedDict, total=False):
    """How text is chosen: see `vqkit.generate.generate`, and `LoadedModel.stream` for the end of a document."""

    temperature: float
    top_k: int | None
    top_p: float
    repetition_penalty: float
    seed: int
    stop_at_end: bool
    compile: bool | str


@dataclass(frozen=True)
class LoadedModel:
    """A model with its weights, in evaluation mode, and the tokenizer that stands between it and text or images."""

    model: TransformerVQ
    config: ModelConfig
    tokenizer: Tokenizer
    path: Path
    """The folder that the weights came from."""

    @overload
    def generate(self, prompt: str | bytes, num_tokens: int, **options: Unpack[TextOptions]) -> str: ...

    @overload
    def generate(self, prompt: Sequence[str | bytes], num_tokens: int, **options: Unpack[TextOptions]) -> list[str]: ...

    def generate(self, prompt: str | bytes | Sequence[str | bytes], num_tokens: int, **options: Unpack[TextOptions]) -> str | list[str]:
        """The continuation of `prompt` by at most `num_tokens` tokens, of bytes or of pieces, without the prompt; see `stream`.

        Of several prompts, whatever their lengths, a list, written side by side: the first as it would be alone, the others with seeds
        that follow from the one given (`vqkit.generate.row_seeds`).
        """
        if isinstance(prompt, str | bytes):
            return "".join(self.stream(prompt, num_tokens, **options))
        texts = [_as_bytes(text) for text in prompt]
        written: list[list[int]] = [[] for _ in texts]
        for step in self._steps(texts, num_tokens, options):
            for tokens, token in zip(written, step.tokens.tolist(), strict=True):
                tokens.append(token)
        return ["".join(self._decoded(text, tokens)) for text, tokens in zip(texts, written, strict=True)]

    def stream(self, prompt: str | bytes, num_tokens: int, **options: Unpack[TextOptions]) -> Iterator[str]:
        """The same, piece by piece as it is written; no piece cuts a UTF-8 character, bytes that are none become U+FFFD.

        `prompt` is the beginning of a document and may be empty. A document that the model ends ends the text; with
        `stop_at_end=False` the end is never chosen. Sampling options (`TextOptions`) are those of `vqkit.generate.generate`.
        Raises ValueError for a model of anything but text.
        """
        text = _as_bytes(prompt)
        steps = self._steps([text], num_tokens, options)
        return self._decoded(text, (int(step.tokens) for step in steps))

    def images(self, num: int, **options: Unpack[TextOptions]) -> np.ndarray:
        """`num` images that the model paints, uint8 [num, H, W, C]. Raises ValueError for a model of anything but images."""
        tokenizer = self.tokenizer
        if not isinstance(tokenizer, ImageTokenizer):
            raise ValueError(f"{self.path} is a model of {tokenizer.kind}: it paints no images")
        if num < 1:
            raise ValueError(f"num = {num}: must be at least 1")
        sampling: dict[str, Any] = {**options, "exclude": (tokenizer.PAD, tokenizer.END, tokenizer.UNKNOWN)}
        sampling.pop("stop_at_end", None)
        steps = generate(self.model, [[tokenizer.END]] * num, math.prod(tokenizer.shape), **sampling)
        ids = np.stack([step.tokens.cpu().numpy() for step in steps], axis=1)
        return np.stack([tokenizer.decode(row) for row in ids])

    def ids(self, prompt: Sequence[int] | np.ndarray, num_tokens: int, **options: Unpack[TextOptions]) -> Iterator[int]:
        """The continuation of `prompt`, which may be empty, one by one: ids of the user's own vocabulary, without special ones.

        Raises ValueError for a model of anything but such ids, and for one outside the vocabulary.
        """
        tokenizer = self.tokenizer
        if not isinstance(tokenizer, IdTokenizer):
            raise ValueError(f"{self.path} is a model of {tokenizer.kind}: it writes no ids of a vocabulary of one's own")
        never = (tokenizer.PAD, tokenizer.UNKNOWN) if tokenizer.shift else (tokenizer.PAD,)
        steps = self._generation([tokenizer.encode(prompt)], num_tokens, options, never)
        return (int(step.tokens) - tokenizer.shift for step in steps if int(step.tokens) != tokenizer.END)

    def steps(self, prompt: str | bytes, num_tokens: int, *, logprobs: int | None = None, **options: Unpack[TextOptions]) -> Generation:
        """The steps behind `stream`, tokens with what `generate` tells of each: with `logprobs` its probability and the most probable."""
        return self._steps([_as_bytes(prompt)], num_tokens, options, logprobs)

    def _steps(self, texts: Sequence[bytes], num_tokens: int, options: TextOptions, logprobs: int | None = None) -> Generation:
        if self.tokenizer.kind not in TEXT:
            raise ValueError(f"{self.path} is a model of {self.tokenizer.kind}: it writes no text")
        never = (self.tokenizer.PAD, self.tokenizer.UNKNOWN)
        return self._generation([self.tokenizer.encode(text) for text in texts], num_tokens, options, never, logprobs)

    def _generation(
        self, prompts: Sequence[np.ndarray], num_tokens: int, options: TextOptions, never: tuple[int, ...], logprobs: int | None = None
    ) -> Generation:
        unknown = set(options) - set(TextOptions.__annotations__)
        if unknown:
            raise TypeError(f"unknown option {min(unknown)!r}: there are {', '.join(TextOptions.__annotations__)}")
        sampling: dict[str, Any] = dict(options)
        exclude = never if sampling.pop("stop_at_end", True) else (*never, self.tokenizer.END)
        begun = [[self.tokenizer.END, *prompt.tolist()] for prompt in prompts]
        return generate(self.model, begun, num_tokens, exclude=exclude, stop=(self.tokenizer.END,), logprobs=logprobs, **sampling)

    def _decoded(self, text: bytes, tokens: Iterable[int]) -> Iterator[str]:
        return _decode(text, (self.tokenizer.decode([token]) for token in tokens if token != self.tokenizer.END))


def load(path: str | os.PathLike[str], *, device: str = "cpu") -> LoadedModel:
    """The model of a run, a checkpoint or an export folder; of a run, the newest checkpoint that is whole.

    The tokenizer is that of the run's data, or one that lies beside the weights; a vocabulary of 259 needs none, being that of bytes.
    Raises FileNotFoundError or ValueError when there is no such thing at `path`, or what is there is damaged or no model of tokens.
    """
    folder, model, config = find_and_load_weights(path, device)
    tokenizer = _tokenizer_of(Path(folder))
    if config.input != "tokens":
        raise ValueError(f'{folder}: model.input = "{config.input}": a tokenizer needs tokens; such a model is for use from Python')
    if config.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"{folder}: a vocabulary of {config.vocab_size} tokens, the tokenizer of {tokenizer.kind} has {tokenizer.vocab_size}"
        )
    return LoadedModel(model.eval(), config, tokenizer, Path(folder))


def _tokenizer_of(weights: Path) -> Tokenizer:
    """That beside the weights, that of the run whose checkpoint they are, or bytes."""
    for folder in (weights, weights.parent.parent / "data"):
        if (folder / TOKENIZER_FILE).is_file():
            return load_tokenizer(folder)
    return ByteTokenizer()


def _as_bytes(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


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
