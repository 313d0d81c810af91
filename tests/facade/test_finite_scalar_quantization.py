"""FSQ and its residual forms beside the peer's: all pairs of options, and what is right where the two differ."""

import copy
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from facade import strict
from facade.compare import compare
from facade.peer import peer
from facade.strict import Array, draw, in_double
from vqkit.compat.vector_quantize_pytorch import FSQ, GroupedResidualFSQ, ResidualFSQ

OPTIONS = {
    "levels": ([8, 5, 5], (4, 4, 4), [2, 3, 6]),
    "dim": (None, 7),
    "num_codebooks": (1, 2),
    "keep_num_codebooks_dim": (None, True, False),
    "scale": (None, 2.0),
    "allowed_dtypes": ((torch.float32, torch.float64), (torch.float32,)),
    "channel_first": (False, True),
    "projection_has_bias": (True, False),
    "return_indices": (True, False),
    "force_quantization_f32": (True, False),
    "preserve_symmetry": (False, True),
    "noise_dropout": (0.0, 0.5, 0.1),
    "bound_hard_clamp": (False, True),
    "orthogonal_rotation": (False, True),
    "dtype": (torch.float32, torch.float64),
    "input": ("sequence", "image", "video", "vectors", "empty", "no batch"),
}


def setting(row, seed=0):
    kwargs = {name: value for name, value in row.items() if name not in ("dtype", "input")}
    first = row["channel_first"] or row["input"] in ("image", "video")
    return kwargs, strict.placed(row, row["dim"] or 3 * row["num_codebooks"], first=first, seed=seed), {}


NARROWED = (
    {"dtype": torch.float64, "allowed_dtypes": (torch.float32,), "orthogonal_rotation": True},
    lambda row: row["dtype"] not in row["allowed_dtypes"] and row["orthogonal_rotation"] and row["force_quantization_f32"],
)
"""Codes of another dtype than the rotation."""
REFUSED = (
    ({"levels": [2, 3, 6]}, lambda row: 2 in row["levels"] and not row["preserve_symmetry"]),
    ({"noise_dropout": 0.5}, lambda row: row["noise_dropout"] and not row["preserve_symmetry"]),
    (
        {"num_codebooks": 2, "keep_num_codebooks_dim": False},
        lambda row: row["num_codebooks"] > 1 and row["keep_num_codebooks_dim"] is False,
    ),
    ({"input": "vectors"}, lambda row: row["input"] == "vectors" and not row["channel_first"]),
    ({"input": "no batch", "channel_first": True}, lambda row: row["input"] == "no batch" and row["channel_first"]),
    NARROWED,
)
DEVIATING = {
    "scale": {"scale": 2.0},
    "noise_dropout but 0.5": {"noise_dropout": 0.1, "preserve_symmetry": True},
    "noise_dropout & float64": {"noise_dropout": 0.5, "preserve_symmetry": True, "dtype": torch.float64, "levels": (4, 4, 4)},
}
ARRAY = Array("FSQ", OPTIONS, setting, REFUSED, DEVIATING, around=in_double)

OF_LAYER = ("scale", "allowed_dtypes", "projection_has_bias", "force_quantization_f32", "noise_dropout", "orthogonal_rotation")
FIXED = {"num_codebooks": (1,), "keep_num_codebooks_dim": (None, True, False), "channel_first": (False, True), "return_indices": (True,)}
RESIDUAL_OPTIONS = {
    "levels": ([5, 5, 5], [8, 5, 3], (4, 4, 2)),
    "num_quantizers": (3, 1),
    "dim": (None, 7),
    "is_channel_first": (False, True),
    "quantize_dropout": (False, True),
    "quantize_dropout_cutoff_index": (0, 1, 3),
    "quantize_dropout_multiple_of": (1, 2),
    "soft_clamp_input_value": (None, 1.5, [1.2, 1.5, 2.0], torch.tensor(1.5)),
    "bound_hard_clamp": (True, False),
    **{name: OPTIONS[name] for name in OF_LAYER},
    **FIXED,
    "preserve_symmetry": (None,),
    "return_all_codes": (False, True),
    "rand_quantize_dropout_fixed_seed": (None, 1, 5),
    "dtype": (torch.float32, torch.float64),
    "input": ("sequence", "image", "video", "vectors", "square", "empty", "no batch"),
}
CALLS = ("return_all_codes", "rand_quantize_dropout_fixed_seed")


