"""Every argument of the peer's constructors and calls is an option of a covering array, with more than one value."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from facade import (
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
from facade.peer import peer

ARRAYS: dict[str, dict[str, Any]] = {
    "VectorQuantize": test_vector_quantize_facade.MAKING | test_vector_quantize_facade.CALLING,
    "ResidualVQ": test_residual_vq.MAKING | test_residual_vq.CALLING,
    "GroupedResidualVQ": test_residual_vq.GROUPED | test_residual_vq.IN_GROUPS,
    "FSQ": test_finite_scalar_quantization.OPTIONS,
    "ResidualFSQ": test_finite_scalar_quantization.RESIDUAL_OPTIONS,
    "GroupedResidualFSQ": test_finite_scalar_quantization.GROUPED_OPTIONS,
    "LFQ": test_lookup_free_quantization.OPTIONS,
    "ResidualLFQ": test_lookup_free_quantization.RESIDUAL_OPTIONS,
    "GroupedResidualLFQ": test_lookup_free_quantization.GROUPED_OPTIONS,
    "SimVQ": test_sim_vq.OPTIONS,
    "ResidualSimVQ": test_sim_vq.RESIDUAL_OPTIONS,
    "LatentQuantize": test_latent_quantization.OPTIONS,
    "RandomProjectionQuantizer": test_random_projection_quantizer.OPTIONS,
    "FSP": test_finite_scalar_perturbation.OPTIONS,
    "BinaryMapper": test_binary_mapper_facade.OPTIONS,
    "EvoLFQ": test_evo_lookup_free_quantization.OPTIONS,
    "HierarchicalVQ": test_hierarchical_vq.OPTIONS,
}
HANDED_ON = {
    "ResidualVQ": ("VectorQuantize",),
    "GroupedResidualVQ": ("ResidualVQ", "VectorQuantize"),
    "ResidualFSQ": ("FSQ",),
    "GroupedResidualFSQ": ("ResidualFSQ", "FSQ"),
    "ResidualLFQ": ("LFQ",),
    "GroupedResidualLFQ": ("ResidualLFQ", "LFQ"),
    "ResidualSimVQ": ("SimVQ",),
}
"""Whose arguments **kwargs are; those of EvoLFQ and RandomProjectionQuantizer are options of the arrays of LFQ and VectorQuantize."""
VARIED = {"dim", "codebook_size", "x", "z", "logits", "levels"}
"""Sizes and inputs: what they are is varied, if at all, by other options."""
IN_CALL = {"sample_codebook_temp": "call_temperature", "freeze_codebook": "call_freeze", "beam_size": "call_beam_size"}
IN_CALL |= {"ema_update": "call_ema_update"}
OF_A_LAYER = {
    "channel_first",
    "has_projections",
    "keep_num_codebooks_dim",
    "num_codebooks",
    "codebook_scale",
    "return_indices",
    "preserve_symmetry",
}
"""What a residual quantizer settles for its layers, there and here."""
ELSEWHERE: dict[str, dict[str, str]] = {
    "ResidualVQ": {
        "heads": "test_residual_vq::test_what_is_wrong_is_named",
        "indices": "test_residual_vq::test_indices_give_the_cross_entropy",
    },
    "GroupedResidualVQ": {
        "heads": "test_residual_vq::test_what_is_wrong_is_named",
        "indices": "test_residual_vq::test_indices_give_the_cross_entropy",
    },
    "GroupedResidualLFQ": {"accept_image_fmap": "test_lookup_free_quantization::test_images_decode_to_what_they_gave"},
    "GroupedResidualFSQ": {"is_channel_first": "test_finite_scalar_quantization::test_every_pair_of_options_of_the_grouped_form"},
    "ResidualSimVQ": {"heads": "test_sim_vq::test_arguments_that_do_not_fit_are_named"},
    "LatentQuantize": {
        "in_place_codebook_optimizer": "test_latent_quantization::test_values_step_in_place_before_they_are_read_and_once_a_call"
    },
    "EvoLFQ": dict.fromkeys(
        ("pop_size", "mutation_rate", "tournament_size", "elitism_count", "generations"),
        "test_evo_lookup_free_quantization::test_populations_on_the_same_draws_are_the_peers",
    )
    | dict.fromkeys(("encoder", "decoder", "lfq"), "test_evo_lookup_free_quantization::test_a_pair_of_options_is_the_peers"),
    "HierarchicalVQ": {
        "indices": "test_hierarchical_vq::test_indices_are_taken_by_neither",
        "kmeans_init": "test_hierarchical_vq::test_k_means_starts_at_what_all_levels_see",
        "kmeans_iters": "test_hierarchical_vq::test_k_means_starts_at_what_all_levels_see",
        "scales": "test_hierarchical_vq::test_a_pair_of_options_is_the_peers",
        "accept_image_fmap": "test_hierarchical_vq::test_a_pair_of_options_is_the_peers",
        "accept_3d_fmap": "test_hierarchical_vq::test_a_pair_of_options_is_the_peers",
    },
}
"""Arguments that are no option of an array, with the test that varies them."""


def arguments(cls: str, method: str) -> set[str]:
    parameters = inspect.signature(getattr(getattr(peer, cls), method)).parameters.values()
    return {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)} - {"self"}


def is_varied(cls: str, name: str, *, in_call: bool) -> bool:
    array = ARRAYS[cls]
    name = IN_CALL[name] if in_call and IN_CALL.get(name) in array else name
    return name in VARIED or len(array.get(name, ())) > 1 or name in ELSEWHERE.get(cls, {})


@pytest.mark.parametrize("cls", ARRAYS)
def test_every_argument_is_an_option(cls: str) -> None:
    missing = {name for name in arguments(cls, "__init__") if not is_varied(cls, name, in_call=False)}
    missing |= {name for name in arguments(cls, "forward") if not is_varied(cls, name, in_call=True)}
    handed = {name for inner in HANDED_ON.get(cls, ()) for name in arguments(inner, "__init__")} - OF_A_LAYER
    missing |= {name for name in handed if not is_varied(cls, name, in_call=False)}
    assert not missing, missing


def test_the_tests_that_vary_others_are_there() -> None:
    modules = {value.__name__.rpartition(".")[2]: value for value in globals().values() if inspect.ismodule(value)}
    for tests in ELSEWHERE.values():
        for test in tests.values():
            module, _, name = test.partition("::")
            assert callable(getattr(modules[module], name)), test
