"""A model state as a tree of tensors: cut into rows of the batch, joined again, and taken apart into named tensors for a file.

Every tensor of a state has the batch as its first axis, which is all that this module knows of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Tree = TypeVar("Tree")


def split_rows(tree: Tree, parts: int) -> list[Tree]:
    """The tree `parts` times, each with an equal share of consecutive rows of the batch."""
    if parts == 1:
        return [tree]

    def share(part: int) -> Callable[[Tensor], Tensor]:
        return lambda tensor: tensor.chunk(parts)[part]

    return [_map(share(part), [tree]) for part in range(parts)]


def join_rows(trees: Sequence[Tree]) -> Tree:
    """The inverse of `split_rows`."""
    if len(trees) == 1:
        return trees[0]
    return _map(lambda *tensors: torch.cat(tensors), trees)


def detached_copy(tree: Tree) -> Tree:
    """The tree without gradient, each tensor contiguous in memory of its own.

    So a state that was read from a file has the layout of one that never left memory, and the same kernels give the same bits.
    """
    return _map(lambda tensor: tensor.detach().clone(memory_format=torch.contiguous_format), [tree])


def named_tensors(tree: Any, prefix: str) -> dict[str, Tensor]:
    """All tensors of the tree by their dotted path, which opens with `prefix`."""
    if isinstance(tree, Tensor):
        return {prefix: tree}
    tensors: dict[str, Tensor] = {}
    for name, part in zip(getattr(tree, "_fields", range(len(tree))), tree, strict=True):
        tensors |= named_tensors(part, f"{prefix}.{name}")
    return tensors


def from_named_tensors(template: Tree, tensors: Mapping[str, Tensor], prefix: str) -> Tree:
    """The inverse of `named_tensors`, in the form and on the devices of `template`.

    Raises ValueError for a tensor that is absent, or of another shape or type than in `template`.
    """
    found = []
    for path, like in named_tensors(template, prefix).items():
        tensor = tensors.get(path)
        if tensor is None or tensor.shape != like.shape or tensor.dtype != like.dtype:
            what = "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"tensor {path!r}: {what}, expected {like.dtype} {tuple(like.shape)}")
        found.append(tensor.to(like.device))
    remaining = iter(found)
    return _map(lambda _: next(remaining), [template])


def _map(function: Callable[..., Tensor], trees: Sequence[Any]) -> Any:
    first = trees[0]
    if isinstance(first, Tensor):
        return function(*trees)
    parts = [_map(function, matching) for matching in zip(*trees, strict=True)]
    return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
