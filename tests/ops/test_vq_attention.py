"""Laws of VQ attention: every implementation equals the dense reference, in value, gradient and state."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import golden_arrays
from vqkit.ops.vq_attention import AttentionState, blocked, groups, initial_state, vq_attention
from vqkit.ops.vq_attention.inputs import cache_bias, window_mask
from vqkit.ops.vq_attention.recurrent import _band

FAST = {
    "recurrent": {"impl": "recurrent"},
    "blocked": {"impl": "blocked"},
    **{name: {"impl": "blocked", "reduction": name} for name in ("serial", "matmul", "associative")},
}
ALL = {"reference": {"impl": "reference"}, **FAST}
KEY, VALUE, CODES, BATCH = 4, 5, 6, 2


def draw(
    time: int, mem_len: int, *, heads: int = 2, group: int = 1, positions: bool = True, segments: int = 0, codebook: Tensor | None = None
) -> dict:
    """Arguments of one call in float64; `group` query heads for each of `heads` key heads; `segments` documents a row, 0 for none."""
    codebook = torch.randn(heads, CODES, KEY, dtype=torch.float64) if codebook is None else codebook
    indices = torch.randint(0, CODES, (BATCH, heads, time))
    arguments = {
        "q": torch.randn(BATCH, heads * group, time, KEY, dtype=torch.float64),
        "k_hat": torch.stack([codebook[h][indices[:, h]] for h in range(heads)], 1),
        "v": torch.randn(BATCH, heads, time, VALUE, dtype=torch.float64),
        "indices": indices,
        "codebook": codebook,
        "position_query": torch.randn(BATCH, heads * group, time, KEY, dtype=torch.float64) if positions else None,
        "position_keys": torch.randn(heads, mem_len + 1, KEY, dtype=torch.float64) if positions else None,
        "segments": torch.randint(0, segments, (BATCH, time)).sort(1).values if segments else None,
    }
    return arguments


def part(arguments: dict, start: int, stop: int) -> dict:
    sliced = {name: arguments[name][:, :, start:stop] for name in ("q", "k_hat", "v", "indices")}
    if arguments["position_query"] is not None:
        sliced["position_query"] = arguments["position_query"][:, :, start:stop]
    if arguments["segments"] is not None:
        sliced["segments"] = arguments["segments"][:, start:stop]
    return {**arguments, **sliced}


def carried_state(codebook: Tensor, mem_len: int, segments: bool) -> AttentionState:
    before = draw(11, mem_len, heads=codebook.shape[0], segments=3 if segments else 0, codebook=codebook)
    if segments:
        before["segments"] = before["segments"] - 2
    state = vq_attention(**before, block_len=4, mem_len=mem_len, impl="reference").state
    # Keys of the window keep the values they had under an older codebook.
    return state._replace(k_hat=state.k_hat + 0.1 * torch.randn_like(state.k_hat))


def everything(arguments: dict, state: AttentionState | None, **options) -> dict[str, Tensor]:
    """Output, state and the gradients of a random functional of both, by name."""
    names = [n for n in ("q", "k_hat", "v", "position_query", "position_keys") if arguments[n] is not None]
    leaves = {n: arguments[n].clone().requires_grad_() for n in names}
    if state is not None:
        leaves |= {f"state.{n}": getattr(state, n).clone().requires_grad_() for n in ("k_hat", "v", "mean")}
        state = state._replace(**{n: leaves[f"state.{n}"] for n in ("k_hat", "v", "mean")})
    output, after = vq_attention(**{**arguments, **{n: leaves[n] for n in names}}, state=state, **options)
    generator = torch.Generator().manual_seed(5)
    probe = lambda t: (t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum()  # noqa: E731
    total = probe(output)
    if options.get("cache_gradient", True):
        total = total + probe(after.v) + probe(after.k_hat) + probe(after.mean * (after.count > 0)[..., None])
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    found = {"output": output, **{f"after.{n}": t for n, t in after._asdict().items()}}
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        found[f"grad.{name}"] = torch.zeros_like(leaf) if grad is None else grad
    return found


GRID = list(
    itertools.product(
        (1, 3, 8, 13, 24),
        (1, 4, 6),
        (2, 4, 7),
        ((1, 1), (2, 1), (1, 3), (2, 2)),
        (True, False),
        (True, False),
        (True, False),
        (0, 4),
        (True, False),
        (1, 3_000, 20_000, 1 << 20),  # bytes of a group: from one block of one lane to all blocks of all lanes
    )
)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("share", range(4))
def test_equals_reference_in_value_state_and_gradient(impl: str, share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for case in random.Random(f"{impl} {share}").sample(GRID, 40):
        time, block_len, mem_len, (heads, group), cache, cache_gradient, positions, segments, with_state, group_bytes = case
        monkeypatch.setitem(groups.GROUP_BYTES, "cpu", group_bytes)
        arguments = draw(time, mem_len, heads=heads, group=group, positions=positions, segments=segments)
        state = carried_state(arguments["codebook"], mem_len, bool(segments)) if with_state else None
        options = {"block_len": block_len, "mem_len": mem_len, "cache": cache, "cache_gradient": cache_gradient}
        expected = everything(arguments, state, **options, impl="reference")
        found = everything(arguments, state, **options, **FAST[impl])
        differing = [name for name, value in expected.items() if not torch.allclose(found[name], value, rtol=0, atol=1e-11)]
        assert not differing, f"T={time} heads={heads} x {group} {positions=} {segments=} {with_state=} {group_bytes=} {options}"


@pytest.mark.parametrize("impl", ALL)
def test_grouped_query_heads_are_query_heads_with_copies_of_their_key_head(impl: str) -> None:
    heads, group, options = 2, 3, {"block_len": 4, "mem_len": 5}
    arguments = draw(14, 5, heads=heads, group=group, segments=3)
    state = carried_state(arguments["codebook"], 5, True)
    found = everything(arguments, state, **options, **ALL[impl])
    axes = {"k_hat": 1, "v": 1, "indices": 1, "codebook": 0, "position_keys": 0}
    copied = {**arguments, **{name: arguments[name].repeat_interleave(group, axis) for name, axis in axes.items()}}
    of_heads = {n: getattr(state, n).repeat_interleave(group, 1) for n in ("k_hat", "v", "indices", "count", "mean")}
    output, after = vq_attention(**copied, state=state._replace(**of_heads), **options, impl="reference")
    torch.testing.assert_close(found["output"], output, rtol=0, atol=1e-11)
    for name in of_heads:
        torch.testing.assert_close(found[f"after.{name}"], getattr(after, name)[:, ::group], rtol=0, atol=1e-11)


def test_the_value_does_not_depend_on_the_block_but_the_gradient_does() -> None:
    arguments = draw(24, 4)
    runs = [everything(arguments, None, block_len=length, mem_len=4, impl="reference") for length in (1, 4, 6)]
    for other in runs[1:]:
        torch.testing.assert_close(other["output"], runs[0]["output"], rtol=0, atol=1e-12)
        assert not torch.allclose(other["grad.k_hat"], runs[0]["grad.k_hat"], atol=1e-3)


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("segments", (0, 4))
def test_state_carried_over_calls_is_one_long_call(impl: str, segments: int) -> None:
    arguments = draw(24, 6, segments=segments)
    options = {"block_len": 4, "mem_len": 6, **ALL[impl]}
    whole = vq_attention(**arguments, **options)
    for cuts in ((8, 12, 24), (4, 24), (1, 2, 3, 24), (5, 11, 24)):
        state, outputs, start = None, [], 0
        for stop in cuts:
            output, state = vq_attention(**part(arguments, start, stop), **options, state=state)
            outputs.append(output)
            start = stop
        torch.testing.assert_close(torch.cat(outputs, 2), whole.output, rtol=0, atol=1e-12)
        for name, after in state._asdict().items():
            torch.testing.assert_close(after, getattr(whole.state, name), rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("cache", (True, False))
def test_each_document_is_as_if_it_stood_alone(impl: str, cache: bool) -> None:
    """The oracle: every document of every row in a call of its own, one document, no state."""
    arguments = draw(29, 3, segments=5)
    options = {"block_len": 4, "mem_len": 3, "cache": cache, **ALL[impl]}
    state, outputs = None, []
    for start, stop in ((0, 12), (12, 29)):
        output, state = vq_attention(**part(arguments, start, stop), **options, state=state)
        outputs.append(output)
    packed = torch.cat(outputs, 2)
    for row in range(BATCH):
        documents = arguments["segments"][row]
        for document in documents.unique().tolist():
            at = (documents == document).nonzero().flatten()
            alone = part({**arguments, "segments": None}, int(at[0]), int(at[-1]) + 1)
            expected = vq_attention(**alone, block_len=4, mem_len=3, cache=cache, impl="reference").output
            torch.testing.assert_close(packed[row, :, at], expected[row], rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", ALL)
def test_nothing_flows_backwards_in_time_or_across_the_batch(impl: str) -> None:
    arguments = draw(13, 3)
    values = arguments["v"].clone().requires_grad_()
    output = vq_attention(**{**arguments, "v": values}, block_len=4, mem_len=3, **ALL[impl]).output
    for row, at in ((0, 0), (1, 5), (0, 12)):
        (grad,) = torch.autograd.grad(output[row, :, at].sum(), values, retain_graph=True)
        reached = grad.abs().sum((1, 3)) > 0  # [B, T]
        expected = torch.zeros_like(reached)
        expected[row, : at + 1] = True
        assert torch.equal(reached, expected)


@pytest.mark.parametrize("impl", ALL)
def test_a_token_changes_no_other_row_and_nothing_before_it(impl: str) -> None:
    arguments, options = draw(23, 3, group=2, segments=2), {"block_len": 4, "mem_len": 3, **ALL[impl]}
    before = vq_attention(**arguments, **options).output
    for at in (0, 9, 22):
        changed = {name: t.clone() if isinstance(t, Tensor) else t for name, t in arguments.items()}
        for name in ("q", "k_hat", "v", "position_query"):
            changed[name][0, :, at] += 1.0
        changed["indices"][0, :, at] = (changed["indices"][0, :, at] + 1) % CODES
        moved = (vq_attention(**changed, **options).output - before).abs().amax((1, 3)) > 1e-13
        assert moved[0, at]
        assert not moved[1].any()
        assert not moved[0, :at].any()


def dense_in_bfloat16(arguments: dict) -> list[Tensor]:
    """Output and gradients of ordinary attention over the quantized keys, as autocast computes it: the budget of the fast forms."""
    q, k, v = (arguments[name].bfloat16().requires_grad_() for name in ("q", "k_hat", "v"))
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    output = (q @ k.mT).masked_fill(hidden, -torch.inf).softmax(-1) @ v
    return [output, *torch.autograd.grad(output.float().square().sum(), (q, v))]


@pytest.mark.parametrize("fast", (False, True))
@pytest.mark.parametrize("impl", FAST)
def test_bfloat16_costs_little_more_than_in_ordinary_attention(impl: str, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Distance from float64, in value and gradient; counts are exact and means float32."""
    monkeypatch.setattr(groups, "_multiplies_bfloat16", lambda device: fast)
    arguments = draw(96, 8, positions=False)
    for name, t in arguments.items():  # what bfloat16 holds exactly, so that the arithmetic alone is measured
        if isinstance(t, Tensor) and t.is_floating_point():
            arguments[name] = t.bfloat16().double()
    options = {"block_len": 8, "mem_len": 8}
    narrow = {n: t.bfloat16() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in arguments.items()}
    narrow["codebook"] = arguments["codebook"].float()
    runs = []
    for given, chosen in ((arguments, {"impl": "reference"}), (narrow, FAST[impl])):
        leaves = [given[n].clone().requires_grad_() for n in ("q", "v")]
        output, state = vq_attention(**{**given, "q": leaves[0], "v": leaves[1]}, **options, **chosen)
        runs.append((output, *torch.autograd.grad(output.to(state.mean.dtype).square().sum(), leaves), state))
    (*expected, exact), (*found, state) = runs
    assert found[0].dtype == torch.bfloat16
    assert state.count.dtype == state.mean.dtype == torch.float32
    assert torch.equal(state.count.double(), exact.count)
    torch.testing.assert_close(state.mean.double(), exact.mean, rtol=0, atol=1e-6)
    for ours, dense, true in zip(found, dense_in_bfloat16(arguments), expected, strict=True):
        budget = (dense.double() - true).square().mean().sqrt()
        assert (ours.double() - true).square().mean().sqrt() <= 1.25 * budget


