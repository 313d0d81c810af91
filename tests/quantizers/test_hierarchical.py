"""HierarchicalVQ: against the levels written out, its start, its depth, what it refuses. The laws of all quantizers are in tests/laws."""

import pytest
import torch
import torch.nn.functional as F

from vqkit.quantizers import LFQ, Grouped, Hierarchical, HierarchicalVQ, KMeans, NestedDropout, Residual, VectorQuantize, hierarchical
from vqkit.quantizers.hierarchical import Mixer, nested_depth

GRIDS = [(1, 1), (2, 3), (4, 6)]


def pooled(x, mask, grid):
    """[B, H, W, D] -> [B, h, w, D] and the cells [B, h, w] that have any; here the grid divides the positions."""
    tall, wide = x.shape[1] // grid[0], x.shape[2] // grid[1]
    cells = torch.zeros(len(x), *grid, x.shape[-1])
    known = torch.zeros(len(x), *grid, dtype=torch.bool)
    for item in range(len(x)):
        for i in range(grid[0]):
            for j in range(grid[1]):
                window = (item, slice(i * tall, (i + 1) * tall), slice(j * wide, (j + 1) * wide))
                kept = x[window][mask[window]]
                known[item, i, j] = len(kept) > 0
                if len(kept):
                    cells[item, i, j] = kept.mean(0)
    return cells, known


def spread(quantizer, level, cells, size):
    mixer = quantizer.mixers[round(level / 2 * (len(quantizer.mixers) - 1))]
    x = F.interpolate(cells.movedim(-1, 1), size=size, mode="bilinear", align_corners=False)
    return (x + mixer.share * (mixer.conv(x) - x)).movedim(1, -1)


