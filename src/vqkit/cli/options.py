"""Options from dataclasses by tyro, with every refusal as one line that names the near miss."""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import difflib
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from vqkit.cli.errors import UsageError

T = TypeVar("T")


def parse(cls: type[T], words: Sequence[str], *, prog: str, description: str | None = None, default: T | None = None) -> T:
    """An instance of the dataclass `cls` from command-line words. `--help` prints and leaves by SystemExit(0).

    Where a field may be one of several dataclasses that `kind` tells apart, `--FIELD.kind NAME` chooses among them, and the options
    are those of the chosen one. Raises UsageError for words that make no sense, and for values that the dataclasses themselves refuse.
    """
    import tyro

    default, words = _chosen_kinds(cls, default, words)
    words = ["None" if word == "none" else word for word in words]  # as files write it
    _refuse_unknown_options(cls, words, prog, default)
    refusal = io.StringIO()
    try:
        with contextlib.redirect_stderr(refusal):
            options, unknown = tyro.cli(
                cls,
                prog=prog,
                description=description,
                args=list(words),
                default=tyro.MISSING_NONPROP if default is None else default,
                return_unknown_args=True,
                config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
            )
    except SystemExit as exit_:
        if not exit_.code:
            raise
        raise UsageError(_first_section(refusal.getvalue())) from None
    except ValueError as error:  # of a dataclass whose options have no prefix
        raise UsageError(str(error)) from error
    if unknown:
        raise UsageError(f"unexpected argument {unknown[0]!r}; see {prog} --help")
    return options


