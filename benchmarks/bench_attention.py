"""VQ attention against ordinary attention: the operation alone, the training of whole models, and decoding.

    python benchmarks/bench_attention.py [--sections operation training decoding] [--lengths 512 2048 ...] [--repeats 3]

Whatever is measured anew replaces its rows of benchmarks/results/attention.json, others stay; attention.md and attention.png show all.
Everybody who solves a problem does so in turn, again and again, in one process; a figure is the median, in brackets the least and the most.
"SDPA" is torch's scaled_dot_product_attention, on its fast path. Shares are of the rate of a 2,048-cubed float32 product, measured beside.
On a machine with CUDA everything runs there, in bfloat16 alone, with the flash kernels of SDPA.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from machine import RESULTS, describe, sgemm_rate
from torch import Tensor, nn
from torch.nn import functional as F

from vqkit.data import Batch
from vqkit.files import write_text_atomic
from vqkit.generate.decoder import Decoder
from vqkit.models import ModelConfig, TransformerVQ
from vqkit.models.cost import flops_per_token, num_parameters
from vqkit.models.presets import full_attention_twin
from vqkit.models.transformer import ModelState
from vqkit.ops.full_attention import KeyValueState
from vqkit.ops.vq_attention import vq_attention
from vqkit.train.allocator import reuse_freed_memory
from vqkit.train.config import TrainConfig
from vqkit.train.optimizer import Optimizer
from vqkit.train.step import train_step

SECTIONS = ("operation", "training", "decoding")
LENGTHS = (512, 2_048, 8_192, 32_768, 131_072)
POSITIONS = (1_000, 10_000, 100_000)
HEADS, WIDTH = 4, 64
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.bfloat16,) if DEVICE.type == "cuda" else (torch.float32, torch.bfloat16)
WARM_UP = 5
"""Tokens that are decoded before the measured ones."""
ONCE = 20.0
"""Seconds from which on a call is timed once, without a round to warm up."""

GATED = ModelConfig(vocab_size=256, dim=256, layers=4, key_dim=64, value_dim=512, codebook_size=128, block_len=128, mem_len=128)
MULTI_HEAD = replace(GATED, layer="feed_forward", heads=HEADS, key_dim=WIDTH, value_dim=WIDTH)
MODELS = {"gated": GATED, "multi-head": MULTI_HEAD, "twin": full_attention_twin(MULTI_HEAD, relative_positions=False)}
TITLES = {
    "gated": "gated layer of the paper (one head, d_v 512)",
    "multi-head": "multi-head (4 of 64) and feed-forward",
    "twin": "its twin with SDPA",
}
Row = dict[str, Any]
Key = tuple[str, str, str, str]
Call = Callable[[], object]


def timed(call: Call) -> float:
    """Seconds of one call, everything that it started on the device included."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def rounds(calls: dict[Key, Call], repeats: int) -> dict[Key, list[float]]:
    """Times of each call, in turn; a first round warms up, unless a call is long."""
    times = {name: [timed(call)] for name, call in calls.items()}
    short = [name for name, (first,) in times.items() if first < ONCE]
    for name in short:
        times[name] = []
    for _ in range(repeats):
        for name in short:
            times[name].append(timed(calls[name]))
    return times


def summary(times: list[float], per: int) -> Row:
    """Microseconds per token."""
    return {name: 1e6 * f(times) / per for name, f in (("us", statistics.median), ("least", min), ("most", max))} | {"times": len(times)}


# The operation alone


