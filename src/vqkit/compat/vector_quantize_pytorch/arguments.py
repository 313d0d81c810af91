"""Errors in the words of the peer: what is given is checked by its annotation and range, and what a native part says is put right.

`in_these_words` wraps the constructor and the methods of a class. A constructor checks all that it is given. A call that is given more than
its input checks that; beyond it a call costs what a function around it costs. Native parts raise by their own names of things, which become
those of the class as the error passes by: NATIVE and PHRASES are all that there is to say.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import itertools
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

Class = TypeVar("Class", bound=type)

NATIVE: dict[str, tuple[str, ...]] = {
    "lengths": ("lens",),
    "targets": ("indices",),
    "indices": ("embed_ind",),
    "x": ("z", "logits"),
    "top_k": ("topk",),
    "code_weights": ("ema_update_weight",),
    "temperature": ("sample_codebook_temp",),
    "StoredEMA.decay": ("decay",),
    "StoredEMA.eps": ("eps",),
    "soft_clamp": ("soft_clamp_input_value",),
    "scale": ("scales",),
    "MLP": ("mlp_kwargs",),
}
"""What native parts name, and the arguments for it: the one is meant that the class or the call has."""

PHRASES: tuple[tuple[str, str], ...] = ((r", as layout = \"\w+\" and dim = (\d+) say", r", as dim = \1 says"),)
"""What they say of choices that are none here, and what is said instead."""

METHODS = (
    "forward",
    "get_codes_from_indices",
    "get_output_from_indices",
    "indices_to_codes",
    "indices_to_level_indices",
    "indices_to_act_value",
    "level_indices_to_indices",
    "codes_to_indices",
    "update_indices",
    "update_ema_indices",
    "update_codebook",
    "expire_codes_",
    "decode_bits",
    "init_population_from_data",
    "log_prob",
)
"""What is called from outside, and by nothing within a call."""


class Range(NamedTuple):
    """What a number may be."""

    least: float = -math.inf
    most: float = math.inf
    above: bool = False  # whether `least` itself is out of it

    def holds(self, number: float) -> bool:
        """Not for NaN."""
        return self.least <= number <= self.most and not (self.above and number == self.least)

    def __str__(self) -> str:
        if self == (-math.inf, math.inf, False):
            return "a number"
        low = f"above {self.least}" if self.above else f"at least {self.least}"
        return low if self.most == math.inf else f"{low} and at most {self.most}"


_COUNTS = (
    "dim codebook_size codebook_dim heads num_codebooks num_quantizers groups bits kmeans_iters orthogonal_reg_max_codes dim_hidden "
    "frozen_codebook_dim quantize_dropout_multiple_of nested_dropout_min_levels pop_size tournament_size topk"
)
_FROM_0 = (
    "depth beam_size eval_beam_size quantize_dropout_cutoff_index elitism_count generations eps commitment_weight orthogonal_reg_weight "
    "codebook_diversity_loss_weight directional_reparam_variance entropy_loss_weight commitment_loss_weight quantization_loss_weight "
    "input_to_quantize_commit_loss_weight"
)
_SHARES = (
    "decay affine_param_batch_decay affine_param_codebook_decay sync_update_v nested_dropout noise_dropout mutation_rate quantize_rate "
    "quant_grad_frac"
)
_POSITIVE = (
    "codebook_diversity_temperature temperature inv_temperature scale codebook_scale cosine_sim_project_in_scale soft_clamp_input_value"
)
RANGES: dict[str, Range] = {
    **dict.fromkeys(_COUNTS.split(), Range(1)),
    **dict.fromkeys(_FROM_0.split(), Range(0)),
    **dict.fromkeys(_SHARES.split(), Range(0, 1)),
    **dict.fromkeys(_POSITIVE.split(), Range(0, above=True)),
    "frac_per_sample_entropy": Range(0, 1, above=True),
    "beam_score_quantizer_weights": Range(0, above=True),
    "levels": Range(2),
    "scales": Range(1),
}
"""Of the numbers of these names; a default may be what it is."""


# What an annotation allows


class _Kind(NamedTuple):
    """Whether a value is of a kind, and what the kind is called."""

    fits: Callable[[Any], bool]
    what: str
    several: str = ""
    types: tuple[type, ...] = ()  # of which all is right


def _is_truth(value: Any) -> bool:
    whole = isinstance(value, Integral) or type(value).__name__ in ("bool", "bool_")  # numpy's
    return value is None or (whole and value in (0, 1))


def _is_number(value: Any) -> bool:
    """A tensor without axes is one, too, unless it learns."""
    if isinstance(value, Tensor):
        return value.dim() == 0 and not (value.is_complex() or value.dtype == torch.bool or value.requires_grad)
    return isinstance(value, Real) and not isinstance(value, bool)


_KINDS: dict[Any, _Kind] = {
    Any: _Kind(lambda value: True, "anything", "things", (object,)),
    types.NoneType: _Kind(lambda value: value is None, "None", types=(types.NoneType,)),
    bool: _Kind(_is_truth, "True or False", types=(bool,)),
    int: _Kind(lambda value: isinstance(value, Integral) and not isinstance(value, bool), "an integer", "integers"),
    float: _Kind(_is_number, "a number", "numbers"),
    str: _Kind(lambda value: isinstance(value, str), "a string", "strings"),
    dict: _Kind(lambda value: isinstance(value, Mapping), "a dictionary"),
    Callable: _Kind(callable, "a function"),
    Tensor: _Kind(lambda value: isinstance(value, Tensor), "a torch.Tensor", "tensors", (Tensor,)),
    nn.Module: _Kind(lambda value: isinstance(value, nn.Module), "a torch.nn.Module"),
}


_OF_ONE_KIND = (Tensor, bool, types.FunctionType)


def _kind(annotation: Any) -> _Kind:
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        kinds = [_kind(part) for part in parts]
        what = " or ".join(kind.what for kind in kinds)
        several, right = " or ".join(kind.several or kind.what for kind in kinds), tuple(t for kind in kinds for t in kind.types)
        return _Kind(lambda value: any(kind.fits(value) for kind in kinds), what, several, right)
    if origin in (list, tuple, Sequence):
        return _sequence(tuple if origin is tuple else Sequence, _kind(parts[0]))
    known = _KINDS.get(origin or annotation)
    return known or _Kind(lambda value: isinstance(value, annotation), f"a {annotation.__name__}", f"{annotation.__name__}s")


def _sequence(of: type, entry: _Kind) -> _Kind:
    numbers, name = entry.several != "tensors", of.__name__.lower()

    def fits(value: Any) -> bool:
        return isinstance(value, of) and not isinstance(value, str) and (len(value) > 0 or not numbers) and all(map(entry.fits, value))

    return _Kind(fits, f"a {name} of {'one or more ' if numbers else ''}{entry.several}", f"{name}s of {entry.several}")


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} {value.dtype}"
    text = repr(value)
    return text if len(text) < 100 else f"{text[:100]}..."


class _Parameters:
    """Those of a function with `self`, and what may stand for each."""

    def __init__(self, function: Callable[..., Any], handed_on: Sequence[str] = ()) -> None:
        self.function, self.name = function, function.__qualname__.removesuffix(".__init__")
        every = [*inspect.signature(function).parameters.values()][1:]
        self.names = [p.name for p in every if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        self.in_order = [p.name for p in every if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        self.known = tuple(dict.fromkeys((*self.names, *handed_on)))
        self.open = any(p.kind is p.VAR_KEYWORD for p in every) and not handed_on
        self.defaults = {p.name: p.default for p in every}
        self.fitting: set[tuple[str, type]] = set()  # names with types of which one value fits as well as another, as was found

    @functools.cached_property
    def kinds(self) -> dict[str, _Kind]:
        hints = typing.get_type_hints(self.function)
        return {name: _kind(hints[name]) for name in self.names if name in hints}

    def named(self, args: Sequence[Any], options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """What is given, by name."""
        return itertools.chain(zip(self.in_order, args, strict=False), options.items())

    @functools.cached_property
    def _right(self) -> dict[str, tuple[type, ...]]:
        return {name: kind.types for name, kind in self.kinds.items()}

    @functools.cached_property
    def _ranges(self) -> dict[type, dict[str, Range]]:
        """Of what may be any number that is not whole, and of what may be any that is."""
        ranges = {name: RANGES.get(name, Range()) for name in self.kinds}
        return {type(some): {name: ranges[name] for name, kind in self.kinds.items() if kind.fits(some)} for some in (0.5, 2)}

    def check(self, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What is given, with numbers for tensors that stand for them.

        Raises TypeError for a name that there is not and for a value of another kind, ValueError for one out of range.
        """
        right, kinds, ranges, numbers = self._right, self.kinds, self._ranges, {}
        for name, value in self.named(args, options):
            if isinstance(value, right.get(name, ())):
                continue
            if (kind := type(value)) in (float, int) and name in ranges[kind] and ranges[kind][name].holds(value):
                continue
            if name in kinds:
                number = value.item() if isinstance(value, Tensor) and kinds[name].fits(value) else value
                self._check(name, number, kinds[name])
                if number is not value:
                    numbers[name] = number
            elif name not in self.known and not self.open:
                near = difflib.get_close_matches(name, self.known, n=1)
                raise TypeError(f"{self.name} has no argument {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        if not numbers:
            return args, options
        in_order = [numbers.get(name, value) for name, value in zip(self.in_order, args, strict=False)]
        return (*in_order, *args[len(in_order) :]), {name: numbers.get(name, value) for name, value in options.items()}

    def _check(self, name: str, value: Any, kind: _Kind) -> None:
        if value is self.defaults[name] or (name, type(value)) in self.fitting:
            return
        if not kind.fits(value):
            raise TypeError(f"{name} = {_shown(value)}: must be {kind.what}")
        if isinstance(value, (Real, tuple, list)):
            for place, number in _numbers(value):
                if not (allowed := RANGES.get(name, Range())).holds(number):
                    raise ValueError(f"{name}{place} = {number}: must be {allowed}")
        if type(value) in _OF_ONE_KIND and name not in RANGES:
            self.fitting.add((name, type(value)))


def _numbers(value: Any) -> Iterator[tuple[str, Any]]:
    """The numbers in it, and where."""
    if isinstance(value, Real):
        yield "", value
    elif isinstance(value, (tuple, list)):
        for place, entry in enumerate(value):
            yield from ((f"[{place}]{deeper}", number) for deeper, number in _numbers(entry))


@functools.cache
def _of_constructor(cls: type) -> _Parameters:
    return _Parameters(cls.__init__)


def check_as_argument(cls: type, name: str, value: Any) -> Any:
    """What an attribute is set to, as the constructor of `cls` takes its argument of that name, if there is one, and checks it."""
    made = _of_constructor(cls)
    return made.check((), {name: value})[1][name] if name in made.names else value


# Errors that pass by


def _reword(error: Exception, known: Sequence[str]) -> None:
    """Put what a part of vqkit says into the names that are known; what others say stays as it is."""
    if not _is_ours(error):
        return
    text = str(error.args[0])
    for native, names in NATIVE.items():
        own = next((name for name in names if name in known), None)
        if own is not None and native not in known:
            text = re.sub(rf"(?<![\w.'\"]){re.escape(native)}(?!\w|\.\w)", own, text)
    for phrase, instead in PHRASES:
        text = re.sub(phrase, instead, text)
    error.args = (text, *error.args[1:])


def _is_ours(error: Exception) -> bool:
    """Whether it is what vqkit itself has to say, and not what it stumbled over, or what a user has handed to it."""
    if not isinstance(error, (ValueError, TypeError)) or not error.args:
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("vqkit.")


def _check_devices(module: nn.Module, given: Iterable[tuple[str, Any]], error: Exception) -> None:
    """Raise ValueError for a tensor on another device, if that is what `error` is about."""
    if not isinstance(error, RuntimeError) or re.search("device|meta tensor", str(error)) is None:
        return
    own = next((tensor.device for tensor in itertools.chain(module.parameters(), module.buffers())), None)
    for name, value in given:
        for tensor in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(tensor, Tensor) and own is not None and tensor.device != own:
                raise ValueError(f"{name} is on {tensor.device}: must be on {own}, as the {type(module).__name__} is") from error


# The classes


def in_these_words(*, handed_to: Any = None) -> Callable[[Class], Class]:
    """Let constructor and methods of a class check what they are given, and raise by its names; `handed_to` takes what else there is."""

    def wrap(cls: Class) -> Class:
        made = _Parameters(cls.__init__, () if handed_to is None else handed_to._arguments.known)
        cast(Any, cls)._arguments = made
        for name, value in [*vars(cls).items()]:
            if name == "__init__":
                cls.__init__ = _constructor(value, made)
            elif name in METHODS:
                setattr(cls, name, _method(value, made.known))
            elif isinstance(value, property) and value.fset is not None:
                setattr(cls, name, value.setter(_setter(value.fset, made.known)))
        return cls

    return wrap


def check_setting(cls: Any, name: str, value: Any) -> None:
    """Raise TypeError or ValueError for what an argument of the constructor cannot be, of one that is set as an attribute."""
    if name in cls._arguments.names:
        cls._arguments.check((), {name: value})


def _constructor(construct: Callable[..., None], parameters: _Parameters) -> Callable[..., None]:
    @functools.wraps(construct)
    def constructed(self: Any, *args: Any, **options: Any) -> None:
        args, options = parameters.check(args, options)
        try:
            construct(self, *args, **options)
        except Exception as error:
            _reword(error, parameters.known)
            raise

    return constructed


def _method(function: Callable[..., Any], of_class: Sequence[str]) -> Callable[..., Any]:
    parameters = _Parameters(function)
    known = (*parameters.names, *of_class)
    more = int(function.__name__ == "forward" or parameters.in_order == ["indices"])  # which is looked at by whatever takes it

    @functools.wraps(function)
    def called(self: Any, *args: Any, **options: Any) -> Any:
        if (options or len(args) > more) and not torch.compiler.is_compiling():
            args, options = parameters.check(args, options)
        try:
            return function(self, *args, **options)
        except Exception as error:
            _reword(error, known)
            for part in self.modules():
                if (check := getattr(part, "check_stored", None)) is not None:
                    check()
            if not _is_ours(error):
                parameters.check(args, options)
                _check_devices(self, parameters.named(args, options), error)
            raise

    return called


def _setter(function: Callable[[Any, Any], None], known: Sequence[str]) -> Callable[[Any, Any], None]:
    @functools.wraps(function)
    def written(self: Any, value: Any) -> None:
        try:
            function(self, value)
        except Exception as error:
            _reword(error, (function.__name__, *known))
            raise

    return written
