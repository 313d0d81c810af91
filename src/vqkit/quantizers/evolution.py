"""Codes found by evolution: the bits of an LFQ are the genes of a population, and what they decode to is judged by a function.

Shapes: N members of a population, P... positions of each, H heads, b bits of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqkit.ops.evolution import next_generation
from vqkit.ops.scalar import join_digits, split_digits
from vqkit.quantizers.config import Evolution, check_count, check_kind
from vqkit.quantizers.layout import check_indices, check_tensor
from vqkit.quantizers.lfq import LFQ

Fitness = Callable[[Tensor, Tensor], Tensor]
"""Of what a population decodes to, and of its bits [N, P..., H b] bool: one number a member, [N], the larger the fitter."""


class Generation(NamedTuple):
    """What one round of evolution found."""

    population: Tensor  # [N, P..., H b] bool, the next one
    fitness: Tensor  # [N] of the one before it
    best: Tensor  # [P..., H b] bool, the fittest member of all rounds so far
    best_fitness: float  # its fitness


class EvoLFQ(LFQ):
    """An `LFQ` whose codes can be searched by evolution, for what no gradient reaches.

    `evolution` says how. All other arguments are those of `LFQ`, and so is everything else. Raises TypeError for another kind.
    """

    def __init__(self, dim: int, codebook_size: int | None = None, *, evolution: Evolution = Evolution(), **options: Any) -> None:  # noqa: B008
        super().__init__(dim, codebook_size, **options)
        check_kind("evolution", evolution, Evolution)
        self.evolution = evolution

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.evolution}"

    def bits(self, indices: Tensor) -> Tensor:
        """Indices [N, P...] or [N, P..., heads] -> the bits of their codes, heads side by side: [N, P..., H b] bool; False for -1."""
        check_indices("indices", indices, self.codebook_size)
        bits = split_digits(indices, self.levels).bool()
        return bits if self.heads == 1 else bits.flatten(-2)

    def indices(self, bits: Tensor) -> Tensor:
        """The inverse of `bits`. Raises TypeError for bits that are not bool, ValueError for another number of them."""
        self._check_bits("bits", bits)
        found = join_digits(bits.unflatten(-1, (self.heads, self.width)).to(torch.int64), self.levels)
        return found.squeeze(-1) if self.heads == 1 else found

    def random_population(self, size: int, positions: tuple[int, ...] = (), *, generator: torch.Generator | None = None) -> Tensor:
        """Fair bits [size, *positions, H b]; by the global random generator where none is given."""
        check_count("size", size)
        shape = (size, *positions, self.heads * self.width)
        return torch.randint(0, 2, shape, device=self.counts.updates.device, generator=generator).bool()

    @torch.no_grad()
    def evolve(
        self,
        fitness: Fitness,
        population: Tensor,
        *,
        generations: int = 50,
        decode: Callable[[Tensor], Tensor] | None = None,
        batch_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Generation]:
        """Rounds of evolution of a population [N, P..., H b] bool, such as `bits(encode(x))` or `random_population(...)`.

        In each, every member is decoded, `fitness` judges them, and the next population is made. `decode` [N, P..., D] -> ... stands
        behind the quantizer's own; with `batch_size` so many members are decoded at a time. `best` is the fittest of all members that were
        judged, and `best_fitness` what `fitness` gave it. Draws by the global random generator where none is given.

        Raises ValueError for shapes that do not fit and a population no larger than the number of elites, TypeError for other kinds.
        """
        self._check_bits("population", population)
        check_count("generations", generations)
        if population.dim() < 2 or len(population) <= self.evolution.elites:
            least = self.evolution.elites + 1
            raise ValueError(f"population has shape {tuple(population.shape)}: must be [{least} or more, ..., {self.heads * self.width}]")
        if batch_size is not None:
            check_count("batch_size", batch_size)
        return self._evolve(fitness, population, generations, decode, batch_size, generator)

    def _evolve(
        self,
        fitness: Fitness,
        population: Tensor,
        generations: int,
        decode: Callable[[Tensor], Tensor] | None,
        batch_size: int | None,
        generator: torch.Generator | None,
    ) -> Iterator[Generation]:
        best, best_fitness = population[0].clone(), float("-inf")
        for _ in range(generations):
            with torch.no_grad():
                found = self._judge(fitness, population, decode, batch_size)
                fittest = found.where(~found.isnan(), -torch.inf).argmax()
                if float(found[fittest]) > best_fitness:
                    best, best_fitness = population[fittest].clone(), float(found[fittest])
                population = next_generation(
                    population,
                    found,
                    elites=self.evolution.elites,
                    tournament_size=self.evolution.tournament_size,
                    mutation_rate=self.evolution.mutation_rate,
                    generator=generator,
                )
            yield Generation(population, found, best.clone(), best_fitness)

    def _judge(self, fitness: Fitness, population: Tensor, decode: Callable[[Tensor], Tensor] | None, batch_size: int | None) -> Tensor:
        pieces = population.split(batch_size or len(population))
        decoded = [self.decode(self.indices(piece)) for piece in pieces]
        found = fitness(torch.cat(decoded if decode is None else [decode(vectors) for vectors in decoded]), population)
        check_tensor("fitness", found)
        if found.shape != population.shape[:1]:
            raise ValueError(f"fitness gave {tuple(found.shape)}: must be {tuple(population.shape[:1])}, one number a member")
        return found

    def _check_bits(self, name: str, bits: Tensor) -> None:
        check_tensor(name, bits)
        if bits.dtype != torch.bool:
            raise TypeError(f"{name} is {bits.dtype}: must be torch.bool")
        if bits.dim() < 1 or bits.shape[-1] != self.heads * self.width:
            raise ValueError(f"{name} has shape {tuple(bits.shape)}: must be [..., {self.heads * self.width}], the bits of all heads")
