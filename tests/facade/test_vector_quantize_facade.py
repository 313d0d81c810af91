"""The facade's VectorQuantize beside the peer's: every option and every pair of options that can stand together."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import vqkit.ops.codebook
import vqkit.ops.coding
import vqkit.ops.kmeans
import vqkit.quantizers.vector_quantize as native
from facade.compare import compare
from facade.covering import covering_array
from facade.peer import facade_module, peer
from thread_ranks import in_ranks

DIM, CODES = 8, 16
there, here = peer.vector_quantize_pytorch, facade_module("vector_quantize_pytorch")

MAKING: dict[str, tuple[Any, ...]] = {
    "codebook_dim": (None, 4),
    "heads": (1, 2),
    "separate_codebook_per_head": (False, True),
    "decay": (0.8, 0.5),
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
    "sync_affine_param": (False,),
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


def resolved(row: dict[str, Any]) -> dict[str, Any]:
    """What the options of a row come to."""
    directional, bridged = row["directional_reparam"], row["vq_bridge"] is not None
    learnable = row["learnable_codebook"] if row["learnable_codebook"] is not None else directional or bridged
    ema = row["ema_update"] if row["ema_update"] is not None else not directional and not bridged
    width = (row["codebook_dim"] or DIM) * row["heads"]
    commits = row["commitment_weight"] > 0 and not directional
    return {
        "learnable": learnable,
        "ema": ema,
        "follows": (ema if row["call_ema_update"] is None else row["call_ema_update"]) and not row["manual_ema_update"],
        "rotates": row["rotation_trick"] if row["rotation_trick"] is not None else not directional,
        "projected": width != DIM,
        "image": row["accept_image_fmap"] or row["accept_3d_fmap"],
        "masked": bool(row["mask"] or row["lens"]),
        "learned": learnable or row["orthogonal_reg_weight"] > 0,
        "by_choice": commits and row["commitment_use_cross_entropy_loss"],
        "commits": commits,
        "frozen": row["freeze_codebook"] if row["call_freeze"] is None else row["call_freeze"],
        "bridged": bridged,
    }


def stands_together(row: dict[str, Any]) -> bool:
    """What the peer takes, in rules; what it takes in no call does not count."""
    on = resolved(row)
    refused = [
        row["layernorm_after_project_in"] and not on["projected"],
        row["separate_codebook_per_head"] and row["heads"] == 1,
        sum(bool(way) for way in (row["straight_through"], on["rotates"], row["directional_reparam"])) > 1,
        row["use_cosine_sim"] and (on["learnable"] or row["affine_param"]),
        on["learnable"] and (on["ema"] or row["straight_through"]),
        on["bridged"] and not on["learnable"],
        row["directional_reparam"] and not row["threshold_ema_dead_code"],
        row["sync_update_v"] and not on["learnable"],
        row["accept_image_fmap"] and row["accept_3d_fmap"],
        on["image"] and (on["masked"] or not row["channel_last"] or row["one_each"] or row["indices"]),
        row["lens"] and not row["channel_last"],
        row["mask"] and row["lens"],
        on["masked"] and row["one_each"],
        row["in_place_codebook_optimizer"] and not on["learned"],
        row["topk"] and (row["heads"] > 1 or row["indices"] or row["in_place_codebook_optimizer"] or row["codebook_transform_fn"]),
        row["topk"] and (row["commitment_use_cross_entropy_loss"] or row["straight_through"]),
        row["orthogonal_reg_active_codes_only"] and row["separate_codebook_per_head"],
        row["codebook_transform_fn"] and row["heads"] > 1,
        on["by_choice"] and (on["image"] or row["one_each"]),
        on["masked"] and (on["projected"] or row["heads"] > 1) and on["commits"] and not on["by_choice"] and not row["topk"],
    ]
    return not any(refused)


def is_alike(row: dict[str, Any]) -> bool:
    """What is the same here but for the parts that the table of deviations names; the other deviations are compared one by one below."""
    on, expires = resolved(row), row["threshold_ema_dead_code"] > 0
    by_scores = on["by_choice"] or row["indices"] or row["codebook_diversity_loss_weight"] > 0
    elsewhere = [
        row["sync_update_v"],
        row["codebook_diversity_loss_weight"] > 0 and (not row["one_each"] or row["heads"] > 1 or row["codebook_transform_fn"]),
        by_scores and (on["follows"] or expires) and not on["frozen"] and not row["topk"],
        row["codebook_diversity_loss_weight"] > 0 and row["codebook_diversity_temperature"] > 1,
        row["orthogonal_reg_weight"] > 0 and (on["follows"] or expires or row["use_cosine_sim"]),
        row["orthogonal_reg_weight"] > 0 and (on["bridged"] or row["affine_param"]),
        row["orthogonal_reg_active_codes_only"] and on["masked"],
        on["bridged"] and (row["kmeans_init"] or expires or row["affine_param"]),
        row["kmeans_init"] and (on["frozen"] or expires),
        on["masked"] and row["use_cosine_sim"] and not row["topk"],
        on["masked"] and row["indices"],
        row["in_place_codebook_optimizer"] and (on["ema"] or expires or row["affine_param"] or row["codebook_transform_fn"]),
        row["in_place_codebook_optimizer"] and (row["straight_through"] or row["call_ema_update"]),
        on["frozen"] and on["learned"] and row["directional_reparam"],
        on["frozen"] and on["learned"] and (by_scores or row["orthogonal_reg_weight"] > 0 or not row["route_gradients_to_input"]),
        row["affine_param"] and (on["frozen"] or row["accum_ema_update"] or row["topk"]),
        on["learned"] and on["follows"],
        row["kmeans_init"] and by_scores,
        row["in_place_codebook_optimizer"] and row["return_loss_breakdown"],
        row["affine_param"] and expires,
    ]
    return stands_together(row) and not any(elsewhere)


ROWS = covering_array(MAKING | CALLING, is_alike)


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


def making(row: dict[str, Any]) -> dict[str, Any]:
    kwargs = {"dim": DIM, "codebook_size": CODES, **{name: row[name] for name in MAKING}}
    if kwargs["vq_bridge"]:
        kwargs["vq_bridge"] = Bridge()
    if kwargs["in_place_codebook_optimizer"]:
        kwargs["in_place_codebook_optimizer"] = sgd
    return kwargs


def calling(row: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """The input and the arguments of the call."""
    if row["one_each"]:
        x, shape = vectors(24, DIM), (24,)
    elif row["accept_image_fmap"]:
        x, shape = vectors(2, DIM, 3, 4), (2, 3, 4)
    elif row["accept_3d_fmap"]:
        x, shape = vectors(2, DIM, 3, 2, 2), (2, 3, 2, 2)
    else:
        x, shape = vectors() if row["channel_last"] else vectors().transpose(1, 2), (2, 12)
    calls = {name: row[name] for name in CALLING if not name.startswith("call_") and name != "one_each" and row[name]}
    names = {"call_temperature": "sample_codebook_temp", "call_freeze": "freeze_codebook", "call_ema_update": "ema_update"}
    calls |= {names[name]: row[name] for name in names if row[name] is not None}
    heads = (row["heads"],) if row["heads"] > 1 else ()
    if row["indices"]:
        shape = (24, 1) if row["one_each"] else shape
        calls["indices"] = torch.randint(-1, CODES, (*shape, *heads), generator=torch.Generator().manual_seed(3))
    if row["mask"]:
        calls["mask"] = some(2, 12)
    if row["lens"]:
        calls["lens"] = torch.tensor([12, 7])
    if row["codebook_transform_fn"]:
        batch = (24, 1) if row["one_each"] else (2, 12)
        width = row["codebook_dim"] or DIM
        offset = vectors(*batch, 1, width, seed=5)
        calls["codebook_transform_fn"] = lambda codes: codes[:, None, None] * 1.1 + 0.3 * offset
    if row["ema_update_weight"]:
        weight = torch.linspace(0.1, 1.0, CODES)
        weight = weight.expand(2, -1) if row["separate_codebook_per_head"] else weight
        calls["ema_update_weight"] = weight if row["ema_update_weight"] == "tensor" else lambda total, count: 1 / (1 + count)
    return x, calls


# Draws that both can make alike: of what is drawn by content, not by place


@pytest.fixture
def same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = -(-torch.rand(CODES, generator=torch.Generator().manual_seed(1)).clamp(1e-6).log()).log()

    def in_order(rows: Tensor) -> Tensor:
        """Rows [N, K] in an order of their own."""
        return rows[rows.double().matmul(torch.linspace(1.0, 2.0, rows.shape[-1], dtype=torch.float64)).argsort()]

    def peers_sample(samples: Tensor, num: int) -> Tensor:
        return torch.stack([in_order(own)[torch.linspace(0, len(own) - 1, num).long()] for own in samples])

    def kmeans_start(start: Any, metric: str, sample: Tensor, present: Tensor, num: int, generator: Any) -> Tensor:
        return torch.stack([peers_sample(own[is_there][None], num)[0] for own, is_there in zip(sample, present, strict=True)])

    def candidates(x: Tensor, dropped: Tensor, num: int) -> tuple[Tensor, Tensor]:
        rows, keys = x.new_zeros(len(x), num, x.shape[-1]), x.new_zeros(len(x), num)
        for head, (own, lost) in enumerate(zip(x, dropped, strict=True)):
            kept = in_order(own[~lost])[:num]
            rows[head, : len(kept)], keys[head, : len(kept)] = kept, 1.0
        return rows, keys

    def first_of_order(samples: Tensor, num: int) -> Tensor:
        return torch.stack([in_order(own)[:num] for own in samples])

    def sample_indices(x: Tensor, codes: Tensor, num: int = 1, *, temperature: float, metric: str) -> Tensor:
        scores = (x @ codes.mT if metric == "cosine" else -torch.cdist(x, codes)) / temperature + noise
        return scores.topk(num, -1).indices

    init = there.Codebook.__init__

    def peers_init(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.replace_sample_fn = there.batched_sample_vectors  # the number of dead codes decides nothing else
        self.sample_fn = peers_sample

    monkeypatch.setattr(there, "gumbel_noise", lambda t: noise.expand(t.shape))
    monkeypatch.setattr(there, "batched_sample_vectors", first_of_order)
    monkeypatch.setattr(there.Codebook, "__init__", peers_init)
    monkeypatch.setattr(native, "sample_indices", sample_indices)
    monkeypatch.setattr(native, "orthogonality_loss", _first_codes(native.orthogonality_loss))
    monkeypatch.setattr(vqkit.ops.kmeans, "_start", kmeans_start)
    for module in (vqkit.ops.codebook, vqkit.ops.coding):
        monkeypatch.setattr(module, "draw_candidates", candidates)
    monkeypatch.setattr(torch, "randn_like", lambda t, **_: torch.linspace(-1.0, 1.5, t.shape[-1]).to(t).expand(t.shape))
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.arange(n))


def _first_codes(loss: Any) -> Any:
    def of_the_first(codes: Tensor, active: Tensor | None = None, *, max_codes: int | None = None, noise: Any = None) -> Tensor:
        return loss(codes, active, max_codes=max_codes, noise=torch.linspace(0.9, 0.1, codes.shape[-2]).expand(codes.shape[:-1]))

    return of_the_first


def told(row: dict[str, Any]) -> str:
    usual = {name: values[0] for name, values in (MAKING | CALLING).items()}
    return ",".join(f"{name}={value}" for name, value in row.items() if value != usual[name]) or "defaults"


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_every_pair_of_options_is_the_peers(row: dict[str, Any], same_draws: None) -> None:
    x, calls = calling(row)
    eval_calls = {name: value for name, value in calls.items() if name != "indices"}
    compare("VectorQuantize", making(row), x, calls=calls, eval_calls=eval_calls).check()


NO_EMA = {"ema_update": False}
LEARNED = {"learnable_codebook": True, **NO_EMA}
TARGETS = torch.randint(0, CODES, (2, 12), generator=torch.Generator().manual_seed(3))
ACTIVE = {"orthogonal_reg_weight": 0.5, "orthogonal_reg_active_codes_only": True}
FROZEN = {"freeze_codebook": True, **LEARNED}
DEVIATING: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"commitment_use_cross_entropy_loss": True}, {}),
    ({}, {"indices": TARGETS}),
    ({"codebook_diversity_loss_weight": 0.1, "codebook_diversity_temperature": 1.0}, {}),
    ({"orthogonal_reg_weight": 0.5}, {}),
    ({**LEARNED, "sync_update_v": 0.5}, {}),
    ({"use_cosine_sim": True}, {"mask": some(2, 12)}),
    (NO_EMA, {"indices": TARGETS, "mask": some(2, 12)}),
    ({**ACTIVE, **NO_EMA}, {"mask": some(2, 12)}),
    ({"kmeans_init": True, "freeze_codebook": True}, {}),
    ({"kmeans_init": True, "threshold_ema_dead_code": 0.85}, {}),
    ({**LEARNED, "in_place_codebook_optimizer": sgd, "threshold_ema_dead_code": 0.85}, {}),
    ({**FROZEN, "commitment_use_cross_entropy_loss": True}, {}),
    ({**FROZEN, "route_gradients_to_input": False}, {}),
    ({**FROZEN, "orthogonal_reg_weight": 0.5}, {}),
    ({"vq_bridge": Bridge(), "threshold_ema_dead_code": 0.85}, {}),
    ({"vq_bridge": Bridge(), "kmeans_init": True}, {}),
    ({"vq_bridge": Bridge(), "affine_param": True}, {}),
    ({"vq_bridge": Bridge(), "orthogonal_reg_weight": 0.5}, {}),
    ({"affine_param": True, "threshold_ema_dead_code": 0.85}, {}),
    ({"affine_param": True}, {"topk": 3}),
    ({"affine_param": True}, {"accum_ema_update": True}),
    (LEARNED, {"ema_update": True}),
    ({}, {"lens": torch.tensor([12, 7])}),
    ({"heads": 2}, {}),
    ({"vq_bridge": Bridge()}, {}),
]


@pytest.mark.parametrize("kwargs, calls", DEVIATING, ids=range(len(DEVIATING)))
def test_what_deviates_stands_in_the_table(kwargs: dict[str, Any], calls: dict[str, Any], same_draws: None) -> None:
    eval_calls = {name: value for name, value in calls.items() if name != "indices"}
    found = compare("VectorQuantize", {"dim": DIM, "codebook_size": CODES, **kwargs}, vectors(), calls=calls, eval_calls=eval_calls)
    found.check()
    assert any(worst > 1e-5 for worst in found.worst.values()), "it is the peer's: no case for the table"


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


@pytest.mark.parametrize("kwargs", [{"heads": 2}, {"heads": 2, "codebook_dim": 4, "accept_image_fmap": True}, {"vq_bridge": Bridge()}])
def test_decoding_gives_what_a_call_gave(kwargs: dict[str, Any]) -> None:
    vq = make(**kwargs).eval()
    x = vectors(2, DIM, 3, 4) if "accept_image_fmap" in kwargs else vectors()
    quantized, indices, _ = vq(x)
    torch.testing.assert_close(vq.get_output_from_indices(indices), quantized)


@pytest.mark.parametrize("calls", [{}, {"indices": TARGETS}])
def test_losses_by_scores_have_the_gradient_of_the_codes_they_saw(calls: dict[str, Any]) -> None:
    learns, stands = twins(commitment_use_cross_entropy_loss=True)
    x = vectors().requires_grad_()
    found = [vq(x, freeze_codebook=frozen, **calls)[1 if calls else 2] for vq, frozen in ((learns, False), (stands, True))]
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
    with pytest.raises(ValueError, match="k-means start"):
        vq(vectors(), **({} if calls == "eval" else calls))
    vq.train()(vectors())
    assert vq._codebook.initted
    vq.eval()(vectors())


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


def test_the_counts_are_those_of_the_codes_that_an_optimizer_left() -> None:
    vq = make(**LEARNED, in_place_codebook_optimizer=sgd, threshold_ema_dead_code=1e-3)
    before = vq._codebook.cluster_size.clone()
    indices = vq(vectors())[1]
    torch.testing.assert_close(vq._codebook.cluster_size, 0.8 * before + 0.2 * torch.bincount(indices.flatten(), minlength=CODES))


@pytest.mark.parametrize(
    "kwargs", [{"commitment_use_cross_entropy_loss": True}, {"route_gradients_to_input": False}, {"orthogonal_reg_weight": 0.5}]
)
def test_frozen_is_frozen(kwargs: dict[str, Any]) -> None:
    vq = make(**FROZEN, **kwargs)
    before = {key: value.clone() for key, value in vq.state_dict().items()}
    quantized, _, loss = vq(vectors().requires_grad_())
    (quantized.sum() + loss).backward()
    assert all(parameter.grad is None for parameter in vq._codebook.parameters())
    assert all(torch.equal(value, before[key]) for key, value in vq.state_dict().items())


@pytest.mark.parametrize("kwargs", [{"threshold_ema_dead_code": 1}, {"kmeans_init": True}, {"affine_param": True}])
def test_what_would_set_codes_behind_a_bridge_is_refused(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="transform"):
        make(vq_bridge=Bridge(), **kwargs)


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


@pytest.mark.parametrize("calls", [{"topk": 3}, {"accum_ema_update": True}])
def test_calls_that_step_nothing_do_not_move_affine_codes(calls: dict[str, Any]) -> None:
    vq = make(affine_param=True)
    before = {key: value.clone() for key, value in vq.state_dict().items()}
    vq(vectors(), **calls)
    assert all(torch.equal(value, before[key]) for key, value in vq.state_dict().items())


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
