"""LatentQuantize beside the peer's: all pairs of options, and what is right where the two differ."""

import copy
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from facade import strict
from facade.compare import compare
from facade.strict import Array
from vqkit.compat.vector_quantize_pytorch import LatentQuantize

OPTIONS = {
    "levels": ([5, 4, 3], 4, [7, 6, 5]),
    "dim": (7, 3, 6),
    "commitment_loss_weight": (0.0, 0.1, 0.3),
    "quantization_loss_weight": (0.0, 0.1, 0.3),
    "num_codebooks": (1, 2),
    "codebook_dim": (-1, 3, 2),
    "keep_num_codebooks_dim": (None, True, False),
    "optimize_values": (True, False),
    "in_place_codebook_optimizer": (None,),
    "input": ("sequence", "image", "video", "vectors", "empty"),
}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05)


def setting(row, seed=0):
    kwargs = {name: value for name, value in row.items() if name != "input"}
    return kwargs, strict.placed(row, row["dim"], first=True, seed=seed, scale=0.3), {}


REFUSED = (
    ({"levels": 4}, lambda row: isinstance(row["levels"], int) and row["codebook_dim"] == -1),
    ({"codebook_dim": 2}, lambda row: isinstance(row["levels"], list) and row["codebook_dim"] == 2),
    ({"in_place_codebook_optimizer": sgd}, lambda row: row["in_place_codebook_optimizer"]),
    ({"commitment_loss_weight": None}, lambda row: row["commitment_loss_weight"] is None),
    ({"quantization_loss_weight": None}, lambda row: row["quantization_loss_weight"] is None),
    ({"input": "no batch"}, lambda row: row["input"] == "no batch"),
)
WEIGHTS = ("commitment_loss_weight", "quantization_loss_weight")
DEVIATING = {name + more: {name: 0.3} for name in WEIGHTS for more in ("", " & an optimizer")}
ARRAY = Array("LatentQuantize", OPTIONS, setting, REFUSED, DEVIATING)
ARRAYS = (ARRAY,)


@pytest.mark.parametrize("row", ARRAY.rows, ids=range(len(ARRAY.rows)))
def test_every_pair_of_options(row):
    ARRAY.compared(compare, row).check()


# What is right where the two differ


def draw(*shape, seed=0):
    return strict.draw(*shape, seed=seed, scale=0.3)


def selected(made, latents):
    """The values nearest to latents [..., d], differentiable."""
    nearest = [(latents[..., i, None].detach() - values.detach()).abs().argmin(-1) for i, values in enumerate(made.values_per_latent)]
    return torch.stack([values[index] for values, index in zip(made.values_per_latent, nearest, strict=True)], dim=-1)


@pytest.mark.parametrize("dim", [2, 5])
@pytest.mark.parametrize("weights", [(0.3, 0.7), (0.0, 0.7), (0.3, 0.0)], ids=str)
def test_each_loss_pulls_what_it_is_named_for(weights, dim):
    made = LatentQuantize([3, 4], dim, *weights)
    x = draw(2, dim, 5).requires_grad_()
    _, _, loss = made(x)
    latents = made.project_in(x.movedim(1, -1))
    values = selected(made, latents)
    expected = weights[0] * (latents - values.detach()).square().mean() + weights[1] * (latents.detach() - values).square().mean()
    torch.testing.assert_close(loss, expected)
    for at in (x, *made.values_per_latent):
        found, right = (torch.autograd.grad(total, at, retain_graph=True, allow_unused=True)[0] for total in (loss, expected))
        torch.testing.assert_close(*(torch.zeros_like(at) if g is None else g for g in (found, right)))


