"""Speed and memory of the quantizers against vector-quantize-pytorch, faiss and a bare matrix product of the same run.

    python benchmarks/bench_quantizers.py [--only train encode ...] [--containing TEXT ...] [--seconds 6] [--memory all | ours | none]

Every row is a problem, every column somebody who solves it. All solve it in turn, again and again, in one process; a figure is the median
of its times, in brackets the least and the most, and its ratio is that to the median of the bare product (of the row's products, for what
takes several). Memory is the peak of a process of its own beyond what is there before the call, that is inputs, outputs, gradients and
the module. "vqkit" is what `pip install vqkit` gives where there is a C++ compiler or a wheel for the platform, "vqkit, plain torch" what
it gives elsewhere.
Writes quantizers.json, quantizers.md and quantizers.png to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed
import torch.multiprocessing as multiprocessing_of_torch
from machine import RESULTS, describe
from torch import Tensor, nn

from vqkit import GroupedResidualVQ, ResidualVQ, VectorQuantize
from vqkit.dist import default_reducer
from vqkit.files import write_text_atomic
from vqkit.ops.kmeans import kmeans
from vqkit.ops.nearest_code import compiled
from vqkit.quantizers import BeamSearch

Call = Callable[[], object]
HAS_PEER = importlib.util.find_spec("vector_quantize_pytorch") is not None
HAS_FAISS = importlib.util.find_spec("faiss") is not None
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Problem:
    """What is to be done. `products` is the number of N x C x dim products that nobody can avoid."""

    kind: str
    num: int
    codes: int
    dim: int
    products: int = 1
    options: tuple[tuple[str, Any], ...] = ()
    compile_peer: bool = False

    @property
    def name(self) -> str:
        options = "".join(f", {name} {value}" for name, value in self.options)
        return f"{self.kind}: N {self.num:,}, C {self.codes:,}, dim {self.dim}{options}"

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.options)


PROBLEMS = [
    *(
        Problem("train", num, codes, dim, compile_peer=num == 16_384 and codes == 1_024)
        for dim in (64, 256)
        for codes in (1_024, 8_192)
        for num in (1_024, 16_384, 65_536)
        if num > 1_024 or (codes, dim) == (1_024, 64)
    ),
    *(
        Problem("encode", num, codes, dim, compile_peer=num == 16_384 and codes == 1_024 and dim == 64)
        for dim in (8, 64, 256)
        for codes in (1_024, 8_192)
        for num in (16_384, 65_536)
    ),
    Problem("encode", 65_536, 65_536, 64),
    *(Problem("residual", num, 1_024, 128, products=8) for num in (1_024, 16_384, 65_536)),
    *(Problem("grouped", num, 1_024, 128, products=8) for num in (1_024, 16_384, 65_536)),
    Problem("beam", 4_096, 1_024, 64, products=1 + 3 * 4, options=(("beam", 4),)),
    Problem("heads", 16_384, 1_024, 64, products=4, options=(("separate heads", 4),)),
    *(Problem("kmeans", 65_536, codes, 64, products=10, options=(("iterations", 10),)) for codes in (1_024, 4_096)),
]


# Who solves them


def bare_product(problem: Problem) -> Call:
    """x @ codes into memory that is there, as often as the row asks."""
    x, codes = torch.randn(problem.num, problem.dim), torch.randn(problem.dim, problem.codes)
    if problem.num * problem.codes > 1 << 30:  # 4 GiB of scores: by rows, each into the same memory
        parts = x.split((1 << 30) // problem.codes)
        out = torch.empty(len(parts[0]), problem.codes)
        return lambda: [torch.mm(part, codes, out=out[: len(part)]) for part in parts]
    out = torch.empty(problem.num, problem.codes)
    return lambda: [torch.mm(x, codes, out=out) for _ in range(problem.products)]


def training_step(module: nn.Module, x: Tensor) -> Call:
    """Forward, backward and commit, the gradient of the output being given."""
    x = x.requires_grad_()
    gradient = torch.randn(x.shape)
    module.train()

    def step() -> None:
        x.grad = None
        quantized, _, loss = module(x)
        torch.autograd.backward([quantized, loss.sum()], [gradient, torch.ones(())])

    return step


def vqkit_call(problem: Problem) -> Call:
    """A call of the quantizer here."""
    num, codes, dim = problem.num, problem.codes, problem.dim
    x = torch.randn(1, num, dim)
    if problem.kind == "kmeans":
        iterations = problem.settings["iterations"]
        return lambda: kmeans(x, codes, iterations=iterations, start="random", generator=torch.Generator().manual_seed(0))
    if problem.kind == "encode":
        module = VectorQuantize(dim, codes).eval()
        return lambda: module.encode(x)
    return training_step(vqkit_module(problem), x if problem.kind != "grouped" else torch.randn(1, num, 2 * dim))


def vqkit_module(problem: Problem) -> nn.Module:
    """The quantizer here."""
    codes, dim = problem.codes, problem.dim
    if problem.kind == "residual":
        return ResidualVQ(dim, codes, num_quantizers=problem.products)
    if problem.kind == "grouped":
        return GroupedResidualVQ(2 * dim, codes, num_quantizers=problem.products // 2, groups=2)
    if problem.kind == "beam":
        return ResidualVQ(dim, codes, num_quantizers=4, beam=BeamSearch(problem.settings["beam"]))
    if problem.kind == "heads":
        heads = problem.settings["separate heads"]
        return VectorQuantize(dim, codes, codebook_dim=dim, heads=heads, separate_heads=True)
    return VectorQuantize(dim, codes)


def peer_call(problem: Problem) -> Call:
    """A call of the same of vector-quantize-pytorch."""
    from vector_quantize_pytorch.vector_quantize_pytorch import kmeans as peer_kmeans  # pyrefly: ignore[missing-import]

    num, dim = problem.num, problem.dim
    if problem.kind == "kmeans":
        x, iterations = torch.randn(1, num, dim), problem.settings["iterations"]
        return lambda: peer_kmeans(x, problem.codes, num_iters=iterations)
    module = peer_module(problem)
    if problem.kind == "encode":
        x = torch.randn(1, num, dim)
        module.eval()

        def encode() -> object:
            with torch.no_grad():
                return module(x)[1]

        return encode
    return training_step(module, torch.randn(1, num, dim if problem.kind != "grouped" else 2 * dim))


def peer_module(problem: Problem) -> nn.Module:
    """The same quantizer of vector-quantize-pytorch."""
    import vector_quantize_pytorch as peer  # pyrefly: ignore[missing-import]

    codes, dim = problem.codes, problem.dim
    if problem.kind == "residual":
        return peer.ResidualVQ(dim=dim, codebook_size=codes, num_quantizers=problem.products)
    if problem.kind == "grouped":
        return peer.GroupedResidualVQ(dim=2 * dim, codebook_size=codes, num_quantizers=problem.products // 2, groups=2)
    if problem.kind == "beam":
        return peer.ResidualVQ(dim=dim, codebook_size=codes, num_quantizers=4, beam_size=problem.settings["beam"])
    if problem.kind == "heads":
        heads = problem.settings["separate heads"]
        return peer.VectorQuantize(dim=dim, codebook_size=codes, codebook_dim=dim, heads=heads, separate_codebook_per_head=True)
    return peer.VectorQuantize(dim=dim, codebook_size=codes)


def compiled_peer_call(problem: Problem) -> Call:
    """The peer under torch.compile, graph breaks allowed."""
    torch._dynamo.reset()
    module = peer_module(problem)
    module.compile()
    if problem.kind == "train":
        return training_step(module, torch.randn(1, problem.num, problem.dim))
    x = torch.randn(1, problem.num, problem.dim)
    module.eval()

    def encode() -> object:
        with torch.no_grad():
            return module(x)[1]

    return encode


def faiss_call(problem: Problem) -> Call:
    """Exact search or k-means by faiss."""
    import faiss  # pyrefly: ignore[missing-import]

    faiss.omp_set_num_threads(torch.get_num_threads())
    x = torch.randn(problem.num, problem.dim).numpy()
    if problem.kind == "kmeans":

        def cluster() -> None:
            found = faiss.Kmeans(problem.dim, problem.codes, niter=problem.settings["iterations"], max_points_per_centroid=10**9)
            found.train(x)

        return cluster
    index = faiss.IndexFlatL2(problem.dim)
    index.add(torch.randn(problem.codes, problem.dim).numpy())
    return lambda: index.search(x, 1)


@dataclass
class Solver:
    """One column: who, how a call is made, and which rows it can solve."""

    name: str
    make: Callable[[Problem], Call]
    solves: Callable[[Problem], bool] = lambda problem: True
    environment: dict[str, str] = field(default_factory=dict)


BARE = "bare product"
FORMS = {"vqkit": {"VQKIT_COMPILED": "1"}, "vqkit, plain torch": {"VQKIT_COMPILED": "0"}}
SOLVERS = [
    Solver(BARE, bare_product),
    *(Solver(name, vqkit_call, environment=environment) for name, environment in FORMS.items()),
    Solver("peer", peer_call, lambda problem: HAS_PEER),
    Solver("peer under torch.compile", compiled_peer_call, lambda problem: HAS_PEER and problem.compile_peer),
    Solver("faiss", faiss_call, lambda problem: HAS_FAISS and problem.kind in ("encode", "kmeans")),
]


# Measuring

MEMORY_OF: dict[str, tuple[str, ...]] = {"all": ("vqkit", "peer"), "ours": ("vqkit",), "none": ()}


def peer_bytes(problem: Problem) -> float:
    """What the peer is known to take: 24 bytes for each of N x C in training, 16 else."""
    each = 16 if problem.kind in ("encode", "kmeans") else 24
    several = problem.settings.get("separate heads", 1) * problem.settings.get("beam", 1)
    return each * problem.num * problem.codes * several


def available_bytes() -> int:
    """Memory that is free now."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def measure(problem: Problem, budget: float) -> dict[str, list[float] | str]:
    """Seconds of each solver, in turn; those that cannot are named with the reason."""
    times: dict[str, list[float] | str] = {}
    calls: list[tuple[Solver, Call]] = []
    for solver in SOLVERS:
        if not solver.solves(problem):
            continue
        if solver.name.startswith("peer") and peer_bytes(problem) > 0.9 * available_bytes():
            times[solver.name] = f"{OUT_OF_MEMORY} ({peer_bytes(problem) / 2**30:.0f} GiB)"
            continue
        torch.manual_seed(0)
        call = solver.make(problem)
        for _ in range(3 if "torch.compile" in solver.name else 0):
            call()  # until it compiles nothing more
        calls.append((solver, call))
    rounds: dict[str, list[float]] = {solver.name: [] for solver, _ in calls}
    start, least = time.perf_counter(), 3
    while least > 0 or time.perf_counter() - start < budget:
        for solver, call in calls:
            spent = sum(rounds[solver.name])
            slow = len(rounds[solver.name]) >= (2 if spent > 10 * budget else 4) and spent > 2 * budget
            if not slow:
                os.environ |= solver.environment
                rounds[solver.name].append(_seconds(call))
        least -= 1
    return times | {name: found[1:] for name, found in rounds.items()}  # the first call of each is for warming up


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak_memory(problem: Problem, name: str) -> float | str:
    """MiB of the second call in a process of its own beyond what was there before it, inputs, gradients and module included."""
    solver = next(solver for solver in SOLVERS if solver.name == name)
    if name.startswith("peer") and peer_bytes(problem) > 0.9 * available_bytes():
        return OUT_OF_MEMORY
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak, (problem, solver.name))


