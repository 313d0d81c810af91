"""The facade's ResidualVQ and GroupedResidualVQ beside the peer's: every option and every pair of options that can stand together."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from facade import strict
from facade.compare import RATE, Comparison, compare
from facade.covering import covering_array
from facade.deviations import of_residuals
from facade.peer import facade, peer
from facade.test_vector_quantize_facade import MAKING as OF_LAYERS
from facade.test_vector_quantize_facade import Bridge, ways

DIM, CODES, LAYERS = 8, 12, 3
BASE = {"dim": DIM, "num_quantizers": LAYERS, "codebook_size": CODES}


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return 1.5 * torch.randn(*(shape or (2, 12, DIM)), generator=torch.Generator().manual_seed(seed))


MASK = torch.arange(12).expand(2, 12) % 3 > 0

OWN: dict[str, tuple[Any, ...]] = {
    "num_quantizers": (LAYERS, None),
    "codebook_size": (CODES, (CODES, 8, 5)),
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
    "beam_size": (None, 1, 2),
    "eval_beam_size": (None, 3),
    "beam_score_quantizer_weights": (None, [1.0, 1.0, 1.0], [1.0, 0.5, 2.0]),
    "quant_grad_frac": (0.0, 0.5),
    "return_zeros_for_masked_padding": (True, False),
}
OF_LAYER = {name: values for name, values in OF_LAYERS.items() if name not in OWN}
MAKING = OWN | OF_LAYER
CALLING: dict[str, tuple[Any, ...]] = {
    "one_each": (False, True),
    "mask": (None, "some"),
    "indices": (None,),
    "return_all_codes": (False, True),
    "call_temperature": (None, 0.5),
    "call_freeze": (False, True),
    "call_beam_size": (None, 1, 3),
    "rand_quantize_dropout_fixed_seed": (5, None, 3),
}
IN_CALL = {"sample_codebook_temp": "call_temperature", "freeze_codebook": "call_freeze", "beam_size": "call_beam_size"}
WIDTH = 6


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def size_of(row: dict[str, Any]) -> int | tuple[int, ...]:
    sizes = row["codebook_size"]
    return sizes if not row["kmeans_init"] else (4, 3, 3) if isinstance(sizes, tuple) else 3


def making(row: dict[str, Any]) -> dict[str, Any]:
    kwargs = {"dim": WIDTH, **{name: row[name] for name in MAKING}, "codebook_size": size_of(row)}
    if "groups" in row:
        kwargs |= {"dim": WIDTH * row["groups"], "groups": row["groups"]}
    if kwargs["vq_bridge"]:
        kwargs["vq_bridge"] = Bridge()
    if kwargs["in_place_codebook_optimizer"]:
        kwargs["in_place_codebook_optimizer"] = sgd
    return kwargs


def calling(row: dict[str, Any], seed: int = 0) -> tuple[Tensor, dict[str, Any]]:
    """The input and the arguments of the call. Where the width is first the library takes what has so many positions an axis alone."""
    of_one = ("implicit_neural_codebook", "kmeans_init", "affine_param")  # beams of which the library takes of one sequence alone
    alone = max(beams(row)) > 1 and any(row[name] for name in of_one)
    many = 84 if row["kmeans_init"] else 24
    if row["one_each"]:
        shape: tuple[int, ...] = (many, WIDTH)
    elif row["accept_3d_fmap"]:
        shape = (2, WIDTH, WIDTH, WIDTH, WIDTH)
    elif row["accept_image_fmap"]:
        shape = (2, WIDTH, WIDTH, WIDTH)
    elif not row["channel_last"]:
        shape = (6, WIDTH, WIDTH)
    else:
        shape = (1, many, WIDTH) if alone else (2, many // 2, WIDTH)
    x = torch.cat([vectors(*shape, seed=10 * g + seed) for g in range(row.get("groups", 1))], 1 if width_is_first(row) else -1)
    if row["kmeans_init"]:  # so that no code is one vector, where the library's distances are rounding alone
        x = x.movedim(1, 0) if len(x) == 1 else x
        one, other = x.chunk(2)
        x = torch.cat([one, one + 0.1 * other])
        x = x.movedim(1, 0) if shape[0] == 1 else x
    calls = {name: row[name] for name in ("return_all_codes", "rand_quantize_dropout_fixed_seed") if row[name]}
    calls |= {name: row[own] for name, own in IN_CALL.items() if row[own]}
    if "groups" in row:
        del calls["rand_quantize_dropout_fixed_seed"]
    if row["mask"]:
        calls["mask"] = torch.arange(x.shape[1]).expand(x.shape[:2]) % 3 > 0
    return x, calls


def beams(row: dict[str, Any]) -> tuple[int, int]:
    """How many paths stand next to each other in training and in eval mode."""
    in_eval = row["beam_size"] if row["eval_beam_size"] is None else row["eval_beam_size"]
    return row["call_beam_size"] or row["beam_size"] or 1, row["call_beam_size"] or in_eval or 1


def is_learnable(row: dict[str, Any]) -> bool:
    apart = row["directional_reparam"] or row["vq_bridge"] is not None
    by_whole = row["diveq"] or row["implicit_neural_codebook"]
    return by_whole or (apart if row["learnable_codebook"] is None else row["learnable_codebook"])


def made_with_ema(row: dict[str, Any]) -> bool:
    if row["diveq"] or row["implicit_neural_codebook"]:
        return False
    return (not row["directional_reparam"] and row["vq_bridge"] is None) if row["ema_update"] is None else row["ema_update"]


def commits(row: dict[str, Any]) -> bool:
    return row["commitment_weight"] > 0 and not row["directional_reparam"] and not row["diveq"]


def codes_have_gradient(row: dict[str, Any]) -> bool:
    """Whether a loss or the output has one for the codes."""
    stays = row["route_gradients_to_input"] and not row["diveq"] and not row["directional_reparam"]
    return commits(row) or row["codebook_diversity_loss_weight"] > 0 or not stays or row["sync_update_v"] > 0


def is_image(row: dict[str, Any]) -> bool:
    return row["accept_image_fmap"] or row["accept_3d_fmap"]


NO_EMA = {"ema_update": False}
LEARNED = {"learnable_codebook": True, **NO_EMA}
REFUSED: list[strict.Rule] = [
    ({"num_quantizers": None}, lambda row: row["num_quantizers"] is None and not isinstance(row["codebook_size"], tuple)),
    (
        {"shared_codebook": True, "codebook_size": (CODES, 8, 5)},
        lambda row: row["shared_codebook"] and isinstance(row["codebook_size"], tuple),
    ),
    ({"eval_beam_size": 3}, lambda row: row["eval_beam_size"] is not None and row["beam_size"] is None),
    ({"straight_through": True}, lambda row: ways(row) > 1),
    ({"use_cosine_sim": True, **LEARNED}, lambda row: row["use_cosine_sim"] and is_learnable(row)),
    ({"use_cosine_sim": True, "affine_param": True}, lambda row: row["use_cosine_sim"] and row["affine_param"]),
    ({"learnable_codebook": True}, lambda row: is_learnable(row) and made_with_ema(row)),
    (
        {"straight_through": True, "rotation_trick": False, **LEARNED},
        lambda row: row["straight_through"] and is_learnable(row),
    ),
    (
        {"vq_bridge": "bridge", "learnable_codebook": False},
        lambda row: row["vq_bridge"] is not None and not is_learnable(row),
    ),
    (
        {"directional_reparam": True},
        lambda row: row["directional_reparam"] and not row["threshold_ema_dead_code"],
    ),
    ({"sync_update_v": 0.5}, lambda row: row["sync_update_v"] and not is_learnable(row)),
    ({"affine_param": True, "sync_affine_param": True}, lambda row: row["affine_param"] and row["sync_affine_param"]),
    (
        {"in_place_codebook_optimizer": "sgd"},
        lambda row: row["in_place_codebook_optimizer"] and not is_learnable(row) and not row["orthogonal_reg_weight"],
    ),
    (
        {"in_place_codebook_optimizer": "sgd", "implicit_neural_codebook": True},
        lambda row: row["in_place_codebook_optimizer"] and row["implicit_neural_codebook"] and not row["call_freeze"],
    ),
    (
        {"in_place_codebook_optimizer": "sgd", "shared_codebook": True, "orthogonal_reg_weight": 0.5},
        lambda row: (
            row["in_place_codebook_optimizer"]
            and row["shared_codebook"]
            and row["orthogonal_reg_weight"]
            and made_with_ema(row)
            and not row["call_freeze"]
        ),
    ),
    (
        {"in_place_codebook_optimizer": "sgd", "vq_bridge": "bridge"},
        lambda row: (
            row["in_place_codebook_optimizer"]
            and row["vq_bridge"] is not None
            and not row["shared_codebook"]
            and not row["manual_in_place_optimizer_update"]
            and not row["call_freeze"]
            and not row["implicit_neural_codebook"]
            and codes_have_gradient(row)
        ),
    ),
    ({"accept_image_fmap": True, "accept_3d_fmap": True}, lambda row: row["accept_image_fmap"] and row["accept_3d_fmap"]),
    ({"accept_image_fmap": True, "mask": "some"}, lambda row: is_image(row) and row["mask"]),
    ({"accept_image_fmap": True, "one_each": True}, lambda row: is_image(row) and row["one_each"]),
    ({"mask": "some", "one_each": True}, lambda row: row["mask"] and row["one_each"]),
    (
        {"accept_image_fmap": True, "codebook_dim": 4},
        lambda row: width_is_first(row) and row["codebook_dim"] and not row["one_each"],
    ),
    ({"accept_image_fmap": True, "beam_size": 2}, lambda row: width_is_first(row) and max(beams(row)) > 1),
    (
        {"commitment_use_cross_entropy_loss": True, "one_each": True},
        lambda row: commits(row) and row["commitment_use_cross_entropy_loss"] and (is_image(row) or row["one_each"]),
    ),
    ({"beam_size": 2, "commitment_weight": 0.0}, lambda row: beams(row)[0] > 1 and not commits(row)),
    (
        {"beam_size": 2, "commitment_use_cross_entropy_loss": True},
        lambda row: beams(row)[0] > 1 and row["commitment_use_cross_entropy_loss"],
    ),
    (
        {"beam_size": 2, "in_place_codebook_optimizer": "sgd", **LEARNED},
        lambda row: beams(row)[0] > 1 and row["in_place_codebook_optimizer"],
    ),
    (
        {"beam_size": 2, "straight_through": True, "rotation_trick": False},
        lambda row: max(beams(row)) > 1 and row["straight_through"],
    ),
]
"""What the library takes in no call, each with a case of it alone."""


def width_is_first(row: dict[str, Any]) -> bool:
    return is_image(row) or not row["channel_last"]


def stands_together(row: dict[str, Any]) -> bool:
    return strict.stands(REFUSED, row)


def usual(**changes: Any) -> dict[str, Any]:
    return {name: values[0] for name, values in (MAKING | CALLING).items()} | changes


@pytest.mark.parametrize("changes, is_refused", REFUSED, ids=lambda case: ",".join(case) if isinstance(case, dict) else "")
def test_what_no_row_holds_is_refused_there(changes: dict[str, Any], is_refused: Callable[[dict[str, Any]], bool]) -> None:
    row = usual(**changes)
    assert [rule for _, rule in REFUSED if rule(row)] == [is_refused]
    x, calls = calling(row)

    def train_and_evaluate() -> None:
        made = peer.ResidualVQ(**making(row))
        out = made(x.requires_grad_(), **calls)
        sum(part.sum() for part in out if part.requires_grad).backward()
        made.eval()(x, **calls)

    with pytest.raises(Exception):  # noqa: B017 - of whatever kind
        train_and_evaluate()


def arguments(row: dict[str, Any]) -> dict[str, Any]:
    """Those of the constructor, and over them those of the call, by name; what stands for a value is enough."""
    made = {name: row[name] for name in MAKING}
    called = {name: row[own] for name, own in IN_CALL.items() if row[own]}
    called |= {name: row[name] for name in ("mask", "return_all_codes", "rand_quantize_dropout_fixed_seed")}
    return {**made, **called, **of_residuals(made, called), "sequences": not row["one_each"]}


def cost(row: dict[str, Any]) -> int:
    return strict.cost("ResidualVQ", arguments(row))


def rounding_shows(row: dict[str, Any]) -> bool:
    """Where scores are magnified, or near 0, the library's float32 is no measure: both then compute in float64."""
    diverse = row["codebook_diversity_loss_weight"] > 0
    by_scores = diverse or row["commitment_use_cross_entropy_loss"]
    return (diverse and row["codebook_diversity_temperature"] > 1) or (
        by_scores and (row["kmeans_init"] or row["implicit_neural_codebook"])
    )


