"""The facade's VectorQuantize beside the peer's: every option and every pair of options that can stand together."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from facade import deviations, strict
from facade.compare import compare
from facade.covering import covering_array
from facade.deviations import DEVIATIONS
from facade.peer import facade, facade_module, peer
from thread_ranks import in_ranks

DIM, CODES = 8, 16
there, here = peer.vector_quantize_pytorch, facade_module("vector_quantize_pytorch")

MAKING: dict[str, tuple[Any, ...]] = {
    "codebook_dim": (None, 4),
    "heads": (1, 2),
    "separate_codebook_per_head": (False, True),
    "decay": (0.8, 0.5, 1.0),
    "eps": (1e-5, 1e-3),
    "freeze_codebook": (False, True),
    "kmeans_init": (False, True),
    "kmeans_iters": (10, 2),
    "sync_kmeans": (True, False),
    "use_cosine_sim": (False, True),
    "layernorm_after_project_in": (False, True),
    "threshold_ema_dead_code": (0, 0.85),
    "channel_last": (True, False),
    "accept_image_fmap": (False, True),
    "accept_3d_fmap": (False, True),
    "commitment_weight": (1.0, 0.25, 0.0),
    "commitment_use_cross_entropy_loss": (False, True),
    "orthogonal_reg_weight": (0.0, 0.5),
    "orthogonal_reg_active_codes_only": (False, True),
    "orthogonal_reg_max_codes": (None, 4),
    "codebook_diversity_loss_weight": (0.0, 0.1),
    "codebook_diversity_temperature": (100.0, 1.0),
    "stochastic_sample_codes": (False, True),
    "sample_codebook_temp": (1.0, 0.5),
    "straight_through": (False, True),
    "rotation_trick": (None, True, False),
    "directional_reparam": (False, True),
    "directional_reparam_variance": (5e-3, 1e-1),
    "sync_codebook": (None, False),
    "sync_affine_param": (False, True),
    "ema_update": (None, True, False),
    "vq_bridge": (None, "bridge"),
    "manual_ema_update": (False, True),
    "learnable_codebook": (None, False, True),
    "in_place_codebook_optimizer": (None, "sgd"),
    "manual_in_place_optimizer_update": (False, True),
    "affine_param": (False, True),
    "affine_param_batch_decay": (0.99, 0.5),
    "affine_param_codebook_decay": (0.9, 0.5),
    "sync_update_v": (0.0, 0.5),
    "return_zeros_for_masked_padding": (True, False),
    "route_gradients_to_input": (True, False),
}
CALLING: dict[str, tuple[Any, ...]] = {
    "one_each": (False, True),
    "indices": (None, "given"),
    "mask": (None, "some"),
    "lens": (None, "some"),
    "topk": (None, 3),
    "call_temperature": (None, 0.3),
    "call_freeze": (None, True, False),
    "return_loss_breakdown": (False, True),
    "codebook_transform_fn": (None, "moved"),
    "ema_update_weight": (None, "tensor", "function"),
    "accum_ema_update": (False, True),
    "call_ema_update": (None, True, False),
}


IN_CALL = {"sample_codebook_temp": "call_temperature", "freeze_codebook": "call_freeze", "ema_update": "call_ema_update"}


def arguments(row: dict[str, Any]) -> dict[str, Any]:
    """Those of the constructor, and over them those of the call, by name; what stands for a value is enough."""
    given = {name: row[name] for name in (*MAKING, *CALLING) if not name.startswith("call_") and name != "one_each"}
    called = {name: row[own] for name, own in IN_CALL.items() if row[own] is not None}
    return {**given, **called, "sequences": not row["one_each"]}


def is_projected(row: dict[str, Any]) -> bool:
    return (row["codebook_dim"] or DIM) * row["heads"] != DIM


def commits(row: dict[str, Any]) -> bool:
    return row["commitment_weight"] > 0 and not row["directional_reparam"]


def is_learnable(row: dict[str, Any]) -> bool:
    apart = row["directional_reparam"] or row["vq_bridge"] is not None
    return apart if row["learnable_codebook"] is None else row["learnable_codebook"]


def made_with_ema(row: dict[str, Any]) -> bool:
    return (not row["directional_reparam"] and row["vq_bridge"] is None) if row["ema_update"] is None else row["ema_update"]


def ways(row: dict[str, Any]) -> int:
    rotates = not row["directional_reparam"] if row["rotation_trick"] is None else row["rotation_trick"]
    return sum(map(bool, (row["straight_through"], rotates, row["directional_reparam"])))


def is_image(row: dict[str, Any]) -> bool:
    return row["accept_image_fmap"] or row["accept_3d_fmap"]


NO_EMA = {"ema_update": False}
LEARNED = {"learnable_codebook": True, **NO_EMA}
REFUSED: list[strict.Rule] = [
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
    ({"accept_image_fmap": True, "accept_3d_fmap": True}, lambda row: row["accept_image_fmap"] and row["accept_3d_fmap"]),
    ({"accept_image_fmap": True, "mask": "some"}, lambda row: is_image(row) and (row["mask"] or row["lens"])),
    ({"accept_image_fmap": True, "one_each": True}, lambda row: is_image(row) and row["one_each"]),
    ({"lens": "some", "channel_last": False}, lambda row: row["lens"] and not row["channel_last"]),
    ({"mask": "some", "lens": "some"}, lambda row: row["mask"] and row["lens"]),
    ({"mask": "some", "one_each": True}, lambda row: (row["mask"] or row["lens"]) and row["one_each"]),
    ({"topk": 3, "heads": 2}, lambda row: row["topk"] and row["heads"] > 1),
    (
        {"topk": 3, "commitment_use_cross_entropy_loss": True},
        lambda row: row["topk"] and row["commitment_use_cross_entropy_loss"],
    ),
    (
        {"topk": 3, "in_place_codebook_optimizer": "sgd", **LEARNED},
        lambda row: row["topk"] and row["in_place_codebook_optimizer"],
    ),
    (
        {"topk": 3, "straight_through": True, "rotation_trick": False},
        lambda row: row["topk"] and row["straight_through"],
    ),
    (
        {"orthogonal_reg_active_codes_only": True, "orthogonal_reg_weight": 0.5, "separate_codebook_per_head": True, "heads": 2},
        lambda row: (
            row["orthogonal_reg_active_codes_only"]
            and row["orthogonal_reg_weight"]
            and row["separate_codebook_per_head"]
            and row["heads"] > 1
            and not row["indices"]
        ),
    ),
    (
        {"commitment_use_cross_entropy_loss": True, "one_each": True},
        lambda row: commits(row) and row["commitment_use_cross_entropy_loss"] and (is_image(row) or row["one_each"]) and not row["indices"],
    ),
    (
        {"mask": "some", "codebook_dim": 4},
        lambda row: (
            (row["mask"] or row["lens"])
            and (is_projected(row) or row["heads"] > 1)
            and commits(row)
            and not row["commitment_use_cross_entropy_loss"]
            and not row["topk"]
            and not row["indices"]
        ),
    ),
]
"""What the library takes in no call, each with a case of it alone."""


def stands_together(row: dict[str, Any]) -> bool:
    return strict.stands(REFUSED, row)


def usual(**changes: Any) -> dict[str, Any]:
    return {name: values[0] for name, values in (MAKING | CALLING).items()} | changes


@pytest.mark.parametrize("changes, is_refused", REFUSED, ids=lambda case: ",".join(case) if isinstance(case, dict) else "")
def test_what_no_row_holds_is_refused_there(changes: dict[str, Any], is_refused: Callable[[dict[str, Any]], bool]) -> None:
    row = usual(**changes)
    assert [rule for _, rule in REFUSED if rule(row)] == [is_refused]
    x, calls = calling(row)
    with pytest.raises(Exception):  # noqa: B017 - of whatever kind
        there.VectorQuantize(**making(row))(x, **calls)


def cost(row: dict[str, Any]) -> int:
    return strict.cost("VectorQuantize", arguments(row))


ROWS = covering_array(MAKING | CALLING, stands_together, cost=cost)


class Bridge(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.25))

    def forward(self, codes: Tensor) -> Tensor:
        return (codes * self.scale).tanh() * 1.5


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def some(*shape: int) -> Tensor:
    """A mask with True and False in every row."""
    return torch.arange(shape[-1]).expand(shape) % 3 > 0


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return 1.5 * torch.randn(*(shape or (2, 12, DIM)), generator=torch.Generator().manual_seed(seed))


def size_of(row: dict[str, Any]) -> int:
    """After k-means no code is one vector: where a distance is 0, the library's is rounding alone."""
    return 4 if row["kmeans_init"] else CODES


