"""What is set on a module after it was made, and after a call: the next calls are those of the peer, or it is refused."""

from __future__ import annotations

import ast
import contextlib
import copy
import inspect
import pickle
import random
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from facade.compare import compare
from facade.peer import facade, peer
from facade.test_contract import SMALL
from facade.test_no_dead_parameter import (
    IMAGE,
    INPUTS,
    LEARNABLE,
    MASK,
    NO_ESTIMATOR,
    ORTHOGONAL,
    WIDTH,
    differ,
    leaves,
    search,
    sgd,
    vectors,
)

KINDS = [*SMALL]
APART = {"shared_codebook": False, "kmeans_init": False, "threshold_ema_dead_code": 0}
WITHOUT_LOSSES = {"commitment_loss_weight": 0.0, "quantization_loss_weight": 0.0}
BASE: dict[str, dict[str, Any]] = {
    **SMALL,
    "HierarchicalVQ": {**SMALL["HierarchicalVQ"], **APART},
    "LatentQuantize": {**SMALL["LatentQuantize"], **WITHOUT_LOSSES},
}


class Later(NamedTuple):
    """`value` set on a module that was made with `given`, which has arguments of calls, too, as "call.NAME".

    A function is asked for the value, with the module.
    """

    value: Any
    given: dict[str, Any] = {}  # noqa: RUF012
    x: Tensor | None = None
    called: bool = True
    """Whether it is called once before."""
    apart: tuple[str, ...] = ()
    """Parts that differ in any case."""


class Kept(NamedTuple):
    """A function that is the value itself."""

    function: Callable


def value_of(later: Later, module: nn.Module) -> Any:
    if isinstance(later.value, Kept):
        return later.value.function
    return later.value(module) if callable(later.value) and not isinstance(later.value, nn.Module) else copy.deepcopy(later.value)


def attributes(kind: str) -> dict[str, str]:
    """The attributes that the peer's `__init__` sets, with "read" where any other method reads them."""
    tree: Any = ast.parse(textwrap.dedent(inspect.getsource(getattr(peer, kind)))).body[0]
    made: dict[str, str] = {}
    read: set[str] = set()
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
                if function.name == "__init__" and isinstance(node.ctx, ast.Store):
                    made.setdefault(node.attr, "")
                elif function.name != "__init__":
                    read.add(node.attr)
            call = function.name == "__init__" and isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if call and node.func.attr == "register_buffer":
                made.setdefault(node.args[0].value, "")
    return {name: "read" if name in read else "" for name in made if not name.startswith("_") or name == "_codebook"}


def linear(rows: int, columns: int, bias: bool = True) -> nn.Linear:
    torch.manual_seed(5)
    return nn.Linear(columns, rows, bias=bias)


def half_of(name: str) -> Callable[[Any], Tensor]:
    """Half of a tensor that the module has."""
    return lambda module: getattr(module, name).detach() * 0.5


def first_of(name: str) -> Callable[[Any], Any]:
    """The modules of a list but for the last."""
    return lambda module: getattr(module, name)[:-1]


def backwards(name: str) -> Callable[[Any], nn.ModuleList]:
    """The modules of a list in the other order."""
    return lambda module: nn.ModuleList([*getattr(module, name)][::-1])


