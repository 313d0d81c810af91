"""Laws of nearest code: the blocked form chooses as well as all differences written out, whatever the data, shapes and settings."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import golden_arrays
from vqkit.ops.codebook import codes_from_ema, directions, gather_codes
from vqkit.ops.nearest_code import api, blocked, nearest_code, nearest_codes, nearest_index, reference


def of_one_codebook(nearest):
    return lambda x, codebook: nearest(x.squeeze(0), codebook.squeeze(0)).unsqueeze(0)


FAST = {"cpu": of_one_codebook(blocked._nearest_on_cpu), "elsewhere": of_one_codebook(blocked._nearest_elsewhere)}


def regret(x, codebook, indices):
    """How much further than the nearest code the chosen one is, in float64, in units of rounding of the squared distance."""
    x, codebook = x.double(), codebook.double()
    distance = torch.cdist(x, codebook, compute_mode="donot_use_mm_for_euclid_dist").square()
    chosen = distance.gather(-1, indices.unsqueeze(-1)).squeeze(-1)
    best = distance.amin(-1)
    return ((chosen - best) / best.clamp(min=torch.finfo(torch.float64).tiny)).amax().item()


KINDS = {
    "plain": lambda x: x,
    "off centre": lambda x: x + 1000.0,
    "tiny": lambda x: x * 1e-12,
    "large": lambda x: x * 1e12,
    "two far clusters": lambda x: x * 1e-3 + torch.where(torch.arange(x.shape[-2]) % 2 == 0, 300.0, -300.0).unsqueeze(-1).to(x.dtype),
    "on a grid": lambda x: (2 * x).round(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", FAST)
@pytest.mark.parametrize(
    "shape", [(1, 700, 100, 1), (3, 257, 33, 5), (2, 90, 1500, 8), (1, 150, 128, 64), (2, 300, 1, 7), (1, 40, 2049, 3)]
)
def test_fast_forms_choose_as_well_as_explicit_differences(kind, dtype, form, shape):
    groups, num, codes, width = shape
    x, codebook = KINDS[kind](torch.randn(groups, num, width, dtype=dtype)), KINDS[kind](torch.randn(groups, codes, width, dtype=dtype))
    for x_g, codebook_g in zip(x.split(1), codebook.split(1), strict=True):
        indices = FAST[form](x_g, codebook_g)
        assert regret(x_g, codebook_g, indices) <= 4 * (width + 4) * torch.finfo(dtype).eps


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_both_implementations_agree_over_shapes_and_tiles(impl, monkeypatch):
    monkeypatch.setattr(blocked, "_ROWS_PER_TILE", 8)
    monkeypatch.setattr(blocked, "_CODES_PER_TILE", 16)
    monkeypatch.setattr(blocked, "_CODES_PER_TILE_ELSEWHERE", 16)
    monkeypatch.setattr(blocked, "_FEW_DIFFERENCES", 0)
    leading = [((), ()), ((3,), ()), ((), (3,)), ((2, 3), (3,)), ((2, 3), (2, 1)), ((2, 3, 4), (3, 1)), ((2, 1), (2, 3))]
    for (of_x, of_codes), num, codes in itertools.product(leading, (1, 7, 40), (1, 15, 16, 17, 50)):
        x, codebook = torch.randn(*of_x, num, 6), torch.randn(*of_codes, codes, 6)
        indices, distance = nearest_code(x, codebook, impl=impl)
        expected = (x.unsqueeze(-2) - codebook.unsqueeze(-3)).square().sum(-1)
        assert indices.shape == (*torch.broadcast_shapes(of_x, of_codes), num) and indices.dtype == torch.int64
        assert torch.equal(indices, expected.argmin(-1))
        torch.testing.assert_close(distance, expected.amin(-1))


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 5), st.integers(0, 2**31), st.booleans())
def test_ties_go_to_the_lowest_index(num, distinct, repeats, seed, small):
    """Codes on a small grid, several times over: all arithmetic is exact, so the first of the nearest is the only right answer."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, (1, num, 3), generator=generator).float()
    codebook = torch.randint(-3, 4, (1, distinct, 3), generator=generator).float().repeat(1, repeats, 1)
    expected = (x.unsqueeze(2) - codebook.unsqueeze(1)).square().sum(-1).argmin(-1)
    form = (lambda a, b: nearest_index(a, b)) if small else FAST["cpu"]
    assert torch.equal(form(x, codebook), expected)
    assert torch.equal(reference.nearest_index(x, codebook), expected)


