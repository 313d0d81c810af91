"""Averages over cells and values between them: against loops over cells and positions, and against torch."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from vqkit.ops import grids
from vqkit.ops.grids import average, interpolate, neighbourhoods

SHAPES = [((7,), (3,)), ((8,), (8,)), ((5, 8), (2, 3)), ((4, 4), (1, 1)), ((3, 4, 5), (2, 2, 5)), ((2, 2), (3, 5))]


@pytest.mark.parametrize(("positions", "grid"), SHAPES)
@pytest.mark.parametrize("weighed", [False, True])
def test_averages_cell_by_cell(positions, grid, weighed):
    x = torch.randn(2, 3, *positions, dtype=torch.float64)
    weights = (torch.rand(2, 1, *positions) < 0.5).double() if weighed else None
    found, share = average(x, grid, weights)
    assert found.shape == (2, 3, *grid) and (share is None) == (weights is None)
    for item, cell in itertools.product(range(2), itertools.product(*map(range, grid))):
        windows = [range(i * T // n, -(-(i + 1) * T // n)) for i, T, n in zip(cell, positions, grid, strict=True)]
        places = list(itertools.product(*windows))
        kept = [place for place in places if weights is None or weights[(item, 0, *place)] > 0]
        expected = sum((x[(item, slice(None), *place)] for place in kept), torch.zeros(3, dtype=torch.float64)) / max(len(kept), 1)
        torch.testing.assert_close(found[(item, slice(None), *cell)], expected)
        if share is not None:
            assert share[(item, 0, *cell)].item() == pytest.approx(len(kept) / len(places))


@pytest.mark.parametrize(("positions", "grid"), SHAPES)
def test_values_between_cells_are_those_of_torch(positions, grid):
    x = torch.randn(2, 3, *grid, dtype=torch.float64, requires_grad=True)
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(grid)]
    expected = F.interpolate(x, size=positions, mode=mode, align_corners=False)
    found = interpolate(x, positions)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(*(torch.autograd.grad((each * upstream).sum(), x)[0] for each in (found, expected)))


CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@pytest.mark.parametrize(("positions", "grid"), SHAPES)
def test_neighbourhoods_are_what_a_convolution_sees(positions, grid):
    x, axes = torch.randn(2, 3, *grid, dtype=torch.float64), len(grid)
    weight = torch.randn(4, 3, *(3,) * axes, dtype=torch.float64)
    columns = (x.flatten(2) @ neighbourhoods(grid, positions, x)).view(2, -1, neighbourhoods(grid, positions, x).shape[1] // 3**axes)
    found = (weight.flatten(1) @ columns).unflatten(-1, positions)
    torch.testing.assert_close(found, CONVOLVE[axes](interpolate(x, positions), weight, padding=1))


def test_constants_of_a_traced_program_are_not_kept():
    def kept():
        return grids._kept_neighbours.cache_info().currsize + grids._kept_neighbourhoods.cache_info().currsize

    before = kept()
    with FakeTensorMode():
        interpolate(torch.randn(1, 1, 13), (17,))
        neighbourhoods((13,), (17,), torch.randn(1))
    assert kept() == before