def compared(kind: str, row: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Comparison:
    prepare, dtype = None, torch.float32
    if rounding_shows(row):
        monkeypatch.setattr(Tensor, "float", lambda tensor: tensor)
        prepare, dtype = nn.Module.double, torch.float64
    inputs = [calling(row, seed)[0].to(dtype) for seed in range(2)]
    optimize = cost(row) == 0
    rate = 1e-3 if row["implicit_neural_codebook"] else RATE  # else the networks grow without bound
    options: dict[str, Any] = {"calls": calling(row)[1], "optimize": optimize, "prepare": prepare, "rate": rate}
    options["steps"] = strict.steps("ResidualVQ", arguments(row), optimize)
    return compare(kind, making(row), inputs.__getitem__, **options)


ROWS = covering_array(MAKING | CALLING, stands_together, cost=cost, wide=False)


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_pairs_of_options(number: int, same_draws: None, monkeypatch: pytest.MonkeyPatch) -> None:
    compared("ResidualVQ", ROWS[number], monkeypatch).check()


@pytest.mark.parametrize(
    "changes",
    [
        {"beam_size": 2, "orthogonal_reg_weight": 0.5, "orthogonal_reg_active_codes_only": True, **LEARNED},
        {"kmeans_init": True, "quantize_dropout": True, "rand_quantize_dropout_fixed_seed": 3},
        {"implicit_neural_codebook": True, "call_freeze": True, "commitment_use_cross_entropy_loss": True},
        {"implicit_neural_codebook": True, "freeze_codebook": True},
    ],
    ids=",".join,
)
def test_pairs_that_rows_avoid(changes: dict[str, Any], same_draws: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As something is excused in them, and something else can be had for it."""
    compared("ResidualVQ", usual(**changes), monkeypatch).check()


GROUPED = {"groups": (2, 1), **MAKING}
IN_GROUPS = {"one_each": (False, True), "mask": (None, "some"), "return_all_codes": (False, True)}
IN_GROUPS |= {name: CALLING[name] for name in ("call_temperature", "call_freeze")}
NOT_IN_GROUPS = {name: values[0] for name, values in CALLING.items() if name not in IN_GROUPS}


def stand_in_groups(row: dict[str, Any]) -> bool:
    """Several groups split the width, which the library looks for in the last axis of all but images."""
    elsewhere = row["accept_3d_fmap"] or not row["channel_last"]
    return stands_together(row | NOT_IN_GROUPS) and not (row["groups"] > 1 and elsewhere and not row["one_each"])


GROUPED_ROWS = covering_array(GROUPED | IN_GROUPS, stand_in_groups, cost=lambda row: cost(row | NOT_IN_GROUPS), wide=False)


@pytest.mark.parametrize("number", range(len(GROUPED_ROWS)))
def test_pairs_of_options_in_groups(number: int, same_draws: None, monkeypatch: pytest.MonkeyPatch) -> None:
    compared("GroupedResidualVQ", GROUPED_ROWS[number] | NOT_IN_GROUPS, monkeypatch).check()


@pytest.mark.parametrize("argument", [{"accept_3d_fmap": True}, {"channel_last": False}])
def test_what_several_groups_do_not_take_is_refused_there(argument: dict[str, Any]) -> None:
    row = {"groups": 2, **usual(**argument)}
    assert not stand_in_groups(row) and stands_together(row)
    with pytest.raises(Exception):  # noqa: B017 - of whatever kind
        peer.GroupedResidualVQ(**making(row))(calling(row)[0])


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


def test_masks_of_channels_first() -> None:
    first, last = facade.ResidualVQ(**BASE, channel_last=False), facade.ResidualVQ(**BASE)
    last.load_state_dict(first.state_dict())
    quantized, indices, losses = first(vectors().transpose(1, 2), mask=MASK)
    expected = last(vectors(), mask=MASK)
    torch.testing.assert_close((quantized.transpose(1, 2), indices, losses), expected)
    assert not quantized.transpose(1, 2)[~MASK].any()


def test_k_means_of_a_shared_codebook_sees_what_all_layers_do() -> None:
    """The error of two layers whose one codebook has the sizes of both."""
    x = torch.tensor([[8.0, 0.0], [8.0, 1.0], [8.0, -1.0], [-8.0, 0.0], [-8.0, 1.0], [-8.0, -1.0]]).repeat(20, 1)[None]
    errors = []
    for package in (peer, facade):
        torch.manual_seed(0)
        made = package.ResidualVQ(dim=2, num_quantizers=2, codebook_size=4, shared_codebook=True, kmeans_init=True, decay=1.0)
        made(x)
        errors.append((made.eval()(x)[0] - x).square().mean())
    assert errors[1] < 0.7 * errors[0]


def test_mean_and_variance_of_a_shared_codebook_step_once_a_call() -> None:
    """Codes that are all one stand at the mean of what a layer sees, so that the second layer sees the mean 0."""
    rvq = facade.ResidualVQ(dim=DIM, num_quantizers=2, codebook_size=CODES, shared_codebook=True, affine_param=True)
    rvq.layers[0].codebook = torch.zeros(CODES, DIM)
    rvq(3 + vectors())
    torch.testing.assert_close(rvq.state_dict()["layers.0._codebook.batch_mean"].flatten(), (3 + vectors()).mean((0, 1)) / 2)
    quantized, indices, _, codes = rvq.eval()(3 + vectors(), return_all_codes=True)
    torch.testing.assert_close(codes.sum(0), quantized)
    torch.testing.assert_close(codes, rvq.get_codes_from_indices(indices))


def test_layers_that_no_call_has_started_are_not_evaluated() -> None:
    rvq = facade.ResidualVQ(**BASE, kmeans_init=True, quantize_dropout=True)
    rvq(vectors(4, 50, DIM), rand_quantize_dropout_fixed_seed=3)
    assert [bool(layer._codebook.initted) for layer in rvq.layers] == [True, False, False]
    with pytest.raises(ValueError, match="k-means"):
        rvq.eval()(vectors())
    rvq.train()(vectors(4, 50, DIM), rand_quantize_dropout_fixed_seed=5)
    assert rvq.eval()(vectors())[0].isfinite().all()


def test_the_call_that_starts_the_codes_is_greedy(same_draws: None) -> None:
    beam, greedy = (facade.ResidualVQ(**BASE, kmeans_init=True, beam_size=size) for size in (4, 1))
    x = vectors(4, 50, DIM)
    torch.testing.assert_close(beam(x), greedy(x))
    torch.testing.assert_close(beam.state_dict(), greedy.state_dict())
    assert not torch.equal(beam(x)[1], greedy(x)[1])


def test_codes_behind_a_bridge_are_those_of_its_output() -> None:
    rvq = facade.ResidualVQ(**BASE, vq_bridge=Bridge())
    quantized, indices, _, codes = rvq(vectors(), return_all_codes=True)
    torch.testing.assert_close(codes.sum(0), quantized)
    torch.testing.assert_close(codes, rvq.get_codes_from_indices(indices))


def test_a_bridge_of_all_layers_is_one_in_a_call() -> None:
    rvq = facade.ResidualVQ(**BASE, vq_bridge=Bridge(), in_place_codebook_optimizer=sgd)
    x = vectors().requires_grad_()
    quantized, indices, losses = rvq(x)
    (quantized.sum() + losses.sum()).backward()  # through what no optimizer has moved meanwhile
    torch.testing.assert_close(rvq.get_output_from_indices(indices), quantized)


def test_networks_of_frozen_calls_are_constants() -> None:
    rvq = facade.ResidualVQ(**BASE, implicit_neural_codebook=True, commitment_use_cross_entropy_loss=True)
    x = vectors().requires_grad_()
    rvq(x, freeze_codebook=True)[2].sum().backward()
    assert all(parameter.grad is None for parameter in rvq.parameters())


def test_a_beam_has_the_losses_of_its_path() -> None:
    options = {"orthogonal_reg_weight": 0.5, "orthogonal_reg_active_codes_only": True, "codebook_diversity_loss_weight": 0.1}
    rvq = facade.ResidualVQ(**BASE, **options, codebook_diversity_temperature=1.0, beam_size=3)
    codes, x = rvq.codebooks.detach().clone(), vectors()
    _, indices, losses = rvq(x, freeze_codebook=True)
    residual = x
    for layer in range(LAYERS):
        chosen = codes[layer][indices[..., layer]]
        shares = (-torch.cdist(residual, codes[layer])).softmax(-1).mean((0, 1))
        active = peer.vector_quantize_pytorch.orthogonal_loss_fn(codes[None, layer, indices[..., layer].unique()])
        expected = (chosen - residual).square().mean() + 0.5 * active + 0.1 * (shares * shares.log()).sum()
        torch.testing.assert_close(losses[layer], expected)
        residual = residual - chosen


@pytest.mark.parametrize("temperature", [1e-6, 10.0])
def test_a_beam_draws_the_codes_that_its_paths_go_on_with(temperature: float) -> None:
    """Near 0 they are the nearest; else other paths, no better than these."""
    torch.manual_seed(0)
    rvq = facade.ResidualVQ(**BASE, stochastic_sample_codes=True, beam_size=3)
    nearest = copy.deepcopy(rvq).eval()(vectors())
    quantized, indices, _ = rvq(vectors(), sample_codebook_temp=temperature, freeze_codebook=True)
    assert torch.equal(indices, nearest[1]) == (temperature < 1)
    errors = [(found - vectors()).square().mean() for found in (nearest[0], quantized)]
    assert errors[0] <= errors[1] + 1e-6


def test_a_beam_has_its_errors_in_eval_mode() -> None:
    rvq = facade.ResidualVQ(**BASE, commitment_weight=0.25, beam_size=3).eval()
    _, _, losses, codes = rvq(vectors(), return_all_codes=True)
    left = vectors() - codes.cumsum(0)
    torch.testing.assert_close(losses, 0.25 * left.square().mean((1, 2, 3)))


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
        (
            lambda: facade.GroupedResidualVQ(
                **BASE, groups=2, vq_bridge=Bridge(), shared_codebook=True, in_place_codebook_optimizer=sgd, learnable_codebook=True
            ),
            "in_place_codebook_optimizer is given",
        ),
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
