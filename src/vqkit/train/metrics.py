"""What a run says about itself: means between two log lines, and files of JSON lines.

Numbers are written so that they read back exactly, and metrics.jsonl holds no clock: the file of an interrupted run equals that of
an unbroken one byte for byte.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqkit.files import naming, write_bytes_atomic
from vqkit.train.code_use import code_use
from vqkit.train.step import StepResult
from vqkit.train.units import LossUnit

METRICS_FILE = "metrics.jsonl"


class Interval:
    """Sums over the steps since the last log line; part of a checkpoint, so that the next line is what it would have been."""

    def __init__(self, code_shapes: Sequence[torch.Size], device: torch.device) -> None:
        self._sums = torch.zeros(6, dtype=torch.float64, device=device)
        self._counts = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in code_shapes]

    def add_(self, result: StepResult, unit: LossUnit) -> None:
        """Count in a step; the same unit in all of them."""
        losses, nats, size = result.losses, result.nats, unit.size(result.num_tokens, result.num_bytes)
        values = [torch.ones_like(nats), losses.total, losses.commitment, nats, size, result.gradient_norm]
        self._sums += torch.stack([value.double() for value in values])
        for sums, counts in zip(self._counts, result.code_counts, strict=True):
            sums += counts

    @property
    def steps(self) -> int:
        """Steps counted in."""
        return int(self._sums[0].item())

    def is_finite(self) -> bool:
        """Whether no loss or gradient of the interval was infinite or not a number."""
        return bool(self._sums.isfinite().all())

    def summary(self, unit: LossUnit) -> dict[str, float]:
        """Means over the interval, the likelihood in `unit`.

        `active_codes` is the share in the worst head of the worst unit, `perplexity` a mean over all, where there are codebooks.
        """
        steps, loss, commitment, nats, size, norm = self._sums.tolist()
        uses = [code_use(counts) for counts in self._counts]
        found = {
            "loss": loss / steps,
            unit.key: unit.bits(nats, size),
            "commitment": commitment / steps,
            "gradient_norm": norm / steps,
        }
        if uses:
            found["active_codes"] = min(use.active.min().item() for use in uses)
            found["perplexity"] = sum(use.perplexity.mean().item() for use in uses) / len(uses)
        return found

    def clear_(self) -> None:
        for tensor in (self._sums, *self._counts):
            tensor.zero_()

    def state_tensors(self) -> dict[str, Tensor]:
        return {"interval.sums": self._sums, **{f"interval.counts.{i}": counts for i, counts in enumerate(self._counts)}}

    def load_state_tensors_(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in self.state_tensors().items():
            tensor.copy_(tensors[name])


class JsonLines:
    """A file of JSON objects, one a line, that grows at its end."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, path.open("ab", buffering=0)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line at once. Raises ValueError for a number that is not finite, OSError with the name of the file."""
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        with naming(self._path):
            while line:  # a disk that fills up takes a part first
                line = line[self._file.write(line) :]

    def sync(self) -> None:
        """Bring what was written to the disk."""
        with naming(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines; none if there is no file. A last line without its end was never finished."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def cut_after(path: Path, step: int) -> None:
    """Remove, in one step, the lines of metrics.jsonl that tell of steps after `step`, and a torn last line."""
    if not path.exists():
        return
    data = path.read_bytes()
    kept = b"".join(line + b"\n" for line in data.split(b"\n")[:-1] if json.loads(line)["step"] <= step)
    if kept != data:
        write_bytes_atomic(path, kept)
