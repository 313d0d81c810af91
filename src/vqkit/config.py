"""Strict passage between configuration dataclasses and dicts, JSON and TOML.

A configuration that is read back is exactly the one that was written: an unknown key, a missing one or a value of another type
is an error that names its dotted path, what was found and what would be right. The standard library alone is needed.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import difflib
import inspect
import itertools
import json
import math
import os
import tomllib
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


class _Absent:
    def __repr__(self) -> str:
        return "(absent)"


ABSENT: Final = _Absent()
"""Stands in a `Difference` for the side that has no such entry."""


class Difference(NamedTuple):
    """One entry in which two configurations differ."""

    path: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.path}: {self.old!r} -> {self.new!r}"


def to_dict(config: Any, where: str = "config") -> dict[str, Any]:
    """Nested dicts, lists and scalars, as JSON and TOML know them; tuples become lists, paths strings.

    Raises TypeError for a value that has no such form and ValueError for a number that is not finite.
    """
    if not _is_config(config):
        raise TypeError(f"{where} = {config!r}: must be an instance of a dataclass")
    return {f.name: _plain(getattr(config, f.name), _join(where, f.name)) for f in _fields(type(config))}


def from_dict(cls: type[T], data: Mapping[str, Any], where: str = "config") -> T:
    """The dataclass `cls` from nested dicts; fields that are absent take their defaults.

    An int is taken where a float is asked for; a bool is never a number. `where` opens the dotted path in errors.
    Raises ValueError (unknown or missing key, value outside a Literal, or whatever `cls` itself refuses) or TypeError.
    """
    if not _is_config_class(cls):
        raise TypeError(f"cls = {cls!r}: must be a dataclass")
    if not isinstance(data, Mapping):
        raise _wrong_type(where, data, f"a table of the options of {cls.__name__}")
    fields = {f.name: f for f in _fields(cls)}
    for key in data:
        if key not in fields:
            raise ValueError(f"{_join(where, key)} = {data[key]!r}: unknown option{_near_miss(key, fields)}")
    hints = get_type_hints(cls)
    values = {key: _value(hints[key], value, _join(where, key)) for key, value in data.items()}
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ValueError(f"{_join(where, name)}: missing; must be {_describe(hints[name])}")
    return cls(**values)


def to_json(config: Any) -> str:
    """JSON text of the whole configuration, in the order of its fields, with a line end."""
    return json.dumps(to_dict(config), indent=2, allow_nan=False) + "\n"


def from_json(cls: type[T], text: str, where: str = "config") -> T:
    """The inverse of `to_json`, as strict as `from_dict`; also refuses a key that stands twice."""
    try:
        data = json.loads(text, object_pairs_hook=lambda pairs: _without_repeats(pairs, where))
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    return from_dict(cls, data, where)


def to_toml(config: Any, *, comments: bool = False) -> str:
    """TOML text of the whole configuration, in the order of its fields, tables after the entries; `None` is the word "none".

    With `comments` each entry has what its field says of itself behind it.
    """
    lines: list[str] = []
    _write_table(lines, config, "", comments)
    return "\n".join(lines).strip("\n") + "\n"


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The tables of a TOML file, for `overlay` and `from_dict`. Raises OSError, or ValueError with line and column if it is not TOML."""
    data = Path(path).read_bytes()
    try:
        return _with_none(tomllib.loads(data.decode()))
    except UnicodeDecodeError as error:
        line, column = data.count(b"\n", 0, error.start) + 1, error.start - data.rfind(b"\n", 0, error.start)
        raise ValueError(f"{path}: not TOML: {error.object[error.start]:#04x} is no UTF-8 (at line {line}, column {column})") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not TOML: {error}") from error


def load_toml(cls: type[T], path: str | os.PathLike[str]) -> T:
    """The dataclass `cls` from a TOML file, the inverse of `to_toml`, as strict as `from_dict`; errors open with the path of the file."""
    return from_dict(cls, read_toml(path), where=f"{path}: config")


def overlay(config: T, table: Mapping[str, Any], where: str = "config") -> T:
    """`config` with the entries of `table`, nested as its fields are, in place of its own; names and types as strict as in `from_dict`.

    Where another `kind` is named, the rest of that table is over the defaults of that kind. What the dataclasses themselves check is
    not checked: other entries may follow. Raises ValueError and TypeError.
    """
    return _overlaid(config, table, where, set(_dotted_names(type(config))), where)