def optimizer(module: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(module._codebook.parameters(), lr=0.1)


def halved_values(module: Any) -> nn.ParameterList:
    return nn.ParameterList([value.detach() * 0.5 for value in module.values_per_latent])


ROWS = vectors(24, WIDTH)
HEADS = {"heads": 2, "codebook_dim": 4}
PROJECTED = {"codebook_dim": 4}
DIVERSE = {"codebook_diversity_loss_weight": 0.5, "ema_update": False}
OWN_OPTIMIZER = {**LEARNABLE, "in_place_codebook_optimizer": sgd}
THREE = {"num_quantizers": 3}
DROPOUT = {**THREE, "quantize_dropout": True, "call.rand_quantize_dropout_fixed_seed": 1}
IMPLICIT = {**THREE, "implicit_neural_codebook": True}
WEIGHED = {**THREE, "ema_update": False, "beam_score_quantizer_weights": [1.0, 1.0, 1.0]}
BEAM = {**WEIGHED, "beam_size": 3}
ROTATED = {"orthogonal_rotation": True}

LATER: dict[str, dict[str, list[Later]]] = {
    "VectorQuantize": {
        "dim": [Later(6)],
        "heads": [Later(2), Later(1, HEADS)],
        "separate_codebook_per_head": [Later(False, {**HEADS, "separate_codebook_per_head": True}), Later(True, HEADS)],
        "project_in": [
            Later(linear(4, WIDTH), PROJECTED),
            Later(nn.Sequential(linear(4, WIDTH), nn.ReLU(), linear(4, 4)), PROJECTED),
            Later(nn.Sequential(linear(12, WIDTH), nn.ReLU(), linear(4, 12)), {**PROJECTED, "use_cosine_sim": True}),
            Later(nn.Sequential(linear(4, WIDTH), nn.LayerNorm(4), nn.Tanh()), PROJECTED),
        ],
        "project_out": [Later(linear(WIDTH, 4), PROJECTED)],
        "has_commitment_loss": [Later(False), Later(True, {"commitment_weight": 0.0})],
        "commitment_weight": [Later(0.25), Later(0.0), Later(-1.0), Later(0.5, {"commitment_weight": 0.0})],
        "commitment_use_cross_entropy_loss": [
            Later(True, {"ema_update": False}),
            Later(False, {"ema_update": False, "commitment_use_cross_entropy_loss": True}),
        ],
        "learnable_codebook": [Later(False, LEARNABLE)],
        "has_codebook_orthogonal_loss": [Later(False, ORTHOGONAL), Later(True, LEARNABLE), Later(True, {"ema_update": False})],
        "orthogonal_reg_weight": [Later(0.25, ORTHOGONAL), Later(0.0, ORTHOGONAL), Later(0.5, LEARNABLE)],
        "orthogonal_reg_active_codes_only": [Later(True, ORTHOGONAL)],
        "orthogonal_reg_max_codes": [Later(100, {**ORTHOGONAL, "orthogonal_reg_max_codes": 4})],
        "has_codebook_diversity_loss": [Later(False, DIVERSE, ROWS), Later(True, {"ema_update": False}, ROWS)],
        "codebook_diversity_temperature": [Later(1.0, DIVERSE, ROWS)],
        "codebook_diversity_loss_weight": [Later(0.25, DIVERSE, ROWS), Later(0.5, {"ema_update": False}, ROWS)],
        "rotation_trick": [Later(False), Later(True, {"rotation_trick": False})],
        "directional_reparam": [
            Later(True, {"rotation_trick": False}),
            Later(False, {"directional_reparam": True, "threshold_ema_dead_code": 1e-6}),
        ],
        "directional_reparam_variance": [Later(1e-14, {"directional_reparam": True, "threshold_ema_dead_code": 1e-6})],
        "sync_update_v": [Later(0.5, {**LEARNABLE, **NO_ESTIMATOR}), Later(0.0, {**LEARNABLE, **NO_ESTIMATOR, "sync_update_v": 0.5})],
        "route_gradients_to_input": [Later(False), Later(False, {"straight_through": True, "rotation_trick": False, "ema_update": False})],
        "_codebook": [Later(lambda module: swapped(module))],
        "in_place_codebook_optimizer": [Later(optimizer, LEARNABLE), Later(None, OWN_OPTIMIZER)],
        "manual_in_place_optimizer_update": [Later(True, OWN_OPTIMIZER)],
        "codebook_size": [Later(2, {"call.topk": 4}), Later(64)],
        "accept_image_fmap": [Later(False, {"accept_image_fmap": True}, IMAGE), Later(True, {}, IMAGE, called=False)],
        "accept_3d_fmap": [Later(True, {}, IMAGE.unsqueeze(-1), called=False)],
        "channel_last": [Later(False, {}, vectors(2, WIDTH, WIDTH)), Later(True, {"channel_last": False}, vectors(2, WIDTH, WIDTH))],
        "return_zeros_for_masked_padding": [Later(False, {"call.mask": MASK})],
        "freeze_codebook": [Later(True), Later(False, {"freeze_codebook": True})],
    },
    "ResidualVQ": {
        "codebook_dim": [Later(4)],
        "project_in": [Later(linear(4, WIDTH), PROJECTED)],
        "project_out": [Later(linear(WIDTH, 4), PROJECTED)],
        "codebook_sizes": [Later((16, 8))],
        "implicit_neural_codebook": [Later(False, IMPLICIT)],
        "num_quantizers": [Later(2, {**DROPOUT, "call.rand_quantize_dropout_fixed_seed": 5}), Later(1)],
        "layers": [Later(first_of("layers"), THREE), Later(backwards("layers"), THREE)],
        "quantize_dropout": [Later(False, DROPOUT), Later(True, {**DROPOUT, "quantize_dropout": False})],
        "quantize_dropout_cutoff_index": [Later(2, DROPOUT)],
        "quantize_dropout_multiple_of": [Later(3, DROPOUT)],
        "vq_is_ema_updating": [Later(False, {"shared_codebook": True})],
        "quant_grad_frac": [Later(0.5)],
        "beam_size": [Later(3, WEIGHED), Later(None, BEAM), Later(1, BEAM)],
        "eval_beam_size": [Later(4, WEIGHED), Later(1, BEAM)],
        "beam_score_weights": [Later(torch.tensor([1.0, 5.0, 0.001]), BEAM)],
        "mlps": [Later(backwards("mlps"), IMPLICIT)],
        "diveq": [Later(True), Later(False, {"diveq": True, "threshold_ema_dead_code": 1e-6})],
        "shared_codebook": [Later(True), Later(False, {"shared_codebook": True})],
        "accept_image_fmap": [Later(True), Later(False, {"accept_image_fmap": True}, vectors(2, WIDTH, 4, 4))],
        "return_zeros_for_masked_padding": [Later(False, {"call.mask": MASK})],
    },
    "GroupedResidualVQ": {
        "dim": [Later(6)],
        "groups": [Later(1)],
        "accept_image_fmap": [
            Later(False, {"accept_image_fmap": True}, vectors(2, WIDTH, 4, 4)),
            Later(True, {}, vectors(2, WIDTH, WIDTH)),
        ],
        "rvqs": [Later(backwards("rvqs"))],
    },
    "RandomProjectionQuantizer": {
        "num_codebooks": [Later(1)],
        "rand_projs": [Later(half_of("rand_projs"), {"norm": False})],
        "norm": [Later(nn.Identity())],
        "vq": [Later(lambda module: other_codes(copy.deepcopy(module.vq)))],
    },
    "FSQ": {
        "dim": [Later(4)],
        "codebook_dim": [Later(3)],
        "effective_codebook_dim": [Later(3)],
        "num_codebooks": [Later(2), Later(1, {"num_codebooks": 2, "dim": 4}, vectors(2, 12, 4))],
        "codebook_size": [Later(7)],
        "keep_num_codebooks_dim": [Later(True), Later(False, {"keep_num_codebooks_dim": True})],
        "preserve_symmetry": [Later(True), Later(False, {"preserve_symmetry": True})],
        "noise_dropout": [Later(0.5, {"preserve_symmetry": True}), Later(0.0, {"preserve_symmetry": True, "noise_dropout": 0.5})],
        "bound_hard_clamp": [Later(True), Later(True, {"preserve_symmetry": True})],
        "channel_first": [Later(True, {}, vectors(2, 2, 2)), Later(False, {"channel_first": True}, vectors(2, 2, 2))],
        "scale": [Later(2.0)],
        "project_in": [Later(linear(2, 4), {"dim": 4}, vectors(2, 12, 4))],
        "project_out": [Later(linear(4, 2), {"dim": 4}, vectors(2, 12, 4))],
        "implicit_codebook": [Later(half_of("implicit_codebook"))],
        "allowed_dtypes": [Later((torch.float64,))],
        "orthogonal_rotation": [Later(False, ROTATED), Later(True)],
        "orthogonal_rot": [Later(lambda module: module.orthogonal_rot.t().contiguous(), ROTATED)],
    },
    "FSP": {
        "codebook_dim": [Later(3)],
        "dim": [Later(4)],
        "channel_first": [Later(True, {}, vectors(2, 2, 2))],
        "codebook_size": [Later(7)],
        "act_name": [Later("sigmoid")],
        "quantize_rate": [Later(1.0), Later(0.0, {"quantize_rate": 1.0})],
        "need_inv_act": [Later(True, {"quantize_rate": 1.0})],
        "vector_norm": [Later(lambda module: act(module, "VectorNorm").build("kurt"))],
        "act_func": [Later(lambda module: act(module, "sigmoid_act"), {"quantize_rate": 1.0})],
        "inv_act_func": [Later(lambda module: act(module, "sigmoid_inv_act"), {"quantize_rate": 1.0, "need_inv_act": True})],
        "project_in": [Later(linear(2, 4), {"dim": 4, "quantize_rate": 1.0}, vectors(2, 12, 4))],
        "project_out": [Later(linear(4, 2), {"dim": 4, "quantize_rate": 1.0}, vectors(2, 12, 4))],
    },
    "LFQ": {
        "dim": [Later(4)],
        "codebook_size": [Later(8)],
        "codebook_dim": [Later(3)],
        "num_codebooks": [Later(2), Later(1, {"num_codebooks": 2})],
        "keep_num_codebooks_dim": [Later(True)],
        "channel_first": [Later(True, {}, vectors(2, WIDTH, WIDTH)), Later(False, {"channel_first": True}, vectors(2, WIDTH, WIDTH))],
        "project_in": [Later(linear(4, WIDTH))],
        "project_out": [Later(linear(WIDTH, 4))],
        "activation": [Later(nn.Tanh()), Later(nn.Identity(), {"straight_through_activation": nn.Tanh()})],
        "maybe_l2norm": [Later(Kept(nn.functional.normalize))],
        "spherical": [Later(True)],
        "orthogonal_rotation": [Later(False, ROTATED), Later(True)],
        "orthogonal_rot": [Later(lambda module: module.orthogonal_rot.t().contiguous(), ROTATED)],
        "frac_per_sample_entropy": [Later(0.5), Later(1.0, {"frac_per_sample_entropy": 0.5})],
        "commitment_loss_weight": [Later(0.5), Later(0.0, {"commitment_loss_weight": 0.5}), Later(0.25, {"commitment_loss_weight": 0.5})],
        "diversity_gamma": [Later(0.25), Later(0.0)],
        "entropy_loss_weight": [Later(0.5), Later(0.0), Later(0.5, {"entropy_loss_weight": 0.0})],
        "codebook_scale": [Later(2.0)],
        "soft_clamp_input_value": [Later(1.5), Later(None, {"soft_clamp_input_value": 1.5})],
        "entropy_loss_offset": [Later(1.0, {"experimental_softplus_entropy_loss": True})],
        "codebook": [Later(half_of("codebook"))],
    },
    "EvoLFQ": {
        "encoder": [Later(linear(4, WIDTH))],
        "decoder": [Later(linear(WIDTH, 4))],
        "lfq": [Later(lambda module: type(module.lfq)(dim=4, entropy_loss_weight=0.0, commitment_loss_weight=0.5))],
        "pop_size": [Later(8)],
        "tournament_size": [Later(3)],
        "elitism_count": [Later(2)],
        "generations": [Later(2)],
    },
    "ResidualLFQ": {
        "project_in": [Later(linear(4, WIDTH))],
        "project_out": [Later(linear(WIDTH, 4))],
        "num_quantizers": [Later(2, {**DROPOUT, "call.rand_quantize_dropout_fixed_seed": 5}), Later(1)],
        "layers": [Later(first_of("layers"), THREE), Later(backwards("layers"), THREE)],
        "quantize_dropout": [Later(False, DROPOUT), Later(True, {**DROPOUT, "quantize_dropout": False})],
        "quantize_dropout_cutoff_index": [Later(2, DROPOUT)],
        "quantize_dropout_multiple_of": [Later(3, DROPOUT)],
    },
    "GroupedResidualLFQ": {
        "dim": [Later(6)],
        "groups": [Later(1)],
        "accept_image_fmap": [Later(True, {}, vectors(2, WIDTH, WIDTH))],
        "rvqs": [Later(backwards("rvqs"), {"codebook_size": 4})],
    },
    "ResidualFSQ": {
        "levels": [Later([4, 4])],
        "codebook_size": [Later(7)],
        "project_in": [Later(linear(2, WIDTH))],
        "project_out": [Later(linear(WIDTH, 2))],
        "is_channel_first": [
            Later(True, {}, vectors(2, WIDTH, WIDTH)),
            Later(False, {"is_channel_first": True}, vectors(2, WIDTH, WIDTH)),
        ],
        "num_quantizers": [Later(2, {**DROPOUT, "call.rand_quantize_dropout_fixed_seed": 5}), Later(1)],
        "layers": [Later(first_of("layers"), THREE), Later(backwards("layers"), THREE)],
        "scales": [Later(half_of("scales"))],
        "quantize_dropout": [Later(False, DROPOUT), Later(True, {**DROPOUT, "quantize_dropout": False})],
        "quantize_dropout_cutoff_index": [Later(2, DROPOUT)],
        "quantize_dropout_multiple_of": [Later(3, DROPOUT)],
        "soft_clamp_input_value": [Later(half_of("soft_clamp_input_value")), Later(None)],
    },
    "GroupedResidualFSQ": {
        "dim": [Later(6)],
        "groups": [Later(1)],
        "codebook_size": [Later(7)],
        "accept_image_fmap": [Later(True, {}, vectors(2, WIDTH, WIDTH))],
        "rvqs": [Later(backwards("rvqs"))],
    },
    "LatentQuantize": {
        "dim": [Later(4)],
        "codebook_dim": [Later(1)],
        "effective_codebook_dim": [Later(1)],
        "codebook_size": [Later(7)],
        "num_codebooks": [Later(2)],
        "keep_num_codebooks_dim": [Later(True)],
        "commitment_loss_weight": [
            Later(torch.tensor(0.5)),
            Later(torch.tensor(0.0)),
            Later(torch.tensor(0.5), {"commitment_loss_weight": 0.0}),
        ],
        "quantization_loss_weight": [Later(torch.tensor(0.5)), Later(torch.tensor(0.0))],
        "project_in": [Later(linear(2, WIDTH))],
        "project_out": [Later(linear(WIDTH, 2))],
        "values_per_latent": [Later(halved_values, apart=("output.1", "eval.1", "decode.indices_to_codes"))],
        "in_place_codebook_optimizer": [
            Later(lambda module: sgd(module.values_per_latent)),
            Later(None, {"in_place_codebook_optimizer": sgd}),
        ],
        "implicit_codebook": [Later(half_of("implicit_codebook"))],
    },
    "SimVQ": {
        "codebook_size": [Later(8)],
        "channel_first": [Later(True, {}, vectors(2, WIDTH, WIDTH)), Later(False, {"channel_first": True}, vectors(2, WIDTH, WIDTH))],
        "code_transform": [Later(linear(WIDTH, WIDTH))],
        "frozen_codebook": [Later(half_of("frozen_codebook"))],
        "rotation_trick": [Later(False), Later(True, {"rotation_trick": False})],
        "input_to_quantize_commit_loss_weight": [
            Later(0.5),
            Later(0.0),
            Later(0.5, {"input_to_quantize_commit_loss_weight": 0.0}),
        ],
    },
    "ResidualSimVQ": {
        "channel_first": [Later(True)],
        "num_quantizers": [Later(2, {**DROPOUT, "call.rand_quantize_dropout_fixed_seed": 5}), Later(1)],
        "layers": [Later(first_of("layers"), THREE), Later(backwards("layers"), THREE)],
        "quantize_dropout": [Later(False, DROPOUT), Later(True, {**DROPOUT, "quantize_dropout": False})],
        "quantize_dropout_cutoff_index": [Later(2, DROPOUT)],
        "quantize_dropout_multiple_of": [Later(3, DROPOUT)],
    },
    "BinaryMapper": {
        "bits": [Later(2)],
        "num_codes": [Later(4)],
        "power_two": [Later(lambda module: module.power_two.flip(0))],
        "codes": [Later(lambda module: module.codes.flip(0))],
        "kl_loss_threshold": [Later(0.1)],
    },
    "HierarchicalVQ": {
        "dim": [Later(4)],
        "scales": [Later((1, 3))],
        "spatial_dims": [Later(2)],
        "level_shapes": [Later(((1,), (3,)))],
        "num_levels": [Later(1)],
        "codebook_sizes": [Later((8, 8))],
        "channel_first": [Later(False, {}, vectors(2, WIDTH, WIDTH))],
        "nested_dropout": [Later(1.0)],
        "nested_dropout_min_levels": [Later(2, {"nested_dropout": 1.0})],
        "to_channel_first": [Later(nn.Identity())],
        "to_channel_last": [Later(nn.Identity())],
        "mask_to_channel": [Later(nn.Identity())],
        "mask_from_channel": [Later(nn.Identity())],
        "flatten_spatial": [Later(nn.Identity())],
        "flatten_indices": [Later(nn.Identity())],
        "unflatten_spatial": [Later(backwards("unflatten_spatial"))],
        "indices_to_spatial": [Later(backwards("indices_to_spatial"))],
        "vq": [Later(lambda module: other_codes(copy.deepcopy(module.vq)), {"shared_codebook": True, "decay": 1.0})],
        "vqs": [Later(backwards("vqs"))],
        "phi_shared": [Later(lambda module: module.phi_levels[-1], {"share_quant_resi": 2})],
        "phi_levels": [Later(backwards("phi_levels"), {"share_quant_resi": 2})],
    },
}
"""What is set; where a class and attribute are missing a bool is turned and a float doubled."""

CONSTANTS: dict[str, tuple[str, ...]] = {
    "VectorQuantize": ("zero",),
    "LFQ": ("zero", "mask"),
    "EvoLFQ": ("zero",),
    "BinaryMapper": ("zero",),
}
"""Buffers that hold numbers which are the same in all modules."""


def swapped(module: Any) -> nn.Module:
    """A codebook of other codes."""
    return other_codes(copy.deepcopy(module))._codebook


def other_codes(module: Any) -> Any:
    module.eval()
    with torch.no_grad():
        module._codebook.embed.mul_(-1.0)
        module._codebook.embed_avg.mul_(-1.0)
    return module.train()


def act(module: Any, name: str) -> Any:
    return getattr(inspect.getmodule(type(module)), name)


def doubled(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    assert isinstance(value, float), "say in LATER what to set it to"
    return 2 * value + 0.5


def cases_of(kind: str, name: str) -> list[Later]:
    known = LATER.get(kind, {}).get(name)
    return [Later(lambda module: doubled(getattr(module, name)))] if known is None else known


CASES = [(kind, name, number) for kind in KINDS for name in attributes(kind) for number in range(len(cases_of(kind, name)))]


def input_of(kind: str, later: Later) -> Tensor:
    return INPUTS.get(kind, vectors()) if later.x is None else later.x


def prepared(name: str, later: Later, x: Tensor, set_it: bool = True) -> Callable[[Any], None]:
    """Changes a module after one call of training."""
    calls = {key.removeprefix("call."): value for key, value in later.given.items() if key.startswith("call.")}

    def change(module: Any) -> None:
        random.seed(3)
        torch.manual_seed(3)
        if later.called:
            module(x.clone(), **calls)
        torch.manual_seed(4)
        value = value_of(later, module)
        if set_it:
            setattr(module, name, value)

    return change


def alone(kind: str, name: str, later: Later, set_it: bool) -> dict[str, Tensor] | Exception:
    """What the peer does."""
    arguments = copy.deepcopy({**BASE[kind], **later.given})
    calls = {key.removeprefix("call."): arguments.pop(key) for key in [*arguments] if key.startswith("call.")}
    torch.manual_seed(0)
    x = input_of(kind, later)
    found: dict[str, Tensor] = {}
    try:
        module = getattr(peer, kind)(**arguments)
        prepared(name, later, x, set_it)(module)
        for mode in (True, False):
            module.train(mode)
            given = x.clone().requires_grad_()
            torch.manual_seed(1)
            output = module(given, **calls)
            found |= dict(leaves(output, str(mode)))
            parts = [part.sin().sum() for _, part in _tensors(output) if part.requires_grad]
            if mode and parts:
                torch.stack(parts).sum().backward()
                found["gradient"] = torch.zeros(()) if given.grad is None else given.grad
                found |= {f"of.{key}": p.grad.clone() for key, p in module.named_parameters() if p.grad is not None}
            if not mode:
                found |= dict(leaves({**module.state_dict()}, "state"))
                for method in ("get_output_from_indices", "indices_to_codes"):
                    with contextlib.suppress(Exception):  # what it cannot decode is no matter of calls
                        found |= dict(leaves(getattr(module, method)(output[1]), method))
    except Exception as error:
        return error
    return found


def _tensors(output: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        yield path, output
    elif isinstance(output, (tuple, list)):
        for number, part in enumerate(output):
            yield from _tensors(part, f"{path}.{number}")


def outcome(kind: str, name: str, number: int) -> str:
    """One of "cannot" (the peer raises), "inert" (it changes nothing there, nor here), "equal", "refused"; else AssertionError."""
    later = cases_of(kind, name)[number]
    x = input_of(kind, later)
    usual, there = (alone(kind, name, later, set_it) for set_it in (False, True))
    if isinstance(there, Exception):
        return "cannot"
    arguments = {**BASE[kind], **later.given}
    calls = {key.removeprefix("call."): arguments.pop(key) for key in [*arguments] if key.startswith("call.")}
    try:
        comparison = compare(kind, arguments, x, calls=calls, prepare=prepared(name, later, x), steps=1)
    except (ValueError, TypeError):
        return "refused"
    if "raises" in comparison.worst:
        return "refused"
    comparison.facts[name] = None if callable(later.value) else later.value
    for part in ("state_back", *later.apart):
        comparison.worst.pop(part, None)  # where modules were added or taken away the peer has others, too
    comparison.facts["beam_size"] = "beam" in name
    comparison.check()
    return "equal" if isinstance(usual, Exception) or differ(usual, there) else "inert"


UNSEEN: dict[str, tuple[str, ...]] = {
    "VectorQuantize": ("dim", "heads", "separate_codebook_per_head", "eps", "use_cosine_sim"),
    "ResidualVQ": ("codebook_dim", "accept_image_fmap", "codebook_sizes", "uniform_codebook_size"),
    "GroupedResidualVQ": ("dim", "groups", "accept_image_fmap"),
    "RandomProjectionQuantizer": ("num_codebooks",),
    "FSQ": ("scale", "codebook_dim", "num_codebooks", "dim", "allowed_dtypes", "force_quantization_f32"),
    "FSP": ("dim", "act_name"),
    "LFQ": ("dim", "num_codebooks", "force_quantization_f32"),
    "EvoLFQ": ("pop_size", "mutation_rate", "tournament_size", "elitism_count", "generations"),
    "ResidualLFQ": ("has_projections",),
    "GroupedResidualLFQ": ("dim", "groups", "accept_image_fmap"),
    "ResidualFSQ": ("has_projections", "levels", "codebook_size"),
    "GroupedResidualFSQ": ("dim", "groups", "accept_image_fmap", "codebook_size"),
    "LatentQuantize": ("dim", "in_place_codebook_optimizer", "codebook_dim", "num_codebooks"),
    "BinaryMapper": ("bits", "num_codes"),
    "HierarchicalVQ": (
        "dim",
        "spatial_dims",
        "scales",
        "level_shapes",
        "codebook_sizes",
        "flatten_spatial",
        "unflatten_spatial",
        "indices_to_spatial",
    ),
}
"""Attributes that no call of the peer tells, or with which it raises."""

SETTINGS = [(kind, name) for kind in KINDS for name in attributes(kind) if name not in CONSTANTS.get(kind, ())]


@pytest.mark.parametrize("kind, name", SETTINGS)
def test_what_is_set_later_holds_or_is_refused(kind: str, name: str) -> None:
    found = {outcome(kind, name, number) for number in range(len(cases_of(kind, name)))}
    assert bool(found & {"equal", "refused"}) != (name in UNSEEN.get(kind, ()))


RESIDUAL = {"dim": WIDTH, "num_quantizers": 4, "codebook_size": 16}


def both(kind: str, prepare: Callable[[Any], Any], kwargs: dict[str, Any] | None = None, x: Tensor | None = None, **calls: Any) -> Any:
    """That both do the same after one call and `prepare`."""

    def change(module: Any) -> None:
        module(vectors() if x is None else x)
        prepare(module)

    arguments = RESIDUAL if kwargs is None else kwargs
    found = compare(kind, arguments, vectors() if x is None else x, calls=calls, prepare=change)
    found.worst.pop("state_back", None)
    found.check()


def set_each(name: str, *values: Any) -> Callable[[Any], None]:
    def prepare(module: Any) -> None:
        for number, (layer, value) in enumerate(zip(module.layers, values, strict=False)):
            assert hasattr(layer, name), number
            setattr(layer, name, value)

    return prepare


def without(start: int) -> Callable[[Any], None]:
    def prepare(module: Any) -> None:
        del module.layers[start:]
        module.num_quantizers = len(module.layers)

    return prepare


def another_layer(module: Any) -> None:
    module.layers[1] = other_codes(copy.deepcopy(module.layers[3]))
    module.layers[1].commitment_weight = 0.25


PREPARED: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "layers, truncated": (lambda module: setattr(module, "layers", module.layers[:2]), {}),
    "layers, deleted": (without(2), {"quantize_dropout": True, "call.rand_quantize_dropout_fixed_seed": 4}),
    "a layer, replaced": (another_layer, {}),
    "weights of layers": (set_each("commitment_weight", 0.5, 0.25, 2.0, 0.0), {}),
    "a loss of one layer": (set_each("has_commitment_loss", False, True, False, True), {}),
    "an estimator of one layer": (set_each("rotation_trick", False, True, False, True), {"quant_grad_frac": 0.5}),
    "a codebook that another one is put into": (lambda module: setattr(module.layers[1], "_codebook", swapped(module.layers[2])), {}),
}


PROJECTIONS: dict[str, Callable[[Any], Any]] = {
    "one more layer": lambda layers: layers.append(nn.Tanh()),
    "a hook": lambda layers: layers.register_forward_hook(lambda layer, args, output: output / 2),
}


@pytest.mark.parametrize("case", PROJECTIONS)
def test_a_projection_is_what_it_has_become(case: str) -> None:
    arguments = {"dim": WIDTH, "codebook_size": 16, "codebook_dim": 4, "layernorm_after_project_in": True}
    both("VectorQuantize", lambda module: PROJECTIONS[case](module.project_in), arguments)


@pytest.mark.parametrize("kind", ["VectorQuantize", "ResidualVQ"])
def test_a_projection_learns_wherever_a_part_of_it_does(kind: str) -> None:
    """Also where its first parameter is frozen and the input has no gradient; the library forgets the latter."""
    quantizer = getattr(facade, kind)(
        dim=WIDTH, codebook_size=16, codebook_dim=4, **({"num_quantizers": 2} if kind == "ResidualVQ" else {})
    )
    quantizer.project_in = nn.Sequential(nn.Linear(WIDTH, 4).requires_grad_(False), nn.Linear(4, 4))
    quantizer(torch.randn(2, 5, WIDTH))[0].sum().backward()
    assert quantizer.project_in[1].weight.grad.any()


@pytest.mark.parametrize("kind", ["VectorQuantize", "ResidualVQ"])
def test_a_projection_may_have_nothing_to_learn(kind: str) -> None:
    def pool(module: Any) -> None:
        module.project_in = nn.AvgPool1d(WIDTH // 4)

    both(kind, pool, {**(RESIDUAL if kind == "ResidualVQ" else {}), "dim": WIDTH, "codebook_size": 16, "codebook_dim": 4})


@pytest.mark.parametrize("case", PREPARED)
def test_layers_are_those_of_now(case: str) -> None:
    prepare, given = PREPARED[case]
    calls = {name.removeprefix("call."): given[name] for name in given if name.startswith("call.")}
    both("ResidualVQ", prepare, {**RESIDUAL, **{name: given[name] for name in given if not name.startswith("call.")}}, **calls)


@pytest.mark.parametrize("kind", ["ResidualVQ", "GroupedResidualVQ"])
def test_layers_in_eval_mode_do_not_learn_while_the_others_do(kind: str) -> None:
    """As where the first layers are frozen and the later ones trained; in eval mode a layer has no estimator and no loss."""

    def residuals(module: Any) -> list[Any]:
        return [*getattr(module, "rvqs", [module])]

    def train(module: Any, mode: bool = True) -> Any:
        type(module).train(module, mode)
        for residual in residuals(module):
            for layer in residual.layers[:2]:
                layer.eval()
        return module

    kwargs = {**RESIDUAL, "groups": 2} if kind == "GroupedResidualVQ" else RESIDUAL
    both(kind, lambda module: module.__dict__.update(train=lambda mode=True: train(module, mode)), kwargs)


def test_a_layer_that_trains_in_a_quantizer_in_eval_mode_learns() -> None:
    pair = [kind(**RESIDUAL) for kind in (peer.ResidualVQ, facade.ResidualVQ)]
    pair[1].load_state_dict(pair[0].state_dict())
    for module in pair:
        module.eval().layers[3].train()
        module(vectors())
    for name, tensor in pair[0].state_dict().items():
        torch.testing.assert_close(pair[1].state_dict()[name], tensor)
    assert not torch.equal(pair[1].layers[3].codebook, pair[1].layers[3].eval()._codebook.embed_avg)


def test_a_layer_that_is_frozen_alone_stays() -> None:
    rvq = facade.ResidualVQ(**RESIDUAL)
    rvq.layers[0].freeze_codebook = True
    before = copy.deepcopy(rvq.state_dict())
    rvq(vectors())
    moved = {name.split(".")[1] for name, tensor in rvq.state_dict().items() if not torch.equal(before[name], tensor)}
    assert moved == {"1", "2", "3"}


SHARED_LATER: dict[str, dict[str, Any]] = {
    "averages": {},
    "cosine": {"use_cosine_sim": True},
    "expiry": {"threshold_ema_dead_code": 0.01},
    "learned": {"learnable_codebook": True, "ema_update": False},
    "frozen": {"freeze_codebook": True},
    "projected": {"codebook_dim": 4},
}


@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("case", SHARED_LATER)
def test_layers_that_share_a_codebook_later_see_each_others_steps(case: str, number: int) -> None:
    def share(module: Any) -> None:
        for layer in module.layers[1:number]:
            layer._codebook = module.layers[0]._codebook

    given = {**RESIDUAL, **SHARED_LATER[case]}
    calls = {"freeze_codebook": True} if case == "frozen" else {}
    found = compare("ResidualVQ", given, vectors(), steps=3, prepare=share, calls=calls, optimize=False)
    found.check()
    assert found.worst["output.1"] == 0


def test_layers_that_share_a_codebook_later_are_computed_again() -> None:
    results = []
    for again in (False, True):
        torch.manual_seed(0)
        rvq, x = facade.ResidualVQ(**RESIDUAL), vectors().requires_grad_()
        rvq.layers[2]._codebook = rvq.layers[0]._codebook
        output, _, losses = checkpoint(rvq, x, use_reentrant=False) if again else rvq(x)
        (output.sin().sum() + losses.sum()).backward()
        results.append((x.grad, {**rvq.state_dict()}))
    torch.testing.assert_close(results[1], results[0])


def test_each_layer_draws_at_its_own_temperature() -> None:
    x = vectors()
    rvq = facade.ResidualVQ(**RESIDUAL, stochastic_sample_codes=True)
    for layer in rvq.layers[:2]:
        layer._codebook.sample_codebook_temp = 0.0
    found = rvq(x, freeze_codebook=True)[1]
    nearest = rvq.eval()(x)[1]
    assert torch.equal(found[..., :2], nearest[..., :2])
    assert not torch.equal(found[..., 2], nearest[..., 2])


def turn_on_diversity(layer: Any) -> None:
    layer.has_codebook_diversity_loss = True


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda rvq: setattr(rvq, "beam_size", 2) or setattr(rvq.layers[1], "_codebook", rvq.layers[0]._codebook),
            "a codebook of another layer: must not with beam_size",
        ),
        (lambda rvq: rvq.layers.append(nn.Linear(2, 2)), "holds Linear"),
        (lambda rvq: setattr(rvq, "layers", rvq.layers[:0]), "holds none"),
        (lambda rvq: setattr(rvq, "layers", nn.ModuleList([nn.Linear(2, 2)])), "holds Linear"),
        (lambda rvq: setattr(rvq.layers[0], "_codebook", nn.Linear(2, 2)), "must be a Codebook"),
        (lambda rvq: rvq.layers[0].__setattr__("codebook_diversity_temperature", 0.0) or turn_on_diversity(rvq.layers[0]), "temperature"),
    ],
)
def test_what_cannot_be_a_layer_is_refused(change: Callable[[Any], Any], words: str) -> None:
    rvq = facade.ResidualVQ(**RESIDUAL)

    def changed_and_called() -> None:
        change(rvq)
        rvq(vectors())

    with pytest.raises((ValueError, TypeError), match=words):
        changed_and_called()


