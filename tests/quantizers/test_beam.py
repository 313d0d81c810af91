"""Beam search: greedy at one path, exhaustive at enough of them, better on average in between; and its edges."""

import itertools

import pytest
import torch

from vqkit.quantizers.beam import beam_search

CODES, DIM, LAYERS = 4, 3, 3


@pytest.fixture
def books():
    return [torch.randn(CODES, DIM, dtype=torch.float64) * 0.7**layer for layer in range(LAYERS)]


@pytest.fixture
def x():
    return torch.randn(50, DIM, dtype=torch.float64)


def proposing(books, shape=()):
    """The nearest codes of each layer, by all distances; indices with more axes where `shape` asks for them."""

    def propose(layer, residual, partial, num):
        found = torch.cdist(residual, books[layer]).argsort(dim=-1, stable=True)[:, :num]
        return found.reshape(*found.shape, *(1 for _ in shape)).expand(*found.shape, *shape), books[layer][found]

    return propose


def error_of(x, books, indices):
    return (x - sum(book[indices[:, layer]] for layer, book in enumerate(books))).square().sum(-1)


def greedy(x, books):
    residual, indices = x, []
    for book in books:
        indices.append(torch.cdist(residual, book).argmin(-1))
        residual = residual - book[indices[-1]]
    return torch.stack(indices, dim=1)


def exhaustive(x, books):
    """The least error of all paths."""
    paths = torch.tensor(list(itertools.product(*(range(len(book)) for book in books))))
    sums = sum(book[paths[:, layer]] for layer, book in enumerate(books))
    return torch.cdist(x, sums).square().min(1).values


def test_one_path_is_greedy(x, books):
    assert torch.equal(beam_search(x, LAYERS, proposing(books), 1), greedy(x, books))


@pytest.mark.parametrize("size", [CODES ** (LAYERS - 1), 100])
def test_enough_paths_find_the_best_of_all(x, books, size):
    found = beam_search(x, LAYERS, proposing(books), size)
    torch.testing.assert_close(error_of(x, books, found), exhaustive(x, books))


def test_wider_beams_are_no_worse_on_average(x, books):
    errors = [error_of(x, books, beam_search(x, LAYERS, proposing(books), size)).mean() for size in (1, 2, 4, 8, 16)]
    assert all(wider <= narrower for narrower, wider in itertools.pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]


def textbook(x, books, size):
    """One vector at a time, lists of (indices, sum of codes), kept by the error of the path."""
    found = []
    for vector in x:
        paths = [((), torch.zeros_like(vector))]
        for book in books:
            grown = [((*indices, code), total + book[code]) for indices, total in paths for code in range(len(book))]
            paths = sorted(grown, key=lambda path: (vector - path[1]).square().sum().item())[:size]
        found.append(paths[0][0])
    return torch.tensor(found)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_it_is_the_textbook_beam(x, books, size):
    assert torch.equal(beam_search(x, LAYERS, proposing(books), size), textbook(x, books, size))


def test_weights_compete_by_the_weighted_sum_of_errors(x, books):
    weights = [3.0, 0.5, 2.0]
    found = beam_search(x, LAYERS, proposing(books), 100, weights=weights)

    def score(indices):
        return sum(weights[i] * error_of(x, books[: i + 1], indices[:, : i + 1]) for i in range(LAYERS))

    every = [torch.tensor(path).expand(len(x), -1) for path in itertools.product(range(CODES), repeat=LAYERS)]
    torch.testing.assert_close(score(found), torch.stack([score(path) for path in every]).min(0).values)
    assert (score(found) < score(beam_search(x, LAYERS, proposing(books), 100))).any()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_layers_behind_the_depth_take_no_part(x, books, depth):
    found = beam_search(x, LAYERS, proposing(books), 4, depth=torch.tensor(depth))
    assert torch.equal(found[:, :depth], beam_search(x, depth, proposing(books), 4))
    assert (found[:, depth:] == -1).all()


def test_codebooks_may_be_smaller_than_the_beam_and_indices_have_more_axes(x):
    books = [torch.randn(size, DIM, dtype=torch.float64) for size in (2, 5, 1)]
    found = beam_search(x, LAYERS, proposing(books, (2,)), 6)
    assert found.shape == (len(x), LAYERS, 2)
    torch.testing.assert_close(error_of(x, books, found[..., 0]), exhaustive(x, books))


def test_nothing_to_search(books):
    assert beam_search(torch.zeros(0, DIM, dtype=torch.float64), LAYERS, proposing(books), 4).shape == (0, LAYERS)


def test_chunks_are_the_whole(x, books, monkeypatch):
    whole = beam_search(x, LAYERS, proposing(books), 3)
    monkeypatch.setattr("vqkit.quantizers.beam._ELEMENTS", 7 * 9 * DIM)
    assert torch.equal(beam_search(x, LAYERS, proposing(books), 3), whole)


def test_no_layer_is_asked_for_more_than_a_chunk(x, books, monkeypatch):
    asked = []

    def propose(layer, residual, partial, num):
        asked.append(len(residual))
        return proposing(books)(layer, residual, partial, num)

    monkeypatch.setattr("vqkit.quantizers.beam._ELEMENTS", 7 * 9 * DIM)
    beam_search(x, LAYERS, propose, 3)
    assert max(asked) == 7 * 3


def test_a_vector_that_is_not_finite_leaves_the_others_alone(x, books):
    spoiled = x.clone()
    spoiled[3] = torch.nan
    found, expected = (beam_search(data, LAYERS, proposing(books), 3) for data in (spoiled, x))
    others = torch.arange(len(x)) != 3
    assert torch.equal(found[others], expected[others])
