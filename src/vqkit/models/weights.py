"""Weights on disk: safetensors and JSON, found again in a run, a checkpoint or an export folder; nothing is unpickled.

A checkpoint folder is whole when it agrees with its manifest.json, which lists size and hash of every other file and is written last.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from vqkit.config import from_dict, to_dict
from vqkit.files import TEMPORARY_SUFFIX, write_bytes_atomic, write_text_atomic
from vqkit.models.config import ModelConfig
from vqkit.models.transformer import TransformerVQ

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
MANIFEST_FILE = "manifest.json"
CHECKPOINTS_FOLDER = "checkpoints"
FORMAT = "vqkit-model"
VERSION = 1

AnyPath = str | os.PathLike[str]


def save_weights(model: TransformerVQ, config: ModelConfig, folder: AnyPath, *, tensors: dict[str, Tensor] | None = None) -> None:
    """Write model.safetensors and config.json into `folder`, which is made if absent; each file appears whole or not at all.

    `tensors` stand in for the state dict of a model of which this process holds but a part.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in (tensors or model.state_dict()).items()}
    write_bytes_atomic(folder / WEIGHTS_FILE, safetensors.torch.save(tensors, metadata={"format": f"{FORMAT} {VERSION}"}))
    description = {"format": FORMAT, "version": VERSION, "model": to_dict(config)}
    write_text_atomic(folder / CONFIG_FILE, json.dumps(description, indent=2) + "\n")


