"""FSQ: its integers, its choices, what it refuses. The laws of all quantizers are in tests/laws, its formula in tests/ops."""

import math

import pytest
import torch

from thread_ranks import in_ranks
from vqkit.ops.codebook import merge_statistics
from vqkit.quantizers import FSQ, LFQ, BinaryMapper, QuantizeDropout, Residual, VectorQuantize


@pytest.mark.parametrize("levels", [(8,) * 20, (2,) * 62, (5, 3, 4) * 9])
def test_more_codes_than_a_float_can_number_round_trip(levels):
    quantizer = FSQ(levels).eval()
    assert quantizer.codebook_size == math.prod(levels) > 2**24
    x = torch.randn(300, len(levels)) * 3
    quantized, indices, _ = quantizer(x)
    assert indices.dtype == torch.int64 and int(indices.max()) > 2**40
    assert torch.equal(quantizer.decode(indices), quantized)
    assert torch.equal(quantizer.digits(indices), quantizer._round(x.unsqueeze(1)).digits.squeeze(1))
    last = torch.tensor([quantizer.codebook_size - 1])
    assert torch.equal(quantizer.digits(last)[0], torch.tensor(levels) - 1)


def test_no_codebook_is_made_unless_asked_for():
    quantizer = FSQ((8, 5, 5))
    assert not list(quantizer.parameters())
    assert sum(t.numel() for t in quantizer.buffers()) == 1
    codes = quantizer.codebook
    assert codes.shape == (200, 3) and torch.equal(quantizer.decode(torch.arange(200)), codes)
    assert len(codes.unique(dim=0)) == 200
    with pytest.raises(ValueError, match=r"^codebook: of 2097152 codes no list is made, only up to 1048576"):
        _ = FSQ((8,) * 7).codebook


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"levels": (4, 1)}, ValueError, r"^levels\[1\] = 1: must be at least 2"),
        ({"levels": (4, 2.5)}, TypeError, r"^levels\[1\] = 2.5: must be an integer"),
        ({"levels": 8}, TypeError, r"^levels = 8: must be a sequence of integers"),
        ({"levels": ()}, ValueError, r"^levels is empty"),
        ({"levels": (2,) * 63}, ValueError, rf"^levels make {2**63} codes: must be below 2\^63"),
        ({"levels": (4,), "heads": 0}, ValueError, r"^heads = 0: must be at least 1"),
        ({"levels": (4,), "dim": 0}, ValueError, r"^dim = 0: must be at least 1"),
        ({"levels": (4,), "bound": "sigmoid"}, ValueError, r"^bound = 'sigmoid': must be one of 'tanh', 'clamp'"),
        ({"levels": (4,), "layout": "middle"}, ValueError, r"^layout = 'middle'"),
        ({"levels": (4,), "masked": "ones"}, ValueError, r"^masked = 'ones'"),
        ({"levels": (4,), "noise_dropout": 1.5}, ValueError, r"^noise_dropout = 1.5: must be from 0 to 1"),
        ({"levels": (4,), "scale": 0.0}, ValueError, r"^scale = 0.0: must be positive"),
        ({"levels": (4, 4), "scale": (1.0,)}, ValueError, r"^scale has 1 entries: must be 2"),
        ({"levels": (4, 4), "scale": (1.0, math.nan)}, ValueError, r"^scale\[1\] = nan"),
        ({"levels": (4, 2), "bound": "centred_tanh"}, ValueError, r'^bound = "centred_tanh": must be "tanh" or "clamp", or symmetric'),
        ({"levels": (4,), "noise_on": "none"}, ValueError, r"^noise_on = 'none': must be one of 'scalars', 'codes'"),
        ({"levels": (4,), "rotation": 1}, TypeError, r"^rotation = 1: must be bool"),
        ({"levels": (4, 4), "scale": "big"}, TypeError, r"^scale = 'big': must be a number"),
    ],
)
def test_what_does_not_fit_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        FSQ(**arguments)


def test_codes_are_scaled():
    x = torch.randn(50, 2)
    plain, scaled = FSQ((5, 4)).eval(), FSQ((5, 4), scale=(0.5, 3.0)).eval()
    factor = torch.tensor([0.5, 3.0])
    found = scaled(x * factor)
    torch.testing.assert_close(found.quantized, plain(x).quantized * factor)
    assert torch.equal(found.indices, plain.encode(x))


