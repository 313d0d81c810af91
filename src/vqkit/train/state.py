"""A model state as a tree of tensors: cut into rows of the batch, joined again, and taken apart into named tensors for a file.

Every tensor of a state has the batch as its first axis, but for the dropout of a sequence that all rows share; None stays None. That is all
that this module knows of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from vqkit.models.dropout import SequenceMasks

Tree = TypeVar("Tree")


def split_rows(tree: Tree, parts: int) -> list[Tree]:
    """The tree `parts` times, each with an equal share of consecutive rows of the batch."""
    if parts == 1:
        return [tree]

    def share(part: int) -> Callable[[Tensor], Tensor]:
        return lambda tensor: tensor.chunk(parts)[part]

    return [_map(share(part), [tree], rows=True) for part in range(parts)]


def join_rows(trees: Sequence[Tree]) -> Tree:
    """The inverse of `split_rows`."""
    if len(trees) == 1:
        return trees[0]
    return _map(lambda *tensors: torch.cat(tensors), trees, rows=True)


def detached_copy(tree: Tree) -> Tree:
    """The tree without gradient, each tensor contiguous in memory of its own.

    So a state that was read from a file has the layout of one that never left memory, and the same kernels give the same bits.
    """
    return _map(lambda tensor: tensor.detach().clone(memory_format=torch.contiguous_format), [tree])


def named_tensors(tree: Any, prefix: str) -> dict[str, Tensor]:
    """All tensors of the tree by their dotted path, which opens with `prefix`."""
    if isinstance(tree, Tensor):
        return {prefix: tree}
    if tree is None:
        return {}
    tensors: dict[str, Tensor] = {}
    for name, part in zip(getattr(tree, "_fields", range(len(tree))), tree, strict=True):
        tensors |= named_tensors(part, f"{prefix}.{name}")
    return tensors


def from_named_tensors(template: Tree, tensors: Mapping[str, Tensor], prefix: str) -> Tree:
    """The inverse of `named_tensors`, in the form and on the devices of `template`.

    An axis of size 0 in `template` is one that grows with the sequence, and may have any size.
    Raises ValueError for a tensor that is absent, or of another shape or type than in `template`.
    """
    found = []
    for path, like in named_tensors(template, prefix).items():
        tensor = tensors.get(path)
        if tensor is None or not _fits(tensor.shape, like.shape) or tensor.dtype != like.dtype:
            what = "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"tensor {path!r}: {what}, expected {like.dtype} {tuple(like.shape)}")
        found.append(tensor.to(like.device))
    remaining = iter(found)
    return _map(lambda _: next(remaining), [template])


def _fits(shape: torch.Size, template: torch.Size) -> bool:
    return len(shape) == len(template) and all(size in (0, found) for found, size in zip(shape, template, strict=True))


def _map(function: Callable[..., Tensor], trees: Sequence[Any], *, rows: bool = False) -> Any:
    """The tree of what `function` makes of the matching tensors; with `rows` what has no rows is left as the first tree has it."""
    first = trees[0]
    if isinstance(first, Tensor):
        return function(*trees)
    if first is None:
        return None
    if rows and isinstance(first, SequenceMasks):
        return first._replace(layer=_map(function, [tree.layer for tree in trees]))
    parts = [_map(function, matching, rows=rows) for matching in zip(*trees, strict=True)]
    return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
