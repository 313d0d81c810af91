"""Laws of k-means: it ends where Lloyd's rule ends, uses every code it can, and is the same on every rank."""

import itertools

import pytest
import torch

from vqkit.ops.kmeans import kmeans
from vqkit.ops.nearest_code import nearest_code


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def clusters(heads, per_cluster, centres=6, width=3, spread=0.01):
    places = 10 * torch.randn(heads, centres, width)
    return places.repeat_interleave(per_cluster, 1) + spread * torch.randn(heads, centres * per_cluster, width), places


@pytest.mark.parametrize("seed", range(5))
def test_separate_clusters_are_found(seed):
    x, places = clusters(2, 40)
    codes, count = kmeans(x, 6, generator=generator(seed))
    for head in range(2):
        assert (torch.cdist(places[head], codes[head]).amin(1) < 0.02).all()
    assert torch.equal(count, torch.full((2, 6), 40.0))


def test_codes_are_the_means_of_their_vectors_after_convergence():
    x = torch.randn(1, 200, 2)
    codes, count = kmeans(x, 5, iterations=100, generator=generator())
    indices = nearest_code(x, codes).indices[0]
    assert torch.equal(indices.bincount(minlength=5).float(), count[0])
    torch.testing.assert_close(torch.stack([x[0, indices == c].mean(0) for c in range(5)]), codes[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("start", ["k-means++", "random"])
def test_more_iterations_never_fit_worse(start):
    x = torch.randn(1, 300, 4)
    errors = [
        nearest_code(x, kmeans(x, 16, iterations=i, start=start, generator=generator()).codes).squared_distance.sum() for i in (1, 3, 9, 27)
    ]
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in itertools.pairwise(errors))


@pytest.mark.parametrize("start", ["k-means++", "random"])
def test_duplicate_points_and_fewer_vectors_than_codes(start):
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 5.0]])
    for x in (points.repeat(50, 1), points, points[:1], points[:1].repeat(9, 1)):
        codes, count = kmeans(x.unsqueeze(0), 8, start=start, generator=generator())
        assert nearest_code(x, codes[0]).squared_distance.max() < 1e-10
        assert codes.isfinite().all() and count.sum() == len(x)


def test_no_code_is_left_empty_when_the_start_is_bad():
    """Almost all points are one: a random start takes it several times over, and the empty codes must move to the others."""
    x = torch.cat([torch.zeros(200, 2), 10 * torch.randn(7, 2)]).unsqueeze(0)
    codes, count = kmeans(x, 8, start="random", iterations=20, generator=generator())
    assert (count > 0).all() and nearest_code(x, codes).squared_distance.max() < 1e-10


def test_vectors_that_do_not_count_influence_nothing():
    x, _ = clusters(2, 20)
    mask = torch.rand(2, 120) < 0.7
    spoiled = x.masked_fill(~mask.unsqueeze(-1), 1e6)
    found, clean = (kmeans(v, 6, mask=mask, generator=generator()) for v in (spoiled, x))
    assert torch.equal(found.codes, clean.codes) and torch.equal(found.count, clean.count)
    assert torch.equal(clean.count.sum(-1), mask.sum(-1).float())
    for head in range(2):
        alone = nearest_code(x[head, mask[head]], clean.codes[head])
        assert torch.equal(alone.indices.bincount(minlength=6).float(), clean.count[head])
        assert alone.squared_distance.max() < 1.0  # no code was drawn away from the clusters by what is masked
    spoiled[~mask] = torch.nan
    assert torch.equal(kmeans(spoiled, 6, generator=generator()).codes, clean.codes)


def test_the_same_generator_gives_the_same_codes_and_leaves_the_global_one_alone():
    x = torch.randn(2, 100, 3)
    before = torch.get_rng_state()
    assert torch.equal(kmeans(x, 8, generator=generator(3)).codes, kmeans(x, 8, generator=generator(3)).codes)
    assert torch.equal(torch.get_rng_state(), before)


def test_precision_is_that_of_the_vectors_or_float32():
    for dtype, expected in [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)]:
        assert kmeans(torch.randn(1, 50, 3, dtype=dtype), 4, generator=generator()).codes.dtype == expected


def test_bad_arguments_are_named():
    x = torch.randn(2, 9, 3)
    with pytest.raises(ValueError, match=r"^codebook_size = 0"):
        kmeans(x, 0)
    with pytest.raises(ValueError, match=r"^iterations = 0"):
        kmeans(x, 2, iterations=0)
    with pytest.raises(ValueError, match=r"^start = 'best'"):
        kmeans(x, 2, start="best")  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(ValueError, match="a head of it holds no finite vector"):
        kmeans(torch.stack([x[0], torch.full((9, 3), torch.nan)]), 2)