def test_symmetric_codes_are_symmetric():
    for levels in ((4,), (2,), (5,)):
        codes = FSQ(levels, symmetric=True).codebook
        torch.testing.assert_close(codes.flip(0), -codes)
    assert FSQ((4,)).codebook.squeeze(-1).tolist() == [-1.0, -0.5, 0.0, 0.5]


def test_the_gradient_is_that_of_the_bounded_scalars():
    x = torch.randn(20, 2, requires_grad=True)
    upstream = torch.randn(20, 2)
    (FSQ((5, 3), symmetric=True)(x).quantized * upstream).sum().backward()
    torch.testing.assert_close(x.grad, upstream * (1 - x.detach().tanh() ** 2))


def test_noise_stands_for_rounding_in_training_alone():
    quantizer = FSQ((8, 4), symmetric=True, noise_dropout=0.25)
    x = torch.randn(20_000, 2)
    rounded = FSQ((8, 4), symmetric=True)(x)
    quantized, indices, _ = quantizer(x)
    assert torch.equal(indices, rounded.indices)
    moved = quantized != rounded.quantized
    assert moved.float().mean().item() == pytest.approx(0.25, abs=0.01)
    away = ((quantized - x.tanh()) / torch.tensor([1 / 7, 1 / 3]))[moved]  # in half steps
    assert away.abs().max() <= 1 + 1e-5 and away.std().item() == pytest.approx(3**-0.5, abs=0.01)
    assert torch.equal(quantizer.eval()(x).quantized, rounded.quantized)


def test_layers_at_the_scale_of_their_steps_add_digits():
    """As a number is written with more and more digits: the error falls by the number of steps with every layer."""
    residual = Residual([FSQ((5, 5), symmetric=True, bound="clamp", scale=0.25**i) for i in range(4)]).eval()
    x = torch.rand(500, 2) * 2 - 1
    indices = residual.encode(x)
    for layers in range(1, 5):
        error = (residual.decode(indices[:, :layers]) - x).abs().max()
        assert error <= 0.25**layers * (1 + 1e-5)
    assert torch.equal(residual(x).quantized, residual.decode(indices))
    better = residual.encode(x, beam_size=4)
    assert (residual.decode(better) - x).square().sum() <= (residual.decode(indices) - x).square().sum()


def test_dropped_layers_and_given_paths():
    residual = Residual([FSQ((4, 4)), FSQ((4, 4), scale=0.25)], quantize_dropout=QuantizeDropout(seed=1))
    x = torch.randn(30, 2)
    depths = {int((residual(x).indices[0] >= 0).sum()) for _ in range(12)}
    assert depths == {1, 2}
    path = torch.randint(0, 16, (30, 2))
    found = residual.quantize(x, indices=path)
    assert torch.equal(found.indices[:, 0], path[:, 0])
    with pytest.raises(TypeError, match=r"^targets: is no option of Residual.quantize"):
        residual.quantize(x, targets=path)


def test_given_indices_are_taken():
    quantizer = FSQ((3, 3), heads=2)
    x = torch.randn(5, 4)
    indices = torch.tensor([[0, 8], [4, -1], [-1, -1], [1, 2], [3, 3]])
    found = quantizer.quantize(x, indices=indices)
    assert torch.equal(found.indices, indices)
    assert torch.equal(found.quantized, quantizer.decode(indices))
    assert found.statistics.vectors.tolist() == [4.0, 3.0] and not found.statistics.non_finite.any()
    for wrong, error, message in (
        (indices + 1, ValueError, r"^indices holds 9"),
        (indices[:, :1], ValueError, r"^indices has shape \(5, 1\)"),
        (indices.float(), TypeError, r"^indices is torch.float32"),
    ):
        with pytest.raises(error, match=message):
            quantizer.quantize(x, indices=wrong)


def test_metrics_count_codes_where_they_can_be_counted():
    quantizer = FSQ((4, 4))
    x = torch.randn(400, 2)
    x[0] = torch.nan
    indices = quantizer(x).indices[1:]
    share = torch.bincount(indices, minlength=16) / 399
    metrics = quantizer.metrics()
    assert metrics["perplexity"] == pytest.approx(torch.special.entr(share).sum().exp().item(), rel=1e-5)
    assert metrics["non_finite"] == 1 and 0 < metrics["relative_error"] < 1
    assert metrics["active"] == pytest.approx((share >= 1 / 160).float().mean().item())
    many = FSQ((8,) * 7)
    many(torch.randn(100, 7))
    metrics = many.metrics()
    assert math.isnan(metrics["perplexity"]) and math.isnan(metrics["active"]) and 0 < metrics["relative_error"] < 1
    assert many.bits_per_vector == 21