def near_miss(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?`, or else the names that there are."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(names)}"


def value_of(words: Sequence[str], option: str) -> str | None:
    """The last value that `words` give to `option`, before they are parsed; None where they give none."""
    found = None
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == option:
            found = value if equals else words[i + 1] if i + 1 < len(words) else None
    return found


def option_names(cls: type, prefix: str = "--", default: Any = None) -> Iterator[str]:
    """Names of all options that the dataclass `cls` gives, nested ones with dots; of a field with alternatives, those of its default."""
    hints = get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        hint, value = hints[field.name], field.default if default is None else getattr(default, field.name)
        if get_origin(hint) is Annotated:  # a positional argument, or options without a prefix of their own
            if dataclasses.is_dataclass(hint.__origin__):
                yield from option_names(hint.__origin__, prefix, value if isinstance(value, hint.__origin__) else None)
            continue
        if _alternatives(hint):
            hint = type(value)
        if dataclasses.is_dataclass(hint):
            yield from option_names(hint, f"{prefix}{field.name}.", value if isinstance(value, hint) else None)
        else:
            yield (prefix + field.name).replace("_", "-")


def _alternatives(hint: Any) -> dict[str, type]:
    """The dataclasses that a field may be one of, by their kind; none if there is no such choice."""
    choices = [h for h in get_args(hint) if dataclasses.is_dataclass(h) and "kind" in h.__dataclass_fields__]
    return {kind: h for h in choices for kind in get_args(get_type_hints(h)["kind"])} if len(choices) > 1 else {}


def _chosen_kinds(cls: type[T], default: T | None, words: Sequence[str]) -> tuple[T | None, list[str]]:
    """The default with the alternatives that the words choose, and the words without that choice."""
    left = list(words)
    for path, choices in _choices(cls):
        option = f"--{'.'.join(path)}.kind".replace("_", "-")
        while (at := next((i for i, word in enumerate(left) if word.partition("=")[0].replace("_", "-") == option), None)) is not None:
            _, equals, kind = left[at].partition("=")
            if not equals:
                if at + 1 == len(left):
                    raise UsageError(f"{option}: needs a value; one of {', '.join(choices)}")
                kind = left[at + 1]
            if kind not in choices:
                raise UsageError(f"{option}: unknown kind {kind!r}{near_miss(kind, choices)}")
            del left[at : at + 1 + (not equals)]
            if default is None:
                raise UsageError(f"{option}: cannot be chosen here")
            default = _replaced(default, path, choices[kind])
    return default, left


def _choices(cls: type, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, type]]]:
    """Every field, nested ones too, that may be one of several dataclasses."""
    for name, hint in get_type_hints(cls).items():
        alternatives = _alternatives(hint)
        if alternatives:
            yield (*path, name), alternatives
        elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from _choices(hint, (*path, name))


def _replaced(config: Any, path: tuple[str, ...], choice: type) -> Any:
    """`config` with the defaults of `choice` at `path`, unless it has that already. Not validated: other words may belong to it."""
    value = getattr(config, path[0])
    new = _replaced(value, path[1:], choice) if len(path) > 1 else value if isinstance(value, choice) else choice()
    config = copy.copy(config)
    object.__setattr__(config, path[0], new)
    return config


def _refuse_unknown_options(cls: type, words: Sequence[str], prog: str, default: Any = None) -> None:
    known = list(option_names(cls, default=default))
    for word in words:
        name = word.partition("=")[0].replace("_", "-")
        if name.startswith("--") and name not in ("--", "--help", *known) and not name.startswith("--tyro-"):
            raise UsageError(f"unknown option {name}{_option_near_miss(name, known)}; see {prog} --help")


OTHER_NAMES = {
    "num-tokens": ("length", "tokens", "max-tokens", "max-new-tokens", "max-length", "bytes"),
    "prompt": ("text", "input", "start"),
    "out": ("output", "output-file", "file"),
    "run": ("output-dir", "out-dir", "dir", "save", "name", "out"),
    "to": ("out", "output", "dir", "folder"),
    "path": ("folder", "dataset", "corpus", "files", "input"),
    "learning-rate": ("lr", "rate", "eta"),
    "steps": ("iterations", "iters", "epochs", "max-steps", "num-steps"),
    "batch-size": ("batch", "bs"),
    "micro-batches": ("accumulate", "gradient-accumulation", "accumulation-steps", "grad-accum"),
    "dim": ("width", "hidden-size", "d-model", "embed-dim", "n-embd"),
    "layers": ("depth", "num-layers", "n-layer"),
    "codebook-size": ("codes", "num-codes", "code-size"),
    "sequence-len": ("context", "seq-len", "length", "context-length", "block-size", "max-length"),
    "lengths": ("length", "seq-len", "sequence-len", "context"),
    "top-p": ("nucleus", "p"),
    "top-k": ("k",),
    "seed": ("random-seed",),
    "device": ("gpu", "cuda", "cpu"),
    "parallel": ("fsdp", "ddp"),
    "precision": ("bf16", "fp16", "amp", "mixed-precision"),
    "recompute": ("checkpointing", "activation-checkpointing", "gradient-checkpointing"),
}
"""What other programs call an option, by the last part of its name here."""
FEW = 16
"""So many options are listed where none is near."""


def _option_near_miss(name: str, known: list[str]) -> str:
    """The option that ends like `name`, or is called so elsewhere, or looks like it, or of which the last part does; else what there is."""
    last = {option: option.lstrip("-").rpartition(".")[2] for option in known}
    word = name.lstrip("-").rpartition(".")[2]
    close = [option for option in known if last[option] == word]
    close = close or [option for option in known if word in OTHER_NAMES.get(last[option], ())]
    close = close or difflib.get_close_matches(name, known, n=1)
    close = close or [option for option in known if last[option] in difflib.get_close_matches(word, list(last.values()), n=1)]
    if close:
        return f"; did you mean {close[0]}?"
    return f"; there are {', '.join(known)}" if len(known) <= FEW else ""


def _first_section(box: str) -> str:
    """The message of tyro's box: the first section within its frame, which is one of dashes alone where there is no UTF-8."""
    sections: list[list[str]] = [[]]
    for line in box.splitlines():
        line = line.strip().strip("\u2502").strip()
        if line[:1] in ("\u256d", "\u2570"):
            continue
        if line and set(line) <= {"\u2500", "-"}:
            sections.append([])
        elif line:
            sections[-1].append(line)
    message = sections[0] if box.lstrip().startswith("\u256d") else sections[min(1, len(sections) - 1)]
    return _in_our_words(" ".join(message)) or "the options make no sense"


def _in_our_words(message: str) -> str:
    """Without what speaks of the parser, or of Python, rather than of the option."""
    message = re.sub(r"\[/?bold\]", "", message)
    lead, _, rest = message.partition(": ")
    if lead.startswith("Error parsing "):
        option = lead.removeprefix("Error parsing ")
        message = f"{option}: {rest}" if option.startswith("-") else rest
    for pattern, words in _REWORDED:
        if found := re.search(pattern, message, re.DOTALL):
            return words(*found.groups())
    message = message.replace("invalid literal for int() with base 10:", "must be an integer, not")
    return message.replace("could not convert string to float:", "must be a number, not")


def _of_types(types: str) -> str:
    """What the parser calls {None}|{FLOAT FLOAT}: None or 2 numbers."""
    names = {"INT": ("an integer", "integers"), "FLOAT": ("a number", "numbers"), "PATH": ("a path", "paths"), "STR": ("a text", "texts")}
    said = []
    for kind in types.split("|"):
        parts = kind.strip("{}").split()
        one, many = names.get(parts[0], (kind.strip("{}"), kind.strip("{}")))
        said.append(one if len(parts) == 1 else f"{len(parts)} {many}")
    return " or ".join(said)


def _value_given(values: str) -> str:
    return repr(" ".join(ast.literal_eval(values)))


_REWORDED: list[tuple[str, Callable[..., str]]] = [
    (
        r"^(--\S+): no type matching (.+) could be instantiated from (\[.*?\])\. ",
        lambda option, types, values: f"{option}: must be {_of_types(types)}, not {_value_given(values)}",
    ),
    (
        r"^invalid choice '(.*)' for argument '(--\S+)'\. Expected one of (\(.*\))\.",
        lambda value, option, choices: f"{option}: must be {' or '.join(ast.literal_eval(choices))}, not {value!r}",
    ),
    (r"^Missing value for argument '(--\S+?)'", lambda option: f"{option}: needs a value"),
    (r"^Missing from .*?: (\S+) (?:(?:INT|FLOAT|STR|PATH) )?(.*?)\s*\(required\)", lambda name, text: f"missing: {name}: {text}"),
]
"""What the parser says, and how it is said here."""