def residual_setting(row, seed=0):
    kwargs = {name: value for name, value in row.items() if name not in ("dtype", "input", *CALLS)}
    if row["preserve_symmetry"] is None:
        del kwargs["preserve_symmetry"]
    width = row["dim"] or 3
    x = strict.placed(row, width, first=row["is_channel_first"], seed=seed)
    return kwargs, x, {name: row[name] for name in CALLS}


def positions(row):
    return row.get("positions", strict.SHAPES[row["input"]])


def indices_look_alike(row):
    """Whether indices with the layers first can be read as if they had them last."""
    last, number = positions(row)[-1], row["num_quantizers"]
    return row["input"] == "vectors" or last == number or (last < number and row["quantize_dropout"])


def in_a_row(row):
    """The positions that a layer sees in a row, as many as scalars of a code or it takes them for something else."""
    return math.prod(positions(row)[1:]) if row["is_channel_first"] else positions(row)[1]


def fixed(name, value):
    """What layers are not made with, whatever else there is."""
    return ({name: value}, lambda row: row[name] == value)


RESIDUAL_REFUSED = (
    ({"soft_clamp_input_value": 1.5}, lambda row: row["soft_clamp_input_value"] is not None and row["bound_hard_clamp"]),
    (
        {"quantize_dropout": True, "quantize_dropout_cutoff_index": 3},
        lambda row: row["quantize_dropout"] and row["quantize_dropout_cutoff_index"] >= row["num_quantizers"] > 1,
    ),
    ({"input": "vectors"}, lambda row: len(positions(row)) == 1 and not row["is_channel_first"] and not row["channel_first"]),
    ({"input": "video"}, lambda row: len(positions(row)) > 2 and not row["is_channel_first"] and positions(row)[1] != 3),
    ({"input": "no batch", "is_channel_first": True}, lambda row: positions(row)[0] == 0 and row["is_channel_first"]),
    ({"input": "empty", "return_all_codes": True}, lambda row: 0 in positions(row) and row["return_all_codes"]),
    (
        {"input": "image", "quantize_dropout": True, "rand_quantize_dropout_fixed_seed": 1},
        lambda row: len(positions(row)) != 2 and not row["is_channel_first"] and strict.may_drop(row),
    ),
    (
        {"is_channel_first": True, "return_all_codes": True},
        lambda row: row["is_channel_first"] and row["return_all_codes"] and not indices_look_alike(row),
    ),
    (
        {"is_channel_first": True, "keep_num_codebooks_dim": True},
        lambda row: row["is_channel_first"] and row["keep_num_codebooks_dim"],
    ),
    (
        {"keep_num_codebooks_dim": True, "quantize_dropout": True, "rand_quantize_dropout_fixed_seed": 1},
        lambda row: row["keep_num_codebooks_dim"] and strict.may_drop(row),
    ),
    (
        {"channel_first": True},
        lambda row: row["channel_first"] and (row["is_channel_first"] or len(positions(row)) == 2) and in_a_row(row) != 3,
    ),
    NARROWED,
    fixed("num_codebooks", 2),
    fixed("return_indices", False),
    fixed("preserve_symmetry", True),
)
RESIDUAL_DEVIATING = {
    "scale": {"scale": 2.0},
    "noise_dropout but 0.5": {"noise_dropout": 0.1},
    "noise_dropout & float64": {"noise_dropout": 0.5, "dtype": torch.float64, "levels": (4, 4, 2), "bound_hard_clamp": False},
    "is_channel_first": {"is_channel_first": True, "input": "square"},
    "is_channel_first & return_all_codes": {"is_channel_first": True, "return_all_codes": True, "input": "square"},
    "orthogonal_rotation": {"orthogonal_rotation": True},
    "orthogonal_rotation & unequal levels": {"orthogonal_rotation": True, "levels": [8, 5, 3]},
    "channel_first": {"channel_first": True, "input": "square"},
    "images & not is_channel_first": {"input": "image"},
}
RESIDUAL = Array("ResidualFSQ", RESIDUAL_OPTIONS, residual_setting, RESIDUAL_REFUSED, RESIDUAL_DEVIATING, around=in_double)

