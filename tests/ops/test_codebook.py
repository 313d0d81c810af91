"""Laws of codebook statistics, moving averages and the expiry of dead codes."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import golden_arrays
from vqkit.ops.codebook import (
    SUMMED,
    CodebookStatistics,
    assignment_stats,
    codes_from_ema,
    directions,
    ema_update,
    gather_codes,
    laplace_codes_from_ema,
    largest_keys,
    merge_statistics,
    replace_dead_codes,
    zero_statistics,
)


def draw(batch=3, heads=2, time=11, codes=7, width=4, dtype=torch.float32):
    return torch.randn(batch, heads, time, width, dtype=dtype), torch.randint(-1, codes, (batch, heads, time))


def assert_equal(found, expected):
    for name, a, b in zip(CodebookStatistics._fields, found, expected, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_statistics_are_those_of_a_loop(dtype, masked):
    x, indices = draw(dtype=dtype)
    mask = torch.rand(3, 11) < 0.6 if masked else None
    count, total = torch.zeros(2, 7, dtype=torch.float64), torch.zeros(2, 7, 4, dtype=torch.float64)
    for b, h, t in itertools.product(range(3), range(2), range(11)):
        code = int(indices[b, h, t])
        if code >= 0 and (mask is None or mask[b, t]):
            count[h, code] += 1
            total[h, code] += x[b, h, t]
    found = assignment_stats(x, indices, 7, mask)
    assert found.count.dtype == found.sum.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.count.double(), count)
    torch.testing.assert_close(found.sum.double(), total, rtol=1e-5, atol=1e-5)


def test_without_a_batch_axis_each_head_has_its_own_vectors():
    x, indices = draw(batch=1)
    assert_equal(assignment_stats(x[0], indices[0], 7), assignment_stats(x, indices, 7))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("axes", ["positions", "heads and positions"])
def test_weights_enter_count_and_sum_alone(masked, axes):
    x, indices = draw(dtype=torch.float64)
    codes = torch.randn(2, 7, 4, dtype=torch.float64)
    mask = torch.rand(3, 11) < 0.6 if masked else None
    weights = torch.rand((3, 11) if axes == "positions" else (3, 2, 11), dtype=torch.float64).clamp(min=0.3) - 0.3  # many are 0
    quantized = gather_codes(codes, indices)
    found = assignment_stats(x, indices, 7, mask, weights=weights, quantized=quantized, moments=True)
    each = weights.unsqueeze(1).expand(3, 2, 11) if weights.dim() == 2 else weights
    kept = (each > 0) if mask is None else (each > 0) & mask.unsqueeze(1)
    chosen = torch.nn.functional.one_hot(indices.clamp(min=0), 7) * (kept & (indices >= 0)).unsqueeze(-1)
    coded = chosen.any(-1).double()
    torch.testing.assert_close(found.count, (chosen * each.unsqueeze(-1)).sum((0, 2)))
    torch.testing.assert_close(found.sum, torch.einsum("bhn,bhnc,bhnk->hck", each, chosen.double(), x))
    torch.testing.assert_close(found.vectors, coded.sum((0, 2)))
    torch.testing.assert_close(found.non_finite, (kept & (indices < 0)).double().sum((0, 2)))
    torch.testing.assert_close(found.squared_error, ((x - quantized).square().sum(-1) * coded).sum((0, 2)))
    torch.testing.assert_close(found.moments[:, 0], torch.einsum("bhn,bhnk->hk", coded, x))
    away = x - (found.moments[:, 0] / found.vectors.unsqueeze(-1)).unsqueeze(1)
    torch.testing.assert_close(found.moments[:, 1], torch.einsum("bhn,bhnk->hk", coded, away.square()))


@pytest.mark.parametrize("offset", [0.0, 1e3, -1e5])
def test_moments_are_exact_far_from_the_origin_also_of_parts(offset):
    x = offset + torch.randn(2, 600, 4)
    x[1, 300:] += 3
    indices = torch.zeros(2, 600, dtype=torch.int64)
    indices[0, 7] = -1
    parts = [assignment_stats(x[:, a:b], indices[:, a:b], 1, moments=True) for a, b in ((0, 0), (0, 10), (10, 300), (300, 600))]
    merged = parts[0]
    for part in parts[1:]:
        merged = merge_statistics(merged, part)
    kept = [x[0].double()[indices[0] == 0], x[1].double()]
    expected = torch.stack([torch.stack([v.sum(0), (v - v.mean(0)).square().sum(0)]) for v in kept]).float()
    for found in (merged.moments, merge_statistics(*parts).moments, assignment_stats(x, indices, 1, moments=True).moments):
        torch.testing.assert_close(found[:, 0], expected[:, 0], rtol=1e-6, atol=1e-3)
        rounding = 1e-5 + torch.finfo(torch.float32).eps * abs(offset)  # of the mean, relative to a deviation of 1
        torch.testing.assert_close(found[:, 1], expected[:, 1], rtol=rounding, atol=0)


def test_weights_of_one_are_no_weights():
    x, indices = draw()
    assert_equal(assignment_stats(x, indices, 7, weights=torch.ones(3, 11)), assignment_stats(x, indices, 7))


def test_a_weight_of_two_is_the_vector_twice():
    x, indices = draw()
    twice = assignment_stats(torch.cat([x, x], dim=2), torch.cat([indices, indices], dim=2), 7)
    found = assignment_stats(x, indices, 7, weights=torch.full((3, 2, 11), 2.0))
    torch.testing.assert_close(found.count, twice.count)
    torch.testing.assert_close(found.sum, twice.sum)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("by", ["mask", "weights", "index"])
def test_vectors_left_out_influence_nothing(poison, by):
    x, indices = draw()
    mask = torch.rand(3, 11) < 0.5
    options = {"num_candidates": 30, "moments": True}
    if by == "index":
        indices = indices.where(mask[:, None], -1)
    elif by == "mask":
        options["mask"] = mask
    else:
        options["weights"] = mask.float()
    torch.manual_seed(1)
    clean = assignment_stats(x, indices, 7, quantized=torch.ones_like(x), **options)
    spoiled = torch.where(mask[:, None, :, None], x, poison)
    torch.manual_seed(1)
    assert_equal(assignment_stats(spoiled, indices, 7, quantized=torch.ones_like(x), **options), clean)
    assert all(tensor.isfinite().all() for tensor in clean)


@pytest.mark.parametrize("shape", [(0, 2, 11, 4), (3, 2, 0, 4), (2, 0, 4)])
def test_the_statistics_of_nothing_are_zero(shape):
    x, indices = torch.empty(shape), torch.empty(shape[:-1], dtype=torch.int64)
    found = assignment_stats(x, indices, 7, weights=torch.empty(shape[:-1]), quantized=x, num_candidates=3, moments=True)
    assert_equal(found, zero_statistics(2, 7, 4, num_candidates=3, moments=True))
    assert_equal(assignment_stats(x, indices, 7), zero_statistics(2, 7, 4))


def test_statistics_compile_to_one_graph_and_ignore_autocast():
    def run(x, indices, mask, weights):
        return assignment_stats(x, indices, 7, mask, weights=weights, quantized=x + 1, num_candidates=3, moments=True)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    arguments = (*draw(), torch.rand(3, 11) < 0.5, torch.rand(3, 11))
    torch.manual_seed(1)
    expected = run(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for form in (run, compiled):
            torch.manual_seed(1)
            assert_equal(form(*arguments), expected)


def test_a_mask_of_ones_is_no_mask():
    x, indices = draw()
    assert_equal(assignment_stats(x, indices, 7, torch.ones(3, 11, dtype=torch.bool)), assignment_stats(x, indices, 7))


@given(st.integers(1, 6), st.integers(0, 9), st.integers(0, 2**31))
def test_merged_parts_are_the_whole(parts, candidates, seed):
    torch.manual_seed(seed)
    x, indices = draw(batch=6)

    def statistics(part, chosen):
        return assignment_stats(part, chosen, 7, quantized=torch.ones_like(part), num_candidates=candidates, moments=True)

    whole = statistics(x, indices)
    pieces = [statistics(*part) for part in zip(x.chunk(parts), indices.chunk(parts), strict=True)]
    merged = pieces[0]
    for piece in pieces[1:]:
        merged = merge_statistics(merged, piece)
    keys = torch.cat([piece.keys for piece in pieces], dim=1).topk(candidates, dim=1).values
    for found in (merged, merge_statistics(*pieces)):
        for name in SUMMED:
            torch.testing.assert_close(getattr(found, name), getattr(whole, name), rtol=1e-5, atol=1e-5)
        assert torch.equal(found.keys, keys)


@pytest.mark.parametrize("number", [1, 5, 20, 60])
def test_candidates_are_distinct_vectors_that_count(number):
    x, indices = draw()
    mask = torch.rand(3, 11) < 0.7
    found = assignment_stats(x, indices, 7, mask, num_candidates=number)
    for head in range(2):
        allowed = x[:, head][mask & (indices[:, head] >= 0)]
        present = found.keys[head] > 0
        assert present.sum() == min(number, len(allowed))
        assert (found.keys[head].diff() <= 0).all() and (found.keys <= 1).all()
        rows = found.candidates[head]
        assert not rows[~present].any()
        matches = (rows[present, None] == allowed[None]).all(-1)
        assert (matches.sum(1) == 1).all() and (matches.sum(0) <= 1).all()


def test_candidates_are_drawn_uniformly():
    x = torch.arange(10.0).reshape(1, 1, 10, 1)
    indices = torch.zeros(1, 1, 10, dtype=torch.int64)
    drawn = torch.cat([assignment_stats(x, indices, 1, num_candidates=3).candidates.flatten() for _ in range(2000)]).long()
    frequency = drawn.bincount(minlength=10) / 2000
    assert ((frequency - 0.3).abs() < 5 * (0.3 * 0.7 / 2000) ** 0.5).all()


@pytest.mark.parametrize("case_id", golden_arrays.case_ids("unit", "codebook_ema"))
def test_the_moving_average_equals_the_official_codebook_loss(case_id):
    """One step of SGD with rate 1 on the official surrogate loss, whose gradients are averaged over devices and blocks."""
    golden = golden_arrays.load("unit", case_id)
    for case in golden.meta["cases"]:
        key, decay = case["key"], case["c_gamma"]
        given = golden.tree(f"{key}/in/")
        statistics = assignment_stats(given["vecs"], given["shortcodes"].long(), case["S"], given["loss_mask"].bool())
        factor = case["n_device"] * case["n_block_per_update"]  # undone by the average over devices and blocks
        scaled = statistics._replace(count=statistics.count * factor, sum=statistics.sum * factor)
        total, count = ema_update(given["c_sum"], given["c_count"], scaled, decay)
        golden.check(f"{key}/out/c_sum_tgt", total)
        golden.check(f"{key}/out/c_count_tgt", count)

        x, old_sum, old_count = (given[name].clone().requires_grad_() for name in ("vecs", "c_sum", "c_count"))
        loss = surrogate_loss(old_sum, old_count, scaled, decay) + 0.0 * x.sum()
        of_x, of_sum, of_count = torch.autograd.grad(loss, (x, old_sum, old_count))
        golden.check(f"{key}/out/l_codebook", loss)
        golden.check(f"{key}/grad/c_sum", of_sum)
        golden.check(f"{key}/grad/c_count", of_count)
        golden.check(f"{key}/grad/vecs", of_x)
        torch.testing.assert_close(total, given["c_sum"] - of_sum)
        torch.testing.assert_close(count, given["c_count"] - of_count)


def surrogate_loss(sum, count, statistics, decay):
    """Of value 0; its gradient is old minus target."""

    def linear(old, new):
        target = decay * old + (1 - decay) * new
        value = (old * (old - target).detach()).sum()
        return value - value.detach()

    return linear(sum, statistics.sum) + linear(count, statistics.count)


def test_moving_averages_keep_their_dtype():
    x, indices = draw(dtype=torch.float64)
    statistics = assignment_stats(x, indices, 7)
    total, count = ema_update(torch.zeros(2, 7, 4), torch.ones(2, 7), statistics, 0.9)
    assert total.dtype == count.dtype == torch.float32
    torch.testing.assert_close(count, (0.9 + 0.1 * statistics.count).float())


def test_laplace_smoothing_keeps_the_total_and_gives_unused_codes_a_share():
    total, count = torch.randn(2, 5, 4, dtype=torch.float64), torch.tensor([[3.0, 0.0, 1.0, 6.0, 0.0], [1.0] * 5], dtype=torch.float64)
    smoothed = (count + 0.1) / (count.sum(-1, keepdim=True) + 0.5) * count.sum(-1, keepdim=True)
    torch.testing.assert_close(smoothed.sum(-1), count.sum(-1))
    torch.testing.assert_close(laplace_codes_from_ema(total, count, eps=0.1), total / smoothed.unsqueeze(-1))
    torch.testing.assert_close(laplace_codes_from_ema(total, count)[1], codes_from_ema(total, count)[1])


def test_laplace_smoothing_of_counts_of_zero_divides_by_nothing():
    total = torch.randn(1, 3, 4)
    assert torch.equal(laplace_codes_from_ema(total, torch.zeros(1, 3)), total)


def test_an_unused_code_stays_where_it_is_at_the_floor():
    total, count = torch.randn(1, 3, 4), torch.tensor([[0.01, 0.02, 5.0]])
    nothing = zero_statistics(1, 3, 4)
    before = codes_from_ema(total, count)
    after = codes_from_ema(*ema_update(total, count, nothing, 0.9))
    torch.testing.assert_close(after[:, 1:], before[:, 1:])
    torch.testing.assert_close(after[:, 0], 0.9 * before[:, 0])  # the official rule: below the floor the sum decays alone


@given(st.integers(1, 8), st.integers(0, 10), st.integers(0, 10), st.integers(0, 2**31))
def test_expiry_replaces_exactly_the_dead_codes(codes, candidates, present, seed):
    torch.manual_seed(seed)
    count, total = (torch.rand(2, codes) * 12).floor() / 6, torch.randn(2, codes, 3)  # some counts are equal
    keys = torch.rand(2, candidates).sort(descending=True).values.masked_fill(torch.arange(candidates) >= present, 0.0)
    rows = torch.randn(2, candidates, 3)
    new_total, new_count = replace_dead_codes(total, count, rows, keys, threshold=1.0, reset_count=4.0)
    for head in range(2):
        waiting = [row for row, key in zip(rows[head], keys[head], strict=True) if key > 0]
        dead = sorted((count[head, code].item(), code) for code in range(codes) if count[head, code] < 1.0)
        served = [code for _, code in dead[: len(waiting)]]
        for code in range(codes):
            if code in served:
                assert torch.equal(codes_from_ema(new_total, new_count)[head, code], waiting.pop(0))
                assert new_count[head, code] == 4.0
            else:
                assert torch.equal(new_total[head, code], total[head, code]) and new_count[head, code] == count[head, code]


def test_dead_codes_of_the_lowest_count_are_served_first_of_equal_ones_the_lowest_index():
    count = torch.tensor([[0.5, 2.0, 0.1, torch.nan, 0.3, 0.1, 0.0, 0.1]])
    rows, keys = torch.arange(1.0, 5.0).reshape(1, 4, 1), torch.tensor([[0.9, 0.5, 0.2, 0.0]])
    codes, after = replace_dead_codes(torch.zeros(1, 8, 1), count, rows, keys, threshold=1.0, reset_count=1.0)
    assert codes.flatten().tolist() == [0.0, 0.0, 1.0, 0.0, 0.0, 2.0, 3.0, 0.0]
    torch.testing.assert_close(after, count.index_fill(1, torch.tensor([2, 5, 6]), 1.0), equal_nan=True)


def test_largest_keys_are_found_sorted_and_filled_up():
    rows, keys = largest_keys(torch.arange(3.0).reshape(1, 3, 1), torch.tensor([[0.2, 0.0, 0.9]]), 4)
    assert rows.flatten().tolist() == [2.0, 0.0, 0.0, 0.0]
    torch.testing.assert_close(keys, torch.tensor([[0.9, 0.2, 0.0, 0.0]]))


@pytest.mark.parametrize(("of_codes", "of_indices"), [((), ()), ((3,), (3,)), ((3,), (2, 3)), ((2, 3), (2, 3)), ((), (2, 3)), ((3,), (1,))])
def test_gathered_codes_are_rows_and_minus_one_is_zero(of_codes, of_indices):
    codebook = torch.randn(*of_codes, 5, 4, dtype=torch.float64, requires_grad=True)
    indices = torch.randint(-1, 5, (*of_indices, 9))
    found = gather_codes(codebook, indices)
    leading = torch.broadcast_shapes(of_codes, of_indices)
    table = codebook.expand(*leading, 5, 4)
    index = indices.expand(*leading, 9)
    expected = table.gather(-2, index.clamp(min=0).unsqueeze(-1).expand(*leading, 9, 4)) * (index >= 0).unsqueeze(-1)
    assert torch.equal(found, expected)
    weight = torch.randn_like(found)
    gradients = [torch.autograd.grad((codes * weight).sum(), codebook, retain_graph=True)[0] for codes in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_bad_shapes_are_named():
    x, indices = draw()
    with pytest.raises(ValueError, match=r"^indices has shape \(3, 2\): must be \(3, 2, 11\)"):
        assignment_stats(x, indices[..., 0], 7)
    with pytest.raises(ValueError, match=r"^mask has shape \(11,\): must be \(3, 11\)"):
        assignment_stats(x, indices, 7, torch.ones(11, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"^weights has shape \(11,\): must be \(3, 11\) or \(3, 2, 11\)"):
        assignment_stats(x, indices, 7, weights=torch.ones(11))
    with pytest.raises(ValueError, match=r"^quantized has shape \(3, 2, 11\): must be \(3, 2, 11, 4\)"):
        assignment_stats(x, indices, 7, quantized=x[..., 0])


@pytest.mark.parametrize("length", [1.0, 1e-30, 1e30])
def test_directions_have_length_1_and_no_slope_along_themselves(length):
    x = (length * torch.randn(5, 7)).requires_grad_()
    found, wide, weights = directions(x), x.detach().double(), torch.randn(5, 7, dtype=torch.float64)
    expected = wide / wide.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(found.detach().double(), expected, rtol=1e-6, atol=0)
    (slope,) = torch.autograd.grad((found * weights.float()).sum(), x)
    across = (weights - expected * (weights * expected).sum(-1, keepdim=True)) / wide.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(slope.double(), across, rtol=1e-4, atol=1e-5 * across.abs().max().item())
    assert torch.equal(directions(torch.cat([x.detach(), torch.zeros(1, 7)]))[-1], torch.zeros(7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_directions_of_the_largest_numbers(dtype):
    most = torch.finfo(dtype).max
    for largest in (most, most / 2, 0.9 * most):
        x = torch.tensor([[largest, 0.0, 0.0], [largest, -largest / 2, 0.0]], dtype=dtype)
        expected = torch.tensor([[1.0, 0.0, 0.0], [1.0, -0.5, 0.0]], dtype=dtype)
        torch.testing.assert_close(directions(x), expected / expected.norm(dim=-1, keepdim=True))
