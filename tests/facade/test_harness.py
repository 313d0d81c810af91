"""The comparison with the peer, compared: it covers what it says it covers, and sees a planted difference."""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from facade import deviations, migration
from facade.compare import compare_kinds
from facade.covering import covering_array
from facade.deviations import DEVIATIONS, USED, Deviation, excused
from facade.peer import peer

ROOT = Path(__file__).resolve().parents[2]


def implies(row: dict[str, Any]) -> bool:
    return (not row["a"] or row["b"] == 1) and (row["c"] != "z" or row["d"] is None) and not (row["e"] and row["a"])


OPTIONS = {"a": (False, True), "b": (0, 1, 2), "c": ("x", "y", "z"), "d": (None, [1]), "e": (False, True), "f": (0, 1, 2, 3)}


@pytest.mark.parametrize("valid", [lambda row: True, implies])
def test_every_pair_that_can_be_is_in_a_row(valid: Callable[[dict[str, Any]], bool]) -> None:
    rows = covering_array(OPTIONS, valid)
    assert all(valid(row) for row in rows)
    assert rows[0] == {name: values[0] for name, values in OPTIONS.items()}
    every = [dict(zip(OPTIONS, values, strict=True)) for values in product(*OPTIONS.values())]

    def pairs(found: list[dict[str, Any]]) -> set[str]:
        return {repr(((a, row[a]), (b, row[b]))) for row in found for a, b in combinations(OPTIONS, 2)}

    possible = [row for row in every if valid(row)]
    assert pairs(rows) == pairs(possible)
    assert len(rows) < len(possible) / 4


def test_the_same_rows_every_time() -> None:
    assert covering_array(OPTIONS, implies, seed=3) == covering_array(OPTIONS, implies, seed=3)


def test_defaults_that_contradict_each_other_are_an_error() -> None:
    with pytest.raises(ValueError, match="not valid together"):
        covering_array(OPTIONS, lambda row: row["a"])


class Shifted(peer.VectorQuantize):
    """The peer with one fault, named by `fault`."""

    fault = ""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.fault == "raises":
            raise ValueError("planted")
        quantized, indices, loss = super().forward(x, *args, **kwargs)
        if self.fault == "output.0":
            quantized = quantized * (1 + 1e-4)
        if self.fault == "output.1" and self.training:
            indices = indices.index_fill(1, torch.tensor([0]), 0)
        if self.fault == "output.2" and self.training:
            loss = loss + 1e-4
        if self.fault == "eval.0" and not self.training:
            quantized = quantized * 1.001
        if self.fault == "input_gradient":
            quantized = quantized + 1e-3 * (x - x.detach())
        if self.fault == "parameter_gradient":
            quantized = quantized + sum((1e-2 * (p - p.detach())).sum() for p in self.parameters())
        if self.fault == "state" and self.training:
            self._codebook.cluster_size.mul_(1.001)
        return quantized, indices, loss

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        return super().get_codes_from_indices(indices) + (0.1 if self.fault == "decode.get_codes_from_indices" else 0.0)


class Renamed(peer.VectorQuantize):
    """One name in the state dict is another."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("extra", torch.zeros(1))


class Reordered(peer.VectorQuantize):
    """Its parameters come in another order, so that the state of an optimizer is of other parameters."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._modules["project_in"] = self._modules.pop("project_in")


CASE = {"dim": 8, "codebook_size": 16, "codebook_dim": 4}


def run(kind: type[nn.Module]) -> Any:
    return compare_kinds("VectorQuantize", (peer.VectorQuantize, kind), CASE, torch.randn(2, 12, 8))


def test_a_class_is_what_it_is() -> None:
    found = run(peer.VectorQuantize)
    assert found.check() == 0.0
    assert {"state_layout", "parameters", "output.0", "input_gradient", "eval.2"} <= found.worst.keys()
    assert {"parameter_gradient.project_in.bias", "state._codebook.embed"} <= found.worst.keys()
    assert {"decode.get_codes_from_indices", "decode.get_output_from_indices"} <= found.worst.keys()


FAULTS = ["raises", "output.0", "output.1", "output.2", "eval.0", "input_gradient", "parameter_gradient", "state"]


@pytest.mark.parametrize("fault", [*FAULTS, "decode.get_codes_from_indices"])
def test_a_planted_difference_is_found(fault: str) -> None:
    found = run(type("Shifted", (Shifted,), {"fault": fault}))
    assert any(worst > 1e-5 for part, worst in found.worst.items() if part == fault or part.startswith(f"{fault}."))
    with pytest.raises(AssertionError, match=fault.replace(".", r"\.")):
        found.check()


def test_another_layout_of_the_state_is_found() -> None:
    with pytest.raises(AssertionError, match=r"(?s)state_layout.*extra"):
        run(Renamed).check()


def test_another_order_of_the_parameters_is_found() -> None:
    with pytest.raises(AssertionError, match="parameters"):
        run(Reordered).check()


def test_a_row_of_the_table_excuses_its_part_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Deviation("Vector*", "codebook_dim=4 & dim", "a::b", "", parts=("output.*",))
    monkeypatch.setattr(deviations, "DEVIATIONS", (row,))
    monkeypatch.setattr(deviations, "USED", set())
    run(type("Shifted", (Shifted,), {"fault": "output.2"})).check()
    assert {row} == deviations.USED
    assert not excused("VectorQuantize", {"dim": 8, "codebook_dim": 5}, "output.0")
    assert not excused("VectorQuantize", {"dim": 0, "codebook_dim": 4}, "output.0")
    assert not excused("ResidualVQ", CASE, "output.0")
    with pytest.raises(AssertionError, match="state"):
        run(type("Shifted", (Shifted,), {"fault": "state"})).check()


@cache
def defined_tests(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)}


def test_every_deviation_has_its_test() -> None:
    for row in DEVIATIONS:
        path, _, name = row.test.partition("::")
        assert (ROOT / path).is_file(), row.test
        assert name.partition("[")[0] in defined_tests(ROOT / path), row.test
        assert row.defect and row.option, row


def test_the_guide_has_the_table() -> None:
    assert migration.written() == migration.table(), "run in tests/: python -m facade.migration"


@pytest.mark.closing
def test_every_deviation_that_may_excuse_did() -> None:
    """A row that no comparison needed has outlived its reason."""
    assert {row for row in DEVIATIONS if row.parts} <= USED
