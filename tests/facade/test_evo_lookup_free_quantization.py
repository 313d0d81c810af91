"""The facade's EvoLFQ beside the peer's: every pair of options, populations on the same draws, and what is right where the two differ."""

import pytest
import torch
from torch import nn

from facade.compare import compare
from facade.covering import covering_array
from facade.peer import facade, peer

OPTIONS = {
    "dim": (4, 6),
    "codebook_size": (16, None),
    "num_codebooks": (1, 2),
    "entropy_loss_weight": (0.0,),  # LFQ alone is compared with its entropies
    "commitment_loss_weight": (0.0, 0.5),
    "vector": (False, True),
}


def valid(row):
    return row["codebook_size"] is not None or row["num_codebooks"] == 1


@pytest.mark.parametrize("row", covering_array(OPTIONS, valid), ids=str)
def test_a_pair_of_options_is_the_peers(row):
    kwargs = {name: value for name, value in row.items() if name != "vector"}
    kwargs |= {"encoder": nn.Linear(5, row["dim"]), "decoder": nn.Linear(row["dim"], 5)}
    x = torch.randn((6, 5) if row["vector"] else (3, 4, 5), generator=torch.Generator().manual_seed(1))
    compare("EvoLFQ", kwargs, x).check()


def both(**options):
    """The peer's and the facade's, alike."""
    torch.manual_seed(0)
    coders = nn.Linear(6, 4), nn.Linear(4, 6)
    return [package.EvoLFQ(*coders, dim=4, **options) for package in (peer, facade)]


@pytest.mark.parametrize("is_sign", [False, True])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_populations_on_the_same_draws_are_the_peers(is_sign, batch_size):
    x = torch.randn(5, 6)
    found = []
    for evo in both(pop_size=9, mutation_rate=0.2, tournament_size=3, elitism_count=2, generations=4):
        torch.manual_seed(3)
        data = evo.init_population_from_data(x, is_sign=is_sign)
        drawn = evo.init_random_population(shape=(2, 4), is_sign=is_sign)
        chosen = evo.tournament_selection(data, torch.arange(9.0))
        crossed = evo.uniform_crossover(data, chosen)
        rounds = list(
            evo.evolve(lambda decoded, bits: decoded[:, 0], data, is_sign=is_sign, batch_size=batch_size, return_best_decoded=True)
        )
        decoded = evo.decode_bits(data)
        found.append([evo.encode(x, return_signs=is_sign), data, drawn, chosen, crossed, decoded, *(r.pop_bits for r in rounds)])
        scores = torch.tensor([r.best_fitness for r in rounds])
        found[-1].append(scores)
        if isinstance(evo, facade.EvoLFQ):
            for r in rounds:
                assert evo.decode_bits(r.best_gene.unsqueeze(0))[0, 0].item() == pytest.approx(r.best_fitness, rel=1e-5)
                torch.testing.assert_close(r.best_decoded, evo.decode_bits(r.best_gene.unsqueeze(0))[0])
    for there, here in zip(*found, strict=True):
        torch.testing.assert_close(here, there)


def test_bits_are_those_of_the_codes_behind_projections():
    evo = facade.EvoLFQ(nn.Identity(), nn.Identity(), dim=7, codebook_size=8, num_codebooks=2).eval()
    x = torch.randn(5, 3, 7)
    bits = evo.encode(x)
    assert bits.shape == (5, 3, 6) and set(bits.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(evo.decode_bits(bits), evo(x).reconstructed)
    assert evo.train().training and torch.equal(evo.encode(x), bits) and evo.training


def test_what_is_wrong_is_named():
    for arguments, message in (({}, r"^lfq, dim and codebook_size"), ({"dim": 4, "pop_size": 1}, r"^pop_size = 1")):
        with pytest.raises(ValueError, match=message):
            facade.EvoLFQ(nn.Identity(), nn.Identity(), **arguments)
    evo = facade.EvoLFQ(nn.Identity(), nn.Identity(), dim=4)
    with pytest.raises(ValueError, match=r"^bits has shape \(2, 3\): must be \[\.\.\., 4\]"):
        evo.decode_bits(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"^shape = None"):
        next(evo.evolve(lambda decoded, bits: decoded.sum(-1)))
    with pytest.raises(TypeError, match=r"^tournament: is no option"):
        evo.step(torch.zeros(4, 4), lambda decoded, bits: decoded.sum(-1), tournament=3)