@pytest.mark.parametrize("impl", ALL)
def test_autocast_is_a_call_with_narrower_operands(impl: str) -> None:
    arguments, options = draw(12, 4), {"block_len": 4, "mem_len": 4, **ALL[impl]}
    wide = {n: t.float() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in arguments.items()}
    narrow = {n: t.bfloat16() if isinstance(t, Tensor) and t.is_floating_point() and n != "codebook" else t for n, t in wide.items()}
    with torch.autocast("cpu", torch.bfloat16):
        found = vq_attention(**wide, **options)
        unchanged = vq_attention(**arguments, **options)
    expected = vq_attention(**narrow, **options)
    assert torch.equal(found.output, expected.output)
    assert all(torch.equal(a, b) for a, b in zip(found.state, expected.state, strict=True))
    assert found.output.dtype == torch.bfloat16
    assert unchanged.output.dtype == torch.float64


def test_a_million_tokens_through_the_recurrent_form() -> None:
    """Finite, counts exact, means as exact as float32, and a state that keeps nothing else alive."""
    total, calls, codes = 1_000_000, 8, 3
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(1, codes, 2, generator=generator)
    state, seen, added = None, torch.zeros(codes, dtype=torch.int64), torch.zeros(codes, 2, dtype=torch.float64)
    for _ in range(calls):
        time = total // calls
        indices = torch.randint(0, codes, (1, 1, time), generator=generator)
        v = 3 + torch.randn(1, 1, time, 2, generator=generator)
        q = torch.randn(1, 1, time, 2, generator=generator)
        output, state = vq_attention(q, codebook[0][indices], v, indices, codebook, block_len=250, mem_len=4, state=state, impl="recurrent")
        assert output.isfinite().all()
        assert sum(t.untyped_storage().nbytes() for t in state) == sum(t.nbytes for t in state) == 8 * (2 * 4 + 4 + 4 + 1) + 4 * 9
        seen += torch.bincount(indices.flatten(), minlength=codes)
        added.index_add_(0, indices.flatten(), v[0, 0].double())
    for t in range(4):
        code = state.indices[0, 0, t]
        seen[code] -= 1
        added[code] -= state.v[0, 0, t].double()
    assert torch.equal(state.count[0, 0].long(), seen)
    torch.testing.assert_close(state.mean[0, 0].double(), added / seen[:, None], rtol=0, atol=2e-5)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return result