NOT_IN_GROUPS = ("rand_quantize_dropout_fixed_seed",)
GROUPED_OPTIONS = {
    "groups": (1, 2),
    "accept_image_fmap": (False, True),
    **{name: values for name, values in RESIDUAL_OPTIONS.items() if name not in NOT_IN_GROUPS},
    "dim": (6, 8),
}


def grouped_setting(row, seed=0):
    kwargs, _, _ = residual_setting({**row, "rand_quantize_dropout_fixed_seed": None}, seed)
    x = strict.placed(row, row["dim"], first=row["accept_image_fmap"], side=row["dim"] // row["groups"], seed=seed)
    return kwargs, x, {"return_all_codes": row["return_all_codes"]}


def of_a_group(row):
    """The row of ResidualFSQ that a group is: where groups are split along another axis than layers have, positions are others."""
    width = row["dim"] // row["groups"]
    batch, *rest = (2, width) if row["input"] == "square" else strict.SHAPES[row["input"]]
    if row["accept_image_fmap"] and not row["is_channel_first"]:
        seen = [width, *rest]
    elif row["is_channel_first"] and not row["accept_image_fmap"]:
        seen = [*rest[1:], width, *rest[:1]]
    else:
        seen = [*rest, width]
    return {**row, "positions": (batch, *seen[:-1]), "width": seen[-1]}


GROUPED_REFUSED = (
    ({"accept_image_fmap": True}, lambda row: of_a_group(row)["width"] != row["dim"] // row["groups"]),
    *(
        (case | ({"accept_image_fmap": True} if case.get("is_channel_first") else {}), lambda row, rule=rule: rule(of_a_group(row)))
        for case, rule in RESIDUAL_REFUSED
    ),
)
FIRST = {"is_channel_first": True, "accept_image_fmap": True, "groups": 2}
GROUPED_DEVIATING = {
    **RESIDUAL_DEVIATING,
    "channel_first": {"channel_first": True, "groups": 2, "input": "square"},
    "is_channel_first": {**FIRST, "input": "square"},
    "is_channel_first & return_all_codes": {**FIRST, "return_all_codes": True, "input": "square"},
    "accept_image_fmap & not is_channel_first": {"accept_image_fmap": True, "input": "square"},
    "is_channel_first & not accept_image_fmap & groups=2": {"is_channel_first": True, "groups": 2, "input": "square"},
}
GROUPED = Array("GroupedResidualFSQ", GROUPED_OPTIONS, grouped_setting, GROUPED_REFUSED, GROUPED_DEVIATING, around=in_double)
ARRAYS = (ARRAY, RESIDUAL, GROUPED)


@pytest.mark.parametrize("row", ARRAY.rows, ids=range(len(ARRAY.rows)))
def test_every_pair_of_options_of_fsq(row):
    ARRAY.compared(compare, row).check()


@pytest.mark.parametrize("row", RESIDUAL.rows, ids=range(len(RESIDUAL.rows)))
def test_every_pair_of_options_of_the_residual_form(row):
    RESIDUAL.compared(compare, row).check()


@pytest.mark.parametrize("row", GROUPED.rows, ids=range(len(GROUPED.rows)))
def test_every_pair_of_options_of_the_grouped_form(row):
    GROUPED.compared(compare, row).check()


# What is right where the two differ


def test_codes_are_scaled():
    x = draw(2, 5, 3)
    plain, scaled = FSQ([8, 5, 5]), FSQ([8, 5, 5], scale=2.0)
    (expected, indices), (found, same) = plain(x), scaled(2 * x)
    assert torch.equal(indices, same) and torch.equal(found, 2 * expected)
    assert torch.equal(scaled.indices_to_codes(indices), found) and torch.equal(scaled.codes_to_indices(found), indices)


def test_noise_moves_the_share_that_was_asked_for():
    quantizer = FSQ([9, 9], preserve_symmetry=True, noise_dropout=0.1)
    x = draw(1, 4000, 2) * 0.3
    quantized, indices = quantizer(x)
    assert 0.08 < (quantized != quantizer.indices_to_codes(indices)).double().mean() < 0.11


def test_the_outermost_codes_have_a_gradient_in_float64():
    quantizer = FSQ([4, 4, 4], preserve_symmetry=True, noise_dropout=1e-9)
    x = torch.full((1, 2, 3), 3.0, dtype=torch.float64, requires_grad=True)
    quantized, _ = quantizer(x)
    quantized.sum().backward()
    assert (quantized == 1).all()
    torch.testing.assert_close(x.grad, 1 - x.detach().tanh().square())


def test_narrow_inputs_are_rounded_in_float32():
    x = draw(1, 500, 3).bfloat16()
    expected = FSQ([8, 5, 5])(x.float())
    for options in ({"force_quantization_f32": False}, {"allowed_dtypes": (torch.bfloat16,)}, {}):
        quantized, indices = FSQ([8, 5, 5], **options)(x)
        assert quantized.dtype == torch.bfloat16 and torch.equal(indices, expected[1])
        torch.testing.assert_close(quantized.float(), expected[0], rtol=0, atol=4e-3)


@pytest.mark.parametrize("symmetric", [False, True])
def test_codes_that_were_turned_have_their_own_indices(symmetric):
    quantizer = FSQ([5, 4, 6], preserve_symmetry=symmetric, orthogonal_rotation=True)
    quantized, indices = quantizer(draw(2, 9, 3))
    torch.testing.assert_close(quantizer.indices_to_codes(indices), quantized)
    assert torch.equal(quantizer.codes_to_indices(quantized), indices)


def test_more_codes_than_a_float_or_an_int32_numbers_round_trip():
    for levels, dtype in (([8] * 9, torch.int32), ([8] * 12, torch.int64)):
        quantizer = FSQ(levels)
        quantized, indices = quantizer(draw(1, 200, len(levels)))
        assert indices.dtype == dtype and indices.max() > 2**24
        assert torch.equal(quantizer.indices_to_codes(indices), quantized)
        assert torch.equal(quantizer.codes_to_indices(quantized), indices)


def test_no_list_of_codes_is_made_and_none_is_needed_on_the_meta_device():
    quantizer = FSQ([8] * 9)
    assert sum(buffer.numel() for buffer in quantizer.buffers()) == 18
    assert FSQ([5, 3]).implicit_codebook.shape == (15, 2)
    with torch.device("meta"):
        assert FSQ([8, 5, 5], dim=7, orthogonal_rotation=True).project_in.weight.is_meta


@pytest.mark.parametrize("index", [-2, 200])
def test_indices_that_there_are_not_are_refused(index):
    with pytest.raises(ValueError, match=f"indices holds {index}: must lie in -1 ... 199"):
        FSQ([8, 5, 5]).indices_to_codes(torch.tensor([[0, index]]))
    assert not FSQ([8, 5, 5]).indices_to_codes(torch.tensor([[-1]])).any()


def test_a_vector_that_is_not_finite_has_no_code_and_no_gradient():
    quantizer = FSQ([8, 5, 5], dim=6)
    x = draw(1, 4, 6)
    x[0, 1, 2] = torch.nan
    x.requires_grad_()
    quantized, indices = quantizer(x)
    assert indices[0, 1] == -1 and not quantized[0, 1].any()
    quantized.sum().backward()
    assert x.grad.isfinite().all() and quantizer.project_in.weight.grad.isfinite().all()
    assert torch.equal(quantizer.indices_to_codes(indices), quantized)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"levels": [2, 5]}, "levels = .*: must be above 2 unless preserve_symmetry is True"),
        ({"levels": [5, 5], "noise_dropout": 0.1}, "noise_dropout = 0.1: must be 0 unless preserve_symmetry is True"),
        ({"levels": [5], "num_codebooks": 2, "keep_num_codebooks_dim": False}, "keep_num_codebooks_dim = False: must be True or None"),
    ],
)
def test_arguments_that_do_not_fit_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        FSQ(**options)