def load_weights(folder: AnyPath, device: torch.device | str = "cpu") -> tuple[TransformerVQ, ModelConfig]:
    """The model in a checkpoint or export folder, in the types it was saved with, and its configuration.

    Raises FileNotFoundError for a missing file and ValueError for one that is damaged, of another format, or whose tensors
    are not those of its configuration (the message names the tensor, what was expected and what was found).
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG_FILE)
    tensors = _read_tensors(folder / WEIGHTS_FILE, device)
    with torch.device("meta"):
        model = TransformerVQ(config)
    _check_tensors(model.state_dict(), tensors, folder / WEIGHTS_FILE)
    model.load_state_dict(tensors, assign=True)
    return model, config


def find_and_load_weights(path: AnyPath, device: torch.device | str = "cpu") -> tuple[Path, TransformerVQ, ModelConfig]:
    """`load_weights` of what `find_weights` finds; the newest of a run also where training goes on and prunes what was found meanwhile."""
    while True:
        folder = find_weights(path)
        try:
            return folder, *load_weights(folder, device)
        except (OSError, RuntimeError, ValueError):  # safetensors has its own word for a file that is gone
            if folder.exists() or folder == Path(path):
                raise


def find_weights(path: AnyPath) -> Path:
    """The folder to give to `load_weights`: the newest whole checkpoint of a run, or the checkpoint or export folder itself.

    Raises FileNotFoundError or ValueError that say what `path` lacks.
    """
    path = Path(path)
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{path} {found}: must be a run, checkpoint or export folder")
    if (path / CHECKPOINTS_FOLDER).is_dir():
        checkpoint = newest_whole_checkpoint(path)
        if checkpoint is None:
            raise ValueError(f"{path}: no whole checkpoint under {CHECKPOINTS_FOLDER}{_in_words(broken_checkpoints(path))}")
        return checkpoint
    if (path / MANIFEST_FILE).exists() or _step(path) is not None:
        defect = find_defect(path)
        if defect is not None:
            raise ValueError(f"{path}: the checkpoint is not whole: {defect}")
        return path
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path}: neither a run (no {CHECKPOINTS_FOLDER}/) nor weights (no {name})")
    return path


def newest_whole_checkpoint(run: AnyPath) -> Path | None:
    """The folder RUN/checkpoints/step_XXXXXXXX of the highest step that is whole, or None."""
    while True:
        folders = _checkpoints(run)
        whole = next((folder for folder in reversed(folders) if is_whole(folder)), None)
        if whole is not None or _checkpoints(run) == folders:  # not all replaced by newer ones meanwhile
            return whole


def broken_checkpoints(run: AnyPath) -> list[tuple[Path, str]]:
    """Checkpoints newer than the newest whole one, newest first, each with what is wrong with it."""
    broken = []
    for folder in reversed(_checkpoints(run)):
        defect = find_defect(folder)
        if defect is None:
            break
        broken.append((folder, defect))
    return broken


def write_manifest(folder: AnyPath) -> None:
    """Write manifest.json: size and BLAKE2b hash of every file below `folder`. Call it last."""
    folder = Path(folder)
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix != TEMPORARY_SUFFIX}
    entries = {name: {"size": p.stat().st_size, "blake2b": _hash(p)} for name, p in files.items() if name != MANIFEST_FILE}
    write_text_atomic(folder / MANIFEST_FILE, json.dumps({"files": entries}, indent=2) + "\n")


def is_whole(folder: AnyPath) -> bool:
    """Whether every file that the manifest lists is there, with its size and hash."""
    return find_defect(folder) is None


def find_defect(folder: AnyPath) -> str | None:
    """What keeps a checkpoint folder from being whole, in words; None if it is."""
    try:
        return _find_defect(Path(folder))
    except FileNotFoundError as error:  # pruned while it was looked at
        return f"{Path(str(error.filename)).name} is missing"


def _find_defect(folder: Path) -> str | None:
    try:
        entries = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
        listed = [(folder / name, entry["size"], entry["blake2b"]) for name, entry in entries.items()]
    except FileNotFoundError:
        return f"{MANIFEST_FILE} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST_FILE} is damaged"
    for path, size, _ in listed:
        if not path.is_file():
            return f"{path.name} is missing"
        if (found := path.stat().st_size) != size:
            return f"{path.name} has {found} bytes, expected {size}"
    for path, _, digest in listed:
        if _hash(path) != digest:
            return f"{path.name} has another hash than when it was written"
    return None


def _checkpoints(run: AnyPath) -> list[Path]:
    """All folders RUN/checkpoints/step_XXXXXXXX, by step."""
    folder = Path(run) / CHECKPOINTS_FOLDER
    if not folder.is_dir():
        return []
    steps = [(step, p) for p in folder.iterdir() if p.is_dir() and (step := _step(p)) is not None]
    return [p for _, p in sorted(steps)]


def _step(folder: Path) -> int | None:
    match = re.fullmatch(r"step_(\d{8,})", folder.name)
    return int(match[1]) if match else None


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _read_config(path: Path) -> ModelConfig:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: weights are {CONFIG_FILE} and {WEIGHTS_FILE} in one folder")
    try:
        description: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    found = (description.get("format"), description.get("version")) if isinstance(description, dict) else (None, None)
    if found != (FORMAT, VERSION):
        raise ValueError(f"{path}: format {found[0]!r} version {found[1]!r}, expected {FORMAT!r} version {VERSION}")
    return from_dict(ModelConfig, description.get("model"), where=f"{path}: model")


def _read_tensors(path: Path, device: torch.device | str) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: weights are {CONFIG_FILE} and {WEIGHTS_FILE} in one folder")
    try:
        # Cloned, so that the model does not live in a mapped file that may change under it.
        return {name: tensor.clone() for name, tensor in safetensors.torch.load_file(path, device=str(device)).items()}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from error


def _check_tensors(expected: dict[str, Tensor], found: dict[str, Tensor], path: Path) -> None:
    for name, tensor in expected.items():
        if name not in found:
            raise ValueError(f"{path}: tensor {name!r} of shape {tuple(tensor.shape)} is missing")
        if found[name].shape != tensor.shape:
            raise ValueError(f"{path}: tensor {name!r} has shape {tuple(found[name].shape)}, expected {tuple(tensor.shape)}")
    for name in found:
        if name not in expected:
            raise ValueError(f"{path}: tensor {name!r} of shape {tuple(found[name].shape)} belongs to no part of this model")


def _in_words(broken: list[tuple[Path, str]]) -> str:
    return "".join(f"; {folder.name}: {defect}" for folder, defect in broken)
