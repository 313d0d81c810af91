"""Options from dataclasses by tyro, with every refusal as one line that names the near miss."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, TypeVar, get_origin, get_type_hints

from vqkit.cli.errors import UsageError

T = TypeVar("T")


def parse(cls: type[T], words: Sequence[str], *, prog: str, description: str | None = None, default: T | None = None) -> T:
    """An instance of the dataclass `cls` from command-line words. `--help` prints and leaves by SystemExit(0).

    Raises UsageError for words that make no sense, and for values that the dataclasses themselves refuse.
    """
    import tyro

    _refuse_unknown_options(cls, words, prog)
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
                config=(tyro.conf.FlagConversionOff,),
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


def option_names(cls: type, prefix: str = "--") -> Iterator[str]:
    """Names of all options that the dataclass `cls` gives, nested ones with dots."""
    hints = get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if get_origin(hint) is Annotated:  # a positional argument, or options without a prefix of their own
            if dataclasses.is_dataclass(hint.__origin__):
                yield from option_names(hint.__origin__, prefix)
            continue
        if dataclasses.is_dataclass(hint):
            yield from option_names(hint, f"{prefix}{field.name}.")
        else:
            yield (prefix + field.name).replace("_", "-")


def _refuse_unknown_options(cls: type, words: Sequence[str], prog: str) -> None:
    known = list(option_names(cls))
    for word in words:
        name = word.partition("=")[0].replace("_", "-")
        if name.startswith("--") and name not in ("--", "--help", *known) and not name.startswith("--tyro-"):
            raise UsageError(f"unknown option {name}{_option_near_miss(name, known)}; see {prog} --help")


def _option_near_miss(name: str, known: list[str]) -> str:
    """The option that ends like `name`, or looks like it, or of which the last part does."""
    name = name.replace("_", "-")
    last = {option: option.lstrip("-").rpartition(".")[2] for option in known}
    word = name.lstrip("-").rpartition(".")[2]
    close = [option for option in known if last[option] == word] or difflib.get_close_matches(name, known, n=1)
    close = close or [option for option in known if last[option] in difflib.get_close_matches(word, list(last.values()), n=1)]
    return f"; did you mean {close[0]}?" if close else ""


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
    lead, _, rest = message.partition(": ")
    if lead.startswith("Error parsing "):
        option = lead.removeprefix("Error parsing ")
        message = f"{option}: {rest}" if option.startswith("-") else rest
    elif lead.startswith("Missing from "):
        message = f"missing: {rest}"
    message = message.replace("invalid literal for int() with base 10:", "must be an integer, not")
    return message.replace("could not convert string to float:", "must be a number, not")
