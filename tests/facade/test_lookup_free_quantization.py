"""LFQ and its residual forms beside the peer's: all pairs of options, and what is right where the two differ."""

import contextlib
import math

import pytest
import torch
from torch import Tensor, nn

from facade import strict
from facade.compare import compare
from facade.peer import facade, peer
from facade.strict import Array, draw
from thread_ranks import in_ranks
from vqkit.compat.vector_quantize_pytorch import LFQ, GroupedResidualLFQ, ResidualFSQ, ResidualLFQ
from vqkit.compat.vector_quantize_pytorch.lookup_free_quantization import CosineSimLinear, maybe_distributed_mean

OPTIONS = {
    "dim": (7, None, 5),
    "codebook_size": (16, None),
    "entropy_loss_weight": (0.1, 0.0),
    "commitment_loss_weight": (0.0, 0.25),
    "diversity_gamma": (1.0, 0.5),
    "straight_through_activation": (nn.Identity(), nn.Tanh()),
    "num_codebooks": (1, 2),
    "keep_num_codebooks_dim": (None, True, False),
    "codebook_scale": (1.0, 0.5),
    "frac_per_sample_entropy": (1.0, 0.5, 0.01),
    "has_projections": (None, True, False),
    "projection_has_bias": (True, False),
    "soft_clamp_input_value": (None, 2.0, 0.75),
    "cosine_sim_project_in": (False, True),
    "cosine_sim_project_in_scale": (None, 2.0),
    "channel_first": (None, True, False),
    "experimental_softplus_entropy_loss": (False, True),
    "entropy_loss_offset": (5.0, 2.0),
    "spherical": (False, True),
    "force_quantization_f32": (True, False),
    "orthogonal_rotation": (False, True),
    "inv_temperature": (100.0, 0.2),
    "return_loss_breakdown": (False, True),
    "mask": (None, "batch", "positions", "none"),
    "input": ("sequence", "image", "video", "vectors", "empty", "no batch"),
}
CALLS = ("inv_temperature", "return_loss_breakdown", "mask")


def rounding_shows(row):
    """Where scores are magnified the library's float32 is no measure: both then compute in float64."""
    return row.get("inv_temperature", 100.0) > 1 and bool(row["entropy_loss_weight"] or row.get("return_loss_breakdown"))


def without_floor(patch):
    """The logarithm of the peer's entropies, without its floor; the function takes it from a facade."""
    patch.setattr(peer.lookup_free_quantization, "log", lambda t, eps=1e-37: t.clamp(min=eps).log())

    def prepare(made):
        for part in made.modules():
            if isinstance(part, LFQ):
                part.native.probability_floor = 0.0

    return prepare


@contextlib.contextmanager
def alike(row):
    """Entropies without the floor of their logarithm, and for shares of the vectors in both the first ones.

    The peer draws a number for each vector that a mask leaves, here there is one for all.
    """
    randn = torch.randn
    with pytest.MonkeyPatch.context() as patch:
        prepare = without_floor(patch)
        if row["mask"] is not None and row["frac_per_sample_entropy"] < 1:
            patch.setattr(torch, "randn", lambda *shape, **options: randn(*shape, **options) if len(shape) > 1 else torch.arange(*shape))
        if not rounding_shows(row):
            yield {"prepare": prepare}
            return
        patch.setattr(Tensor, "float", lambda tensor: tensor if tensor.is_floating_point() else tensor.to(torch.float32))
        yield {"prepare": lambda made: prepare(made.double()), "dtype": torch.float64}


def inner_width(row):
    bits = 4 if row["codebook_size"] else row["dim"]
    return None if bits is None else bits * row["num_codebooks"]


def is_first(row):
    return row["input"] in ("image", "video") if row["channel_first"] is None else row["channel_first"]


def positions_of(row):
    """Of the input."""
    return (2, row["dim"]) if row["input"] == "square" else strict.SHAPES[row["input"]]


def mask_of(row):
    """Of the batch, or [batch, positions in a row]."""
    batch, *positions = positions_of(row)
    shape = (batch,) if row["mask"] in ("batch", "none") else (batch, math.prod(positions))
    keeps = torch.arange(math.prod(shape)).reshape(shape) % 2 == 0
    return {None: None, "none": torch.zeros_like(keeps)}.get(row["mask"], keeps)


def split(row, calls):
    kwargs = {name: v for name, v in row.items() if name not in ("input", *calls)}
    given = {name: row[name] for name in calls}
    return kwargs, given | ({"mask": mask_of(row)} if "mask" in calls else {})