def test_levels_are_counted_where_codes_are_too_many():
    levels = (9, 8, 7, 6, 5, 4, 3, 2)
    quantizer = FSQ(levels, heads=2)
    x = torch.randn(300, 16)
    x[:, 8] = 0.0
    x[0] = torch.nan
    digits = quantizer.digits(quantizer(x).indices[1:])
    shares = [torch.stack([torch.bincount(digits[:, h, i], minlength=n) / 299 for h in range(2)]) for i, n in enumerate(levels)]
    bounds = sum(torch.special.entr(share).sum(-1) for share in shares).exp()
    active = sum((share >= 0.1 / n).sum(-1) for share, n in zip(shares, levels, strict=True)) / sum(levels)
    metrics = quantizer.metrics()
    assert metrics["perplexity_bound"] == pytest.approx(bounds.mean().item(), rel=1e-5)
    assert metrics["active_levels"] == pytest.approx(active.mean().item()) and active[1] < active[0]
    assert "perplexity_bound" not in FSQ((4, 4)).metrics()
    residual = Residual([FSQ((4,) * 10), FSQ((4,) * 9, 10)])
    residual(torch.randn(50, 10))
    metrics = residual.metrics()
    assert metrics["perplexity_bound"] == metrics["perplexity_bound/0"] and "perplexity_bound/1" not in metrics
    assert metrics["perplexity"] == metrics["perplexity/1"] > 1


@pytest.mark.parametrize("kind", [lambda: FSQ((4, 4), symmetric=True, heads=2), lambda: BinaryMapper(2, heads=2, free_bits=None)])
def test_what_is_left_out_is_not_in_the_statistics(kind):
    quantizer = kind()
    x = torch.randn(30, 4) + 1
    mask, known = torch.rand(30) < 0.7, torch.rand(30, 2) < 0.7
    indices = torch.randint(0, quantizer.codebook_size, (30, 2))
    rest = quantizer.quantize(x[mask], indices=indices.where(known, -1)[mask]).statistics
    found = quantizer.quantize(x, mask, indices=indices.where(known, -1)).statistics
    torch.testing.assert_close(tuple(found), tuple(rest))
    assert torch.equal(found.vectors, (mask.unsqueeze(-1) & known).sum(0).float()) and not found.non_finite.any()
    for head in range(2):
        kept = mask & known[:, head]
        alone = quantizer.quantize(x[kept], indices=indices[kept]).statistics
        for whole, part in zip(found, alone, strict=True):
            torch.testing.assert_close(whole[head], part[head])


@pytest.mark.parametrize("kind", [lambda: FSQ((4, 4), 5), lambda: FSQ((3, 4, 2), heads=2), lambda: LFQ(6), lambda: BinaryMapper(3)])
def test_encoded_and_decoded_at_once_is_one_after_the_other(kind):
    quantizer = kind().eval()
    x = torch.randn(20, quantizer.dim)
    x[3] = torch.nan
    for mask in (None, torch.rand(20) < 0.6):
        indices, decoded = quantizer.encode_and_decode(x, mask)
        assert torch.equal(indices, quantizer.encode(x, mask)) and torch.equal(decoded, quantizer.decode(indices))


def test_dropped_layers_that_pass_masked_vectors_through_add_nothing():
    layers = [FSQ((4, 4), masked="input"), FSQ((4, 4), scale=0.25, masked="input")]
    residual = Residual(layers, estimator="layers", quantize_dropout=QuantizeDropout(seed=1))
    x = torch.randn(20, 2)
    depths = set()
    for _ in range(12):
        quantized, indices, _ = residual(x)
        depths.add(int((indices[0] >= 0).sum()))
        torch.testing.assert_close(quantized, residual.decode(indices))
    assert depths == {1, 2}


def test_no_index_has_the_digits_zero():
    assert FSQ((3, 4)).digits(torch.tensor([-1, 11])).tolist() == [[0, 0], [2, 3]]


