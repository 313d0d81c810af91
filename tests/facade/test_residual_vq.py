"""The facade's ResidualVQ and GroupedResidualVQ beside the peer's: pairs of all options, checkpoints, and where the peer is wrong."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from facade.compare import compare
from facade.covering import covering_array
from facade.peer import facade, peer

DIM, CODES, LAYERS = 8, 12, 3
BASE = {"dim": DIM, "num_quantizers": LAYERS, "codebook_size": CODES}


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return 1.5 * torch.randn(*(shape or (2, 12, DIM)), generator=torch.Generator().manual_seed(seed))


MASK = torch.arange(12).expand(2, 12) % 3 > 0

OPTIONS: dict[str, tuple[Any, ...]] = {
    "dim": (DIM,),
    "num_quantizers": (LAYERS, None),
    "codebook_size": (CODES, (CODES, 8, 4)),
    "codebook_dim": (None, 4),
    "shared_codebook": (False, True),
    "diveq": (False, True),
    "heads": (1,),
    "quantize_dropout": (False, True),
    "quantize_dropout_cutoff_index": (0, 1),
    "quantize_dropout_multiple_of": (1, 2),
    "accept_image_fmap": (False, True),
    "implicit_neural_codebook": (False, True),
    "mlp_kwargs": ({}, {"dim_hidden": 6, "depth": 1}),
    "beam_size": (None, 2),
    "eval_beam_size": (None, 3),
    "beam_score_quantizer_weights": ([1.0, 1.0, 1.0], None, [1.0, 0.5, 2.0]),
    "quant_grad_frac": (0.0, 0.5),
    "return_zeros_for_masked_padding": (True, False),
    # Of the layers; all others are compared with VectorQuantize.
    "use_cosine_sim": (False, True),
    "rotation_trick": (None, False),
    "commitment_weight": (1.0, 0.25),
    "decay": (0.8, 0.5),
    "ema_update": (None, False),
    "learnable_codebook": (None, True),
    "freeze_codebook": (False, True),
}
CALLS: dict[str, tuple[Any, ...]] = {
    "mask": (None, MASK),
    "return_all_codes": (False, True),
    "sample_codebook_temp": (None, 0.5),
    "freeze_codebook": (False, True),
    "beam_size": (None, 3),
    "rand_quantize_dropout_fixed_seed": (None, 5),
}


def can_be(row: dict[str, Any]) -> bool:
    """What the peer takes."""
    sizes = row["codebook_size"]
    learnable = row["learnable_codebook"] or row["implicit_neural_codebook"] or row["diveq"]
    beam = row["beam_size"] or row["call.beam_size"]
    wrong = (
        row["num_quantizers"] is None and not isinstance(sizes, tuple),
        row["shared_codebook"] and isinstance(sizes, tuple),
        row["accept_image_fmap"] and (row["codebook_dim"] or row["call.mask"] is not None or beam),
        row["eval_beam_size"] and not row["beam_size"],
        row["diveq"] and beam,
        row["implicit_neural_codebook"] and (row["use_cosine_sim"] or beam),
        learnable and row["use_cosine_sim"],
        row["learnable_codebook"] and row["ema_update"] is None,
    )
    return not any(wrong)


ROWS = covering_array({**OPTIONS, **{f"call.{name}": values for name, values in CALLS.items()}}, can_be)


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_pairs_of_options(number: int) -> None:
    row = ROWS[number]
    kwargs = {name: row[name] for name in OPTIONS}
    calls = {name: value for name in CALLS if (value := row[f"call.{name}"]) is not None and value is not False}
    x = vectors(2, DIM, DIM, DIM) if kwargs["accept_image_fmap"] else vectors()
    compare("ResidualVQ", kwargs, x, calls=calls, steps=1 if parts_ways(kwargs, calls) else 2).check()


def parts_ways(kwargs: dict[str, Any], calls: dict[str, Any]) -> bool:
    """Whether a deviation makes the second step start from other codes, so that the first alone can be compared."""
    beam = kwargs.get("beam_size") or calls.get("beam_size")
    frozen = kwargs.get("freeze_codebook") or calls.get("freeze_codebook")
    return bool(beam or frozen or ("mask" in calls and kwargs["use_cosine_sim"]))


def test_most_pairs_stand_in_few_rows() -> None:
    assert 10 < len(ROWS) < 60


GROUPED: dict[str, tuple[Any, ...]] = {
    "dim": (DIM,),
    "groups": (1, 2),
    "accept_image_fmap": (False,),
    "num_quantizers": (LAYERS,),
    "codebook_size": (CODES,),
    "codebook_dim": (None, 3),
    "shared_codebook": (False, True),
    "quantize_dropout": (False, True),
    "use_cosine_sim": (False, True),
    "return_zeros_for_masked_padding": (True, False),
    "call.return_all_codes": (False, True),
    "call.sample_codebook_temp": (None, 0.5),
    "call.freeze_codebook": (False, True),
    "call.mask": (None, MASK),
}
GROUPED_ROWS = covering_array(GROUPED)


@pytest.mark.parametrize("number", range(len(GROUPED_ROWS)))
def test_pairs_of_options_in_groups(number: int) -> None:
    row = GROUPED_ROWS[number]
    kwargs = {name: value for name, value in row.items() if not name.startswith("call.")}
    calls = {name[5:]: v for name, v in row.items() if name.startswith("call.") and v is not None and v is not False}
    compare("GroupedResidualVQ", kwargs, vectors(), calls=calls, steps=1 if parts_ways(kwargs, calls) else 2).check()


@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_drawn_codes_at_a_temperature_that_draws_the_nearest(temperature: float) -> None:
    kwargs = {**BASE, "stochastic_sample_codes": True, "sample_codebook_temp": 1.0}
    compare("ResidualVQ", kwargs, vectors(), calls={"sample_codebook_temp": temperature}).check()
    compare("ResidualVQ", {**kwargs, "sample_codebook_temp": temperature}, vectors()).check()


def test_drawn_codes_are_those_of_the_softmax() -> None:
    torch.manual_seed(0)
    rvq = facade.ResidualVQ(dim=2, num_quantizers=1, codebook_size=4, stochastic_sample_codes=True, sample_codebook_temp=0.3, decay=0.999)
    codes, x = rvq.codebooks[0].clone(), torch.tensor([0.1, -0.2])
    _, indices, _ = rvq(x.expand(1, 4000, 2), freeze_codebook=True)
    found = torch.bincount(indices.flatten(), minlength=4) / 4000
    torch.testing.assert_close(found, (-(x - codes).norm(dim=-1) / 0.3).softmax(-1), rtol=0, atol=0.03)


def test_k_means_start() -> None:
    """Each layer at what those before it leave; random, so that it is the error that is compared."""
    x = vectors(4, 50, DIM)
    errors = {}
    for name, package in (("peer", peer), ("facade", facade)):
        torch.manual_seed(0)
        rvq = package.ResidualVQ(**BASE, kmeans_init=True, kmeans_iters=5)
        assert not rvq.layers[1]._codebook.initted
        quantized, _, _ = rvq(x)
        assert all(layer._codebook.initted for layer in rvq.layers)
        errors[name] = (quantized - x).square().mean().item()
    assert errors["facade"] < 1.05 * errors["peer"]
    with pytest.raises(ValueError, match="k-means"):
        facade.ResidualVQ(**BASE, kmeans_init=True).eval()(x)


# Checkpoints


class Model(nn.Module):
    """A user's own."""

    def __init__(self, package: Any, **options: Any) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, DIM), nn.Linear(DIM, 6)
        self.quantizer = package.ResidualVQ(**BASE, **options)

    def forward(self, x: Tensor) -> Tensor:
        quantized, _, losses = self.quantizer(self.encoder(x))
        return (self.decoder(quantized) - x).square().mean() + losses.sum()