@pytest.mark.parametrize("same", [True, False])
def test_a_setting_may_be_an_array(same: bool) -> None:
    fsq = facade.FSQ(**SMALL["FSQ"])
    object.__setattr__(fsq, "scale", np.array([1.0, 2.0]))
    if same:
        fsq.scale = np.array([1.0, 2.0])
        assert isinstance(fsq.scale, np.ndarray)
    else:
        with pytest.raises((TypeError, ValueError), match="scale"):
            fsq.scale = np.array([1.0, 3.0, 4.0])


def test_a_setting_that_is_refused_changes_nothing() -> None:
    vq = facade.VectorQuantize(**SMALL["VectorQuantize"])
    native, before = vq.native, {**vars(vq)}
    for name, value in (("has_codebook_orthogonal_loss", True), ("sync_update_v", 0.5), ("project_in", nn.Linear(2, 2)), ("heads", 2)):
        with pytest.raises(ValueError, match=rf"{name} = .*must (be|stay)"):
            setattr(vq, name, value)
        assert vq.native is native
        assert vars(vq) == before


def test_a_module_of_a_user_may_have_attributes_of_its_own() -> None:
    class Own(facade.VectorQuantize):
        def __init__(self, dim: int, codebook_size: int) -> None:
            self.factor = 2
            super().__init__(dim, codebook_size)
            self.dim, self.codebook_size, self.heads = dim, codebook_size, 1
            self.extra = nn.Linear(2, 2)

    vq = Own(WIDTH, 16)
    native = vq.native
    vq.rotation_trick = True  # as it is
    assert vq.native is native
    assert {*dict(vq.named_parameters())} == {"extra.weight", "extra.bias"}
    vq(vectors())


