"""What a run was computed by: environment.json, an entry for each stretch of steps by one machine, with its versions and processes."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from vqkit.files import write_text_atomic
from vqkit.train.parallel import Processes

ENVIRONMENT_FILE = "environment.json"
_PACKAGES = ("vqkit", "torch", "numpy", "safetensors")


def environment(processes: Processes) -> dict[str, Any]:
    """Versions, machine, device, processes and threads of now."""
    cuda = processes.device.type == "cuda"
    return {
        **{name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": torch.cuda.get_device_name(processes.device) if cuda else f"cpu, {torch.backends.cpu.get_cpu_capability()}",
        "processes": processes.world_size,
        "threads": torch.get_num_threads(),
    }


def note_environment(run_dir: Path, step: int, now: dict[str, Any]) -> None:
    """Say in the run's file that from the step behind `step` on it is computed by `now`, if that is another than before."""
    path = run_dir / ENVIRONMENT_FILE
    # Steps behind the checkpoint that a run goes on from are done again: what did them first no longer counts.
    entries = [entry for entry in _entries(path) if entry["after_step"] < step]
    if not entries or {**entries[-1], "after_step": step} != {"after_step": step, **now}:
        entries.append({"after_step": step, **now})
    text = json.dumps(entries, indent=2) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_text_atomic(path, text)


def _entries(path: Path) -> list[dict[str, Any]]:
    """What is there; none if it cannot be read, as no run shall end for a remark about it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return []
    return (
        [entry for entry in found if isinstance(entry, dict) and isinstance(entry.get("after_step"), int)]
        if isinstance(found, list)
        else []
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from its source
        return "unknown"
