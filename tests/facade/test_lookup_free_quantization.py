"""LFQ and its residual forms beside the peer's: all pairs of options, and what is right where the two differ."""

import contextlib
import functools

import pytest
import torch
from torch import nn

from facade.compare import compare
from facade.covering import covering_array
from facade.peer import facade, peer
from thread_ranks import in_ranks
from vqkit.compat.vector_quantize_pytorch import LFQ, GroupedResidualLFQ, ResidualLFQ
from vqkit.compat.vector_quantize_pytorch.lookup_free_quantization import CosineSimLinear, maybe_distributed_mean

FIRST_ONLY = torch.tensor([True, False])

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
    "frac_per_sample_entropy": (1.0, 0.5),
    "has_projections": (None, True, False),
    "projection_has_bias": (True, False),
    "soft_clamp_input_value": (None, 2.0),
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
    "mask": (None, FIRST_ONLY),
    "input": ((2, 5), (2, 3, 4)),
}

OF_LAYER = (
    "entropy_loss_weight",
    "commitment_loss_weight",
    "diversity_gamma",
    "straight_through_activation",
    "frac_per_sample_entropy",
    "projection_has_bias",
    "cosine_sim_project_in",
    "cosine_sim_project_in_scale",
    "experimental_softplus_entropy_loss",
    "entropy_loss_offset",
    "force_quantization_f32",
)
RESIDUAL_OPTIONS = {
    "dim": (4, 7),
    "num_quantizers": (3, 1),
    "codebook_size": (16, 8),
    "quantize_dropout": (False, True),
    "quantize_dropout_cutoff_index": (0, 1),
    "quantize_dropout_multiple_of": (1, 2),
    "soft_clamp_input_value": (None, 2.0),
    "spherical": (False, True),
    "orthogonal_rotation": (False, True),
    **{name: OPTIONS[name] for name in OF_LAYER},
    "mask": (None, FIRST_ONLY),
    "return_all_codes": (False, True),
    "rand_quantize_dropout_fixed_seed": (None, 1),
}

GROUPED_OPTIONS = {
    "groups": (1, 2),
    "accept_image_fmap": (False,),
    **{name: values for name, values in RESIDUAL_OPTIONS.items() if name != "rand_quantize_dropout_fixed_seed"},
    "dim": (8, 12),
}

CALLS = ("inv_temperature", "return_loss_breakdown", "mask")
RESIDUAL_CALLS = ("mask", "return_all_codes", "rand_quantize_dropout_fixed_seed")


def inner_width(row):
    bits = 4 if row["codebook_size"] else row["dim"]
    return None if bits is None else bits * row["num_codebooks"]


def valid(row):
    inner = inner_width(row)
    if inner is None or (row["has_projections"] is False and row["dim"] not in (None, inner)):
        return False
    if row["num_codebooks"] > 1 and row["keep_num_codebooks_dim"] is False:
        return False
    return not (row["channel_first"] is False and len(row["input"]) > 2)


@functools.cache
def rows():
    return covering_array(OPTIONS, valid), covering_array(RESIDUAL_OPTIONS), covering_array(GROUPED_OPTIONS)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def drawn_alike(row):
    """The peer draws a number for each vector that a mask leaves, here there is one for all: in both the first share of them is drawn."""
    randn = torch.randn
    with pytest.MonkeyPatch.context() as patch:
        if row["mask"] is not None and row["frac_per_sample_entropy"] < 1:
            patch.setattr(torch, "randn", lambda *shape, **options: randn(*shape, **options) if len(shape) > 1 else torch.arange(*shape))
        yield


@pytest.fixture
def exact(monkeypatch):
    """The logarithm of the peer's entropies, without its floor; the function takes it from a facade."""
    module = peer.lookup_free_quantization
    monkeypatch.setattr(module, "log", lambda t, eps=1e-37: t.clamp(min=eps).log())

    def prepare(made):
        for part in made.modules():
            if isinstance(part, LFQ):
                part.native.probability_floor = 0.0

    return prepare


def split(row, calls):
    return {name: v for name, v in row.items() if name not in ("input", *calls)}, {name: row[name] for name in calls}


def test_every_pair_of_options_of_lfq(exact):
    for number, row in enumerate(rows()[0]):
        kwargs, calls = split(row, CALLS)
        image = len(row["input"]) > 2
        x = draw(*row["input"], row["dim"] or inner_width(row), seed=number)
        x = x.movedim(-1, 1).contiguous() if (image if row["channel_first"] is None else row["channel_first"]) else x
        with drawn_alike(row):
            compare("LFQ", kwargs, x, calls=calls, seed=number, prepare=exact).check()


def test_every_pair_of_options_of_the_residual_form(exact):
    for number, row in enumerate(rows()[1]):
        kwargs, calls = split(row, RESIDUAL_CALLS)
        x = draw(2, 5, row["dim"], seed=100 + number)
        with drawn_alike(row):
            compare("ResidualLFQ", kwargs, x, calls=calls, seed=number, prepare=exact).check()


def test_every_pair_of_options_of_the_grouped_form(exact):
    for number, row in enumerate(rows()[2]):
        kwargs, calls = split(row, ("return_all_codes", "mask"))
        with drawn_alike(row):
            compare("GroupedResidualLFQ", kwargs, draw(2, 5, row["dim"], seed=number), calls=calls, seed=number, prepare=exact).check()


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
