"""The metrics of a run as TensorBoard events, where the package tensorboard is installed; metrics.jsonl has the same numbers."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vqkit.files import naming

TENSORBOARD_FOLDER = "tensorboard"


class TensorBoard:
    """Writes scalars below `folder`. Events after `step` that an earlier process wrote are purged from what TensorBoard shows."""

    def __init__(self, folder: Path, step: int) -> None:
        self._folder, self._writer = folder, None
        if find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            with naming(folder):
                self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, record: Mapping[str, Any]) -> None:
        """The numbers of one line of metrics.jsonl, as KIND/NAME."""
        if self._writer is None:
            return
        with naming(self._folder):
            for name, value in record.items():
                if name not in ("step", "kind") and isinstance(value, (int, float)):
                    self._writer.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    def close(self) -> None:
        if self._writer is not None:
            with naming(self._folder):
                self._writer.close()
