"""Reducers: alone a sum is complete; in a process group every rank gets the sum, of whatever group is the default one now."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as torch_dist
import torch.multiprocessing as mp

from vqkit import dist

WORLD = 2


def test_alone_a_sum_is_complete() -> None:
    reducer = dist.default_reducer()
    assert isinstance(reducer, dist.LocalReducer)
    assert (reducer.world_size, reducer.rank) == (1, 0)
    flat = torch.randn(7)
    before = flat.clone()
    reducer.all_reduce_(flat)
    assert torch.equal(flat, before)


def test_without_a_group_the_error_says_what_to_do() -> None:
    flat = torch.ones(2)
    reducer = dist.ProcessGroupReducer()
    for ask in (lambda: reducer.all_reduce_(flat), lambda: reducer.rank, lambda: reducer.world_size):
        with pytest.raises(RuntimeError, match="init_process_group"):
            ask()
    assert torch.equal(flat, torch.ones(2))


def test_a_view_gets_storage_of_its_own_and_nothing_else_is_copied() -> None:
    x = torch.randn(2, 3, 4, requires_grad=True) * 2
    assert dist.own_storage(x) is x
    view = x.movedim(-1, 1)
    owned = dist.own_storage(view)
    assert owned._base is None and owned.stride() == view.stride() and torch.equal(owned, view)


def test_a_module_that_nothing_shards_is_left_alone() -> None:
    layer = torch.nn.Linear(2, 2)
    dist.register_forward_methods(layer, ["forward"])
    assert "forward" not in vars(layer) and not dist.is_managed(layer) and not dist.is_sharded(layer.weight)


def test_two_processes(tmp_path: Path) -> None:
    """All laws of two gloo processes in one spawn; a rank that fails ends the other and raises here."""
    mp.spawn(_on_rank, args=(tmp_path,), nprocs=WORLD)


def _on_rank(rank: int, folder: Path) -> None:
    before_any = dist.ProcessGroupReducer()
    in_first: dist.ProcessGroupReducer | None = None
    for name in ("first", "second"):  # the second default group must not be mistaken for the first
        torch_dist.init_process_group("gloo", init_method=f"file://{folder / name}", rank=rank, world_size=WORLD)
        in_first = in_first or dist.ProcessGroupReducer()
        for reducer in (before_any, in_first, dist.default_reducer()):
            _sums_over_all(reducer, rank)
        _sums_over_a_group(rank)
        torch_dist.destroy_process_group()
        assert isinstance(dist.default_reducer(), dist.LocalReducer)


def _sums_over_all(reducer: dist.Reducer, rank: int) -> None:
    assert (reducer.world_size, reducer.rank) == (WORLD, rank)
    for dtype in (torch.float32, torch.float64, torch.int64):
        flat = torch.arange(5, dtype=dtype) * (rank + 1)
        reducer.all_reduce_(flat)
        assert torch.equal(flat, torch.arange(5, dtype=dtype) * 3)
    leaf = torch.ones(3, requires_grad=True)
    reducer.all_reduce_(leaf)
    assert torch.equal(leaf, torch.full((3,), 2.0))
    with pytest.raises(ValueError, match="must be contiguous"):
        reducer.all_reduce_(torch.ones(4, 2).T)


def _sums_over_a_group(rank: int) -> None:
    alone = dist.ProcessGroupReducer(torch_dist.new_group([rank], use_local_synchronization=True))
    assert (alone.world_size, alone.rank) == (1, 0)
    flat = torch.full((2,), rank + 1.0)
    alone.all_reduce_(flat)
    assert torch.equal(flat, torch.full((2,), rank + 1.0))
