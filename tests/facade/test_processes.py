"""The facade in two processes of DDP or FSDP2: equal states, those of one process with the vectors of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from facade import process_ranks
from facade.process_ranks import CASES, EQUAL, SHARDED

DRAWN = [name for name in CASES if "k-means" in name or name in ("dead codes", "residual, drawn depth", "groups, dropped")]
UNEQUAL = [name for name, case in CASES.items() if case.learns and case.shares is not EQUAL]
"""Whose gradient is the mean of those of the processes, as DDP has it, not that of all vectors."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process has after each step of each case, or the traceback of what failed."""
    folder = tmp_path_factory.mktemp("facade")
    mp.spawn(process_ranks.on_rank, args=(str(folder),), nprocs=process_ranks.WORLD)
    return [torch.load(Path(folder) / f"rank{rank}.pt", weights_only=True) for rank in range(process_ranks.WORLD)]


def states(ranks: list[dict[str, Any]], name: str) -> list[dict[str, Tensor]]:
    """Those of the first process."""
    first, second = (found[name] for found in ranks)
    for found in (first, second):
        assert not isinstance(found, str), found
    for one, other in zip(first, second, strict=True):
        for key in one.keys() - {"loss"}:
            assert torch.equal(one[key], other[key]), key
    return first


@pytest.mark.parametrize("name", CASES)
def test_processes_have_the_same_state(name: str, ranks: list[dict[str, Any]]) -> None:
    found = states(ranks, name)
    moves = {key for key in found[0] if not torch.equal(found[0][key], found[-1][key])}
    assert any(key.endswith(("embed", "weight", "scale")) for key in moves), "nothing was learned"


@pytest.mark.parametrize("name", [name for name in CASES if name not in (*DRAWN, *UNEQUAL)])
def test_processes_are_one(name: str, ranks: list[dict[str, Any]]) -> None:
    for found, expected in zip(states(ranks, name), process_ranks.alone(CASES[name]), strict=True):
        for key in expected.keys() - {"loss"}:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_processes_are_one(name: str, ranks: list[dict[str, Any]]) -> None:
    for found, expected in zip(states(ranks, f"{name}, sharded"), process_ranks.alone(CASES[name]), strict=True):
        for key in expected.keys() - {"loss"}:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "LFQ" in case.kind and case.shares is EQUAL])
def test_the_loss_is_that_of_all_vectors(name: str, ranks: list[dict[str, Any]]) -> None:
    both = torch.stack([torch.stack([state["loss"] for state in found[name]]) for found in ranks]).mean(0)
    torch.testing.assert_close(both, torch.stack([state["loss"] for state in process_ranks.alone(CASES[name])]))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "k-means" in name and case.kind == "VectorQuantize"])
def test_k_means_is_that_of_all_vectors(name: str, ranks: list[dict[str, Any]]) -> None:
    """Each code stands at the mean of the vectors that are nearest to it, where its first step leaves it."""
    codes = states(ranks, name)[0]["quantizer._codebook.embed"][0]
    x = 1.5 * process_ranks.vectors(CASES[name], 0)[0]
    nearest = torch.cdist(x, codes).argmin(-1)
    assert len(nearest.unique()) == len(codes)
    torch.testing.assert_close(codes, torch.stack([x[nearest == code].mean(0) for code in range(len(codes))]), rtol=1e-3, atol=1e-4)


def test_new_codes_are_vectors_of_any_process(ranks: list[dict[str, Any]]) -> None:
    case = CASES["dead codes"]
    codes = states(ranks, "dead codes")[-1]["quantizer._codebook.embed"][0]
    every = torch.cat([1.5 * process_ranks.vectors(case, step)[0] for step in range(len(case.shares))])
    start = process_ranks.Net(case.make(seed=0)).quantizer._codebook.embed[0]
    new = torch.cdist(codes, every).amin(-1) < 1e-4
    assert new.any() and not torch.equal(codes, start)
