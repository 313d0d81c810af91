"""The public function: checks its arguments, chooses an implementation, returns output and state."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vqkit.ops.full_attention.fused import fused_attention
from vqkit.ops.full_attention.inputs import Inputs, causal_mask
from vqkit.ops.full_attention.reference import reference_attention
from vqkit.ops.full_attention.state import KeyValueState, empty_state

Implementation = Literal["auto", "reference", "fused"]


class FullAttentionOutput(NamedTuple):
    """Output [B, Hq, T, V] in the type of `v`, and the state after the last token."""

    output: Tensor
    state: KeyValueState


def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    state: KeyValueState | None = None,
    position_query: Tensor | None = None,
    position_keys: Tensor | None = None,
    segments: Tensor | None = None,
    impl: Implementation = "auto",
) -> FullAttentionOutput:
    """Causal softmax attention: query i weighs each key j <= i of its document by exp(q_i . k_j + bias).

    The bias is position_query_i . position_keys[i - j], or nothing without positions.
    The "full" attention of the official Transformer-VQ (Lingle 2024), with the relative positions of Transformer-XL (Dai et al. 2019).

    Args:
        q: Queries [B, Hq, T, K], already scaled, content bias included.
        k: Keys [B, Hk, T, K]; Hq is a multiple of Hk, and consecutive query heads share a key head.
        v: Values [B, Hk, T, V].
        state: What an earlier call returned; None for the start of a sequence.
        position_query: Queries of the positional term [B, Hq, T, K]; None for none.
        position_keys: Keys of the positional term [Hk, S + T, K], row d for distance d, for S slots of the state.
        segments: Document of each token [B, T], never decreasing along T, going on from the state's; None: one document.
        impl: "reference" (dense, defines the meaning), "fused" (scaled_dot_product_attention), or "auto".

    Raises:
        ValueError: shapes that do not fit, a state of other sizes, an unknown `impl`.
    """
    if impl not in ("auto", "reference", "fused"):
        raise ValueError(f'impl = {impl!r}: must be "auto", "reference" or "fused"')
    if (position_query is None) != (position_keys is None):
        raise ValueError("position_query and position_keys come together: pass both or neither")
    _check_shapes(q, k, v, segments)
    if state is None:
        state = empty_state(k.shape[0], k.shape[1], k.shape[3], v.shape[3], dtype=v.dtype, device=v.device)
    _check_state(state, k, v)
    new = _next_state(state, k, v, segments)
    _check_positions(position_query, position_keys, q, new.k)
    inputs = Inputs(q, new.k, new.v, position_query, position_keys, _seen(state, new, segments))
    run = reference_attention if impl == "reference" else fused_attention
    return FullAttentionOutput(run(inputs), new)


def _next_state(state: KeyValueState, k: Tensor, v: Tensor, segments: Tensor | None) -> KeyValueState:
    present = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
    segment = torch.zeros_like(present, dtype=torch.int64) if segments is None else segments
    return KeyValueState(
        k=torch.cat([state.k, k], 2),
        v=torch.cat([state.v, v], 2),
        present=torch.cat([state.present, present], 1),
        segment=torch.cat([state.segment, segment], 1),
    )


def _seen(state: KeyValueState, new: KeyValueState, segments: Tensor | None) -> Tensor | None:
    """[B, 1, T, S + T]: which slot each query may see; None where it is the causal mask alone, over no carried slot."""
    carried, slots = state.k.shape[2], new.k.shape[2]
    if carried == 0 and segments is None:
        return None
    seen = causal_mask(slots - carried, slots, new.k.device) & new.present[:, None, :]
    if segments is not None:
        seen = seen & (segments[:, :, None] == new.segment[:, None, :])
    return seen[:, None]


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None) -> None:
    if q.dim() != 4 or q.shape[2] < 1:
        raise ValueError(f"q has shape {tuple(q.shape)}: must be [B, Hq, T, K] with at least one token")
    batch, heads, time, width = q.shape
    if k.dim() != 4 or (k.shape[0], *k.shape[2:]) != (batch, time, width) or k.shape[1] < 1 or heads % k.shape[1]:
        expected = f"[{batch}, Hk, {time}, {width}] with Hk a divisor of {heads}, the heads of q"
        raise ValueError(f"k has shape {tuple(k.shape)}: must be {expected}")
    if v.dim() != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v has shape {tuple(v.shape)}: must be {(*k.shape[:3], 'V')} to fit k")
    if segments is not None and segments.shape != (batch, time):
        raise ValueError(f"segments has shape {tuple(segments.shape)}: must be {(batch, time)}")


def _check_state(state: KeyValueState, k: Tensor, v: Tensor) -> None:
    batch, heads, _, key_dim = k.shape
    slots = state.present.shape[-1]
    expected = {
        "k": (batch, heads, slots, key_dim),
        "v": (batch, heads, slots, v.shape[3]),
        "present": (batch, slots),
        "segment": (batch, slots),
    }
    for name, shape in expected.items():
        found = tuple(getattr(state, name).shape)
        if found != shape:
            raise ValueError(f"state.{name} has shape {found}, these inputs need {shape}: pass the state of the same model and batch")


def _check_positions(query: Tensor | None, keys: Tensor | None, q: Tensor, k: Tensor) -> None:
    if query is None or keys is None:
        return
    if query.shape != q.shape:
        raise ValueError(f"position_query has shape {tuple(query.shape)}: must be {tuple(q.shape)}, that of q")
    if keys.shape != (shape := (k.shape[1], k.shape[2], k.shape[3])):
        raise ValueError(f"position_keys has shape {tuple(keys.shape)}: must be {shape}, a key for every distance")
