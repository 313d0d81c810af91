"""FSQ and its residual forms beside the peer's: all pairs of options, and what is right where the two differ."""

import copy
import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from facade.compare import compare
from facade.covering import covering_array
from facade.peer import peer
from vqkit.compat.vector_quantize_pytorch import FSQ, GroupedResidualFSQ, ResidualFSQ

OPTIONS = {
    "levels": ([8, 5, 5], [4, 4, 4], [2, 3, 6]),
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
    "noise_dropout": (0.0, 0.5),
    "bound_hard_clamp": (False, True),
    "orthogonal_rotation": (False, True),
    "input": ((2, 5), (2, 3, 4)),
}

RESIDUAL_OPTIONS = {
    "levels": ([5, 5, 5], [8, 5, 3], [4, 4, 2]),
    "num_quantizers": (3, 1),
    "dim": (None, 7),
    "is_channel_first": (False, True),
    "quantize_dropout": (False, True),
    "quantize_dropout_cutoff_index": (0, 1),
    "quantize_dropout_multiple_of": (1, 2),
    "soft_clamp_input_value": (None, 1.5, [1.2, 1.5, 2.0]),
    "bound_hard_clamp": (True, False),
    "noise_dropout": (0.0, 0.5),
    "orthogonal_rotation": (False, True),
    "scale": (None, 2.0),
    "allowed_dtypes": ((torch.float32, torch.float64), (torch.float32,)),
    "projection_has_bias": (True, False),
    "force_quantization_f32": (True, False),
    "return_all_codes": (False, True),
    "rand_quantize_dropout_fixed_seed": (None, 1),
    "input": ((2, 5), (2, 3, 4), (2, 3)),
}

NOT_IN_GROUPS = ("rand_quantize_dropout_fixed_seed", "input", "is_channel_first", "dim")
GROUPED_OPTIONS = {
    "groups": (1, 2),
    "accept_image_fmap": (False, True),
    "dim": (6, 8),
    **{name: values for name, values in RESIDUAL_OPTIONS.items() if name not in NOT_IN_GROUPS},
}

CALLS = ("return_all_codes", "rand_quantize_dropout_fixed_seed")


def valid(row):
    symmetric = row["preserve_symmetry"]
    if (2 in row["levels"] or row["noise_dropout"] > 0) and not symmetric:
        return False
    return not (row["num_codebooks"] > 1 and row["keep_num_codebooks_dim"] is False)


def valid_residual(row):
    if row["soft_clamp_input_value"] is not None and row["bound_hard_clamp"]:
        return False
    if row["is_channel_first"] and row["return_all_codes"] and (row["input"] != (2, 3) or row["num_quantizers"] != 3):
        return False  # the peer reads its own indices in another layout than it writes them: an error unless the layouts look alike
    return row["is_channel_first"] or len(row["input"]) == 2


def valid_grouped(row):
    first = row["accept_image_fmap"]
    return valid_residual({**row, "is_channel_first": first, "input": (2, 3) if first and row["return_all_codes"] else (2, 5)})


def place(x, width_at, noise=0.0):
    """In the layout of the input; where noise is drawn, which the peer does in the order of memory, that of vectors stays."""
    x = x.movedim(-1, 1) if width_at == 1 else x
    return x if noise else x.contiguous()


@functools.cache
def rows():
    return covering_array(OPTIONS, valid), covering_array(RESIDUAL_OPTIONS, valid_residual), covering_array(GROUPED_OPTIONS, valid_grouped)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 1.2


def test_every_pair_of_options_of_fsq():
    for number, row in enumerate(rows()[0]):
        kwargs = {name: value for name, value in row.items() if name != "input"}
        width = row["dim"] or 3 * row["num_codebooks"]
        first = row["channel_first"] or len(row["input"]) > 2
        x = place(draw(*row["input"], width, seed=number), 1 if first else -1, row["noise_dropout"])
        compare("FSQ", kwargs, x, seed=number).check()


def test_every_pair_of_options_of_the_residual_form():
    for number, row in enumerate(rows()[1]):
        kwargs = {name: value for name, value in row.items() if name not in ("input", *CALLS)}
        x = place(draw(*row["input"], row["dim"] or 3, seed=number), 1 if row["is_channel_first"] else -1, row["noise_dropout"])
        compare("ResidualFSQ", kwargs, x, calls={name: row[name] for name in CALLS}, seed=number).check()


def test_every_pair_of_options_of_the_grouped_form():
    for number, row in enumerate(rows()[2]):
        kwargs = {name: value for name, value in row.items() if name != "return_all_codes"}
        kwargs |= {"is_channel_first": row["accept_image_fmap"]}
        image = row["accept_image_fmap"]
        shape = ((3, 3) if row["return_all_codes"] else (3, 4)) if image else (5,)  # see `valid_residual`
        x = place(draw(2, *shape, row["dim"], seed=200 + number), 1 if image else -1, row["noise_dropout"])
        compare("GroupedResidualFSQ", kwargs, x, calls={"return_all_codes": row["return_all_codes"]}, seed=number).check()


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
