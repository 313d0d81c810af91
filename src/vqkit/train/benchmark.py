"""Speed of whole models, everybody in turn: tokens/s, share of a bare matrix product measured beside, most memory that tensors take.

What is timed is a `Workload`: a call that works on so many tokens. Those of training and of one pass forward are here, that of decoding
is `vqkit.generate.benchmark`. Rounds over all of them are interleaved, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile

from vqkit.data import Batch
from vqkit.models.config import ModelConfig
from vqkit.models.cost import flops_per_token
from vqkit.models.presets import full_attention_twin
from vqkit.models.transformer import TransformerVQ
from vqkit.train.config import TrainConfig
from vqkit.train.optimizer import Optimizer
from vqkit.train.step import train_step

HeadType = Literal["recipe", "shga", "mqa", "mha"]
Clock = Callable[[], float]
PRODUCT_SIZE = 2048
"""Rows and columns of the bare matrix product."""


@dataclass(frozen=True)
class Case:
    """One model at one length."""

    config: ModelConfig
    heads: HeadType
    length: int


@dataclass(frozen=True)
class Workload:
    """What is timed."""

    call: Callable[[], object]
    tokens: int
    """Tokens that one call works on."""
    flops: int
    """Model operations per token."""


@dataclass(frozen=True)
class Row:
    """What was measured of a case: medians over the rounds, with the least and the most."""

    attention: str
    heads: str
    length: int
    tokens_per_second: float
    tokens_per_second_range: tuple[float, float]
    utilisation: float
    """Model operations per second over those of the bare product, measured before each call."""
    utilisation_range: tuple[float, float]
    product_gflops: float
    flops_per_token: int
    peak_bytes: int
    """Most that tensors of the case took at once: parameters, optimizer, activations, states."""
    repeats: int


@dataclass(frozen=True)
class TooLarge:
    """A case that the memory has no room for beside those before it."""

    attention: str
    heads: str
    length: int
    does_not_fit: str
    """What the allocator said."""


def with_head_type(config: ModelConfig, heads: HeadType) -> ModelConfig:
    """The same widths with other heads, as in the official branch `optimized`; "recipe": as it is.

    "shga": gated layers with one head; "mqa", "mha": attention with dim // key_dim query heads and one or as many key heads, and a
    feed-forward. Raises ValueError where key_dim does not divide dim.
    """
    if heads == "recipe":
        return config
    if heads == "shga":
        return replace(config, layer="gated", heads=1, key_heads=None, value_dim=2 * config.dim, feed_forward_dim=None)
    if config.dim % config.key_dim:
        raise ValueError(f'heads "{heads}": model.dim = {config.dim} must be a multiple of model.key_dim = {config.key_dim}')
    key_heads, width = (1, 5 * config.dim) if heads == "mqa" else (None, 4 * config.dim)
    number = config.dim // config.key_dim
    return replace(config, layer="feed_forward", heads=number, key_heads=key_heads, value_dim=config.key_dim, feed_forward_dim=width)


def cases(config: ModelConfig, lengths: Sequence[int], attentions: Sequence[str], head_types: Sequence[HeadType]) -> list[Case]:
    """Every combination. Ordinary attention goes without terms of the distance, on the fast path of scaled_dot_product_attention.

    Codebooks start at random, since nothing is learned here. Raises ValueError for an empty list and for a length below 1.
    """
    for name, given in (("lengths", lengths), ("attention", attentions), ("heads", head_types)):
        if not given:
            raise ValueError(f"{name}: must name at least one")
    if min(lengths) < 1:
        raise ValueError(f"lengths: {min(lengths)} is no length; must be at least 1")
    found = []
    for length in dict.fromkeys(lengths):
        for heads in dict.fromkeys(head_types):
            own = with_head_type(replace(config, codebook=replace(config.codebook, init="normal")), heads)
            for attention in dict.fromkeys(attentions):
                if attention == "vq" and own.attention == "full":
                    raise ValueError('attention "vq": the model has ordinary attention and no codebook; take --attention full')
                chosen = full_attention_twin(own, relative_positions=False) if attention == "full" else own
                found.append(Case(chosen, heads, length))
    return found


def training(case: Case, train: TrainConfig, device: torch.device) -> Workload:
    """A step of training on random tokens, optimizer and codebooks included; the batch of `train`, a sequence from its beginning."""
    torch.manual_seed(0)
    model = TransformerVQ(case.config).to(device).train()
    optimizer = Optimizer(model.named_parameters(), train)
    tokens = torch.randint(case.config.vocab_size, (train.batch_size, case.length), device=device)
    batch = Batch(tokens, tokens, torch.zeros_like(tokens), torch.ones_like(tokens, dtype=torch.bool))

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bfloat16"):
            train_step(model, optimizer, batch, model.initial_state(len(tokens)), 0, segments=False)

    return Workload(step, tokens.numel(), flops_per_token(case.config, case.length).training)


def forward(case: Case, train: TrainConfig, device: torch.device) -> Workload:
    """One pass forward over random tokens, without gradients."""
    torch.manual_seed(0)
    model = TransformerVQ(case.config).to(device).eval()
    tokens = torch.randint(case.config.vocab_size, (train.batch_size, case.length), device=device)

    @torch.inference_mode()
    def run() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bfloat16"):
            model(tokens, statistics=False)

    return Workload(run, tokens.numel(), flops_per_token(case.config, case.length).forward)


def matrix_product(device: torch.device, dtype: torch.dtype = torch.float32, size: int | None = None) -> Workload:
    """The bare product of two square matrices; its operations are those of one call. size: None = PRODUCT_SIZE."""
    size = PRODUCT_SIZE if size is None else size
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return Workload(lambda: torch.mm(a, b, out=out), 1, 2 * size**3)


def measure(
    cases: Sequence[Case],
    build: Callable[[Case], Workload],
    product: Workload,
    *,
    repeats: int = 3,
    clock: Clock = time.perf_counter,
    device: torch.device | None = None,
) -> list[Row | TooLarge]:
    """A row a case, in order: `repeats` rounds over all of them after one to warm up, the product before every call.

    A case that does not fit into memory is told as such, and the others are measured. Raises ValueError for repeats below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats = {repeats}: must be at least 1")
    device = device or torch.device("cpu")
    built: dict[Case, tuple[Workload, int]] = {}
    seen: dict[Case, list[tuple[float, float]]] = {case: [] for case in cases}
    refused: dict[Case, str] = {}

    def attempt(case: Case, call: Callable[[], None]) -> None:
        reason = _reason_without_room(call)
        if reason is not None:
            refused[case] = reason
            built.pop(case, None)  # makes room for the others
            if device.type == "cuda":
                torch.cuda.empty_cache()

    def warm_up(case: Case) -> None:
        built[case] = _built(case, build, device)

    def time_it(case: Case) -> None:
        rate = product.flops / _seconds(product.call, clock, device)
        seen[case].append((_seconds(built[case][0].call, clock, device), rate))

    with within_memory(device):
        for case in cases:
            attempt(case, partial(warm_up, case))
        product.call()
        for _ in range(repeats):
            for case in list(built):
                attempt(case, partial(time_it, case))
    return [
        TooLarge(case.config.attention, case.heads, case.length, refused[case])
        if case in refused
        else _row(case, built[case][0], seen[case], built[case][1], repeats)
        for case in cases
    ]


