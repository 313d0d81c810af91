"""`vqkit bench`: how fast the model of a recipe trains, reads and writes, over lengths, kinds of attention and head types."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vqkit.cli.errors import UsageError
from vqkit.cli.options import near_miss, parse
from vqkit.models.config import ModelConfig
from vqkit.recipes import RECIPES
from vqkit.train.config import RunConfig

if TYPE_CHECKING:
    from vqkit.train.benchmark import Case, Row, TooLarge, Workload

WHAT = {
    "train": "training steps, optimizer and codebooks included",
    "forward": "one pass forward over the whole length",
    "sample": "tokens sampled one after another, after so many that were read",
}

HELP = """usage: vqkit bench {{train,forward,sample}} RECIPE [--lengths 512 2048] [--attention vq full] [--heads recipe mha] [--out DIR]

Measure the model of a recipe on random tokens: tokens per second, the most memory that its tensors take, and the share of what a
bare matrix product does on this machine. Without data, and nothing is trained.

{what}

Everything is measured in turn, a matrix product before each; figures are medians, in brackets the least and the most. What does not
fit into memory is told as such, and the others are measured.
"full" is the same network with ordinary attention, on the fast path of scaled_dot_product_attention.

examples:
  vqkit bench train quickstart
  vqkit bench forward quickstart --lengths 512 2048 8192 32768 --attention vq full --out bench
  vqkit bench sample quickstart --lengths 1000 10000 --heads shga mqa mha

vqkit bench train RECIPE --help shows every option, with the values of that recipe.
"""


@dataclass(frozen=True)
class BenchOptions:
    """What is measured of a recipe's model."""

    model: ModelConfig
    lengths: tuple[int, ...] = (512, 2048)
    """Tokens of a sequence, or with sample those that were read before."""
    attention: tuple[Literal["vq", "full"], ...] = ("vq", "full")
    """Quantized keys in linear time; ordinary attention in quadratic time."""
    heads: tuple[Literal["recipe", "shga", "mqa", "mha"], ...] = ("recipe",)
    """As the recipe has them; one gated head; many query heads on one key head, or on as many, with a feed-forward."""
    repeats: int = 3
    """Rounds after the first, which warms up."""
    batch_size: int = 1
    """Sequences at once."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of matrix products, the bare one as well; bfloat16 = mixed precision."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto = CUDA where there is one."""
    out: Path | None = None
    """Folder for WHAT.json, WHAT.md and WHAT.png; None = show the table alone."""


def main(words: Sequence[str]) -> int:
    """Parse and run; returns the exit code."""
    if words and words[0] in ("-h", "--help"):
        print(HELP.format(what="\n".join(f"  {name:<9}{text}" for name, text in WHAT.items())), end="")
        return 0
    what, recipe, options = requested(words)
    from vqkit.train.allocator import reuse_freed_memory

    reuse_freed_memory()  # as training does
    result = _measured(what, recipe, options)
    text = as_table(result)
    if options.out is not None:
        _write(result, text, options.out)
    print(text, end="")
    return 0 if any("does_not_fit" not in row for row in result["rows"]) else 1


def requested(words: Sequence[str]) -> tuple[str, RunConfig, BenchOptions]:
    """What to measure, the recipe and the options that `words` ask for. Raises UsageError."""
    if not words:
        raise UsageError(f"bench: what is to be measured? One of {', '.join(WHAT)}; see vqkit bench --help")
    what, *rest = words
    if what not in WHAT:
        raise UsageError(f"unknown command bench {what!r}{near_miss(what, WHAT)}")
    if not rest or rest[0].startswith("-"):
        if rest and rest[0] in ("-h", "--help"):
            rest = ["quickstart", *rest]
        else:
            raise UsageError(f"no recipe given; there are {', '.join(RECIPES)}; see vqkit bench --help")
    name, *others = rest
    if name not in RECIPES:
        raise UsageError(f"unknown recipe {name!r}{near_miss(name, RECIPES)}")
    for word in others:
        if word.startswith("--data."):
            raise UsageError(
                f"{word.partition('=')[0]}: bench reads no data, its tokens are random: leave it out; "
                "--model.vocab-size and --lengths are what matters of them"
            )
    recipe = RECIPES[name]()
    description = f"Measure {WHAT[what]}, of the model of recipe {name}.\n$ vqkit bench {what} {name} --lengths 512 2048 8192 --out bench"
    options = parse(BenchOptions, others, prog=f"vqkit bench {what} {name}", description=description, default=BenchOptions(recipe.model))
    for option in ("repeats", "batch_size"):
        if getattr(options, option) < 1:
            raise UsageError(f"--{option.replace('_', '-')} {getattr(options, option)}: must be at least 1")
    for option in ("lengths", "attention", "heads"):
        if not getattr(options, option):
            raise UsageError(f"--{option}: must name at least one")
    if min(options.lengths) < 1:
        raise UsageError(f"--lengths {min(options.lengths)}: must be at least 1")
    if options.out is not None and options.out.exists() and not options.out.is_dir():
        raise UsageError(f"--out {options.out}: is a file; must be a folder, or absent")
    return what, recipe, options


