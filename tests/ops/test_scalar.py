"""Scalars rounded to levels: against the published formulas."""

import numpy as np
import pytest
import torch

from vqkit.ops.scalar import (
    join_digits,
    level_codes,
    level_digits,
    level_steps,
    list_codes,
    round_to_levels,
    split_digits,
)

LEVELS = [(8, 5, 5, 5), (7, 5, 5, 5, 5), (3, 4, 9, 16), (1000, 3)]


def published(z, levels, eps=1e-3):
    """Appendix A.1 of Mentzer et al. (2023) as a formula, in float64: the codes and the index of z [N, d]."""
    levels = np.asarray(levels)
    half_l = (levels - 1) * (1 - eps) / 2
    offset = np.where(levels % 2 == 1, 0.0, 0.5)
    bounded = np.tanh(z + np.tan(offset / half_l)) * half_l - offset
    half = levels // 2
    codes = np.round(bounded) / half
    basis = np.concatenate(([1], np.cumprod(levels[:-1])))
    return bounded / half, codes, ((codes * half + half) * basis).sum(-1).round().astype(np.int64)


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_it_is_the_published_formula(levels):
    z = torch.randn(4096, len(levels), dtype=torch.float64) * 2
    values, codes, indices = published(z.numpy(), levels)
    found = round_to_levels(z, levels)
    np.testing.assert_allclose(found.values.numpy(), values, rtol=0, atol=1e-14)
    np.testing.assert_array_equal(level_codes(found.digits, levels, torch.float64).numpy(), codes)
    np.testing.assert_array_equal(join_digits(found.digits, levels).numpy(), indices)


@pytest.mark.parametrize("bound", ["centred_tanh", "centred_clamp"])
@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_centred_bounds_have_zero_at_code_zero_and_the_formula_of_their_widths(levels, bound):
    z = torch.randn(4096, len(levels), dtype=torch.float64) * 2
    sizes = np.asarray(levels)
    width, offset = (sizes - 1) * (1 + 1e-3) / 2, np.where(sizes % 2 == 1, 0.0, 0.5)
    if bound == "centred_tanh":
        steps = np.tanh(z.numpy() + np.arctanh(offset / width)) * width - offset
    else:
        steps = np.clip(z.numpy() + offset / width, -1, 1) * width - offset
    found = round_to_levels(z, levels, bound=bound)
    np.testing.assert_allclose(found.values.numpy(), steps / (sizes // 2), rtol=0, atol=1e-14)
    np.testing.assert_array_equal(found.digits.numpy(), np.round(steps).astype(np.int64) + sizes // 2)
    at_zero = round_to_levels(torch.zeros(1, len(levels), dtype=torch.float64), levels, bound=bound)
    assert at_zero.values.abs().max() < 1e-15


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_digits_of_codes_are_those_that_made_them(symmetric):
    levels = (2, 3, 8, 1000)
    digits = torch.stack([torch.randint(0, number, (500,)) for number in levels], dim=-1)
    codes = level_codes(digits, levels, torch.float32, symmetric=symmetric)
    assert torch.equal(level_digits(codes, levels, symmetric=symmetric), digits)
    assert level_digits(torch.full((1, 4), 9.0), levels, symmetric=symmetric).tolist() == [[1, 2, 7, 999]]


def test_zero_has_code_zero():
    levels = (3, 4, 5, 8)
    digits = round_to_levels(torch.zeros(len(levels)), levels).digits
    assert not level_codes(digits, levels, torch.float32).any()


@pytest.mark.parametrize("symmetric", [False, True])
def test_two_levels_part_at_zero(symmetric):
    x = torch.tensor([-3.0, -0.1, -1e-6, 1e-6, 0.1, 3.0]).unsqueeze(-1)
    digits = round_to_levels(x, (2,), symmetric=symmetric).digits.squeeze(-1)
    assert digits.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("number", [2, 3, 4, 5, 8])
def test_symmetric_levels_are_the_nearest_of_evenly_spaced_ones(number):
    x = torch.randn(2000, 1, dtype=torch.float64)
    codes = torch.linspace(-1, 1, number, dtype=torch.float64)
    found = round_to_levels(x, (number,), symmetric=True)
    torch.testing.assert_close(found.values, x.tanh())
    torch.testing.assert_close(level_codes(torch.arange(number).unsqueeze(-1), (number,), torch.float64, symmetric=True).squeeze(-1), codes)
    assert torch.equal(found.digits, (x.tanh() - codes).abs().argmin(-1, keepdim=True))
    assert level_steps((number,), x, symmetric=True) == pytest.approx((codes[1] - codes[0]).item())


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_clamp_rounds_to_the_nearest_code(symmetric):
    levels = (5, 4, 2)
    x = torch.randn(500, 3, dtype=torch.float64, requires_grad=True)
    found = round_to_levels(x, levels, symmetric=symmetric, bound="clamp")
    for place, number in enumerate(levels):
        codes = level_codes(torch.arange(number).unsqueeze(-1), (number,), torch.float64, symmetric=symmetric).squeeze(-1)
        assert torch.equal(found.digits[:, place], (x[:, place].unsqueeze(-1) - codes).abs().argmin(-1))
        inside = (x[:, place] > codes[0]) & (x[:, place] < codes[-1])
        torch.testing.assert_close(found.values[inside, place], x[inside, place])
    assert found.values.abs().max() <= 1


@pytest.mark.parametrize(
    "levels",
    [*LEVELS, (7,) * 8, (7,) * 18, (3, 5, 11) * 4, (2,) * 62, (2**31, 2**31 - 1), (1000,) * 6],
    ids=lambda levels: f"{len(levels)}",
)
def test_integers_and_digits_are_each_others_inverse(levels):
    digits = torch.stack([torch.randint(0, number, (500,)) for number in levels], dim=-1)
    digits[0], digits[1] = 0, torch.tensor(levels) - 1
    indices = join_digits(digits, levels)
    assert indices.dtype == torch.int64 and torch.equal(split_digits(indices, levels), digits)
    for dtype in (torch.float64, torch.float32) if max(levels) <= 2**24 else (torch.float64,):
        assert torch.equal(join_digits(digits.to(dtype), levels), indices)
        assert torch.equal(split_digits(indices, levels, dtype), digits.to(dtype))
    assert indices[0] == 0 and int(indices[1]) == int(np.prod([int(n) for n in levels], dtype=object)) - 1


@pytest.mark.parametrize("first", ["lowest", "highest"])
def test_lists_are_the_codes_of_all_indices_and_kept(first):
    levels, like = (4, 2, 3), torch.zeros(1)
    options = {"scale": (1.0, 0.5, 2.0), "symmetric": True}
    expected = level_codes(split_digits(torch.arange(24), levels, first=first), levels, torch.float32, **options)
    found = list_codes(level_codes, levels, like, first=first, **options)
    assert torch.equal(found, expected) and found is list_codes(level_codes, levels, like, first=first, **options)
    assert not torch.equal(found, list_codes(level_codes, levels, like, first=first, scale=2.0))
    assert list_codes(level_codes, (8,) * 7, like) is None  # too many
