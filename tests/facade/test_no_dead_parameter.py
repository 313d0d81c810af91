"""Every argument of every class of the facade does something: flipped from a base setting, it gives another result, or an error."""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from facade.peer import facade
from facade.test_contract import MODULES, NOT_YET, SMALL

WIDTH = 8


def vectors(*shape: int) -> Tensor:
    return 1.5 * torch.randn(*(shape or (2, 12, WIDTH)), generator=torch.Generator().manual_seed(0))


class Flip(NamedTuple):
    """`name` of the constructor, or "call.NAME", set to `value`; `given` are other arguments, with and without."""

    value: Any
    given: dict[str, Any] = {}  # noqa: RUF012
    x: Tensor | None = None


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def twice(codes: Tensor) -> Tensor:
    return 2 * codes


def twice_everywhere(codes: Tensor) -> Tensor:
    """[H, C, K] -> [H, B, N, C, K]."""
    return 2 * codes[:, None, None].expand(-1, 2, 12, -1, -1)


MASK = torch.arange(12).expand(2, 12) % 3 > 0
IMAGE = vectors(2, WIDTH, 3, 4)
LEARNABLE = {"learnable_codebook": True, "ema_update": False}
NO_ESTIMATOR = {"route_gradients_to_input": False, "rotation_trick": False}
DROPOUT = {"quantize_dropout": True, "call.rand_quantize_dropout_fixed_seed": 1}
ORTHOGONAL = {"orthogonal_reg_weight": 0.5, **LEARNABLE}