@pytest.mark.parametrize("form", FAST)
def test_many_equal_codes_and_an_all_zero_codebook(form):
    x = torch.randn(1, 300, 4)
    for codebook in (torch.zeros(1, 1200, 4), torch.ones(1, 64, 4).mul(0.1)):
        assert not FAST[form](x, codebook).any()


@pytest.mark.parametrize("form", FAST)
def test_more_close_races_than_a_tile_has_rows(form):
    codebook = torch.randn(1, 8, 4).repeat(1, 2, 1)
    x = codebook[:, torch.randint(0, 8, (5000,))] + 0.1 * torch.randn(1, 5000, 4)
    found = FAST[form](x, codebook)
    assert (found < 8).all() and regret(x, codebook, found) < 1e-5


@pytest.mark.parametrize("form", [*FAST, "reference"])
@pytest.mark.parametrize("codes", [1, 40, 1500])
def test_what_is_not_finite_gets_no_code_and_changes_no_other(form, codes):
    x, codebook = torch.randn(1, 200, 4), torch.randn(1, codes, 4)
    run = (lambda v: reference.nearest_index(v, codebook)) if form == "reference" else (lambda v: FAST[form](v, codebook))
    clean = run(x)
    spoiled = x.clone()
    for row, bad in enumerate([torch.nan, torch.inf, -torch.inf, 1e30, -3e25]):
        spoiled[0, 10 * row, row % 4] = bad
    spoiled[0, 60] = torch.inf
    lost = [0, 10, 20, 30, 40, 60]
    found = run(spoiled)
    assert (found[0, lost] == -1).all()
    keep = torch.ones(200, dtype=torch.bool)
    keep[lost] = False
    assert torch.equal(found[0, keep], clean[0, keep]) and (clean >= 0).all()
    assert torch.equal(gather_codes(codebook, found)[0, lost], torch.zeros(6, 4))


