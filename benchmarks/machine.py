"""What a benchmark's figures depend on: the machine, the versions, the revision; and a bare matrix product to hold them against."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def describe() -> dict[str, object]:
    """Processor, versions and git revision ("+" where the tree has uncommitted changes)."""
    revision = _output("git", "rev-parse", "--short", "HEAD") + ("+" if _output("git", "status", "--porcelain", "-uno") else "")
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "revision": revision,
        "date": time.strftime("%Y-%m-%d"),
    }


def seconds(run: Callable[[], object], repeats: int = 1) -> float:
    """Median wall time of one call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def sgemm_rate(size: int = 2048, repeats: int = 5) -> float:
    """Operations per second of a float32 matrix product, size cubed."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    out = torch.empty(size, size)
    torch.mm(a, b, out=out)
    return 2 * size**3 / seconds(lambda: torch.mm(a, b, out=out), repeats)


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