FLIPS: dict[str, dict[str, Flip]] = {
    "VectorQuantize": {
        "dim": Flip(6),
        "codebook_size": Flip(8),
        "codebook_dim": Flip(4),
        "heads": Flip(2, {"codebook_dim": 4}),
        "separate_codebook_per_head": Flip(True, {"heads": 2, "codebook_dim": 4}),
        "decay": Flip(0.5),
        "eps": Flip(0.1),
        "freeze_codebook": Flip(True),
        "kmeans_init": Flip(True),
        "kmeans_iters": Flip(1, {"kmeans_init": True, "codebook_size": 4}),
        "use_cosine_sim": Flip(True),
        "layernorm_after_project_in": Flip(True, {"codebook_dim": 4}),
        "threshold_ema_dead_code": Flip(2),
        "channel_last": Flip(False),
        "accept_image_fmap": Flip(True),
        "accept_3d_fmap": Flip(True),
        "commitment_weight": Flip(0.5),
        "commitment_use_cross_entropy_loss": Flip(True),
        "orthogonal_reg_weight": Flip(0.5, LEARNABLE),
        "orthogonal_reg_active_codes_only": Flip(True, ORTHOGONAL),
        "orthogonal_reg_max_codes": Flip(4, ORTHOGONAL),
        "codebook_diversity_loss_weight": Flip(0.5),
        "codebook_diversity_temperature": Flip(10.0, {"codebook_diversity_loss_weight": 0.5}),
        "stochastic_sample_codes": Flip(True),
        "sample_codebook_temp": Flip(0.05, {"stochastic_sample_codes": True}),
        "straight_through": Flip(True, NO_ESTIMATOR),
        "rotation_trick": Flip(False),
        "directional_reparam": Flip(True),
        "directional_reparam_variance": Flip(0.5, {"directional_reparam": True}),
        "ema_update": Flip(False),
        "vq_bridge": Flip(nn.Linear(WIDTH, WIDTH)),
        "manual_ema_update": Flip(True),
        "learnable_codebook": Flip(True, {"ema_update": False}),
        "in_place_codebook_optimizer": Flip(sgd, LEARNABLE),
        "manual_in_place_optimizer_update": Flip(True, {**LEARNABLE, "in_place_codebook_optimizer": sgd}),
        "affine_param": Flip(True),
        "affine_param_batch_decay": Flip(0.1, {"affine_param": True}),
        "affine_param_codebook_decay": Flip(0.1, {"affine_param": True}),
        "sync_update_v": Flip(0.5, LEARNABLE),
        "return_zeros_for_masked_padding": Flip(False, {"call.mask": MASK}),
        "route_gradients_to_input": Flip(False),
        "reinmax": Flip(True, NO_ESTIMATOR),
        "call.indices": Flip(torch.ones(2, 12, dtype=torch.int64)),
        "call.mask": Flip(MASK),
        "call.lens": Flip(torch.tensor([5, 12])),
        "call.topk": Flip(2),
        "call.sample_codebook_temp": Flip(0.05, {"stochastic_sample_codes": True}),
        "call.freeze_codebook": Flip(True),
        "call.return_loss_breakdown": Flip(True),
        "call.codebook_transform_fn": Flip(twice_everywhere),
        "call.ema_update_weight": Flip(torch.full((16,), 0.5)),
        "call.accum_ema_update": Flip(True),
        "call.ema_update": Flip(False),
    },
    "ResidualVQ": {
        "dim": Flip(6),
        "num_quantizers": Flip(3),
        "codebook_size": Flip(8),
        "codebook_dim": Flip(4),
        "shared_codebook": Flip(True),
        "diveq": Flip(True),
        "heads": Flip(2),
        "quantize_dropout": Flip(True, {"call.rand_quantize_dropout_fixed_seed": 1}),
        "quantize_dropout_cutoff_index": Flip(1, DROPOUT),
        "quantize_dropout_multiple_of": Flip(2, DROPOUT),
        "accept_image_fmap": Flip(True),
        "implicit_neural_codebook": Flip(True),
        "mlp_kwargs": Flip({"depth": 1}, {"implicit_neural_codebook": True}),
        "beam_size": Flip(4),
        "eval_beam_size": Flip(1, {"beam_size": 4}),
        "beam_score_quantizer_weights": Flip([1.0, 0.001], {"beam_size": 4}),
        "quant_grad_frac": Flip(0.5),
        "return_zeros_for_masked_padding": Flip(False, {"call.mask": MASK}),
        "call.mask": Flip(MASK),
        "call.indices": Flip(torch.ones(2, 12, 2, dtype=torch.int64)),
        "call.return_all_codes": Flip(True),
        "call.sample_codebook_temp": Flip(0.05, {"stochastic_sample_codes": True}),
        "call.freeze_codebook": Flip(True),
        "call.beam_size": Flip(4),
        "call.rand_quantize_dropout_fixed_seed": Flip(1, {"quantize_dropout": True, "call.rand_quantize_dropout_fixed_seed": 0}),
    },
    "GroupedResidualVQ": {
        "dim": Flip(6),
        "groups": Flip(4),
        "accept_image_fmap": Flip(True),
        "call.indices": Flip(torch.ones(2, 2, 12, 2, dtype=torch.int64)),
        "call.return_all_codes": Flip(True),
        "call.sample_codebook_temp": Flip(0.05, {"stochastic_sample_codes": True}),
        "call.freeze_codebook": Flip(True),
        "call.mask": Flip(MASK),
    },
    "RandomProjectionQuantizer": {
        "dim": Flip(6),
        "codebook_size": Flip(8),
        "codebook_dim": Flip(3),
        "num_codebooks": Flip(1),
        "norm": Flip(False),
        "call.indices": Flip(torch.ones(2, 12, 2, dtype=torch.int64)),
    },
    "FSQ": {
        "levels": Flip([5, 4]),
        "dim": Flip(4, x=vectors(2, 12, 2)),
        "num_codebooks": Flip(2, {"dim": 2}),
        "keep_num_codebooks_dim": Flip(True),
        "scale": Flip(2.0),
        "channel_first": Flip(True),
        "projection_has_bias": Flip(False, {"dim": 4}, vectors(2, 12, 4)),
        "return_indices": Flip(False),
        "preserve_symmetry": Flip(True),
        "noise_dropout": Flip(0.5),
        "bound_hard_clamp": Flip(True),
        "orthogonal_rotation": Flip(True),
    },
    "FSP": {
        "levels": Flip([5, 4]),
        "dim": Flip(4, x=vectors(2, 12, 2)),
        "channel_first": Flip(True),
        "projection_has_bias": Flip(False, {"dim": 4}, vectors(2, 12, 4)),
        "act_name": Flip("sigmoid"),
        "quantize_rate": Flip(1.0),
        "need_inv_act": Flip(True),
        "vector_norm": Flip("none"),
        "call.eps": Flip(0.5),
    },
    "LFQ": {
        "dim": Flip(6),
        "codebook_size": Flip(8),
        "entropy_loss_weight": Flip(0.5),
        "commitment_loss_weight": Flip(0.5),
        "diversity_gamma": Flip(0.5),
        "straight_through_activation": Flip(nn.Tanh()),
        "num_codebooks": Flip(2),
        "keep_num_codebooks_dim": Flip(True),
        "codebook_scale": Flip(2.0),
        "frac_per_sample_entropy": Flip(0.25),
        "has_projections": Flip(False),
        "projection_has_bias": Flip(False),
        "soft_clamp_input_value": Flip(0.5),
        "cosine_sim_project_in": Flip(True),
        "cosine_sim_project_in_scale": Flip(2.0, {"cosine_sim_project_in": True}),
        "channel_first": Flip(True),
        "experimental_softplus_entropy_loss": Flip(True),
        "entropy_loss_offset": Flip(1.0, {"experimental_softplus_entropy_loss": True}),
        "spherical": Flip(True),
        "orthogonal_rotation": Flip(True, {"dim": 4}, vectors(2, 12, 4)),
        "call.inv_temperature": Flip(1.0),
        "call.return_loss_breakdown": Flip(True),
        "call.mask": Flip(MASK),
    },
    "ResidualLFQ": {
        "dim": Flip(6),
        "num_quantizers": Flip(3),
        "codebook_size": Flip(8),
        "quantize_dropout": Flip(True, {"call.rand_quantize_dropout_fixed_seed": 1}),
        "quantize_dropout_cutoff_index": Flip(1, DROPOUT),
        "quantize_dropout_multiple_of": Flip(2, DROPOUT),
        "soft_clamp_input_value": Flip(0.5),
        "call.mask": Flip(MASK),
        "call.return_all_codes": Flip(True),
        "call.rand_quantize_dropout_fixed_seed": Flip(1, {"quantize_dropout": True, "call.rand_quantize_dropout_fixed_seed": 0}),
    },
    "GroupedResidualLFQ": {
        "dim": Flip(6),
        "groups": Flip(4),
        "accept_image_fmap": Flip(True),
        "call.mask": Flip(MASK),
        "call.return_all_codes": Flip(True),
    },
    "ResidualFSQ": {
        "levels": Flip([5, 4]),
        "num_quantizers": Flip(3),
        "dim": Flip(6),
        "is_channel_first": Flip(True),
        "quantize_dropout": Flip(True, {"call.rand_quantize_dropout_fixed_seed": 1}),
        "quantize_dropout_cutoff_index": Flip(1, DROPOUT),
        "quantize_dropout_multiple_of": Flip(2, DROPOUT),
        "soft_clamp_input_value": Flip(0.5),
        "bound_hard_clamp": Flip(False),
        "call.return_all_codes": Flip(True),
        "call.rand_quantize_dropout_fixed_seed": Flip(1, {"quantize_dropout": True, "call.rand_quantize_dropout_fixed_seed": 0}),
    },
    "GroupedResidualFSQ": {
        "dim": Flip(6),
        "groups": Flip(4),
        "accept_image_fmap": Flip(True),
        "call.return_all_codes": Flip(True),
    },
    "LatentQuantize": {
        "levels": Flip([5, 4]),
        "dim": Flip(6),
        "commitment_loss_weight": Flip(0.5),
        "quantization_loss_weight": Flip(0.5),
        "num_codebooks": Flip(2),
        "codebook_dim": Flip(3),
        "keep_num_codebooks_dim": Flip(True),
        "optimize_values": Flip(False),
        "in_place_codebook_optimizer": Flip(sgd),
    },
    "SimVQ": {
        "dim": Flip(6),
        "codebook_size": Flip(8),
        "codebook_transform": Flip(nn.Linear(WIDTH, WIDTH)),
        "init_fn": Flip(twice),
        "channel_first": Flip(True),
        "rotation_trick": Flip(False),
        "input_to_quantize_commit_loss_weight": Flip(0.5),
        "commitment_weight": Flip(0.5),
        "frozen_codebook_dim": Flip(4),
    },
    "ResidualSimVQ": {
        "dim": Flip(6),
        "num_quantizers": Flip(3),
        "codebook_size": Flip(8),
        "heads": Flip(2),
        "quantize_dropout": Flip(True, {"call.rand_quantize_dropout_fixed_seed": 1}),
        "quantize_dropout_cutoff_index": Flip(1, DROPOUT),
        "quantize_dropout_multiple_of": Flip(2, DROPOUT),
        "channel_first": Flip(True),
        "rotation_trick": Flip(False),
        "call.return_all_codes": Flip(True),
        "call.rand_quantize_dropout_fixed_seed": Flip(1, {"quantize_dropout": True, "call.rand_quantize_dropout_fixed_seed": 0}),
    },
    "BinaryMapper": {
        "bits": Flip(4),
        "kl_loss_threshold": Flip(0.1),
        "deterministic_on_eval": Flip(True),
        "call.temperature": Flip(0.1),
        "call.straight_through": Flip(False),
        "call.calc_aux_loss": Flip(False),
        "call.deterministic": Flip(True),
        "call.return_indices": Flip(True),
        "call.reduce_aux_kl_loss": Flip(False),
    },
    "EvoLFQ": {
        "encoder": Flip(nn.Linear(WIDTH, 4)),
        "decoder": Flip(nn.Linear(4, WIDTH)),
        "lfq": Flip(facade.LFQ(dim=4, codebook_scale=2.0)),
        "dim": Flip(6),
        "codebook_size": Flip(8),
        "num_codebooks": Flip(2, {"codebook_size": 4}),
        "pop_size": Flip(9),
        "mutation_rate": Flip(0.5),
        "tournament_size": Flip(4),
        "elitism_count": Flip(3),
        "generations": Flip(2),
    },
    "HierarchicalVQ": {
        "dim": Flip(6),
        "codebook_size": Flip(8),
        "scales": Flip((1, 3)),
        "shared_codebook": Flip(False),
        "channel_first": Flip(False),
        "decay": Flip(0.5),
        "commitment_weight": Flip(0.5),
        "rotation_trick": Flip(True),
        "kmeans_init": Flip(False),
        "kmeans_iters": Flip(1, {"codebook_size": 3}, vectors(8, WIDTH, 40)),
        "threshold_ema_dead_code": Flip(0),
        "stochastic_sample_codes": Flip(True),
        "sample_codebook_temp": Flip(10.0, {"stochastic_sample_codes": True}),
        "orthogonal_reg_weight": Flip(0.5),
        "orthogonal_reg_max_codes": Flip(4, {"orthogonal_reg_weight": 0.5}),
        "orthogonal_reg_active_codes_only": Flip(True, {"orthogonal_reg_weight": 0.5}),
        "quant_resi": Flip(0.1),
        "share_quant_resi": Flip(2),
        "nested_dropout": Flip(1.0),
        "nested_dropout_min_levels": Flip(2, {"nested_dropout": 1.0}),
        "accept_image_fmap": Flip(True),
        "accept_3d_fmap": Flip(True),
        "call.indices": Flip([torch.ones(2, 1, dtype=torch.int64), torch.ones(2, 2, dtype=torch.int64)]),
        "call.mask": Flip(MASK),
        "call.lens": Flip(torch.tensor([5, 12])),
        "call.sample_codebook_temp": Flip(10.0, {"stochastic_sample_codes": True}),
        "call.return_cutoff": Flip(True, {"nested_dropout": 1.0}),
    },
}
"""By class and argument; a name of a call is "call.NAME". What is not named there stands in ALONE."""

