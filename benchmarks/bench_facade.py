"""The facade for vector-quantize-pytorch beside the library itself, every row of the tests' covering arrays: `make bench-facade`.

Each case (see facade_cases.py) is timed in a training step, forward and backward, in an encoding call in eval mode, and, where the class
decodes indices, in decoding those of that call, the two in turn in one process; a ratio is the library's time over the facade's, medians of
the repeats. Cases that cannot run are listed with the reason. Writes facade.json, facade.md and facade.png to benchmarks/results/;
`--classes` measures some and keeps the others' rows.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.metadata
import inspect
import itertools
import json
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import vector_quantize_pytorch as peer
from facade_cases import HANDED_ON, SIZES, TESTS, Case, cases
from machine import RESULTS, describe
from torch import Tensor

from vqkit.ops.nearest_code import compiled

facade = importlib.import_module("vqkit.compat.vector_quantize_pytorch")

PARTS = ("train", "encode", "decode")
DECODERS = ("get_output_from_indices", "indices_to_codes", "decode_bits")
KEYS = ("class", "case", "size")


def differentiable(output: Any) -> Iterator[Tensor]:
    """The sums of all of it that has a gradient."""
    if isinstance(output, Tensor):
        if output.requires_grad:
            yield output.float().sum()
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from differentiable(part)


def seed(number: int) -> None:
    """What is drawn, such as how many layers stay, is the same for both."""
    random.seed(number)
    torch.manual_seed(number)


def batches(x: Tensor, number: int = 8) -> list[Tensor]:
    """Vectors of their own for each of so many calls: of the same in each, codes that start anew would all lie on a vector."""
    generator = torch.Generator().manual_seed(0)
    return [x, *(x + 0.3 * torch.randn(x.shape, generator=generator) for _ in range(number - 1))]


def indices_of(module: torch.nn.Module, case: Case) -> Any:
    """Those of a call in eval mode: a tensor, or a tuple of them; None where it gives none."""
    with torch.no_grad():
        waiting = [module(case.x, **{name: value for name, value in case.eval_calls.items() if name != "indices"})]
    while waiting:
        part = waiting.pop(0)
        several = isinstance(part, tuple) and part and all(isinstance(own, Tensor) and not own.is_floating_point() for own in part)
        if several or (isinstance(part, Tensor) and not part.is_floating_point()):
            return part
        if isinstance(part, (tuple, list)):
            waiting = [*part, *waiting]
    return None


def call(module: torch.nn.Module, part: str, case: Case) -> Callable[[], None] | None:
    """A training step, an encoding, or a decoding; None where there is nothing to decode."""

    turns = itertools.cycle(batches(case.x))

    def train() -> None:
        module.zero_grad()
        parts = [*differentiable(module(next(turns).clone().requires_grad_(), **case.calls))]
        if parts:
            torch.stack(parts).sum().backward()

    def encode() -> None:
        with torch.no_grad():
            module(next(turns), **case.eval_calls)

    module.train(part == "train")
    if part != "decode":
        return train if part == "train" else encode
    decoder: Any = next((getattr(module, name) for name in DECODERS if hasattr(module, name)), None)
    indices = indices_of(module, case)
    if case.kind == "VectorQuantize" and isinstance(indices, Tensor):
        indices = indices.clamp(min=0)  # -1 is the last code there, and zeros here: not the same work

    def decode() -> None:
        with torch.no_grad():
            decoder(indices)

    try:
        decode()
    except Exception:  # what there is nothing of, or what the library cannot decode
        return None
    return decode


def interleaved(runs: list[Callable[[], None]], budget: float) -> list[float]:
    """Median seconds of each, in turn and each first every other time, for at least five rounds and `budget` seconds."""
    for run in runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    start = time.perf_counter()
    pairs = [*zip(runs, times, strict=True)]
    while len(times[0]) < 5 or (time.perf_counter() - start < budget and len(times[0]) < 200):
        for run, own in pairs:
            seed(len(own))
            began = time.perf_counter()
            run()
            own.append(time.perf_counter() - began)
        pairs.reverse()
    return [statistics.median(own) for own in times]


def defaults(kind: str) -> dict[str, str]:
    """Those of a class, and of the layers that it hands arguments on to."""
    found = [inspect.signature(getattr(peer, name)).parameters for name in (*reversed(HANDED_ON.get(kind, ())), kind)]
    return {name: repr(value.default) for parameters in found for name, value in parameters.items()}


def significant(number: float) -> float:
    """As exact as timing is."""
    return float(f"{number:.4g}")


def measure(case: Case, budget: float) -> dict[str, Any]:
    """A row of the result."""
    usual = defaults(case.kind)
    chosen = {name: value for name, value in case.kwargs.items() if repr(value) != usual.get(name)}
    chosen |= {name: value for name, value in case.calls.items() if value is not None}
    arguments = {name: repr(value)[:60] for name, value in chosen.items()}
    row: dict[str, Any] = {"class": case.kind, "case": case.name, "size": case.size, "input": list(case.x.shape), "arguments": arguments}
    try:
        torch.manual_seed(0)
        modules = [getattr(package, case.kind)(**copy.deepcopy(case.kwargs)) for package in (peer, facade)]
        for part in PARTS:
            theirs, own = (call(module, part, case) for module in modules)
            if theirs is None:
                continue
            if own is None:
                raise RuntimeError("the facade does not decode what the library does")
            seconds = interleaved([theirs, own], budget)
            row[part] = {"peer": significant(seconds[0]), "facade": significant(seconds[1]), "ratio": significant(seconds[0] / seconds[1])}
    except Exception as error:
        row["not measured"] = f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
    return row


def figures(rows: list[dict[str, Any]]) -> list[float]:
    """All ratios."""
    return [row[part]["ratio"] for row in rows for part in PARTS if part in row]


def summary(rows: list[dict[str, Any]]) -> str:
    """How many figures, their median, the worst, how many are below 1."""
    known = figures(rows)
    if not known:
        return "0 | | | "
    return f"{len(known)} | {statistics.median(known):.2f} | {min(known):.2f} | {sum(ratio < 1 for ratio in known)}"


def line(row: dict[str, Any]) -> str:
    """A row of a table."""
    cells = [f"{1e3 * row[part]['facade']:.3g} | {row[part]['ratio']:.2f}" if part in row else " | " for part in PARTS]
    return f"| {row['class']} | {row['case']} | {row['size']} | {' | '.join(cells)} |"


def stored(result: dict[str, Any]) -> str:
    """JSON with one row a line."""
    rows = ",\n".join(json.dumps(row) for row in result["rows"])
    return f'{{"machine": {json.dumps(result["machine"])}, "rows": [\n{rows}\n]}}\n'


def table(result: dict[str, Any]) -> str:
    """The page: a summary for each class, the settings that people use, and every case that is slower."""
    rows = result["rows"]
    lines = ["# The facade beside vector-quantize-pytorch", ""]
    lines += [", ".join(f"{name} {value}" for name, value in result["machine"].items()), ""]
    lines += [
        "Ratio: its time over the facade's, so that above 1 the facade is faster. Sizes: those of the tests' covering arrays (tens of"
    ]
    lines += ["vectors, 16 codes), real ones (about 1,024 vectors of 64, 512 codes), and large ones, problems of quantizers.md. All rows"]
    lines += ["with the arguments that are not the defaults: facade.json.", ""]
    for size in SIZES:
        known = [row for row in rows if row["size"] == size]
        lines += [f"## Sizes: {size}", "", "| class | figures | median | worst | below 1 |", "|---|---|---|---|---|"]
        for kind in dict.fromkeys(row["class"] for row in known):
            lines.append(f"| {kind} | {summary([row for row in known if row['class'] == kind])} |")
        lines += [f"| all | {summary(known)} |", ""]
    head = [f"| class | case | size | {' | '.join(f'{part} ms | ratio' for part in PARTS)} |", "|---" * (3 + 2 * len(PARTS)) + "|"]
    lines += ["## Settings that people use", "", *head]
    lines += [line(row) for row in rows if not row["case"].startswith("row")]
    lines += ["", "## Cases of the arrays that are slower", "", *head]
    lines += [line(row) for row in rows if row["case"].startswith("row") and min(figures([row]), default=1.0) < 1.0]
    missing = [row for row in rows if "not measured" in row]
    if missing:
        lines += ["", "## Not measured", "", *(f"- {row['class']}, {row['case']}, {row['size']}: {row['not measured']}" for row in missing)]
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any]) -> None:
    """The sorted ratios."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    for size in SIZES:
        for part in PARTS:
            ratios = sorted(row[part]["ratio"] for row in result["rows"] if part in row and row["size"] == size)
            axes.plot([i / len(ratios) for i in range(len(ratios))], ratios, label=f"{part}, sizes: {size}")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set(yscale="log", xlabel="share of the cases, slowest first", ylabel="time of the library / of the facade")
    axes.legend()
    figure.savefig(RESULTS / "facade.png", dpi=120)


