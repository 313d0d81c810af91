"""A genetic algorithm on rows of bits: the fittest stay, the others are children of two parents each, with some bits flipped.

Shapes: N members of a population, C of the children among them, each with bits of any shape [...].
"""

from __future__ import annotations

import torch
from torch import Tensor


def select(fitness: Tensor, shape: tuple[int, ...], tournament_size: int, generator: torch.Generator | None = None) -> Tensor:
    """The numbers [*shape] of members, each the fittest of `tournament_size` that are drawn, with replacement, from fitness [N]."""
    contenders = torch.randint(0, len(fitness), (*shape, tournament_size), device=fitness.device, generator=generator)
    return contenders.gather(-1, fitness[contenders].argmax(-1, keepdim=True)).squeeze(-1)


def crossover(first: Tensor, second: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Each bit of one of two parents, bool of the same shape, with equal chance."""
    draws = torch.rand(first.shape, device=first.device, generator=generator)
    return torch.where(draws < 0.5, first, second)


def mutate(population: Tensor, rate: float, generator: torch.Generator | None = None) -> Tensor:
    """Bits, bool, each flipped with chance `rate`."""
    draws = torch.rand(population.shape, device=population.device, generator=generator)
    return population ^ (draws < rate)


def next_generation(
    population: Tensor,
    fitness: Tensor,
    *,
    elites: int = 1,
    tournament_size: int = 2,
    mutation_rate: float = 0.02,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The `elites` fittest of a population [N, ...] bool with fitness [N], fittest first, and N - elites children.

    A child has each bit of one of two parents, which won a tournament each, and then some bits flipped. NaN is less fit than anything.
    Draws by the global random generator where none is given.
    """
    fitness = fitness.where(~fitness.isnan(), -torch.inf)
    best = population[fitness.argsort(descending=True)[:elites]]
    parents = select(fitness, (len(population) - elites, 2), tournament_size, generator)
    children = crossover(population[parents[:, 0]], population[parents[:, 1]], generator)
    return torch.cat([best, mutate(children, mutation_rate, generator)])