def test_inputs_that_do_not_fit_are_named():
    for shape in ((2, 5, 4), (5, 3), (2, 4, 3, 3)):
        with pytest.raises(ValueError, match=r"z has shape .*: must be"):
            FSQ([8, 5, 5])(torch.zeros(shape))
    with pytest.raises(ValueError, match="zhat has shape"):
        FSQ([8, 5, 5]).codes_to_indices(torch.zeros(2, 2))


# The residual form


def residual(**options):
    return ResidualFSQ(**{"dim": 6, "levels": [5, 5, 3], "num_quantizers": 3, **options})


@pytest.mark.parametrize("shape", [(4,), (4, 3)])
@pytest.mark.parametrize("grouped", [False, True])
def test_channel_first_decodes_to_what_it_gave(grouped, shape):
    options = {"dim": 6, "levels": [5, 5, 3], "num_quantizers": 4, "quantize_dropout": True}
    made = GroupedResidualFSQ(groups=2, accept_image_fmap=True, **options) if grouped else residual(is_channel_first=True, **options)
    quantized, indices, codes = made.eval()(draw(2, 6, *shape), return_all_codes=True)
    torch.testing.assert_close(made.get_output_from_indices(indices), quantized)
    torch.testing.assert_close(made.get_codes_from_indices(indices), torch.stack(codes) if grouped else codes)
    assert indices.shape == ((2,) if grouped else ()) + (2, 4, *shape)
    assert torch.stack(codes).shape == (2, 4, 2, *shape, 3) if grouped else codes.shape == (4, 2, *shape, 3)