# Hooks, and layers of users


def heard(module: Any, name: str = "") -> list[Any]:
    """What a hook on a part of the module, "" for itself, sees of its inputs and outputs."""
    seen: list[Any] = []
    module.get_submodule(name).register_forward_hook(lambda _, given, output: seen.append((given, output)))
    return seen


def alike_to(there: Any, here: Any) -> None:
    there, here = dict(leaves(there, "")), dict(leaves(here, ""))
    assert there.keys() == here.keys()
    for key, value in there.items():
        torch.testing.assert_close(here[key], value, rtol=1e-5, atol=1e-5, msg=key)


HOOKED: dict[str, tuple[str, dict[str, Any], list[str], Tensor, dict[str, Any]]] = {
    "residual": ("ResidualVQ", RESIDUAL, ["layers.0", "layers.2"], vectors(), {}),
    "residual, masked": ("ResidualVQ", RESIDUAL, ["layers.1"], vectors(), {"mask": MASK}),
    "residual, dropout": (
        "ResidualVQ",
        {**RESIDUAL, "quantize_dropout": True},
        ["layers.1"],
        vectors(),
        {"rand_quantize_dropout_fixed_seed": 5},
    ),
    "residual, of images": ("ResidualVQ", {**RESIDUAL, "accept_image_fmap": True}, ["layers.1"], vectors(2, WIDTH, WIDTH, WIDTH), {}),
    "residual, codebooks": ("ResidualVQ", RESIDUAL, ["layers.0._codebook", "layers.3._codebook"], vectors(), {}),
    "groups": ("GroupedResidualVQ", {**RESIDUAL, "groups": 2}, ["rvqs.0", "rvqs.1.layers.2"], vectors(), {}),
    "levels": ("HierarchicalVQ", BASE["HierarchicalVQ"], ["vqs.0", "vqs.1"], vectors(2, WIDTH, 12), {}),
    "one": ("VectorQuantize", SMALL["VectorQuantize"], ["_codebook"], vectors(), {}),
    "one, projected": ("VectorQuantize", {**SMALL["VectorQuantize"], **HEADS}, ["_codebook", "project_in"], vectors(), {}),
    "one, narrowed": ("VectorQuantize", {**SMALL["VectorQuantize"], "codebook_dim": 4}, ["_codebook", "project_in"], vectors(), {}),
    "one, cosines": ("VectorQuantize", {**SMALL["VectorQuantize"], "use_cosine_sim": True}, ["_codebook"], vectors(), {}),
    "one, masked": ("VectorQuantize", SMALL["VectorQuantize"], ["_codebook"], vectors(), {"mask": MASK}),
    "one, with k": ("VectorQuantize", SMALL["VectorQuantize"], ["_codebook"], vectors(), {"topk": 2}),
    "one, separate": (
        "VectorQuantize",
        {**SMALL["VectorQuantize"], **HEADS, "separate_codebook_per_head": True},
        ["_codebook"],
        vectors(),
        {},
    ),
    "one, of images": ("VectorQuantize", {**SMALL["VectorQuantize"], "accept_image_fmap": True}, ["_codebook"], IMAGE, {}),
    "a random projection": ("RandomProjectionQuantizer", SMALL["RandomProjectionQuantizer"], ["vq", "vq._codebook"], vectors(), {}),
    "scalars": ("EvoLFQ", SMALL["EvoLFQ"], ["lfq"], vectors(), {}),
    "residual scalars": ("ResidualFSQ", {**SMALL["ResidualFSQ"], "num_quantizers": 3}, ["layers.0", "layers.2"], vectors(), {}),
    "residual scalars, first": (
        "ResidualFSQ",
        {**SMALL["ResidualFSQ"], "is_channel_first": True, "quantize_dropout": True},
        ["layers.0"],
        vectors(2, WIDTH, 3, 2),
        {"rand_quantize_dropout_fixed_seed": 5},
    ),
    "residual bits": ("ResidualLFQ", {**SMALL["ResidualLFQ"], "num_quantizers": 3}, ["layers.0", "layers.2"], vectors(), {}),
    "residual bits, masked": (
        "ResidualLFQ",
        {**SMALL["ResidualLFQ"], "spherical": True},
        ["layers.1"],
        vectors(),
        {"mask": torch.tensor([True, False])},
    ),
    "grouped bits": ("GroupedResidualLFQ", SMALL["GroupedResidualLFQ"], ["rvqs.0.layers.1"], vectors(), {}),
    "networks": (
        "ResidualVQ",
        {**RESIDUAL, "implicit_neural_codebook": True},
        ["layers.1", "layers.2", "mlps.1", "mlps.1.proj_in", "mlps.1.layers.0.1"],
        vectors(),
        {},
    ),
    "nothing projected": ("VectorQuantize", SMALL["VectorQuantize"], ["project_in", "project_out"], vectors(), {}),
    "nothing projected, one side": ("VectorQuantize", SMALL["VectorQuantize"], ["project_out"], vectors(), {}),
    "nothing projected, residual": ("ResidualVQ", RESIDUAL, ["project_in", "layers.1.project_out", "project_out"], vectors(), {}),
    "nothing projected, scalars": ("FSQ", SMALL["FSQ"], ["project_in", "project_out"], vectors(2, 5, 2), {}),
    "nothing projected, bits": ("LFQ", {"codebook_size": 16}, ["project_in", "project_out"], vectors(2, 5, 4), {}),
    "convolution": ("HierarchicalVQ", BASE["HierarchicalVQ"], ["phi_shared.conv"], vectors(2, WIDTH, 12), {}),
    "maps": ("ResidualSimVQ", SMALL["ResidualSimVQ"], ["layers.1"], vectors(), {}),
}


