"""What the arrays hold: every argument of the peer with more than one value, all that it takes, a case for each row of the table."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from facade import (
    strict,
    test_binary_mapper_facade,
    test_evo_lookup_free_quantization,
    test_finite_scalar_perturbation,
    test_finite_scalar_quantization,
    test_hierarchical_vq,
    test_latent_quantization,
    test_lookup_free_quantization,
    test_random_projection_quantizer,
    test_residual_vq,
    test_sim_vq,
    test_vector_quantize_facade,
)
from facade.compare import compare
from facade.peer import peer
from facade.strict import Array

STRICT: dict[str, Array] = {
    array.cls: array
    for module in (
        test_finite_scalar_quantization,
        test_lookup_free_quantization,
        test_sim_vq,
        test_latent_quantization,
        test_random_projection_quantizer,
        test_finite_scalar_perturbation,
        test_binary_mapper_facade,
        test_evo_lookup_free_quantization,
        test_hierarchical_vq,
    )
    for array in module.ARRAYS
}
ARRAYS: dict[str, dict[str, Any]] = {
    "VectorQuantize": test_vector_quantize_facade.MAKING | test_vector_quantize_facade.CALLING,
    "ResidualVQ": test_residual_vq.MAKING | test_residual_vq.CALLING,
    "GroupedResidualVQ": test_residual_vq.GROUPED | test_residual_vq.IN_GROUPS,
    **{cls: dict(array.options) for cls, array in STRICT.items()},
}
HANDED_ON = {
    "ResidualVQ": ("VectorQuantize",),
    "GroupedResidualVQ": ("ResidualVQ", "VectorQuantize"),
    "ResidualFSQ": ("FSQ",),
    "GroupedResidualFSQ": ("ResidualFSQ", "FSQ"),
    "ResidualLFQ": ("LFQ",),
    "GroupedResidualLFQ": ("ResidualLFQ", "LFQ"),
    "ResidualSimVQ": ("SimVQ",),
    "EvoLFQ": ("LFQ",),
    "RandomProjectionQuantizer": ("VectorQuantize",),
}
"""Whose arguments **kwargs are."""
VARIED = {"dim", "codebook_size", "x", "z", "logits", "levels"}
"""Sizes and inputs: what they are is varied, if at all, by other options."""
IN_CALL = {"sample_codebook_temp": "call_temperature", "freeze_codebook": "call_freeze", "beam_size": "call_beam_size"}
IN_CALL |= {"ema_update": "call_ema_update"}
ELSEWHERE: dict[str, dict[str, str]] = {
    "ResidualVQ": {
        "heads": "test_residual_vq::test_what_is_wrong_is_named",
        "indices": "test_residual_vq::test_indices_give_the_cross_entropy",
    },
    "GroupedResidualVQ": {
        "heads": "test_residual_vq::test_what_is_wrong_is_named",
        "indices": "test_residual_vq::test_indices_give_the_cross_entropy",
    },
    "EvoLFQ": dict.fromkeys(
        ("pop_size", "mutation_rate", "tournament_size", "elitism_count", "generations"),
        "test_evo_lookup_free_quantization::test_populations_on_the_same_draws_are_the_peers",
    )
    | dict.fromkeys(("encoder", "decoder"), "test_evo_lookup_free_quantization::test_a_pair_of_options_is_the_peers")
    | {"lfq": "test_evo_lookup_free_quantization::test_an_lfq_that_is_given_is_used"},
    "HierarchicalVQ": dict.fromkeys(("accept_image_fmap", "accept_3d_fmap"), "test_hierarchical_vq::test_a_pair_of_options_is_the_peers"),
}
"""Arguments that are no option of an array, with the test that varies them."""


def arguments(cls: str, method: str) -> set[str]:
    parameters = inspect.signature(getattr(getattr(peer, cls), method)).parameters.values()
    return {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)} - {"self"}


def is_varied(cls: str, name: str, *, in_call: bool) -> bool:
    array = ARRAYS[cls]
    name = IN_CALL[name] if in_call and IN_CALL.get(name) in array else name
    return name in VARIED or len(array.get(name, ())) > 1 or name in ELSEWHERE.get(cls, {}) or refuses_all(cls, name)


def refuses_all(cls: str, name: str) -> bool:
    """Whether a rule, which is seen to raise there, refuses whatever is no default of this argument."""
    return cls in STRICT and any({*changes} == {name} for changes, _ in STRICT[cls].refused)


@pytest.mark.parametrize("cls", ARRAYS)
def test_every_argument_is_an_option(cls: str) -> None:
    missing = {name for name in arguments(cls, "__init__") if not is_varied(cls, name, in_call=False)}
    missing |= {name for name in arguments(cls, "forward") if not is_varied(cls, name, in_call=True)}
    handed = {name for inner in HANDED_ON.get(cls, ()) for name in arguments(inner, "__init__")}
    missing |= {name for name in handed if not is_varied(cls, name, in_call=False)}
    assert not missing, missing


def test_the_tests_that_vary_others_are_there() -> None:
    modules = {value.__name__.rpartition(".")[2]: value for value in globals().values() if inspect.ismodule(value)}
    for tests in ELSEWHERE.values():
        for test in tests.values():
            module, _, name = test.partition("::")
            assert callable(getattr(modules[module], name)), test


@pytest.mark.parametrize("array, changes, is_refused", strict.rules(*STRICT.values()))
def test_what_no_row_holds_is_refused_there(array, changes, is_refused):
    array.check_refused(changes, is_refused)


@pytest.mark.parametrize("array", STRICT.values(), ids=STRICT)
def test_each_deviation_has_its_case(array):
    array.check_table()


@pytest.mark.parametrize("array, option", strict.cases(*STRICT.values()))
def test_what_deviates_stands_in_the_table(array, option, same_draws, monkeypatch):
    array.check_deviates(compare, option, monkeypatch)
