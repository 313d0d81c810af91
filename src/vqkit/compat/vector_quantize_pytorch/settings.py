"""Attributes that are set after a module was made: they hold as if they had been given, or are refused.

A class says of which attributes its native part is made; when one of them is set, it is made anew. What is registered stays: codes,
projections, what an optimizer knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vqkit.compat.vector_quantize_pytorch.arguments import check_setting


class Settable(nn.Module):
    """A module whose native part, `native`, is what `_build` makes of its attributes."""

    made_of: frozenset[str] = frozenset()
    """What `_build` reads."""
    fixed: frozenset[str] = frozenset()
    """What the tensors of the module were made of, and cannot become anything else."""

    native: Any
    """Of anything, once the module is made; None where it has no such part."""

    def _build(self) -> None:
        """Make the native part of the attributes of now, which changes nothing where it raises."""
        raise NotImplementedError

    def _check_setting(self, name: str, value: Any) -> None:
        """Raises for what `name` cannot be set to."""

    def __setattr__(self, name: str, value: Any) -> None:
        settable, fixed = name in self.made_of, name in self.fixed
        if not (settable or fixed) or "native" not in self.__dict__:
            super().__setattr__(name, value)
            return
        before = getattr(self, name)
        if fixed:
            if not _same(before, value):
                raise ValueError(f"{name} = {_told(value)}: must stay {_told(before)}, of which the module is made; make another one")
            return
        if not isinstance(value, nn.Module) and _same(before, value):
            super().__setattr__(name, value)
            return
        check_setting(type(self), name, value)
        self._check_setting(name, value)
        super().__setattr__(name, value)
        try:
            with torch.random.fork_rng(devices=[]):  # what is drawn for it is replaced by what is registered
                self._build()
        except Exception:
            super().__setattr__(name, before)
            raise


def is_watched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of `module` is more than `kind.forward`: it has hooks, or a forward of its own."""
    own = module.__dict__  # without a search, as this is asked of every layer in every call
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return bool(hooks) or "forward" in own or type(module).forward is not kind.forward


def are_of(layers: Iterable[nn.Module], natives: Sequence[Any]) -> bool:
    """Whether these are the layers with the native quantizers of which parts were made: others, if anything was set on a layer."""
    number = 0
    for number, layer in enumerate(layers, 1):
        if number > len(natives) or layer.__dict__.get("native") is not natives[number - 1]:
            return False
    return number == len(natives)


def refuse_watched(layers: Iterable[nn.Module], kind: type[nn.Module]) -> None:
    """Raise ValueError for layers that would have to be called as modules."""
    for number, layer in enumerate(layers):
        if not isinstance(layer, kind):
            raise TypeError(f"layers[{number}] is a {type(layer).__name__}: must be a {kind.__name__}")
        if is_watched(layer, kind):
            raise ValueError(f"layers[{number}] has hooks, or a forward of its own: must have neither, as no layer is called")


def keep_synchronized(before: Any, native: Any) -> None:
    """Let a native part know, as the one before it did, that the codebooks of all processes are equal."""
    if before is not None:
        native._synchronized = before._synchronized


def _same(before: Any, value: Any) -> bool:
    if isinstance(before, Tensor) or isinstance(value, Tensor):
        tensors = isinstance(before, Tensor) and isinstance(value, Tensor)
        return before is value or (tensors and before.shape == value.shape and bool((before.cpu() == value.cpu()).all()))
    return bool(before is value or before == value)


def _told(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.tolist()}" if value.numel() <= 8 else f"a tensor of shape {tuple(value.shape)}"
    return f"{type(value).__name__}(...)" if isinstance(value, nn.Module) else repr(value)
