"""What a generation can go on from: a value that is saved, loaded, forked and joined by rows.

Shapes: B rows (texts), V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from vqkit.config import to_dict
from vqkit.files import write_bytes_atomic
from vqkit.models.transformer import ModelState
from vqkit.ops.full_attention import KeyValueState
from vqkit.ops.vq_attention import AttentionState

if TYPE_CHECKING:
    from vqkit.models.transformer import TransformerVQ

FORMAT = "vqkit-generation"
VERSION = 1


@dataclass(frozen=True)
class GenerationState:
    """Everything that the next token depends on, beside model and rules."""

    model: ModelState
    """What the model has read: all tokens but the last of each row."""
    last: Tensor
    """[B] int64, the last token of each row, which is read next."""
    done: Tensor
    """[B] bool, rows that have met a stop token: they repeat it."""
    seen: Tensor
    """[B, V] bool, the tokens of the prompt and of what was generated."""
    random: Tensor
    """[B, R] uint8, the state of each row's generator of random numbers."""
    slot: int = 0
    """Where the ring of the window stands, so that resumed sums have the order of unbroken ones."""

    def __len__(self) -> int:
        return len(self.last)

    def rows(self, rows: Sequence[int] | Tensor) -> GenerationState:
        """The state of these rows, in this order; a copy."""
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.last.device)
        if index.ndim != 1 or len(index) == 0 or bool(((index < 0) | (index >= len(self))).any()):
            raise ValueError(f"rows = {index.tolist()}: must be at least one of 0 to {len(self) - 1}")
        parts = {name: getattr(self, name).index_select(0, index) for name in ("last", "done", "seen")}
        return replace(self, model=model_rows(self.model, index), random=self.random.index_select(0, index.cpu()), **parts)

    def fork(self, number: int) -> GenerationState:
        """`number` copies of each row, one after the other: continuations of one prompt without reading it again.

        The first copy of a row goes on as the row would; each other has random numbers of its own that follow from the row's.
        """
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"number = {number!r}: must be an integer of at least 1")
        forked = self.rows([row for row in range(len(self)) for _ in range(number)])
        random = forked.random.clone()
        for i in range(len(random)):
            if i % number:
                seed = _hash(bytes(random[i].tolist()) + (i % number).to_bytes(8, "little"))
                random[i] = torch.Generator().manual_seed(seed).get_state()
        return replace(forked, random=random)


def row_seeds(seed: int | Sequence[int], rows: int) -> list[int]:
    """A seed for each row: the first has `seed`, others follow from it and their number; or those given, one a row."""
    if isinstance(seed, int):
        return [seed if row == 0 else _hash(f"{seed}:{row}".encode()) for row in range(rows)]
    if len(seed) != rows:
        raise ValueError(f"seed has {len(seed)} numbers: must be one integer, or one for each of {rows} prompts")
    return list(seed)


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


# Rows of the state of a model


def model_rows(state: ModelState, index: Tensor) -> ModelState:
    """The rows `index` [N] of a state."""
    attention = tuple(type(unit)(*(tensor.index_select(0, index) for tensor in unit)) for unit in state.attention)
    return ModelState(state.position.index_select(0, index), state.segment.index_select(0, index), attention)


def join_rows(states: Sequence[ModelState]) -> ModelState:
    """All rows of some states of one model, in order. Caches of ordinary attention are padded on the left to the longest."""
    units = [_join(list(parts)) for parts in zip(*(state.attention for state in states), strict=True)]
    return ModelState(torch.cat([s.position for s in states]), torch.cat([s.segment for s in states]), tuple(units))


def _join(parts: list[Any]) -> Any:
    if isinstance(parts[0], KeyValueState):
        longest = max(part.k.shape[2] for part in parts)
        parts = [_pad(part, longest - part.k.shape[2]) for part in parts]
    return type(parts[0])(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _pad(state: KeyValueState, slots: int) -> KeyValueState:
    rows = (0, 0, slots, 0)
    return KeyValueState(F.pad(state.k, rows), F.pad(state.v, rows), F.pad(state.present, (slots, 0)), F.pad(state.segment, (slots, 0)))


# On disk


def save_state(state: GenerationState, model: TransformerVQ, path: str | os.PathLike[str]) -> None:
    """Write one safetensors file, whole or not at all; its header holds the configuration of the model as JSON. Raises OSError."""
    about = {"format": FORMAT, "version": VERSION, "slot": state.slot, "model": to_dict(model.config)}
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in _tensors(state).items()}
    write_bytes_atomic(path, safetensors.torch.save(tensors, metadata={"vqkit": json.dumps(about)}))


def load_state(path: str | os.PathLike[str], model: TransformerVQ) -> GenerationState:
    """What `save_state` wrote, on the device of `model`.

    Raises FileNotFoundError, or ValueError for a file that is damaged, of another format, or of a model of another configuration (the
    message names what differs); the weights are not compared.
    """
    about, tensors = _read(Path(path))
    ours, theirs = to_dict(model.config), about["model"]
    for name in sorted({*ours, *theirs}):
        if ours.get(name) != theirs.get(name):
            raise ValueError(f"{path}: a state of a model with model.{name} = {theirs.get(name)!r}: this one has {ours.get(name)!r}")
    device = next(model.parameters()).device
    kind = KeyValueState if model.config.attention == "full" else AttentionState
    try:
        units = [
            kind(*(tensors.pop(f"model.attention.{i}.{field}").to(device) for field in kind._fields)) for i in range(len(model.units()))
        ]
        position, segment = (tensors.pop(f"model.{name}").to(device) for name in ("position", "segment"))
        last, done, seen = (tensors.pop(name).to(device) for name in ("last", "done", "seen"))
        random = tensors.pop("random")
    except KeyError as error:
        raise ValueError(f"{path}: tensor {error} is missing") from error
    state = GenerationState(ModelState(position, segment, tuple(units)), last, done, seen, random, about["slot"])
    _check_rows(path, state)
    try:
        model.check_state(state.model, len(state))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return state


def _tensors(state: GenerationState) -> dict[str, Tensor]:
    tensors = {name: getattr(state, name) for name in ("last", "done", "seen", "random")}
    tensors |= {f"model.{name}": getattr(state.model, name) for name in ("position", "segment")}
    for i, unit in enumerate(state.model.attention):
        tensors |= {f"model.attention.{i}.{name}": tensor for name, tensor in unit._asdict().items()}
    return tensors


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: must be a file that save_state wrote")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("vqkit", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: not a whole safetensors file of this format: {error}") from error
    found = (about.get("format"), about.get("version")) if isinstance(about, dict) else (None, None)
    if found != (FORMAT, VERSION):
        raise ValueError(f"{path}: format {found[0]!r} version {found[1]!r}, expected {FORMAT!r} version {VERSION}")
    return about, tensors


def _check_rows(path: str | os.PathLike[str], state: GenerationState) -> None:
    for name, tensor in _tensors(state).items():
        if len(tensor) != len(state.last):
            raise ValueError(f"{path}: tensor {name!r} has {len(tensor)} rows, expected {len(state.last)}, one a text")
