"""VQ attention one token at a time, in place: what a step of decoding needs lies in one table, and nothing else is moved or copied.

Shapes: B batch, Hq query heads, H key heads, M window memory, S = M + 1 slots, C codes, K key width, V value width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vqkit.ops.nearest_code import nearest_index
from vqkit.ops.precision import without_autocast
from vqkit.ops.vq_attention.state import AttentionState

_FEW_DIFFERENCES = 1 << 18


class DecodingState(NamedTuple):
    """An `AttentionState` and the constants beside it, laid out for single steps; `step_` changes it in place.

    A row is one key with one value: the S slots of a ring that hold the window, then the codes with the mean values of what has left
    it. A row that stands for n tokens has log(n) added to its score: 0 for a token of the window, -inf for an empty row.
    All floats are float32, or float64 for float64 activations.
    """

    keys: Tensor  # [B, H, S + C, K]
    values: Tensor  # [B, H, S + C, V]
    tokens: Tensor  # [B, H, S + C] number of tokens that each row stands for
    home: Tensor  # [B H, S] int64, the row, counted over all B and H, of the code of each slot's token; any where there is none
    first: Tensor  # [B H] int64, the first row of each lane, so counted
    slot: Tensor  # [1] int64, where the next token goes; what is there is the oldest token, M + 1 before it
    distance: Tensor  # [S] int64, how far each slot will be from the next token
    position_keys: Tensor  # [H, S, K], row d for distance d; [H, 0, K]: none

    def detach(self) -> DecodingState:
        """Itself: no step has a graph."""
        return self


def decoding_state(state: AttentionState, codebook: Tensor, position_keys: Tensor | None = None, *, slot: int = 0) -> DecodingState:
    """The state of `step_` after `state`, whose window must be of one document; a copy.

    codebook [H, C, K]; position_keys [H, M + 1, K] as in `vq_attention`. `slot` in 0 .. M turns the ring, which changes no value but
    the order of sums: with the slot of an earlier decoding state steps go on as they would have there, bit for bit.
    """
    batch, heads, mem_len, key_dim = state.k_hat.shape
    size, value_dim, slots, wide = codebook.shape[1], state.v.shape[-1], mem_len + 1, state.mean.dtype
    codebook = codebook.detach().to(wide)
    device = state.v.device
    order = (slot + 1 + torch.arange(mem_len, device=device)) % slots
    first = torch.arange(batch * heads, device=device) * (slots + size)

    keys = torch.zeros(batch, heads, slots + size, key_dim, dtype=wide, device=device)
    values = torch.zeros(batch, heads, slots + size, value_dim, dtype=wide, device=device)
    tokens = torch.zeros(batch, heads, slots + size, dtype=wide, device=device)
    home = (first + slots)[:, None].repeat(1, slots)
    for rows, window, codes in (
        (keys, state.k_hat, codebook),
        (values, state.v, state.mean),
        (tokens, state.indices >= 0, state.count),
    ):
        rows[:, :, order] = window.to(wide)
        rows[:, :, slots:] = codes
    home[:, order] += state.indices.clamp(min=0).flatten(0, 1)
    distance = (slot - torch.arange(slots, device=device)) % slots
    position_keys = codebook[:, :0] if position_keys is None else position_keys.detach().to(wide)
    return DecodingState(keys, values, tokens, home, first, torch.full((1,), slot, device=device), distance, position_keys)


def attention_state(decoding: DecodingState, dtype: torch.dtype, segment: Tensor, cached_segment: Tensor) -> AttentionState:
    """The state that `vq_attention` would have here; a copy. Keys and values of the window are of `dtype`, as activations are.

    segment [B, M] and cached_segment [B] are documents, which single steps know nothing of.
    """
    slots = len(decoding.distance)
    order = decoding.distance.argsort(descending=True)[:-1]  # last stands the next token's slot, whose token has left the window
    values, tokens = decoding.values.clone(), decoding.tokens.clone()
    _retire_(decoding._replace(values=values, tokens=tokens))
    indices = (decoding.home - decoding.first[:, None] - slots)[:, order].unflatten(0, tokens.shape[:2])
    return AttentionState(
        k_hat=decoding.keys[:, :, order].to(dtype),
        v=values[:, :, order].to(dtype),
        indices=indices.masked_fill(tokens[:, :, order] == 0, -1),
        count=tokens[:, :, slots:].clone(),
        mean=values[:, :, slots:].clone(),
        segment=segment,
        cached_segment=cached_segment,
    )


def codes_of(k: Tensor, decoding: DecodingState) -> Tensor:
    """Keys [B, H, 1, K] -> the code nearest to each, [B, H] int64, the lowest among equals."""
    codes = decoding.keys[:, :, len(decoding.distance) :]
    if codes.numel() <= _FEW_DIFFERENCES:
        return (codes - k).square().sum(-1).argmin(-1)
    return nearest_index(k.squeeze(2).transpose(0, 1), codes[0]).mT


def step_(
    q: Tensor, v: Tensor, indices: Tensor, decoding: DecodingState, position_query: Tensor | None = None, *, cache: bool = True
) -> Tensor:
    """Read one token: the output [B, Hq, 1, V] of `vq_attention` for it, in the type of `v`; `decoding` is that after it.

    q, position_query [B, Hq, 1, K] and v [B, H, 1, V] as in `vq_attention`; indices [B, H] int64, the codes of its keys. No gradient,
    and nothing is checked: the caller has, once.
    """
    with torch.no_grad(), without_autocast(q.device.type):
        _retire_(decoding)
        _take_in_(v, indices, decoding)
        output = _attend(q, decoding, position_query, cache).to(v.dtype)
        slots = len(decoding.distance)
        decoding.slot.add_(1).remainder_(slots)
        decoding.distance.add_(1).remainder_(slots)
    return output


def _retire_(decoding: DecodingState) -> None:
    """The oldest token enters count and mean of its code; its slot is free."""
    rows, tokens = decoding.values.flatten(0, 2), decoding.tokens.flatten()
    oldest = decoding.first + decoding.slot
    code = decoding.home.index_select(1, decoding.slot).squeeze(1)
    there = tokens.index_select(0, oldest)
    count = tokens.index_select(0, code) + there
    # Each token moves the mean of its code by its share; a code that gains nothing stays exactly as it was.
    share = there / count.clamp(min=1)
    mean = torch.lerp(rows.index_select(0, code), rows.index_select(0, oldest), share.unsqueeze(1))
    rows.index_copy_(0, code, mean)
    tokens.index_copy_(0, code, count)


def _take_in_(v: Tensor, indices: Tensor, decoding: DecodingState) -> None:
    """The new token into the slot of the oldest."""
    keys, rows, tokens = decoding.keys.flatten(0, 2), decoding.values.flatten(0, 2), decoding.tokens.flatten()
    newest = decoding.first + decoding.slot
    code = decoding.first + len(decoding.distance) + indices.flatten()
    k_hat = keys.index_select(0, code)
    keys.index_copy_(0, newest, k_hat.to(v.dtype).to(k_hat.dtype))
    rows.index_copy_(0, newest, v.flatten(0, 2).to(rows.dtype))
    tokens.index_fill_(0, newest, 1)
    decoding.home.index_copy_(1, decoding.slot, code.unsqueeze(1))


def _attend(q: Tensor, decoding: DecodingState, position_query: Tensor | None, cache: bool) -> Tensor:
    slots, wide = len(decoding.distance), decoding.values.dtype
    batch, heads, rows, key_dim = decoding.keys.shape
    seen = rows if cache else slots
    group = (batch, heads, q.shape[1] // heads, key_dim)  # the query heads of a key head
    scores = q.to(wide).reshape(group) @ decoding.keys[:, :, :seen].mT + decoding.tokens[:, :, None, :seen].log()
    if position_query is not None:
        near = position_query.to(wide).reshape(group) @ decoding.position_keys.mT
        scores[..., :slots] += near.index_select(-1, decoding.distance)
    return (scores.softmax(-1) @ decoding.values[:, :, :seen]).flatten(1, 2).unsqueeze(2)
