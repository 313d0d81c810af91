"""RandomProjectionQuantizer beside the peer's: all pairs of options, and what is right where the two differ."""

import pytest
import torch

from facade.compare import compare
from facade.covering import covering_array
from vqkit.compat.vector_quantize_pytorch import RandomProjectionQuantizer

OPTIONS = {
    "dim": (7,),
    "codebook_size": (11,),
    "codebook_dim": (4, 7),
    "num_codebooks": (1, 2),
    "norm": (True, False),
    "commitment_weight": (1.0, 0.0),
    "indices": (False, True),
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hold(made):
    """Of the peer, too, nothing learns."""
    made.requires_grad_(False)


def test_every_pair_of_options():
    for number, row in enumerate(covering_array(OPTIONS)):
        kwargs = {name: value for name, value in row.items() if name != "indices"}
        shape = (2, 5) if row["num_codebooks"] == 1 else (2, 5, row["num_codebooks"])
        generator = torch.Generator().manual_seed(number)
        calls = {"indices": torch.randint(0, 11, shape, generator=generator)} if row["indices"] else {}
        compare("RandomProjectionQuantizer", kwargs, draw(2, 5, 7, seed=number), calls=calls, seed=number, prepare=hold).check()


# What is right where the two differ


def test_nothing_in_it_learns():
    made = RandomProjectionQuantizer(dim=7, codebook_size=11, codebook_dim=4, num_codebooks=2)
    assert list(made.parameters()) and not any(parameter.requires_grad for parameter in made.parameters())
    before = {name: value.clone() for name, value in made.state_dict().items()}
    x = draw(2, 5, 7).requires_grad_()
    loss = made(x, indices=made(x))
    loss.backward()
    assert x.grad.abs().sum() > 0
    for name, value in made.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_inputs_that_do_not_fit_are_named():
    made = RandomProjectionQuantizer(dim=7, codebook_size=11, codebook_dim=4)
    with pytest.raises(ValueError, match=r"x has shape \(2, 5, 6\): must be \[batch, time, 7\]"):
        made(torch.zeros(2, 5, 6))
    for index in (-2, 11):
        with pytest.raises(ValueError, match=f"(indices|targets) holds {index}"):
            made(draw(1, 2, 7), indices=torch.tensor([[0, index]]))