def _peak(problem: Problem, name: str) -> float:
    solver = next(solver for solver in SOLVERS if solver.name == name)
    os.environ |= solver.environment
    small = Problem(problem.kind, 64, 32, problem.dim, problem.products, problem.options)
    solver.make(small)()  # what is loaded at first use is nobody's memory
    call = solver.make(problem)
    gc.collect()
    # What belongs to the caller: the output and its gradient, the gradient of the input; all of the input's size.
    caller = 0 if problem.kind in ("encode", "kmeans") else 2 * 4 * problem.num * problem.dim * (2 if problem.kind == "grouped" else 1)
    before = _peak_kib()
    call()
    return (_peak_kib() - before) / 2**10 - caller / 2**20


def _peak_kib() -> int:
    """Of this process since it began; that of `resource` would begin with its parent's."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def kmeans_seconds(processes: int) -> float:
    """k-means of 65,536 vectors in 1,024 codes, 10 iterations, shared by so many processes of one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing_of_torch.spawn(_kmeans_on_rank, args=(processes, folder), nprocs=processes)
        return max(float((Path(folder) / f"seconds{rank}").read_text()) for rank in range(processes))


def _kmeans_on_rank(rank: int, processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=processes)
    x = torch.randn(1, 65_536, 64, generator=torch.Generator().manual_seed(0)).chunk(processes, dim=1)[rank].contiguous()
    start = x[:, :1024].clone()
    torch.distributed.broadcast(start, 0)
    reducer = default_reducer()
    seconds = min(_seconds(lambda: kmeans(x, 1_024, start=start, reducer=reducer)) for _ in range(4))
    (Path(folder) / f"seconds{rank}").write_text(str(seconds))
    torch.distributed.destroy_process_group()


