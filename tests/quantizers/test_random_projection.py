"""The random projection quantizer: nearest directions, nothing that learns, masks, layouts, number formats, engines."""

import pytest
import torch
import torch.nn.functional as F

from vqkit.quantizers import RandomProjectionQuantizer


def test_codes_are_the_nearest_directions_of_random_projections():
    quantizer = RandomProjectionQuantizer(6, 32, 4, heads=3)
    assert not list(quantizer.parameters())
    assert sorted(quantizer.state_dict()) == ["codebook", "projection"]
    x = torch.randn(2, 20, 6) * 5 + 3
    indices = quantizer(x)
    assert indices.shape == (2, 20, 3) and indices.dtype == torch.int64
    projected = (F.layer_norm(x, (6,)) @ quantizer.projection).unflatten(-1, (3, 4))
    cosines = torch.einsum("bthk,hck->bthc", F.normalize(projected, dim=-1), quantizer.codebook)
    assert torch.equal(indices, cosines.argmax(-1))
    torch.testing.assert_close(quantizer.codebook.norm(dim=-1), torch.ones(3, 32))
    assert RandomProjectionQuantizer(40, 2, 10, heads=100).projection.std().item() == pytest.approx(0.2, rel=0.02)


def test_masks_layouts_and_vectors_that_are_not_finite():
    quantizer = RandomProjectionQuantizer(5, 16, 3, norm=False)
    x = torch.randn(2, 4, 3, 5)
    indices = quantizer(x)
    assert indices.shape == (2, 4, 3)
    x[0, 0, 0, 2] = torch.nan
    mask = torch.rand(2, 4, 3) < 0.5
    mask[0, 0, 0] = True
    kept = mask & x.isfinite().all(-1)
    assert torch.equal(quantizer(x, mask), indices.where(kept, -1))
    assert torch.equal(quantizer(x.flatten(1, 2), lengths=torch.tensor([0, 12]))[1], indices[1].flatten())
    first = RandomProjectionQuantizer(5, 16, 3, norm=False, layout="first")
    first.load_state_dict(quantizer.state_dict())
    assert torch.equal(first(x.movedim(-1, 1)), quantizer(x))


def test_narrow_numbers_and_autocast_change_nothing_and_it_compiles():
    quantizer = RandomProjectionQuantizer(8, 64, 4, heads=2)
    x = torch.randn(3, 100, 8).bfloat16()
    expected = quantizer(x.float())
    assert torch.equal(quantizer(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer(x), expected)
    assert torch.equal(torch.compile(quantizer, fullgraph=True, backend="aot_eager")(x), expected)
    assert torch.equal(torch.export.export(quantizer, (x,), strict=False).module()(x), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"codebook_size": 0}, r"^codebook_size = 0: must be at least 1"),
        ({"heads": 0}, r"^heads = 0: must be at least 1"),
        ({"layout": "x"}, r"^layout = 'x'"),
    ],
)
def test_what_does_not_fit_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        RandomProjectionQuantizer(**{"dim": 4, "codebook_size": 8, "codebook_dim": 2, **arguments})
