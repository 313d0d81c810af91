"""What a covering array leaves out and what it excuses: rules of what the peer takes in no call, and the table of deviations.

A row is worth the more the less of it is excused: `cost` is that of `covering_array`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from facade.deviations import DEVIATIONS, Deviation, facts

Row = dict[str, Any]
Rule = tuple[Row, Callable[[Row], bool]]
"""A case of it alone, as changes to the defaults, and the rule: rows that the peer takes in no call."""

LATER = {"decode.*", "state_back"}
"""What is no part of a step."""


@cache
def excusing(cls: str) -> list[Deviation]:
    """The rows of the table that may excuse a difference of this class in a step."""
    return [row for row in DEVIATIONS if row.of(cls) and not {*row.parts} <= LATER]


def excuses(cls: str, arguments: Mapping[str, Any], optimize: bool) -> int:
    """How many deviations of the table these arguments of a class have."""
    known = {**arguments, **facts(arguments), "an optimizer": optimize}
    return sum(deviation.holds(known) for deviation in excusing(cls))


def cost(cls: str, arguments: Mapping[str, Any]) -> int:
    """0: nothing is excused; 1: nothing, if no optimizer steps; above that how much is."""
    return 0 if excuses(cls, arguments, True) == 0 else 1 + excuses(cls, arguments, False)


def stands(rules: Sequence[Rule], row: Row) -> bool:
    """Whether no rule refuses it."""
    return not any(is_refused(row) for _, is_refused in rules)


def steps(cls: str, arguments: Mapping[str, Any], optimize: bool) -> int:
    """How many can be compared: one, where a deviation leaves another codebook and excuses no output."""
    known = {**arguments, **facts(arguments), "an optimizer": optimize}
    found = [row for row in excusing(cls) if row.holds(known)]
    return 1 if any(row.covers("state.embed") and not row.covers("output.0") for row in found) else 2
