"""The book of the golden arrays is closed: every array was read or has a reason to wait, and as many were compared as should be."""

from __future__ import annotations

import pytest

import golden_arrays


@pytest.mark.closing
def test_every_golden_array_was_read_or_is_deferred() -> None:
    unread = golden_arrays.unread()
    shown = "\n".join(unread[:40])
    assert not unread, f"{len(unread)} arrays were read by no test and stand on no list of deferred keys:\n{shown}"


@pytest.mark.closing
def test_as_many_golden_arrays_were_compared_as_the_book_says() -> None:
    assert dict(golden_arrays.compared) == golden_arrays.EXPECTED_COMPARED


@pytest.mark.closing
def test_every_deferral_still_covers_an_array_that_waits() -> None:
    idle = golden_arrays.idle_deferrals()
    assert not idle, f"deferrals that cover no unread array: {idle}"


def test_an_array_that_nobody_reads_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    case_id = golden_arrays.case_ids("unit", "rel_shift*")[0]
    name, key = f"unit/{case_id}", golden_arrays.load("unit", case_id).keys()[0]
    monkeypatch.setattr(golden_arrays, "_read", golden_arrays.defaultdict(set))
    monkeypatch.setattr(golden_arrays, "DEFERRED", [])
    assert f"{name} {key}" in golden_arrays.unread()
    monkeypatch.setattr(golden_arrays, "DEFERRED", [(name, key, "a reason")])
    assert f"{name} {key}" not in golden_arrays.unread()
    assert golden_arrays.idle_deferrals() == []
    golden_arrays.load("unit", case_id)[key]
    assert golden_arrays.idle_deferrals() == [(name, key, "a reason")]
