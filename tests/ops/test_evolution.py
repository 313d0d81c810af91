"""The genetic algorithm: against loops over members and bits on the same draws."""

import torch

from vqkit.ops.evolution import crossover, mutate, next_generation, select


def seeded():
    return torch.Generator().manual_seed(3)


def test_a_generation_member_by_member():
    population, fitness = torch.rand(9, 2, 5) < 0.5, torch.randn(9)
    fitness[4], fitness[7] = 50.0, torch.nan
    found = next_generation(population, fitness, elites=2, tournament_size=3, mutation_rate=0.3, generator=seeded())
    order = sorted((n for n in range(9) if n != 7), key=lambda n: -fitness[n].item())
    assert torch.equal(found[:2], population[order[:2]]) and order[0] == 4
    generator = seeded()
    contenders = torch.randint(0, 9, (7, 2, 3), generator=generator)
    mixed, flipped = torch.rand(7, 2, 5, generator=generator), torch.rand(7, 2, 5, generator=generator)
    for child in range(7):
        parents = [min(three, key=lambda n: order.index(n) if n in order else 99) for three in contenders[child].tolist()]
        for place in range(2):
            for bit in range(5):
                own = population[parents[0] if mixed[child, place, bit] < 0.5 else parents[1], place, bit].item()
                assert found[2 + child, place, bit].item() == (own != (flipped[child, place, bit] < 0.3).item())


def test_extremes():
    bits = torch.rand(4, 6) < 0.5
    assert torch.equal(mutate(bits, 0.0), bits) and torch.equal(mutate(bits, 1.0), ~bits)
    assert torch.equal(crossover(bits, bits), bits)
    child = crossover(torch.zeros(1, 4000, dtype=torch.bool), torch.ones(1, 4000, dtype=torch.bool))
    assert 1800 < int(child.sum()) < 2200
    assert set(select(torch.tensor([1.0, 3.0, 2.0]), (50,), 200).tolist()) == {1}
    before = torch.get_rng_state()
    next_generation(bits, torch.randn(4, generator=seeded()), generator=seeded())
    assert torch.equal(torch.get_rng_state(), before)