@pytest.mark.parametrize(
    "options",
    [{"codebook_dim": 4}, {"implicit_neural_codebook": True}, {"shared_codebook": True}, {"learnable_codebook": True, "ema_update": False}],
    ids=lambda options: next(iter(options)),
)
def test_a_checkpoint_goes_on_training(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    models = [Model(peer, **options), Model(facade, **options)]
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.01) for model in models]

    def train(which: int, step: int) -> float:
        optimizers[which].zero_grad()
        loss = models[which](vectors(2, 12, 6, seed=step))
        loss.backward()
        optimizers[which].step()
        return loss.item()

    for step in range(3):
        train(0, step)
    models[1].load_state_dict(copy.deepcopy(models[0].state_dict()))
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for step in range(3, 7):
        assert train(0, step) == pytest.approx(train(1, step), rel=1e-5)
    there, here = (model.state_dict() for model in models)
    assert there.keys() == here.keys()
    for key, value in there.items():
        torch.testing.assert_close(here[key], value, rtol=1e-4, atol=1e-5, msg=key)
    models[0].load_state_dict(here)


def test_copies_are_whole() -> None:
    rvq = facade.ResidualVQ(**BASE, shared_codebook=True, codebook_dim=4)
    twin = copy.deepcopy(rvq)
    assert twin.layers[0]._codebook is twin.layers[2]._codebook is twin.native.codebooks()[0]
    assert twin.native.project_in is twin.project_in
    rvq(vectors())
    assert not torch.equal(rvq.codebooks, twin.codebooks)
    twin(vectors())
    torch.testing.assert_close(rvq.codebooks, twin.codebooks)