@pytest.mark.parametrize("case", HOOKED)
def test_hooks_see_what_they_see_there(case: str) -> None:
    kind, kwargs, names, x, calls = HOOKED[case]
    torch.manual_seed(0)
    pair = [getattr(side, kind)(**copy.deepcopy(kwargs)) for side in (peer, facade)]
    pair[1].load_state_dict(pair[0].state_dict())
    plain = copy.deepcopy(pair[1])
    seen = [[heard(module, name) for name in names] for module in pair]
    for training in (True, False):
        outputs = []
        for module in (*pair, plain):
            module.train(training)
            torch.manual_seed(1)
            outputs.append(module(x.clone(), **calls))
        alike_to(outputs[0], outputs[1])
        alike_to(outputs[2], outputs[1])
    alike_to({**plain.state_dict()}, {**pair[1].state_dict()})
    for there, here in zip(*seen, strict=True):
        assert len(here) == len(there) > 0
        for a, b in zip(there, here, strict=True):
            alike_to(*((seen[1][1:2] if case == "residual, masked" else seen) for seen in (a, b)))  # masked places are zeros here


def test_a_hook_may_change_what_a_layer_gets_and_gives() -> None:
    def prepare(module: Any) -> None:
        module.layers[1].register_forward_pre_hook(lambda _, given: (given[0] * 0.5,))
        module.layers[2].register_forward_hook(lambda _, given, output: (output[0] * 0.5, output[1], output[2] * 2))

    both("ResidualVQ", prepare)