def _overlaid(config: T, table: Mapping[str, Any], where: str, known: set[str], root: str) -> T:
    hints = {f.name: hint for f in _fields(type(config)) for hint in [get_type_hints(type(config))[f.name]]}
    config = copy.copy(config)
    for key, value in table.items():
        path = _join(where, key)
        if key not in hints:
            raise ValueError(f"{path} = {value!r}: unknown option{_near_path(path.removeprefix(_join(root, '')), known, hints)}")
        base = _base_of(hints[key], getattr(config, key), value, path)
        new = _value(hints[key], value, path) if base is None else _overlaid(base, value, path, known, root)
        object.__setattr__(config, key, new)
    return config


def _base_of(hint: Any, current: Any, value: Any, where: str) -> Any:
    """What the table `value` is laid over: the value that a field has, or the defaults of the kind that it names. None: it is no table."""
    if not isinstance(value, Mapping):
        return None
    kinds = {kind: h for h in get_args(hint) for kind in _kinds(h)}
    if len(set(kinds.values())) > 1 and "kind" in value:
        chosen = kinds[_literal(tuple(kinds), value["kind"], _join(where, "kind"))]
        return current if isinstance(current, chosen) else chosen()
    return current if _is_config(current) else None


def _dotted_names(cls: type, prefix: str = "") -> Iterator[str]:
    """Names of all entries that a configuration of `cls` may have, nested ones with dots."""
    hints = get_type_hints(cls)
    for field in _fields(cls):
        nested = [h for h in (hints[field.name], *get_args(hints[field.name])) if _is_config_class(h)]
        yield prefix + field.name
        for inner in nested:
            yield from _dotted_names(inner, f"{prefix}{field.name}.")


def _near_path(path: str, known: Iterable[str], siblings: Iterable[str]) -> str:
    """`; did you mean ...?`: a name like it in the same table, or the same or a similar one in another."""
    if path in known:
        return " of this kind; name the kind that has it"
    table, _, name = path.rpartition(".")
    here = difflib.get_close_matches(name, [*siblings], n=1)
    if here:
        return f"; did you mean {_join(table, here[0])!r}?"
    last = {k: k.rpartition(".")[2] for k in sorted(known)}
    close = difflib.get_close_matches(name, last.values(), n=1)
    found = [k for k in last if close and last[k] == close[0]]
    return f"; did you mean {found[0]!r}?" if found else f"; known: {', '.join(siblings)}"


def differences(old: Any, new: Any) -> list[Difference]:
    """Every entry in which two configurations, given as dataclasses or as nested dicts, differ, in the order of `old`, kinds first."""
    return list(_differences(_table(old), _table(new), ""))


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], where: str) -> Iterator[Difference]:
    for key in sorted(dict.fromkeys([*old, *new]), key=lambda key: key != "kind"):  # of which the others are a consequence
        a, b, path = old.get(key, ABSENT), new.get(key, ABSENT), _join(where, key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from _differences(a, b, path)
        elif a != b or isinstance(a, bool) != isinstance(b, bool):
            yield Difference(path, a, b)


def _table(config: Any) -> Mapping[str, Any]:
    return config if isinstance(config, Mapping) else to_dict(config)


def _plain(value: Any, where: str) -> Any:
    if _is_config(value):
        return to_dict(value, where)
    if isinstance(value, (tuple, list)):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} = {value!r}: must be a finite number")
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{where} = {value!r}: a {type(value).__name__} cannot be written as configuration")


class _NoneWord(str):
    """The word "none" of a TOML file, which has no null: None where a field may be None, else itself."""


def _with_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_none(item) for key, item in value.items()}
    return _NoneWord(value) if value == "none" else value


def _write_table(lines: list[str], config: Any, path: str, comments: bool) -> None:
    said = _docstrings(type(config)) if comments else {}
    values = {f.name: getattr(config, f.name) for f in _fields(type(config))}
    for name, value in values.items():
        if not _is_config(value):
            text = f"{name} = {_toml_value(_plain(value, _join(path, name)))}"
            lines.append(f"{text}  # {said[name]}" if name in said else text)
    for name, value in values.items():
        if _is_config(value):
            lines += ["", f"[{_join(path, name)}]"]
            _write_table(lines, value, _join(path, name), comments)


