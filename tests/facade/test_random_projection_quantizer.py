"""RandomProjectionQuantizer beside the peer's: all pairs of options, and what is right where the two differ."""

import pytest
import torch

from facade import strict
from facade.compare import compare
from facade.strict import Array
from facade.test_vector_quantize_facade import MAKING, Bridge, sgd
from vqkit.compat.vector_quantize_pytorch import RandomProjectionQuantizer

ITS_OWN = ("codebook_dim", "heads", "use_cosine_sim", "separate_codebook_per_head")
ONE_VALUE = {
    "learnable_codebook": True,
    "affine_param": True,
    "directional_reparam": True,
    "vq_bridge": "bridge",
    "sync_update_v": 0.5,
    "channel_last": False,
    "accept_image_fmap": True,
    "accept_3d_fmap": True,
}
"""Arguments of VectorQuantize that may have but their defaults, with another value."""
OF_VQ = {name: values[:1] if name in ONE_VALUE else values for name, values in MAKING.items() if name not in ITS_OWN}
OPTIONS = {
    "dim": (7,),
    "codebook_size": (11,),
    "codebook_dim": (4, 7),
    "num_codebooks": (1, 2),
    "norm": (True, False),
    **OF_VQ,
    "indices": (False, True),
    "input": ("sequence",),
}


def setting(row, seed=0):
    kwargs = {name: value for name, value in row.items() if name not in ("indices", "input")}
    if kwargs["vq_bridge"]:
        kwargs["vq_bridge"] = Bridge()
    if kwargs["in_place_codebook_optimizer"]:
        kwargs["in_place_codebook_optimizer"] = sgd
    shape = strict.SHAPES[row["input"]] + ((row["num_codebooks"],) if row["num_codebooks"] > 1 else ())
    generator = torch.Generator().manual_seed(3)
    calls = {"indices": torch.randint(0, 11, shape, generator=generator)} if row["indices"] else {}
    return kwargs, strict.placed(row, 7, first=False, seed=seed, scale=1.0), calls


def other(name, value):
    return ({name: value}, lambda row: row.get(name) == value)


REFUSED = (
    other("input", "empty"),
    other("input", "no batch"),
    *(other(name, value) for name, value in ONE_VALUE.items()),
    *(other(name, True) for name in ("heads", "use_cosine_sim", "separate_codebook_per_head")),
    ({"straight_through": True}, lambda row: row["straight_through"] and row["rotation_trick"] is not False),
    (
        {"in_place_codebook_optimizer": "sgd"},
        lambda row: row["in_place_codebook_optimizer"] and not row["orthogonal_reg_weight"],
    ),
)
DEVIATING = {
    "kmeans_init": {"kmeans_init": True},
    "indices & num_codebooks=2": {"indices": True, "num_codebooks": 2},
    "indices & num_codebooks=2 & an optimizer": {"indices": True, "num_codebooks": 2},
    "indices & orthogonal_reg_weight": {"indices": True, "orthogonal_reg_weight": 0.5},
    "indices & orthogonal_reg_weight & an optimizer": {"indices": True, "orthogonal_reg_weight": 0.5},
}
ARRAY = Array("RandomProjectionQuantizer", OPTIONS, setting, REFUSED, DEVIATING)
ARRAYS = (ARRAY,)


@pytest.mark.parametrize("row", ARRAY.rows, ids=range(len(ARRAY.rows)))
def test_every_pair_of_options(row):
    ARRAY.compared(compare, row).check()


# What is right where the two differ


def draw(*shape, seed=0):
    return strict.draw(*shape, seed=seed, scale=1.0)


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


def test_k_means_is_no_matter_of_a_quantizer_that_never_learns():
    made = RandomProjectionQuantizer(dim=7, codebook_size=11, codebook_dim=4, kmeans_init=True)
    with pytest.raises(ValueError, match="k-means"):
        made(draw(2, 50, 7))
    made.vq._codebook.init_embed_(draw(1, 100, 4))
    assert made(draw(2, 50, 7)).max() < 11


def test_inputs_that_do_not_fit_are_named():
    made = RandomProjectionQuantizer(dim=7, codebook_size=11, codebook_dim=4)
    with pytest.raises(ValueError, match=r"x has shape \(2, 5, 6\): must be \[batch, time, 7\]"):
        made(torch.zeros(2, 5, 6))
    for index in (-2, 11):
        with pytest.raises(ValueError, match=f"(indices|targets) holds {index}"):
            made(draw(1, 2, 7), indices=torch.tensor([[0, index]]))