@pytest.mark.parametrize("mixers", [1, 2, None])
@pytest.mark.parametrize("masked", [False, True])
def test_the_levels_written_out(mixers, masked):
    quantizer = HierarchicalVQ(5, 16, GRIDS, mixers=mixers, mixing=0.3, estimator="straight_through")
    assert len(quantizer.mixers) == {1: 1, 2: 2, None: 3}[mixers]
    x = torch.randn(3, 4, 6, 5)
    mask = torch.rand(3, 4, 6) < 0.6 if masked else torch.ones(3, 4, 6, dtype=torch.bool)
    mask[0, :2, :2] = not masked
    codes, residual, total, indices, losses = quantizer.codebook, x.clone(), torch.zeros_like(x), [], []
    for level, grid in enumerate(GRIDS):
        cells, known = pooled(residual, mask, grid)
        nearest = (cells.unsqueeze(-2) - codes).norm(dim=-1).argmin(-1)
        indices.append(nearest.where(known, -1))
        chosen = codes[nearest].where(known.unsqueeze(-1), 0.0)
        losses.append((chosen - cells)[known].square().mean())
        added = spread(quantizer, level, chosen, (4, 6))
        residual, total = residual - added, total + added
    found = quantizer(x, mask if masked else None)
    assert torch.equal(found.indices, torch.cat([grid.flatten(1) for grid in indices], dim=1))
    torch.testing.assert_close(found.quantized, total.where(mask.unsqueeze(-1), 0.0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.loss, torch.stack(losses).mean())
    assert all(torch.equal(one, other) for one, other in zip(quantizer.split(found.indices), indices, strict=True))
    again = quantizer.eval()(x, mask)
    assert torch.equal(quantizer.decode(again.indices).where(mask.unsqueeze(-1), 0.0), again.quantized)


def test_the_gradient_is_that_of_the_levels_in_a_row():
    quantizer = HierarchicalVQ(3, 8, [(1, 1), (2, 2), (4, 4)], estimator="straight_through")
    x = torch.randn(2, 4, 4, 3, requires_grad=True)
    upstream = torch.randn(2, 4, 4, 3)
    found = torch.autograd.grad((quantizer.quantize(x).quantized * upstream).sum(), [x, *quantizer.mixers.parameters()])
    quantizer.eval()
    constants = [level.decode(grid) for level, grid in zip(quantizer._each(), quantizer.split(quantizer.encode(x)), strict=True)]
    residual, total = x, torch.zeros_like(x)
    for level, (grid, value) in enumerate(zip(quantizer.grids, constants, strict=True)):
        cells = F.adaptive_avg_pool2d(residual.movedim(-1, 1), grid).movedim(1, -1)
        added = spread(quantizer, level, cells + (value - cells).detach(), (4, 4))
        residual, total = residual - added, total + added
    expected = torch.autograd.grad((total * upstream).sum(), [x, *quantizer.mixers.parameters()])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_k_means_is_of_what_every_level_sees(shared, by_name):
    x = torch.randn(40, 4, 4, 3) + torch.randn(40, 1, 1, 3) * 5
    quantizer = HierarchicalVQ(3, 12, (1, 2, 4), shared_codebook=shared, init=KMeans(), mixing=0.0)
    quantizer.initialize_(x) if by_name else quantizer(x)
    seen = [840] if shared else [40, 160, 640]
    assert [level.table.count.sum().item() for level in quantizer.levels] == pytest.approx(seen, abs=0.2)  # not yet committed
    quantizer.eval()
    errors = []
    for depth in range(1, 4):
        errors.append((quantizer.decode(quantizer.encode(x)[:, : sum(quantizer.cells[:depth])]) - x).square().mean().item())
    assert errors[0] > 1.1 * errors[1] > 1.2 * errors[2], errors
    for grid in quantizer.split(quantizer.encode(x)):
        assert grid.unique().numel() >= (4 if shared else 10)
    assert len(quantizer.codebooks()) == (1 if shared else 3)


def test_an_input_of_another_size_and_a_coarse_prefix():
    quantizer = HierarchicalVQ(3, 8, (1, 2, 4), axes=1, layout="first").eval()
    x = torch.randn(2, 3, 11)
    quantized, indices, _ = quantizer(x)
    assert indices.shape == (2, 7) and torch.equal(quantizer.decode(indices, (11,)), quantized)
    coarse = quantizer.quantize(x, depth=2).quantized
    assert torch.equal(quantizer.decode(indices[:, :3], (11,)), coarse) and not torch.equal(coarse, quantized)
    assert quantizer.decode(indices).shape == (2, 3, 4) and quantizer.decode_codes(indices).shape == (2, 7, 3)
    assert torch.equal(quantizer.decode_codes(indices)[:, 0], quantizer.codebook[indices[:, 0]])
    assert quantizer.bits_per_vector == 7 * 3 and quantizer.code_shape == (7,) and quantizer.cells == (1, 2, 4)
    lengths = torch.tensor([11, 4])
    assert torch.equal(quantizer.encode(x, lengths=lengths), quantizer.encode(x, torch.arange(11) < lengths.unsqueeze(1)))


def test_nested_dropout_leaves_levels_out_of_output_and_loss_but_all_learn():
    quantizer = HierarchicalVQ(3, 8, (1, 2, 4), shared_codebook=False, nested_dropout=NestedDropout(probability=0.7, min_levels=2, seed=3))
    x = torch.randn(4, 4, 4, 3)
    depths = []
    for step in range(12):
        depth = nested_depth(quantizer.nested_dropout, step, 3)
        assert int(nested_depth(quantizer.nested_dropout, torch.tensor(step), 3)) == depth
        expected = quantizer.quantize(x, depth=depth)
        before = [level.codebook.clone() for level in quantizer.levels]
        each = [loss.item() for loss in quantizer.quantize(x, depth=3).losses.values()][:depth]
        found = quantizer(x)
        assert torch.equal(found.quantized, expected.quantized) and torch.equal(found.indices, expected.indices)
        assert found.loss.item() == pytest.approx(sum(each) / depth, rel=1e-5)
        assert all(not torch.equal(old, level.codebook) for old, level in zip(before, quantizer.levels, strict=True))
        depths.append(depth)
    assert set(depths) == {2, 3}
    many = [nested_depth(NestedDropout(probability=0.3), step, 4) for step in range(4000)]
    assert [many.count(depth) / 4000 for depth in (1, 2, 3, 4)] == pytest.approx([0.1, 0.1, 0.1, 0.7], abs=0.03)


def two():
    return [VectorQuantize(3, 8), VectorQuantize(3, 8)]


@pytest.mark.parametrize(
    ("attempt", "error", "message"),
    [
        (lambda: HierarchicalVQ(3, 8, ()), ValueError, r"^scales is empty"),
        (lambda: HierarchicalVQ(3, 8, 4), TypeError, r"^scales = 4: must be a sequence"),
        (lambda: HierarchicalVQ(3, 8, (2, 1)), ValueError, r"^scales\[1\] = \(1, 1\): must not be smaller than \(2, 2\)"),
        (lambda: HierarchicalVQ(3, 8, (1, (2, 2, 2))), ValueError, r"^scales\[1\] = \(2, 2, 2\): must have 2 numbers"),
        (lambda: HierarchicalVQ(3, 8, (1, 0)), ValueError, r"^scales\[1\] = 0: must be at least 1"),
        (lambda: HierarchicalVQ(3, 8, (1, 2), axes=4), ValueError, r"^axes = 4: must be 1, 2 or 3"),
        (lambda: HierarchicalVQ(3, 8, (1, 2), mixing=2.0), ValueError, r"^mixing = 2.0: must be from 0 to 1"),
        (lambda: HierarchicalVQ(3, 8, (1, 2), mixers=0), ValueError, r"^mixers = 0: must be at least 1"),
        (
            lambda: HierarchicalVQ(3, (8, 4), (1, 2)),
            ValueError,
            r"^codebook_size = \(8, 4\): must be one size where shared_codebook = True",
        ),
        (
            lambda: HierarchicalVQ(3, (8, 4, 2), (1, 2), shared_codebook=False),
            ValueError,
            r"^codebook_size = \(8, 4, 2\): must be one number, or 2",
        ),
        (lambda: HierarchicalVQ(3, 8, (1, 2), heads=2), TypeError, r"^heads: is no option of HierarchicalVQ"),
        (
            lambda: HierarchicalVQ(3, 8, (1, 2), nested_dropout=NestedDropout(min_levels=2)),
            ValueError,
            r"^NestedDropout.min_levels = 2: must be",
        ),
        (lambda: HierarchicalVQ(3, 8, (1, 2), nested_dropout=0.5), TypeError, r"^nested_dropout = 0.5: must be NestedDropout"),
        (lambda: NestedDropout(probability=0.0), ValueError, r"^NestedDropout.probability = 0.0: must be above 0"),
        (lambda: Hierarchical(two(), (1,)), ValueError, r"^scales has 1 entries: must be 2"),
        (lambda: Hierarchical([LFQ(4, heads=2)], (1,)), ValueError, r"^levels\[0\].code_shape = \(2,\)"),
        (lambda: Residual([HierarchicalVQ(3, 8, (1, 2))]), ValueError, r"^layers\[0\] is a HierarchicalVQ: must give indices of vectors"),
        (lambda: Grouped([HierarchicalVQ(3, 8, (1, 2))]), ValueError, r"^parts\[0\] is a HierarchicalVQ"),
        (
            lambda: HierarchicalVQ(3, 8, (1, 2))(torch.randn(2, 5, 3)),
            ValueError,
            r"^x has shape \(2, 5, 3\): must have 2 axes of positions",
        ),
        (lambda: HierarchicalVQ(3, 8, (1, 2))(torch.randn(2, 0, 5, 3)), ValueError, r"^x has shape \(2, 0, 5, 3\)"),
        (lambda: HierarchicalVQ(3, 8, (1, 2)).quantize(torch.randn(2, 2, 2, 3), depth=3), ValueError, r"^depth = 3: must be from 1 to 2"),
        (lambda: HierarchicalVQ(3, 8, (1, 2)).decode(torch.zeros(2, 4, dtype=torch.int64)), ValueError, r"must be \[batch, 1 or 5\]"),
        (lambda: HierarchicalVQ(3, 8, (1, 2)).decode(torch.zeros(2, 5, dtype=torch.int64), (3,)), ValueError, r"^positions = \(3,\): must"),
    ],
)
def test_what_does_not_fit_is_named(attempt, error, message):
    with pytest.raises(error, match=message):
        attempt()


@pytest.mark.parametrize(("grid", "positions"), [((3,), (7,)), ((2, 3), (4, 6)), ((2, 1, 4), (2, 3, 4))])
def test_few_positions_are_mixed_by_products_as_by_a_convolution(grid, positions, monkeypatch):
    mixer, x = Mixer(5, len(grid), 0.3).double(), torch.randn(2, 5, *grid, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 5, *positions, dtype=torch.float64)
    leaves = (x, *mixer.parameters())
    few = mixer(x, positions)
    few_slopes = torch.autograd.grad((few * weights).sum(), leaves)
    monkeypatch.setattr(hierarchical, "_SMALL", 0)
    many = mixer(x, positions)
    torch.testing.assert_close(few, many)
    torch.testing.assert_close(few_slopes, torch.autograd.grad((many * weights).sum(), leaves))