def operands(length: int, codes: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, quantized keys and v [1, H, T, 64] that want gradients, indices and codebook."""
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(HEADS, codes, WIDTH, generator=generator)
    indices = torch.randint(0, codes, (1, HEADS, length), generator=generator)
    keys = torch.stack([codebook[h][indices[0, h]] for h in range(HEADS)])[None]
    q, v = (torch.randn(1, HEADS, length, WIDTH, generator=generator) for _ in range(2))
    floats = (t.to(DEVICE, dtype).requires_grad_() for t in (q * WIDTH**-0.5, keys, v))
    return *floats, indices.to(DEVICE), codebook.to(DEVICE)


def with_gradients(output: Tensor, operands: tuple[Tensor, ...]) -> None:
    """The backward pass."""
    torch.autograd.grad(output, operands[:3], torch.ones_like(output))


def attentions(length: int, dtype: torch.dtype) -> Iterator[tuple[str, bool, Call]]:
    """Who, whether with the backward pass, and the call."""
    for codes in (128, 512):
        given = operands(length, codes, dtype)

        def vq(given: tuple[Tensor, ...] = given, codes: int = codes) -> Tensor:
            return vq_attention(*given, block_len=codes, mem_len=codes, impl="blocked").output

        yield f"VQ {codes}", False, torch.no_grad()(vq)
        yield f"VQ {codes}", True, lambda vq=vq, given=given: with_gradients(vq(), given)

    def sdpa(given: tuple[Tensor, ...] = given) -> Tensor:
        q, k, v = given[:3]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)

    yield "SDPA", False, torch.no_grad()(sdpa)
    yield "SDPA", True, lambda: with_gradients(sdpa(), given)


def operation(length: int, repeats: int, known: dict[tuple, Row], longest: float) -> Iterator[Row]:
    """Rows of all who solve the operation at this length."""
    for dtype in DTYPES:
        calls: dict[Key, Call] = {}
        for who, backward, call in attentions(length, dtype):
            key = ("operation", str(dtype)[6:], who, "forward + backward" if backward else "forward")
            shorter = known.get((*key, length // 4))
            # Four times the length takes SDPA sixteen times as long.
            if who != "SDPA" or shorter is None or 16 * shorter["us"] * 1e-6 * length / 4 < longest:
                calls[key] = call
        for key, times in rounds(calls, repeats).items():
            yield row(key, length, summary(times, length))


def row(key: Key, length: int, measured: Row) -> Row:
    """What is kept of a measurement."""
    section, dtype, who, what = key
    return {"section": section, "dtype": dtype, "who": who, "what": what, "length": length} | measured


# Training of whole models


class Mixed(nn.Module):
    """A model under autocast."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arguments: Any, **options: Any) -> Any:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return self.model(*arguments, **options)


class Trainer:
    """One model in training on random tokens, batch 1; the longest sequences with recomputation."""

    def __init__(self, config: ModelConfig, length: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.config = replace(config, recompute=length > 32_768)
        self.length = length
        self.model = TransformerVQ(self.config).to(DEVICE).train()
        self.called = Mixed(self.model) if dtype == torch.bfloat16 else self.model
        self.optimizer = Optimizer(self.model.named_parameters(), TrainConfig(batch_size=1, update_len=length))
        tokens = torch.randint(0, config.vocab_size, (1, length + 1), device=DEVICE)
        one_document, all_count = torch.zeros_like(tokens[:, 1:]), torch.ones_like(tokens[:, 1:], dtype=torch.bool)
        self.batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), one_document, all_count)
        self.steps = 0

    def step(self) -> None:
        train_step(self.model, self.optimizer, self.batch, self.model.initial_state(1), self.steps, segments=False, called=self.called)
        self.steps += 1

    @property
    def flops(self) -> float | None:
        """Operations per token that are executed, those of recomputation included; not counted for ordinary attention."""
        if self.config.attention == "full":
            return None
        flops = flops_per_token(self.config)
        return flops.training + (flops.forward - flops.logits if self.config.recompute else 0)


