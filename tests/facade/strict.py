"""What a covering array leaves out and what it excuses: rules of what the peer takes in no call, and the table of deviations.

A row is worth the more the less of it is excused: `cost` is that of `covering_array`.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from facade import deviations
from facade.compare import Comparison, leaves
from facade.covering import covering_array
from facade.deviations import DEVIATIONS, Deviation, facts
from facade.peer import peer

Row = dict[str, Any]
Rule = tuple[Row, Callable[[Row], Any]]
"""A case of it alone, as changes to the defaults, and the rule: rows that the peer takes in no call."""
Setting = tuple[Row, Tensor, Row]
"""The arguments of the constructor, the input, and the arguments of the call."""

LATER = {"decode.*", "encode", "state_back"}
"""What is no part of a step."""

# Any class


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


def run_there(cls: str, setting: Setting, seed: int = 0, *, dtype: torch.dtype | None = None, prepare: Any = None, **_: Any) -> None:
    """A step of training and a call in eval mode of the peer; raises whatever it raises."""
    kwargs, x, calls = (copy.deepcopy(part) for part in setting)
    torch.manual_seed(seed)
    random.seed(seed)
    made, x = getattr(peer, cls)(**kwargs), x.to(dtype or x.dtype)
    if prepare is not None:
        prepare(made)
    found = [leaf for _, leaf in leaves(made(x.clone().requires_grad_(), **calls), "") if leaf.requires_grad]
    if found:
        torch.stack([leaf.sum() for leaf in found]).sum().backward()
    with torch.no_grad():
        made.eval()(x, **calls)


def check_refused(cls: str, rules: Sequence[Rule], rule: Callable[[Row], Any], row: Row, setting: Setting, **options: Any) -> None:
    """That this rule refuses the row, no other one does, and the peer raises, if not in the first call: what it drops is drawn."""
    assert [is_refused for _, is_refused in rules if is_refused(row)] == [rule]
    with pytest.raises(Exception):  # noqa: B017 - of whatever kind
        [run_there(cls, setting, seed, **options) for seed in range(6)]


def check_deviates(own: Deviation, found: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    """That what differs stands in the table, and that it takes this row of it."""
    found.check()
    far = [part for part, worst in found.worst.items() if not worst <= 1e-5]
    assert any(own.covers(part) for part in far), "it is the peer's: no case for the table"
    monkeypatch.setattr(deviations, "DEVIATIONS", tuple(row for row in DEVIATIONS if row is not own))
    with pytest.raises(AssertionError):
        found.check()


# Classes without a codebook that learns

SHAPES: dict[str, tuple[int, ...]] = {
    "sequence": (2, 5),
    "image": (2, 3, 4),
    "image last": (2, 3, 4),
    "video": (2, 2, 3, 2),
    "vectors": (6,),
    "square": (2, 3),
    "one": (1,),
    "alone": (),
    "empty": (2, 0),
    "no batch": (0, 5),
}
"""The positions of inputs, those of the batch first; a square has as many as some are wide, and a vector alone has none."""


def draw(*shape: int, seed: int = 0, scale: float = 1.2) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def placed(row: Row, width: int, *, first: bool, side: int = 3, seed: int = 0, scale: float = 1.2) -> Tensor:
    """An input of that width. Where noise is drawn, which the peer does in the order of memory, that of vectors stays."""
    positions = (2, side) if row["input"] == "square" else SHAPES[row["input"]]
    x = draw(*positions, width, seed=seed, scale=scale)
    x = x.movedim(-1, 1) if first else x
    return x if row.get("noise_dropout") else x.contiguous()


def of_row(row: Row) -> dict[str, bool]:
    """What a comparison will know of its input."""
    positions = SHAPES[row["input"]] if "input" in row else (2, 5)
    return {
        "sequences": len(positions) > 1,
        "images": len(positions) > 2,
        "images whose width is last": row.get("input") == "image last",
        "no vectors": 0 in positions or row.get("mask") == "none",
        "one vector": positions in ((), (1,)),
        "a mask of positions": row.get("mask") == "positions",
        "float64": row.get("dtype") == torch.float64,
    }


def in_double(row: Row) -> AbstractContextManager[Row]:
    """In the dtype of the row."""
    wide = {"dtype": torch.float64, "prepare": nn.Module.double}
    return nullcontext(wide if row["dtype"] == torch.float64 else {})


def may_drop(row: Row) -> bool:
    """Whether a residual quantizer drops layers in some training call."""
    number, multiple = row["num_quantizers"], row["quantize_dropout_multiple_of"]
    if not row["quantize_dropout"] or number == 1:
        return False
    seed, least = row.get("rand_quantize_dropout_fixed_seed"), row["quantize_dropout_cutoff_index"]
    last = range(least, number) if seed is None else [random.Random(seed).randrange(least, number)] if least < number else []
    return any(multiple * -(-(layer + 1) // multiple) < number for layer in last)


@dataclass(frozen=True)
class Array:
    """The covering array of a class: its options, the default first, what the peer takes in no call, and how a row is called.

    `setting` is of a row and a seed. `deviating` has for each row of the table of deviations that excuses anything of this class what
    shows that it has to, as changes to the defaults. `known` is what the table is asked about: values by the names of arguments.
    `around` makes draws and rounding alike in both, and gives options of the comparison, among them the dtype of the input.
    """

    cls: str
    options: Mapping[str, Sequence[Any]]
    setting: Callable[..., Setting]
    refused: Sequence[Rule] = ()
    deviating: Mapping[str, Row] = field(default_factory=dict)
    known: Callable[[Row], Row] = dict
    around: Callable[[Row], AbstractContextManager[Row]] = lambda row: nullcontext({})

    def usual(self, **changes: Any) -> Row:
        return {name: values[0] for name, values in self.options.items()} | changes

    def stands(self, row: Row) -> bool:
        return stands(self.refused, row)

    def arguments(self, row: Row) -> Row:
        return {**of_row(row), **self.known(row)}

    def cost(self, row: Row) -> int:
        return cost(self.cls, self.arguments(row))

    @cached_property
    def rows(self) -> list[Row]:
        return covering_array(self.options, self.stands, cost=self.cost, wide=False)

    def check_refused(self, changes: Row, rule: Callable[[Row], Any]) -> None:
        row = self.usual(**changes)
        with self.around(row) as options:
            check_refused(self.cls, self.refused, rule, row, self.setting(row), **options)

    def compared(self, compare: Callable[..., Comparison], row: Row, **options: Any) -> Comparison:
        """The row compared by `compare`; optimized where that excuses nothing."""
        kwargs, x, calls = self.setting(row)
        with self.around(row) as given:
            options = {"optimize": self.cost(row) == 0, **given, **options}
            return compare(self.cls, kwargs, x.to(options.pop("dtype", x.dtype)), calls=calls, **options)

    def check_table(self) -> None:
        """That the table has a case for each of its rows that excuses anything of this class."""
        assert {row.option for row in DEVIATIONS if row.parts and row.of(self.cls)} == self.deviating.keys()

    def check_deviates(self, compare: Callable[..., Comparison], option: str, monkeypatch: Any, **options: Any) -> None:
        """That the case of this row of the table needs it."""
        (own,) = (row for row in DEVIATIONS if row.of(self.cls) and row.parts and row.option == option)
        row = self.usual(**self.deviating[option])
        assert self.stands(row)
        check_deviates(own, self.compared(compare, row, optimize="an optimizer" in option, **options), monkeypatch)


def rules(*arrays: Array) -> list[Any]:
    """Parameters "array, changes, is_refused": all that they refuse."""
    return [pytest.param(a, *rule, id=f"{a.cls}-{','.join(rule[0])}") for a in arrays for rule in a.refused]


def cases(*arrays: Array) -> list[Any]:
    """Parameters "array, option": all that deviates."""
    return [pytest.param(array, option, id=f"{array.cls}-{option}") for array in arrays for option in array.deviating]
