"""SimVQ and its residual form beside the peer's: all pairs of options, and what is right where the two differ."""

import functools

import pytest
import torch
from torch import nn

from facade.compare import compare
from facade.covering import covering_array
from vqkit.compat.vector_quantize_pytorch import ResidualSimVQ, SimVQ

DIM, CODES = 6, 11


def doubled(codes):
    return 2 * codes


def identity(codes):
    return codes


OPTIONS = {
    "codebook_transform": (None, "perceptron"),
    "init_fn": (identity, doubled),
    "channel_first": (False, True),
    "rotation_trick": (True, False),
    "input_to_quantize_commit_loss_weight": (0.25, 1.0, 0.0),
    "commitment_weight": (1.0, 0.5),
    "frozen_codebook_dim": (None, 4),
    "input": ((2, 5), (2, 3, 4), (2,)),
}

RESIDUAL_OPTIONS = {
    "num_quantizers": (3, 1),
    "heads": (1,),
    "quantize_dropout": (False, True),
    "quantize_dropout_cutoff_index": (0, 1),
    "quantize_dropout_multiple_of": (1, 2),
    "channel_first": (False, True),
    "rotation_trick": (True, False),
    "input_to_quantize_commit_loss_weight": (0.25, 0.0),
    "codebook_transform": (None, "perceptron"),
    "init_fn": (identity, doubled),
    "commitment_weight": (1.0, 0.5),
    "frozen_codebook_dim": (None, 4),
    "return_all_codes": (False, True),
    "rand_quantize_dropout_fixed_seed": (None, 1),
    "input": ((2, 5), (2, 3, 4)),
}

CALLS = ("return_all_codes", "rand_quantize_dropout_fixed_seed")


def valid_residual(row):
    image = len(row["input"]) > 2
    return row["channel_first"] or not (image and row["quantize_dropout"])  # the peer's own indices do not fit together then


@functools.cache
def rows():
    return covering_array(OPTIONS), covering_array(RESIDUAL_OPTIONS, valid_residual)


def draw(shape, first, seed=0):
    x = torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(seed))
    return x.movedim(-1, 1).contiguous() if first else x


def transform(row):
    if row["codebook_transform"] is None:
        return None
    return nn.Sequential(nn.Linear(row["frozen_codebook_dim"] or DIM, 8), nn.ReLU(), nn.Linear(8, DIM))


def test_every_pair_of_options_of_sim_vq():
    for number, row in enumerate(rows()[0]):
        kwargs = {name: value for name, value in row.items() if name != "input"} | {"dim": DIM, "codebook_size": CODES}
        kwargs["codebook_transform"] = transform(row)
        compare("SimVQ", kwargs, draw(row["input"], row["channel_first"], number), seed=number).check()


def test_every_pair_of_options_of_the_residual_form():
    for number, row in enumerate(rows()[1]):
        kwargs = {name: value for name, value in row.items() if name not in ("input", *CALLS)} | {"dim": DIM, "codebook_size": CODES}
        kwargs["codebook_transform"] = transform(row)
        x = draw(row["input"], row["channel_first"], number)
        compare("ResidualSimVQ", kwargs, x, calls={name: row[name] for name in CALLS}, seed=number).check()


# What is right where the two differ


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
