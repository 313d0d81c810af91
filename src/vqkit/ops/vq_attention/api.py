"""The public function: checks its arguments, chooses an implementation, returns output and state.

Shapes: B batch, Hq query heads, Hk key heads, T time, K key width, V value width, C codes, M window memory.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from vqkit.ops.precision import without_autocast
from vqkit.ops.vq_attention.blocked import ReductionName, blocked_attention
from vqkit.ops.vq_attention.inputs import AttentionInputs, Positions
from vqkit.ops.vq_attention.recurrent import recurrent_attention
from vqkit.ops.vq_attention.reference import reference_attention
from vqkit.ops.vq_attention.state import AttentionState, initial_state

Implementation = Literal["auto", "reference", "recurrent", "blocked"]


class VQAttentionOutput(NamedTuple):
    """Output [B, Hq, T, V] in the type of `v`, and the state after the last token."""

    output: Tensor
    state: AttentionState


def vq_attention(
    q: Tensor,
    k_hat: Tensor,
    v: Tensor,
    indices: Tensor,
    codebook: Tensor,
    *,
    block_len: int,
    mem_len: int,
    state: AttentionState | None = None,
    position_query: Tensor | None = None,
    position_keys: Tensor | None = None,
    segments: Tensor | None = None,
    cache: bool = True,
    cache_gradient: bool = True,
    reduction: ReductionName = "auto",
    impl: Implementation = "auto",
) -> VQAttentionOutput:
    """Causal softmax attention over quantized keys (Lingle 2024, arXiv 2309.16354, section 3).

    Query i weighs every key j <= i of its document by exp(q_i . k_hat_j + bias), where the bias is
    position_query_i . position_keys[i - j] for distances of at most `mem_len` and 0 beyond. With `cache` off,
    keys further back than `mem_len` are not seen at all. The value does not depend on `block_len`. The gradient
    does: keys in the window of a query's block (the block and `mem_len` keys before it) receive one through
    `k_hat`; for older keys it reaches the values only, and the codebook receives none.

    Autocast casts queries, keys and values, as it does for ordinary attention; softmax, counts and means are float32 or wider always.

    Args:
        q: Queries [B, Hq, T, K], already scaled, content bias included. Hq is a multiple of Hk; Hq / Hk query heads in a row
            share a key head (equal: multi-head, Hk = 1: multi-query, between: grouped).
        k_hat: Quantized keys [B, Hk, T, K], equal to `codebook[indices]` in value.
        v: Values [B, Hk, T, V].
        indices: Codes of the keys [B, Hk, T], integers in 0 .. C - 1.
        codebook: Codes [Hk, C, K].
        block_len: Queries per block (L); any T is accepted.
        mem_len: Keys before a block that are attended one by one (M).
        state: What an earlier call returned; None for the start of a sequence.
        position_query: Queries of the positional term [B, Hq, T, K]; None for none.
        position_keys: Keys of the positional term [Hk, M + 1, K], row d for distance d.
        segments: Document of each token [B, T], integers that never decrease along T and go on from the state's;
            queries see their own document only. None: one document.
        cache: Whether keys older than the window are attended, through the cache.
        cache_gradient: Whether gradients pass from a block to earlier ones.
        reduction: How the blocked form comes by what each block finds in the cache; equal but for rounding. "auto" carries sums from block
            to block and holds the means of one group of blocks at a time. The others hold [B, Hk, T / L, C, V] means at once, in
            several copies, as the official code does: "serial" block by block, "matmul" by a product with a triangular matrix
            ((T / L)^2 C V operations a head), "associative" in log2(T / L) rounds.
        impl: "reference" (dense, defines the meaning), "recurrent" (block by block), "blocked" (fast), or "auto".

    Raises:
        ValueError: shapes that do not fit, a state of other sizes, an unknown `impl` or `reduction`.
    """
    if (position_query is None) != (position_keys is None):
        raise ValueError("position_query and position_keys come together: pass both or neither")
    q, k_hat, v = (_as_under_autocast(t) for t in (q, k_hat, v))
    positions = None
    if position_query is not None and position_keys is not None:
        positions = Positions(_as_under_autocast(position_query), _as_under_autocast(position_keys))
    inputs = AttentionInputs(q, k_hat, v, indices.long(), codebook.detach(), positions, segments)
    _check_choices(block_len, mem_len, reduction, impl)
    _check_shapes(inputs, mem_len)
    _check_values(inputs)
    state = _checked_state(state, inputs, mem_len)
    if impl == "auto":
        impl = "recurrent" if q.shape[2] <= block_len else "blocked"
    options = (block_len, mem_len, cache, cache_gradient)
    with without_autocast(q.device.type):
        if impl == "blocked":
            return VQAttentionOutput(*blocked_attention(inputs, state, *options, reduction))
        run = recurrent_attention if impl == "recurrent" else reference_attention
        return VQAttentionOutput(*run(inputs, state, *options))


def _as_under_autocast(x: Tensor) -> Tensor:
    """As autocast treats the operands of a matrix product: in its type, unless they are float64."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def _checked_state(state: AttentionState | None, inputs: AttentionInputs, mem_len: int) -> AttentionState:
    batch, heads, _, key_dim = inputs.k_hat.shape
    size, value_dim = inputs.codebook.shape[1], inputs.v.shape[-1]
    if state is None:
        return initial_state(batch, heads, mem_len, size, key_dim, value_dim, dtype=inputs.v.dtype, device=inputs.q.device)
    expected = {
        "k_hat": (batch, heads, mem_len, key_dim),
        "v": (batch, heads, mem_len, value_dim),
        "count": (batch, heads, size),
        "mean": (batch, heads, size, value_dim),
    }
    for name, shape in expected.items():
        found = tuple(getattr(state, name).shape)
        if found != shape:
            raise ValueError(f"state.{name} has shape {found}, these inputs need {shape}: pass the state of the same model and batch")
    return state