def setting(row, seed=0):
    kwargs, calls = split(row, CALLS)
    first = row["input"] in ("image", "video") or row["channel_first"]
    return kwargs, strict.placed(row, row["dim"] or inner_width(row) or 4, first=first, seed=seed, scale=1.0), calls


REFUSED = (
    ({"dim": None, "codebook_size": None}, lambda row: inner_width(row) is None),
    ({"has_projections": False}, lambda row: row["has_projections"] is False and row["dim"] not in (None, inner_width(row))),
    (
        {"num_codebooks": 2, "keep_num_codebooks_dim": False},
        lambda row: row["num_codebooks"] > 1 and row["keep_num_codebooks_dim"] is False,
    ),
    ({"soft_clamp_input_value": 0.75}, lambda row: (row["soft_clamp_input_value"] or 2.0) < row["codebook_scale"]),
    ({"input": "image", "channel_first": False}, lambda row: row["input"] in ("image", "video") and row["channel_first"] is False),
    ({"input": "vectors"}, lambda row: row["input"] == "vectors" and not row["channel_first"]),
    ({"input": "no batch", "channel_first": True}, lambda row: row["input"] == "no batch" and row["channel_first"]),
)
DEVIATING = {
    "a mask of positions": {"mask": "positions"},
    "no vectors": {"input": "empty"},
    "frac_per_sample_entropy=0.01": {"frac_per_sample_entropy": 0.01},
}
ARRAY = Array("LFQ", OPTIONS, setting, REFUSED, DEVIATING, around=alike)

OF_LAYER = (
    "entropy_loss_weight",
    "commitment_loss_weight",
    "diversity_gamma",
    "straight_through_activation",
    "keep_num_codebooks_dim",
    "frac_per_sample_entropy",
    "has_projections",
    "projection_has_bias",
    "cosine_sim_project_in",
    "cosine_sim_project_in_scale",
    "channel_first",
    "experimental_softplus_entropy_loss",
    "entropy_loss_offset",
    "force_quantization_f32",
)
RESIDUAL_OPTIONS = {
    "dim": (4, 7),
    "num_quantizers": (3, 1),
    "codebook_size": (16, 8),
    "quantize_dropout": (False, True),
    "quantize_dropout_cutoff_index": (0, 1, 3),
    "quantize_dropout_multiple_of": (1, 2),
    "soft_clamp_input_value": (None, 2.0),
    "spherical": (False, True),
    "orthogonal_rotation": (False, True),
    **{name: OPTIONS[name] for name in OF_LAYER},
    "num_codebooks": (None,),
    "codebook_scale": (None,),
    "mask": OPTIONS["mask"],
    "return_all_codes": (False, True),
    "rand_quantize_dropout_fixed_seed": (None, 1, 5),
    "input": ("sequence", "image", "image last", "video", "vectors", "square", "empty", "no batch"),
}
RESIDUAL_CALLS = ("mask", "return_all_codes", "rand_quantize_dropout_fixed_seed")


def bits_of(row):
    return 4 if row["codebook_size"] == 16 else 3


def width_is_first(row):
    """Where the input has its width."""
    return row.get("accepts", row["input"] in ("image", "video") or bool(row["channel_first"]))


def shape_of(row):
    """Of the input of a ResidualLFQ."""
    batch, *positions = positions_of(row)
    return (batch, row["dim"], *positions) if width_is_first(row) else (batch, *positions, row["dim"])


def residual_setting(row, seed=0):
    kwargs, calls = split(row, RESIDUAL_CALLS)
    kwargs = {name: value for name, value in kwargs.items() if value is not None or name not in ("num_codebooks", "codebook_scale")}
    return kwargs, strict.placed(row, row["dim"], first=width_is_first(row), side=row["dim"], seed=seed, scale=1.0), calls


def projects(row):
    return row["dim"] != bits_of(row)


def layer_reads(row):
    """Of a shape that the first projection takes, the width that a layer finds, and the positions; no width where the rank is wrong."""
    *shape, last = shape_of(row)
    batch, *rest = (*shape, bits_of(row) if projects(row) else last)
    first = len(rest) > 2 if row["channel_first"] is None else row["channel_first"]
    if first:
        return rest[0], (batch, *rest[1:])
    return (rest[-1], (batch, *rest[:-1])) if len(rest) == 2 else (None, ())


def fixed(name, value):
    """What layers are not made with, whatever else there is."""
    return ({name: value}, lambda row: row[name] == value)


