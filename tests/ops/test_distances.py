"""Distances by products are as exact as by differences, wherever vectors and codes are."""

import pytest
import torch

from vqkit.ops import distances
from vqkit.ops.distances import Distances

WIDTH, CODES, NUM = 8, 64, 300


@pytest.fixture(autouse=True)
def products(monkeypatch):
    monkeypatch.setattr(distances, "_FEW_DIFFERENCES", 1)


def clusters(spread, num=NUM):
    """Codes, and vectors of which each is `spread` away from one of them."""
    codes = torch.randn(2, CODES, WIDTH)
    chosen = torch.randint(CODES, (2, num, 1)).expand(-1, -1, WIDTH)
    return codes.gather(1, chosen) + spread * torch.randn(2, num, WIDTH), codes


def exact(x, codes):
    return (x.double().unsqueeze(-2) - codes.double().unsqueeze(-3)).square().sum(-1).sqrt()


@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-3, 0.1, 1.0])
@pytest.mark.parametrize(("offset", "scale"), [(0.0, 1.0), (100.0, 1.0), (0.0, 1e-12), (0.0, 1e12)])
def test_each_distance_is_that_of_explicit_differences(spread, offset, scale):
    x, codes = (scale * tensor + offset for tensor in clusters(spread))
    found, rows = Distances(x, codes), slice(20, 290)
    torch.testing.assert_close(found.tile(rows).distances.double(), exact(x, codes)[:, rows], rtol=1e-5, atol=0.0)
    assert found._by_products
    assert spread > 0 or (found.tile(rows).distances == 0).any(-1).all()


@pytest.mark.parametrize("limit", [1, 16, 1 << 18])
def test_many_near_pairs_are_computed_some_at_a_time_or_all_at_once(limit, monkeypatch):
    monkeypatch.setattr(distances, "_DIFFERENCES_AT_ONCE", limit)
    codes = torch.randn(2, CODES, WIDTH)
    codes[:, 1:30] = codes[:, :1] + 1e-3 * torch.randn(2, 29, WIDTH)
    near = codes[:, :1] + 1e-3 * torch.randn(2, 10, WIDTH)
    for x in (torch.cat([near, torch.randn(2, 200, WIDTH)], dim=1), near.repeat(1, 3, 1)):
        torch.testing.assert_close(Distances(x, codes).tile(slice(None)).distances.double(), exact(x, codes), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("scale", [1e-17, 1e18])
def test_numbers_at_the_end_of_their_range_are_left_to_differences(scale):
    x, codes = (scale * tensor for tensor in clusters(0.1))
    found = Distances(x, codes)
    assert not found._by_products
    assert found.tile(slice(None)).distances.isfinite().all()


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("spread", [0.1, 1.0])
def test_the_gradient_is_that_of_the_dense_formula(by_row, spread):
    x, codes = (tensor.double().requires_grad_() for tensor in clusters(spread, 40))
    weight = torch.randn(2, 40, CODES, dtype=torch.float64)
    share = torch.rand(2, 40, 1, dtype=torch.float64) if by_row else None
    given, weight = weight, weight if share is None else weight * share
    expected = torch.autograd.grad(((x.unsqueeze(-2) - codes.unsqueeze(-3)).square().sum(-1).sqrt() * weight).sum(), (x, codes))
    found, of_x, of_codes = Distances(x.detach(), codes.detach()), torch.zeros_like(x), torch.zeros_like(codes)
    for rows in (slice(0, 13), slice(13, 40)):
        found.add_gradients_(given[:, rows].clone(), found.tile(rows), of_x, of_codes, None if share is None else share[:, rows])
    for a, b in zip((of_x, of_codes), expected, strict=True):
        torch.testing.assert_close(a.detach(), b)


def test_a_vector_on_a_code_has_no_gradient_from_it():
    codes = torch.randn(1, CODES, WIDTH)
    found, of_x, of_codes = Distances(codes.clone(), codes), torch.zeros_like(codes), torch.zeros_like(codes)
    found.add_gradients_(torch.eye(CODES).unsqueeze(0), found.tile(slice(None)), of_x, of_codes)
    assert not of_x.any() and not of_codes.any()


@pytest.mark.parametrize("spread", [1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("near", ["some", "all", "few"])
def test_gradients_near_a_code_are_those_of_explicit_differences(spread, near, monkeypatch):
    """Where a product has lost the digits that vector and code have in common."""
    monkeypatch.setattr(distances, "_COST_OF_A_PAIR", {"some": 0, "all": CODES * NUM, "few": 0}[near])
    monkeypatch.setattr(distances, "_FEW_DIFFERENCES", 1 if near != "few" else 1 << 30)
    x, codes = clusters(spread)
    weight, rows = torch.randn(2, NUM, CODES), slice(20, 290)
    wide = [tensor.double().requires_grad_() for tensor in (x, codes)]
    distance = (wide[0].unsqueeze(-2) - wide[1].unsqueeze(-3)).square().sum(-1).sqrt()
    expected = torch.autograd.grad((distance * weight)[:, rows].sum(), wide)
    found, given = Distances(x, codes), [torch.zeros_like(x), torch.zeros_like(codes)]
    found.add_gradients_(weight[:, rows].clone(), found.tile(rows), *given)
    for gradient, exactly in zip(given, expected, strict=True):
        torch.testing.assert_close(gradient.double(), exactly, rtol=1e-4, atol=1e-4)
