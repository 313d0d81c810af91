"""Laws of many processes: all cases in one spawn a world size, compared here case by case with one process on all vectors."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing as mp

from laws import ranks
from laws.book import law
from laws.drive import assert_same

WORLDS = (2, 4)


@pytest.fixture(scope="session")
def worlds(tmp_path_factory):
    """results[world][rank][case name, variant]: the states after each step, or the traceback of what failed."""
    folder = tmp_path_factory.mktemp("ranks")
    found = {}
    for world in WORLDS:
        mp.spawn(ranks.on_rank, args=(world, str(folder)), nprocs=world)
        found[world] = [torch.load(folder / f"world{world}-rank{rank}.pt", weights_only=True) for rank in range(world)]
    return found


@law
def test_many_processes_are_one(case, worlds):
    for world in WORLDS:
        for variant in ranks.variants(case):
            first, *others = (states[case.name, variant] for states in worlds[world])
            assert not isinstance(first, str), first
            for other in others:
                assert_same(other, first)
            expected = ranks.alone(case, variant, world)
            if case.replaces:
                replaced_alike(case, variant, world, first, expected)
            else:
                assert_same(first, expected, rtol=1e-5, atol=1e-5)


def replaced_alike(case, variant, world, found, expected):
    """After the first step the counts are equal, and so are the codes that nobody replaced; the others are vectors of the whole batch."""
    for name, value in expected[1].items():
        if "count" in name:
            torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-5)