# Where the peer is wrong


@pytest.mark.parametrize("shared", [False, True])
def test_recomputation_updates_once(shared: bool) -> None:
    torch.manual_seed(0)
    plain = facade.ResidualVQ(**BASE, shared_codebook=shared)
    again = copy.deepcopy(plain)
    gradients = []
    for step in range(2):
        x, y = (vectors(seed=step).requires_grad_() for _ in range(2))
        (plain(x)[0].sin().sum()).backward()
        (checkpoint(lambda y: again(y)[0], y, use_reentrant=False).sin().sum()).backward()
        gradients += [x.grad, y.grad]
        torch.testing.assert_close(gradients[-1], gradients[-2])
    for key, value in plain.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_codes_of_a_call_are_those_of_its_output() -> None:
    rvq = facade.ResidualVQ(**BASE, quantize_dropout=True)
    before = rvq.codebooks.clone()
    quantized, indices, _, codes = rvq(vectors(), return_all_codes=True, rand_quantize_dropout_fixed_seed=3)
    torch.testing.assert_close(codes.sum(0), quantized)
    torch.testing.assert_close(codes[0], before[0][indices[..., 0]])
    assert not torch.equal(rvq.codebooks[0], before[0])


@pytest.mark.parametrize("options", [{}, {"shared_codebook": True, "threshold_ema_dead_code": 2}, {"beam_size": 2}])
def test_frozen_means_frozen(options: dict[str, Any]) -> None:
    rvq = facade.ResidualVQ(**BASE, freeze_codebook=True, **options)
    before = copy.deepcopy(rvq.state_dict())
    rvq(vectors())
    assert all(torch.equal(value, before[key]) for key, value in rvq.state_dict().items())


def test_a_beam_goes_by_the_error_of_the_path_and_trains_all_layers() -> None:
    torch.manual_seed(0)
    rvq = facade.ResidualVQ(**BASE, beam_size=CODES * CODES)
    before = rvq.codebooks.clone()
    x = vectors(1, 6, DIM)
    quantized, _, _ = rvq(x)
    first, second, third = before
    sums = (first[:, None, None] + second[None, :, None] + third).reshape(-1, DIM)
    torch.testing.assert_close((quantized - x).square().sum(-1), torch.cdist(x, sums).min(-1).values.square(), rtol=1e-4, atol=1e-5)
    assert all(not torch.equal(new, old) for new, old in zip(rvq.codebooks, before, strict=True))


def test_directional_noise_is_for_training_alone() -> None:
    rvq = facade.ResidualVQ(**BASE, diveq=True).eval()
    quantized, indices, _ = rvq(vectors())
    torch.testing.assert_close(rvq.get_output_from_indices(indices), quantized)


def test_a_mask_of_ones_is_no_mask_with_cosine_similarity() -> None:
    rvq = facade.ResidualVQ(**BASE, use_cosine_sim=True)
    plain, masked = rvq(vectors(), freeze_codebook=True), rvq(vectors(), freeze_codebook=True, mask=torch.ones(2, 12, dtype=torch.bool))
    for one, other in zip(plain, masked, strict=True):
        torch.testing.assert_close(one, other)


def test_masked_positions_decode_to_zeros_behind_a_projection() -> None:
    rvq = facade.ResidualVQ(**BASE, codebook_dim=4).eval()
    quantized, indices, _ = rvq(vectors(), mask=MASK)
    assert (indices[~MASK] == -1).all() and not quantized[~MASK].any()
    torch.testing.assert_close(rvq.get_output_from_indices(indices), quantized)


def test_directional_images_are_as_sequences() -> None:
    rvq = facade.ResidualVQ(**BASE, diveq=True, accept_image_fmap=True)
    plain = facade.ResidualVQ(**BASE, diveq=True)
    plain.load_state_dict(rvq.state_dict())
    x = vectors(2, DIM, 3, 4)
    torch.manual_seed(1)
    image = rvq(x)[0]
    torch.manual_seed(1)
    torch.testing.assert_close(image, plain(x.flatten(2).transpose(1, 2))[0].transpose(1, 2).unflatten(-1, (3, 4)))