def _check_choices(block_len: int, mem_len: int, reduction: str, impl: str) -> None:
    for name, value, choices in (("reduction", reduction, get_args(ReductionName)), ("impl", impl, get_args(Implementation))):
        if value not in choices:
            raise ValueError(f"{name} = {value!r}: must be one of {', '.join(map(repr, choices))}")
    for name, value in (("block_len", block_len), ("mem_len", mem_len)):
        if value < 1:
            raise ValueError(f"{name} = {value}: must be at least 1")


def _check_shapes(inputs: AttentionInputs, mem_len: int) -> None:
    q, k_hat = inputs.q, inputs.k_hat
    if q.dim() != 4 or q.shape[2] < 1:
        raise ValueError(f"q has shape {tuple(q.shape)}: must be [B, Hq, T, K] with at least one token")
    batch, query_heads, time, key_dim = q.shape
    if k_hat.dim() != 4 or k_hat.shape[1] < 1 or query_heads % k_hat.shape[1]:
        raise ValueError(
            f"k_hat has shape {tuple(k_hat.shape)}: must be [B, Hk, T, K] with a number of heads that divides the {query_heads} of q"
        )
    heads = k_hat.shape[1]
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "k_hat": (k_hat, (batch, heads, time, key_dim)),
        "v": (inputs.v, (batch, heads, time, inputs.v.shape[-1])),
        "indices": (inputs.indices, (batch, heads, time)),
        "codebook": (inputs.codebook, (heads, inputs.codebook.shape[1], key_dim)),
    }
    if inputs.positions is not None:
        expected["position_query"] = (inputs.positions.query, (batch, query_heads, time, key_dim))
        expected["position_keys"] = (inputs.positions.keys, (heads, mem_len + 1, key_dim))
    if inputs.segments is not None:
        expected["segments"] = (inputs.segments, (batch, time))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: must be {shape} to fit q of shape {tuple(q.shape)}")


def _check_values(inputs: AttentionInputs) -> None:
    if inputs.indices.device.type != "cpu" or torch.compiler.is_compiling():
        return
    size = inputs.codebook.shape[1]
    low, high = inputs.indices.aminmax()
    if low == -1:
        raise ValueError("indices hold -1, the code of a key that is not finite: look for NaN or Inf in the input of the attention")
    if low < 0 or high >= size:
        raise ValueError(f"indices hold values from {int(low)} to {int(high)}: must be in 0 .. {size - 1}, the codes of the codebook")
    if inputs.segments is not None and bool((inputs.segments.diff(dim=1) < 0).any()):
        raise ValueError("segments decrease along a row: must be document numbers that never decrease, so that each document is one run")