def _reason_without_room(call: Callable[[], None]) -> str | None:
    """What the allocator said, where `call` found too little memory; None where it did not."""
    try:
        call()
    except MemoryError as error:
        return str(error) or "out of memory"
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _WITHOUT_ROOM):
            return re.sub(r"^\[enforce fail[^]]*\][^.]*\. ", "", " ".join(str(error).split()))
        raise
    return None


_WITHOUT_ROOM = ("can't allocate memory", "bad_alloc", "out of memory", "not enough memory")
"""What torch says in errors that have no type of their own."""


@contextmanager
def within_memory(device: torch.device, most: int | None = None) -> Iterator[None]:
    """On a CPU, no more new memory than `most` bytes, or nine tenths of what is free: asking for more is an error.

    Without it the system grants whatever is asked for, and kills the process that uses it.
    """
    most = most or (9 * free_memory() // 10)
    if device.type != "cpu" or not most:
        yield
        return
    import resource

    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = min([held + most, *(bound for bound in before if bound != resource.RLIM_INFINITY)])
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def free_memory() -> int:
    """Bytes that a process may still take, by the system and by the group that it runs in; 0 where nobody tells."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return 0
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no group, or one without a limit
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(free, 0)


def _row(case: Case, workload: Workload, seen: list[tuple[float, float]], peak: int, repeats: int) -> Row:
    speeds = [workload.tokens / seconds for seconds, _ in seen]
    shares = [workload.flops * workload.tokens / seconds / rate for seconds, rate in seen]
    return Row(
        attention=case.config.attention,
        heads=case.heads,
        length=case.length,
        tokens_per_second=statistics.median(speeds),
        tokens_per_second_range=(min(speeds), max(speeds)),
        utilisation=statistics.median(shares),
        utilisation_range=(min(shares), max(shares)),
        product_gflops=statistics.median(rate for _, rate in seen) / 1e9,
        flops_per_token=workload.flops,
        peak_bytes=peak,
        repeats=repeats,
    )


def _seconds(call: Callable[[], object], clock: Clock, device: torch.device) -> float:
    _wait(device)
    began = clock()
    call()
    _wait(device)
    return clock() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _built(case: Case, build: Callable[[Case], Workload], device: torch.device) -> tuple[Workload, int]:
    """The workload after one call, and the most bytes of tensors that it held during it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        workload = build(case)
        torch.cuda.reset_peak_memory_stats(device)
        workload.call()
        _wait(device)
        return workload, torch.cuda.max_memory_allocated(device) - before
    with _allocations() as building:
        workload = build(case)
    with _allocations() as calling:
        workload.call()
    return workload, _sums(building)[0] + _sums(calling)[1]


def _allocations() -> Any:
    # The allocator itself tells: the size of the process would count what others left behind, and what the C library keeps.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler says on standard error that it begins and ends
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def _sums(profiled: Any) -> tuple[int, int]:
    """Bytes that were left allocated, and the most at any instant."""
    now = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return now, most


def save_figure(rows: Sequence[Row], path: Path) -> None:
    """Tokens per second, memory and share of the bare product over the length, a line a model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.0, 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels: list[tuple[str, Callable[[Row], float]]] = [
        ("tokens per second", lambda row: row.tokens_per_second),
        ("memory of tensors, MiB", lambda row: row.peak_bytes / 2**20),
        ("share of a bare matrix product, %", lambda row: 100 * row.utilisation),
    ]
    for number, (title, value) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, 3, number)
        for name in dict.fromkeys((row.attention, row.heads) for row in rows):
            own = sorted((row for row in rows if (row.attention, row.heads) == name), key=lambda row: row.length)
            axes.plot([row.length for row in own], [value(row) for row in own], "o-", markersize=3, label=" ".join(name))
        axes.set(xscale="log", xlabel="length", title=title)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path)