def test_networks_of_images_are_told_the_code_of_each_place() -> None:
    rvq = facade.ResidualVQ(**BASE, implicit_neural_codebook=True, accept_image_fmap=True)
    plain = facade.ResidualVQ(**BASE, implicit_neural_codebook=True)
    plain.load_state_dict(rvq.state_dict())
    x = vectors(2, DIM, 3, 4)
    torch.testing.assert_close(rvq(x)[0], plain(x.flatten(2).transpose(1, 2))[0].transpose(1, 2).unflatten(-1, (3, 4)))


def test_a_frozen_call_leaves_learnable_codes_alone() -> None:
    rvq = facade.ResidualVQ(**BASE, learnable_codebook=True, ema_update=False)
    x = vectors().requires_grad_()
    quantized, _, losses = rvq(x, freeze_codebook=True)
    (quantized.sum() + losses.sum()).backward()
    assert x.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in rvq.parameters())


def test_a_beam_of_directions_goes_by_the_error_of_the_path() -> None:
    torch.manual_seed(0)
    errors = []
    for size in (1, 4):
        torch.manual_seed(0)
        rvq = facade.ResidualVQ(**BASE, use_cosine_sim=True, beam_size=size).eval()
        x = nn.functional.normalize(vectors(), dim=-1)
        errors.append((rvq(x)[0] - x).square().mean())
    assert errors[1] < errors[0]


@pytest.mark.parametrize("shape", [(2, DIM, 3, 5), (2, DIM, 4, 4)])
@pytest.mark.parametrize("codebook_dim", [None, 4])
@pytest.mark.parametrize("groups", [None, 2])
def test_images_of_any_size(shape: tuple[int, ...], codebook_dim: int | None, groups: int | None) -> None:
    kind = facade.ResidualVQ if groups is None else lambda **options: facade.GroupedResidualVQ(groups=groups, **options)
    rvq = kind(**BASE, codebook_dim=codebook_dim, accept_image_fmap=True)
    x = vectors(*shape)
    assert rvq(x)[0].shape == shape
    quantized, indices, _ = rvq.eval()(x)
    assert indices.shape == (*(() if groups is None else (groups,)), 2, *shape[2:], LAYERS)
    torch.testing.assert_close(rvq.get_output_from_indices(indices), quantized)
    codes = rvq.get_codes_from_indices(indices)
    assert codes.shape[-4:-1] == (2, *shape[2:])


def test_channels_first_and_volumes() -> None:
    for options, shape in (({"channel_last": False}, (2, DIM, 7)), ({"accept_3d_fmap": True}, (2, DIM, 2, 3, 4))):
        rvq = facade.ResidualVQ(**BASE, **options).eval()
        quantized, indices, _ = rvq(vectors(*shape))
        assert quantized.shape == shape and indices.shape == (2, *shape[2:], LAYERS)
        torch.testing.assert_close(rvq.get_output_from_indices(indices), quantized)


def test_coarse_indices_need_no_dropout() -> None:
    rvq = facade.ResidualVQ(**BASE).eval()
    _, indices, _, codes = rvq(vectors(), return_all_codes=True)
    coarse = rvq.get_codes_from_indices(indices[..., :2])
    assert coarse.shape == codes.shape
    torch.testing.assert_close(coarse[:2], codes[:2])
    assert not coarse[2].any()
    torch.testing.assert_close(rvq.get_output_from_indices(indices[..., :2]), codes[:2].sum(0))


def test_indices_give_the_cross_entropy() -> None:
    rvq = facade.ResidualVQ(**BASE).eval()
    x = vectors()
    _, indices, _ = rvq(x)
    quantized, loss = rvq(x, indices=(indices + 1) % CODES)
    residual, expected = x, torch.zeros(())
    for number in range(LAYERS):
        logits = -torch.cdist(residual, rvq.codebooks[number])
        expected += nn.functional.cross_entropy(logits.flatten(0, 1), ((indices[..., number] + 1) % CODES).flatten())
        residual = residual - rvq.codebooks[number][indices[..., number]]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(x - residual, quantized)
    torch.testing.assert_close(rvq(x, indices=[*((indices + 1) % CODES).unbind(-1)])[1], loss)
    grouped = facade.GroupedResidualVQ(**BASE, groups=2).eval()
    _, indices, _ = grouped(x)
    each = [rvq(piece, indices=own)[1] for rvq, piece, own in zip(grouped.rvqs, x.chunk(2, -1), indices, strict=True)]
    torch.testing.assert_close(grouped(x, indices=indices)[1], each[0] + each[1])


