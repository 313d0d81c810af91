"""EvoLFQ by the names of vector-quantize-pytorch: an autoencoder around LFQ whose bits are searched by `vqkit.ops.evolution`.

Shapes: N members of a population, P... positions of each, b bits of all codebooks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from vqkit.compat.vector_quantize_pytorch.arguments import in_these_words
from vqkit.compat.vector_quantize_pytorch.functions import default, exists
from vqkit.compat.vector_quantize_pytorch.lookup_free_quantization import LFQ
from vqkit.compat.vector_quantize_pytorch.rows import project_in, project_out, rows_of
from vqkit.ops import evolution
from vqkit.quantizers.layout import check_tensor

__all__ = ["EvoLFQ", "Result", "Return", "default", "exists"]


class Return(NamedTuple):
    """What a call gives."""

    reconstructed: Tensor
    indices: Tensor
    entropy_aux_loss: Tensor


class Result(NamedTuple):
    """What a round of evolution gives: the next population, and the fittest of all members that were judged so far."""

    pop_bits: Tensor
    best_gene: Tensor | None
    best_fitness: float
    best_decoded: Tensor | None


@contextlib.contextmanager
def _evaluating(module: Module) -> Iterator[None]:
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


@in_these_words(handed_to=LFQ)
class EvoLFQ(Module):
    """As the peer's: `encoder`, an `LFQ` (given, or made of the other arguments), `decoder`; genes are the bits of the codes.

    Bits are 0 and 1, or -1 and 1 where `is_sign` or `return_signs` says so. Raises ValueError and TypeError for what does not fit.
    """

    zero: Tensor

    def __init__(
        self,
        encoder: Module,
        decoder: Module,
        lfq: LFQ | None = None,
        *,
        dim: int | None = None,
        codebook_size: int | None = None,
        num_codebooks: int = 1,
        pop_size: int = 64,
        mutation_rate: float = 0.02,
        tournament_size: int = 2,
        elitism_count: int = 1,
        generations: int = 50,
        **lfq_kwargs: Any,
    ) -> None:
        super().__init__()
        if pop_size <= elitism_count:
            raise ValueError(f"pop_size = {pop_size}: must be greater than elitism_count = {elitism_count}")
        if lfq is None and dim is None and codebook_size is None:
            raise ValueError("lfq, dim and codebook_size are None: must be given, at least one of them")
        self.encoder, self.decoder = encoder, decoder
        made = LFQ(dim=dim, codebook_size=codebook_size, num_codebooks=num_codebooks, **lfq_kwargs) if lfq is None else lfq
        self.lfq = made
        self.pop_size, self.mutation_rate, self.tournament_size = pop_size, mutation_rate, tournament_size
        self.elitism_count, self.generations = elitism_count, generations
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where populations are drawn."""
        return self.zero.device

    # The autoencoder

    def forward(self, x: Tensor, **kwargs: Any) -> Return:
        """x -> reconstruction, indices, loss; other arguments are those of a call of the LFQ."""
        latents = self.encoder(x)
        single = latents.dim() == 2
        quantized, indices, loss = self.lfq(latents.unsqueeze(1) if single else latents, **kwargs)
        if single:
            quantized, indices = quantized.squeeze(1), indices.squeeze(1)
        return Return(self.decoder(quantized), indices, loss)

    @torch.no_grad()
    def encode(self, x: Tensor, return_signs: bool = False) -> Tensor:
        """x -> the bits of its codes, [P..., b], or where latents have their width first [B, b, ...]."""
        with _evaluating(self):
            latents = self.encoder(x)
            single = latents.dim() == 2
            latents = latents.unsqueeze(1) if single else latents
            first = self._is_first(latents.dim())
            native = self.lfq.settle()
            found = native.encode(project_in(self.lfq.project_in, rows_of(latents, self.lfq.dim, first)))
            bits = native.digits(found).bool()
            bits = bits if self.lfq.num_codebooks == 1 else bits.flatten(-2)
        bits = bits.squeeze(1) if single else bits
        return _floats(bits.movedim(-1, 1) if first else bits, return_signs)

    @torch.no_grad()
    def decode_bits(self, bits: Tensor) -> Tensor:
        """Bits [..., b], or as `encode` gives them [B, b, ...], above 0 or not -> what the decoder makes of the codes that have them."""
        check_tensor("bits", bits)
        lfq, width = self.lfq, self.lfq.codebook_dim * self.lfq.num_codebooks
        first = bits.dim() > 2 and bits.shape[1] == width and self._is_first(bits.dim())
        bits = bits.movedim(1, -1) if first else bits
        if bits.shape[-1] != width:
            raise ValueError(f"bits has shape {tuple(bits.shape)}: must be [..., {width}]")
        with _evaluating(self):
            native = lfq.settle()
            found = native._join((bits > 0).unflatten(-1, (lfq.num_codebooks, lfq.codebook_dim)).to(torch.int64))
            found = found.squeeze(-1) if lfq.num_codebooks == 1 else found
            flat = found.reshape(-1, *native.code_shape)
            codes = project_out(lfq.project_out, native.decode_codes(flat).to(lfq.dtype), flat)
            codes = codes.reshape(*bits.shape[:-1], codes.shape[-1])
            return self.decoder(codes.movedim(-1, 1) if first else codes)

    def _is_first(self, rank: int) -> bool:
        """Whether latents of this rank have their width first."""
        return rank >= 4 if self.lfq.channel_first is None else bool(self.lfq.channel_first)

    # The algorithm

    def init_random_population(
        self, pop_size: int | None = None, shape: tuple[int, ...] | None = None, device: Any = None, is_sign: bool = False
    ) -> Tensor:
        """Fair bits [pop_size, *shape]."""
        if shape is None:
            raise ValueError("shape = None: must be that of a member's bits")
        size = default(pop_size, self.pop_size)
        return _floats(torch.randint(0, 2, (size, *shape), device=default(device, self.device)).bool(), is_sign)

    def init_population_from_data(
        self, x: Tensor, pop_size: int | None = None, mutation_rate: float | None = None, is_sign: bool = False
    ) -> Tensor:
        """The bits of x, over and over until there are `pop_size`, each flipped with chance `mutation_rate`."""
        size, rate = default(pop_size, self.pop_size), default(mutation_rate, self.mutation_rate)
        bits = self.encode(x, return_signs=is_sign)
        bits = bits.repeat(-(-size // len(bits)), *(1 for _ in bits.shape[1:]))[:size]
        return self.mutate(bits, mutation_rate=rate, is_sign=is_sign) if rate > 0 else bits

    def uniform_crossover(self, parent1: Tensor, parent2: Tensor) -> Tensor:
        """Each bit of one of two parents."""
        return evolution.crossover(parent1, parent2)

    def mutate(self, population: Tensor, mutation_rate: float | None = None, is_sign: bool = False) -> Tensor:
        """Bits, each flipped with chance `mutation_rate`."""
        return _floats(evolution.mutate(population > 0, default(mutation_rate, self.mutation_rate)), is_sign)

    def tournament_selection(self, population: Tensor, fitnesses: Tensor, tournament_size: int | None = None) -> Tensor:
        """As many members as there are, each the winner of a tournament."""
        return population[evolution.select(fitnesses, (len(population),), default(tournament_size, self.tournament_size))]

    @torch.no_grad()
    def step(
        self,
        pop_bits: Tensor,
        fitness_fn: Callable[[Tensor, Tensor], Any],
        tournament_size: int | None = None,
        mutation_rate: float | None = None,
        elitism_count: int | None = None,
        is_sign: bool = False,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """The next population, and the fitness of the one that is given. Raises TypeError for arguments that there are not."""
        if kwargs:
            raise TypeError(f"{', '.join(kwargs)}: is no option of EvoLFQ.step")
        pieces = pop_bits.split(batch_size) if exists(batch_size) else [pop_bits]
        fitnesses = fitness_fn(torch.cat([self.decode_bits(piece) for piece in pieces]), pop_bits)
        if not isinstance(fitnesses, Tensor):
            fitnesses = torch.tensor(fitnesses, device=self.device, dtype=torch.float32)
        following = evolution.next_generation(
            pop_bits > 0,
            fitnesses,
            elites=default(elitism_count, self.elitism_count),
            tournament_size=default(tournament_size, self.tournament_size),
            mutation_rate=default(mutation_rate, self.mutation_rate),
        )
        return _floats(following, is_sign), fitnesses

    @torch.no_grad()
    def evolve(
        self,
        fitness_fn: Callable[[Tensor, Tensor], Any],
        pop_bits: Tensor | None = None,
        pop_size: int | None = None,
        shape: tuple[int, ...] | None = None,
        generations: int | None = None,
        is_sign: bool = False,
        return_best_decoded: bool = False,
        **step_kwargs: Any,
    ) -> Iterator[Result]:
        """Rounds of evolution; other arguments are those of `step`. `best_gene` is what had `best_fitness`."""
        if pop_bits is None:
            if shape is None:
                raise ValueError("shape = None: must be given where pop_bits is not")
            pop_bits = self.init_random_population(pop_size, shape, is_sign=is_sign)
        best_gene: Tensor | None = None
        best_fitness = float("-inf")
        for _ in range(default(generations, self.generations)):
            judged = pop_bits
            pop_bits, fitnesses = self.step(judged, fitness_fn, is_sign=is_sign, **step_kwargs)
            fittest = int(fitnesses.nan_to_num(float("-inf")).argmax())
            if best_gene is None or float(fitnesses[fittest]) > best_fitness:
                best_gene, best_fitness = judged[fittest].clone(), float(fitnesses[fittest])
            decoded = self.decode_bits(best_gene.unsqueeze(0)).squeeze(0) if return_best_decoded else None
            yield Result(pop_bits, best_gene.clone(), best_fitness, decoded)


def _floats(bits: Tensor, signs: bool) -> Tensor:
    return bits.float() * 2 - 1 if signs else bits.float()
