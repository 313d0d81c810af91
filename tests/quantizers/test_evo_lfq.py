"""EvoLFQ: its best is the best of all that were judged. As an LFQ it is under the laws of tests/laws."""

import pytest
import torch
from torch import nn

from vqkit.quantizers import EvoLFQ, Evolution


@pytest.mark.parametrize("batch_size", [None, 3])
def test_the_best_is_the_best_of_all_that_were_judged(batch_size):
    quantizer = EvoLFQ(4, 16, heads=2, evolution=Evolution(mutation_rate=0.4, elites=0)).eval()
    judged = []

    def fitness(decoded, bits):
        assert torch.equal(decoded, head(quantizer.decode(quantizer.indices(bits))))
        scores = -(decoded - 0.7).square().flatten(1).sum(-1)
        judged.append((bits.clone(), scores.clone()))
        return scores

    head = nn.Linear(4, 3)
    population = quantizer.random_population(8, (2,), generator=torch.Generator().manual_seed(1))
    assert population.shape == (8, 2, 8)
    options = {"generations": 6, "decode": head, "batch_size": batch_size, "generator": torch.Generator().manual_seed(2)}
    for number, found in enumerate(quantizer.evolve(fitness, population, **options), 1):
        assert len(judged) == number and torch.equal(found.fitness, judged[-1][1])
        bits, scores = (torch.cat(each) for each in zip(*judged, strict=True))
        assert found.best_fitness == scores.max().item()
        assert torch.equal(found.best, bits[scores.argmax()])
        found.best.logical_not_()  # is nobody's buffer
    assert number == 6 and not scores.requires_grad


def test_with_an_elite_the_best_is_never_lost_and_a_plain_target_is_found():
    quantizer = EvoLFQ(12, evolution=Evolution(mutation_rate=0.05)).eval()
    target = torch.rand(12) < 0.5
    population = quantizer.random_population(32, generator=torch.Generator().manual_seed(1))

    def fitness(decoded, bits):
        assert torch.equal(decoded > 0, bits)
        return (bits == target).sum(-1).float()

    rounds = list(quantizer.evolve(fitness, population, generations=40, generator=torch.Generator().manual_seed(2)))
    each = [float(found.fitness.max()) for found in rounds]
    assert each == sorted(each) and rounds[-1].best_fitness == 12 and torch.equal(rounds[-1].best, target)


def test_bits_and_indices_are_each_others_inverse():
    for heads, dim in ((1, 4), (2, 8)):
        quantizer = EvoLFQ(dim, 16, heads=heads).eval()
        x = torch.randn(3, 5, dim)
        indices = quantizer.encode(x)
        bits = quantizer.bits(indices)
        assert torch.equal(bits, x > 0) and torch.equal(quantizer.indices(bits), indices)


@pytest.mark.parametrize(
    ("attempt", "error", "message"),
    [
        (lambda q: q.evolve(max, torch.zeros(4, 3)), TypeError, r"^population is torch.float32: must be torch.bool"),
        (
            lambda q: q.evolve(max, torch.zeros(4, 2, dtype=torch.bool)),
            ValueError,
            r"^population has shape \(4, 2\): must be \[\.\.\., 3\]",
        ),
        (lambda q: q.evolve(max, torch.zeros(1, 3, dtype=torch.bool)), ValueError, r"^population has shape \(1, 3\): must be \[2 or more"),
        (lambda q: q.evolve(max, q.random_population(4), generations=0), ValueError, r"^generations = 0"),
        (lambda q: next(q.evolve(lambda v, b: v, q.random_population(4))), ValueError, r"^fitness gave \(4, 3\): must be \(4,\)"),
        (lambda q: next(q.evolve(lambda v, b: 1.0, q.random_population(4))), TypeError, r"^fitness is of type float"),
        (lambda q: q.random_population(0), ValueError, r"^size = 0"),
        (lambda q: EvoLFQ(3, evolution=0.1), TypeError, r"^evolution = 0.1: must be Evolution"),
        (lambda q: Evolution(mutation_rate=2.0), ValueError, r"^Evolution.mutation_rate = 2.0: must be from 0 to 1"),
        (lambda q: Evolution(elites=-1), ValueError, r"^Evolution.elites = -1"),
        (lambda q: EvoLFQ(3, 6), ValueError, r"^codebook_size = 6: must be a power of two"),
    ],
)
def test_what_does_not_fit_is_named(attempt, error, message):
    with pytest.raises(error, match=message):
        attempt(EvoLFQ(3))
