"""Laws of k-means: it ends where Lloyd's rule ends, uses every code it can, and is the same on every rank."""

import itertools

import pytest
import torch

from thread_ranks import in_ranks
from vqkit.ops.codebook import directions
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
    points = torch.tensor([[3.0, 3.0], [4.0, 3.0], [3.0, 8.0]])
    for x in (points.repeat(50, 1), points, points[:1], points[:1].repeat(9, 1)):
        codes, count = kmeans(x.unsqueeze(0), 8, start=start, generator=generator())
        assert nearest_code(x, codes[0]).squared_distance.max() < 1e-10
        assert count.sum() == len(x)
        assert nearest_code(codes[0], x).squared_distance.max() < 1e-10  # none at zero


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


# Directions


def test_directions_are_clustered_whatever_the_lengths():
    places = directions(torch.randn(2, 5, 16))
    x = (places.repeat_interleave(30, 1) + 0.01 * torch.randn(2, 150, 16)) * torch.logspace(-6, 6, 150).unsqueeze(-1)
    codes, count = kmeans(x, 5, metric="cosine", iterations=30, generator=generator())
    torch.testing.assert_close(codes.norm(dim=-1), torch.ones(2, 5))
    for head in range(2):
        assert ((places[head] @ codes[head].T).amax(1) > 0.999).all()
    assert torch.equal(count, torch.full((2, 5), 30.0))


def test_directions_converge_to_the_mean_directions():
    x = torch.randn(1, 200, 3)
    codes, _ = kmeans(x, 4, metric="cosine", iterations=100, generator=generator())
    indices = nearest_code(x, codes, metric="cosine").indices[0]
    means = torch.stack([directions(x)[0, indices == c].sum(0) for c in range(4)])
    torch.testing.assert_close(directions(means), codes[0])


def test_vectors_without_direction_take_no_part():
    x = torch.cat([torch.randn(1, 40, 3), torch.zeros(1, 9, 3), torch.full((1, 2, 3), torch.nan)], dim=1)
    codes, count = kmeans(x, 4, metric="cosine", generator=generator())
    assert count.sum() == 40 and codes.isfinite().all()
    with pytest.raises(ValueError, match="a head of it holds no finite vector"):
        kmeans(torch.zeros(1, 9, 3), 4, metric="cosine")


# A given start, and several ranks


def test_a_given_start_is_where_it_starts():
    x, places = clusters(2, 40)
    codes, count = kmeans(x, 6, start=places, iterations=1)
    assert (codes - places).norm(dim=-1).max() < 0.02 and torch.equal(count, torch.full((2, 6), 40.0))
    with pytest.raises(ValueError, match=r"^start has shape \(2, 6, 2\): must be \(2, 6, 3\)"):
        kmeans(x, 6, start=places[..., :2])


def on_ranks(shards, run):
    return in_ranks(len(shards), lambda reducer: run(shards[reducer.rank], reducer))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("sizes", [(60, 60), (100, 20), (120, 0), (1, 50, 40, 29)])
def test_from_the_same_start_ranks_find_the_codes_of_one_process(metric, sizes):
    x = torch.randn(2, 120, 3)
    start = torch.randn(2, 8, 3)
    start[:, 3] = 1e3 if metric == "euclidean" else start[:, 2]  # a code that nobody chooses, and must move
    alone = kmeans(x, 8, start=start, metric=metric, generator=generator())
    found = on_ranks(
        x.split(sizes, dim=1),
        lambda part, reducer: kmeans(part, 8, start=start, metric=metric, generator=generator(), reducer=reducer),
    )
    for result in found:
        torch.testing.assert_close(result.codes, alone.codes, rtol=1e-5, atol=1e-5)
        assert torch.equal(result.count, alone.count) and torch.equal(result.codes, found[0].codes)


@pytest.mark.parametrize("start", ["k-means++", "random"])
def test_ranks_that_draw_their_start_agree_and_find_the_clusters(start):
    x, places = clusters(1, 40)
    found = on_ranks(
        x[:, torch.randperm(240)].split((200, 40, 0), dim=1),
        lambda part, reducer: kmeans(part, 6, start=start, iterations=30, generator=generator(), reducer=reducer),
    )
    assert all(torch.equal(result.codes, found[0].codes) for result in found)
    assert found[0].count.sum() == 240
    if start == "k-means++":
        assert (torch.cdist(places[0], found[0].codes[0]).amin(1) < 0.02).all()


def test_all_ranks_hear_that_there_is_no_vector():
    for shards in [(torch.empty(1, 0, 3), torch.full((1, 4, 3), torch.nan))]:
        with pytest.raises(ValueError, match="a head of it holds no finite vector"):
            on_ranks(shards, lambda part, reducer: kmeans(part, 2, generator=generator(), reducer=reducer))
    with pytest.raises(ValueError, match=r"^metric = 'l1'"):
        kmeans(torch.randn(1, 4, 3), 2, metric="l1")


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_the_count_is_of_the_vectors_whose_mean_a_code_is(metric):
    x = torch.randn(2, 300, 5)
    codes, count = kmeans(x, 12, iterations=3, metric=metric, generator=torch.Generator().manual_seed(0))
    assert (count.sum(-1) == 300).all()
    vectors = directions(x) if metric == "cosine" else x
    if metric == "euclidean":
        torch.testing.assert_close((codes * count.unsqueeze(-1)).sum(1), vectors.sum(1), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(codes, kmeans(x, 12, iterations=3, metric=metric, generator=torch.Generator().manual_seed(0)).codes)