INPUTS: dict[str, Tensor] = {
    "FSQ": vectors(2, 12, 2),
    "FSP": vectors(2, 12, 2),
    "LatentQuantize": IMAGE,
    "GroupedResidualVQ": vectors(),
    "BinaryMapper": vectors(2, 12, 3),
    "HierarchicalVQ": vectors(2, WIDTH, 12),
}

ALONE: dict[str, dict[str, str]] = {
    "VectorQuantize": {
        "sync_kmeans": "one codebook for all processes, always",
        "sync_codebook": "what each of several processes learns from",
        "sync_affine_param": "one codebook for all processes, always",
    },
    "FSQ": dict.fromkeys(("allowed_dtypes", "force_quantization_f32"), "arithmetic is in float32 or wider, always"),
    "LFQ": {"force_quantization_f32": "arithmetic is in float32 or wider, always"},
    "HierarchicalVQ": {"sync_codebook": "what each of several processes learns from"},
}
"""Arguments that one process and one call cannot tell, and why."""

KINDS = [name for name in SMALL if getattr(getattr(facade, name, None), "__module__", "").startswith("vqkit")] if MODULES else []
CASES = [(kind, name) for kind in KINDS for name in FLIPS.get(kind, {})]


def leaves(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value.detach().clone()
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from leaves(part, f"{path}.{key}")
    elif isinstance(value, (tuple, list)):
        for number, part in enumerate(value):
            yield from leaves(part, f"{path}.{number}")
    else:
        yield f"{path}.{type(value).__name__}", torch.as_tensor(value if isinstance(value, (bool, int, float)) else 0)


def behaviour(kind: str, arguments: dict[str, Any], x: Tensor) -> dict[str, Tensor] | Exception:
    """All that can be seen of two steps of training and a call in eval mode; the error, if there is one."""
    arguments = copy.deepcopy(arguments)
    calls = {name.removeprefix("call."): value for name, value in arguments.items() if name.startswith("call.")}
    found: dict[str, Tensor] = {}
    torch.manual_seed(0)
    random.seed(0)
    try:
        module = getattr(facade, kind)(**{name: value for name, value in arguments.items() if not name.startswith("call.")})
        for step in range(2):
            given = (x * (1 + 0.2 * step)).requires_grad_()
            output = module(given, **calls)
            own = dict(leaves(output, f"train.{step}"))
            differentiable = [part.sin().sum() for part in flatten(output) if part.requires_grad]
            module.zero_grad()
            if differentiable:
                torch.stack([part.float() for part in differentiable]).sum().backward()
            own[f"gradient.{step}"] = torch.zeros(()) if given.grad is None else given.grad
            for name, parameter in module.named_parameters():
                if parameter.grad is not None:
                    own[f"gradient.{step}.{name}"] = parameter.grad.clone()
                    parameter.data.sub_(0.1 * parameter.grad)
            found |= own | dict(leaves({**module.state_dict()}, f"state.{step}"))
        module.eval()
        with torch.no_grad():
            found |= dict(leaves(module(x, **calls), "eval"))
        if kind == "EvoLFQ":
            found |= dict(leaves(search(module, x), "search"))
    except (ValueError, TypeError, AttributeError) as error:
        return error
    return found


def search(module: Any, x: Tensor) -> tuple[Any, ...]:
    """What an EvoLFQ finds that looks for large sums, from the bits of x on: the first populations, how many there were, and the best."""
    population = module.init_population_from_data(x[:, 0])
    rounds = [*module.evolve(lambda decoded, bits: decoded.sum(-1), population)]
    return population, rounds[0].pop_bits, len(rounds), rounds[-1].best_fitness


def flatten(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from flatten(part)


def differ(one: dict[str, Tensor], other: dict[str, Tensor] | Exception) -> bool:
    if isinstance(other, Exception) or one.keys() != other.keys():
        return True
    pairs = [(one[name], other[name]) for name in one]
    return any(a.shape != b.shape or a.dtype != b.dtype or not torch.allclose(a, b, equal_nan=True) for a, b in pairs)


@pytest.mark.parametrize("kind, name", CASES, ids=lambda value: value)
def test_no_argument_is_dead(kind: str, name: str) -> None:
    flip = FLIPS[kind][name]
    x = INPUTS.get(kind, vectors()) if flip.x is None else flip.x
    base = {**SMALL[kind], **flip.given}
    usual = behaviour(kind, base, x)
    assert not isinstance(usual, Exception), usual
    assert not differ(usual, behaviour(kind, base, x)), "the base setting is not repeatable"
    assert differ(usual, behaviour(kind, {**base, name: flip.value}, x))


@pytest.mark.parametrize("kind", KINDS)
def test_every_argument_is_flipped(kind: str) -> None:
    cls = getattr(facade, kind)
    wanted = arguments_of(cls.__init__) | {f"call.{name}" for name in arguments_of(cls.forward, skip=2)}
    assert {*FLIPS.get(kind, {}), *ALONE.get(kind, {})} == wanted


def arguments_of(function: Callable[..., Any], skip: int = 1) -> set[str]:
    parameters = [*inspect.signature(function).parameters.values()][skip:]
    return {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def test_a_dead_argument_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deaf(facade.VectorQuantize):
        def __init__(self, dim: int, codebook_size: int, decay: float = 0.8) -> None:
            super().__init__(dim, codebook_size)

    monkeypatch.setattr(facade, "VectorQuantize", Deaf, raising=False)
    usual = behaviour("VectorQuantize", SMALL["VectorQuantize"], vectors())
    assert not isinstance(usual, Exception)
    assert not differ(usual, behaviour("VectorQuantize", {**SMALL["VectorQuantize"], "decay": 0.5}, vectors()))


def test_what_is_still_to_come_has_its_flips() -> None:
    assert set(FLIPS) == set(SMALL)
    assert set(NOT_YET) <= set(MODULES)