def making(row: dict[str, Any]) -> dict[str, Any]:
    kwargs = {"dim": DIM, "codebook_size": size_of(row), **{name: row[name] for name in MAKING}}
    if kwargs["vq_bridge"]:
        kwargs["vq_bridge"] = Bridge()
    if kwargs["in_place_codebook_optimizer"]:
        kwargs["in_place_codebook_optimizer"] = sgd
    return kwargs


def rounding_shows(row: dict[str, Any]) -> bool:
    """Where scores are magnified, or near 0, the library's float32 is no measure: both then compute in float64."""
    diverse = row["codebook_diversity_loss_weight"] > 0
    softened = row["straight_through"] and not row["route_gradients_to_input"]
    by_scores = diverse or softened or row["indices"] is not None or row["commitment_use_cross_entropy_loss"]
    return (diverse and row["codebook_diversity_temperature"] > 1) or (by_scores and row["kmeans_init"])


def calling(row: dict[str, Any], seed: int = 0) -> tuple[Tensor, dict[str, Any]]:
    """The input and the arguments of the call."""
    if row["one_each"]:
        x = vectors(24, DIM, seed=seed)
    elif row["accept_image_fmap"]:
        x = vectors(2, DIM, 3, 4, seed=seed)
    elif row["accept_3d_fmap"]:
        x = vectors(2, DIM, 3, 2, 2, seed=seed)
    else:
        x = vectors(seed=seed) if row["channel_last"] else vectors(seed=seed).transpose(1, 2)
    calls = {name: row[name] for name in CALLING if not name.startswith("call_") and name != "one_each" and row[name]}
    calls |= {name: row[own] for name, own in IN_CALL.items() if row[own] is not None}
    heads = (row["heads"],) if row["heads"] > 1 else ()
    if row["indices"]:
        shape = (24, 1) if row["one_each"] else (2, 12)
        calls["indices"] = torch.randint(-1, size_of(row), (*shape, *heads), generator=torch.Generator().manual_seed(3))
    if row["mask"]:
        calls["mask"] = some(2, 12)
    if row["lens"]:
        calls["lens"] = torch.tensor([12, 7])
    if row["codebook_transform_fn"]:
        batch = (24, 1) if row["one_each"] else (2, 12)
        width = row["codebook_dim"] or DIM
        batch = (batch[0] * row["heads"], batch[1]) if row["heads"] > 1 and not row["separate_codebook_per_head"] else batch
        offset = vectors(*batch, 1, width, seed=5)
        calls["codebook_transform_fn"] = lambda codes: codes[:, None, None] * 1.1 + 0.3 * offset
    if row["ema_update_weight"]:
        weight = torch.linspace(0.1, 1.0, size_of(row))
        weight = weight.expand(row["heads"], -1) if row["separate_codebook_per_head"] else weight
        weight = weight.double() if rounding_shows(row) else weight
        calls["ema_update_weight"] = weight if row["ema_update_weight"] == "tensor" else lambda total, count: 1 / (1 + count)
    return x, calls


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_every_pair_of_options_is_the_peers(row: dict[str, Any], same_draws: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calling(row)[1]
    eval_calls = {name: value for name, value in calls.items() if name != "indices"}
    prepare, dtype = None, torch.float32
    if rounding_shows(row):
        monkeypatch.setattr(Tensor, "float", lambda tensor: tensor)
        prepare, dtype = nn.Module.double, torch.float64
    options = {"optimize": cost(row) == 0, "prepare": prepare}
    inputs = [calling(row, seed)[0].to(dtype) for seed in range(2)]
    compare("VectorQuantize", making(row), inputs.__getitem__, calls=calls, eval_calls=eval_calls, **options).check()


TARGETS = torch.randint(0, CODES, (2, 12), generator=torch.Generator().manual_seed(3))
ACTIVE = {"orthogonal_reg_weight": 0.5, "orthogonal_reg_active_codes_only": True}
FROZEN = {"freeze_codebook": True, **LEARNED}
DIVERSE = {"codebook_diversity_loss_weight": 0.1, "codebook_diversity_temperature": 1.0}
OWN = {**LEARNED, "in_place_codebook_optimizer": "sgd"}
ORTHOGONAL = {"orthogonal_reg_weight": 0.5, **NO_EMA}
SOFT = {"straight_through": True, "rotation_trick": False}
DEVIATING: dict[str, dict[str, Any]] = {
    "heads=2 & not separate_codebook_per_head": {"heads": 2},
    "vq_bridge": {"vq_bridge": "bridge"},
    "commitment_use_cross_entropy_loss & codes that move in the call": {"commitment_use_cross_entropy_loss": True},
    "indices & codes that move in the call": {"indices": "given"},
    "straight_through & not route_gradients_to_input & codes that move in the call": {**SOFT, "route_gradients_to_input": False},
    "codebook_diversity_loss_weight & codes that move in the call": {**DIVERSE, "one_each": True, "decay": 0.5},
    "codebook_diversity_loss_weight & sequences": {**DIVERSE, **NO_EMA},
    "codebook_diversity_loss_weight & separate_codebook_per_head & heads=2": {
        **DIVERSE,
        **NO_EMA,
        "heads": 2,
        "separate_codebook_per_head": True,
        "one_each": True,
    },
    "orthogonal_reg_weight & codes that move in the call": {"orthogonal_reg_weight": 0.5},
    "learned codes & moving averages & an optimizer": {**LEARNED, "call_ema_update": True},
    "orthogonal_reg_weight & use_cosine_sim & an optimizer": {**ORTHOGONAL, "use_cosine_sim": True, "topk": 3},
    "orthogonal_reg_weight & use_cosine_sim & not route_gradients_to_input": {
        **ORTHOGONAL,
        "use_cosine_sim": True,
        "route_gradients_to_input": False,
    },
    "orthogonal_reg_weight & use_cosine_sim & in_place_codebook_optimizer": {
        **ORTHOGONAL,
        "use_cosine_sim": True,
        "in_place_codebook_optimizer": "sgd",
    },
    "sync_update_v & route_gradients_to_input": {**LEARNED, "sync_update_v": 0.5},
    "use_cosine_sim & masked": {"use_cosine_sim": True, "lens": "some"},
    "indices & masked": {**NO_EMA, "indices": "given", "mask": "some"},
    "orthogonal_reg_weight & orthogonal_reg_active_codes_only & masked": {**ACTIVE, **NO_EMA, "mask": "some"},
    "kmeans_init & freeze_codebook": {"kmeans_init": True, "freeze_codebook": True},
    "kmeans_init & threshold_ema_dead_code": {"kmeans_init": True, "threshold_ema_dead_code": 10.0},
    "in_place_codebook_optimizer & counted codes": {**OWN, "threshold_ema_dead_code": 0.85},
    "in_place_codebook_optimizer & affine_param": {**OWN, "affine_param": True},
    "in_place_codebook_optimizer & straight_through": {**ORTHOGONAL, **SOFT, "in_place_codebook_optimizer": "sgd"},
    "freeze_codebook & learned codes": {**FROZEN, "route_gradients_to_input": False},
    "vq_bridge & affine_param": {"vq_bridge": "bridge", "affine_param": True},
    "vq_bridge & codes that move in the call": {"vq_bridge": "bridge", "call_ema_update": True},
    "vq_bridge & orthogonal_reg_weight": {"vq_bridge": "bridge", "orthogonal_reg_weight": 0.5},
    "affine_param & threshold_ema_dead_code": {"affine_param": True, "threshold_ema_dead_code": 0.85},
    "affine_param & topk": {"affine_param": True, "topk": 3},
    "affine_param & freeze_codebook": {"affine_param": True, "call_freeze": True},
    "affine_param & accum_ema_update": {"affine_param": True, "accum_ema_update": True},
    "affine_param & orthogonal_reg_weight": {**ORTHOGONAL, "affine_param": True},
    "affine_param": {"affine_param": True},
    "accum_ema_update": {"accum_ema_update": True},
}
"""For each row of the table that excuses anything what shows that it has to."""


def test_each_deviation_has_its_case() -> None:
    assert {row.option for row in DEVIATIONS if row.parts and row.of("VectorQuantize")} == DEVIATING.keys()


@pytest.mark.parametrize("option", DEVIATING)
def test_what_deviates_stands_in_the_table(option: str, same_draws: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (own,) = (row for row in DEVIATIONS if row.of("VectorQuantize") and row.option == option)
    row = usual(**DEVIATING[option])
    assert stands_together(row)
    x, calls = calling(row)
    eval_calls = {name: value for name, value in calls.items() if name != "indices"}
    options = {"calls": calls, "eval_calls": eval_calls, "optimize": "an optimizer" in option}
    found = compare("VectorQuantize", making(row), x, **options)
    found.check()
    far = [part for part, worst in found.worst.items() if worst > 1e-5]
    assert any(own.covers(part) for part in far), "it is the peer's: no case for the table"
    monkeypatch.setattr(deviations, "DEVIATIONS", tuple(row for row in DEVIATIONS if row is not own))
    with pytest.raises(AssertionError):
        found.check()


# What is right where the peer is not


def make(seed: int = 0, **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    return here.VectorQuantize(**{"dim": DIM, "codebook_size": CODES, **kwargs})


def twins(**kwargs: Any) -> tuple[Any, Any]:
    made = make(**kwargs), make(**kwargs)
    made[1].load_state_dict(made[0].state_dict())
    return made


def gradient(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output.sum(), inputs, allow_unused=True)


def test_an_index_of_minus_one_gives_zeros() -> None:
    vq = make(codebook_dim=4)
    mask = some(2, 12)
    quantized, indices, _ = vq.eval()(vectors(), mask=mask)
    for decode in (vq.get_codes_from_indices, vq.get_output_from_indices):
        decoded = decode(indices)
        assert not decoded[~mask].any()
        assert decoded[mask].any(-1).all()
    assert torch.equal(vq.get_output_from_indices(indices), quantized)


@pytest.mark.parametrize(
    ("kwargs", "shape"),
    [
        ({"heads": 2}, (2, 12, DIM)),
        ({"heads": 2, "codebook_dim": 4, "accept_image_fmap": True}, (2, DIM, 3, 4)),
        ({"codebook_dim": 4, "accept_image_fmap": True}, (2, DIM, 4, 4)),
        ({"codebook_dim": 4, "accept_3d_fmap": True}, (2, DIM, 2, 3, 4)),
        ({"codebook_dim": 4, "channel_last": False}, (2, DIM, 4)),
        ({"vq_bridge": Bridge()}, (2, 12, DIM)),
    ],
)
def test_decoding_gives_what_a_call_gave(kwargs: dict[str, Any], shape: tuple[int, ...]) -> None:
    vq = make(**kwargs).eval()
    x = vectors(*shape)
    quantized, indices, _ = vq(x)
    torch.testing.assert_close(vq.get_output_from_indices(indices), quantized)


@pytest.mark.parametrize(
    "kwargs, calls, which",
    [
        ({"commitment_use_cross_entropy_loss": True}, {}, 2),
        ({}, {"indices": TARGETS}, 1),
        ({**DIVERSE, "commitment_weight": 0.0}, {}, 2),
        ({**SOFT, "route_gradients_to_input": False}, {}, 0),
    ],
    ids=["cross-entropy", "given codes", "diversity", "softmax"],
)
def test_losses_by_scores_have_the_gradient_of_the_codes_they_saw(kwargs: dict[str, Any], calls: dict[str, Any], which: int) -> None:
    learns, stands = twins(**kwargs)
    x = vectors().requires_grad_()
    found = [vq(x, freeze_codebook=frozen, **calls)[which].square() for vq, frozen in ((learns, False), (stands, True))]
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(gradient(found[0], x)[0], gradient(found[1], x)[0])
    assert not torch.equal(learns.codebook, stands.codebook)


def test_diversity_is_that_of_all_vectors_however_they_stand() -> None:
    kwargs = {"codebook_diversity_loss_weight": 0.1, "codebook_diversity_temperature": 1.0, "commitment_weight": 0.0}
    vq, other = twins(**kwargs)
    there_made = there.VectorQuantize(dim=DIM, codebook_size=CODES, **kwargs)
    there_made.load_state_dict(vq.state_dict())
    x = vectors()
    expected = there_made(x.reshape(24, 1, DIM))[2]
    torch.testing.assert_close(vq(x)[2], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(other(x.reshape(24, DIM))[2], expected, rtol=1e-5, atol=1e-6)


def test_diversity_of_separate_codebooks_is_that_of_each() -> None:
    kwargs = {**DIVERSE, "commitment_weight": 0.0}
    vq = make(heads=2, codebook_dim=DIM // 2, separate_codebook_per_head=True, **kwargs)
    singles = [make(dim=DIM // 2, **kwargs) for _ in range(2)]
    for single, codes in zip(singles, vq.codebook, strict=True):
        single.codebook = codes
    found = [single(half)[2] for single, half in zip(singles, vectors().chunk(2, -1), strict=True)]
    torch.testing.assert_close(vq(vectors())[2], torch.stack(found).mean())


def test_diversity_counts_every_code() -> None:
    vq = make(codebook_size=3, codebook_diversity_loss_weight=1.0, codebook_diversity_temperature=1.0, commitment_weight=0.0)
    vq.codebook = torch.tensor([1.0, 2.0, 16.0]).unsqueeze(-1) * torch.eye(DIM)[:1]
    x = torch.zeros(1, 5, DIM)
    shares = (-torch.tensor([1.0, 2.0, 16.0])).softmax(-1)
    assert shares[2] < 1e-6
    torch.testing.assert_close(vq(x)[2], (shares * shares.log()).sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_scores_are_as_exact_near_a_code_as_elsewhere(offset: float) -> None:
    vq = make(commitment_weight=0.0)
    vq.codebook = offset + 1e-3 * vectors(CODES, DIM)
    x = vq.codebook[None] + 1e-6
    targets = torch.arange(CODES)[None]
    loss = vq(x, indices=targets, freeze_codebook=True)[1]
    distances = torch.cdist(x.double(), vq.codebook[None].double(), compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(loss.double(), nn.functional.cross_entropy(-distances[0], targets[0]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kwargs", [{}, {"use_cosine_sim": True}, {"threshold_ema_dead_code": 2}, LEARNED], ids=str)
def test_codes_that_are_assigned_learn_from_where_they_are(kwargs: dict[str, Any]) -> None:
    vq = make(**kwargs)
    codes = vectors(CODES, DIM) / (vectors(CODES, DIM).norm(dim=-1, keepdim=True) if "use_cosine_sim" in kwargs else 1.0)
    vq.codebook = codes
    vq(codes.expand(2, CODES, DIM))  # each vector is its code
    torch.testing.assert_close(vq.codebook.detach(), codes, rtol=1e-4, atol=1e-4)


def test_a_narrow_module_learns_as_a_wide_one() -> None:
    wide, narrow = (vq.to(dtype) for vq, dtype in zip(twins(), (torch.float32, torch.bfloat16), strict=True))
    for step in range(20):
        x = (vectors() * (1 + 0.1 * step)).bfloat16()
        quantized, _, loss = narrow(x)
        wide(x.float())
        assert quantized.dtype == torch.bfloat16 and loss.dtype == torch.float32
    for key, value in narrow.state_dict().items():
        torch.testing.assert_close(value, wide.state_dict()[key], rtol=1e-4, atol=1e-4)


def test_cosine_codes_keep_length_1_whatever_an_optimizer_does() -> None:
    vq = make(**ORTHOGONAL, use_cosine_sim=True)
    with torch.no_grad():
        dict(vq.named_parameters())["_codebook.embed"].mul_(torch.linspace(0.5, 2.0, CODES).unsqueeze(-1))
    quantized, indices, _ = vq(vectors())
    torch.testing.assert_close(quantized.norm(dim=-1), torch.ones(2, 12))
    cosines = nn.functional.cosine_similarity(vectors().unsqueeze(-2), vq.codebook, dim=-1)
    assert torch.equal(indices, cosines.argmax(-1))


def test_the_gradient_of_a_bridge_is_that_of_what_it_saw() -> None:
    gradients = []
    for vq, calls in zip(twins(vq_bridge=Bridge()), ({}, {"ema_update": True}), strict=True):
        vq(vectors(), **calls)[2].backward()
        gradients.append([parameter.grad for parameter in vq.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kwargs, calls", [({"orthogonal_reg_weight": 0.5}, {}), (LEARNED, {"ema_update": True})])
def test_averages_go_on_from_where_an_optimizer_has_put_the_codes(kwargs: dict[str, Any], calls: dict[str, Any]) -> None:
    vq = make(**kwargs)
    codes = vq._codebook.embed.detach().clone()
    loss = vq(vectors(), **calls)[2]
    if "orthogonal_reg_weight" in kwargs:
        own = vq.commitment_weight * (vectors() - codes[0][vq.native.encode(vectors())]).square().mean()
        assert loss > 0 and own >= 0
    parameter = dict(vq.named_parameters())["_codebook.embed"]
    with torch.no_grad():
        parameter += 1.0
    indices = torch.full((2, 12), -1)
    indices[0, 0] = 3
    vq.eval()  # commits: half of the way of a code that nobody chose is not lost
    unused = vq._codebook.count[0] < 0.81
    assert unused.any()
    torch.testing.assert_close(vq._codebook.embed[0][unused], codes[0][unused] + 1.0, rtol=1e-4, atol=1e-4)


def test_orthogonality_is_that_of_the_codes_that_the_call_saw() -> None:
    vq = make(orthogonal_reg_weight=0.5, commitment_weight=0.0)
    codes = vq._codebook.embed.detach().clone()
    torch.testing.assert_close(vq(vectors())[2], 0.5 * here.orthogonal_loss_fn(codes))


def test_orthogonality_is_that_of_affine_codes() -> None:
    vq = make(**ORTHOGONAL, affine_param=True, commitment_weight=0.0)
    vq(vectors())
    loss = vq(3 + vectors())[2]
    torch.testing.assert_close(loss, 0.5 * here.orthogonal_loss_fn(vq.eval().native.codebook.unsqueeze(0)), rtol=1e-3, atol=0)


def test_orthogonality_is_that_of_the_codes_behind_a_bridge() -> None:
    vq = make(orthogonal_reg_weight=0.5, vq_bridge=Bridge(), commitment_weight=0.0)
    torch.testing.assert_close(vq(vectors())[2], 0.5 * here.orthogonal_loss_fn(vq._codebook.vq_bridge(vq._codebook.embed)))


def test_the_synchronous_update_goes_to_the_codes() -> None:
    vq = make(sync_update_v=0.5, learnable_codebook=True, commitment_weight=0.0, rotation_trick=False)
    x = vectors().requires_grad_()
    quantized, indices, _ = vq(x)
    of_x, of_codes = gradient(quantized, x, dict(vq.named_parameters())["_codebook.embed"])
    assert torch.equal(of_x, torch.ones_like(x))
    torch.testing.assert_close(of_codes[0], 0.5 * torch.bincount(indices.flatten(), minlength=CODES).unsqueeze(-1).expand(-1, DIM).float())


@pytest.mark.parametrize("kwargs", [{"use_cosine_sim": True}, {"heads": 2, "codebook_dim": 3}, {**ACTIVE, **NO_EMA}])
def test_masked_vectors_take_no_part_in_losses(kwargs: dict[str, Any]) -> None:
    masked, packed = twins(**kwargs)
    x, mask = vectors(), some(2, 12)
    torch.testing.assert_close(masked(x, mask=mask)[2], packed(x[mask].unsqueeze(0))[2])
    own, all_true = twins(**kwargs)
    torch.testing.assert_close(own(x)[2], all_true(x, mask=torch.ones(2, 12, dtype=torch.bool))[2])


def test_masked_vectors_take_no_part_in_the_cross_entropy_of_given_codes() -> None:
    vq, mask = make(), some(2, 12)
    expected = vq(vectors(), indices=TARGETS.where(mask, -1), freeze_codebook=True)[1]
    torch.testing.assert_close(vq(vectors(), indices=TARGETS, mask=mask)[1], expected)


@pytest.mark.parametrize("calls", [{"freeze_codebook": True}, "eval"])
def test_k_means_runs_in_training_alone(calls: Any) -> None:
    vq = make(kmeans_init=True)
    vq.train(calls != "eval")
    with pytest.raises(ValueError, match="kmeans_init = True: the codes wait for the k-means"):
        vq(vectors(), **({} if calls == "eval" else calls))
    vq.train()(vectors())
    assert vq._codebook.initted
    vq.eval()(vectors())


def test_vectors_far_from_the_origin_have_the_nearest_code() -> None:
    vq, x = make().eval(), vectors() + 1_000.0
    vq.codebook = vectors(CODES, DIM, seed=1) + 1_000.0
    indices = vq(x)[1]
    distances = torch.cdist(x.double().flatten(0, -2), vq.codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.equal(indices.flatten(), distances.argmin(-1))


def test_no_rotation_is_taken_between_lengths_that_are_far_apart() -> None:
    vq, x = make(commitment_weight=0.0), (vectors() * 1e-9).requires_grad_()
    weight = vectors(seed=1)
    quantized, indices, _ = vq(x, freeze_codebook=True)
    assert torch.equal(quantized, vq.codebook[indices])
    (quantized * weight).sum().backward()
    torch.testing.assert_close(x.grad, weight)


def test_no_code_of_a_k_means_start_is_left_empty() -> None:
    vq, few = make(kmeans_init=True), vectors()[:, :1].expand(-1, 16, -1) + 5.0
    vq(few)
    assert (torch.cdist(vq.codebook, few.flatten(0, -2)).amin(-1) < 0.5).all()


@pytest.mark.parametrize("kmeans", [False, True])
def test_codes_that_are_merely_not_yet_used_do_not_die(kmeans: bool) -> None:
    vq = make(threshold_ema_dead_code=2, kmeans_init=kmeans)
    if kmeans:
        vq(vectors())
    before = vq._codebook.embed_avg / vq._codebook.cluster_size.unsqueeze(-1)
    vq(vectors(2, 1, DIM))
    moved = (vq._codebook.embed_avg / vq._codebook.cluster_size.unsqueeze(-1) - before).abs().amax(-1) > 1e-4
    assert moved.sum() <= 2
    for _ in range(20):
        vq(vectors(2, 1, DIM))
    assert (vq._codebook.cluster_size < 4).sum() > CODES / 2  # but later they do


@pytest.mark.parametrize("decay", [0.5, 0.8, 0.99, 0.999])
@pytest.mark.parametrize("kmeans", [False, True])
def test_codes_without_a_vector_start_anew_after_three_steps_at_most(kmeans: bool, decay: float) -> None:
    vq = make(threshold_ema_dead_code=2, kmeans_init=kmeans, decay=decay)
    if kmeans:
        vq(vectors())
    fewest = vq._codebook.cluster_size == vq._codebook.cluster_size.min()
    there = vectors() + 1_000.0  # where an encoder has moved to
    fewest[0, vq(there)[1]] = False
    for _ in range(3):
        vq(there)
    assert fewest.any() and ((vq._codebook.embed[fewest] - 1_000.0).abs() < 50.0).all()


@pytest.mark.parametrize("calls", [{}, {"ema_update": True}])
def test_the_counts_are_those_of_the_codes_that_an_optimizer_left(calls: dict[str, Any]) -> None:
    vq = make(**LEARNED, in_place_codebook_optimizer=sgd, threshold_ema_dead_code=1e-3)
    before = vq._codebook.cluster_size.clone()
    indices = vq(vectors(), **calls)[1]
    torch.testing.assert_close(vq._codebook.cluster_size, 0.8 * before + 0.2 * torch.bincount(indices.flatten(), minlength=CODES))


def test_the_own_optimizer_leaves_the_input_and_its_layers_alone() -> None:
    kwargs = {**ORTHOGONAL, "codebook_dim": 4, "in_place_codebook_optimizer": sgd}
    hard, soft = make(**kwargs), make(**kwargs, **SOFT)
    soft.load_state_dict(hard.state_dict())
    x = vectors().requires_grad_()
    for vq in (hard, soft):
        vq(x)
        assert x.grad is None and vq.project_in.weight.grad is None
    assert torch.equal(soft.codebook, hard.codebook)


def test_a_call_with_an_own_optimizer_moves_mean_and_variance_once() -> None:
    plain, own = make(**LEARNED, affine_param=True), make(**LEARNED, affine_param=True, in_place_codebook_optimizer=sgd)
    own.load_state_dict(plain.state_dict())
    for step in range(2):
        for vq in (plain, own):
            vq(vectors(seed=step))
    for name in ("batch_mean", "batch_variance"):
        torch.testing.assert_close(own.state_dict()[f"_codebook.{name}"], plain.state_dict()[f"_codebook.{name}"])


@pytest.mark.parametrize(
    "kwargs",
    [
        {"commitment_use_cross_entropy_loss": True},
        {"route_gradients_to_input": False},
        {"orthogonal_reg_weight": 0.5},
        {"directional_reparam": True, "threshold_ema_dead_code": 1},
    ],
)
def test_frozen_is_frozen(kwargs: dict[str, Any]) -> None:
    vq = make(**FROZEN, **kwargs)
    before = {key: value.clone() for key, value in vq.state_dict().items()}
    quantized, _, loss = vq(vectors().requires_grad_())
    (quantized.sum() + loss).backward()
    assert all(parameter.grad is None for parameter in vq._codebook.parameters())
    assert all(torch.equal(value, before[key]) for key, value in vq.state_dict().items())


def test_moments_of_codes_behind_a_bridge_are_refused() -> None:
    with pytest.raises(ValueError, match="transform"):
        make(vq_bridge=Bridge(), affine_param=True)


@pytest.mark.parametrize("kwargs", [{"kmeans_init": True}, {"threshold_ema_dead_code": 0.85}, {"kmeans_init": True, "decay": 0.5}])
def test_what_is_stored_before_a_bridge_is_set_as_there(kwargs: dict[str, Any], same_draws: None) -> None:
    found = compare("VectorQuantize", {"dim": DIM, "codebook_size": CODES, "vq_bridge": Bridge(), **kwargs}, vectors())
    assert found.check() < 1e-5
    assert "output.0" in found.worst and found.worst["output.0"] < 1e-5


def test_codes_are_expired_by_hand_before_a_bridge() -> None:
    vq = make(vq_bridge=Bridge(), threshold_ema_dead_code=2)
    vq._codebook.cluster_size.zero_()
    before = vq.codebook.detach().clone()
    vq.expire_codes_(vectors())
    assert not torch.equal(vq.codebook, before)


def test_affine_codes_change_in_training_alone() -> None:
    vq, other = make(affine_param=True), make(affine_param=True, seed=1)
    vq(3 + vectors())
    state = {key: value.clone() for key, value in vq.state_dict().items()}
    results = [vq.eval()(10 + vectors()) for _ in range(2)]
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(value, state[key]) for key, value in vq.state_dict().items())
    other.load_state_dict(state)
    quantized, indices, _ = other.eval()(10 + vectors())
    assert torch.equal(quantized, results[0][0])
    assert torch.equal(other.get_output_from_indices(indices), quantized)
    trained = there.VectorQuantize(dim=DIM, codebook_size=CODES, affine_param=True)
    trained(vectors())
    other.load_state_dict(trained.state_dict())
    assert torch.equal(other.state_dict()["_codebook.batch_mean"], trained.state_dict()["_codebook.batch_mean"])


@pytest.mark.parametrize("calls", [{"topk": 3}, {"accum_ema_update": True}, {"freeze_codebook": True}])
def test_calls_that_step_nothing_do_not_move_affine_codes(calls: dict[str, Any]) -> None:
    vq = make(affine_param=True)
    before = {key: value.clone() for key, value in vq.state_dict().items()}
    vq(vectors(), **calls)
    after = vq.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_dead_affine_codes_start_where_vectors_are() -> None:
    vq = make(affine_param=True, threshold_ema_dead_code=100.0)
    x = 3 + 2 * vectors()
    for _ in range(4):
        vq(x)
    codes = vq.eval().native.codebook
    assert torch.cdist(codes, x.reshape(-1, DIM)).amin(-1).max() < 1e-3


@pytest.mark.parametrize(
    "kwargs",
    [{"codebook_dim": 4}, {"use_cosine_sim": True}, {**LEARNED, "in_place_codebook_optimizer": sgd}],
    ids=["averages", "cosine", "own optimizer"],
)
def test_recomputation_updates_once(kwargs: dict[str, Any]) -> None:
    plain, again = twins(**kwargs)
    for step in range(2):
        x, y = (vectors(seed=step).requires_grad_() for _ in range(2))
        expected, found = plain(x), checkpoint(again, y, use_reentrant=False)
        for quantized, _, loss in (expected, found):
            (quantized.sin().sum() + loss).backward()
        torch.testing.assert_close(y.grad, x.grad)
    for key, value in plain.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


@pytest.mark.parametrize("sizes", [(8, 8, 8), (20, 0, 4)])
@pytest.mark.parametrize("kwargs", [{}, {"use_cosine_sim": True}, {"heads": 2, "separate_codebook_per_head": True}], ids=str)
def test_ranks_end_with_the_codebook_of_one_process(kwargs: dict[str, Any], sizes: tuple[int, ...]) -> None:
    whole = make(**kwargs)
    ranks = [copy.deepcopy(whole) for _ in sizes]

    def work(reducer: Any) -> dict[str, Tensor]:
        vq = ranks[reducer.rank]
        vq.native.reducer = reducer
        for step in range(2):
            vq(vectors(1, 24, DIM, seed=step).split(sizes, 1)[reducer.rank])
        return vq.state_dict()

    states = in_ranks(len(sizes), work)
    for step in range(2):
        whole(vectors(1, 24, DIM, seed=step))
    for key, value in whole.state_dict().items():
        for state in states:
            torch.testing.assert_close(state[key], value, rtol=1e-5, atol=1e-6)


def test_ranks_agree_on_new_codes_where_one_of_them_has_no_vectors() -> None:
    ranks = [make(**LEARNED, threshold_ema_dead_code=10.0) for _ in range(2)]
    before = ranks[0].codebook.detach().clone()

    def work(reducer: Any) -> Tensor:
        vq = ranks[reducer.rank]
        vq.native.reducer = reducer
        for step in range(20):
            vq(vectors(1, 24, DIM, seed=step).split([24, 0], 1)[reducer.rank])
        return vq.codebook.detach().clone()

    first, second = in_ranks(2, work)
    assert torch.equal(first, second) and not torch.equal(first, before)


def test_the_peers_checkpoint_trains_on_here() -> None:
    kwargs = {"dim": DIM, "codebook_size": CODES, "codebook_dim": 4, **LEARNED}
    torch.manual_seed(0)
    models = there.VectorQuantize(**kwargs), here.VectorQuantize(**kwargs)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in models]

    def step(number: int, side: int) -> Tensor:
        optimizers[side].zero_grad()
        x = vectors(seed=number).requires_grad_()
        quantized, _, loss = models[side](x)
        total = (quantized - x).square().mean() + loss
        total.backward()
        optimizers[side].step()
        return total.detach()

    for number in range(3):
        step(number, 0)
    models[1].load_state_dict(copy.deepcopy(models[0].state_dict()))
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    start = {key: value.clone() for key, value in models[0].state_dict().items()}
    for number in range(3, 5):
        torch.testing.assert_close(step(number, 1), step(number, 0), rtol=1e-5, atol=1e-6)
    for key, value in models[0].state_dict().items():
        torch.testing.assert_close(models[1].state_dict()[key], value, rtol=1e-5, atol=1e-6)
    for key in ("_codebook.embed", "project_in.weight", "project_out.weight"):
        assert not torch.equal(models[1].state_dict()[key], start[key]), key


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.1)


@pytest.mark.parametrize("name", ["VectorQuantize", "ResidualVQ", "LatentQuantize"])
def test_the_memory_of_an_own_optimizer_survives_a_checkpoint(name: str) -> None:
    kwargs = {
        "VectorQuantize": {"dim": DIM, "codebook_size": CODES, **LEARNED},
        "ResidualVQ": {"dim": DIM, "codebook_size": CODES, "num_quantizers": 2, **LEARNED},
        "LatentQuantize": {"levels": [3, 4], "dim": 2},
    }[name]
    whole, resumed, forgets = (getattr(facade, name)(**kwargs, in_place_codebook_optimizer=adam) for _ in range(3))
    shape = (2, 2, 12) if name == "LatentQuantize" else (2, 12, DIM)
    for step in range(3):
        whole(vectors(*shape, seed=step))
    state = copy.deepcopy(whole.state_dict())
    extra = {key for key in state if "in_place_codebook_optimizer." in key}
    assert extra and all(isinstance(value, Tensor) for value in state.values())
    resumed.load_state_dict(state)
    forgets(vectors(*shape, seed=9))  # what it remembers goes with its codes
    forgets.load_state_dict({key: value for key, value in state.items() if key not in extra})
    for module in (whole, resumed, forgets):
        module(vectors(*shape, seed=3))
    after = whole.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in resumed.state_dict().items())
    assert not all(torch.equal(value, after[key]) for key, value in forgets.state_dict().items())
    if name != "LatentQuantize":  # where the library's fails in training
        there_made = getattr(peer, name)(**kwargs, in_place_codebook_optimizer=adam)
        with pytest.raises(RuntimeError, match=r"in_place_codebook_optimizer\.0\.exp_avg"):
            there_made.load_state_dict(after)
        there_made.load_state_dict(after, strict=False)


class Remembers(torch.optim.SGD):
    """With a memory of all kinds of things, which its steps go by."""

    def step(self, closure: Any = None) -> Any:
        (weight,) = self.param_groups[0]["params"]
        memory = self.state[weight]
        memory["seen"] = [*memory.get("seen", []), weight.grad.clone()][-2:]
        memory |= {"number": len(memory["seen"]), "name": "mean", "none": None, "warm": True, "by": {"size": 2.0}}
        weight.grad = sum(memory["seen"]) / memory["number"] / memory["by"]["size"]
        return super().step(closure)


def test_the_memory_of_an_own_optimizer_is_of_any_kind() -> None:
    whole, resumed = (make(**LEARNED, in_place_codebook_optimizer=lambda parameters: Remembers(parameters, lr=0.5)) for _ in range(2))
    for step in range(2):
        whole(vectors(seed=step))
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file))
    for vq in (whole, resumed):
        vq(vectors(seed=2))
    assert torch.equal(whole.codebook, resumed.codebook)
    memory = resumed.state_dict()["in_place_codebook_optimizer.0.seen"]
    assert len(memory) == 2 and memory[0] is not whole.state_dict()["in_place_codebook_optimizer.0.seen"][0]


def test_many_calls_that_accumulate_are_one_of_all_their_vectors() -> None:
    """More than are kept apart until a step takes them."""
    many, one_batch = make(), make()
    for step in range(70):
        many(vectors(seed=step), accum_ema_update=step < 69)
    one_batch(torch.cat([vectors(seed=step) for step in range(70)]))
    for name, value in many.state_dict().items():
        torch.testing.assert_close(one_batch.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    many(vectors())  # of which nothing is left for the next step
    one_batch(vectors())
    torch.testing.assert_close(one_batch.codebook, many.codebook, rtol=1e-4, atol=1e-5)


def test_what_calls_have_accumulated_survives_a_checkpoint() -> None:
    whole, resumed = make(), make(seed=1)
    for step in range(2):
        whole(vectors(seed=step), accum_ema_update=True)
    state = copy.deepcopy(whole.state_dict())
    assert "_codebook.pending.sum" in state
    resumed(vectors(seed=5), accum_ema_update=True)
    resumed.load_state_dict(state)
    for vq in (whole, resumed):
        vq(vectors(seed=2))
    one_batch = make()
    one_batch(torch.cat([vectors(seed=step) for step in range(3)]))
    for found in (resumed.state_dict(), one_batch.state_dict()):
        assert found.keys() == whole.state_dict().keys()
        for key, value in whole.state_dict().items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
    there.VectorQuantize(dim=DIM, codebook_size=CODES).load_state_dict(whole.state_dict())
    with pytest.raises(RuntimeError, match=r"_codebook.pending"):
        there.VectorQuantize(dim=DIM, codebook_size=CODES).load_state_dict(state)
    state["_codebook.pending.sum"] = torch.zeros(1, 2, 3)
    with pytest.raises(RuntimeError, match=r"_codebook.pending.sum has shape \(1, 2, 3\): must be \(1, 16, 8\)"):
        resumed.load_state_dict(state)


@pytest.mark.parametrize("index", [-2, CODES])
def test_indices_that_there_are_not_are_refused(index: int) -> None:
    vq = make()
    indices = torch.full((2, 12), index)
    calls = (
        lambda: vq.get_codes_from_indices(indices),
        lambda: vq.get_output_from_indices(indices),
        lambda: vq.update_ema_indices(vectors(), indices),
        lambda: vq(vectors(), indices=indices),
    )
    before = vq.codebook.clone()
    for call in calls:
        with pytest.raises(ValueError, match=f"holds {index}: must lie in -1 ... {CODES - 1}"):
            call()
    assert torch.equal(vq.codebook, before)


def test_a_vector_that_is_not_finite_has_no_code_and_enters_no_codebook() -> None:
    vq, masked = twins()
    x, mask = vectors(), torch.ones(2, 12, dtype=torch.bool)
    spoilt = x.clone()
    spoilt[0, 1, 2], spoilt[1, 3, 0], mask[0, 1], mask[1, 3] = torch.nan, torch.inf, False, False
    quantized, indices, loss = vq(spoilt)
    expected = masked(x, mask=mask)
    assert torch.equal(indices == -1, ~mask) and torch.equal(indices, expected[1])
    torch.testing.assert_close((quantized, loss), (expected[0], expected[2]))
    for key, value in masked.state_dict().items():
        torch.testing.assert_close(vq.state_dict()[key], value)


def test_at_most_64_dead_codes_a_step_start_anew_and_the_others_later() -> None:
    vq = make(codebook_size=150, threshold_ema_dead_code=0.5, **LEARNED)
    vq.codebook = torch.cat([torch.full((100, DIM), 1e3), vq.codebook[100:].detach()])
    last, numbers = vq.codebook.detach().clone(), []
    for step in range(8):
        vq(vectors(2, 500, DIM, seed=step))
        codes = vq.codebook.detach().clone()
        numbers.append(int((codes != last).any(-1).sum()))
        last = codes
    assert max(numbers) == 64 and sum(numbers) > 64
    assert (vq._codebook.cluster_size >= 0.5).all()
    crowded = make(codebook_size=150, threshold_ema_dead_code=10, **LEARNED)
    first = crowded.codebook.detach().clone()
    crowded.codebook = first + 1e3
    for step in range(8):  # new codes die at once: those that waited longest come first
        crowded(vectors(2, 100, DIM, seed=step))
    moved = (crowded.codebook - first - 1e3).abs().amax(-1) > 100
    assert int(moved.sum()) >= 149  # all but the one that was chosen before any died


@pytest.mark.parametrize("name", ["learnable_codebook", "straight_through", "directional_reparam"])
def test_ways_of_learning_work_alone(name: str) -> None:
    vq = make(**{name: True})
    x = vectors().requires_grad_()
    quantized, indices, loss = vq(x)
    (quantized.sin().sum() + loss).backward()
    assert x.grad is not None and x.grad.any() and (indices >= 0).all()
    learns = dict(vq.named_parameters())
    assert ("_codebook.embed" in learns) == (name != "straight_through")
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in learns.values())


def test_an_input_without_gradient_trains_the_projection() -> None:
    vq, other = twins(codebook_dim=4, commitment_weight=0.0)
    for made, x in ((vq, vectors()), (other, vectors().requires_grad_())):
        made(x)[0].sin().sum().backward()
    weight = vq.project_in.weight.grad
    assert weight is not None and weight.any()
    assert torch.equal(weight, other.project_in.weight.grad)


class Wrapped(nn.Module):
    """A layer around a layer, as tools make them."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner, self.added = inner, nn.Linear(inner.in_features, inner.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.added(x)


@pytest.mark.parametrize("name", ["VectorQuantize", "ResidualVQ"])
def test_projections_that_are_set_later_are_computed_with(name: str) -> None:
    options = {"num_quantizers": 2} if name == "ResidualVQ" else {}
    found = []
    for package in (peer, facade):
        torch.manual_seed(0)
        made = getattr(package, name)(dim=DIM, codebook_dim=4, codebook_size=CODES, rotation_trick=False, **options)
        if found:
            made.load_state_dict(found[0][2])
        state = copy.deepcopy(made.state_dict())
        torch.manual_seed(1)
        made.project_in, made.project_out = Wrapped(made.project_in), Wrapped(made.project_out)
        made = copy.deepcopy(made)
        out, _, loss = made(vectors().requires_grad_())
        (out.square().sum() + loss.sum()).backward()
        found.append((out, [parameter.grad for parameter in made.parameters()], state))
    (expected, gradients, _), (out, own, _) = found
    torch.testing.assert_close(out, expected)
    for one, other in zip(own, gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_quantizer_without_projections_takes_none() -> None:
    made = facade.VectorQuantize(dim=DIM, codebook_size=CODES)
    before = made.project_in
    with pytest.raises(ValueError, match=r"^project_in = Linear\(\.\.\.\): must stay an Identity"):
        made.project_in = nn.Linear(DIM, DIM)
    assert made.project_in is before and not list(made.parameters())


@pytest.mark.parametrize("kind", ["VectorQuantize", "ResidualVQ"])
def test_autocast_leaves_the_dtype_of_the_output(kind: str) -> None:
    sizes = {"dim": 8, "codebook_size": 16, "codebook_dim": 4} | ({"num_quantizers": 2} if kind == "ResidualVQ" else {})
    found = []
    for library in (peer, facade):
        module = getattr(library, kind)(**sizes)
        with torch.autocast("cpu", torch.bfloat16):
            output, indices = module(torch.randn(2, 5, 8))[:2]
            found.append((output.dtype, module.get_output_from_indices(indices).dtype))
    assert found == [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)]


def test_a_vector_without_a_norm_reaches_no_gradient() -> None:
    quantizer = make(codebook_dim=4, layernorm_after_project_in=True)
    layer = quantizer.project_in[0]
    with torch.no_grad():
        layer.weight.copy_(torch.eye(4, DIM) * torch.tensor([[0.9], [-0.9], [0.9], [-0.9]]))
    x = torch.randn(2, 5, DIM)
    x[0, 1] = 3e38
    found, expected = x.clone().requires_grad_(), x[1:].clone().requires_grad_()
    quantized, indices, _ = quantizer(found, freeze_codebook=True)
    assert indices[0, 1] == -1 and (indices >= 0).sum() == 9
    quantized.sin().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in quantizer.parameters() if parameter.grad is not None)
    quantizer(expected, freeze_codebook=True)[0].sin().sum().backward()
    torch.testing.assert_close(found.grad[1:], expected.grad)
    assert not found.grad[0, 1].any()
