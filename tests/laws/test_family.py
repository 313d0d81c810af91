"""The family is complete: every argument, choice and field stands in a case; every law has a test; the page shows what is tested."""

from __future__ import annotations

import inspect
import re
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

import vqkit.quantizers
from laws import book, matrix
from laws.exceptions import EXCEPTIONS, NOT_VARIED
from laws.family import CASES
from vqkit.quantizers import config

KINDS = {case.kind for case in CASES}
FOLDER = Path(__file__).parent


def values(kind, name):
    return [case.arguments[name] for case in CASES if issubclass(case.kind, kind) and name in case.arguments]


def choices(annotation):
    """The words and dataclasses that a type admits."""
    if typing.get_origin(annotation) is typing.Literal:
        return set(typing.get_args(annotation))
    if inspect.isclass(annotation) and is_dataclass(annotation):
        return {annotation}
    return {choice for part in typing.get_args(annotation) for choice in choices(part)}


def used(kind, name, default):
    """What the cases and the default make of an argument: words, and the classes of dataclasses."""
    found = set()
    for value in [*values(kind, name), default]:
        for item in value if isinstance(value, (tuple, list)) else (value,):
            found.add(type(item) if is_dataclass(item) else item if isinstance(item, (str, bool, int, float)) else None)
    return found


def parameters(kind):
    return [p for p in inspect.signature(kind).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]


@pytest.mark.parametrize("kind", sorted(KINDS, key=lambda k: k.__name__), ids=lambda k: k.__name__)
def test_every_argument_and_choice_stands_in_a_case(kind):
    hints = typing.get_type_hints(kind.__init__)
    missing = []
    for parameter in parameters(kind):
        if (kind.__name__, parameter.name) in NOT_VARIED:
            continue
        if not values(kind, parameter.name):
            missing.append(parameter.name)
        default = () if parameter.default is inspect.Parameter.empty else parameter.default
        wanted = choices(hints[parameter.name]) - used(kind, parameter.name, default)
        missing += [f"{parameter.name}={choice}" for choice in wanted if (kind.__name__, parameter.name, _word(choice)) not in NOT_VARIED]
    assert not missing


def _word(choice):
    return choice.__name__ if inspect.isclass(choice) else choice


def test_every_field_of_every_choice_stands_in_a_case():
    classes = {value for value in vars(config).values() if inspect.isclass(value) and is_dataclass(value)}
    found = {(type(v).__name__, f.name) for v in _dataclasses() for f in fields(v) if getattr(v, f.name) != f.default}
    missing = {(c.__name__, f.name) for c in classes for f in fields(c)} - found - set(NOT_VARIED)
    assert not missing


def _dataclasses():
    for case in CASES:
        for value in case.arguments.values():
            yield from (item for item in (value if isinstance(value, (tuple, list)) else (value,)) if is_dataclass(item))


def test_every_quantizer_stands_in_the_family():
    public = {getattr(vqkit.quantizers, name) for name in vqkit.quantizers.__all__}
    from vqkit.quantizers.base import Quantizer

    quantizers = {c for c in public if inspect.isclass(c) and issubclass(c, Quantizer)}
    assert {k.__name__ for k in quantizers} - {k.__name__ for k in KINDS} - {key[0] for key in NOT_VARIED if len(key) == 1} == set()


def test_the_names_of_cases_are_unique():
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))


def test_every_law_has_one_test_and_every_exception_a_case():
    tests = re.findall(r"^@law\ndef test_(\w+)\(", "".join(p.read_text() for p in sorted(FOLDER.glob("test_*.py"))), re.MULTILINE)
    assert sorted(tests) == sorted(book.LAWS)
    for exempt in EXCEPTIONS:
        assert any(exempt.covers(case) for case in book.LAWS[exempt.law].cases), exempt
        assert exempt.reason
    covered = {id(book.exemption(case, law.name)) for law in book.LAWS.values() for case in law.cases}
    assert [e for e in EXCEPTIONS if id(e) not in covered] == []


def test_every_line_of_what_is_not_varied_is_needed():
    assert all(reason for reason in NOT_VARIED.values())


def test_the_page_shows_what_is_tested():
    assert matrix.PAGE.read_text(encoding="utf-8") == matrix.page(), "run: python tests/laws/matrix.py"
