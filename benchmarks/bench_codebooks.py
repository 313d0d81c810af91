"""Every quantizer in the same small autoencoder, on the same real images, at equal bits; and time and memory beside the peer's.

    python benchmarks/bench_codebooks.py [--only "FSQ" "LFQ" ...] [--steps 600] [--no-images] [--no-peer]

Images: the handwritten digits of scikit-learn, 8 x 8, which come with it; 1,500 to train on, 297 to measure. An encoder makes 2 x 2
vectors of width 16 of an image, every quantizer gives each of them 8 bits, a decoder paints the image again. Three seeds each.

Beside the peer: a training step (forward, losses, backward, commit), in turn in one process; memory is the peak of a process of its
own. Writes codebooks.json, codebooks.md and codebooks.png to benchmarks/results/; rows that are not asked for stay as they were.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import RESULTS, describe
from torch import Tensor, nn

from vqkit.files import write_text_atomic
from vqkit.quantizers import (
    FSP,
    FSQ,
    LFQ,
    MLP,
    BinaryMapper,
    Commitment,
    DeadCodes,
    Diversity,
    Entropy,
    Gradient,
    Grouped,
    GroupedResidualVQ,
    HierarchicalVQ,
    KMeans,
    LatentQuantize,
    ProductVQ,
    Quantizer,
    Residual,
    ResidualVQ,
    SimVQ,
    Softmax,
    VectorQuantize,
    VQBridge,
)

HAS_PEER = importlib.util.find_spec("vector_quantize_pytorch") is not None
WIDTH, SEEDS, BATCH = 16, (0, 1, 2), 128
Made = Callable[[], Quantizer]
_HEALTHY: dict[str, Any] = {"init": KMeans(), "dead_codes": DeadCodes(threshold=0.2)}
_BITS = (Entropy(weight=0.05, temperature=0.5), Diversity(weight=0.1, temperature=0.5), Commitment(weight=0.25))


def _coarse_fine(steps: int, layers: int) -> list[FSQ]:
    scales = [(steps - 1.0) ** -i for i in range(layers)]
    return [FSQ((steps, steps), symmetric=True, bound="clamp", scale=scale) for scale in scales]


MEMBERS: dict[str, Made] = {
    "VectorQuantize": lambda: VectorQuantize(WIDTH, 256),
    "VectorQuantize, k-means, dead codes": lambda: VectorQuantize(WIDTH, 256, **_HEALTHY),
    "VectorQuantize, cosine, codebook_dim 8": lambda: VectorQuantize(WIDTH, 256, codebook_dim=8, metric="cosine", **_HEALTHY),
    "VectorQuantize, Gradient": lambda: VectorQuantize(WIDTH, 256, update=Gradient(), losses=(Commitment(0.25, pull=4.0),)),
    "VectorQuantize, Softmax (IBQ)": lambda: VectorQuantize(
        WIDTH, 256, update=Gradient(), metric="cosine", codebook_dim=8, assignment=Softmax(temperature=0.1)
    ),
    "SimVQ": lambda: SimVQ(WIDTH, 256),
    "SimVQ, MLP": lambda: SimVQ(WIDTH, 256, transform=MLP(hidden=32)),
    "VectorQuantize, VQBridge (FVQ)": lambda: VectorQuantize(
        WIDTH, 256, update=Gradient(), transform=VQBridge(patch=8, hidden=64), losses=(Commitment(0.25, pull=4.0),)
    ),
    "ProductVQ, 2 x 16": lambda: ProductVQ(WIDTH, 16, 2, **_HEALTHY),
    "ResidualVQ, 2 x 16": lambda: ResidualVQ(WIDTH, 16, 2, **_HEALTHY),
    "ResidualVQ, implicit, 2 x 16": lambda: ResidualVQ(WIDTH, 16, 2, implicit=MLP(hidden=32)),
    "GroupedResidualVQ, 2 x 2 x 4": lambda: GroupedResidualVQ(WIDTH, 4, 2, groups=2, **_HEALTHY),
    "FSP (8, 8, 4)": lambda: FSP((8, 8, 4), WIDTH),
    "FSP (8, 8, 4), half quantized": lambda: FSP((8, 8, 4), WIDTH, quantize_rate=0.5),
    "BinaryMapper, 8 bits": lambda: BinaryMapper(8, WIDTH, free_bits=None),
    "LatentQuantize (8, 8, 4)": lambda: LatentQuantize((8, 8, 4), WIDTH),
    "HierarchicalVQ, 1 x 1 and 2 x 2, 84 codes": lambda: HierarchicalVQ(WIDTH, 84, (1, 2), **_HEALTHY),
    "FSQ (8, 8, 4)": lambda: FSQ((8, 8, 4), WIDTH),
    "FSQ (4, 4, 4, 4), symmetric": lambda: FSQ((4, 4, 4, 4), WIDTH, symmetric=True),
    "Residual of FSQ, 2 x (4, 4)": lambda: Residual(_coarse_fine(4, 2), dim=WIDTH, soft_clamp=1.0),
    "Grouped of FSQ, 2 x (4, 4)": lambda: Grouped([FSQ((4, 4), WIDTH // 2) for _ in range(2)]),
    "LFQ, 8 bits": lambda: LFQ(WIDTH, 256, losses=_BITS),
    "LFQ, spherical (BSQ), 8 bits": lambda: LFQ(WIDTH, 256, spherical=True, losses=_BITS),
    "Residual of LFQ, 2 x 4 bits": lambda: Residual([LFQ(4, scale=0.5**i, losses=_BITS) for i in range(2)], dim=WIDTH),
}


# The images


def images() -> tuple[Tensor, Tensor]:
    """[1500, 1, 8, 8] and [297, 1, 8, 8], from 0 to 1."""
    from sklearn.datasets import load_digits

    found = torch.tensor(load_digits(return_X_y=True)[0], dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    found = found[torch.randperm(len(found), generator=torch.Generator().manual_seed(0))]
    return found[:1500], found[1500:]


class Autoencoder(nn.Module):
    """A quantizer between two small convolutional networks."""

    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 32, 3, 2, 1), nn.SiLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.SiLU(), nn.Conv2d(64, WIDTH, 1))
        self.quantizer = quantizer
        self.decoder = nn.Sequential(
            nn.Conv2d(WIDTH, 64, 1),
            nn.SiLU(),
            nn.ConvTranspose2d(64, 32, 4, 2, 1),
            nn.SiLU(),
            nn.ConvTranspose2d(32, 32, 4, 2, 1),
            nn.SiLU(),
            nn.Conv2d(32, 1, 3, 1, 1),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images again, and the loss of the quantizer."""
        quantized, _, loss = self.quantizer(self.encoder(x).movedim(1, -1))
        return self.decoder(quantized.movedim(-1, 1)), loss


