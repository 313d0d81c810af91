"""One token of every row at a time, on a state that is changed in place: the inner loop of generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from vqkit.ops.vq_attention import AttentionState, DecodingState, attention_state

if TYPE_CHECKING:
    from vqkit.models.transformer import ModelOutput, ModelState, TransformerVQ

_compiled: WeakKeyDictionary[TransformerVQ, dict[str, Callable[..., ModelOutput]]] = WeakKeyDictionary()


class Decoder:
    """Reads tokens after `state`, which it copies. The weights must stay as they are meanwhile: it holds codes and position keys of now.

    With quantized keys every step costs the same and nothing grows; ordinary attention goes through the model, its cache growing.
    `slot` turns the ring of the window: see `vqkit.ops.vq_attention.decoding_state`. `compile` is True or the name of a backend of
    torch.compile; a compiled step is one graph.
    """

    def __init__(self, model: TransformerVQ, state: ModelState, *, slot: int = 0, compile: bool | str = False) -> None:
        self.slots = model.config.mem_len + 1 if model.config.attention == "vq" else 1
        self._began, self._slot, self._steps = state, slot, 0
        self._run = compiled(model, "inductor" if compile is True else compile) if compile else model
        with torch.inference_mode():
            units = [
                unit.decoding_state(own, slot=slot) if isinstance(own, AttentionState) else own
                for unit, own in zip(model.units(), state.attention, strict=True)
            ]
        self._state = state._replace(attention=tuple(units), masks=None)

    @torch.inference_mode()
    def read(self, tokens: Tensor) -> Tensor:
        """tokens [B] -> logits [B, vocab] of what follows them."""
        output = self._run(tokens[:, None], self._state, statistics=False)
        self._state = output.state
        self._steps += 1
        return output.logits[:, -1]

    @property
    def slot(self) -> int:
        """Where the ring stands now."""
        return (self._slot + self._steps) % self.slots

    @torch.inference_mode()
    def state(self) -> ModelState:
        """What the model has read so far; a copy."""
        units = [
            _value(own, began, self._steps) if isinstance(own, DecodingState) and isinstance(began, AttentionState) else own
            for own, began in zip(self._state.attention, self._began.attention, strict=True)
        ]
        return self._state._replace(attention=tuple(units))


def compiled(model: TransformerVQ, backend: str) -> Callable[..., ModelOutput]:
    """The model compiled to one graph, once a model and backend. Raises ValueError where its state grows with every token."""
    if model.config.attention == "full":
        raise ValueError('compile: model.attention = "full" keeps a state that grows with every token, so that no graph would fit twice')
    of_model = _compiled.setdefault(model, {})
    if backend not in of_model:
        of_model[backend] = torch.compile(model.forward, fullgraph=True, dynamic=False, backend=backend)
    return of_model[backend]


def _value(decoding: DecodingState, began: AttentionState, steps: int) -> AttentionState:
    """Steps know one document alone, number 0: older tokens of the window keep the number they had."""
    read = began.segment.new_zeros(len(began.segment), steps)
    segment = torch.cat([began.segment, read[:, : began.segment.shape[1]]], 1)
    window = segment[:, -began.segment.shape[1] :].clone()
    left = torch.cat([began.segment, read], 1)[:, steps - 1].clone() if steps else began.cached_segment
    return attention_state(decoding, began.v.dtype, window, left)