def _toml_value(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, str):
        # As JSON writes it, but for one character that TOML wants escaped, too.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _docstrings(cls: type) -> dict[str, str]:
    """The string below each field in the source of a dataclass, on one line."""
    [body] = ast.parse(inspect.getsource(cls)).body
    said = {}
    for field, text in itertools.pairwise(getattr(body, "body", [])):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            said[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return said


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotation `hint` wants it, or an error."""
    if isinstance(value, _NoneWord):
        if type(None) in get_args(hint):
            return None
        value = str(value)
    if get_origin(hint) in (Union, types.UnionType):
        return _one_of(get_args(hint), value, where)
    if get_origin(hint) is Literal:
        return _literal(get_args(hint), value, where)
    if get_origin(hint) in (tuple, list):
        return _sequence(hint, value, where)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)
    if hint is Path:
        return Path(_value(str, value, where))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} = {value!r}: must be a finite number")
    if hint in (bool, int, float, str, type(None)):
        if type(value) is hint:
            return value
        raise _wrong_type(where, value, _describe(hint))
    raise TypeError(f"{where}: configurations cannot hold fields of type {hint!r}")


def _one_of(hints: tuple[Any, ...], value: Any, where: str) -> Any:
    """The first alternative that fits; one of the very type of `value` goes first, so that 1 stays an int in `float | int`."""
    if type(value) in hints:
        return _value(type(value), value, where)
    kinds = {kind: hint for hint in hints for kind in _kinds(hint)}
    if len(set(kinds.values())) > 1 and isinstance(value, Mapping):
        if "kind" not in value:
            raise ValueError(f"{_join(where, 'kind')}: missing; must be {' or '.join(map(repr, kinds))}")
        return from_dict(kinds[_literal(tuple(kinds), value["kind"], _join(where, "kind"))], value, where)
    closest: Exception | None = None
    for hint in hints:
        try:
            return _value(hint, value, where)
        except (TypeError, ValueError) as error:
            # A table for a dataclass, or a name for a Literal, has the better error: it says what is wrong inside.
            if isinstance(error, ValueError) or (isinstance(value, Mapping) and dataclasses.is_dataclass(hint)):
                closest = error
    raise closest or _wrong_type(where, value, " or ".join(_describe(h) for h in hints))


def _kinds(hint: Any) -> tuple[Any, ...]:
    """What tells a dataclass from the others that may stand in its place: the values of its field `kind`, where it has one."""
    if not _is_config_class(hint) or "kind" not in hint.__dataclass_fields__:
        return ()
    return get_args(get_type_hints(hint)["kind"])


def _literal(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    for choice in choices:
        if type(value) is type(choice) and value == choice:
            return choice
    wanted = " or ".join(repr(c) for c in choices)
    if not any(type(value) is type(choice) for choice in choices):
        raise _wrong_type(where, value, wanted)
    raise ValueError(f"{where} = {value!r}: must be {wanted}{_near_miss(value, choices)}")


def _sequence(hint: Any, value: Any, where: str) -> Any:
    kind, items = get_origin(hint), get_args(hint)
    if not isinstance(value, (list, tuple)):
        raise _wrong_type(where, value, _describe(hint))
    if kind is list or (len(items) == 2 and items[1] is Ellipsis):
        items = (items[0],) * len(value)
    if len(items) != len(value):
        raise ValueError(f"{where} = {value!r}: must be {_describe(hint)}")
    return kind(_value(item, v, f"{where}[{i}]") for i, (item, v) in enumerate(zip(items, value, strict=True)))


def _describe(hint: Any) -> str:
    """What an annotation asks for, in words."""
    words = {bool: "true or false", int: "an integer", float: "a number", str: "a string", type(None): "none", Path: "a path"}
    if hint in words:
        return words[hint]
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(h) for h in inner)
    if origin is Literal:
        return " or ".join(repr(c) for c in inner)
    if origin is list or (origin is tuple and len(inner) == 2 and inner[1] is Ellipsis):
        return f"a list, each item {_describe(inner[0])}"
    if origin is tuple:
        return f"a list of {len(inner)}: {', '.join(_describe(h) for h in inner)}"
    return f"a table of the options of {getattr(hint, '__name__', hint)}"


def _wrong_type(where: str, value: Any, wanted: str) -> TypeError:
    return TypeError(f"{where} = {value!r}: must be {wanted}, not {type(value).__name__}")


def _near_miss(name: Any, known: Iterable[Any]) -> str:
    """`; did you mean ...?` for a name close to a known one, else the known names if they are few."""
    names = [str(k) for k in known]
    close = difflib.get_close_matches(str(name), names, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names)}" if len(names) <= 30 else ""


def _fields(cls: Any) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(cls) if f.init]


def _is_config_class(value: Any) -> bool:
    return isinstance(value, type) and dataclasses.is_dataclass(value)


def _is_config(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _join(where: str, name: Any) -> str:
    return f"{where}.{name}" if where and not where.endswith(": ") else f"{where}{name}"


def _without_repeats(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{where}: the key {repeated!r} stands twice; it must stand once")
    return table
