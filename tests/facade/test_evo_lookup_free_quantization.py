"""The facade's EvoLFQ beside the peer's: every pair of options, populations on the same draws, and what is right where the two differ."""

import pytest
import torch
from torch import nn

from facade import strict
from facade import test_lookup_free_quantization as of_lfq
from facade.compare import compare, compare_kinds
from facade.peer import facade, peer
from facade.strict import Array


class On(nn.Module):
    """A linear layer of vectors, wherever they have their width."""

    def __init__(self, inner, outer, first):
        super().__init__()
        self.linear, self.axis = nn.Linear(inner, outer), 1 if first else -1

    def forward(self, x):
        return self.linear(x.movedim(self.axis, -1)).movedim(-1, self.axis).contiguous()


WIDTH = 5
OPTIONS = {"coders": ("linear", "identity"), **of_lfq.OPTIONS, "return_loss_breakdown": (False,)}


def setting(row, seed=0):
    kwargs, x, calls = of_lfq.setting(row, seed)
    width, first = row["dim"] or of_lfq.inner_width(row) or 4, row["input"] in ("image", "video") or bool(row["channel_first"])
    if kwargs.pop("coders") == "identity":
        return {"encoder": nn.Identity(), "decoder": nn.Identity(), **kwargs}, x, calls
    x = strict.placed(row, WIDTH, first=first, seed=seed, scale=1.0)
    return {"encoder": On(WIDTH, width, first), "decoder": On(width, WIDTH, first), **kwargs}, x, calls


REFUSED = (
    *(rule for rule in of_lfq.REFUSED if rule[0] != {"input": "vectors"}),
    ({"input": "vectors", "channel_first": True}, lambda row: row["input"] == "vectors" and row["channel_first"]),
    ({"return_loss_breakdown": True}, lambda row: row["return_loss_breakdown"]),
)
DEVIATING = {
    **of_lfq.DEVIATING,
    "bits behind projections": {},
    "orthogonal_rotation": {"dim": 5, "codebook_size": None, "orthogonal_rotation": True},
    "channel_first": {"dim": 5, "codebook_size": None, "channel_first": True, "has_projections": True},
}
ARRAY = Array("EvoLFQ", OPTIONS, setting, REFUSED, DEVIATING, around=of_lfq.alike)
ARRAYS = (ARRAY,)


@pytest.mark.parametrize("row", ARRAY.rows, ids=range(len(ARRAY.rows)))
def test_a_pair_of_options_is_the_peers(row):
    ARRAY.compared(compare, row).check()


@pytest.mark.parametrize("dim", [4, 6])
def test_an_lfq_that_is_given_is_used(dim):
    def made(package):
        def make(**options):
            return package.EvoLFQ(nn.Linear(5, dim), nn.Linear(dim, 5), package.LFQ(**options))

        return make

    options = {"dim": dim, "codebook_size": 16, "commitment_loss_weight": 0.5, "entropy_loss_weight": 0.0}
    compare_kinds("EvoLFQ", (made(peer), made(facade)), options, strict.draw(3, 4, 5)).check()


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


@pytest.mark.parametrize(
    "options, shape, axis",
    [
        ({}, (5,), -1),
        ({}, (5, 3), -1),
        ({}, (5, 3, 4), 1),
        ({"channel_first": True}, (5, 3), 1),
        ({"orthogonal_rotation": True}, (5, 3), -1),
        ({"spherical": True}, (5, 3), -1),
    ],
    ids=str,
)
@pytest.mark.parametrize("dim", [7, 6])
def test_bits_are_those_of_the_codes_that_a_call_gave(options, shape, axis, dim):
    evo = facade.EvoLFQ(nn.Identity(), nn.Identity(), dim=dim, codebook_size=8, num_codebooks=2, **options).eval()
    x = strict.draw(*shape, dim).movedim(-1, axis)
    bits = evo.encode(x)
    assert bits.movedim(axis, -1).shape == (*shape, 6)
    assert set(bits.unique().tolist()) == {0.0, 1.0}
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
