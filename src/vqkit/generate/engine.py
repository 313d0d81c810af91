"""The decoding engine: prompts are read in parallel, then every token is one call of the model with a state of constant size.

Shapes: B batch, T time. Nothing here knows text; `session.py` stands between tokens and strings.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from vqkit.generate.sampling import SamplingRules, next_token

if TYPE_CHECKING:
    from vqkit.models.transformer import ModelState, TransformerVQ

PREFILL_LEN = 4096
"""Most positions of a prompt that one call reads (rounded down to whole blocks): a prompt of any length needs bounded memory."""


class Step(NamedTuple):
    """One position of every row."""

    tokens: Tensor
    """[B] int64, the tokens chosen; a row that has stopped repeats its stop token."""
    done: Tensor
    """[B] bool, the rows that have stopped, with this token or before."""
    logits: Tensor
    """[B, vocab] float32, what the model said of this position, before any rule."""
    state: ModelState
    """The state after everything that stands before `tokens`: give it back with `tokens[:, None]` as prompts to go on."""


def generate(
    model: TransformerVQ,
    prompts: Tensor | Sequence[Sequence[int]],
    num_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    official_nucleus: bool = False,
    exclude: Sequence[int] = (),
    stop: Collection[int] = (),
    seed: int = 0,
    noise: Tensor | None = None,
    state: ModelState | None = None,
) -> Iterator[Step]:
    """Continue `prompts` [B, T] by up to `num_tokens` tokens, one `Step` at a time; it ends early once every row has stopped.

    A text that begins begins with the end token of whatever stood before it, so an empty text is the prompt `[[END]]`.
    `temperature`, `top_k`, `top_p`, `official_nucleus` and `exclude` are those of `SamplingRules`; `stop` holds the tokens that end a row.
    Sampling is a function of `seed` on every machine (up to rounding of the logits), and of `noise` [B, num_tokens, vocab]
    (Gumbel) where that is given. `state` is what the model has read before the prompts (None: nothing).

    Statistics of the codebooks are not taken, and training or evaluation mode of the model makes no difference.
    Arguments are checked before anything is computed: ValueError, or TypeError for prompts that are not integers.
    """
    rules = SamplingRules(temperature, top_k, top_p, official_nucleus, tuple(exclude))
    vocab_size = model.config.vocab_size
    _check_tokens("exclude", rules.exclude, vocab_size)
    _check_tokens("stop", stop, vocab_size)
    if isinstance(num_tokens, bool) or not isinstance(num_tokens, int) or num_tokens < 0:
        raise ValueError(f"num_tokens = {num_tokens!r}: must be an integer of at least 0")
    inputs = _as_inputs(prompts, vocab_size).to(next(model.parameters()).device)
    if noise is not None and noise.shape != (len(inputs), num_tokens, vocab_size):
        raise ValueError(f"noise of shape {tuple(noise.shape)}: must be {(len(inputs), num_tokens, vocab_size)}, [B, num_tokens, vocab]")
    return _steps(model, inputs, num_tokens, rules, tuple(stop), torch.Generator().manual_seed(seed), noise, state)


def _steps(
    model: TransformerVQ,
    inputs: Tensor,
    num_tokens: int,
    rules: SamplingRules,
    stop: tuple[int, ...],
    generator: torch.Generator,
    noise: Tensor | None,
    state: ModelState | None,
) -> Iterator[Step]:
    # Inference mode is entered in the calls, not here: between two yields it would reach into the caller's code.
    stops = torch.tensor(stop, dtype=torch.int64, device=inputs.device)
    done = torch.zeros(len(inputs), dtype=torch.bool, device=inputs.device)
    last = inputs[:, -1]
    for t in range(num_tokens):
        logits, state = _read(model, inputs, state)
        drawn = next_token(logits, rules, generator=generator, noise=None if noise is None else noise[:, t])
        last = torch.where(done, last, drawn)
        done = done | torch.isin(last, stops)
        yield Step(last, done, logits, state)
        if stop and bool(done.all()):
            return
        inputs = last[:, None]


@torch.inference_mode()
def _read(model: TransformerVQ, inputs: Tensor, state: ModelState | None) -> tuple[Tensor, ModelState]:
    """Logits [B, vocab] after the last of `inputs` [B, T], and the state there."""
    block_len = model.config.block_len
    pieces = inputs.split(max(PREFILL_LEN // block_len, 1) * block_len, dim=1)
    for piece in pieces[:-1]:
        state = model(piece, state, statistics=False).state
    output = model(pieces[-1], state, statistics=False)
    return output.logits[:, -1], output.state


def _as_inputs(prompts: Tensor | Sequence[Sequence[int]], vocab_size: int) -> Tensor:
    if not isinstance(prompts, Tensor):
        lengths = sorted({len(prompt) for prompt in prompts})
        if len(lengths) > 1:
            raise ValueError(f"prompts of lengths {lengths}: must all be of one length")
        prompts = torch.tensor(prompts)
    if prompts.ndim != 2 or prompts.numel() == 0:
        raise ValueError(f"prompts of shape {tuple(prompts.shape)}: must be [B, T] with T >= 1; an empty text is the end token alone")
    if prompts.dtype not in (torch.uint8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"prompts of {prompts.dtype}: must be integers")
    lowest, highest = (int(x) for x in prompts.aminmax())
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(f"prompts hold token {lowest if lowest < 0 else highest}: must be from 0 to {vocab_size - 1}")
    return prompts.to(torch.int64)


def _check_tokens(name: str, tokens: Collection[int], vocab_size: int) -> None:
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise ValueError(f"{name} holds token {token}: must be from 0 to {vocab_size - 1}")
    if name == "exclude" and len(set(tokens)) >= vocab_size:
        raise ValueError(f"exclude holds all {vocab_size} tokens: one must be left")
