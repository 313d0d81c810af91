"""Where the facade is not what the peer is, on purpose: all that a comparison may skip. docs/migration.md has this table.

`option` is a condition on the arguments of the constructor and of the call together: terms joined by " & ", each a name, which has to be
given and to be true (not None, False, 0 or empty), or "name=value" by its repr. Anything else, as "eval()", is a name that no case has:
such a row is for people, and excuses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Deviation:
    """Class `cls` (a pattern) with `option` does something else than the peer; `test` is the node of the test that shows what is right.

    `defect` is a sentence on what is wrong there and what stands here instead. `parts`, patterns of names of parts of a comparison, are
    what may differ.
    """

    cls: str
    option: str
    test: str
    defect: str
    parts: tuple[str, ...] = ()

    def meets(self, cls: str, kwargs: Mapping[str, Any]) -> bool:
        """Whether it is about this class with these arguments."""
        return fnmatchcase(cls, self.cls) and all(_holds(term, kwargs) for term in self.option.split(" & "))


def _holds(term: str, kwargs: Mapping[str, Any]) -> bool:
    name, equals, value = term.partition("=")
    if name not in kwargs:
        return False
    given = kwargs[name]
    if equals:
        return not isinstance(given, Tensor) and repr(given) == value
    return isinstance(given, Tensor) or bool(given)


_VQ = "tests/facade/test_vector_quantize_facade.py::"

_OF_VECTOR_QUANTIZE = (
    Deviation(
        "VectorQuantize",
        "mask",
        _VQ + "test_an_index_of_minus_one_gives_zeros",
        "the index -1 of a masked position decodes to the last code; here to zeros",
        ("decode.*",),
    ),
)

_RESIDUAL = "tests/facade/test_residual_vq.py::"
_AFTER_A_STEP = ("state", "eval.*", "decode.*")

_OF_RESIDUALS = (
    Deviation(
        "ResidualVQ",
        "beam_size",
        _RESIDUAL + "test_a_beam_goes_by_the_error_of_the_path_and_trains_all_layers",
        "a beam search trains the codebook of the first layer alone; here those of all layers, by the chosen path",
        _AFTER_A_STEP,
    ),
    Deviation(
        "ResidualVQ",
        "beam_size & beam_score_quantizer_weights=None",
        _RESIDUAL + "test_a_beam_goes_by_the_error_of_the_path_and_trains_all_layers",
        "paths compete by the sum of the errors after each layer; here, unless weights are given, by the error of the whole path",
        ("*",),
    ),
    Deviation(
        "ResidualVQ",
        "beam_size & use_cosine_sim",
        _RESIDUAL + "test_a_beam_of_directions_goes_by_the_error_of_the_path",
        "with cosine similarity paths compete by the errors of directions; here by those of the vectors",
        ("*",),
    ),
    Deviation(
        "*ResidualVQ",
        "mask & use_cosine_sim",
        _RESIDUAL + "test_a_mask_of_ones_is_no_mask_with_cosine_similarity",
        "with a mask the commitment loss compares codes of length 1 with inputs of any length; here with their directions, mask or not",
        ("output.2", "input_gradient", "parameter_gradient", *_AFTER_A_STEP),
    ),
    Deviation(
        "*ResidualVQ",
        "mask & codebook_dim",
        _RESIDUAL + "test_masked_positions_decode_to_zeros_behind_a_projection",
        "indices of -1 decode to the bias of the output projection; here to zeros, as a call gives them",
        ("decode.get_output_from_indices",),
    ),
    Deviation(
        "ResidualVQ",
        "diveq & accept_image_fmap",
        _RESIDUAL + "test_directional_images_are_as_sequences",
        "the direction of the error of an image is taken along its rows; here along the width, as everywhere",
        ("*",),
    ),
    Deviation(
        "ResidualVQ",
        "implicit_neural_codebook & accept_image_fmap",
        _RESIDUAL + "test_networks_of_images_are_told_the_code_of_each_place",
        "the networks are told rows of the image instead of the codes of its places; here the codes",
        ("*",),
    ),
    Deviation(
        "*ResidualVQ",
        "return_all_codes",
        _RESIDUAL + "test_codes_of_a_call_are_those_of_its_output",
        "codes are looked up after the step of the call, and are not those of its output; here they are",
        ("output.3*",),
    ),
    Deviation(
        "ResidualVQ",
        "freeze_codebook=True",
        _RESIDUAL + "test_frozen_means_frozen",
        "freeze_codebook of the constructor is ignored, and lets gradients reach learnable codes; frozen means frozen here",
        ("parameter_gradient", *_AFTER_A_STEP),
    ),
    Deviation(
        "ResidualVQ",
        "diveq",
        _RESIDUAL + "test_directional_noise_is_for_training_alone",
        "noise in eval mode too, so that the output is not what its indices decode to; here in training alone",
        ("eval.0",),
    ),
    Deviation(
        "*ResidualVQ",
        "accept_image_fmap",
        _RESIDUAL + "test_images_of_any_size",
        "images work only where width = height = dim, without codebook_dim; get_output_from_indices returns the width last, in groups "
        "wrong values. Here images of any size, decoded to what a call gives",
        ("decode.get_output_from_indices",),
    ),
    Deviation(
        "ResidualVQ",
        "channel_last, accept_3d_fmap",
        _RESIDUAL + "test_channels_first_and_volumes",
        "raises with channel_last=False and accept_3d_fmap=True; here both are layouts like others",
    ),
    Deviation(
        "ResidualVQ",
        "get_codes_from_indices(coarse)",
        _RESIDUAL + "test_coarse_indices_need_no_dropout",
        "indices of the first layers alone decode only with quantize_dropout=True; here always",
    ),
    Deviation(
        "*ResidualVQ",
        "forward(indices)",
        _RESIDUAL + "test_indices_give_the_cross_entropy",
        "raises, as it unpacks three of two values; here (quantized, cross-entropy)",
    ),
    Deviation(
        "ResidualVQ",
        "shared_codebook with threshold_ema_dead_code",
        _RESIDUAL + "test_a_shared_codebook_expires_once_a_call",
        "codes are replaced between the layers of one call; here once, behind it",
    ),
    Deviation(
        "ResidualVQ",
        "shared_codebook with in_place_codebook_optimizer",
        _RESIDUAL + "test_the_own_optimizer_of_a_shared_codebook_steps",
        "the optimizer never steps; here once a call",
    ),
    Deviation(
        "*ResidualVQ",
        "activation checkpointing",
        _RESIDUAL + "test_recomputation_updates_once",
        "the recomputation is a second step of the codebooks, and the gradient of the input is wrong; here it is none",
    ),
    Deviation(
        "*ResidualVQ",
        "vectors that are not finite, empty input, full masks",
        _RESIDUAL + "test_what_is_not_finite_or_masked_takes_no_part",
        "one NaN makes every code NaN, and inputs without a vector raise or lose NaN; here they take no part, with index -1",
    ),
    Deviation(
        "ResidualVQ",
        "kmeans_init in eval mode",
        _RESIDUAL + "test_k_means_start",
        "k-means runs in eval mode, on what is to be evaluated, and decoding before it gives zeros; here both raise ValueError",
    ),
    Deviation(
        "*ResidualVQ",
        "indices and masks that do not fit",
        _RESIDUAL + "test_what_is_wrong_is_named",
        "an index past the end reads another layer's codebook, -1 the last code; here ValueError and zeros",
    ),
)

DEVIATIONS: tuple[Deviation, ...] = (*_OF_VECTOR_QUANTIZE, *_OF_RESIDUALS)


USED: set[Deviation] = set()
"""Rows that excused a difference so far."""


def excused(cls: str, kwargs: Mapping[str, Any], part: str) -> bool:
    """Whether this part of a comparison of `cls` with these arguments, those of the call among them, may differ."""
    found = [row for row in DEVIATIONS if row.meets(cls, kwargs) and any(fnmatchcase(part, pattern) for pattern in row.parts)]
    USED.update(found)
    return bool(found)
