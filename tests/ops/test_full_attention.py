"""Ordinary attention: the fused form is the reference in value and gradient, also in calls, in documents and in padded states."""

from typing import Any

import pytest
import torch
from torch import Tensor

from vqkit.ops.full_attention import KeyValueState, empty_state, full_attention

BATCH, HEADS, KEY_HEADS, KEY, VALUE, TIME = 2, 4, 2, 3, 5, 9
SEGMENTS = torch.tensor([[0, 0, 1, 1, 1, 1, 2, 2, 2], [0] * 9])


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def inputs(positions: bool, key_heads: int = KEY_HEADS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    found = {"q": normal(BATCH, HEADS, TIME, KEY), "k": normal(BATCH, key_heads, TIME, KEY), "v": normal(BATCH, key_heads, TIME, VALUE)}
    if positions:
        found |= {"position_query": normal(BATCH, HEADS, TIME, KEY), "position_keys": normal(key_heads, TIME, KEY)}
    return found


def part(tensors: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {key: t[:, :stop] if key == "position_keys" else t[:, :, start:stop] for key, t in tensors.items()}


def in_calls(tensors: dict[str, Tensor], lengths: list[int], segments: Tensor | None, impl: Any) -> tuple[Tensor, KeyValueState]:
    state, outputs, start = None, [], 0
    for length in lengths:
        own = None if segments is None else segments[:, start : start + length]
        output, state = full_attention(**part(tensors, start, start + length), state=state, segments=own, impl=impl)
        outputs.append(output)
        start += length
    assert state is not None
    return torch.cat(outputs, 2), state


def plain(tensors: dict[str, Tensor], segments: Tensor | None) -> Tensor:
    """One query at a time."""
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    output = torch.zeros(BATCH, HEADS, TIME, VALUE, dtype=q.dtype)
    for b in range(BATCH):
        for h in range(HEADS):
            own = h * k.shape[1] // HEADS
            for i in range(TIME):
                seen = [j for j in range(i + 1) if segments is None or segments[b, i] == segments[b, j]]
                scores = torch.stack([q[b, h, i] @ k[b, own, j] for j in seen])
                if "position_query" in tensors:
                    scores = scores + torch.stack([tensors["position_query"][b, h, i] @ tensors["position_keys"][own, i - j] for j in seen])
                output[b, h, i] = scores.softmax(0) @ v[b, own, seen]
    return output


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one document", "several"])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("positions", [False, True])
def test_the_reference_is_the_definition(positions: bool, key_heads: int, segments: Tensor | None) -> None:
    tensors = {key: t.detach() for key, t in inputs(positions, key_heads).items()}
    close(full_attention(**tensors, segments=segments, impl="reference").output, plain(tensors, segments))


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one document", "several"])
@pytest.mark.parametrize("lengths", [[9], [1] * 9, [4, 1, 4]], ids=str)
@pytest.mark.parametrize("positions", [False, True])
def test_fused_is_the_reference_and_calls_are_one_call(positions: bool, lengths: list[int], segments: Tensor | None) -> None:
    for key_heads in (KEY_HEADS, HEADS):
        expected_of, found_of = inputs(positions, key_heads), inputs(positions, key_heads)
        expected = full_attention(**expected_of, segments=segments, impl="reference")
        output, state = in_calls(found_of, lengths, segments, "fused")
        close(output, expected.output)
        close(state, expected.state)
        weight = torch.linspace(-1, 1, VALUE, dtype=torch.float64)
        for tensor in (output, expected.output):
            (tensor * weight).sum().backward()
        close([t.grad for t in found_of.values()], [t.grad for t in expected_of.values()])


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("impl", ["reference", "fused"])
def test_absent_slots_on_the_left_are_of_no_consequence(positions: bool, impl: Any) -> None:
    tensors = {key: t.detach() for key, t in inputs(positions).items()}
    state = full_attention(**part(tensors, 0, 6), impl=impl).state
    padded = KeyValueState(
        k=torch.cat([torch.full_like(state.k[:, :, :3], 7.0), state.k], 2),
        v=torch.cat([torch.full_like(state.v[:, :, :3], 7.0), state.v], 2),
        present=torch.cat([torch.zeros(BATCH, 3, dtype=torch.bool), state.present], 1),
        segment=torch.cat([torch.zeros(BATCH, 3, dtype=torch.int64), state.segment], 1),
    )
    expected = full_attention(**part(tensors, 6, 9), state=state, impl=impl)
    later = part(tensors, 6, 9)
    if positions:  # distances of the absent slots, whatever they are
        later["position_keys"] = torch.cat([later["position_keys"], torch.ones(KEY_HEADS, 3, KEY, dtype=torch.float64)], 1)
    found = full_attention(**later, state=padded, impl=impl)
    close(found.output, expected.output)


def test_types() -> None:
    tensors = {key: t.detach().bfloat16() for key, t in inputs(True).items()}
    for impl in ("reference", "fused"):
        out = full_attention(**tensors, impl=impl)
        assert out.output.dtype == torch.bfloat16 and out.state.k.dtype == torch.bfloat16
    error = (full_attention(**tensors).output.double() - plain({key: t.double() for key, t in tensors.items()}, None)).abs().max()
    assert error < 3e-2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": torch.zeros(2, 4, 0, 3)}, r"q has shape \(2, 4, 0, 3\): must be \[B, Hq, T, K\] with at least one token"),
        ({"k": torch.zeros(2, 3, 9, 3)}, r"k has shape \(2, 3, 9, 3\): must be \[2, Hk, 9, 3\] with Hk a divisor of 4"),
        ({"v": torch.zeros(2, 1, 9, 5)}, r"v has shape \(2, 1, 9, 5\)"),
        ({"segments": torch.zeros(2, 8, dtype=torch.int64)}, r"segments has shape \(2, 8\): must be \(2, 9\)"),
        ({"position_keys": None}, "position_query and position_keys come together"),
        ({"position_keys": torch.zeros(2, 8, 3)}, r"position_keys has shape \(2, 8, 3\): must be \(2, 9, 3\), a key for every distance"),
        ({"position_query": torch.zeros(2, 2, 9, 3)}, r"position_query has shape \(2, 2, 9, 3\)"),
        ({"state": empty_state(3, 2, 3, 5)}, r"state.k has shape \(3, 2, 0, 3\), these inputs need \(2, 2, 0, 3\)"),
        ({"state": empty_state(2, 2, 3, 4)}, r"state.v has shape \(2, 2, 0, 4\)"),
        ({"impl": "flash"}, "impl = 'flash': must be"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        full_attention(**{**inputs(True), **changed})