def test_a_shared_codebook_expires_once_a_call() -> None:
    """The new codes are residuals of any layer, and no layer sees a code that another's step has made."""
    torch.manual_seed(0)
    rvq = facade.ResidualVQ(**BASE, shared_codebook=True, threshold_ema_dead_code=4, rotation_trick=False)
    rvq.layers[0]._codebook.cluster_size.fill_(0.0)
    before = rvq.codebooks[0].clone()
    x = vectors()
    quantized, indices, _ = rvq(x)
    torch.testing.assert_close(before[indices].sum(-2), quantized)
    residuals = [x - before[indices[..., :number]].sum(-2) for number in range(LAYERS)]
    nearest = torch.cdist(rvq.codebooks[0], torch.cat(residuals).reshape(-1, DIM)).min(-1).values
    assert (nearest < 1e-3).sum() > CODES // 2


def test_the_own_optimizer_of_a_shared_codebook_steps() -> None:
    def own(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.5)

    options = {"learnable_codebook": True, "ema_update": False, "in_place_codebook_optimizer": own}
    rvq = facade.ResidualVQ(**BASE, shared_codebook=True, **options)
    errors = []
    for _ in range(20):
        quantized, _, _ = rvq(vectors())
        errors.append((quantized - vectors()).square().mean().item())
    assert errors[-1] < 0.8 * errors[0]
    compare("ResidualVQ", {**BASE, **options}, vectors()).check()


@pytest.mark.parametrize("options", [{"kmeans_init": True}, {"stochastic_sample_codes": True}])
def test_what_is_not_finite_or_masked_takes_no_part(options: dict[str, Any]) -> None:
    rvq = facade.ResidualVQ(**BASE, **options)
    x = vectors()
    x[0, 0], x[1, 3, 2] = torch.nan, torch.inf
    quantized, indices, losses = rvq(x)
    assert (indices[0, 0] == -1).all() and (indices[1, 3] == -1).all()
    assert quantized.isfinite().all() and losses.isfinite().all() and rvq.codebooks.isfinite().all()
    rvq(vectors(2, 0, DIM))
    rvq(vectors(), mask=torch.zeros(2, 12, dtype=torch.bool))
    assert rvq.codebooks.isfinite().all()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: facade.ResidualVQ(**BASE, heads=2), "heads = 2"),
        (lambda: facade.ResidualVQ(dim=DIM, codebook_size=4), "num_quantizers = None"),
        (lambda: facade.ResidualVQ(dim=DIM, codebook_size=(4, 4), num_quantizers=3), "num_quantizers = 3"),
        (lambda: facade.ResidualVQ(dim=DIM, codebook_size=(4, 8), shared_codebook=True), "codebook_size"),
        (
            lambda: facade.ResidualVQ(**BASE, quantize_dropout=True, quantize_dropout_cutoff_index=LAYERS),
            "quantize_dropout_cutoff_index = 3",
        ),
        (lambda: facade.ResidualVQ(**BASE, quantize_dropout_cutoff_index=-1), "quantize_dropout_cutoff_index = -1"),
        (lambda: facade.ResidualVQ(**BASE, eval_beam_size=2), "eval_beam_size = 2"),
        (
            lambda: facade.ResidualVQ(**BASE, implicit_neural_codebook=True, in_place_codebook_optimizer=torch.optim.Adam),
            "in_place_codebook_optimizer is given: must be None with implicit_neural_codebook",
        ),
        (lambda: facade.ResidualVQ(**BASE, beam_score_quantizer_weights=[1.0]), "beam_score_quantizer_weights"),
        (lambda: facade.ResidualVQ(**BASE)(vectors(2, 3, 5)), "x has shape"),
        (lambda: facade.ResidualVQ(**BASE)(vectors(), mask=torch.ones(2, 3, dtype=torch.bool)), "mask has shape"),
        (lambda: facade.ResidualVQ(**BASE)(vectors(), indices=torch.full((2, 12, LAYERS), -1)), "indices hold -1"),
        (lambda: facade.ResidualVQ(**BASE).get_codes_from_indices(torch.full((2, 12, LAYERS), CODES)), "must lie in"),
        (lambda: facade.ResidualVQ(**BASE).get_codes_from_indices(torch.zeros(2, 12, 4, dtype=torch.int64)), "indices has shape"),
        (lambda: facade.GroupedResidualVQ(**BASE, groups=3), "groups = 3"),
        (lambda: facade.GroupedResidualVQ(**BASE, groups=2)(vectors(2, 3, 6)), "x has shape"),
        (
            lambda: facade.GroupedResidualVQ(**BASE, groups=2)(vectors(), indices=[torch.zeros(2, 12, 3, dtype=torch.int64)]),
            "indices has 1",
        ),
    ],
)
def test_what_is_wrong_is_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