def main() -> None:
    """Measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", nargs="*", default=[*TESTS], help="measure these alone")
    parser.add_argument("--sizes", nargs="*", default=[*SIZES], choices=SIZES)
    parser.add_argument("--cases", nargs="*", help="measure these alone, as in: --cases 'row 3' defaults")
    parser.add_argument("--budget", type=float, default=0.2, help="seconds a figure")
    parser.add_argument("--dry", action="store_true", help="write no result")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    path = RESULTS / "facade.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for kind in options.classes:
        if not options.cases:  # rows of arrays that have become others
            rows = [row for row in rows if row["class"] != kind or row["size"] not in options.sizes]
        for case in cases(kind, tuple(options.sizes)):
            if options.cases and case.name not in options.cases:
                continue
            row = measure(case, options.budget)
            rows = [other for other in rows if [other[name] for name in KEYS] != [row[name] for name in KEYS]] + [row]
            ratios = [f"{row[part]['ratio']:.2f}" for part in PARTS if part in row]
            print(kind, case.name, case.size, row.get("not measured") or ratios, flush=True)
    if options.dry:
        return
    result = {
        "machine": {**describe(), "peer": importlib.metadata.version("vector-quantize-pytorch"), "compiled search": compiled.is_there()},
        "rows": rows,
    }
    path.write_text(stored(result))
    (RESULTS / "facade.md").write_text(table(result))
    plot(result)


if __name__ == "__main__":
    main()
