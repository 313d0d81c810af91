"""What ordinary attention carries from one call to the next: all keys and values so far."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class KeyValueState(NamedTuple):
    """The keys and values of all S earlier slots, oldest first; a slot without a token is of no consequence.

    Absent slots stand before the others, so that states of unequal length can be padded on the left and joined.
    Shapes: B batch, H key heads, S slots, K key width, V value width.
    """

    k: Tensor  # [B, H, S, K]
    v: Tensor  # [B, H, S, V]
    present: Tensor  # [B, S] bool, whether there is a token
    segment: Tensor  # [B, S] int64, its document; 0 where documents are not told apart

    def detach(self) -> KeyValueState:
        """The same state, cut from the graph that made it."""
        return KeyValueState(*(t.detach() for t in self))


def empty_state(
    batch: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> KeyValueState:
    """The state before any token."""
    return KeyValueState(
        k=torch.zeros(batch, heads, 0, key_dim, dtype=dtype, device=device),
        v=torch.zeros(batch, heads, 0, value_dim, dtype=dtype, device=device),
        present=torch.zeros(batch, 0, dtype=torch.bool, device=device),
        segment=torch.zeros(batch, 0, dtype=torch.int64, device=device),
    )