RESIDUAL_REFUSED = (
    (
        {"quantize_dropout": True, "quantize_dropout_cutoff_index": 3},
        lambda row: row["quantize_dropout"] and row["quantize_dropout_cutoff_index"] >= row["num_quantizers"] > 1,
    ),
    ({"soft_clamp_input_value": 0.75}, lambda row: (row["soft_clamp_input_value"] or 2.0) < 1.0),
    ({"input": "image", "dim": 7}, lambda row: projects(row) and shape_of(row)[-1] != row["dim"]),
    (
        {"input": "vectors"},
        lambda row: not (projects(row) and shape_of(row)[-1] != row["dim"]) and layer_reads(row)[0] != bits_of(row),
    ),
    ({"input": "no batch", "channel_first": True}, lambda row: row["input"] == "no batch" and row["channel_first"]),
    ({"input": "empty", "return_all_codes": True}, lambda row: row["input"] in ("empty", "no batch") and row["return_all_codes"]),
    (
        {"keep_num_codebooks_dim": True, "quantize_dropout": True, "rand_quantize_dropout_fixed_seed": 1},
        lambda row: row["keep_num_codebooks_dim"] and strict.may_drop(row),
    ),
    (
        {"input": "image", "quantize_dropout": True, "rand_quantize_dropout_fixed_seed": 1},
        lambda row: strict.may_drop(row) and layer_reads(row)[1] != shape_of(row)[:2],
    ),
    fixed("has_projections", True),
    fixed("num_codebooks", 2),
    fixed("codebook_scale", 0.5),
)
RESIDUAL_DEVIATING = {
    **DEVIATING,
    "spherical": {"spherical": True, "return_all_codes": True},
    "orthogonal_rotation": {"orthogonal_rotation": True, "return_all_codes": True},
    "images": {"input": "image"},
    "channel_first": {"channel_first": True},
    "images whose width is last": {"input": "image last", "dim": 7, "codebook_size": 8},
}
RESIDUAL = Array("ResidualLFQ", RESIDUAL_OPTIONS, residual_setting, RESIDUAL_REFUSED, RESIDUAL_DEVIATING, around=alike)

GROUPED_OPTIONS = {
    "groups": (1, 2),
    "accept_image_fmap": (False, True),
    **{name: values for name, values in RESIDUAL_OPTIONS.items() if name != "rand_quantize_dropout_fixed_seed"},
    "dim": (8, 6),
}