@pytest.mark.parametrize("options", [{}, {"symmetric": True, "scale": (0.5, 1.0, 2.0)}, {"heads": 2}, {"bound": "clamp"}], ids=str)
def test_many_vectors_are_coded_and_counted_as_few(options):
    """Many stand in long rows."""
    quantizer = FSQ((8, 5, 3), **options)
    x = torch.randn(12_000, quantizer.dim, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(x)
    mask = torch.rand(12_000) < 0.7
    for masks in ([None], [mask]):
        whole = quantizer.quantize(x, *masks)
        parts = [quantizer.quantize(x[i : i + 40], *(m if m is None else m[i : i + 40] for m in masks)) for i in range(0, 12_000, 40)]
        for name in ("quantized", "indices"):
            assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))
        gradients = [
            torch.autograd.grad((out * upstream).sum(), x)[0] for out in (whole.quantized, torch.cat([part.quantized for part in parts]))
        ]
        torch.testing.assert_close(*gradients)
        merged = parts[0].statistics
        for part in parts[1:]:
            merged = merge_statistics(merged, part.statistics)
        torch.testing.assert_close(tuple(whole.statistics), tuple(merged))


def test_metrics_are_those_of_all_ranks():
    x = torch.randn(60, 2)
    whole = FSQ((4, 4))
    whole(x)

    def work(reducer):
        quantizer = FSQ((4, 4))
        quantizer.reducer = reducer
        quantizer(x[:45] if reducer.rank else x[45:])
        return quantizer.metrics()

    for found in in_ranks(2, work):
        assert found == pytest.approx(whole.metrics(), rel=1e-5)


def test_a_residual_of_both_kinds_starts_what_waits():
    from vqkit.quantizers import KMeans

    residual = Residual([FSQ((4, 4), symmetric=True), VectorQuantize(2, 8, init=KMeans())])
    x = torch.randn(100, 2)
    residual.initialize_(x)
    assert residual.eval().encode(x).shape == (100, 2)


def test_nearest_codes_come_in_order():
    quantizer = FSQ((4, 3), dim=5)
    x = torch.randn(20, 5)
    indices, decoded = quantizer.nearest(x, 99)
    assert indices.shape == (20, 12) and (indices.sort(-1).values == torch.arange(12)).all()
    assert torch.equal(indices[:, 0], quantizer.encode(x)) and torch.equal(decoded, quantizer.decode(indices))
    assert torch.equal(quantizer.nearest(x, 1)[0], indices[:, :1])
    with pytest.raises(ValueError, match=r"^nearest needs one head"):
        FSQ((4,), heads=2).nearest(torch.randn(3, 2), 1)


@pytest.mark.parametrize("of", [lambda **options: FSQ((4, 5, 3), heads=2, **options), lambda **options: LFQ(6, heads=2, **options)])
def test_a_rotation_turns_the_axes_that_are_rounded(of):
    plain, turned = of(), of(rotation=True)
    matrix = turned.counts.rotation
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(3))
    x = torch.randn(4, 50, 6)
    rotate = lambda values, by: (values.unflatten(-1, (2, 3)) @ by).flatten(-2)  # noqa: E731
    found, expected = turned.quantize(x), plain.quantize(rotate(x, matrix))
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.quantized, rotate(expected.quantized, matrix.mT))
    torch.testing.assert_close(turned.decode(found.indices), found.quantized)
    torch.testing.assert_close(turned.decode_codes(found.indices), found.quantized)
    assert found.losses.keys() == expected.losses.keys()
    for name, loss in found.losses.items():
        torch.testing.assert_close(loss, expected.losses[name])
    restored = of(rotation=True)
    restored.load_state_dict(turned.state_dict())
    assert torch.equal(restored.encode(x), found.indices)


def test_noise_moves_codes_by_half_of_their_range_at_most():
    quantizer = FSQ((3, 5), symmetric=True, noise_dropout=0.25, noise_on="codes", scale=2.0)
    x = torch.randn(4000, 2)
    quantized, indices, _ = quantizer(x)
    moved = quantized - quantizer.decode(indices)
    assert 0.18 < (moved != 0).double().mean() < 0.26  # where the range ends half of the moves are cut off
    assert moved.abs().max() <= 1.0 + 1e-6 and quantized.abs().max() <= 2.0
    assert not (quantizer.eval()(x).quantized - quantizer.decode(indices)).any()