def test_a_layer_with_a_forward_of_its_own_is_called() -> None:
    def halved(module: Any) -> None:
        layer = module.layers[1]

        class Halved(type(layer)):
            def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
                quantized, indices, loss = super().forward(2 * x, *args, **kwargs)
                return quantized / 2, indices, loss

        layer.__class__ = Halved

    both("ResidualVQ", halved)


def test_hooks_on_layers_of_a_shared_codebook_change_nothing() -> None:
    plain = facade.ResidualVQ(**RESIDUAL, shared_codebook=True)
    watched = copy.deepcopy(plain)
    seen = heard(watched, "layers.3")
    for module in (plain, watched):
        for _ in range(2):
            module(vectors())
    alike_to({**plain.state_dict()}, {**watched.state_dict()})
    assert len(seen) == 2


@pytest.mark.parametrize(
    "kind, kwargs, name, words",
    [
        ("ResidualVQ", {**RESIDUAL, "beam_size": 2}, "layers.1", "beam_size"),
        ("VectorQuantize", {**SMALL["VectorQuantize"], "stochastic_sample_codes": True}, "_codebook", "stochastic_sample_codes"),
        ("ResidualFSQ", {**SMALL["ResidualFSQ"], "orthogonal_rotation": True}, "layers.1", "orthogonal_rotation"),
    ],
)
def test_hooks_that_nobody_would_run_are_refused(kind: str, kwargs: dict[str, Any], name: str, words: str) -> None:
    module = getattr(facade, kind)(**kwargs)
    heard(module, name)
    with pytest.raises(ValueError, match=words):
        module(vectors())