def of_a_group(row):
    """The row of ResidualLFQ that a group is."""
    return {**row, "dim": row["dim"] // row["groups"], "accepts": row["accept_image_fmap"]}


def grouped_setting(row, seed=0):
    kwargs, _, calls = residual_setting({**row, "rand_quantize_dropout_fixed_seed": None}, seed)
    side = row["dim"] // row["groups"]
    x = strict.placed(row, row["dim"], first=row["accept_image_fmap"], side=side, seed=seed, scale=1.0)
    del calls["rand_quantize_dropout_fixed_seed"]
    return kwargs, x, calls | {"mask": mask_of(of_a_group(row))}


def in_groups(case):
    """The case of a rule of ResidualLFQ with groups."""
    if not ("channel_first" in case or case.get("input") == "image"):
        return case
    return {**case, "accept_image_fmap": True, "groups": 2, **({"dim": 6} if case.get("dim") else {})}


GROUPED_REFUSED = tuple((in_groups(case), lambda row, rule=rule: rule(of_a_group(row))) for case, rule in RESIDUAL_REFUSED)
GROUPED_DEVIATING = {
    **RESIDUAL_DEVIATING,
    "images": {"input": "image", "groups": 2, "accept_image_fmap": True},
    "channel_first": {"channel_first": True, "groups": 2, "accept_image_fmap": True},
    "images whose width is last": {"input": "image last", "codebook_size": 8},
}


def known_of_groups(row):
    last = strict.of_row(row)["images"] and not row["accept_image_fmap"]
    return {**row, "images whose width is last": last}


GROUPED = Array(
    "GroupedResidualLFQ", GROUPED_OPTIONS, grouped_setting, GROUPED_REFUSED, GROUPED_DEVIATING, known=known_of_groups, around=alike
)
ARRAYS = (ARRAY, RESIDUAL, GROUPED)


@pytest.mark.parametrize("row", ARRAY.rows, ids=range(len(ARRAY.rows)))
def test_every_pair_of_options_of_lfq(row):
    ARRAY.compared(compare, row).check()


@pytest.mark.parametrize("row", RESIDUAL.rows, ids=range(len(RESIDUAL.rows)))
def test_every_pair_of_options_of_the_residual_form(row):
    RESIDUAL.compared(compare, row).check()


@pytest.mark.parametrize("row", GROUPED.rows, ids=range(len(GROUPED.rows)))
def test_every_pair_of_options_of_the_grouped_form(row):
    GROUPED.compared(compare, row).check()


@pytest.fixture
def exact(monkeypatch):
    return without_floor(monkeypatch)


def test_each_layer_weighs_its_own_losses(exact):
    """Also where they are set later."""

    def weigh(made):
        exact(made)
        for number, layer in enumerate(made.layers):
            layer.entropy_loss_weight, layer.commitment_loss_weight = 0.01 * (number + 1), 0.5 * (number + 1)

    compare(
        "ResidualLFQ", {"dim": 4, "num_quantizers": 3, "codebook_size": 16, "commitment_loss_weight": 0.25}, draw(2, 5, 4), prepare=weigh
    ).check()


@pytest.mark.parametrize("bits", [4, 12])
def test_the_entropies_of_the_defaults_are_the_peers(bits):
    x = draw(2, 200, bits)
    expected, found = (kind(dim=bits)(x, return_loss_breakdown=True) for kind in (peer.LFQ, LFQ))
    torch.testing.assert_close(found[0].entropy_aux_loss, expected[0].entropy_aux_loss, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found[1].batch_entropy, expected[1].batch_entropy, rtol=1e-5, atol=1e-7)


def test_cosines_of_a_learned_matrix():
    there, here = peer.lookup_free_quantization.CosineSimLinear(5, 3, scale=2.0), CosineSimLinear(5, 3, scale=2.0)
    here.load_state_dict(there.state_dict())
    x = draw(4, 5)
    torch.testing.assert_close(here(x), there(x))


# What is right where the two differ


def test_a_mask_of_positions_is_a_choice_of_vectors():
    x, mask = draw(2, 6, 4), torch.tensor([[True] * 4 + [False] * 2, [True] * 2 + [False] * 4])
    lfq = LFQ(dim=4, commitment_loss_weight=0.5)
    expected = lfq(x[mask].unsqueeze(0), return_loss_breakdown=True)
    found = lfq(x, return_loss_breakdown=True, mask=mask)
    torch.testing.assert_close(found[1], expected[1])
    torch.testing.assert_close(found[0].entropy_aux_loss, expected[0].entropy_aux_loss)
    assert torch.equal(found[0].quantized, lfq(x).quantized)
    image = x.movedim(-1, 1).reshape(2, 4, 2, 3)
    torch.testing.assert_close(lfq(image, mask=mask.view(2, 2, 3)).entropy_aux_loss, expected[0].entropy_aux_loss)


@pytest.mark.parametrize(
    ("shape", "dtype", "error"), [((3,), torch.bool, ValueError), ((2, 5), torch.bool, ValueError), ((2,), torch.int64, TypeError)]
)
def test_masks_that_do_not_fit_are_refused(shape, dtype, error):
    for made in (LFQ(dim=4), ResidualLFQ(dim=4, codebook_size=16, num_quantizers=2)):
        with pytest.raises(error, match=r"mask (has shape|is torch.int64)"):
            made(draw(2, 6, 4), mask=torch.ones(shape, dtype=dtype))


def test_the_entropy_of_a_vector_counts_every_code():
    lfq = LFQ(dim=20, entropy_loss_weight=1.0)
    _, parts = lfq(torch.zeros(1, 2, 20), return_loss_breakdown=True)
    assert parts.per_sample_entropy.item() == pytest.approx(20 * torch.tensor(2.0).log().item(), rel=1e-5)


@pytest.mark.parametrize("index", [-2, 16])
def test_indices_that_there_are_not_are_refused(index):
    residual = ResidualLFQ(dim=4, codebook_size=16, num_quantizers=2)
    residual = ResidualLFQ(dim=4, codebook_size=16, num_quantizers=2)
    for decode in (LFQ(dim=4).indices_to_codes, lambda i: residual.get_output_from_indices(i.unsqueeze(-1))):
        with pytest.raises(ValueError, match=f"indices holds {index}"):
            decode(torch.tensor([[0, index]]))


def test_a_small_share_of_the_vectors_is_at_least_one():
    x = draw(1, 1, 4)
    expected, found = (LFQ(dim=4, frac_per_sample_entropy=share)(x, inv_temperature=1.0) for share in (1.0, 0.1))
    torch.testing.assert_close(found.entropy_aux_loss, expected.entropy_aux_loss)


def test_narrow_inputs_have_the_entropy_of_float32():
    x = (0.1 * draw(2, 50, 4)).bfloat16()
    expected = LFQ(dim=4)(x.float())
    for forced in (True, False):
        quantized, indices, loss = LFQ(dim=4, force_quantization_f32=forced)(x)
        assert quantized.dtype == torch.bfloat16 and torch.equal(indices, expected.indices)
        torch.testing.assert_close(loss.float(), expected.entropy_aux_loss, rtol=1e-6, atol=1e-6)


def test_the_entropy_is_that_of_all_ranks():
    x = draw(4, 6, 4)
    whole = LFQ(dim=4)(x, inv_temperature=1.0, return_loss_breakdown=True)[1].batch_entropy

    def run(reducer):
        lfq = LFQ(dim=4)
        lfq.native.reducer = reducer
        own = x[2 * reducer.rank : 2 * reducer.rank + 2]
        return lfq(own, inv_temperature=1.0, return_loss_breakdown=True)[1].batch_entropy.item()

    for found in in_ranks(2, run):
        assert found == pytest.approx(whole.item(), rel=1e-5)


def test_the_mean_of_one_process_is_its_own():
    t = draw(3).requires_grad_()
    mean = maybe_distributed_mean(t)
    mean.sum().backward()
    assert torch.equal(mean, t) and torch.equal(t.grad, torch.ones(3))


@pytest.mark.parametrize("options", [{"spherical": True}, {"orthogonal_rotation": True}], ids=str)
def test_codes_that_were_moved_decode_to_what_they_gave(options):
    made = ResidualLFQ(dim=6, codebook_size=16, num_quantizers=3, **options).eval()
    quantized, indices, _, codes = made(draw(2, 5, 6), return_all_codes=True)
    torch.testing.assert_close(made.get_output_from_indices(indices), quantized)
    torch.testing.assert_close(made.project_out(codes.sum(0)), quantized)
    torch.testing.assert_close(made.codebooks[0][indices[0, 0, 0]], codes[0, 0, 0])
    torch.testing.assert_close(made.get_output_from_indices(indices[..., :1]), made.project_out(codes[0]))


@pytest.mark.parametrize("grouped", [False, True])
def test_images_decode_to_what_they_gave(grouped):
    options = {"codebook_size": 16, "num_quantizers": 3, "quantize_dropout": True}
    made = GroupedResidualLFQ(dim=6, groups=2, accept_image_fmap=True, **options) if grouped else ResidualLFQ(dim=6, **options)
    for mode in (True, False):
        quantized, indices, _ = made.train(mode)(draw(2, 6, 3, 4))
        assert indices.shape == ((2,) if grouped else ()) + (2, 3, 4, 3) and quantized.shape == (2, 6, 3, 4)
        torch.testing.assert_close(made.get_output_from_indices(indices), quantized)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("shape", [(5, 6), (3, 4, 6), (6,)])
def test_channel_first_is_where_the_width_of_all_inputs_is(grouped, shape):
    options = {"dim": 6, "codebook_size": 16, "num_quantizers": 3, "quantize_dropout": True}
    if grouped:
        made = GroupedResidualLFQ(groups=2, accept_image_fmap=True, channel_first=True, **options)
        plain = GroupedResidualLFQ(groups=2, **options)
    else:
        made, plain = ResidualLFQ(channel_first=True, **options), ResidualLFQ(**options)
    plain.load_state_dict(made.state_dict())
    x = draw(2, *shape)
    for mode in (True, False):
        torch.manual_seed(3)
        quantized, indices, losses = made.train(mode)(x.movedim(-1, 1))
        torch.manual_seed(3)
        expected = plain.train(mode)(x.reshape(2, -1, 6))
        torch.testing.assert_close(quantized.movedim(1, -1).reshape(2, -1, 6), expected[0])
        torch.testing.assert_close(losses, expected[2])
        assert torch.equal(indices.flatten(-1 - len(shape[:-1]), -2) if len(shape) > 1 else indices.unsqueeze(-2), expected[1])
        torch.testing.assert_close(made.get_output_from_indices(indices), quantized)


def test_images_whose_width_is_last_are_refused():
    for made in (ResidualLFQ(dim=6, codebook_size=8, num_quantizers=2), GroupedResidualLFQ(dim=6, codebook_size=8, num_quantizers=2)):
        with pytest.raises(ValueError, match=r"x has shape \(2, 3, 4, 6\): must be \[batch, 6, ...\]"):
            made(draw(2, 3, 4, 6))


@pytest.mark.parametrize("dropped", [False, True])
def test_an_axis_of_one_codebook_stands_before_that_of_the_layers(dropped):
    options = {"dim": 4, "codebook_size": 16, "num_quantizers": 3, "quantize_dropout": dropped}
    made, plain = (ResidualLFQ(keep_num_codebooks_dim=kept, **options) for kept in (True, False))
    plain.load_state_dict(made.state_dict())
    calls = {"return_all_codes": True, "rand_quantize_dropout_fixed_seed": 1}
    (quantized, indices, losses, codes), expected = made(draw(2, 5, 4), **calls), plain(draw(2, 5, 4), **calls)
    assert torch.equal(quantized, expected[0]) and torch.equal(losses, expected[2])
    assert torch.equal(indices, expected[1].unsqueeze(-2)) and torch.equal(codes, expected[3].unsqueeze(-2))
    assert torch.equal(made.get_output_from_indices(indices).squeeze(-2), plain.get_output_from_indices(expected[1]))


@pytest.mark.parametrize("kind", [ResidualLFQ, ResidualFSQ])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_indices_decode_in_the_dtype_of_the_module(kind, dtype):
    sizes = {"codebook_size": 16} if kind is ResidualLFQ else {"levels": [5, 5, 5]}
    made = kind(dim=6, num_quantizers=2, **sizes).to(dtype).eval()
    quantized, indices, *_ = made(draw(2, 5, 6).to(dtype))
    assert made.get_codes_from_indices(indices).dtype == dtype
    torch.testing.assert_close(made.get_output_from_indices(indices), quantized, rtol=2e-2, atol=2e-2)


def test_no_vectors_have_no_loss():
    for made in (LFQ(dim=4, commitment_loss_weight=0.5), ResidualLFQ(dim=4, codebook_size=16, num_quantizers=2)):
        for x, mask in ((draw(2, 0, 4), None), (draw(2, 5, 4), torch.zeros(2, dtype=torch.bool)), (draw(0, 5, 4), None)):
            x.requires_grad_()
            found = made(x, mask=mask)
            assert not found[2].any() and found[0].shape == x.shape
            (found[2].sum() + found[0].sum()).backward()
            assert (x.grad == getattr(made, "num_quantizers", 1)).all()


def test_evaluation_has_no_loss_and_no_gradient_for_the_input():
    made = ResidualLFQ(dim=6, codebook_size=16, num_quantizers=2).eval()
    x = draw(2, 5, 6).requires_grad_()
    quantized, _, losses = made(x)
    assert not losses.any() and losses.shape == (2,)
    quantized.sum().backward()
    assert x.grad is None and made.project_in.weight.grad is None and made.project_out.weight.grad is not None


def test_a_loss_of_no_weight_has_a_gradient_of_zero():
    for package in (peer, facade):
        x = torch.randn(2, 5, 4, requires_grad=True)
        loss = package.LFQ(dim=4, entropy_loss_weight=0.0, commitment_loss_weight=0.0)(x)[2]
        loss.backward()
        assert loss == 0 and not x.grad.any()


def test_layers_are_dropped_in_training_whether_or_not_a_gradient_is_asked_for():
    with torch.no_grad():
        made = ResidualLFQ(dim=4, codebook_size=16, num_quantizers=3, quantize_dropout=True)
        assert (made(draw(2, 5, 4), rand_quantize_dropout_fixed_seed=1)[1][..., 1:] == -1).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "dim = None and codebook_size = None: must be given"),
        ({"codebook_size": 20}, "codebook_size = 20: must be a power of 2, as 32 is"),
        ({"dim": 4, "soft_clamp_input_value": 0.5}, "soft_clamp_input_value = 0.5: must be at least codebook_scale = 1.0"),
        ({"dim": 5, "codebook_size": 16, "has_projections": False}, "has_projections = False: must be None or True, as dim = 5 is not 4"),
        ({"dim": 4, "frac_per_sample_entropy": 0.0}, "frac_per_sample_entropy = 0.0: must be above 0"),
        ({"dim": 4, "num_codebooks": 2, "codebook_size": 4, "keep_num_codebooks_dim": False}, "keep_num_codebooks_dim = False"),
    ],
)
def test_arguments_that_do_not_fit_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        LFQ(**options)
