"""SimVQ and its residual form beside the peer's: all pairs of options, and what is right where the two differ."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from facade import strict
from facade.compare import compare
from facade.strict import Array
from vqkit.compat.vector_quantize_pytorch import ResidualSimVQ, SimVQ

DIM, CODES = 6, 11


def doubled(codes):
    return 2 * codes


def identity(codes):
    return codes


class Centred(nn.Module):
    """Codes that depend on each other."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, DIM)

    def forward(self, codes):
        return self.linear(codes - codes.mean(0))

    def __repr__(self):
        return "Centred()"


OPTIONS = {
    "codebook_transform": (None, "perceptron", "centred"),
    "init_fn": (identity, doubled),
    "channel_first": (False, True),
    "rotation_trick": (True, False),
    "input_to_quantize_commit_loss_weight": (0.25, 1.0, 0.0),
    "commitment_weight": (1.0, 0.5, 0.0),
    "frozen_codebook_dim": (None, 4),
    "input": ("sequence", "image", "video", "vectors"),
}


def known(row):
    return {**row, "codebook_transform": transform(row)}


def transform(row):
    width = row["frozen_codebook_dim"] or DIM
    if row["codebook_transform"] is None:
        return None
    return Centred(width) if row["codebook_transform"] == "centred" else nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, DIM))


def setting(row, seed=0):
    kwargs = {name: value for name, value in row.items() if name not in ("input", *CALLS)}
    kwargs |= {"dim": DIM, "codebook_size": CODES, "codebook_transform": transform(row)}
    x = strict.placed(row, DIM, first=row["channel_first"], seed=seed, scale=1.0)
    return kwargs, x, {name: row[name] for name in CALLS if name in row}


CALLS = ("return_all_codes", "rand_quantize_dropout_fixed_seed")
EMPTY = (
    ({"input": "empty"}, lambda row: row["input"] == "empty"),
    ({"input": "no batch"}, lambda row: row["input"] == "no batch"),
)
DEVIATING = {"codebook_transform=Centred()": {"codebook_transform": "centred"}}
ARRAY = Array("SimVQ", OPTIONS, setting, EMPTY, DEVIATING, known=known)


def exact(row):
    """Where what is left of a vector is small the library turns it by float32 rounding, in eval mode too: both then compute in float64."""
    return nullcontext({"dtype": torch.float64, "prepare": nn.Module.double} if row["rotation_trick"] else {})


RESIDUAL_OPTIONS = {
    "num_quantizers": (3, 1),
    "heads": (1,),
    "quantize_dropout": (False, True),
    "quantize_dropout_cutoff_index": (0, 1, 3),
    "quantize_dropout_multiple_of": (1, 2),
    **OPTIONS,
    "return_all_codes": (False, True),
    "rand_quantize_dropout_fixed_seed": (None, 1, 5),
}
RESIDUAL_REFUSED = (
    *EMPTY,
    ({"heads": 2}, lambda row: row["heads"] > 1),
    (
        {"quantize_dropout": True, "quantize_dropout_cutoff_index": 3},
        lambda row: row["quantize_dropout"] and row["quantize_dropout_cutoff_index"] >= row["num_quantizers"] > 1,
    ),
    (
        {"input": "image", "quantize_dropout": True, "rand_quantize_dropout_fixed_seed": 1},
        lambda row: strict.may_drop(row) and not row["channel_first"] and row["input"] in ("image", "video", "vectors"),
    ),
)
RESIDUAL = Array("ResidualSimVQ", RESIDUAL_OPTIONS, setting, RESIDUAL_REFUSED, known=known, around=exact)
ARRAYS = (ARRAY, RESIDUAL)


@pytest.mark.parametrize("row", ARRAY.rows, ids=range(len(ARRAY.rows)))
def test_every_pair_of_options_of_sim_vq(row):
    ARRAY.compared(compare, row).check()


@pytest.mark.parametrize("row", RESIDUAL.rows, ids=range(len(RESIDUAL.rows)))
def test_every_pair_of_options_of_the_residual_form(row):
    RESIDUAL.compared(compare, row).check()


