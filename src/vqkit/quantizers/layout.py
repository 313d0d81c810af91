"""Where the width of an input stands, which of its positions count, and what indices may be.

Quantizers think of vectors in rows: [*positions, D], the width last. Sequences, images, volumes and single tokens differ in their positions
alone: [B, T], [B, H, W], [B, H, W, Z] or [B], whether their width stands last or, as in convolutional networks, behind the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from vqkit.ops.codebook import gather_codes
from vqkit.ops.precision import holds_in_all, is_transformed, may_look

Layout = Literal["last", "first"]
"""Where the width stands: [B, ..., D], or [B, D, ...] as in images."""


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of it does more than its forward."""
    own = module.__dict__  # without a search, as this is asked in every call
    return bool(own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"])


def any_hooks(module: nn.Module) -> bool:
    """Whether `has_hooks` holds of it or of anything within."""
    waiting: list[nn.Module | None] = [module]
    while waiting:
        part = waiting.pop()
        if part is not None:
            if has_hooks(part):
                return True
            waiting.extend(part.__dict__["_modules"].values())
    return False


def is_nothing(layer: nn.Module) -> bool:
    """Whether a call of it would give what it gets, and nobody would know."""
    return isinstance(layer, nn.Identity) and not has_hooks(layer)


def check_layout(layout: str) -> None:
    """Raise ValueError unless `layout` is one."""
    if layout not in get_args(Layout):
        raise ValueError(f"layout = {layout!r}: must be one of {', '.join(map(repr, get_args(Layout)))}")


def width_last(x: Tensor, dim: int, layout: Layout) -> Tensor:
    """x [B, ..., dim] or, with layout "first", [B, dim, ...] -> [B, ..., dim].

    Raises TypeError for a dtype that is not floating point, ValueError for a rank below 2 and another width.
    """
    check_tensor("x", x)
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}: must be floating point")
    axis = -1 if layout == "last" else 1
    if x.dim() < 2 or x.shape[axis] != dim:
        shape = f"[batch, ..., {dim}]" if layout == "last" else f"[batch, {dim}, ...]"
        raise ValueError(f'x has shape {tuple(x.shape)}: must be {shape}, as layout = "{layout}" and dim = {dim} say')
    return x if axis == -1 else x.movedim(axis, -1)


def width_back(rows: Tensor, layout: Layout) -> Tensor:
    """[B, ..., D] -> where `layout` has the width; axes that were added behind the positions stay the last ones."""
    return rows if layout == "last" else rows.movedim(-1, 1)


def position_mask(positions: torch.Size, mask: Tensor | None, lengths: Tensor | None) -> Tensor | None:
    """The mask [*positions] bool, True where a position counts, given as such or as the lengths [B] of sequences; None when all count.

    With more position axes than [B, T], lengths count along the first one behind the batch. Raises ValueError for both at once, other
    shapes and lengths outside 0 ... T, TypeError for other dtypes.
    """
    if lengths is not None:
        if mask is not None:
            raise ValueError("mask and lengths are both given: must be one of them, they say the same")
        return _mask_of_lengths(positions, lengths)
    if mask is None:
        return None
    check_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask is {mask.dtype}: must be torch.bool")
    if mask.shape != positions:
        raise ValueError(f"mask has shape {tuple(mask.shape)}: must be {tuple(positions)}, that of x without its width")
    return mask


def _mask_of_lengths(positions: torch.Size, lengths: Tensor) -> Tensor:
    check_tensor("lengths", lengths)
    if not is_integer(lengths):
        raise TypeError(f"lengths is {lengths.dtype}: must be an integer type")
    if len(positions) < 2:
        raise ValueError(f"lengths is given for positions {tuple(positions)}: must come with sequences, [batch, time] and more")
    if lengths.shape != positions[:1]:
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}: must be {tuple(positions[:1])}, one for each of the batch")
    check_range("lengths", lengths, 0, positions[1])
    time = torch.arange(positions[1], device=lengths.device)
    mask = time < lengths.unsqueeze(-1)
    return mask.reshape(*mask.shape, *(1 for _ in positions[2:])).expand(positions)


def check_indices(name: str, indices: Tensor, codebook_size: int, shape: torch.Size | None = None) -> bool:
    """Raise unless indices are integers of -1 ... codebook_size - 1, of the given shape if any. Returns whether it knows of no -1."""
    check_tensor(name, indices)
    if not is_integer(indices):
        raise TypeError(f"{name} is {indices.dtype}: must be an integer type")
    if shape is not None and indices.shape != shape:
        raise ValueError(f"{name} has shape {tuple(indices.shape)}: must be {tuple(shape)}")
    least = check_range(name, indices.to(torch.int64), -1, codebook_size - 1)  # in uint8, -1 is 255
    return least is not None and least >= 0


def rows_at(table: Tensor, indices: Tensor) -> tuple[Tensor, bool]:
    """table [C, K], indices [...] -> its rows [..., K], zeros for -1, and whether it is known that there is no -1.

    Differentiable in the table. Raises as `check_indices`.
    """
    if indices.dtype in (torch.int64, torch.int32) and may_look(indices):
        least = indices.min().item() if indices.numel() else 0
        try:  # on CPU a gather itself refuses what is beyond the table, at no cost
            if least >= 0:
                return torch.embedding(table, indices), True
            if least == -1:
                return torch.embedding(table, indices.clamp(min=0)).masked_fill_((indices < 0).unsqueeze(-1), 0.0), False
        except IndexError:
            check_indices("indices", indices, len(table))
    complete = check_indices("indices", indices, len(table))
    return gather_codes(table, indices.to(torch.int64), all_known=complete), complete


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError unless it is one."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is of type {type(value).__name__}: must be a torch.Tensor")


def is_integer(tensor: Tensor) -> bool:
    """Whether it holds integers; bool is none."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def check_range(name: str, values: Tensor, lowest: float, highest: float) -> float | None:
    """Raise ValueError unless all values lie in lowest ... highest; see `require`. Returns the least, where looking costs nothing."""
    if may_look(values) and values.numel():
        ends = torch.aminmax(values)
        least, most = ends.min.item(), ends.max.item()
        if least >= lowest and most <= highest:
            return least
    right = (values >= lowest) & (values <= highest)  # False for NaN
    bounds = f"{lowest} ... {highest}"
    require(right.all(), f"{name} holds a value outside {bounds}", lambda: f"{name} holds {values[~right][0].item()}: must lie in {bounds}")
    return None


def require(right: Tensor, message: str, detail: Callable[[], str]) -> None:
    """Raise ValueError with `detail()` unless `right` [] bool holds.

    In compiled and exported programs and elsewhere than on CPU, where looking would wait for the device, the device itself raises a
    RuntimeError with `message`.
    """
    if torch.compiler.is_compiling() or right.device.type != "cpu":
        torch._assert_async(right, message)
    elif is_transformed():
        if not holds_in_all(right):
            raise ValueError(message)
    elif not right:
        raise ValueError(detail())


def where_kept(kept: Tensor, x: Tensor, other: float = 0.0) -> Tensor:
    """x [..., D] with `other` where kept [...] is False; x itself if that is known to be nowhere so."""
    return x if is_all(kept) else x.where(kept.unsqueeze(-1), other)


def is_all(kept: Tensor) -> bool:
    """Whether it is known that all of `kept` is True: where asking costs nothing."""
    return may_look(kept) and bool(kept.all())