def _measured(what: str, recipe: RunConfig, options: BenchOptions) -> dict[str, Any]:
    import torch

    from vqkit.train import benchmark
    from vqkit.train.parallel import resolve_device

    device = resolve_device(options.device)
    try:
        cases = benchmark.cases(options.model, options.lengths, options.attention, options.heads)
    except ValueError as error:
        raise UsageError(str(error)) from error
    product = benchmark.matrix_product(device, getattr(torch, options.precision))
    rows = benchmark.measure(cases, _builder(what, recipe, options, device), product, repeats=options.repeats, device=device)
    return described(what, recipe.recipe, options, rows, machine(device))


def _builder(what: str, recipe: RunConfig, options: BenchOptions, device: Any) -> Callable[[Case], Workload]:
    from vqkit.generate.benchmark import sampling
    from vqkit.train import benchmark

    train = replace(recipe.train, batch_size=options.batch_size, micro_batches=1, update_len=None, precision=options.precision)

    def build(case: Case) -> Workload:
        if what == "train":
            return benchmark.training(case, train, device)
        if what == "forward":
            return benchmark.forward(case, train, device)
        return benchmark.Workload(*sampling(case.config, case.length, options.batch_size, device))

    return build


def described(what: str, recipe: str, options: BenchOptions, rows: Sequence[Row | TooLarge], machine: dict[str, Any]) -> dict[str, Any]:
    """Everything that was measured, with what it depends on: what goes into the JSON file."""
    from vqkit.config import to_dict

    return {
        "what": what,
        "recipe": recipe,
        "machine": machine,
        "batch_size": options.batch_size,
        "precision": options.precision,
        "model": to_dict(options.model),
        "rows": [asdict(row) for row in rows],
    }


def machine(device: Any) -> dict[str, Any]:
    """Processor, device, threads, versions and revision."""
    import platform

    import torch

    from vqkit import __version__

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "processor": processor,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vqkit": __version__,
        "revision": revision(),
    }


def revision() -> str | None:
    """The git revision of the source that runs, with "+" where it was changed since; None for an installed package."""
    import subprocess

    import vqkit

    def said_by_git(*words: str) -> str:
        return subprocess.run(("git", *words), capture_output=True, text=True, check=True, cwd=Path(vqkit.__file__).parent).stdout.strip()

    try:
        said_by_git("ls-files", "--error-unmatch", "__init__.py")  # in a repository of its own, not of somebody who uses it
        return said_by_git("rev-parse", "--short", "HEAD") + ("+" if said_by_git("status", "--porcelain", "-uno", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def as_table(result: dict[str, Any]) -> str:
    """Lines of aligned columns below what they depend on."""
    from vqkit.cli.tables import table

    of = result["machine"]
    place = of["device"] if of["device"] != "cpu" else f"{of['processor']}, {of['threads']} threads"
    head = f"{result['what']} {result['recipe']}: {WHAT[result['what']]}\n{place}; torch {of['torch']}, vqkit {of['vqkit']}"
    head += f" ({of['revision']})\n" if of.get("revision") else "\n"
    head += f"batch {result['batch_size']}, {result['precision']}\n\n"
    rows = []
    for row in result["rows"]:
        if "does_not_fit" in row:
            rows.append((f"{row['attention']} {row['heads']}", f"{row['length']:,}", "does not fit", "", "", ""))
            continue
        slow, fast = row["tokens_per_second_range"]
        least, most = row["utilisation_range"]
        rows.append(
            (
                f"{row['attention']} {row['heads']}",
                f"{row['length']:,}",
                f"{row['tokens_per_second']:,.0f} ({slow:,.0f} - {fast:,.0f})",
                f"{row['peak_bytes'] / 2**20:,.1f}",
                f"{row['utilisation']:.1%} ({least:.1%} - {most:.1%})",
                f"{row['product_gflops']:,.0f}",
            )
        )
    header = ("model", "length", "tokens/s", "MiB of tensors", "share of the product", "product GFLOP/s")
    return head + table(header, rows) + "\n"


def _write(result: dict[str, Any], text: str, folder: Path) -> None:
    import json

    from vqkit.files import write_text_atomic
    from vqkit.train.benchmark import Row, save_figure

    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(folder / f"{result['what']}.json", json.dumps(result, indent=2) + "\n")
    write_text_atomic(folder / f"{result['what']}.md", f"```\n{text}```\n")
    save_figure([Row(**row) for row in result["rows"] if "does_not_fit" not in row], folder / f"{result['what']}.png")