# What is right where the two differ


def draw(shape, first):
    x = strict.draw(*shape, DIM, scale=1.0)
    return x.movedim(-1, 1).contiguous() if first else x


def test_no_vectors_have_no_loss():
    for made in (SimVQ(DIM, CODES), ResidualSimVQ(dim=DIM, codebook_size=CODES, num_quantizers=2)):
        x = draw((2, 0), False).requires_grad_()
        quantized, _, loss = made(x)
        assert quantized.shape == x.shape and not loss.any()
        (quantized.sum() + loss.sum()).backward()
        assert not any(parameter.grad is not None and parameter.grad.any() for parameter in made.parameters())


def test_the_map_sees_the_whole_table_once():
    made = SimVQ(DIM, CODES, codebook_transform=nn.Sequential(nn.Linear(DIM, DIM), nn.BatchNorm1d(DIM)))
    indices = torch.tensor([[0, 3, 5]])
    made.indices_to_codes(indices)
    assert made.code_transform[1].num_batches_tracked == 1
    torch.testing.assert_close(made.eval().indices_to_codes(indices), made.codebook[indices])


@pytest.mark.parametrize("index", [-2, CODES])
def test_indices_that_there_are_not_are_refused(index):
    residual = ResidualSimVQ(dim=DIM, codebook_size=CODES, num_quantizers=2)
    for decode in (SimVQ(DIM, CODES).indices_to_codes, residual.get_codes_from_indices):
        with pytest.raises(ValueError, match=f"indices holds {index}"):
            decode(torch.tensor([[0, index]]))
    assert not SimVQ(DIM, CODES).indices_to_codes(torch.tensor([[-1]])).any()


@pytest.mark.parametrize("channel_first", [False, True])
@pytest.mark.parametrize("shape", [(2,), (2, 5), (2, 3, 4)])
def test_dropped_layers_of_any_input_have_no_index_no_loss_and_no_gradient(shape, channel_first):
    made = ResidualSimVQ(dim=DIM, codebook_size=CODES, num_quantizers=3, quantize_dropout=True, channel_first=channel_first)
    quantized, indices, losses, codes = made(draw(shape, channel_first), True, 1)
    assert indices.shape == (*shape, 3) and (indices[..., 1:] == -1).all() and not losses[1:].any()
    torch.testing.assert_close(made.get_output_from_indices(indices), quantized)
    torch.testing.assert_close(codes.sum(0), quantized)
    (quantized.sum() + losses.sum()).backward()
    assert [layer.code_transform.weight.grad is None for layer in made.layers] == [False, True, True]


def test_the_first_layers_decode_whether_or_not_layers_are_dropped():
    made = ResidualSimVQ(dim=DIM, codebook_size=CODES, num_quantizers=3)
    _, indices, _, codes = made(draw((2, 5), False), return_all_codes=True)
    torch.testing.assert_close(made.get_output_from_indices(indices[..., :2]), codes[:2].sum(0))
    assert made.codebook_dim == DIM and made.codebook_size == CODES


def test_arguments_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="heads = 2: must be 1"):
        ResidualSimVQ(dim=DIM, codebook_size=CODES, num_quantizers=2, heads=2)
    with pytest.raises(ValueError, match=r"x has shape \(2, 5, 7\): must be"):
        SimVQ(DIM, CODES)(torch.zeros(2, 5, 7))
    with pytest.raises(ValueError, match="input_to_quantize_commit_loss_weight = -1: must be at least 0"):
        SimVQ(DIM, CODES, input_to_quantize_commit_loss_weight=-1)


def test_a_map_that_is_set_later_is_computed_with():
    made, x = SimVQ(dim=DIM, codebook_size=CODES), draw((2, 5), False)
    made(x)
    made.code_transform = nn.Linear(DIM, DIM, bias=False)
    quantized, indices, _ = made(x)
    torch.testing.assert_close(quantized, made.code_transform(made.frozen_codebook)[indices])
