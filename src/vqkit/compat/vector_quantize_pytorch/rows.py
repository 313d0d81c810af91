"""What the classes without a table share: vectors as rows, whatever the layout, and the linear layers around them.

Shapes: P... positions of the input, D its width, H codebooks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from vqkit.ops.precision import finite_rows, known_finite, may_look
from vqkit.quantizers.layout import check_tensor, is_integer, is_nothing, where_kept


def rows_of(x: Tensor, dim: int, first: bool) -> Tensor:
    """x [B, N, dim] or, with `first`, [B, dim, ...] -> [P..., dim].

    Raises TypeError for what is no floating point tensor, ValueError for another rank or width.
    """
    check_tensor("x", x)
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}: must be floating point")
    right = x.dim() >= 2 if first else x.dim() == 3
    if not right or x.shape[1 if first else -1] != dim:
        raise ValueError(f"x has shape {tuple(x.shape)}: must be {f'[batch, {dim}, ...]' if first else f'[batch, time, {dim}]'}")
    return x.movedim(1, -1).contiguous() if first else x  # a layer would copy it, too, and take a slower way


def at_most(lens: Tensor, x: Tensor, first: bool) -> Tensor:
    """Lengths [B] of sequences x, those beyond as long as x is."""
    if x.dim() < 3 or not isinstance(lens, Tensor) or not is_integer(lens):
        return lens  # which is an error of whatever takes it
    return lens.to(torch.int64).clamp(max=x.shape[2 if first else 1])


def check_codes(name: str, codes: Tensor, width: int) -> None:
    """Raise unless codes are floating point [..., width]."""
    check_tensor(name, codes)
    if not codes.is_floating_point():
        raise TypeError(f"{name} is {codes.dtype}: must be floating point")
    if codes.dim() < 1 or codes.shape[-1] != width:
        raise ValueError(f"{name} has shape {tuple(codes.shape)}: must be [..., {width}]")


def project_in(layer: nn.Module, rows: Tensor) -> Tensor:
    """`layer` of rows [..., D]; a row that is not finite becomes NaN, and reaches no gradient."""
    return rows if is_nothing(layer) else projected(layer, rows)[0]


def projected(layer: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """As `project_in`, and which rows [...] are finite before and behind the layer; None: it is known that all are."""
    plain = is_nothing(layer)
    if may_look(rows):  # what is not finite shows in the result, which is the narrower of the two
        found = rows if plain else layer(rows)
        if known_finite(found):
            return found, None
    kept = finite_rows(rows)
    if plain:
        return rows, kept
    found = where_kept(kept, layer(where_kept(kept, rows)), math.nan)
    return found, finite_rows(found)


def project_out(layer: nn.Module, codes: Tensor, indices: Tensor | None) -> Tensor:
    """`layer` of codes [P..., d]; zeros where all of indices [P...] or [P..., H] are -1. None: it is known that none is."""
    if is_nothing(layer):
        return codes
    if indices is None:
        return layer(codes)
    if may_look(indices) and indices.numel() and int(indices.min()) >= 0:
        return layer(codes)
    known = indices >= 0
    return where_kept(known.flatten(codes.dim() - 1).any(-1) if known.dim() >= codes.dim() else known, layer(codes))


def linear(dim_in: int, dim_out: int, projects: bool, bias: bool = True) -> nn.Module:
    """A linear layer, or nothing where nothing is to be projected."""
    return nn.Linear(dim_in, dim_out, bias=bias) if projects else nn.Identity()


def learns(layer: nn.Module) -> bool:
    """Whether a gradient has any place to go in it."""
    return not isinstance(layer, nn.Identity) and any(parameter.requires_grad for parameter in layer.parameters())


def keep_codebooks(keep: bool | None, num_codebooks: int) -> bool:
    """Whether indices have an axis for the codebooks. Raises ValueError where several shall have none."""
    keep = num_codebooks > 1 if keep is None else bool(keep)
    if num_codebooks > 1 and not keep:
        raise ValueError(f"keep_num_codebooks_dim = False: must be True or None with num_codebooks = {num_codebooks}")
    return keep


def hide(module: nn.Module, **parts: Any) -> None:
    """Make native parts attributes of `module` that are none of its modules: what they need of state is that of `module`."""
    module.__dict__.update(parts)


def with_codebooks(indices: Tensor, num_codebooks: int, keep: bool) -> Tensor:
    """Native indices [P...] or [P..., H] as the peer has them."""
    return indices.unsqueeze(-1) if keep and num_codebooks == 1 else indices


def without_codebooks(indices: Tensor, num_codebooks: int, keep: bool) -> Tensor:
    """The opposite of `with_codebooks`. Raises ValueError for another number of codebooks."""
    check_tensor("indices", indices)
    if not keep:
        return indices
    if indices.dim() < 2 or indices.shape[-1] != num_codebooks:
        raise ValueError(f"indices has shape {tuple(indices.shape)}: must be [..., {num_codebooks}], one a codebook")
    return indices.squeeze(-1) if num_codebooks == 1 else indices


def index_dtype(codebook_size: int) -> torch.dtype:
    """int32 as the peer has it, and int64 where that cannot number all codes."""
    return torch.int32 if codebook_size <= 2**31 else torch.int64