def train(make: Made | None, seed: int, steps: int) -> dict[str, float]:
    """Error on images that training did not see, use of the 256 codes over all images, milliseconds a step."""
    train_images, test_images = images()
    torch.manual_seed(seed)
    quantizer = make() if make else _Nothing()
    model = Autoencoder(quantizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    order, times = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        x = train_images[torch.randint(len(train_images), (BATCH,), generator=order)]
        start = time.perf_counter()
        painted, loss = model(x)
        optimizer.zero_grad()
        (F.mse_loss(painted, x) * 16 + loss).backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
        schedule.step()
    model.eval()
    with torch.no_grad():
        error = F.mse_loss(model(test_images)[0], test_images)
        found = {"error": error.item(), "ms": 1e3 * statistics.median(times)}
        if isinstance(quantizer, Quantizer):
            found |= use(quantizer, model.encoder(torch.cat([train_images, test_images])).movedim(1, -1))
    return found


class _Nothing(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, None, Tensor]:
        return x, None, x.new_zeros(())


def use(quantizer: Quantizer, x: Tensor) -> dict[str, float]:
    """Of all combinations of codes that a vector can have: perplexity, and the share that occurs; of items, of the codes of a cell."""
    indices = quantizer.encode(x)
    sizes = quantizer.codebook_sizes[:1] if quantizer.whole_items else quantizer.codebook_sizes
    rows = indices.reshape(-1, len(sizes))
    joint = torch.zeros(len(rows), dtype=torch.int64)
    for size, column in zip(sizes, rows.unbind(-1), strict=True):
        joint = joint * size + column
    number = math.prod(sizes)
    count = torch.bincount(joint, minlength=number).double()
    share = count / count.sum()
    return {"perplexity": torch.special.entr(share).sum().exp().item(), "active": (count > 0).double().mean().item(), "codes": number}


# Beside the peer


@dataclass(frozen=True)
class Pair:
    """One quantizer here and there, on vectors [1, N, dim]."""

    num: int
    dim: int
    ours: Made
    peer: Callable[[Any], nn.Module]


PAIRS: dict[str, Pair] = {
    "FSQ (8, 8, 8, 5, 5, 5)": Pair(65_536, 6, lambda: FSQ((8, 8, 8, 5, 5, 5)), lambda v: v.FSQ(levels=[8, 8, 8, 5, 5, 5])),
    "FSQ (8, 5, 5, 5), dim 64": Pair(65_536, 64, lambda: FSQ((8, 5, 5, 5), 64), lambda v: v.FSQ(levels=[8, 5, 5, 5], dim=64)),
    "FSQ (8, 5, 5, 5), few": Pair(1_024, 4, lambda: FSQ((8, 5, 5, 5)), lambda v: v.FSQ(levels=[8, 5, 5, 5])),
    "FSP (8, 5, 5, 5), dim 64": Pair(65_536, 64, lambda: FSP((8, 5, 5, 5), 64, cdf="tanh"), lambda v: v.FSP(levels=[8, 5, 5, 5], dim=64)),
    "BinaryMapper, 8 bits": Pair(8_192, 8, lambda: BinaryMapper(8), lambda v: v.BinaryMapper(bits=8)),
    "HierarchicalVQ, 4 levels": Pair(
        4_096,
        64,
        lambda: HierarchicalVQ(64, 512, (1, 16, 256, 4_096), axes=1, estimator="straight_through"),
        lambda v: v.HierarchicalVQ(dim=64, codebook_size=512, scales=(1, 16, 256, 4_096), channel_first=False, kmeans_init=False),
    ),
    "LFQ, 12 bits": Pair(4_096, 12, lambda: LFQ(12), lambda v: v.LFQ(dim=12, codebook_size=4_096)),
    "LFQ, 16 bits": Pair(1_024, 16, lambda: LFQ(16), lambda v: v.LFQ(dim=16, codebook_size=65_536)),
    "LFQ, spherical, 12 bits": Pair(
        4_096, 12, lambda: LFQ(12, spherical=True), lambda v: v.LFQ(dim=12, codebook_size=4_096, spherical=True)
    ),
    "SimVQ, 4,096 codes": Pair(4_096, 64, lambda: SimVQ(64, 4_096), lambda v: v.SimVQ(dim=64, codebook_size=4_096)),
    "Residual of FSQ, 8 layers": Pair(
        16_384,
        6,
        lambda: Residual(_coarse_fine_of((8, 5, 5, 5), 8), dim=6),
        lambda v: v.ResidualFSQ(levels=[8, 5, 5, 5], num_quantizers=8, dim=6),
    ),
    "Residual of LFQ, 4 layers": Pair(
        4_096,
        10,
        lambda: Residual([LFQ(10, scale=0.5**i) for i in range(4)]),
        lambda v: v.ResidualLFQ(dim=10, codebook_size=1_024, num_quantizers=4),
    ),
    "Residual of SimVQ, 4 layers": Pair(
        4_096,
        64,
        lambda: Residual([SimVQ(64, 1_024, estimator="none") for _ in range(4)], estimator="rotation"),
        lambda v: v.ResidualSimVQ(dim=64, codebook_size=1_024, num_quantizers=4),
    ),
}


def _coarse_fine_of(levels: tuple[int, ...], layers: int) -> list[FSQ]:
    return [FSQ(levels, symmetric=True, bound="clamp", scale=[(n - 1.0) ** -i for n in levels]) for i in range(layers)]


def step_of(pair: Pair, who: str) -> Callable[[], None]:
    """A training step: forward, backward with the gradient of the output given, commit."""
    if who == "vqkit":
        module: nn.Module = pair.ours()
    else:
        import vector_quantize_pytorch  # pyrefly: ignore[missing-import]

        module = pair.peer(vector_quantize_pytorch)
    x = torch.randn(1, pair.num, pair.dim).requires_grad_()
    gradient = torch.randn(module(x)[0].shape)

    def step() -> None:
        x.grad = None
        quantized, *rest = module(x)
        losses = [loss.sum() for loss in rest[1:] if isinstance(loss, Tensor) and loss.requires_grad]
        torch.autograd.backward([quantized, *losses], [gradient, *map(torch.ones_like, losses)])

    return step


def beside_peer(pair: Pair, budget: float) -> dict[str, Any]:
    """Milliseconds and MiB of both."""
    found: dict[str, Any] = {}
    calls: dict[str, Callable[[], None]] = {}
    for who in ("vqkit", "peer") if HAS_PEER else ("vqkit",):
        torch.manual_seed(0)
        calls[who] = step_of(pair, who)
        calls[who]()
    times: dict[str, list[float]] = {who: [] for who in calls}
    start = time.perf_counter()
    while time.perf_counter() - start < budget or min(map(len, times.values())) < 3:
        for who, call in calls.items():
            begun = time.perf_counter()
            call()
            times[who].append(1e3 * (time.perf_counter() - begun))
    for who, each in times.items():
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            memory = pool.apply(_peak, (next(name for name, other in PAIRS.items() if other is pair), who))
        found[who] = {"ms": statistics.median(each), "least": min(each), "most": max(each), "mib": memory}
    return found


def _peak(name: str, who: str) -> float:
    """MiB of a second step beyond what was there before the first."""
    small = PAIRS[name]
    step_of(Pair(8, small.dim, small.ours, small.peer), who)()
    gc.collect()
    before = _peak_kib()
    call = step_of(PAIRS[name], who)
    call()
    call()
    return (_peak_kib() - before) / 2**10


def _peak_kib() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


# Telling


def spread(values: list[float], digits: int) -> str:
    """Mean and, in brackets, least and most."""
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} - {max(values):.{digits}f})"


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    machine = result["machine"]
    versions = f"torch {machine['torch']}; revision {machine['revision']}; {machine['date']}"
    lines = [
        "# The quantizers on images, at equal bits",
        "",
        f"{machine['processor']}, {machine['threads']} threads; {versions}.",
        "",
        f"Digits of scikit-learn, 8 x 8; 4 vectors of 8 bits an image; {result['steps']} steps of {BATCH} images; "
        f"mean (least - most) of {len(SEEDS)} seeds. Error: mean squared, pixels from 0 to 1, on images that training did not see.",
        "Perplexity and active are of the 256 combinations of codes that a vector can have; of HierarchicalVQ, whose five indices are the "
        "32 bits of an image, of its 84 codes. Time is of the whole step.",
        "",
        "| quantizer | 1,000 x error | perplexity | active % | ms a step |",
        "|---|---|---|---|---|",
    ]
    for name, seeds in result["images"].items():
        of = {key: [seed[key] for seed in seeds] for key in seeds[0]}
        use = [spread(of["perplexity"], 0), spread([100 * share for share in of["active"]], 0)] if "active" in of else ["", ""]
        lines.append(f"| {name} | {spread([1e3 * e for e in of['error']], 2)} | {use[0]} | {use[1]} | {spread(of['ms'], 1)} |")
    lines += [
        "",
        f"## Beside vector-quantize-pytorch {result['peer']}",
        "",
        "A training step on N vectors: milliseconds, median (least - most), and peak memory, input and output included.",
        "",
        "| quantizer | N | dim | vqkit, ms | peer, ms | times as fast | vqkit, MiB | peer, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in result["pairs"].items():
        pair = PAIRS[name]
        digits = 1 if found["vqkit"]["ms"] >= 1 else 2
        ms = {who: f"{of['ms']:.{digits}f} ({of['least']:.{digits}f} - {of['most']:.{digits}f})" for who, of in found.items()}
        ratio = f"{found['peer']['ms'] / found['vqkit']['ms']:.1f}" if "peer" in found else ""
        mib = {who: f"{of['mib']:.0f}" for who, of in found.items()}
        cells = [name, f"{pair.num:,}", str(pair.dim), ms["vqkit"], ms.get("peer", ""), ratio, mib["vqkit"], mib.get("peer", "")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any]) -> None:
    """Error and use of every quantizer as codebooks.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(result["images"])
    figure, both = pyplot.subplots(1, 2, figsize=(10, 1 + 0.3 * len(names)), sharey=True, layout="constrained")
    for axes, key, label in zip(both, ("error", "perplexity"), ("mean squared error", "perplexity, of 256"), strict=True):
        for place, name in enumerate(names):
            values = [seed[key] for seed in result["images"][name] if key in seed]
            axes.plot(values, [place] * len(values), "o", color="C0" if name != NOTHING else "0.5")
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.3)
    both[0].set_yticks(range(len(names)), names, fontsize=7)
    both[0].invert_yaxis()
    figure.savefig(RESULTS / "codebooks.png", dpi=120)


NOTHING = "no quantizer"


def main() -> None:
    """Measure, and write after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="begins of the names of rows")
    parser.add_argument("--steps", type=int, default=600, help="of each training")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each row beside the peer")
    parser.add_argument("--no-images", action="store_true", help="leave out the autoencoder")
    parser.add_argument("--no-peer", action="store_true", help="leave out the rows beside the peer")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="vector_quantize_pytorch")
    path = RESULTS / "codebooks.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"images": {}, "pairs": {}}

    def asked(name: str) -> bool:
        return not arguments.only or any(name.startswith(begin) for begin in arguments.only)

    members: dict[str, Made | None] = {NOTHING: None, **MEMBERS}
    if not arguments.no_images:
        for name, make in members.items():
            if asked(name):
                known["images"][name] = [train(make, seed, arguments.steps) for seed in SEEDS]
                write(known, arguments.steps, list(members))
    if not arguments.no_peer:
        for name, pair in PAIRS.items():
            if asked(name):
                known["pairs"][name] = beside_peer(pair, arguments.seconds)
                write(known, arguments.steps, list(members))


def write(known: dict[str, Any], steps: int, members: list[str]) -> None:
    """Everything known so far."""
    path = RESULTS / "codebooks.json"
    result = {
        "machine": describe(),
        "peer": "1.32.0" if HAS_PEER else "absent",
        "steps": steps,
        "images": {name: known["images"][name] for name in members if name in known["images"]},
        "pairs": {name: known["pairs"][name] for name in PAIRS if name in known["pairs"]},
    }
    RESULTS.mkdir(exist_ok=True)
    write_text_atomic(path, json.dumps(result, indent=2) + "\n")
    write_text_atomic(RESULTS / "codebooks.md", table(result))
    plot(result)


if __name__ == "__main__":
    main()
