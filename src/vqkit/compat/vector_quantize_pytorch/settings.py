"""Attributes that are set after a module was made: they hold as if they had been given, or are refused.

A class says of which attributes its native part is made; when one of them is set, it is made anew. What is registered stays: codes,
projections, what an optimizer knows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vqkit.compat.vector_quantize_pytorch.arguments import check_setting
from vqkit.quantizers.layout import has_hooks


class Overridable(nn.Module):
    """A module some of whose methods its own calls do not go through: a subclass that overrides one of these is refused."""

    uncalled: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Such a method, be it the peer's alone, and the methods that it is called in there: who writes all of these may override it."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__mro__[1:]:
            for name, callers in vars(base).get("uncalled", {}).items():
                own = getattr(cls, name, None) is not getattr(base, name, None)
                if own and not (callers and all(_is_anew(cls, base, caller) for caller in callers)):
                    raise TypeError(f"class {cls.__name__} overrides {_without_effect(base, name, callers)}")


def _is_anew(cls: type, base: type, name: str) -> bool:
    """Whether `cls` has a method of its own that is not that of `base` with something around it."""
    own = getattr(cls, name)
    code = getattr(inspect.unwrap(own), "__code__", None)
    return own is not getattr(base, name, None) and (code is None or "__class__" not in code.co_freevars)  # which super() needs


def _without_effect(base: type, name: str, callers: Sequence[str]) -> str:
    instead = f"write {' and '.join(callers)} anew" if callers else "make the step around the call"
    return f"{base.__name__}.{name}, which no call of it goes through here: leave it, and {instead}, or take the quantizers of vqkit"


class Kept:
    """A method that cannot be set on an instance, as calls do not go through it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self.function if instance is None else MethodType(self.function, instance)

    def __set__(self, instance: Any, value: Any) -> None:
        raise TypeError(f"{self.function.__name__} is set on {_without_effect(type(instance), self.function.__name__, ())}")


def overrides(module: nn.Module, kind: type[nn.Module], name: str) -> bool:
    """Whether `module` has another method of this name than `kind`."""
    return name in module.__dict__ or getattr(type(module), name) is not getattr(kind, name)


class Settable(Overridable):
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
        if name in self.uncalled:
            raise TypeError(f"{name} is set on {_without_effect(type(self), name, self.uncalled[name])}")
        settable, fixed = name in self.made_of, name in self.fixed
        if not (settable or fixed) or "native" not in self.__dict__:
            super().__setattr__(name, value)
            return
        before = getattr(self, name)
        if fixed:
            if not _same(before, value):
                raise ValueError(f"{name} = {_told(value)}: must stay {_told(before)}, of which the module is made; make another one")
            if isinstance(value, Tensor):  # on another device, it may be
                super().__setattr__(name, value)
            return
        if not isinstance(value, nn.Module) and _same(before, value):
            super().__setattr__(name, value)
            return
        check_setting(type(self), name, value)
        self._check_setting(name, value)
        super().__setattr__(name, value)
        try:
            with draws_nothing():  # what is drawn for it is replaced by what is registered
                self._build()
        except Exception:
            super().__setattr__(name, before)
            raise


@contextmanager
def draws_nothing() -> Iterator[None]:
    """Where the generators are behind it as they were before, also that of the device on which modules are made."""
    device = torch.get_default_device()
    elsewhere = device.type not in ("cpu", "meta")
    with torch.random.fork_rng(devices=[device] if elsewhere else [], device_type=device.type if elsewhere else "cuda"):
        yield


@contextmanager
def unheard(module: nn.Module) -> Iterator[None]:
    """Where calls of it run no hooks."""
    names = ("_forward_hooks", "_forward_pre_hooks")
    kept = [(part, {name: part.__dict__[name] for name in names}) for part in module.modules()]
    for part, hooks in kept:
        part.__dict__.update({name: type(found)() for name, found in hooks.items()})
    try:
        yield
    finally:
        for part, hooks in kept:
            part.__dict__.update(hooks)


def is_watched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of `module` is more than `kind.forward`: it has hooks, or a forward of its own."""
    return has_hooks(module) or "forward" in module.__dict__ or type(module).forward is not kind.forward


def are_of(layers: Iterable[nn.Module], natives: Sequence[Any]) -> bool:
    """Whether these are the layers with the native quantizers of which parts were made: others, if anything was set on a layer."""
    number = 0
    for number, layer in enumerate(layers, 1):
        if number > len(natives) or layer.__dict__.get("native") is not natives[number - 1]:
            return False
    return number == len(natives)


def check_kinds(layers: Iterable[nn.Module], kind: type[nn.Module]) -> None:
    """Raise TypeError for layers of another kind."""
    for number, layer in enumerate(layers):
        if not isinstance(layer, kind):
            raise TypeError(f"layers[{number}] is a {type(layer).__name__}: must be a {kind.__name__}")


def keep_synchronized(before: Any, native: Any) -> None:
    """Let a native part know, as the one before it did, that the codebooks of all processes are equal."""
    if before is not None:
        native._synchronized = before._synchronized


def _same(before: Any, value: Any) -> bool:
    if before is value:
        return True
    if isinstance(before, Tensor) or isinstance(value, Tensor):
        if not (isinstance(before, Tensor) and isinstance(value, Tensor) and before.shape == value.shape):
            return False
        return before.is_meta or value.is_meta or bool((before.cpu() == value.cpu()).all())
    if getattr(before, "shape", None) != getattr(value, "shape", None):
        return False
    equal = before == value
    return bool(equal.all() if hasattr(equal, "shape") else equal)  # of arrays there are many answers


def _told(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.tolist()}" if value.numel() <= 8 else f"a tensor of shape {tuple(value.shape)}"
    return f"{type(value).__name__}(...)" if isinstance(value, nn.Module) else repr(value)
