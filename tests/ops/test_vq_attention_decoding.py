"""Laws of single steps in place: the same outputs and the same state as `vq_attention`, whatever was read before."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from vqkit.ops.nearest_code import nearest_index
from vqkit.ops.vq_attention import AttentionState, DecodingState, attention_state, codes_of, decoding_state, step_, vq_attention
from vqkit.ops.vq_attention import decoding as module
from vqkit.ops.vq_attention.api import VQAttentionOutput

KEY, VALUE, CODES, BATCH = 4, 5, 6, 2


def _draw(time: int, mem_len: int, heads: int, group: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    torch.manual_seed(7)
    codebook = torch.randn(heads, CODES, KEY, dtype=dtype)
    k = torch.randn(BATCH, heads, time, KEY, dtype=dtype)
    indices = nearest_index(k, codebook)
    return {
        "q": torch.randn(BATCH, heads * group, time, KEY, dtype=dtype),
        "k": k,
        "k_hat": torch.stack([codebook[h][indices[:, h]] for h in range(heads)], 1),
        "v": torch.randn(BATCH, heads, time, VALUE, dtype=dtype),
        "indices": indices,
        "codebook": codebook,
        "position_query": torch.randn(BATCH, heads * group, time, KEY, dtype=dtype),
        "position_keys": torch.randn(heads, mem_len + 1, KEY, dtype=dtype),
    }


def _whole(
    arguments: dict[str, Tensor], mem_len: int, start: int, stop: int, state: AttentionState | None, cache: bool
) -> VQAttentionOutput:
    tokens = {name: arguments[name][:, :, start:stop] for name in ("q", "k_hat", "v", "indices", "position_query")}
    constants = {name: arguments[name] for name in ("codebook", "position_keys")}
    return vq_attention(**tokens, **constants, block_len=3, mem_len=mem_len, state=state, cache=cache, impl="recurrent")


def _step(arguments: dict[str, Tensor], at: int, decoding: DecodingState, cache: bool) -> Tensor:
    q, k, v, position_query = (arguments[name][:, :, at : at + 1] for name in ("q", "k", "v", "position_query"))
    return step_(q, v, codes_of(k, decoding), decoding, position_query, cache=cache)


def _as_state(decoding: DecodingState, like: AttentionState) -> AttentionState:
    return attention_state(decoding, like.v.dtype, like.segment, like.cached_segment)


@pytest.mark.parametrize(("heads", "group"), [(1, 1), (2, 1), (2, 3)])
@pytest.mark.parametrize("before", [1, 2, 13])
@pytest.mark.parametrize(("mem_len", "cache"), [(1, True), (4, True), (4, False), (7, True)])
def test_steps_equal_the_recurrent_form_in_output_and_state(heads: int, group: int, before: int, mem_len: int, cache: bool) -> None:
    time = before + 3 * mem_len + 5
    arguments = _draw(time, mem_len, heads, group)
    state = _whole(arguments, mem_len, 0, before, None, cache).state
    decoding = decoding_state(state, arguments["codebook"], arguments["position_keys"], slot=before % (mem_len + 1))
    places = [tensor.data_ptr() for tensor in decoding]
    expected = _whole(arguments, mem_len, before, time, state, cache).output
    for at in range(before, time):
        torch.testing.assert_close(_step(arguments, at, decoding, cache), expected[:, :, at - before : at - before + 1], rtol=0, atol=1e-12)
        like = _whole(arguments, mem_len, before, at + 1, state, cache).state
        torch.testing.assert_close(_as_state(decoding, like), like, rtol=0, atol=1e-12)
    assert places == [tensor.data_ptr() for tensor in decoding], "nothing grows and nothing is replaced"


def test_there_need_be_no_positions() -> None:
    arguments, mem_len = _draw(9, 3, 2, 1), 3
    state = _whole(arguments, mem_len, 0, 8, None, True).state
    tokens = {name: arguments[name][:, :, 8:] for name in ("q", "k_hat", "v", "indices")}
    expected = vq_attention(**tokens, codebook=arguments["codebook"], block_len=3, mem_len=mem_len, state=state).output
    found = step_(tokens["q"], tokens["v"], tokens["indices"][:, :, 0], decoding_state(state, arguments["codebook"]))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_go_on_from_a_copy_bit_for_bit(dtype: torch.dtype) -> None:
    mem_len = 4
    arguments = _draw(40, mem_len, 2, 1, dtype)
    state = _whole(arguments, mem_len, 0, 1, None, True).state
    unbroken = decoding_state(state, arguments["codebook"], arguments["position_keys"])
    for at in range(1, 17):
        _step(arguments, at, unbroken, True)
    copy = _as_state(unbroken, state)
    resumed = decoding_state(copy, arguments["codebook"], arguments["position_keys"], slot=int(unbroken.slot))
    kept = [tensor.clone() for tensor in copy]
    for at in range(17, 40):
        assert torch.equal(_step(arguments, at, unbroken, True), _step(arguments, at, resumed, True))
    assert all(torch.equal(a, b) for a, b in zip(kept, copy, strict=True)), "a state that was taken is a value"
    assert all(torch.equal(a, b) for a, b in zip(_as_state(unbroken, state), _as_state(resumed, state), strict=True))


def test_narrow_activations_keep_wide_counts_and_means() -> None:
    mem_len, arguments = 4, _draw(30, 4, 2, 1, torch.float32)
    narrow = {
        name: tensor.bfloat16() if tensor.is_floating_point() and name != "codebook" else tensor for name, tensor in arguments.items()
    }
    state = _whole(narrow, mem_len, 0, 1, None, True).state
    decoding = decoding_state(state, narrow["codebook"], narrow["position_keys"])
    for at in range(1, 30):
        q, v, indices, position_query = (narrow[name][:, :, at : at + 1] for name in ("q", "v", "indices", "position_query"))
        output = step_(q, v, indices[:, :, 0], decoding, position_query)
        expected = _whole(narrow, mem_len, at, at + 1, state, True)
        state = expected.state
        assert output.dtype == torch.bfloat16
        torch.testing.assert_close(output, expected.output, rtol=1e-2, atol=1e-2)
    found = _as_state(decoding, state)
    assert (found.v.dtype, found.k_hat.dtype, found.mean.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert torch.equal(found.count, state.count)
    torch.testing.assert_close(found.mean, state.mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("few", [0, 1 << 18])
def test_the_code_of_a_key_is_the_nearest(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FEW_DIFFERENCES", few)
    arguments = _draw(12, 3, 2, 1)
    arguments["codebook"][1, 4] = arguments["codebook"][1, 2]
    decoding = decoding_state(_whole(arguments, 3, 0, 1, None, True).state, arguments["codebook"])
    for at in range(12):
        found = codes_of(arguments["k"][:, :, at : at + 1], decoding)
        assert torch.equal(found, nearest_index(arguments["k"], arguments["codebook"])[:, :, at])


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_a_step_compiles_to_one_graph(backend: str) -> None:
    arguments, mem_len = _draw(12, 3, 2, 1), 3
    state = _whole(arguments, mem_len, 0, 1, None, True).state
    eager, compiled = (decoding_state(state, arguments["codebook"], arguments["position_keys"]) for _ in range(2))
    step = torch.compile(_step_on, fullgraph=True, backend=backend)
    for at in range(1, 12):
        tokens = [arguments[name][:, :, at : at + 1] for name in ("q", "k", "v", "position_query")]
        torch.testing.assert_close(step(*tokens, compiled), _step_on(*tokens, eager), rtol=0, atol=1e-12)
    for a, b in itertools.zip_longest(_as_state(eager, state), _as_state(compiled, state)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def _step_on(q: Tensor, k: Tensor, v: Tensor, position_query: Tensor, decoding: DecodingState) -> Tensor:
    return step_(q, v, codes_of(k, decoding), decoding, position_query)
