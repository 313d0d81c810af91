"""Configurations survive every passage unchanged, and whatever does not fit is refused by name."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqkit import config, files


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    kind: Literal["normal", "kmeans"] = "normal"


@dataclass(frozen=True)
class Outer:
    name: str
    size: int = 3
    on: bool = False
    limit: float | None = None
    number: float | int = 1
    span: tuple[int, int] = (1, 2)
    names: tuple[str, ...] = ()
    rates: list[float] = field(default_factory=list)
    folder: Path | None = None
    choice: Literal["auto"] | int = "auto"
    inner: Inner = field(default_factory=Inner)
    second: Inner | None = None


def finite() -> st.SearchStrategy[float]:
    return st.floats(allow_nan=False, allow_infinity=False)


def inners() -> st.SearchStrategy[Inner]:
    return st.builds(Inner, rate=finite(), kind=st.sampled_from(["normal", "kmeans"]))


def outers() -> st.SearchStrategy[Outer]:
    return st.builds(
        Outer,
        name=st.text(),
        size=st.integers(),
        on=st.booleans(),
        limit=st.none() | finite(),
        number=st.integers() | finite(),
        span=st.tuples(st.integers(), st.integers()),
        names=st.lists(st.text()).map(tuple),
        rates=st.lists(finite()),
        folder=st.none() | st.text("abc/", min_size=1).map(Path),
        choice=st.just("auto") | st.integers(),
        inner=inners(),
        second=st.none() | inners(),
    )


@given(outers())
def test_every_configuration_survives_dict_and_json(outer: Outer) -> None:
    for back in (config.from_dict(Outer, config.to_dict(outer)), config.from_json(Outer, config.to_json(outer))):
        assert back == outer
        assert _types(back) == _types(outer)


def _types(value: Any) -> Any:
    """The types of all leaves: 1 == 1.0 == True must not pass for each other."""
    if isinstance(value, dict):
        return {k: _types(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_types(v) for v in value]
    return type(value) if not hasattr(value, "__dataclass_fields__") else _types(asdict(value))


@given(outers())
def test_json_is_plain(outer: Outer) -> None:
    text = config.to_json(outer)
    assert text.endswith("}\n")
    assert json.loads(text) == config.to_dict(outer)


def test_toml(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('name = "a"\nlimit = 2\nspan = [3, 4]\n[inner]\nkind = "kmeans"\n')
    assert config.load_toml(Outer, path) == Outer("a", limit=2.0, span=(3, 4), inner=Inner(kind="kmeans"))
    path.write_text("name = a\n")
    with pytest.raises(ValueError, match=r"run\.toml: not TOML"):
        config.load_toml(Outer, path)


def test_an_int_is_taken_for_a_float_and_becomes_one() -> None:
    inner = config.from_dict(Inner, {"rate": 1})
    assert type(inner.rate) is float
    assert type(config.from_dict(Outer, {"name": "", "number": 1}).number) is int
    assert type(config.from_dict(Outer, {"name": "", "number": 1.0}).number) is float


REFUSED: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    ({"naem": "a"}, ValueError, ["config.naem", "'a'", "did you mean 'name'"]),
    ({"name": "a", "zzzzz": 1}, ValueError, ["config.zzzzz = 1", "known: name, size"]),
    ({}, ValueError, ["config.name", "missing", "a string"]),
    ({"name": 3}, TypeError, ["config.name = 3", "a string", "not int"]),
    ({"name": "a", "size": "3"}, TypeError, ["config.size = '3'", "an integer"]),
    ({"name": "a", "size": 3.0}, TypeError, ["config.size = 3.0", "an integer"]),
    ({"name": "a", "size": True}, TypeError, ["config.size = True", "an integer"]),
    ({"name": "a", "size": None}, TypeError, ["config.size = None", "an integer"]),
    ({"name": "a", "on": 1}, TypeError, ["config.on = 1", "true or false"]),
    ({"name": "a", "limit": True}, TypeError, ["config.limit = True", "a number or none"]),
    ({"name": "a", "limit": float("nan")}, ValueError, ["config.limit = nan", "finite"]),
    ({"name": "a", "number": True}, TypeError, ["config.number = True", "a number or an integer"]),
    ({"name": "a", "span": [1]}, ValueError, ["config.span = [1]", "a list of 2"]),
    ({"name": "a", "span": [1, "2"]}, TypeError, ["config.span[1] = '2'", "an integer"]),
    ({"name": "a", "names": "abc"}, TypeError, ["config.names = 'abc'", "a list, each item a string"]),
    ({"name": "a", "rates": [1.0, True]}, TypeError, ["config.rates[1] = True", "a number"]),
    ({"name": "a", "folder": 3}, TypeError, ["config.folder = 3", "a path or none"]),
    ({"name": "a", "choice": "auot"}, ValueError, ["config.choice = 'auot'", "'auto'"]),
    ({"name": "a", "choice": 1.5}, TypeError, ["config.choice = 1.5", "'auto' or an integer"]),
    ({"name": "a", "inner": 3}, TypeError, ["config.inner = 3", "Inner"]),
    ({"name": "a", "inner": {"kind": "kmean"}}, ValueError, ["config.inner.kind = 'kmean'", "did you mean 'kmeans'"]),
    ({"name": "a", "inner": {"kind": 1}}, TypeError, ["config.inner.kind = 1", "'normal' or 'kmeans'"]),
    ({"name": "a", "inner": {"raet": 1.0}}, ValueError, ["config.inner.raet = 1.0", "did you mean 'rate'"]),
    ({"name": "a", "second": {"rate": "x"}}, TypeError, ["config.second.rate = 'x'", "a number"]),
]


@pytest.mark.parametrize(("data", "error", "words"), REFUSED, ids=[str(r[0]) for r in REFUSED])
def test_what_does_not_fit_is_refused_by_path_value_and_remedy(data: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as raised:
        config.from_dict(Outer, data)
    for word in words:
        assert word in str(raised.value)


def test_refusals_of_broken_json_and_of_other_things() -> None:
    with pytest.raises(ValueError, match=r"run\.json: not JSON"):
        config.from_json(Outer, "{", where="run.json")
    with pytest.raises(ValueError, match="'rate' stands twice"):
        config.from_json(Inner, '{"rate": 1, "rate": 2}')
    with pytest.raises(TypeError, match="a table of the options of Inner, not list"):
        config.from_json(Inner, "[]")
    with pytest.raises(TypeError, match="must be a dataclass"):
        config.from_dict(int, {})
    with pytest.raises(ValueError, match=r"config.rate = inf: must be a finite number"):
        config.to_dict(Inner(rate=float("inf")))
    with pytest.raises(TypeError, match=r"config.rate = <object"):
        config.to_dict(Inner(rate=object()))  # pyrefly: ignore


@given(outers(), outers())
def test_differences_are_the_entries_that_differ(old: Outer, new: Outer) -> None:
    found = {d.path: d for d in config.differences(old, new)}
    assert not config.differences(old, old)
    for name in ("name", "size", "on", "limit"):
        assert (name in found) == (getattr(old, name) != getattr(new, name))
    for name in ("rate", "kind"):
        assert (f"inner.{name}" in found) == (getattr(old.inner, name) != getattr(new.inner, name))


def test_differences_name_path_old_and_new() -> None:
    old, new = Outer("a", second=Inner(rate=1.0)), Outer("a", size=4, second=Inner(rate=2.0))
    assert config.differences(old, new) == [("size", 3, 4), ("second.rate", 1.0, 2.0)]
    assert config.differences({"a": 1}, {"b": {"c": 1}}) == [("a", 1, config.ABSENT), ("b", config.ABSENT, {"c": 1})]
    assert [d.path for d in config.differences({"size": 1, "kind": "a"}, {"kind": "b", "size": 2})] == ["kind", "size"]
    assert config.differences({"a": 1}, {"a": True}) == [("a", 1, True)]
    assert str(config.Difference("model.dim", 3, 4)) == "model.dim: 3 -> 4"


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_text_atomic(path, "one\r\n")
    files.write_text_atomic(str(path), "two\u00e9\n")
    assert path.read_bytes() == "two\u00e9\n".encode()
    assert os.listdir(tmp_path) == ["a.json"]
    expected = tmp_path / "plain"
    expected.touch()
    assert path.stat().st_mode == expected.stat().st_mode


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "a.bin"
    files.write_bytes_atomic(path, b"old")

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, call, full)
    with pytest.raises(OSError, match="No space left"):
        files.write_bytes_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_the_bytes_are_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def recorded(name: str, original: Any) -> Any:
        def call(*arguments: Any) -> Any:
            calls.append(name)
            return original(*arguments)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(files.os, name, recorded(name, getattr(os, name)))
    files.write_bytes_atomic(tmp_path / "a", b"new")
    assert calls == ["fsync", "replace", "fsync"]


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.write_text_atomic(tmp_path / "no" / "a", "x")


@dataclass(frozen=True)
class Round:
    """Told apart from `Square` by its kind."""

    radius: float = 1.0
    """How far it is
    from the centre."""
    kind: Literal["round"] = "round"


@dataclass(frozen=True)
class Square:
    side: int = 2
    kind: Literal["square"] = "square"

    def __post_init__(self) -> None:
        if self.side < 1:
            raise ValueError(f"side = {self.side}")


@dataclass(frozen=True)
class Shapes:
    shape: Round | Square = field(default_factory=Round)
    inner: Inner = field(default_factory=Inner)
    depth: int | None = 3


@given(outers())
def test_toml_gives_back_what_was_written(outer: Outer) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.toml"
        for comments in (False, True):
            path.write_text(config.to_toml(outer, comments=comments), encoding="utf-8")
            assert config.load_toml(Outer, path) == outer
            assert config.overlay(Outer("other", size=9, second=Inner(0.25)), config.read_toml(path)) == outer


def test_toml_of_a_configuration_can_be_read_by_people() -> None:
    text = config.to_toml(Shapes(depth=None), comments=True)
    shape = '[shape]\nradius = 1.0  # How far it is from the centre.\nkind = "round"\n'
    assert text == f'depth = "none"\n\n{shape}\n[inner]\nrate = 0.5\nkind = "normal"\n'


def test_entries_over_those_of_another_configuration() -> None:
    base = Shapes(shape=Round(7.0), depth=5)
    assert config.overlay(base, {"inner": {"rate": 1}}) == Shapes(Round(7.0), Inner(1.0), 5)
    assert config.overlay(base, {"shape": {"kind": "round"}}) == base
    assert config.overlay(base, {"shape": {"kind": "square"}}) == Shapes(Square(), depth=5)
    assert config.overlay(base, {"shape": {"side": 3, "kind": "square"}}).shape == Square(3)
    assert config.overlay(base, {"shape": {"kind": "square", "side": 0}}).shape != Square()  # checked where all is known
    assert base == Shapes(shape=Round(7.0), depth=5)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"inner": {"rat": 1}}, r"f: inner\.rat = 1: unknown option; did you mean 'inner\.rate'\?"),
        ({"rate": 1}, r"f: rate = 1: unknown option; did you mean 'inner\.rate'\?"),
        ({"side": 1}, r"f: side = 1: unknown option; did you mean 'shape\.side'\?"),
        ({"shape": {"side": 1}}, r"f: shape\.side = 1: unknown option of this kind"),
        ({"xyz": 1}, r"f: xyz = 1: unknown option; known: shape, inner, depth"),
        ({"shape": {"kind": "ruond"}}, r"f: shape\.kind = 'ruond': must be 'round' or 'square'; did you mean 'round'\?"),
        ({"inner": 3}, r"f: inner = 3: must be a table"),
        ({"inner": {"rate": True}}, r"f: inner\.rate = True: must be a number"),
        ({"depth": 1.5}, r"f: depth = 1\.5: must be an integer or none"),
    ],
)
def test_entries_that_fit_nowhere_are_named(table: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        config.overlay(Shapes(), table, where="f: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a = 1\nb =\n", r"x\.toml: not TOML: .* \(at line 2, column 4\)"),
        (b"a = 1\nb = '\xff'\n", r"x\.toml: not TOML: 0xff is no UTF-8 \(at line 2, column 6\)"),
        (b"a = 1\na = 2\n", r"x\.toml: not TOML: .* \(at line 2, column 6\)"),
    ],
)
def test_what_is_not_toml_is_shown_by_line_and_column(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.toml").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        config.read_toml(tmp_path / "x.toml")