@pytest.mark.parametrize("reduction", ("auto", "serial", "matmul", "associative"))
def test_the_means_of_all_blocks_exist_at_once_only_where_that_is_asked_for(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward; 64 blocks of 2 tokens, 16 codes of width 8: 8,192 means against 1,024 values."""
    monkeypatch.setitem(groups.GROUP_BYTES, "cpu", 4_000)
    codes, width, length, blocks = 16, 8, 2, 64
    codebook = torch.randn(1, codes, 4)
    indices = torch.randint(0, codes, (1, 1, length * blocks))
    arguments = [torch.randn(1, 1, length * blocks, 4), codebook[0][indices], torch.randn(1, 1, length * blocks, width)]
    state = initial_state(1, 1, 2, codes, 4, width)
    inputs = (*arguments, None, None, state.k_hat, state.v, state.mean, codebook, indices, state.indices, state.count)
    inputs = (*inputs, None, state.segment, state.cached_segment, length, 2, True, True, reduction)
    with Largest() as mode:
        output, _, mean, borders = blocked.run_forward(*inputs)
        blocked.run_backward(torch.ones_like(output), torch.zeros_like(mean), borders, *inputs)
    held = blocks * codes * width
    assert mode.elements <= held // 2 if reduction == "auto" else mode.elements >= held


@pytest.mark.parametrize("reduction", ("auto", "serial", "matmul", "associative"))
def test_training_compiles_to_one_graph(reduction: str) -> None:
    """Forward and backward, with everything that a call can have: the same values, and every property that the compiler relies on."""
    arguments, mem_len = draw(26, 7, group=2, segments=3), 7
    before = carried_state(arguments["codebook"], mem_len, True)
    names = ("q", "k_hat", "v", "position_query", "position_keys")

    def run(attention) -> list[Tensor]:
        leaves = [arguments[n].clone().requires_grad_() for n in names]
        mean = before.mean.clone().requires_grad_()
        given = {**arguments, **dict(zip(names, leaves, strict=True))}
        output, state = attention(**given, state=before._replace(mean=mean), block_len=4, mem_len=mem_len, reduction=reduction)
        return [output, *state, *torch.autograd.grad(output.sin().sum() + state.mean.cos().sum(), [*leaves, mean])]

    for found, expected in zip(run(torch.compile(vq_attention, fullgraph=True, backend="aot_eager")), run(vq_attention), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_the_operators_say_truly_what_they_return() -> None:
    """Shapes, strides and types that the compiler is told; nothing is written to and nothing returned twice."""
    arguments, state = draw(12, 3, group=2), initial_state(BATCH, 2, 3, CODES, KEY, VALUE, dtype=torch.float64)
    first = [arguments[n].requires_grad_() for n in ("q", "k_hat", "v", "position_query", "position_keys")]
    others = (state.k_hat, state.v, state.mean, arguments["codebook"], arguments["indices"], state.indices, state.count)
    inputs = (*first, *others, None, state.segment, state.cached_segment, 4, 3, True, True, "auto")
    torch.library.opcheck(torch.ops.vqkit.vq_attention.default, inputs)
    output, _, mean, borders = (t.detach() for t in torch.ops.vqkit.vq_attention(*inputs))
    inputs = tuple(t.detach() if isinstance(t, Tensor) else t for t in inputs)
    torch.library.opcheck(torch.ops.vqkit.vq_attention_backward.default, (torch.ones_like(output), mean, borders, *inputs))


def test_the_step_compiles_to_one_graph() -> None:
    step = torch.compile(vq_attention, fullgraph=True, backend="aot_eager")
    arguments = draw(3, 4, group=2)
    before = after = carried_state(arguments["codebook"], 4, False)
    for t in range(3):
        output, after = step(**part(arguments, t, t + 1), block_len=4, mem_len=4, state=after)
        expected, before = vq_attention(**part(arguments, t, t + 1), block_len=4, mem_len=4, state=before)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)


def test_a_code_that_gains_nothing_keeps_its_mean_bit_for_bit() -> None:
    arguments = draw(40, 2, heads=1)
    arguments = {n: t.float() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in arguments.items()}
    first = {**part(arguments, 0, 20)}
    state = vq_attention(**first, block_len=4, mem_len=2).state
    later = part(arguments, 20, 40)
    later["indices"] = torch.zeros_like(later["indices"])
    later["k_hat"] = arguments["codebook"][0, 0].expand_as(later["k_hat"])
    for t in range(20):
        after = vq_attention(**part(later, t, t + 1), block_len=4, mem_len=2, state=state).state
        unmoved = after.count == state.count
        assert torch.equal(after.mean[unmoved], state.mean[unmoved])
        state = after


BAD = {
    "k_hat has shape": lambda a: {"k_hat": a["k_hat"][:, :, :-1]},
    "heads that divides the 3 of q": lambda a: {"q": torch.randn(BATCH, 3, 8, KEY)},
    "position_keys": lambda a: {"position_keys": a["position_keys"][:, :-1]},
    "come together": lambda a: {"position_keys": None},
    "codebook": lambda a: {"codebook": a["codebook"][..., :-1]},
    "to 6": lambda a: {"indices": a["indices"].clamp(min=6)},
    "hold -1": lambda a: {"indices": a["indices"].clamp(max=0) - 1},
    "segments decrease": lambda a: {"segments": torch.arange(8).flip(0).expand(BATCH, 8)},
    "segments has shape": lambda a: {"segments": torch.zeros(BATCH, 7)},
    "block_len = 0": lambda a: {"block_len": 0},
    "mem_len = 0": lambda a: {"mem_len": 0},
    "impl = 'fast'": lambda a: {"impl": "fast"},
    "reduction = 'sum': must be one of 'auto', 'serial'": lambda a: {"reduction": "sum"},
    "state.k_hat": lambda a: {"state": carried_state(a["codebook"], 5, False)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message: str) -> None:
    arguments = {**draw(8, 3), "block_len": 4, "mem_len": 3}
    with pytest.raises(ValueError, match=message):
        vq_attention(**{**arguments, **BAD[message](arguments)})


@pytest.mark.parametrize("case_id", golden_arrays.case_ids("unit", "agg_biases"))
def test_golden_cache_bias(case_id: str) -> None:
    case = golden_arrays.load("unit", case_id)
    for name in ("counts", "fractions", "large", "negative", "random"):
        bias = cache_bias(case[f"{name}/lower"])
        case.check(f"{name}/out", torch.where(bias == -torch.inf, -1e30, bias))


@pytest.mark.parametrize("case_id", golden_arrays.case_ids("unit", "causal_mask"))
def test_golden_window_mask(case_id: str) -> None:
    case = golden_arrays.load("unit", case_id)
    for sub in case.meta["cases"]:
        mask = window_mask(sub["block_len"], sub["mem_len"], cache=not sub["with_locality"])
        present = torch.arange(mask.shape[1]) >= sub["invalid_len"]
        case.check(f"{sub['key']}/mask", mask & present)


@pytest.mark.parametrize("case_id", golden_arrays.case_ids("unit", "rel_shift"))
def test_golden_relative_shift(case_id: str) -> None:
    """Where the official shift is a distance of 0 .. M, that is on the band, the two agree."""
    case = golden_arrays.load("unit", case_id)
    for sub in case.meta["cases"]:
        x, expected = case[f"{sub['key']}/x"], case[f"{sub['key']}/out"]
        length, past = x.shape[-2:]
        shifted = _band(x[..., length - 1 :])
        assert shifted.shape == x.shape
        row, column = torch.arange(length)[:, None], torch.arange(past)[None]
        on_band = (column >= row) & (column - row <= past - length)
        case.check(f"{sub['key']}/out", torch.where(on_band, shifted, expected))


@pytest.mark.parametrize("impl", ALL)
def test_the_state_keeps_no_more_alive_than_it_holds(impl: str) -> None:
    after = vq_attention(**draw(24, 4), block_len=4, mem_len=4, **ALL[impl]).state.detach()
    for name, tensor in after._asdict().items():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), name