# Telling


def rows(problems: list[Problem], budget: float, memory: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Measure one problem after the other."""
    for problem in problems:
        times = measure(problem, budget)
        base = statistics.median(cast("list[float]", times[BARE]))
        row: dict[str, Any] = {"problem": problem.name, "kind": problem.kind, "solvers": {}}
        for name, found in times.items():
            if isinstance(found, str):
                row["solvers"][name] = {"failed": found}
                continue
            row["solvers"][name] = {
                "seconds": statistics.median(found),
                "least": min(found),
                "most": max(found),
                "ratio": statistics.median(found) / base,
                "runs": len(found),
            }
            if name.startswith(memory) and "torch.compile" not in name:
                row["solvers"][name]["extra_mib"] = peak_memory(problem, name)
        row["gflops"] = 2e-9 * problem.num * problem.codes * problem.dim * problem.products / base
        print(line(row), file=sys.stderr, flush=True)
        yield row
        gc.collect()


COLUMNS = [solver.name for solver in SOLVERS if solver.name != BARE]


def cell(found: dict[str, Any] | None) -> str:
    """A solver's figures as text."""
    if found is None:
        return ""
    if "failed" in found:
        return found["failed"]
    memory = found.get("extra_mib", "")
    memory = f", {memory:.0f} MiB" if isinstance(memory, float) else ""
    return f"**{found['ratio']:.2f}** ({1e3 * found['least']:.1f} {1e3 * found['seconds']:.1f} {1e3 * found['most']:.1f}{memory})"


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    bare = row["solvers"][BARE]
    bare = f"{1e3 * bare['seconds']:.1f} ({1e3 * bare['least']:.1f} - {1e3 * bare['most']:.1f}), {row['gflops']:.0f} GFLOP/s"
    return f"| {row['problem']} | {bare} | " + " | ".join(cell(row["solvers"].get(name)) for name in COLUMNS) + " |"


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    machine = result["machine"]
    head = [
        "# Speed of the quantizers",
        "",
        f"{machine['processor']}, {machine['threads']} threads, {machine['capability']}; torch {machine['torch']}; "
        f"{'; '.join(f'{name} {version}' for name, version in result['versions'].items())}; "
        f"revision {machine['revision']}; {machine['date']}. float32.",
        "",
        "A figure is the ratio to the bare product of the row; in brackets least, median and most milliseconds, and peak memory beyond",
        'inputs, outputs and gradients. "peer" is vector-quantize-pytorch. "vqkit" is what `pip install vqkit` gives, with its',
        "compiled form; where there is neither a wheel for the platform nor a C++ compiler, it gives the column of plain torch.",
        "",
        "| problem | bare product, ms | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    tail = ["", "k-means of 65,536 x 64 in 1,024 codes, 10 iterations, on processes of one thread each:"]
    for name, found in result["kmeans_on_processes"].items():
        tail.append(f"{name} " + ", ".join(f"{seconds:.2f} s on {processes}" for processes, seconds in found.items()) + ".")
    for date in dict.fromkeys(row["date"] for row in result["rows"] if row["date"] != machine["date"]):
        tail += ["", f"Measured on {date}: {'; '.join(row['problem'] for row in result['rows'] if row['date'] == date)}."]
    return "\n".join([*head, *map(line, result["rows"]), *tail]) + "\n"


def plot(result: dict[str, Any]) -> None:
    """The ratios as quantizers.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = result["rows"]
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.28 * len(rows)), layout="constrained")
    for name, marker in zip(COLUMNS, "osDv^", strict=True):
        points = [(row["solvers"][name]["ratio"], place) for place, row in enumerate(rows) if "ratio" in row["solvers"].get(name, {})]
        if points:
            axes.plot(*zip(*points, strict=True), marker, label=name)
    axes.axvline(1.0, color="0.6", linestyle="--", label="bare product")
    axes.set(xscale="log", xlabel="time, in bare products")
    axes.set_yticks(range(len(rows)), [row["problem"] for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(RESULTS / "quantizers.png", dpi=120)
    pyplot.close(figure)


def earlier() -> dict[str, Any]:
    """What the last run wrote."""
    path = RESULTS / "quantizers.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": [], "kmeans_on_processes": {}}


def with_earlier_memory(row: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """The row, its peaks of memory those of the old one where they were not measured anew."""
    for name, found in row["solvers"].items():
        if "extra_mib" in old["solvers"].get(name, {}) and "failed" not in found:
            found.setdefault("extra_mib", old["solvers"][name]["extra_mib"])
    return row


def versions() -> dict[str, str]:
    """Of the others."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("vector-quantize-pytorch", "faiss-cpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = list(dict.fromkeys(problem.kind for problem in PROBLEMS))
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds, help="kinds of problem; other rows stay as they were")
    parser.add_argument(
        "--containing", nargs="+", default=[""], metavar="TEXT", help="of these only the rows whose name has one of the texts"
    )
    parser.add_argument("--seconds", type=float, default=6.0, help="for the rounds of a row")
    parser.add_argument("--memory", choices=MEMORY_OF, default="all", help="whose peak is measured; others keep that of the last run")
    arguments = parser.parse_args()
    if not compiled.is_there():
        raise SystemExit("the compiled form is not there: install with a C++ compiler at hand, and without VQKIT_COMPILED=0")
    warnings.filterwarnings("ignore", module="vector_quantize_pytorch")
    chosen = [
        problem for problem in PROBLEMS if problem.kind in arguments.only and any(text in problem.name for text in arguments.containing)
    ]
    last = earlier()
    known = {row["problem"]: row for row in last["rows"]}
    result: dict[str, Any] = {"machine": describe(), "versions": versions(), "rows": [], "kmeans_on_processes": last["kmeans_on_processes"]}
    for row in rows(chosen, arguments.seconds, MEMORY_OF[arguments.memory]):
        when = {key: result["machine"][key] for key in ("revision", "date")}
        known[row["problem"]] = with_earlier_memory(row, known.get(row["problem"], row)) | when
        result["rows"] = [known[problem.name] for problem in PROBLEMS if problem.name in known]
        write(result)
    if any(problem.kind == "kmeans" for problem in chosen):
        for name, environment in FORMS.items():
            os.environ |= environment
            result["kmeans_on_processes"][name] = {str(processes): kmeans_seconds(processes) for processes in (1, 2)}
        write(result)


def write(result: dict[str, Any]) -> None:
    """The three files, after every row, so that a run cut short leaves what it has measured."""
    RESULTS.mkdir(exist_ok=True)
    write_text_atomic(RESULTS / "quantizers.json", json.dumps(result, indent=2) + "\n")
    write_text_atomic(RESULTS / "quantizers.md", table(result))
    plot(result)


if __name__ == "__main__":
    main()