def test_values_step_in_place_before_they_are_read_and_once_a_call():
    made = LatentQuantize([3, 4], 5, 0.3, 0.7, in_place_codebook_optimizer=partial(torch.optim.SGD, lr=0.05))
    x = draw(2, 5, 4).requires_grad_()
    before = copy.deepcopy(list(made.values_per_latent))
    latents = made.project_in(x.movedim(1, -1)).detach()
    loss = 0.7 * (latents - selected(made, latents)).square().mean()
    expected = [v - 0.05 * g for v, g in zip(before, torch.autograd.grad(loss, list(made.values_per_latent)), strict=True)]
    out, _, _ = checkpoint(made, x, use_reentrant=False)
    torch.testing.assert_close(out, made.project_out(selected(made, latents)).movedim(-1, 1))
    out.sum().backward()  # recomputes the call
    for value, right in zip(made.values_per_latent, expected, strict=True):
        torch.testing.assert_close(value, right)
        assert value.grad is None
    made.eval()(x)
    torch.testing.assert_close(made.values_per_latent[0], expected[0])


def test_learned_values_decode_and_are_encoded():
    made = LatentQuantize([3, 4], 2)
    with torch.no_grad():
        made.values_per_latent[0].copy_(torch.tensor([0.4, -0.7, -0.1]))
    indices = torch.arange(12).view(1, 12)
    codes = made.indices_to_codes(indices)
    torch.testing.assert_close(codes[0, 0, :3], made.values_per_latent[0])
    assert torch.equal(made.codes_to_indices(codes.movedim(1, -1)), indices.to(torch.int32))
    torch.testing.assert_close(made.implicit_codebook, codes[0].T)
    quantized, indices, _ = made.eval()(draw(2, 2, 6))
    torch.testing.assert_close(made.indices_to_codes(indices), quantized)


def test_fixed_values_move_with_the_module_and_are_not_stored():
    made = LatentQuantize([3, 4], 2, optimize_values=False)
    assert not made.state_dict() and not list(made.parameters())
    made.double()
    assert all(value.dtype == torch.float64 for value in made.values_per_latent) and len(made.values_per_latent) == 2
    x = draw(2, 2, 5).double().requires_grad_()
    out, _, loss = made(x)
    assert out.dtype == torch.float64
    (out.sum() + loss).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("index", [-2, 12])
def test_indices_that_there_are_not_are_refused(index):
    with pytest.raises(ValueError, match=f"indices holds {index}"):
        LatentQuantize([3, 4], 2).indices_to_codes(torch.tensor([[0, index]]))


def test_parts_of_a_call_are_the_call():
    made = LatentQuantize([5, 4], 7, num_codebooks=2).eval()
    x = draw(2, 7, 3, 4)
    out, indices, _ = made(x)
    latents = made.project_in(x.movedim(1, -1).flatten(1, 2)).unflatten(-1, (2, 2))
    codes, same, again = made.quantize_and_project(latents, True, [(3, 4)])
    torch.testing.assert_close(same, out)
    assert torch.equal(again, indices) and codes.shape == (2, 12, 4)
    torch.testing.assert_close(made.commitment_loss(x, out), made.quantization_loss(x, out))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"levels": 5}, "codebook_dim = -1: must be at least 1 where levels is one number, 5"),
        ({"levels": [5, 4], "codebook_dim": 3}, "codebook_dim = 3: must be -1 or 2"),
        (
            {"levels": [5], "optimize_values": False, "in_place_codebook_optimizer": torch.optim.SGD},
            "optimize_values = False: must be True",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        LatentQuantize(dim=4, **options)


def test_values_step_by_half_precision_as_by_the_same_numbers_in_single():
    x = draw(2, 3, 50).bfloat16()
    stepped = []
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        made = LatentQuantize([3, 4, 5], 3, 0.3, 0.7, in_place_codebook_optimizer=partial(torch.optim.SGD, lr=0.5))
        made(x.to(dtype))
        stepped.append([*made.values_per_latent])
    for half, single in zip(*stepped, strict=True):
        torch.testing.assert_close(half, single, rtol=0, atol=1e-7)
