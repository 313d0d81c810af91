"""Where the facade is not what the peer is, on purpose: all that a comparison may skip. docs/migration.md has this table.

`option` is a condition on the arguments of the constructor and of the call together: terms joined by " & ", each a name, which has to be
given and to be true (not None, False, 0 or empty), or "name=value" by its repr. Anything else, as "eval()", is a name that no case has:
such a row is for people, and excuses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Deviation:
    """Class `cls` (a pattern) with `option` does something else than the peer; `test` is the node of the test that shows what is right.

    `defect` is a sentence on what is wrong there and what stands here instead. `parts`, patterns of names of parts of a comparison, are
    what may differ.
    """

    cls: str
    option: str
    test: str
    defect: str
    parts: tuple[str, ...] = ()

    def meets(self, cls: str, kwargs: Mapping[str, Any]) -> bool:
        """Whether it is about this class with these arguments."""
        return fnmatchcase(cls, self.cls) and all(_holds(term, kwargs) for term in self.option.split(" & "))


def _holds(term: str, kwargs: Mapping[str, Any]) -> bool:
    name, equals, value = term.partition("=")
    if name not in kwargs:
        return False
    given = kwargs[name]
    if equals:
        return not isinstance(given, Tensor) and repr(given) == value
    return isinstance(given, Tensor) or bool(given)


_VQ = "tests/facade/test_vector_quantize_facade.py::"

DEVIATIONS: tuple[Deviation, ...] = (
    Deviation(
        "VectorQuantize",
        "mask",
        _VQ + "test_an_index_of_minus_one_gives_zeros",
        "the index -1 of a masked position decodes to the last code; here to zeros",
        ("decode.*",),
    ),
)


USED: set[Deviation] = set()
"""Rows that excused a difference so far."""


def excused(cls: str, kwargs: Mapping[str, Any], part: str) -> bool:
    """Whether this part of a comparison of `cls` with these arguments, those of the call among them, may differ."""
    found = [row for row in DEVIATIONS if row.meets(cls, kwargs) and any(fnmatchcase(part, pattern) for pattern in row.parts)]
    USED.update(found)
    return bool(found)
