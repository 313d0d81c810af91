"""The arithmetic of a benchmark, with a clock that a test winds, and the workloads on tiny models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tiny_models import tiny_config
from vqkit.models.cost import num_parameters
from vqkit.train import benchmark
from vqkit.train.benchmark import Case, Workload, cases, forward, measure, training, with_head_type
from vqkit.train.config import TrainConfig

CPU = torch.device("cpu")
CONFIG = tiny_config(dim=8, key_dim=4)


class Clock:
    """Time goes on when a workload says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.called: list[str] = []

    def __call__(self) -> float:
        return self.now

    def taking(self, name: str, *seconds: float, tokens: int = 1, flops: int = 1) -> Workload:
        """A call that takes so long the first time, the second, ..."""
        left = iter(seconds)

        def call() -> None:
            self.called.append(name)
            self.now += next(left)

        return Workload(call, tokens, flops)


def test_rows_are_medians_of_interleaved_rounds() -> None:
    clock = Clock()
    workloads = {
        16: clock.taking("a", 100.0, 2.0, 1.0, 4.0, tokens=16, flops=50),
        32: clock.taking("b", 100.0, 8.0, 8.0, 8.0, tokens=32, flops=50),
    }
    product = clock.taking("product", 9.0, *[2.0] * 6, flops=2000)
    found = measure([Case(CONFIG, "recipe", n) for n in (16, 32)], lambda case: workloads[case.length], product, clock=clock)
    assert clock.called == ["a", "b", "product", *["product", "a", "product", "b"] * 3]
    first, second = found
    assert (first.tokens_per_second, first.tokens_per_second_range) == (8.0, (4.0, 16.0))
    assert (first.utilisation, first.utilisation_range) == (0.4, (0.2, 0.8))  # 50 operations a token, of 1,000 a second
    assert (second.tokens_per_second, second.utilisation, second.length) == (4.0, 0.2, 32)
    assert first.product_gflops == 1e-6
    with pytest.raises(ValueError, match="repeats = 0: must be at least 1"):
        measure([], workloads.__getitem__, product, repeats=0)


def test_memory_is_the_most_that_was_held_at_once() -> None:
    clock = Clock()

    def build(case: Case) -> Workload:
        torch.empty(5000)  # left behind by nobody
        kept = torch.empty(100)

        def call() -> None:
            for _ in range(2):
                torch.empty(1000)
            kept.zero_()

        return Workload(call, 1, 1)

    [row] = measure([Case(CONFIG, "recipe", 1)], build, clock.taking("product", 1.0, 1.0), repeats=1, clock=iter(range(9)).__next__)
    assert row.peak_bytes == 4 * 1100


@pytest.mark.parametrize("attention", ["vq", "full"])
@pytest.mark.parametrize("heads", ["recipe", "shga", "mqa", "mha"])
def test_workloads_run_on_every_form(attention: str, heads: benchmark.HeadType) -> None:
    [case] = cases(CONFIG, [6], [attention], [heads])
    train = TrainConfig(batch_size=2)
    trained, read = training(case, train, CPU), forward(case, train, CPU)
    assert (trained.tokens, read.tokens) == (12, 12)
    assert trained.flops > 2 * read.flops
    # Parameters, gradients and two moments.
    product = benchmark.matrix_product(CPU, size=4)
    [row] = measure([case], lambda case: training(case, train, CPU), product, repeats=1)
    assert row.peak_bytes > 16 * num_parameters(case.config)
    read.call()


def test_head_types_are_those_of_the_official_branch() -> None:
    shga, mqa, mha = (with_head_type(CONFIG, name) for name in ("shga", "mqa", "mha"))
    assert (shga.layer, shga.heads, shga.num_key_heads, shga.value_dim) == ("gated", 1, 1, 16)
    assert (mqa.layer, mqa.heads, mqa.num_key_heads, mqa.value_dim, mqa.feed_forward_width) == ("feed_forward", 2, 1, 4, 40)
    assert (mha.layer, mha.heads, mha.num_key_heads, mha.value_dim, mha.feed_forward_width) == ("feed_forward", 2, 2, 4, 32)
    assert with_head_type(mqa, "shga").feed_forward_dim is None
    with pytest.raises(ValueError, match=r"model.dim = 8 must be a multiple of model.key_dim = 6"):
        with_head_type(replace(CONFIG, key_dim=6), "mha")


def test_cases_are_all_combinations_once() -> None:
    found = cases(CONFIG, [4, 8, 4], ["vq", "full"], ["recipe", "mha"])
    assert [(case.length, case.heads, case.config.attention) for case in found] == [
        (length, heads, attention) for length in (4, 8) for heads in ("recipe", "mha") for attention in ("vq", "full")
    ]
    assert not found[1].config.relative_positions
    for given, message in (
        ([[], ["vq"]], "lengths: must name"),
        ([[0], ["vq"]], "lengths: 0 is no length"),
        ([[1], []], "attention: must"),
    ):
        with pytest.raises(ValueError, match=message):
            cases(CONFIG, *given, ["recipe"])
    with pytest.raises(ValueError, match="has ordinary attention"):
        cases(tiny_config(attention="full"), [4], ["vq"], ["recipe"])


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
        ),
    ],
)
def test_a_case_without_room_is_told_and_the_others_are_measured(error: Exception) -> None:
    clock = Clock()

    def fail() -> None:
        raise error

    def fail_later() -> None:
        if clock.called.count("d"):
            raise error
        clock.called.append("d")

    small, large, later = (Case(CONFIG, "recipe", length) for length in (4, 8, 16))
    works = {4: clock.taking("a", 1.0, 2.0, 2.0, tokens=4), 8: Workload(fail, 8, 1), 16: Workload(fail_later, 16, 1)}
    product = clock.taking("p", *[1.0] * 9)
    found = measure([small, large, later], lambda case: works[case.length], product, repeats=2, clock=clock)
    assert [type(row) for row in found] == [benchmark.Row, benchmark.TooLarge, benchmark.TooLarge]
    assert not any("enforce" in row.does_not_fit for row in found if isinstance(row, benchmark.TooLarge))
    assert isinstance(found[0], benchmark.Row) and found[0].tokens_per_second == 2.0
    assert all(
        "allocate" in row.does_not_fit or row.does_not_fit == "out of memory" for row in found if isinstance(row, benchmark.TooLarge)
    )


def test_other_errors_are_no_lack_of_room() -> None:
    def fail() -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        measure([Case(CONFIG, "recipe", 4)], lambda case: Workload(fail, 1, 1), Workload(lambda: None, 1, 1), repeats=1)


@pytest.mark.skipif(not benchmark.free_memory(), reason="the system does not tell what is free")
def test_asking_for_more_than_there_is_is_an_error_and_not_the_end() -> None:
    # Far more than earlier tests may have left to the C library, which gives it out again whatever the limit is.
    case = Case(CONFIG, "recipe", 4)
    with benchmark.within_memory(CPU, most=1 << 28):
        [row] = measure([case], lambda case: Workload(lambda: torch.empty(3 << 30), 1, 1), Workload(lambda: None, 1, 1), repeats=1)
    assert isinstance(row, benchmark.TooLarge) and "allocate" in row.does_not_fit
    assert torch.empty(1 << 28).numel() == 1 << 28, "the limit is gone"
