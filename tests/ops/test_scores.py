"""Choices by scores at hand are those in tiles, and a codebook of its own for every vector is that codebook."""

import pytest
import torch

from vqkit.ops import assignment, scores
from vqkit.ops.scores import OwnCodes, cross_entropy, draw, few_scores, mean_cross_entropy, mean_softmax


def pair(leading=(), num=13, codes=7, width=4):
    """Vectors, the same with length 1, and codes."""
    x, codebook = torch.randn(2, num, width, dtype=torch.float64), torch.randn(*leading, codes, width, dtype=torch.float64)
    return x.requires_grad_(), torch.nn.functional.normalize(x, dim=-1), codebook.requires_grad_()


def assert_same_gradients(found, expected, inputs):
    weight = torch.randn_like(expected)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad((result * weight).sum(), inputs, retain_graph=True) for result in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "product"])
def test_choices_by_few_scores_are_those_in_tiles(metric):
    (start, x, codebook), targets = pair((2,)), torch.randint(-1, 7, (2, 13))
    inputs = (start, codebook)
    at_hand = few_scores(x, codebook, metric)
    for found, expected in [
        (cross_entropy(at_hand, targets), assignment.assignment_cross_entropy),
        (mean_cross_entropy(at_hand, targets), assignment.mean_assignment_cross_entropy),
    ]:
        assert_same_gradients(found, expected(x, codebook, targets, metric=metric), inputs)
    found = mean_softmax(at_hand, targets >= 0, 0.3)
    assert_same_gradients(found, assignment.mean_assignment(x, codebook, targets >= 0, temperature=0.3, metric=metric), inputs)
    assert mean_cross_entropy(at_hand, torch.full_like(targets, -1)) == 0
    for num in (1, 3):
        torch.manual_seed(7)
        expected = assignment.sample_indices(x, codebook, num, temperature=0.3, metric=metric)
        torch.manual_seed(7)
        assert torch.equal(draw(at_hand, num, 0.3), expected)


def test_many_scores_are_not_at_hand():
    x, codebook = torch.randn(1, 1024, 64), torch.randn(1, 512, 64)
    assert few_scores(x, codebook, "euclidean") is None and few_scores(x[:, :0], codebook, "euclidean").shape == (1, 0, 512)


@pytest.mark.parametrize("estimator", ["straight_through", "reinmax"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (3, 0, 2, 1)])
def test_own_codes_are_read_in_any_order(order, late, metric, estimator, monkeypatch):
    """Each beside a codebook of one vector, one by one, in tiles."""
    monkeypatch.setitem(scores._ENTRIES_AT_ONCE, "cpu", 1 if late else 1 << 18)
    there = (2, 3, 1, 4)  # heads and positions, in the order of the memory
    start, x, codes = pair(there, num=12)
    positions = [there[axis] for axis in order]
    turned = codes.permute(*order, 4, 5)
    shape, rows = (positions[0], 24 // positions[0]), x.flatten(0, 1)
    vectors = rows.view(*shape, 4)
    own = OwnCodes(turned, metric)
    assert order != (0, 1, 2, 3) or own.codes.is_set_to(codes.view(24, 7, 4)) or own.metric == "product"
    ordered = own.arrange(vectors)
    found = own.scores(ordered)
    singles = rows.unsqueeze(-2), turned.reshape(24, 7, 4)
    targets, places = torch.randint(0, 7, shape), torch.randint(-1, 7, (*shape, 2))
    expected = assignment.assignment_cross_entropy(*singles, targets.view(24, 1), metric=metric).view(shape)
    assert_same_gradients(cross_entropy(own.restore(found, shape), targets), expected, (start, codes))
    indices = own.arrange(places)
    taken = own.take(indices)
    expected = assignment.soft_codes(
        singles[0].expand(-1, 2, -1),
        torch.nn.functional.normalize(singles[1], dim=-1) if metric == "cosine" else singles[1],
        places.view(24, 2),
        temperature=0.4,
        estimator=estimator,
        metric="product" if metric == "cosine" else metric,
    )
    softened = own.soften(taken, found, indices, 0.4, estimator)
    assert_same_gradients(own.restore(softened, shape).reshape(24, 2, 4), expected, (start, codes))
    assert torch.equal(softened, taken)


@pytest.mark.parametrize("num", [1, 2, 3, 5, 8])
def test_the_nearest_of_own_codes_are_sorted(num):
    """Among equal ones the first; none twice, even where no other is near enough for its distance to be a number."""
    x, codes = torch.randn(20, 4), torch.randn(20, 8, 4)
    codes[:5, 3:6] = codes[:5, 3:4]
    codes[5:9, 1:] = 3e38
    x[9] = torch.inf
    own = OwnCodes(codes, "euclidean")
    distance = (x.unsqueeze(1) - codes).norm(dim=-1)
    expected = distance.sort(dim=-1, stable=True)
    expected = expected.indices.where(expected.values.isfinite(), -1)[:, :num]
    for scores_at_hand in (None, own.scores(x)):
        found, known = own.nearest(x, num, scores_at_hand)
        assert torch.equal(found, expected) and not known
    found, known = OwnCodes(codes[10:], "euclidean").nearest(x[10:], num)
    assert torch.equal(found, expected[10:]) and known


def test_own_codes_in_another_order_are_not_copied():
    codes = torch.randn(1, 2, 3, 5, 7, 4)
    own = OwnCodes(codes.transpose(2, 3), "euclidean")
    assert own.codes.data_ptr() == codes.data_ptr() and own.codes.shape == (30, 7, 4)