def test_layouts_that_are_none_are_refused():
    with pytest.raises(ValueError, match="channel_first = True: must be False in the layers of a residual quantizer"):
        residual(channel_first=True)
    for grouped in (False, True):
        made = GroupedResidualFSQ(dim=6, levels=[5, 5, 3], num_quantizers=2) if grouped else residual()
        with pytest.raises(ValueError, match=r"x has shape \(2, 3, 4, 6\): must be \[batch, time, 6\]"):
            made(draw(2, 3, 4, 6))


@pytest.mark.parametrize("name", ["accept_image_fmap", "is_channel_first"])
def test_images_of_groups_need_to_be_announced_once(name):
    options = {"dim": 6, "groups": 2, "levels": [5, 5, 3], "num_quantizers": 2}
    once, twice = (
        GroupedResidualFSQ(**options, **{name: True}),
        GroupedResidualFSQ(**options, is_channel_first=True, accept_image_fmap=True),
    )
    once.load_state_dict(twice.state_dict())
    for shape in ((2, 6, 3), (2, 6, 3, 4)):
        for found, expected in zip(once(draw(*shape)), twice(draw(*shape)), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("dropped", [False, True])
def test_an_axis_of_one_codebook_stands_before_that_of_the_layers(dropped):
    made, plain = (residual(keep_num_codebooks_dim=kept, quantize_dropout=dropped, levels=[5, 5, 5]) for kept in (True, False))
    plain.load_state_dict(made.state_dict())
    for shape in ((2, 5, 6), (1, 3, 6)):
        calls = {"return_all_codes": True, "rand_quantize_dropout_fixed_seed": 1}
        (quantized, indices, codes), expected = made(draw(*shape), **calls), plain(draw(*shape), **calls)
        assert torch.equal(quantized, expected[0]) and torch.equal(indices, expected[1].unsqueeze(-2))
        assert torch.equal(codes, expected[2].unsqueeze(-2))
        assert torch.equal(made.get_output_from_indices(indices).squeeze(-2), plain.get_output_from_indices(expected[1]))


def test_turned_layers_decode_to_what_they_gave():
    made = residual(levels=[5, 5, 5], orthogonal_rotation=True).eval()
    quantized, indices, codes = made(draw(2, 5, 6), return_all_codes=True)
    torch.testing.assert_close(made.get_output_from_indices(indices), quantized)
    torch.testing.assert_close(made.project_out(codes.sum(0)), quantized)


@pytest.mark.parametrize("levels", [[5, 5, 5], [8, 5, 3]])
def test_turned_layers_are_each_as_fine_as_a_step_before_in_their_axes(levels):
    made = residual(dim=3, levels=levels, orthogonal_rotation=True).eval()
    quantized, indices, codes = made(draw(2, 50, 3), return_all_codes=True)
    torch.testing.assert_close(codes.sum(0), quantized)
    left = made.soft_clamp_input_value * (draw(2, 50, 3) / made.soft_clamp_input_value).tanh()
    for number, layer in enumerate(made.layers):
        scale = torch.tensor(levels, dtype=torch.float32) ** -number
        found, own = FSQ(levels, preserve_symmetry=True, bound_hard_clamp=True)(left @ layer.orthogonal_rot / scale)
        assert torch.equal(indices[..., number], own)
        torch.testing.assert_close(codes[number], (found * scale) @ layer.orthogonal_rot.mT)
        left = left - codes[number]


def test_the_first_layers_decode_whether_or_not_layers_are_dropped():
    made = residual().eval()
    _, indices, codes = made(draw(2, 5, 6), return_all_codes=True)
    coarse = made.get_codes_from_indices(indices[..., :2])
    assert torch.equal(coarse[:2], codes[:2]) and not coarse[2:].any()
    torch.testing.assert_close(made.get_output_from_indices(indices[..., :2]), made.project_out(codes[:2].sum(0)))


def test_a_recomputed_forward_drops_the_same_layers_and_gives_the_same_gradient():
    made = residual(quantize_dropout=True)
    x = draw(2, 5, 6).requires_grad_()
    for reentrant in (True, False):
        gradients = []
        for run in (made, lambda x, mode=reentrant: checkpoint(made, x, use_reentrant=mode)):
            torch.manual_seed(4)
            out, indices = run(x)
            assert (indices[..., 1:] == -1).any()
            gradients.append(torch.autograd.grad(out.square().sum(), x)[0] if not reentrant else None)
            if reentrant:
                x.grad = None
                out.square().sum().backward()
                gradients[-1] = x.grad
        torch.testing.assert_close(*gradients)


def test_layers_are_dropped_in_training_whether_or_not_a_gradient_is_asked_for():
    made = residual(quantize_dropout=True)
    x = draw(2, 5, 6)
    with torch.no_grad():
        assert (made(x, rand_quantize_dropout_fixed_seed=1)[1][..., 1:] == -1).all()


def test_a_cutoff_behind_the_last_layer_is_refused():
    with pytest.raises(ValueError, match="quantize_dropout_cutoff_index = 3: must be below num_quantizers = 3"):
        residual(quantize_dropout=True, quantize_dropout_cutoff_index=3)


def test_the_peers_checkpoint_trains_on_here():
    """Optimizer state goes by the order of parameters."""
    there = peer.ResidualFSQ(dim=6, levels=[5, 5, 3], num_quantizers=2)
    here = ResidualFSQ(dim=6, levels=[5, 5, 3], num_quantizers=2)
    optimizers = [torch.optim.AdamW(made.parameters(), lr=1e-2) for made in (there, here)]

    def step(number, made, optimizer):
        optimizer.zero_grad()
        x = draw(2, 9, 6, seed=number)
        (made(x)[0] - x).square().mean().backward()
        optimizer.step()

    for number in range(2):
        step(number, there, optimizers[0])
    here.load_state_dict(there.state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for number in range(2, 4):
        step(number, there, optimizers[0])
        step(number, here, optimizers[1])
    for name, value in there.state_dict().items():
        torch.testing.assert_close(here.state_dict()[name], value, rtol=1e-5, atol=1e-6)
