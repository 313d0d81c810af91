"""The decoding engine: prompts are read in parallel, then every token is one step on a state of constant size.

Shapes: B rows (texts), T time, V vocabulary. Nothing here knows text; `session.py` stands between tokens and strings.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from vqkit.generate.decoder import Decoder, compiled
from vqkit.generate.sampling import SamplingRules, apply_rules, choose, gumbel_noise
from vqkit.generate.states import GenerationState, join_rows, model_rows, row_seeds

if TYPE_CHECKING:
    from vqkit.models.transformer import ModelState, TransformerVQ

PREFILL_POSITIONS = 4096
"""Most positions of all rows that one call reads, rounded down to whole blocks: prompts of any length need bounded memory."""
PREFILL_LOGITS = 1 << 26
"""Most logits that one call makes."""

Prompts = Tensor | Sequence[Sequence[int]]


class TokenLogprobs(NamedTuple):
    """Natural logarithms of probabilities; 0 for rows that had stopped before."""

    model: Tensor  # [B] of the chosen token, by the model as it is
    sampled: Tensor  # [B] of the chosen token, by the distribution that it was drawn from, after all rules; 0 where that is certain
    top: Tensor  # [B, n] of the n most probable tokens, by the model as it is, most probable first
    top_tokens: Tensor  # [B, n] int64, those tokens


class Step(NamedTuple):
    """One position of every row."""

    tokens: Tensor
    """[B] int64, the tokens chosen; a row that has stopped repeats its stop token."""
    done: Tensor
    """[B] bool, the rows that have stopped, with this token or before."""
    logits: Tensor
    """[B, V] float32, what the model said of this position, before any rule."""
    logprobs: TokenLogprobs | None
    """Where they were asked for."""


def generate(
    model: TransformerVQ,
    prompts: Prompts | GenerationState,
    num_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    official_nucleus: bool = False,
    repetition_penalty: float = 1.0,
    exclude: Sequence[int] = (),
    stop: Collection[int] = (),
    seed: int | Sequence[int] = 0,
    noise: Tensor | None = None,
    logprobs: int | None = None,
    compile: bool | str = False,
) -> Generation:
    """Continue `prompts` by up to `num_tokens` tokens, one `Step` at a time; it ends early once every row has stopped.

    prompts: [B, T] integers, or B sequences of any lengths of at least 1, or a `GenerationState` to go on from: what follows is what an
    unbroken generation would have made, token by token. A text that begins begins with the end token of whatever stood before it, so an
    empty text is the prompt `[[END]]`. Each row is what it would be alone, with its seed of `row_seeds(seed, B)`.

    temperature, top_k, top_p, official_nucleus, repetition_penalty, exclude: those of `SamplingRules`. `stop` holds the tokens that end
    a row. Sampling is a function of `seed` on every machine (up to rounding of the logits), one integer or one a row; a state brings
    its own random numbers. `noise` [B, num_tokens, V] (Gumbel) takes their place. `logprobs`: None, or how many of the most probable
    tokens to report beside the chosen one. `compile`: steps compiled to one graph by torch.compile; True, or the name of a backend.

    Statistics of the codebooks are not taken. The weights must not change while steps are taken. Arguments are checked before anything
    is computed: ValueError, or TypeError for prompts that are not integers.
    """
    rules = SamplingRules(temperature, top_k, top_p, official_nucleus, tuple(exclude), repetition_penalty)
    vocab_size = model.config.vocab_size
    _check_model(model)
    _check_tokens("exclude", rules.exclude, vocab_size)
    _check_tokens("stop", stop, vocab_size)
    if isinstance(num_tokens, bool) or not isinstance(num_tokens, int) or num_tokens < 0:
        raise ValueError(f"num_tokens = {num_tokens!r}: must be an integer of at least 0")
    if logprobs is not None and (isinstance(logprobs, bool) or not isinstance(logprobs, int) or not 0 <= logprobs <= vocab_size):
        raise ValueError(f"logprobs = {logprobs!r}: must be None, or from 0 to {vocab_size} tokens to report beside the chosen one")
    if isinstance(prompts, GenerationState):
        rows, start = len(prompts), prompts
        model.check_state(prompts.model, rows)
    else:
        inputs = _as_inputs(prompts, vocab_size, next(model.parameters()).device)
        rows, start = len(inputs), (inputs, row_seeds(seed, len(inputs)))
    if noise is not None and noise.shape != (rows, num_tokens, vocab_size):
        raise ValueError(f"noise of shape {tuple(noise.shape)}: must be {(rows, num_tokens, vocab_size)}, [B, num_tokens, vocab]")
    if compile:
        compiled(model, "inductor" if compile is True else compile)
    return Generation(model, start, num_tokens, rules, tuple(stop), noise, logprobs, compile)


def prefill(
    model: TransformerVQ, prompts: Prompts, *, seed: int | Sequence[int] = 0, after: GenerationState | None = None
) -> GenerationState:
    """Read prompts, in parallel, up to their last tokens: give the result to `generate`, or fork it first.

    `after`: the texts that the prompts go on, one a row, which then are not stopped any more; they keep their random numbers.
    """
    _check_model(model)
    inputs = _as_inputs(prompts, model.config.vocab_size, next(model.parameters()).device)
    if after is not None:
        if len(after) != len(inputs):
            raise ValueError(f"after has {len(after)} rows: must have one for each of {len(inputs)} prompts")
        model.check_state(after.model, len(after))
    return _read(model, inputs, row_seeds(seed, len(inputs)), after)


class Generation(Iterator[Step]):
    """The steps of `generate`; nothing is computed before the first is asked for."""

    def __init__(
        self,
        model: TransformerVQ,
        start: GenerationState | tuple[list[Tensor], list[int]],
        num_tokens: int,
        rules: SamplingRules,
        stop: tuple[int, ...],
        noise: Tensor | None,
        logprobs: int | None,
        compile: bool | str,
    ) -> None:
        self._model, self._start, self._num_tokens, self._rules = model, start, num_tokens, rules
        self._noise, self._logprobs, self._compile = noise, logprobs, compile
        self._stop = torch.tensor(stop, dtype=torch.int64, device=next(model.parameters()).device)
        self._decoder: Decoder | None = None
        self._t = 0

    def state(self) -> GenerationState:
        """What another generation can go on from, after the last step; a copy."""
        decoder = self._begun()
        random = torch.stack([generator.get_state() for generator in self._generators])
        return GenerationState(decoder.state(), self._last.clone(), self._done.clone(), self._seen.clone(), random, decoder.slot)

    def __next__(self) -> Step:
        if self._t >= self._num_tokens or (self._decoder is not None and len(self._stop) and bool(self._done.all())):
            raise StopIteration
        decoder = self._begun()
        # Inference mode is entered in calls, never between two steps, where it would reach into the caller's code.
        with torch.inference_mode():
            logits = decoder.read(self._last)
            if logits.device.type == "cpu" and not bool(logits.isfinite().all()):
                raise ValueError("the model's logits are not finite: its weights are damaged, or too large for their type")
            kept = apply_rules(logits, self._rules, self._seen)
            tokens = torch.where(self._done, self._last, choose(kept, self._rules, self._noise_now(logits)))
            logprobs = None if self._logprobs is None else _logprobs(logits, kept, tokens, self._done, self._logprobs)
            self._done = self._done | torch.isin(tokens, self._stop) if len(self._stop) else self._done
            self._seen.scatter_(1, tokens[:, None], True)
            self._last = tokens
        self._t += 1
        return Step(tokens, self._done, logits, logprobs)

    def _begun(self) -> Decoder:
        if self._decoder is None:
            start = self._start if isinstance(self._start, GenerationState) else _read(self._model, *self._start, None)
            with torch.inference_mode():
                self._last, self._done, self._seen = start.last, start.done, start.seen.clone()
            self._generators = [torch.Generator() for _ in range(len(start))]
            for generator, state in zip(self._generators, start.random, strict=True):
                generator.set_state(state.clone())
            self._decoder = Decoder(self._model, start.model, slot=start.slot, compile=self._compile)
        return self._decoder

    def _noise_now(self, logits: Tensor) -> Tensor | None:
        if self._noise is not None:
            return self._noise[:, self._t]
        if self._rules.temperature == 0.0:
            return None
        return torch.stack([gumbel_noise((logits.shape[1],), generator) for generator in self._generators])


def _logprobs(logits: Tensor, kept: Tensor, tokens: Tensor, done: Tensor, number: int) -> TokenLogprobs:
    by_model, by_rules = logits.log_softmax(-1), kept.log_softmax(-1)
    top, top_tokens = by_model.topk(number, dim=-1)

    def of_chosen(logprobs: Tensor) -> Tensor:
        return logprobs.gather(1, tokens[:, None]).squeeze(1).masked_fill(done, 0.0)

    return TokenLogprobs(of_chosen(by_model), of_chosen(by_rules), top.masked_fill(done[:, None], 0.0), top_tokens)


@torch.inference_mode()
def _read(model: TransformerVQ, inputs: list[Tensor], seeds: list[int], after: GenerationState | None) -> GenerationState:
    """Read all of `inputs` but the last token of each. Rows of one length are read together."""
    prompts = inputs if after is None else [torch.cat([last[None], row]) for last, row in zip(after.last, inputs, strict=True)]
    lengths = [len(row) for row in prompts]
    order, states = [], []
    for length in sorted(set(lengths)):
        rows = [row for row, found in enumerate(lengths) if found == length]
        index = torch.tensor(rows, device=prompts[0].device)
        state = model.initial_state(len(rows)) if after is None else model_rows(after.model, index)
        states.append(_read_together(model, torch.stack([prompts[row][:-1] for row in rows]), state))
        order += rows
    back = torch.tensor(order, device=prompts[0].device).argsort()
    state = model_rows(join_rows(states), back)
    last = torch.stack([row[-1] for row in prompts])
    seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=last.device)
    for row, tokens in enumerate(prompts):
        seen[row, tokens] = True
    done = torch.zeros_like(last, dtype=torch.bool)
    if after is not None:
        return replace(after, model=state, last=last, done=done, seen=seen | after.seen)
    return GenerationState(state, last, done, seen, torch.stack([torch.Generator().manual_seed(seed).get_state() for seed in seeds]))


def _read_together(model: TransformerVQ, inputs: Tensor, state: ModelState) -> ModelState:
    """The state after inputs [B, T]; T may be 0."""
    block_len = model.config.block_len
    positions = min(PREFILL_POSITIONS, PREFILL_LOGITS // model.config.vocab_size) // len(inputs)
    for piece in inputs.split(max(positions // block_len, 1) * block_len, dim=1) if inputs.shape[1] else ():
        state = model(piece, state, statistics=False).state
    return state


def _check_model(model: TransformerVQ) -> None:
    config = model.config
    if config.input != "tokens":
        raise ValueError(f'model.input = "{config.input}": generation needs a model of tokens')
    if model.training and max(config.embedding_dropout, config.residual_dropout, config.sinusoid_dropout, config.layer_dropout) > 0.0:
        raise ValueError("the model is in training mode and has dropout: call model.eval() first")


def _as_inputs(prompts: Prompts, vocab_size: int, device: torch.device) -> list[Tensor]:
    if isinstance(prompts, Tensor):
        if prompts.ndim != 2 or prompts.numel() == 0:
            raise ValueError(f"prompts of shape {tuple(prompts.shape)}: must be [B, T] with T >= 1; an empty text is the end token alone")
        rows = list(prompts)
    else:
        rows = [torch.as_tensor(prompt) for prompt in prompts]
        if not rows:
            raise ValueError("prompts is empty: must hold at least one prompt")
    for i, row in enumerate(rows):
        if row.ndim != 1 or len(row) == 0:
            raise ValueError(
                f"prompts[{i}] has shape {tuple(row.shape)}: must hold at least one token; an empty text is the end token alone"
            )
        if row.dtype not in (torch.uint8, torch.int16, torch.int32, torch.int64):
            raise TypeError(f"prompts of {row.dtype}: must be integers")
        lowest, highest = (int(x) for x in row.aminmax())
        if lowest < 0 or highest >= vocab_size:
            raise ValueError(f"prompts hold token {lowest if lowest < 0 else highest}: must be from 0 to {vocab_size - 1}")
    return [row.to(device, torch.int64) for row in rows]


def _check_tokens(name: str, tokens: Collection[int], vocab_size: int) -> None:
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise ValueError(f"{name} holds token {token}: must be from 0 to {vocab_size - 1}")
    if name == "exclude" and len(set(tokens)) >= vocab_size:
        raise ValueError(f"exclude holds all {vocab_size} tokens: one must be left")
