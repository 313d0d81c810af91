"""A model state as a tree of tensors: cut into rows of the batch, joined again, and taken apart into named tensors for a file.

Every tensor of a state has the batch as its first axis, but for dropout masks that hold for all rows alike. A None is no tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from vqkit.models.dropout import SequenceMasks

Tree = TypeVar("Tree")

OF_ALL_ROWS = {(SequenceMasks, "sinusoid")}
"""Fields whose tensors have no axis of the batch."""


def split_rows(tree: Tree, parts: int) -> list[Tree]:
    """The tree `parts` times, each with an equal share of consecutive rows of the batch, and with all that holds for all of them."""
    if parts == 1:
        return [tree]

    def share(part: int) -> Callable[[Tensor], Tensor]:
        return lambda tensor: tensor.chunk(parts)[part]

    return [_map(share(part), [tree], of_all_rows=_first) for part in range(parts)]


def join_rows(trees: Sequence[Tree]) -> Tree:
    """The inverse of `split_rows`."""
    if len(trees) == 1:
        return trees[0]
    return _map(lambda *tensors: torch.cat(tensors), trees, of_all_rows=_first)


def detached_copy(tree: Tree) -> Tree:
    """The tree without gradient, each tensor contiguous in memory of its own.

    So a state that was read from a file has the layout of one that never left memory, and the same kernels give the same bits.
    """
    return _map(lambda tensor: tensor.detach().clone(memory_format=torch.contiguous_format), [tree])


def named_tensors(tree: Any, prefix: str) -> dict[str, Tensor]:
    """All tensors of the tree by their dotted path, which opens with `prefix`."""
    if tree is None:
        return {}
    if isinstance(tree, Tensor):
        return {prefix: tree}
    tensors: dict[str, Tensor] = {}
    for name, part in zip(getattr(tree, "_fields", range(len(tree))), tree, strict=True):
        tensors |= named_tensors(part, f"{prefix}.{name}")
    return tensors


def from_named_tensors(template: Tree, tensors: Mapping[str, Tensor], prefix: str) -> Tree:
    """The inverse of `named_tensors`, in the form and on the devices of `template`, in which a size of 0 stands for any.

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


def _fits(shape: torch.Size, wanted: torch.Size) -> bool:
    return len(shape) == len(wanted) and all(size == want or want == 0 for size, want in zip(shape, wanted, strict=True))


def _first(*tensors: Tensor) -> Tensor:
    return tensors[0]


def _map(function: Callable[..., Tensor], trees: Sequence[Any], of_all_rows: Callable[..., Tensor] | None = None) -> Any:
    """Trees of one form into one; `of_all_rows`, where given, does for the tensors below `OF_ALL_ROWS` what `function` does for others."""
    first = trees[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return function(*trees)
    names = getattr(first, "_fields", None)
    parts = []
    for i, matching in enumerate(zip(*trees, strict=True)):
        shared = of_all_rows is not None and names is not None and (type(first), names[i]) in OF_ALL_ROWS
        parts.append(_map(of_all_rows if shared and of_all_rows else function, matching, of_all_rows))
    return type(first)(*parts) if names is not None else type(first)(parts)