def test_hooks_of_the_backward_are_run_or_refused() -> None:
    here = facade.VectorQuantize(**SMALL["VectorQuantize"], **LEARNABLE)
    seen: list[str] = []
    for name in ("project_in", "project_out", "_codebook"):
        here.get_submodule(name).register_full_backward_hook(lambda *_, name=name: seen.append(name))
    with pytest.raises(ValueError, match="_codebook has hooks of the backward"):
        here(vectors())
    here._codebook._backward_hooks.clear()
    here(vectors().requires_grad_())[0].sum().backward()
    assert seen == ["project_out", "project_in"]


def test_a_hook_on_an_activation_of_bits_sees_it() -> None:
    for side in (peer, facade):
        lfq = side.LFQ(codebook_size=16, straight_through_activation=nn.Identity())
        lfq(vectors(2, 5, 4))
        seen = heard(lfq, "activation")
        for training in (True, False):
            lfq.train(training)(vectors(2, 5, 4))
        assert len(seen) == 1


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize(
    "kind, given, x",
    [
        ("ResidualVQ", {**RESIDUAL, "implicit_neural_codebook": True}, vectors()),
        ("HierarchicalVQ", BASE["HierarchicalVQ"], vectors(2, WIDTH, 12)),
        ("SimVQ", SMALL["SimVQ"], vectors()),
    ],
)
def test_weights_that_hooks_make_are_those_of_now(kind: str, given: dict[str, Any], x: Tensor, norm: Callable[..., Any]) -> None:
    found = []
    start = getattr(peer, kind)(**given).state_dict()
    for side in (peer, facade):
        module = getattr(side, kind)(**given)
        module.load_state_dict(start)
        for part in [*module.modules()]:
            if isinstance(part, (nn.Linear, nn.Conv1d)):
                torch.manual_seed(1)
                norm(part)
        module.eval()
        module(x)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(-0.7)
        found.append(module(x)[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_hooks_of_all_modules_see_those_that_are_called() -> None:
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, given, output: seen.append(type(module).__name__))
    try:
        for side in (peer, facade):
            side.ResidualVQ(**RESIDUAL)(vectors())
            side.HierarchicalVQ(**BASE["HierarchicalVQ"])(vectors(2, WIDTH, 12))
            seen.append("")
    finally:
        handle.remove()
    there, here = seen[: seen.index("")], seen[seen.index("") + 1 :]
    assert {"ResidualVQ", "HierarchicalVQ"} <= {*there} & {*here}
    assert "VectorQuantize" in there and "VectorQuantize" not in here


def test_hooks_on_what_moves_axes_are_not_run() -> None:
    for side, calls in ((peer, 2), (facade, 0)):
        module = side.HierarchicalVQ(**BASE["HierarchicalVQ"])
        seen = heard(module, "flatten_spatial")
        module(vectors(2, WIDTH, 12))
        assert len(seen) == calls


def test_what_a_hook_makes_of_a_codebook_is_refused() -> None:
    vq = facade.VectorQuantize(**SMALL["VectorQuantize"])
    vq._codebook.register_forward_hook(lambda _, given, output: (output[0] * 2, *output[1:]))
    with pytest.raises(ValueError, match="hook on _codebook"):
        vq(vectors())


# What no call of the peer tells


@pytest.mark.parametrize(
    "name, value", [("pop_size", 9), ("mutation_rate", 0.5), ("tournament_size", 4), ("elitism_count", 3), ("generations", 2)]
)
def test_a_search_goes_by_what_is_set_later(name: str, value: Any) -> None:
    found = []
    for given, later in (({name: value}, {}), ({}, {name: value}), ({}, {})):
        torch.manual_seed(0)
        module = facade.EvoLFQ(**SMALL["EvoLFQ"], **given)
        for setting in later.items():
            setattr(module, *setting)
        found.append(dict(leaves(search(module, vectors()), "")))
    assert not differ(found[0], found[1])
    assert differ(found[0], found[2])


@pytest.mark.parametrize("name", ["commitment_loss_weight", "quantization_loss_weight"])
@pytest.mark.parametrize("in_place", [True, False])
def test_weights_of_latents_are_those_of_now(name: str, in_place: bool) -> None:
    losses = []
    for given, later in ((0.5, None), (0.1, 0.5), (0.0, 0.5)):
        torch.manual_seed(0)
        module = facade.LatentQuantize([5, 3], dim=WIDTH, **{name: given})
        if later is not None:
            module(IMAGE)
            getattr(module, name).fill_(later) if in_place else setattr(module, name, torch.tensor(later))
        losses.append(module(IMAGE)[2])
    assert losses[0] == losses[1] == losses[2] > 0


def test_layers_of_scalars_weigh_their_losses_each_by_itself() -> None:
    def prepare(module: Any) -> None:
        module.layers[1].entropy_loss_weight = 0.5
        module.layers[1].commitment_loss_weight = 0.5

    both("ResidualLFQ", prepare, SMALL["ResidualLFQ"])
    both("ResidualLFQ", lambda module: module.__dict__.update(train=lambda mode=True: half_train(module, mode)), SMALL["ResidualLFQ"])


def half_train(module: Any, mode: bool) -> Any:
    type(module).train(module, mode)
    module.layers[0].eval()
    return module


def test_beams_compete_by_the_weights_of_now() -> None:
    def prepare(module: Any) -> None:
        module.beam_score_weights.copy_(torch.tensor([1.0, 5.0, 0.001]))

    kwargs = {**SMALL["ResidualVQ"], **BEAM}
    both("ResidualVQ", prepare, kwargs)


@pytest.mark.parametrize("kind", SMALL)
def test_copies_are_set_apart(kind: str) -> None:
    """Pickled or copied, a module has a native part of its own parts."""
    module, x = getattr(facade, kind)(**SMALL[kind]), INPUTS.get(kind, vectors())
    module(x)
    for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        outputs = []
        for each in (module.eval(), other.eval()):
            torch.manual_seed(0)
            outputs.append(each(x))
        alike_to(*outputs)
        if kind == "ResidualVQ":
            other.layers[0].rotation_trick = False
            other.train()(x)
            assert [part.layer for part in other._parts] == [*other.layers]
            assert module._natives == [layer.native for layer in module.layers]
            assert not {*module._natives} & {*other._natives}


def test_compiled_programs_follow_what_is_set() -> None:
    torch.manual_seed(0)
    rvq = facade.ResidualVQ(**SMALL["ResidualVQ"])
    twin, x = copy.deepcopy(rvq), vectors().requires_grad_()
    compiled = torch.compile(rvq, backend="aot_eager")
    for change in (lambda module: None, set_each("rotation_trick", False), set_each("commitment_weight", 0.5)):
        for module in (rvq, twin):
            change(module)
        alike_to(twin(x), compiled(x))


# Methods that a subclass overrides


UNCALLED = [(kind, name) for kind in KINDS for name in getattr(getattr(facade, kind), "uncalled", {})]
DECODED = [
    ("VectorQuantize", {**SMALL["VectorQuantize"], "codebook_dim": 4}),
    ("VectorQuantize", {**SMALL["VectorQuantize"], "codebook_dim": 4, "channel_last": False}),
    ("ResidualVQ", {**SMALL["ResidualVQ"], "codebook_dim": 4}),
    ("ResidualFSQ", {**SMALL["ResidualFSQ"], "dim": 2 * WIDTH}),
    ("ResidualLFQ", {**SMALL["ResidualLFQ"], "dim": 2 * WIDTH}),
]


def test_all_methods_that_calls_do_not_go_through_are_told() -> None:
    assert {kind for kind, _ in UNCALLED} == {"FSQ", "LFQ", "LatentQuantize", "HierarchicalVQ", "VectorQuantize"}


def replaced(self: Any, *args: Any, **kwargs: Any) -> Any:
    raise AssertionError("only looked at")


@pytest.mark.parametrize(("kind", "name"), UNCALLED)
def test_a_method_that_calls_do_not_go_through_is_not_overridden(kind: str, name: str) -> None:
    cls: Any = getattr(facade, kind)
    says = rf"overrides {kind}\.{name}, which no call of it goes through here: leave it, and write .* anew"
    with pytest.raises(TypeError, match=says):
        type("Own", (cls,), {name: replaced})
    with pytest.raises(TypeError, match=says):
        type("Own", (type("Mixed", (), {name: replaced}), cls), {})

    type("Own", (cls,), {name: replaced, **dict.fromkeys(cls.uncalled[name], replaced)})
    module = cls(**SMALL[kind])
    with pytest.raises(TypeError, match=rf"{name} is set on {kind}\.{name}"):
        setattr(module, name, replaced)


def test_a_forward_around_that_of_the_class_does_not_call_what_is_overridden() -> None:
    with pytest.raises(TypeError, match=r"class Around overrides FSQ\.quantize"):

        class Around(facade.FSQ):
            def quantize(self, z: Tensor) -> Tensor:
                return z

            def forward(self, z: Tensor) -> Any:
                return super().forward(z)


def test_a_forward_of_its_own_calls_what_is_overridden() -> None:
    class Own(facade.FSQ):
        def bound(self, z: Tensor, eps: float = 1e-3, hard_clamp: bool = False) -> Tensor:
            return 0 * z

        def forward(self, z: Tensor) -> Any:
            return self.quantize(z)

    assert not Own([5, 5])(torch.ones(1, 2, 2)).any()


@pytest.mark.parametrize("name", facade.VectorQuantize(**SMALL["VectorQuantize"])._codebook.uncalled)
def test_steps_of_a_codebook_are_not_overridden(name: str) -> None:
    codebook: Any = facade.VectorQuantize(**SMALL["VectorQuantize"])._codebook
    with pytest.raises(TypeError, match=rf"class Own overrides Codebook\.{name}, which no call of it goes through here"):
        type("Own", (type(codebook),), {name: replaced})
    with pytest.raises(TypeError, match=rf"{name} is set on Codebook\.{name}"):
        setattr(codebook, name, replaced)
    assert getattr(codebook, name).__func__ is getattr(type(codebook), name)


@pytest.mark.parametrize(("kind", "given"), DECODED)
@pytest.mark.parametrize("on_instance", [False, True])
def test_outputs_of_indices_are_those_of_the_codes_that_a_subclass_gives(kind: str, given: dict[str, Any], on_instance: bool) -> None:
    cls: Any = getattr(facade, kind)

    class Negated(cls):
        def get_codes_from_indices(self, indices: Tensor) -> Tensor:
            return -super().get_codes_from_indices(indices)

    module = cls(**given).eval() if on_instance else Negated(**given).eval()
    usual = copy.deepcopy(module)
    usual.__class__ = cls
    if on_instance:
        module.get_codes_from_indices = lambda indices: -cls.get_codes_from_indices(module, indices)
    with torch.no_grad():
        for part in (module, usual):
            part.project_out.bias.zero_()
    first = given.get("channel_last") is False
    x = torch.randn(2, module.project_out.out_features, 5)
    output, indices = usual(x if first else x.mT)[:2]
    indices[0, 0] = -1
    output = (output.mT if first else output).clone()
    output[0, 0] = 0.0
    torch.testing.assert_close(module.get_output_from_indices(indices), -(output.mT if first else output))
    torch.testing.assert_close(usual.get_output_from_indices(indices), output.mT if first else output)
    if kind.startswith("Residual"):
        asked = {"return_all_codes": True}
        torch.testing.assert_close(module(x.mT, **asked)[-1], -usual(x.mT, **asked)[-1])


@pytest.mark.parametrize("name", ["decay", "eps", "threshold_ema_dead_code"])
def test_a_tensor_without_axes_is_a_number(name: str) -> None:
    both("VectorQuantize", lambda module: setattr(module._codebook, name, torch.tensor(0.5)), SMALL["VectorQuantize"])