def test_distance_of_what_is_not_finite_is_zero():
    x = torch.tensor([[torch.nan, 0.0], [1.0, 1.0]])
    indices, distance = nearest_code(x, torch.zeros(3, 2))
    assert indices.tolist() == [-1, 0] and distance.tolist() == [0.0, 2.0]


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_permuting_vectors_or_codes_permutes_the_choice(impl):
    x, codebook = torch.randn(500, 8), torch.randn(70, 8)
    indices = nearest_index(x, codebook, impl=impl)
    rows, codes = torch.randperm(500), torch.randperm(70)
    assert torch.equal(nearest_index(x[rows], codebook, impl=impl), indices[rows])
    assert torch.equal(codes[nearest_index(x, codebook[codes], impl=impl)], indices)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic):
    compiled = torch.compile(nearest_code, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for num in (5, 600, 601) if dynamic else (600,):
        x, codebook = torch.randn(2, 3, num, 8, requires_grad=True), torch.randn(3, 60, 8)
        x.data[0, 0, 0, 0] = torch.nan
        for found, expected in zip(compiled(x, codebook), nearest_code(x, codebook), strict=True):
            assert torch.equal(found, expected) and not found.requires_grad


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_changes_nothing(compiled):
    x, codebook = torch.randn(700, 32) + 50, torch.randn(90, 32) + 50
    run = torch.compile(nearest_code, backend="aot_eager", fullgraph=True) if compiled else nearest_code
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(x, codebook)
    for found, expected in zip(inside, nearest_code(x, codebook), strict=True):
        assert torch.equal(found, expected)


def test_half_precision_is_assigned_as_float32_and_float64_as_float64():
    x, codebook = torch.randn(600, 16), torch.randn(80, 16)
    for dtype in (torch.bfloat16, torch.float16):
        low = x.to(dtype)
        assert torch.equal(nearest_index(low, codebook), nearest_index(low.float(), codebook))
        assert nearest_code(low, codebook).squared_distance.dtype == torch.float32
    assert nearest_code(x, codebook.double()).squared_distance.dtype == torch.float64


def test_shortened_matrix_products_are_switched_off_inside_and_back_on_after(monkeypatch):
    matmul, seen = torch.backends.mkldnn.matmul, []  # pyrefly: ignore[missing-attribute]
    monkeypatch.setattr(blocked, "_FEW_DIFFERENCES", 0)
    tile = blocked._tile
    monkeypatch.setattr(blocked, "_tile", lambda codebook: seen.append(matmul.fp32_precision) or tile(codebook))
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        nearest_index(torch.randn(4, 2), torch.randn(3, 2), impl="blocked")
        nearest_codes(torch.randn(4, 2), torch.randn(3, 2), 2, impl="blocked")
        assert seen == ["ieee", "ieee"] and matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_empty_inputs(impl):
    for shape in [(0, 4), (2, 0, 4), (0, 3, 4)]:
        indices, distance = nearest_code(torch.randn(shape), torch.randn(5, 4), impl=impl)
        assert indices.shape == distance.shape == shape[:-1]


def test_bad_arguments_are_named():
    x, codebook = torch.randn(2, 5, 4), torch.randn(3, 4)
    for error, match, arguments in [
        (TypeError, "^x is torch.int64", (x.long(), codebook)),
        (ValueError, r"^x has shape \(4,\)", (x[0, 0], codebook)),
        (ValueError, "^x has width 4: must be 3", (x, codebook[:, :3])),
        (ValueError, "^codebook has shape .*at least one code", (x, codebook[:0])),
        (ValueError, "do not broadcast", (x, codebook.expand(3, 3, 4))),
    ]:
        with pytest.raises(error, match=match):
            nearest_code(*arguments)
    with pytest.raises(ValueError, match=r"^impl = 'fast': must be one of 'auto'"):
        nearest_code(x, codebook, impl="fast")  # pyrefly: ignore[bad-argument-type]


@pytest.mark.parametrize("case_id", golden_arrays.case_ids("unit", "shortcodes"))
@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_shortcodes_equal_the_official_ones(case_id, impl):
    golden = golden_arrays.load("unit", case_id)
    for case in golden.meta["cases"]:
        arrays = golden.tree(f"{case['key']}/")
        codebook = arrays["codebook"]
        if case["smallest_code_gap"] > 0:  # case_00 makes two codes equal by hand
            golden.check(f"{case['key']}/codebook", codes_from_ema(arrays["c_sum"], arrays["c_count"]))
        indices, distance = nearest_code(arrays["vecs"], codebook, impl=impl)
        golden.check(f"{case['key']}/shortcodes", indices)
        golden.check(f"{case['key']}/errs2", distance)
        golden.check(f"{case['key']}/codewords", gather_codes(codebook, indices))


def explicit(x, codebook):
    return torch.cdist(x.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").square()


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(blocked, "_ROWS_PER_TILE", 8)
    monkeypatch.setattr(blocked, "_CODES_PER_TILE", 16)
    monkeypatch.setattr(blocked, "_CODES_PER_TILE_ELSEWHERE", 16)
    monkeypatch.setattr(blocked, "_CODES_PER_GROUP", 2)
    monkeypatch.setattr(blocked, "_MIN_ROWS_PER_TILE", 8)
    monkeypatch.setattr(blocked, "_SCORES_AT_ONCE", 512)
    monkeypatch.setattr(blocked, "_FEW_DIFFERENCES", 0)


RANKINGS = {"cpu": blocked._rank_by_scores, "elsewhere": blocked._rank_by_distance}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", RANKINGS)
@pytest.mark.parametrize(("codes", "k"), [(1, 1), (5, 5), (50, 3), (50, 40), (200, 8)])
def test_the_nearest_few_are_as_near_as_by_explicit_differences(kind, form, codes, k, small_tiles):
    width = 6
    x, codebook = KINDS[kind](torch.randn(60, width)), KINDS[kind](torch.randn(codes, width))
    indices, distance = RANKINGS[form](x, codebook, k)
    exact = explicit(x, codebook)
    best = exact.sort(-1).values[:, :k]
    bound = 4 * (width + 4) * torch.finfo(torch.float32).eps
    assert (indices.sort(-1).values.diff(dim=-1) > 0).all()  # all different
    assert (exact.gather(1, indices) <= best * (1 + bound)).all()
    torch.testing.assert_close(distance.double(), best, rtol=bound, atol=0.0)
    assert (distance.diff(dim=-1) >= 0).all()


@given(st.integers(1, 30), st.integers(1, 8), st.integers(1, 6), st.integers(0, 2**31))
def test_the_nearest_few_put_the_lower_index_first_among_equals(num, distinct, repeats, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, (num, 3), generator=generator).float()
    codebook = torch.randint(-3, 4, (distinct, 3), generator=generator).float().repeat(repeats, 1)
    k = 1 + seed % len(codebook)
    expected = explicit(x, codebook).sort(dim=-1, stable=True).indices[:, :k]
    assert torch.equal(reference.nearest_codes(x[None], codebook[None], k)[0][0], expected)
    for form in RANKINGS.values():
        assert torch.equal(form(x, codebook, k)[0], expected)


@pytest.mark.parametrize("form", RANKINGS)
def test_many_equal_codes_are_ranked_by_index(form):
    x, codebook = torch.randn(40, 4), torch.ones(1200, 4).mul(0.1)
    assert torch.equal(RANKINGS[form](x, codebook, 5)[0], torch.arange(5).expand(40, 5))


def test_the_first_of_the_nearest_few_is_the_nearest():
    for of_x, of_codes in [((), ()), ((2, 3), (3,)), ((2, 3, 4), (3, 1)), ((), (3,))]:
        x, codebook = torch.randn(*of_x, 70, 6), torch.randn(*of_codes, 90, 6)
        few, one = nearest_codes(x, codebook, 4), nearest_code(x, codebook)
        assert few.indices.shape == (*one.indices.shape, 4)
        assert torch.equal(few.indices[..., 0], one.indices)
        torch.testing.assert_close(few.squared_distance[..., 0], one.squared_distance)


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_the_nearest_few_of_what_is_not_finite_are_none(impl):
    x = torch.randn(40, 4)
    x[[1, 5, 9], 2] = torch.tensor([torch.nan, torch.inf, 1e30])
    indices, distance = nearest_codes(x, torch.randn(60, 4), 3, impl=impl)
    lost = torch.zeros(40, dtype=torch.bool)
    lost[[1, 5, 9]] = True
    assert torch.equal((indices == -1).all(-1), lost) and not distance[lost].any() and (indices[~lost] >= 0).all()
    assert nearest_codes(torch.randn(2, 0, 4), torch.randn(60, 4), 3, impl=impl).indices.shape == (2, 0, 3)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_cosine_chooses_the_direction_that_fits_best(scale, dtype):
    x = (torch.randn(2, 300, 6) * scale).to(dtype)
    codebook = torch.randn(2, 50, 6) * torch.rand(2, 50, 1)
    similarity = torch.nn.functional.normalize(x.double() / scale, dim=-1) @ torch.nn.functional.normalize(codebook.double(), dim=-1).mT
    best = similarity.amax(-1)
    indices, distance = nearest_code(x, codebook, metric="cosine")
    chosen = similarity.gather(-1, indices.unsqueeze(-1)).squeeze(-1)
    assert (best - chosen).amax() < 1e-6
    torch.testing.assert_close(distance.double(), 2 - 2 * best, rtol=1e-5, atol=1e-6)
    few = nearest_codes(x, codebook, 3, metric="cosine")
    assert torch.equal(few.indices[..., 0], indices)
    assert torch.equal(indices, nearest_index(x, codebook, metric="cosine", impl="reference"))


def test_cosine_of_zero_and_of_what_is_not_finite():
    x = torch.tensor([[0.0, 0.0], [torch.nan, 1.0], [torch.inf, 1.0], [1e-40, 0.0], [3e38, 3e38]])
    indices, distance = nearest_code(x, torch.eye(2).flip(0), metric="cosine")
    assert indices.tolist() == [0, -1, -1, 1, 0] and distance[0] == 1.0 and distance.isfinite().all()


def test_directions_have_length_one_and_the_gradient_of_normalisation():
    x = torch.randn(20, 5, dtype=torch.float64)
    torch.testing.assert_close(directions(x), torch.nn.functional.normalize(x, dim=-1))
    assert torch.autograd.gradcheck(directions, x.requires_grad_())
    zero = torch.zeros(3, 5, requires_grad=True)
    directions(zero).sum().backward()
    assert zero.grad.isfinite().all() and not directions(zero).any()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_the_nearest_few_compile_to_one_graph_and_ignore_autocast(metric):
    def run(x, codebook):
        return nearest_codes(x, codebook, 3, metric=metric)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    x, codebook = torch.randn(2, 3, 40, 8, requires_grad=True), torch.randn(3, 60, 8)
    expected = run(x, codebook)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for result in (compiled(x, codebook), run(x, codebook)):
            for found, right in zip(result, expected, strict=True):
                assert torch.equal(found, right) and not found.requires_grad


def test_bad_arguments_of_the_nearest_few_are_named():
    x, codebook = torch.randn(5, 4), torch.randn(3, 4)
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"^k = {k}: must be from 1 to 3"):
            nearest_codes(x, codebook, k)
    with pytest.raises(ValueError, match=r"^metric = 'l1'"):
        nearest_code(x, codebook, metric="l1")  # pyrefly: ignore[bad-argument-type]


def test_directions_of_many_codebooks_are_taken_a_few_at_a_time(monkeypatch):
    x, codebook = torch.randn(5, 7, 4), 10 ** torch.randn(5, 9, 1) * torch.randn(5, 9, 4)
    expected, few = nearest_index(x, codebook, metric="cosine"), nearest_codes(x, codebook, 3, metric="cosine")
    monkeypatch.setitem(api._ENTRIES_AT_ONCE, "cpu", 2 * 9 * 4)
    assert torch.equal(nearest_index(x, codebook, metric="cosine"), expected)
    assert all(map(torch.equal, nearest_codes(x, codebook, 3, metric="cosine"), few))
    assert torch.equal(few.indices[..., 0], expected)
    dense = torch.nn.functional.normalize(x, dim=-1) @ torch.nn.functional.normalize(codebook, dim=-1).mT
    assert torch.equal(expected, dense.argmax(-1))


@pytest.mark.parametrize("over", [(0, None), (None, 0), (1, 0), (2, 1)])
def test_a_transform_over_vectors_codebooks_or_both_finds_the_codes_of_each(over):
    shapes = (2, 7, 4), (2, 5, 4)
    given = [torch.randn(3, *shape) for shape in shapes]
    given = [each[0] if axis is None else each.movedim(0, axis) for each, axis in zip(given, over, strict=True)]
    ones = [[each if axis is None else each.select(axis, i) for each, axis in zip(given, over, strict=True)] for i in range(3)]
    found = torch.func.vmap(nearest_index, in_dims=over)(*given)
    assert torch.equal(found, torch.stack([nearest_index(*one) for one in ones]))
    several = torch.func.vmap(lambda x, codebook: tuple(nearest_codes(x, codebook, 2)), in_dims=over)(*given)
    for field, expected in zip(several, zip(*(nearest_codes(*one, 2) for one in ones), strict=True), strict=True):
        assert torch.equal(field, torch.stack(expected))
