"""Training and decoding speed of the Transformer-VQ over sequence lengths, against a bare matrix product of the same run.

    python benchmarks/bench_train.py [--lengths 512 2048 8192 32768] [--repeats 5]

Writes a JSON file, a table and a plot to benchmarks/results/. Utilisation is model operations per token (vqkit.models.cost; nothing
that is computed twice counts twice) times tokens/s over the rate of a 2,048-cubed float32 product, measured before each step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from machine import RESULTS, describe, seconds, sgemm_rate

from vqkit.data import Batch
from vqkit.files import write_text_atomic
from vqkit.models import ModelConfig, TransformerVQ
from vqkit.models.cost import flops_per_token, num_parameters
from vqkit.models.transformer import ModelState
from vqkit.train.allocator import reuse_freed_memory
from vqkit.train.config import TrainConfig
from vqkit.train.optimizer import Optimizer
from vqkit.train.step import train_step

CONFIG = ModelConfig(vocab_size=256, dim=256, layers=4, key_dim=64, value_dim=512, codebook_size=128, block_len=128, mem_len=128)


class Trainer:
    """One model in training on random tokens, batch 1, at one length."""

    def __init__(self, length: int) -> None:
        torch.manual_seed(0)
        self.length = length
        self.model = TransformerVQ(CONFIG).train()
        self.optimizer = Optimizer(self.model.named_parameters(), TrainConfig(batch_size=1, update_len=length))
        tokens = torch.randint(0, CONFIG.vocab_size, (1, length + 1))
        one_document, all_count = torch.zeros(1, length, dtype=torch.int64), torch.ones(1, length, dtype=torch.bool)
        self.batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), one_document, all_count)
        self.steps = 0

    def step(self) -> None:
        state = self.model.initial_state(1)
        train_step(self.model, self.optimizer, self.batch, state, self.steps, segments=False)
        self.steps += 1


def training(lengths: list[int], repeats: int) -> list[dict[str, float | list[float]]]:
    """Rounds over all lengths, a bare product before each step; medians with the smallest and largest."""
    trainers = [Trainer(length) for length in lengths]
    for trainer in trainers:
        trainer.step()
    seen: dict[int, list[tuple[float, float]]] = {length: [] for length in lengths}
    for _ in range(repeats):
        for trainer in trainers:
            rate = sgemm_rate()
            calls = max(1, 4096 // trainer.length)
            seen[trainer.length].append((seconds(trainer.step, calls), rate))
    flops = flops_per_token(CONFIG).training
    rows = []
    for length, pairs in seen.items():
        speeds = [length / t for t, _ in pairs]
        shares = [flops * length / t / rate for t, rate in pairs]
        rows.append(
            {
                "length": length,
                "tokens_per_second": statistics.median(speeds),
                "slowest": min(speeds),
                "fastest": max(speeds),
                "sgemm_gflops": statistics.median(rate for _, rate in pairs) / 1e9,
                "utilisation": statistics.median(shares),
                "utilisation_range": [min(shares), max(shares)],
            }
        )
    return rows


def state_bytes(state: ModelState) -> int:
    """Memory that the state keeps alive."""
    return sum(t.untyped_storage().nbytes() for unit in state.attention for t in unit) + 8 * (
        state.position.numel() + state.segment.numel()
    )


@torch.inference_mode()
def decoding(positions: list[int], tokens: int = 100) -> list[dict[str, float]]:
    """Time of one token and bytes of state after so many tokens."""
    torch.manual_seed(0)
    model = TransformerVQ(CONFIG).eval()
    state, done, rows = model.initial_state(1), 0, []
    for position in positions:
        while done < position:
            chunk = min(4096, position - done)
            state = model(torch.randint(0, CONFIG.vocab_size, (1, chunk)), state).state
            done += chunk
        times = []
        for _ in range(tokens):
            token = torch.randint(0, CONFIG.vocab_size, (1, 1))
            start = time.perf_counter()
            state = model(token, state).state
            times.append(time.perf_counter() - start)
        done += tokens
        rows.append(
            {
                "position": position,
                "milliseconds_per_token": 1e3 * statistics.median(times),
                "fastest": 1e3 * min(times),
                "slowest": 1e3 * max(times),
                "state_bytes": state_bytes(state),
            }
        )
    return rows


def table(result: dict) -> str:
    """The result as Markdown."""
    machine = result["machine"]
    lines = [
        "# Training and decoding speed",
        "",
        f"{machine['processor']}, {machine['threads']} threads, {machine['capability']}; torch {machine['torch']}; "
        f"revision {machine['revision']}; {machine['date']}.",
        "",
        "Width 256, 4 layers (8 attentions), d_k 64, d_v 512, block = window = codes = 128, batch 1, float32; "
        f"{result['parameters'] / 1e6:.2f} M parameters, "
        f"{result['training_flops_per_token'] / 1e6:.1f} M model operations per trained token.",
        "Medians over interleaved rounds, smallest and largest in brackets.",
        "",
        "| T | tokens/s trained | sgemm GFLOP/s | share of sgemm |",
        "|---|---|---|---|",
    ]
    for row in result["training"]:
        low, high = row["utilisation_range"]
        lines.append(
            f"| {row['length']:,} | {row['tokens_per_second']:,.0f} ({row['slowest']:,.0f} - {row['fastest']:,.0f}) "
            f"| {row['sgemm_gflops']:.0f} | {row['utilisation']:.0%} ({low:.0%} - {high:.0%}) |"
        )
    lines += ["", "| after tokens | ms per token | bytes of state |", "|---|---|---|"]
    for row in result["decoding"]:
        spread = f"({row['fastest']:.2f} - {row['slowest']:.2f})"
        lines.append(f"| {row['position']:,} | {row['milliseconds_per_token']:.2f} {spread} | {row['state_bytes']:,} |")
    return "\n".join(lines) + "\n"


def plot(result: dict) -> None:
    """The result as train.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    lengths = [row["length"] for row in result["training"]]
    left.plot(lengths, [100 * row["utilisation"] for row in result["training"]], "o-")
    left.axhline(50, color="0.6", linestyle="--", label="goal")
    left.set(xscale="log", ylim=(0, 100), xlabel="sequence length", ylabel="share of sgemm, %", title="training")
    left.legend()
    positions = [row["position"] for row in result["decoding"]]
    right.plot(positions, [row["milliseconds_per_token"] for row in result["decoding"]], "o-")
    right.set(xscale="log", xlabel="tokens before", ylabel="ms per token", title="decoding")
    right.set_ylim(bottom=0)
    figure.savefig(RESULTS / "train.png", dpi=120)


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192, 32768])
    parser.add_argument("--positions", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    reuse_freed_memory()  # as vqkit.train.train does
    result = {
        "machine": describe(),
        "parameters": num_parameters(CONFIG),
        "training_flops_per_token": flops_per_token(CONFIG).training,
        "training": training(arguments.lengths, arguments.repeats),
        "decoding": decoding(arguments.positions),
    }
    RESULTS.mkdir(exist_ok=True)
    write_text_atomic(RESULTS / "train.json", json.dumps(result, indent=2) + "\n")
    write_text_atomic(RESULTS / "train.md", table(result))
    plot(result)
    print(table(result))


if __name__ == "__main__":
    main()
