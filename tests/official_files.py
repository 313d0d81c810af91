"""Official checkpoints of models of ours, written as Flax writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack
import torch
from torch import Tensor


def packed(tensor: Tensor) -> msgpack.ExtType:
    """A tensor as Flax packs an array."""
    name = str(tensor.dtype).removeprefix("torch.")
    data = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return msgpack.ExtType(1, msgpack.packb([list(tensor.shape), name, data]))


def nested(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Maps by the levels of keys that `/` joins."""
    tree: dict[str, Any] = {}
    for key, value in arrays.items():
        *folders, name = key.split("/")
        at = tree
        for folder in folders:
            at = at.setdefault(folder, {})
        at[name] = packed(value) if isinstance(value, Tensor) else value
    return tree


def with_lists(tree: Any) -> Any:
    """The form of the folders: lists in place of maps with the keys 0, 1, ..., nil in place of empty maps."""
    if not isinstance(tree, dict):
        return tree
    if not tree:
        return None
    if set(tree) == {str(i) for i in range(len(tree))}:
        return [with_lists(tree[str(i)]) for i in range(len(tree))]
    return {name: with_lists(value) for name, value in tree.items()}


def write(tree: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgpack.packb(tree))
    return path