def training(length: int, repeats: int, known: dict[tuple, Row], whose: list[str], longest: float) -> Iterator[Row]:
    """Rows of all models at this length; before every step the bare product."""
    trainers: dict[Key, Trainer] = {}
    for name in whose:
        for dtype in DTYPES:
            key = ("training", str(dtype)[6:], name, "step")
            shorter = known.get((*key, length // 4))
            if name != "twin" or shorter is None or 16 * shorter["us"] * 1e-6 * length / 4 < longest:
                trainers[key] = Trainer(MODELS[name], length, dtype)
    rates: dict[Key, list[float]] = {key: [] for key in trainers}

    def step(key: Key) -> Call:
        def run() -> None:
            for _ in range(calls):
                trainers[key].step()

        return run

    calls = max(1, 4096 // length)
    times: dict[Key, list[float]] = {key: [] for key in trainers}
    for n in range(repeats + 1):
        for key in trainers:
            if times[key] and times[key][0] * calls > ONCE:
                continue
            rate = sgemm_rate(repeats=3) if DEVICE.type == "cpu" else float("nan")
            seconds = timed(step(key)) / calls
            if n == 1:  # the round before warmed up
                times[key].clear()
                rates[key].clear()
            times[key].append(seconds)
            rates[key].append(rate)
            gc.collect()
    for key, trainer in trainers.items():
        measured = summary(times[key], length) | {
            "sgemm_gflops": statistics.median(rates[key]) / 1e9,
            "recompute": trainer.config.recompute,
        }
        if trainer.flops is not None:
            shares = [trainer.flops * length / t / rate for t, rate in zip(times[key], rates[key], strict=True)]
            measured |= {"share": statistics.median(shares), "least_share": min(shares), "most_share": max(shares)}
        yield row(key, length, measured)


# Decoding


def state_bytes(state: ModelState) -> int:
    """Memory that the state keeps alive."""
    tensors = [state.position, state.segment, *(t for unit in state.attention for t in unit)]
    return sum(t.untyped_storage().nbytes() for t in tensors)


def state_after(model: TransformerVQ, tokens: int) -> ModelState:
    """The state after so many random tokens; ordinary attention, which reads in quadratic time, is given random keys and values."""
    state = model.initial_state(1)
    if model.config.attention == "full":
        present = torch.ones(1, tokens, dtype=torch.bool, device=DEVICE)
        cached = [
            KeyValueState(
                torch.randn(1, HEADS, tokens, WIDTH, device=DEVICE),
                torch.randn(1, HEADS, tokens, WIDTH, device=DEVICE),
                present,
                torch.zeros(1, tokens, dtype=torch.int64, device=DEVICE),
            )
            for _ in state.attention
        ]
        return state._replace(position=state.position + tokens, segment=state.segment + 1, attention=tuple(cached))
    for start in range(0, tokens, 4096):
        read = torch.randint(0, model.config.vocab_size, (1, min(4096, tokens - start)), device=DEVICE)
        state = model(read, state, statistics=False).state
    return state


@torch.inference_mode()
def decoding(position: int, tokens: int, whose: list[str]) -> Iterator[Row]:
    """Time of one token after so many tokens, each model in turn; float32."""
    decoders: dict[str, Decoder] = {}
    times: dict[str, list[float]] = {name: [] for name in whose}
    for name in whose:
        torch.manual_seed(0)
        model = TransformerVQ(MODELS[name]).to(DEVICE).eval()
        decoders[name] = Decoder(model, state_after(model, position))
    token = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    for n in range(tokens + WARM_UP):
        for name, decoder in decoders.items():
            seconds = timed(lambda decoder=decoder: decoder.read(token))
            if n >= WARM_UP:
                times[name].append(seconds)
    for name, decoder in decoders.items():
        yield row(("decoding", "float32", name, "token"), position, summary(times[name], 1) | {"state_bytes": state_bytes(decoder.state())})


# The table and the plot


def cell(found: Row | None) -> str:
    """Microseconds per token."""
    if found is None:
        return "-"
    return f"{found['us']:.3g}" + (f" ({found['least']:.3g} - {found['most']:.3g})" if found["times"] > 1 else " (once)")


def operation_table(rows: dict[tuple, Row], dtype: str, what: str) -> list[str]:
    """Lines of a table; none where nothing was measured."""
    lines = [
        f"### {what}, {dtype}",
        "",
        "| T | VQ 128 | VQ 512 | SDPA | SDPA / VQ 128 | SDPA / VQ 512 |",
        "|---|---|---|---|---|---|",
    ]
    for length in LENGTHS:
        found = [rows.get(("operation", dtype, who, what, length)) for who in ("VQ 128", "VQ 512", "SDPA")]
        if any(found):
            sdpa = found[2]
            ratios = [f"{sdpa['us'] / vq['us']:.2f}" if vq and sdpa else "-" for vq in found[:2]]
            lines.append("| " + " | ".join([f"{length:,}", *map(cell, found), *ratios]) + " |")
    return [*lines, ""] if len(lines) > 4 else []


def training_table(rows: dict[tuple, Row], name: str) -> list[str]:
    """Lines of a table; none where nothing was measured."""
    lines = [f"### {TITLES[name]}", "", "| T | float32 | share of sgemm | bfloat16 autocast | ratio |", "|---|---|---|---|---|"]
    for length in LENGTHS:
        wide, narrow = (rows.get(("training", dtype, name, "step", length)) for dtype in ("float32", "bfloat16"))
        if wide is None and narrow is None:
            continue
        share = f"{wide['share']:.0%} of {wide['sgemm_gflops']:.0f} GFLOP/s" if wide and "share" in wide else "-"
        ratio = f"{wide['us'] / narrow['us']:.2f}" if wide and narrow else "-"
        lines.append("| " + " | ".join([f"{length:,}", speed(wide), share, speed(narrow), ratio]) + " |")
    return [*lines, ""] if len(lines) > 4 else []


def speed(found: Row | None) -> str:
    """Tokens per second."""
    if found is None:
        return "-"
    once = found["times"] == 1
    return f"{1e6 / found['us']:,.0f}" + (" (once)" if once else f" ({1e6 / found['most']:,.0f} - {1e6 / found['least']:,.0f})")


def decoding_table(rows: dict[tuple, Row]) -> list[str]:
    """Lines of the table of all models."""
    lines = ["| model | tokens before | tokens/s | ms per token | bytes of state |", "|---|---|---|---|---|"]
    for name in MODELS:
        for position in POSITIONS:
            found = rows.get(("decoding", "float32", name, "token", position))
            if found:
                spread = f"{found['us'] / 1e3:.2f} ({found['least'] / 1e3:.2f} - {found['most'] / 1e3:.2f})"
                lines.append(f"| {TITLES[name]} | {position:,} | {1e6 / found['us']:,.0f} | {spread} | {found['state_bytes']:,} |")
    return lines


def table(result: Row, rows: dict[tuple, Row]) -> str:
    """The result as Markdown."""
    machine = result["machine"]
    lines = [
        "# VQ attention against ordinary attention",
        "",
        f"{machine['processor']}, {machine['threads']} threads, {machine['capability']}; torch {machine['torch']}; "
        f"revisions {', '.join(result['revisions'])}; {machine['date']}.",
        "",
        "Medians, least and most in brackets. Batch 1. A dash: not measured, for SDPA because it would take too long (--longest).",
        "",
        "## The operation alone",
        "",
        "4 heads of 64; block = window = codes = 128, or 512. Microseconds per token.",
        "",
    ]
    for what in ("forward + backward", "forward"):
        for dtype in ("float32", "bfloat16"):
            lines += operation_table(rows, dtype, what)
    sizes = ", ".join(f"{name} {num_parameters(config) / 1e6:.2f} M" for name, config in MODELS.items() if name != "twin")
    lines += [
        "## Training",
        "",
        f"Width 256, 4 layers, block = window = codes = 128; parameters: {sizes}, and its twin as many. Tokens per second, optimizer and "
        "codebooks included. At 131,072 the layers are computed again in the backward pass, and those operations count in the share.",
        "",
    ]
    for name in MODELS:
        lines += training_table(rows, name)
    lines += [
        "## Decoding",
        "",
        "One token at a time, not compiled, float32; the twin has its keys and values cached.",
        "",
        *decoding_table(rows),
    ]
    return "\n".join(lines) + "\n"


def plot(rows: dict[tuple, Row]) -> None:
    """The result as attention.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")

    def draw(axis: Any, key: tuple[str, ...], xs: tuple[int, ...], label: str, of: Callable[[Row], float]) -> None:
        points = [(x, of(rows[*key, x])) for x in xs if (*key, x) in rows]
        if points:
            axis.plot(*zip(*points, strict=True), "o-", label=label)

    dtype = str(DTYPES[0])[6:]
    for who in ("VQ 128", "VQ 512", "SDPA"):
        draw(axes[0], ("operation", dtype, who, "forward + backward"), LENGTHS, who, lambda r: r["us"])
    axes[0].set(xscale="log", yscale="log", xlabel="sequence length", ylabel="us per token", title=f"forward + backward, {dtype}")
    for name in MODELS:
        draw(axes[1], ("training", dtype, name, "step"), LENGTHS, name, lambda r: 1e6 / r["us"])
        draw(axes[2], ("decoding", "float32", name, "token"), POSITIONS, name, lambda r: r["us"] / 1e3)
    axes[1].set(xscale="log", xlabel="sequence length", ylabel="tokens/s", title=f"training, {dtype}")
    axes[2].set(xscale="log", xlabel="tokens before", ylabel="ms per token", title="decoding")
    for axis in axes:
        axis.set_ylim(bottom=None if axis is axes[0] else 0)
        if axis.lines:
            axis.legend()
    figure.savefig(RESULTS / "attention.png", dpi=120)


def earlier_rows() -> list[Row]:
    """What earlier runs measured."""
    try:
        return json.loads((RESULTS / "attention.json").read_text())["rows"]
    except FileNotFoundError:
        return []


def key_of(found: Row) -> tuple:
    """What tells rows apart."""
    return found["section"], found["dtype"], found["who"], found["what"], found["length"]


def measure(arguments: argparse.Namespace, known: dict[tuple, Row]) -> Iterator[Row]:
    """Everything that was asked for, shorter lengths first."""
    for length in sorted(arguments.lengths):
        if "operation" in arguments.sections:
            yield from operation(length, arguments.repeats, known, arguments.longest)
        if "training" in arguments.sections:
            yield from training(length, arguments.repeats, known, arguments.models, arguments.longest)
    if "decoding" in arguments.sections:
        for position in arguments.positions:
            yield from decoding(position, arguments.tokens, arguments.models)


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--lengths", type=int, nargs="+", choices=LENGTHS, default=LENGTHS)
    parser.add_argument("--positions", type=int, nargs="+", choices=POSITIONS, default=POSITIONS)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--longest", type=float, default=60.0, help="seconds that ordinary attention may take, by its time at a quarter of T"
    )
    parser.add_argument("--tokens", type=int, default=100, help="that are decoded at each position")
    arguments = parser.parse_args()
    reuse_freed_memory()  # as vqkit.train.train does
    machine = describe()
    known = {key_of(found): found for found in earlier_rows()}
    for found in measure(arguments, known):
        known[key_of(found)] = found | {"revision": machine["revision"]}
    revisions = sorted({found["revision"] for found in known.values()})
    result = {"machine": machine, "revisions": revisions, "rows": list(known.values())}
    RESULTS.mkdir(exist_ok=True)
    write_text_atomic(RESULTS / "attention.json", json.dumps(result, indent=1) + "\n")
    text = table(result, known)
    write_text_atomic(RESULTS / "attention.md", text)
    plot(known)
    print(text)


if __name__ == "__main__":
    main()
