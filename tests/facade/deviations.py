"""Where the facade is not what the peer is, on purpose: all that a comparison may skip. docs/migration.md has this table.

`option` is a condition on the arguments of the constructor and of the call together: terms joined by " & ", each a name, which has to be
given and to be true (not None, False, 0 or empty), or "name=value" by its repr, "name=value or value" for one of several; with "not "
before it the opposite. Beside the arguments there are the names of `facts`, and of those that a comparison knows. Anything else, as
"eval()", is a name that no case has: such a row is for people, and excuses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Deviation:
    """Class `cls` with `option` does something else than the peer; `test` is the node of the test that shows what is right.

    `cls` is a pattern, or several joined by " or ". `defect` is a sentence on what is wrong there and what stands here instead. `parts`,
    patterns of names of parts of a comparison, are what may differ.
    """

    cls: str
    option: str
    test: str
    defect: str
    parts: tuple[str, ...] = ()

    def of(self, cls: str) -> bool:
        """Whether it is about this class."""
        return any(fnmatchcase(cls, pattern) for pattern in self.cls.split(" or "))

    def meets(self, cls: str, kwargs: Mapping[str, Any]) -> bool:
        """Whether it is about this class with these arguments."""
        return self.of(cls) and self.holds({**kwargs, **facts(kwargs)})

    def holds(self, known: Mapping[str, Any]) -> bool:
        """Whether `option` does, of arguments and facts."""
        return all(_holds(*term, known) for term in _terms(self.option))

    def covers(self, part: str) -> bool:
        """Whether this part may differ; the name of a part stands for all that are named NAME.MORE, too."""
        return any(fnmatchcase(part, pattern) or fnmatchcase(part, f"{pattern}.*") for pattern in self.parts)


def facts(kwargs: Mapping[str, Any]) -> dict[str, bool]:
    """What arguments of a constructor and a call come to, in the peer: facts, and arguments that others overrule."""
    given = kwargs.get
    whole = bool(given("diveq") or given("implicit_neural_codebook"))
    apart = bool(given("directional_reparam")) or given("vq_bridge") is not None
    ema, learnable = (given(name) for name in ("ema_update", "learnable_codebook"))
    ema = not whole and (not apart if ema is None else bool(ema))
    learnable = whole or (apart if learnable is None else bool(learnable))
    frozen = bool(given("freeze_codebook")) and not given("frozen at construction")
    expires = (given("threshold_ema_dead_code") or 0) > 0
    follows = ema and (not given("manual_ema_update") or bool(given("shared_codebook")))
    steps = not frozen and given("topk") is None and not given("accum_ema_update")
    by_scores = bool(given("commitment_use_cross_entropy_loss")) or (given("codebook_diversity_loss_weight") or 0) > 0
    return {
        "learned codes": learnable or (given("orthogonal_reg_weight") or 0) > 0,
        "moving averages": follows and not frozen,
        "counted codes": (ema or expires) and not frozen,
        "codes that move in the call": (follows or expires) and steps,
        "gradients by codes": by_scores
        or given("route_gradients_to_input") is False
        or any(map(given, ("directional_reparam", "sync_update_v"))),
        "width first": bool(given("accept_image_fmap") or given("accept_3d_fmap") or given("channel_last") is False),
        "masked": any(given(name) is not None and given(name) is not False for name in ("mask", "lens")),
        "bits behind projections": _projects_bits(kwargs),
        "noise_dropout but 0.5": (given("noise_dropout") or 0.5) != 0.5,
        "unequal levels": isinstance(given("levels"), (list, tuple)) and len({*kwargs["levels"]}) > 1,
        **({"route_gradients_to_input": False} if given("diveq") else {}),
    }


def of_residuals(kwargs: Mapping[str, Any], calls: Mapping[str, Any]) -> dict[str, bool]:
    """What those of a residual quantizer are only when one knows which of them belong to the call."""
    if "num_quantizers" not in kwargs:
        return {}
    paths = [calls.get("beam_size") or kwargs.get(name) or 1 for name in ("beam_size", "eval_beam_size")]
    paths[1] = max(paths[1], paths[0] if kwargs.get("eval_beam_size") is None else 1)
    return {
        "a beam": max(paths) > 1,
        "a beam in training": paths[0] > 1,
        "frozen at construction": bool(kwargs.get("freeze_codebook")) and not calls.get("freeze_codebook"),
    }


def _projects_bits(kwargs: Mapping[str, Any]) -> bool:
    """Whether a quantizer of bits has a linear layer on either side."""
    dim, size = kwargs.get("dim"), kwargs.get("codebook_size")
    if kwargs.get("has_projections") is not None or dim is None or not isinstance(size, int | None):
        return bool(kwargs.get("has_projections"))
    return dim != (dim if size is None else size.bit_length() - 1) * (kwargs.get("num_codebooks") or 1)


def of_input(x: Tensor, kwargs: Mapping[str, Any], calls: Mapping[str, Any]) -> dict[str, bool]:
    """What inputs are."""
    mask, dim = calls.get("mask"), kwargs.get("dim")
    width = dim or len(kwargs.get("levels") or ()) if isinstance(kwargs.get("levels"), (list, tuple)) else dim
    return {
        "sequences": x.dim() > 2,
        "images": x.dim() > 3,
        "images whose width is last": x.dim() > 3 and x.shape[-1] == dim != x.shape[1],
        "no vectors": x.numel() == 0 or (isinstance(mask, Tensor) and not mask.any()),
        "one vector": x.numel() == width,
        "a mask of positions": isinstance(mask, Tensor) and mask.dim() > 1,
        "float64": x.dtype == torch.float64,
    }


@cache
def _terms(option: str) -> tuple[tuple[bool, str, tuple[str, ...]], ...]:
    """Of each term whether it is asked for, the name, and the values it may have."""
    terms = []
    for term in option.split(" & "):
        name, equals, values = term.removeprefix("not ").partition("=")
        terms.append((not term.startswith("not "), name, tuple(values.split(" or ")) if equals else ()))
    return tuple(terms)


def _holds(asked: bool, name: str, values: tuple[str, ...], known: Mapping[str, Any]) -> bool:
    given = known.get(name)
    if values:
        return (name in known and not isinstance(given, Tensor) and repr(given) in values) == asked
    return (isinstance(given, Tensor) or bool(given)) == asked


_FSQ = "tests/facade/test_finite_scalar_quantization.py::"

_SCALARS = (
    Deviation(
        "FSQ or *ResidualFSQ",
        "scale",
        f"{_FSQ}test_codes_are_scaled",
        "`scale` is ignored there; here it multiplies the codes",
        ("output.*", "eval.*", "decode.*", "*gradient", "state"),
    ),
    Deviation(
        "FSQ",
        "noise_dropout but 0.5",
        f"{_FSQ}test_noise_moves_the_share_that_was_asked_for",
        "whatever `noise_dropout` says, half of the scalars are moved there; here so many",
        ("output.0", "*gradient"),
    ),
    Deviation(
        "*ResidualFSQ",
        "noise_dropout but 0.5",
        f"{_FSQ}test_noise_moves_the_share_that_was_asked_for",
        "so in each layer",
        ("output.*", "*gradient"),
    ),
    Deviation(
        "FSQ or *ResidualFSQ",
        "noise_dropout & float64",
        f"{_FSQ}test_the_outermost_codes_have_a_gradient_in_float64",
        "the steps of codes are float32, so that the outermost codes of float64 inputs lie outside of -1 and 1 and have no gradient once "
        "they are cut off; here they have theirs",
        ("*gradient",),
    ),
    Deviation(
        "FSQ",
        "force_quantization_f32=False & narrow inputs",
        f"{_FSQ}test_narrow_inputs_are_rounded_in_float32",
        "bfloat16 and half may be rounded in their own precision there, and other codes found; here in float32, whatever `allowed_dtypes`",
    ),
    Deviation(
        "FSQ",
        "codes_to_indices & orthogonal_rotation",
        f"{_FSQ}test_codes_that_were_turned_have_their_own_indices",
        "`codes_to_indices` forgets the rotation there; here it is the opposite of `indices_to_codes`",
    ),
    Deviation(
        "FSQ",
        "more than 2^24 codes",
        f"{_FSQ}test_more_codes_than_a_float_or_an_int32_numbers_round_trip",
        "indices are sums of float32 there, and of int32: wrong beyond 2^24 and 2^31 codes; here they are exact, and int64 beyond 2^31",
    ),
    Deviation(
        "FSQ",
        "return_indices=True & construction",
        f"{_FSQ}test_no_list_of_codes_is_made_and_none_is_needed_on_the_meta_device",
        "all codes are listed at construction there, which the meta device cannot do; here when `implicit_codebook` is read",
    ),
    Deviation(
        "FSQ",
        "indices out of range",
        f"{_FSQ}test_indices_that_there_are_not_are_refused",
        "an index below 0 or past the end wraps there; here it is an error, and -1 decodes to zeros",
    ),
    Deviation(
        "FSQ",
        "inputs that are not finite",
        f"{_FSQ}test_a_vector_that_is_not_finite_has_no_code_and_no_gradient",
        "NaN spreads to the gradients of the projections there; here such a vector has index -1, zeros and no gradient",
    ),
    Deviation(
        "*ResidualFSQ",
        "is_channel_first",
        f"{_FSQ}test_channel_first_decodes_to_what_it_gave",
        "indices of channel-first inputs are read in another layout than they are given there, and mostly raise; here they decode",
        ("decode.*",),
    ),
    Deviation(
        "*ResidualFSQ",
        "is_channel_first & return_all_codes",
        f"{_FSQ}test_channel_first_decodes_to_what_it_gave",
        "so do the codes that a call with channel-first inputs returns there; here they are those of the indices",
        ("output.2", "eval.2"),
    ),
    Deviation(
        "*ResidualFSQ",
        "orthogonal_rotation",
        f"{_FSQ}test_turned_layers_decode_to_what_they_gave",
        "decoding forgets the rotation of the layers there; here it gives what the call gave",
        ("decode.*", "output.2", "eval.2"),
    ),
    Deviation(
        "*ResidualFSQ",
        "orthogonal_rotation & unequal levels",
        f"{_FSQ}test_turned_layers_are_each_as_fine_as_a_step_before_in_their_axes",
        "with unequal levels the scalars of a turned layer are scaled by the steps of other axes there; here by those of their own",
        ("output.*", "eval.*", "decode.*", "*gradient", "state"),
    ),
    Deviation(
        "*ResidualFSQ",
        "channel_first",
        f"{_FSQ}test_layouts_that_are_none_are_refused",
        "handed to the layers, it makes them take the width from another axis than the residuals have it, which works where both are as "
        "long; here an error, as `is_channel_first` is meant",
        ("raises",),
    ),
    Deviation(
        "*ResidualFSQ",
        "images & not is_channel_first",
        f"{_FSQ}test_layouts_that_are_none_are_refused",
        "images whose width is last are quantized along their rows there, where these are as long; here an error",
        ("raises",),
    ),
    Deviation(
        "GroupedResidualFSQ",
        "accept_image_fmap & not is_channel_first",
        f"{_FSQ}test_images_of_groups_need_to_be_announced_once",
        "the layers take rows of images for vectors, where these are as long; here `accept_image_fmap` alone is enough",
        ("output.*", "eval.*", "decode.*", "*gradient", "state"),
    ),
    Deviation(
        "GroupedResidualFSQ",
        "is_channel_first & not accept_image_fmap & groups=2",
        f"{_FSQ}test_images_of_groups_need_to_be_announced_once",
        "groups are parts of the last axis, and read as if they had their width first; here `is_channel_first` alone is enough",
        ("raises",),
    ),
    Deviation(
        "*ResidualFSQ",
        "a coarse prefix of indices",
        f"{_FSQ}test_the_first_layers_decode_whether_or_not_layers_are_dropped",
        "indices of the first layers alone decode there only with quantize_dropout; here always",
    ),
    Deviation(
        "*ResidualFSQ",
        "quantize_dropout & torch.no_grad()",
        f"{_FSQ}test_layers_are_dropped_in_training_whether_or_not_a_gradient_is_asked_for",
        "under no_grad, as in reentrant checkpointing, no layer is dropped in training there; here as in any training call",
    ),
    Deviation(
        "*ResidualFSQ",
        "quantize_dropout_cutoff_index past the layers",
        f"{_FSQ}test_a_cutoff_behind_the_last_layer_is_refused",
        "accepted at construction there, an error in the first training call; here an error at construction",
    ),
)

_LFQ = "tests/facade/test_lookup_free_quantization.py::"
_SIM = "tests/facade/test_sim_vq.py::"
_RANDOM = "tests/facade/test_random_projection_quantizer.py::"
_LATENT = "tests/facade/test_latent_quantization.py::"

_SIGNS = (
    Deviation(
        "*LFQ",
        "a mask of positions",
        f"{_LFQ}test_a_mask_of_positions_is_a_choice_of_vectors",
        "with a mask [batch, time] each vector is a batch of its own there, so that the two entropies are equal; here all are one",
        ("output.*entropy_aux_loss", "output.1.*", "output.2", "*gradient"),
    ),
    Deviation(
        "*LFQ",
        "no vectors",
        f"{_LFQ}test_no_vectors_have_no_loss",
        "the losses of an empty input, or of a mask that leaves no vector, are NaN there; here 0",
        ("output.*entropy_aux_loss", "output.1.*", "output.2", "*gradient"),
    ),
    Deviation(
        "*LFQ",
        "mask of another shape or dtype",
        f"{_LFQ}test_masks_that_do_not_fit_are_refused",
        "numbers index the batch there, and shapes fail from inside; here an error that says what a mask is",
    ),
    Deviation(
        "*LFQ",
        "probabilities below 1e-5",
        f"{_LFQ}test_the_entropy_of_a_vector_counts_every_code",
        "the logarithm in the entropy of a vector has a floor of 1e-5 there, too much with many codes; here it is exact",
    ),
    Deviation(
        "*LFQ",
        "indices out of range",
        f"{_LFQ}test_indices_that_there_are_not_are_refused",
        "an index past the end loses its high bits there, or is an error of indexing; here always an error, and -1 decodes to zeros",
    ),
    Deviation(
        "*LFQ",
        "frac_per_sample_entropy=0.01",
        f"{_LFQ}test_a_small_share_of_the_vectors_is_at_least_one",
        "a share below one vector, as 0.01 of fewer than 100, gives NaN there; here it is one vector",
        ("output.*entropy_aux_loss", "output.1.*", "output.2", "*gradient"),
    ),
    Deviation(
        "LFQ",
        "force_quantization_f32=False & narrow inputs",
        f"{_LFQ}test_narrow_inputs_have_the_entropy_of_float32",
        "bfloat16 and half may have the entropy of their own precision there; here that of float32, whatever is asked for",
    ),
    Deviation(
        "*LFQ",
        "several processes",
        f"{_LFQ}test_the_entropy_is_that_of_all_ranks",
        "the mean over processes is thrown away there, and the own one divided by their number; here it is that of all vectors",
    ),
    Deviation(
        "*ResidualLFQ",
        "spherical",
        f"{_LFQ}test_codes_that_were_moved_decode_to_what_they_gave",
        "decoding forgets the sphere there; here it gives what the call gave, and `codebooks` are the codes that are added up",
        ("decode.*", "output.3", "eval.3"),
    ),
    Deviation(
        "*ResidualLFQ",
        "orthogonal_rotation",
        f"{_LFQ}test_codes_that_were_moved_decode_to_what_they_gave",
        "decoding forgets the rotation there; here it gives what the call gave",
        ("decode.*", "output.3", "eval.3"),
    ),
    Deviation(
        "*ResidualLFQ",
        "images",
        f"{_LFQ}test_images_decode_to_what_they_gave",
        "images with a projection or dropped layers fail there, and decode in another layout; here they decode to the output",
        ("decode.get_output_from_indices",),
    ),
    Deviation(
        "*ResidualLFQ",
        "channel_first",
        f"{_LFQ}test_images_decode_to_what_they_gave",
        "so do all inputs with `channel_first`",
        ("decode.get_output_from_indices",),
    ),
    Deviation(
        "*ResidualLFQ",
        "images whose width is last",
        f"{_LFQ}test_images_whose_width_is_last_are_refused",
        "images whose width is last are quantized along their rows there, where these are as long as a code is wide; here an error",
        ("raises",),
    ),
    Deviation(
        "*ResidualLFQ",
        "quantize_dropout & torch.no_grad()",
        f"{_LFQ}test_layers_are_dropped_in_training_whether_or_not_a_gradient_is_asked_for",
        "under no_grad, as in reentrant checkpointing, no layer is dropped in training there; here as in any training call",
    ),
    Deviation(
        "SimVQ",
        "codebook_transform=Centred()",
        f"{_SIM}test_the_map_sees_the_whole_table_once",
        "decoding maps the table and the chosen rows apart there: other codes where rows depend on each other, as once they are centred; "
        "here one map of the table",
        ("decode.*",),
    ),
    Deviation(
        "*SimVQ",
        "indices out of range",
        f"{_SIM}test_indices_that_there_are_not_are_refused",
        "-1 decodes to the last code there, or to zeros; here always to zeros, and other indices that there are not are an error",
    ),
    Deviation(
        "ResidualSimVQ",
        "quantize_dropout of images",
        f"{_SIM}test_dropped_layers_of_any_input_have_no_index_no_loss_and_no_gradient",
        "dropped layers of images whose width is last fail there; here they have index -1 as elsewhere",
    ),
    Deviation(
        "ResidualSimVQ",
        "a coarse prefix of indices",
        f"{_SIM}test_the_first_layers_decode_whether_or_not_layers_are_dropped",
        "indices of the first layers alone decode there only with quantize_dropout, and `codebook_dim` fails; here both work",
    ),
    Deviation(
        "RandomProjectionQuantizer",
        "indices & num_codebooks=2",
        f"{_RANDOM}test_nothing_in_it_learns",
        "the projections within `vq` that several codebooks have get gradients there, against the paper; here they are stored and stay",
        ("parameter_gradient.vq.project_*",),
    ),
    Deviation(
        "RandomProjectionQuantizer",
        "indices & num_codebooks=2 & an optimizer",
        f"{_RANDOM}test_nothing_in_it_learns",
        "and are trained",
        ("state.vq.project_*", "output.*", "*gradient", "eval.*"),
    ),
    Deviation(
        "RandomProjectionQuantizer",
        "indices & orthogonal_reg_weight",
        f"{_RANDOM}test_nothing_in_it_learns",
        "so have the codes with `orthogonal_reg_weight`; here they stay",
        ("parameter_gradient.vq._codebook.embed",),
    ),
    Deviation(
        "RandomProjectionQuantizer",
        "indices & orthogonal_reg_weight & an optimizer",
        f"{_RANDOM}test_nothing_in_it_learns",
        "and are trained",
        ("state.vq._codebook.embed", "output.*", "*gradient", "eval.*"),
    ),
    Deviation(
        "RandomProjectionQuantizer",
        "kmeans_init",
        f"{_RANDOM}test_k_means_is_no_matter_of_a_quantizer_that_never_learns",
        "the first call, whatever it is, moves the codes that should be random to its vectors; here an error, unless "
        "`vq._codebook.init_embed_` has set them",
        ("raises",),
    ),
    Deviation(
        "LatentQuantize",
        "commitment_loss_weight",
        f"{_LATENT}test_each_loss_pulls_what_it_is_named_for",
        "the loss compares output and input there, and pushes the input away; here it pulls the projected scalars to their values",
        ("output.2", "*gradient"),
    ),
    Deviation(
        "LatentQuantize",
        "quantization_loss_weight",
        f"{_LATENT}test_each_loss_pulls_what_it_is_named_for",
        "the values never get a gradient there; here this loss pulls them to the scalars",
        ("output.2", "*gradient"),
    ),
    Deviation(
        "LatentQuantize",
        "commitment_loss_weight & an optimizer",
        f"{_LATENT}test_each_loss_pulls_what_it_is_named_for",
        "so do its steps",
        ("output.*", "*gradient", "state", "eval.*", "decode.*"),
    ),
    Deviation(
        "LatentQuantize",
        "quantization_loss_weight & an optimizer",
        f"{_LATENT}test_each_loss_pulls_what_it_is_named_for",
        "so do its steps",
        ("output.*", "*gradient", "state", "eval.*", "decode.*"),
    ),
    Deviation(
        "LatentQuantize",
        "in_place_codebook_optimizer",
        f"{_LATENT}test_values_step_in_place_before_they_are_read_and_once_a_call",
        "an error in the first training call there; here a step of the values in each, and none in a recomputation",
    ),
    Deviation(
        "LatentQuantize",
        "learned values",
        f"{_LATENT}test_learned_values_decode_and_are_encoded",
        "indices and codes are those of the values at the start there; here of those that were learned",
    ),
    Deviation(
        "LatentQuantize",
        "optimize_values=False & .to()",
        f"{_LATENT}test_fixed_values_move_with_the_module_and_are_not_stored",
        "values that are not learned stay on their device there; here they move with the module",
    ),
    Deviation(
        "LatentQuantize",
        "indices out of range",
        f"{_LATENT}test_indices_that_there_are_not_are_refused",
        "an index below 0 or past the end wraps there; here it is an error, and -1 decodes to zeros",
    ),
)

_VQ = "tests/facade/test_vector_quantize_facade.py::"

_LAYERS = "VectorQuantize or *ResidualVQ"
_ALL = f"{_LAYERS} or HierarchicalVQ"

_OF_VECTOR_QUANTIZE = (
    Deviation(
        "VectorQuantize",
        "mask, lens",
        _VQ + "test_an_index_of_minus_one_gives_zeros",
        "the index -1 of a masked position decodes to the last code; here to zeros",
    ),
    Deviation(
        "VectorQuantize",
        "heads=2 & not separate_codebook_per_head",
        _VQ + "test_decoding_gives_what_a_call_gave",
        "indices of heads that share a codebook decode to another shape, or raise; here to what the call gave",
        ("decode.*",),
    ),
    Deviation(
        _LAYERS,
        "vq_bridge",
        _VQ + "test_decoding_gives_what_a_call_gave",
        "indices decode to the stored vectors, without the bridge; here to what the call gave",
        ("decode.*",),
    ),
    Deviation(
        _LAYERS,
        "commitment_use_cross_entropy_loss & codes that move in the call",
        _VQ + "test_losses_by_scores_have_the_gradient_of_the_codes_they_saw",
        "the gradient of the cross-entropy goes through codes updated meanwhile; here through those that it saw",
        ("input_gradient", "parameter_gradient"),
    ),
    Deviation(
        "VectorQuantize",
        "indices & codes that move in the call",
        _VQ + "test_losses_by_scores_have_the_gradient_of_the_codes_they_saw",
        "the cross-entropy of given codes has the gradient of codes updated meanwhile; here of those that it saw",
        ("input_gradient", "parameter_gradient"),
    ),
    Deviation(
        _LAYERS,
        "straight_through & not route_gradients_to_input & codes that move in the call",
        _VQ + "test_losses_by_scores_have_the_gradient_of_the_codes_they_saw",
        "the gradient of the softmax goes through codes updated meanwhile; here through those that it saw",
        ("input_gradient", "parameter_gradient"),
    ),
    Deviation(
        _LAYERS,
        "codebook_diversity_loss_weight & codes that move in the call",
        _VQ + "test_losses_by_scores_have_the_gradient_of_the_codes_they_saw",
        "the diversity has the gradient of codes updated meanwhile; here of those that it saw",
        ("input_gradient", "parameter_gradient"),
    ),
    Deviation(
        _LAYERS,
        "codebook_diversity_loss_weight & sequences",
        _VQ + "test_diversity_is_that_of_all_vectors_however_they_stand",
        "the diversity is that of the batch at each place in time; here of all vectors",
        ("output.2", "output.3.codebook_diversity", "input_gradient", "parameter_gradient"),
    ),
    Deviation(
        "VectorQuantize",
        "codebook_diversity_loss_weight & separate_codebook_per_head & heads=2",
        _VQ + "test_diversity_of_separate_codebooks_is_that_of_each",
        "the shares of codes of different codebooks that have the same index are added up; here the diversity is the mean over codebooks",
        ("output.2", "output.3.codebook_diversity", "input_gradient", "parameter_gradient"),
    ),
    Deviation(
        "VectorQuantize",
        "codebook_diversity_loss_weight, shares below 1e-5",
        _VQ + "test_diversity_counts_every_code",
        "the logarithm in the entropy has a floor of 1e-5; here none",
    ),
    Deviation(
        "VectorQuantize",
        "scores of vectors on or near a code, or far from 0",
        _VQ + "test_scores_are_as_exact_near_a_code_as_elsewhere",
        "distances are differences of squares in float32 with a floor of 1e-4, wrong where they are small beside the vectors; here exact",
    ),
    Deviation(
        _LAYERS,
        "orthogonal_reg_weight & codes that move in the call",
        _VQ + "test_orthogonality_is_that_of_the_codes_that_the_call_saw",
        "the loss is that of codes that have been updated meanwhile; here of those that gave the output",
        ("output.2", "output.3.orthogonal_reg", "parameter_gradient.*embed"),
    ),
    Deviation(
        "VectorQuantize",
        "codebook = codes, before a step",
        _VQ + "test_codes_that_are_assigned_learn_from_where_they_are",
        "the moving averages stay, so that a step takes the codes most of the way back, and codes that learn cannot be assigned; here the "
        "averages are those of the assigned codes",
    ),
    Deviation(
        "VectorQuantize",
        "codebook_dim & the width first",
        _VQ + "test_decoding_gives_what_a_call_gave",
        "`get_output_from_indices` of images, volumes and channel_last=False projects another axis than the width, and raises or is wrong; "
        "here it gives what the call gave",
    ),
    Deviation(
        "*",
        ".bfloat16() and .half()",
        _VQ + "test_a_narrow_module_learns_as_a_wide_one",
        "codebooks, averages and losses are narrow as well, averages lose what is small beside them, and SimVQ fails; here these stay "
        "float32, in the state dict too, and outputs are narrow",
    ),
    Deviation(
        _LAYERS,
        "learned codes & moving averages & an optimizer",
        _VQ + "test_averages_go_on_from_where_an_optimizer_has_put_the_codes",
        "moving averages overwrite what the optimizer did to the codes; here they go on from there",
        ("state", "output.*", "input_gradient", "parameter_gradient", "eval.*", "decode.*"),
    ),
    Deviation(
        _LAYERS,
        "orthogonal_reg_weight & use_cosine_sim & an optimizer",
        _VQ + "test_cosine_codes_keep_length_1_whatever_an_optimizer_does",
        "an optimizer's step leaves codes of other lengths, which then count as nearer or give longer vectors; here they have length 1",
        ("state", "output.*", "input_gradient", "parameter_gradient", "eval.*", "decode.*"),
    ),
    Deviation(
        _LAYERS,
        "orthogonal_reg_weight & use_cosine_sim & not route_gradients_to_input",
        _VQ + "test_cosine_codes_keep_length_1_whatever_an_optimizer_does",
        "the gradient of codes by the output is that of vectors of any length; here of directions",
        ("parameter_gradient.*embed",),
    ),
    Deviation(
        _LAYERS,
        "orthogonal_reg_weight & use_cosine_sim & in_place_codebook_optimizer",
        _VQ + "test_cosine_codes_keep_length_1_whatever_an_optimizer_does",
        "a step of their own optimizer leaves codes of other lengths, too; here they have length 1",
        ("state", "output.*", "input_gradient", "parameter_gradient", "eval.*", "decode.*"),
    ),
    Deviation(
        _LAYERS,
        "use_cosine_sim & codes of other lengths that are written",
        "tests/facade/test_usage_facade.py::test_cosine_codes_that_are_written_count_by_their_direction",
        "codes written with other lengths, as by an average of weights, count as nearer or give longer vectors; here by their direction",
    ),
    Deviation(
        _LAYERS,
        "sync_update_v & route_gradients_to_input",
        _VQ + "test_the_synchronous_update_goes_to_the_codes",
        "the second part of the gradient goes to the input once more, not to the codes; here to the codes",
        ("input_gradient", "parameter_gradient"),
    ),
    Deviation(
        _LAYERS,
        "use_cosine_sim & masked",
        _VQ + "test_masked_vectors_take_no_part_in_losses",
        "with a mask the commitment loss is that of vectors of any length; here, as without, that of their directions",
        ("output.2", "output.3.commitment", "input_gradient", "parameter_gradient"),
    ),
    Deviation(
        "VectorQuantize",
        "indices & masked",
        _VQ + "test_masked_vectors_take_no_part_in_the_cross_entropy_of_given_codes",
        "masked vectors take part in the cross-entropy of given codes, and their codes are returned; here they have none",
        ("output.*", "input_gradient", "parameter_gradient"),
    ),
    Deviation(
        _ALL,
        "orthogonal_reg_weight & orthogonal_reg_active_codes_only & masked",
        _VQ + "test_masked_vectors_take_no_part_in_losses",
        "codes that masked vectors would choose count as active; here they do not",
        ("output.2", "output.3.orthogonal_reg", "parameter_gradient.*embed"),
    ),
    Deviation(
        _LAYERS,
        "kmeans_init & freeze_codebook",
        _VQ + "test_k_means_runs_in_training_alone",
        "k-means runs in eval mode and when frozen; here that is an error that says what to do",
        ("raises",),
    ),
    Deviation(
        _ALL,
        "kmeans_init & threshold_ema_dead_code",
        _VQ + "test_codes_that_are_merely_not_yet_used_do_not_die",
        "codes of few vectors are dead right after k-means; here they have three steps",
        ("state", "output.*", "input_gradient", "parameter_gradient", "eval.*", "decode.*"),
    ),
    Deviation(
        _LAYERS,
        "in_place_codebook_optimizer & counted codes",
        _VQ + "test_the_counts_are_those_of_the_codes_that_an_optimizer_left",
        "codes are counted, averaged and replaced before their own optimizer steps, by indices that the call does not return; here after "
        "it, by those that are returned",
        ("state", "output.*", "input_gradient", "parameter_gradient", "eval.*", "decode.*"),
    ),
    Deviation(
        _LAYERS,
        "in_place_codebook_optimizer & affine_param",
        _VQ + "test_a_call_with_an_own_optimizer_moves_mean_and_variance_once",
        "mean and variance move twice in a call, as it quantizes twice; here once",
        ("state", "output.*", "input_gradient", "parameter_gradient", "eval.*", "decode.*"),
    ),
    Deviation(
        _LAYERS,
        "in_place_codebook_optimizer & straight_through",
        _VQ + "test_the_own_optimizer_leaves_the_input_and_its_layers_alone",
        "the step of the codes by their own optimizer is that of a softmax, too, whose gradient goes on into the input and the layers "
        "before it; here it ends at the codes that were chosen",
        ("state", "output.*", "input_gradient", "parameter_gradient", "eval.*", "decode.*"),
    ),
    Deviation(
        _LAYERS,
        "freeze_codebook & learned codes",
        _VQ + "test_frozen_is_frozen",
        "a frozen parameter gets gradients by the scores, the orthogonality, DiVeQ and an output without estimator; here none",
        ("parameter_gradient.*embed", "parameter_gradient.*bridge*", "parameter_gradient.mlps*"),
    ),
    Deviation(
        _LAYERS,
        "vq_bridge & affine_param",
        _VQ + "test_moments_of_codes_behind_a_bridge_are_refused",
        "mean and variance of what is stored before the bridge move the codes behind it; here that is an error",
        ("raises",),
    ),
    Deviation(
        _LAYERS,
        "vq_bridge & codes that move in the call",
        _VQ + "test_the_gradient_of_a_bridge_is_that_of_what_it_saw",
        "the gradient of the bridge is that of vectors updated meanwhile; here of those that it saw",
        ("parameter_gradient",),
    ),
    Deviation(
        _LAYERS,
        "vq_bridge & orthogonal_reg_weight",
        _VQ + "test_orthogonality_is_that_of_the_codes_behind_a_bridge",
        "the loss is that of what is stored before the bridge; here of the codes",
        ("output.2", "output.3.orthogonal_reg", "parameter_gradient"),
    ),
    Deviation(
        _LAYERS,
        "affine_param & threshold_ema_dead_code",
        _VQ + "test_dead_affine_codes_start_where_vectors_are",
        "vectors replace stored codes without regard to mean and variance; here the new codes are read as these vectors",
        ("state", "output.*", "input_gradient", "parameter_gradient", "eval.*", "decode.*"),
    ),
    Deviation(
        "VectorQuantize",
        "affine_param & topk",
        _VQ + "test_calls_that_step_nothing_do_not_move_affine_codes",
        "calls with topk move mean and variance; here they change nothing",
        ("state", "output.*", "input_gradient", "parameter_gradient", "eval.*", "decode.*"),
    ),
    Deviation(
        _LAYERS,
        "affine_param & freeze_codebook",
        _VQ + "test_calls_that_step_nothing_do_not_move_affine_codes",
        "frozen calls move mean and variance; here they change nothing",
        ("state", "output.*", "input_gradient", "parameter_gradient", "eval.*", "decode.*"),
    ),
    Deviation(
        "VectorQuantize",
        "affine_param & accum_ema_update",
        _VQ + "test_calls_that_step_nothing_do_not_move_affine_codes",
        "calls that only accumulate move mean and variance; here the call that takes the step does",
        ("state", "output.*", "input_gradient", "parameter_gradient", "eval.*", "decode.*"),
    ),
    Deviation(
        _LAYERS,
        "affine_param & orthogonal_reg_weight",
        _VQ + "test_orthogonality_is_that_of_affine_codes",
        "the loss is that of codes before mean and variance are those of the vectors; here of the codes that give the output",
        ("output.2", "output.3.orthogonal_reg", "parameter_gradient.*embed"),
    ),
    Deviation(
        _LAYERS,
        "affine_param",
        _VQ + "test_affine_codes_change_in_training_alone",
        "eval mode changes the mean and variance, before training they are read from memory that nobody has written, decoding leaves them "
        "out, and the state dict does not load; here eval mode changes nothing and a state dict of either kind loads",
        ("state.*_mean", "state.*_variance", "state_layout", "state_back", "eval.*", "decode.*"),
    ),
    Deviation(
        "*",
        "in_place_codebook_optimizer that remembers, in a checkpoint",
        _VQ + "test_the_memory_of_an_own_optimizer_survives_a_checkpoint",
        "momentum and the like are in no state dict; here they are, as `in_place_codebook_optimizer.*`, which the library loads with "
        "strict=False alone; SGD without momentum adds nothing",
    ),
    Deviation(
        "VectorQuantize",
        "accum_ema_update",
        _VQ + "test_what_calls_have_accumulated_survives_a_checkpoint",
        "what calls have accumulated is in no state dict; here it is, as `_codebook.pending.*`, until a step takes it; until then the "
        "library loads it with strict=False alone",
        ("state_back",),
    ),
    Deviation(
        "VectorQuantize",
        "activation checkpointing",
        _VQ + "test_recomputation_updates_once",
        "the recomputation is a second step of the codebook, and the gradient of the input is wrong; here it is none",
    ),
    Deviation(
        "VectorQuantize",
        "a rank without vectors",
        _VQ + "test_ranks_end_with_the_codebook_of_one_process",
        "with an empty or masked batch of one process the others wait for it, or it fails; here all end with the codebook of one process",
    ),
    Deviation(
        "VectorQuantize",
        "dead codes & several processes",
        _VQ + "test_ranks_agree_on_new_codes_where_one_of_them_has_no_vectors",
        "a process without vectors does not take part in the choice of new codes, and the others wait; here all have the same new codes",
    ),
    Deviation(
        "VectorQuantize",
        "indices out of range",
        _VQ + "test_indices_that_there_are_not_are_refused",
        "an index below 0 is one from the end, and one past the end an error of the device; here ValueError, and -1 decodes to zeros",
    ),
    Deviation(
        _ALL,
        "vectors far from the origin",
        _VQ + "test_vectors_far_from_the_origin_have_the_nearest_code",
        "distances are made of squares that cancel: at an offset of 1,000 more than half of the codes are wrong; here they are the nearest",
    ),
    Deviation(
        _ALL,
        "rotation_trick & lengths that are far apart",
        _VQ + "test_no_rotation_is_taken_between_lengths_that_are_far_apart",
        "near 0 the output is not the code and gradients are 4e5 times as large; here it is, and where a vector and its code are more than "
        "100 times as long as each other the gradient goes over into the straight one",
    ),
    Deviation(
        _ALL,
        "kmeans_init & few vectors that differ",
        _VQ + "test_no_code_of_a_k_means_start_is_left_empty",
        "each empty cluster of k-means becomes the zero vector; here it starts anew at a vector",
    ),
    Deviation(
        "*",
        "torch.compile and torch.export",
        "tests/facade/test_engine_facade.py::test_training_and_evaluation_compile_to_one_graph",
        "the graph breaks at what is asked of tensors; here training and evaluation are one graph",
    ),
    Deviation(
        "VectorQuantize",
        "inputs that are not finite",
        _VQ + "test_a_vector_that_is_not_finite_has_no_code_and_enters_no_codebook",
        "one NaN makes every code NaN for ever; here such a vector has index -1, zeros, and no part in loss and codebook",
    ),
    Deviation(
        _LAYERS,
        "threshold_ema_dead_code of a new codebook",
        _VQ + "test_codes_that_are_merely_not_yet_used_do_not_die",
        "counts start at 1, so that at a threshold of 2 whatever the first call does not use starts anew at its vectors; here codes "
        "have three steps. As there: `_codebook.cluster_size.fill_(1)` and `_codebook.embed_avg.copy_(_codebook.embed)` before the first "
        "call",
    ),
    Deviation(
        "VectorQuantize",
        "threshold_ema_dead_code & more than 64 dead codes",
        _VQ + "test_at_most_64_dead_codes_a_step_start_anew_and_the_others_later",
        "all dead codes start anew in one step, or, of more than there are vectors, some that are drawn; here at most 64 of a codebook, "
        "those of the lowest counts first",
    ),
    Deviation(
        "VectorQuantize",
        "learnable_codebook, straight_through or directional_reparam alone",
        _VQ + "test_ways_of_learning_work_alone",
        "each raises unless others are switched off by hand; here each alone switches off what it excludes",
    ),
    Deviation(
        "VectorQuantize",
        "an input without gradient",
        _VQ + "test_an_input_without_gradient_trains_the_projection",
        "the output has no gradient for project_in unless the input asks for one, too; here the projection is trained either way",
    ),
)

_RESIDUAL = "tests/facade/test_residual_vq.py::"
_LATER = "tests/facade/test_settings_later.py::"
_AFTER_A_STEP = ("state", "eval.*", "decode.*")

_OF_RESIDUALS = (
    Deviation(
        _LAYERS,
        "codebook_dim, under autocast",
        _VQ + "test_autocast_leaves_the_dtype_of_the_output",
        "the output has the dtype of the projection, as bfloat16; here that of the input. What indices decode to has that of the "
        "projection on both sides",
    ),
    Deviation(
        "FSQ or *ResidualFSQ or LFQ or *ResidualLFQ or EvoLFQ or LatentQuantize",
        "named_buffers()",
        "tests/facade/test_contract.py::test_what_walks_over_a_module_finds_what_it_finds_there",
        "all codes are a buffer there, `codebook` or `implicit_codebook`, which no state dict holds; here they are listed when they are "
        "read, so that no walk over the buffers sees them",
    ),
    Deviation(
        "VectorQuantize or *ResidualVQ",
        "_codebook.register_full_backward_hook",
        _LATER + "test_hooks_of_the_backward_are_run_or_refused",
        "hooks of the backward see the gradients of codes that learn; here the first call in training raises ValueError",
    ),
    Deviation(
        "*",
        "register_module_forward_hook",
        _LATER + "test_hooks_of_all_modules_see_those_that_are_called",
        "hooks of all modules see each of them there; here those that are called, with hooks of its own any but a codebook's network "
        "when indices are decoded, and what only moves axes in HierarchicalVQ",
    ),
    Deviation(
        "*ResidualVQ",
        "a codebook that layers share later & a beam",
        _LATER + "test_what_cannot_be_a_layer_is_refused",
        "a beam search trains the first layer alone; here it raises ValueError where layers share a codebook without "
        "`shared_codebook=True`",
    ),
    Deviation(
        "*ResidualVQ",
        "a beam in training",
        _RESIDUAL + "test_a_beam_goes_by_the_error_of_the_path_and_trains_all_layers",
        "a beam search trains the codebook of the first layer alone; here those of all layers, by the chosen path",
        _AFTER_A_STEP,
    ),
    Deviation(
        "*ResidualVQ",
        "a beam & beam_score_quantizer_weights=None",
        _RESIDUAL + "test_a_beam_goes_by_the_error_of_the_path_and_trains_all_layers",
        "paths compete by the sum of the errors after each layer; here, unless weights are given, by the error of the whole path",
        ("*",),
    ),
    Deviation(
        "*ResidualVQ",
        "a beam & use_cosine_sim",
        _RESIDUAL + "test_a_beam_of_directions_goes_by_the_error_of_the_path",
        "with cosine similarity paths compete by the errors of directions; here by those of the vectors",
        ("*",),
    ),
    Deviation(
        "*ResidualVQ",
        "a beam in training & codebook_diversity_loss_weight",
        _RESIDUAL + "test_a_beam_has_the_losses_of_its_path",
        "the diversity is that of the vectors of all paths; here of the one that is taken",
        ("output.2", "input_gradient", "parameter_gradient", *_AFTER_A_STEP),
    ),
    Deviation(
        "*ResidualVQ",
        "a beam in training & orthogonal_reg_weight & orthogonal_reg_active_codes_only",
        _RESIDUAL + "test_a_beam_has_the_losses_of_its_path",
        "codes count as active that any path tried; here those of the one that is taken",
        ("output.2", "parameter_gradient", *_AFTER_A_STEP),
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
        "*ResidualVQ",
        "diveq & width first & sequences",
        _RESIDUAL + "test_directional_images_are_as_sequences",
        "the direction of the error of an image is taken along its rows; here along the width, as everywhere",
        ("*",),
    ),
    Deviation(
        "*ResidualVQ",
        "implicit_neural_codebook & width first & sequences",
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
        "*ResidualVQ",
        "frozen at construction",
        _RESIDUAL + "test_frozen_means_frozen",
        "freeze_codebook of the constructor is ignored, and lets gradients reach learnable codes; frozen means frozen here",
        ("parameter_gradient", *_AFTER_A_STEP),
    ),
    Deviation(
        "*ResidualVQ",
        "diveq",
        _RESIDUAL + "test_directional_noise_is_for_training_alone",
        "noise in eval mode too, so that the output is not what its indices decode to; here in training alone",
        ("eval.0",),
    ),
    Deviation(
        "*ResidualVQ",
        "width first & sequences",
        _RESIDUAL + "test_images_of_any_size",
        "images, volumes and channel_last=False work only where every axis is as long as the width, without codebook_dim; "
        "get_output_from_indices returns the width last, in groups wrong values. Here any size, decoded to what a call gives",
        ("decode.get_output_from_indices",),
    ),
    Deviation(
        "*ResidualVQ",
        "width first & masked",
        _RESIDUAL + "test_masks_of_channels_first",
        "a mask with channel_last=False zeroes channels of the output, not positions; here positions",
        ("*",),
    ),
    Deviation(
        "*ResidualVQ",
        "shared_codebook & kmeans_init",
        _RESIDUAL + "test_k_means_of_a_shared_codebook_sees_what_all_layers_do",
        "k-means of a shared codebook sees the input of the first layer alone; here what all layers see",
        ("*",),
    ),
    Deviation(
        "*ResidualVQ",
        "shared_codebook & affine_param",
        _RESIDUAL + "test_mean_and_variance_of_a_shared_codebook_step_once_a_call",
        "mean and variance of a shared codebook step with each layer of a call; here once, by what all layers see",
        ("*",),
    ),
    Deviation(
        "*ResidualVQ",
        "get_codes_from_indices(coarse)",
        _RESIDUAL + "test_coarse_indices_need_no_dropout",
        "indices of the first layers alone decode only with quantize_dropout=True; here always",
    ),
    Deviation(
        "*ResidualVQ",
        "implicit_neural_codebook & in_place_codebook_optimizer",
        _RESIDUAL + "test_what_is_wrong_is_named",
        "the step of the codes uses up the graph of the networks, so that the backward of the loss fails; here an error at construction",
        ("raises",),
    ),
    Deviation(
        "*ResidualVQ",
        "forward(indices)",
        _RESIDUAL + "test_indices_give_the_cross_entropy",
        "raises, as it unpacks three of two values; here (quantized, cross-entropy)",
    ),
    Deviation(
        "*ResidualVQ",
        "shared_codebook & threshold_ema_dead_code",
        _RESIDUAL + "test_a_shared_codebook_expires_once_a_call",
        "codes are replaced between the layers of one call; here once, behind it",
        ("*",),
    ),
    Deviation(
        "*ResidualVQ",
        "shared_codebook & in_place_codebook_optimizer & not manual_in_place_optimizer_update",
        _RESIDUAL + "test_the_own_optimizer_of_a_shared_codebook_steps",
        "the optimizer never steps; here once a call, before the codes are read",
        ("*",),
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
        "*ResidualVQ",
        "kmeans_init in eval mode",
        _RESIDUAL + "test_k_means_start",
        "k-means runs in eval mode, on what is to be evaluated, and decoding before it gives zeros; here both raise ValueError",
    ),
    Deviation(
        "*ResidualVQ",
        "kmeans_init & quantize_dropout",
        _RESIDUAL + "test_layers_that_no_call_has_started_are_not_evaluated",
        "layers that were dropped in all training calls so far start by k-means on what is to be evaluated; here that is a ValueError",
        ("raises", "decode.*"),
    ),
    Deviation(
        "*ResidualVQ",
        "kmeans_init & a beam in training",
        _RESIDUAL + "test_the_call_that_starts_the_codes_is_greedy",
        "k-means of a layer sees each vector once a path of the beam; here once, in a first call that takes the nearest codes",
        ("*",),
    ),
    Deviation(
        "*ResidualVQ",
        "vq_bridge & return_all_codes",
        _RESIDUAL + "test_codes_behind_a_bridge_are_those_of_its_output",
        "the codes of a call are what is stored before the bridge; here they are those behind it, which its output is the sum of",
        ("output.3", "eval.3", "parameter_gradient"),
    ),
    Deviation(
        "*ResidualVQ",
        "vq_bridge & in_place_codebook_optimizer",
        _RESIDUAL + "test_a_bridge_of_all_layers_is_one_in_a_call",
        "all layers have one bridge, which the own optimizer of each moves while the call goes on; here all layers read one",
        ("*",),
    ),
    Deviation(
        "GroupedResidualVQ",
        "groups=2 & vq_bridge & in_place_codebook_optimizer & shared_codebook & not manual_in_place_optimizer_update",
        _RESIDUAL + "test_what_is_wrong_is_named",
        "the optimizers of several groups would step the bridge that all have, and never step there; here that is an error",
        ("raises",),
    ),
    Deviation(
        "*ResidualVQ",
        "freeze_codebook & implicit_neural_codebook & gradients by codes",
        _RESIDUAL + "test_networks_of_frozen_calls_are_constants",
        "a frozen call has gradients by the networks, to them and to the input; here networks are constants then",
        ("input_gradient",),
    ),
    Deviation(
        "*ResidualVQ",
        "frozen at construction & implicit_neural_codebook",
        _RESIDUAL + "test_frozen_means_frozen",
        "the input has a gradient by the networks in calls that should be frozen; here none",
        ("input_gradient",),
    ),
    Deviation(
        "*ResidualVQ",
        "indices and masks that do not fit",
        _RESIDUAL + "test_what_is_wrong_is_named",
        "an index past the end reads another layer's codebook, -1 the last code; here ValueError and zeros",
    ),
)

_FSP = "tests/facade/test_finite_scalar_perturbation.py::"
_MAPPER = "tests/facade/test_binary_mapper_facade.py::"
_EVO = "tests/facade/test_evo_lookup_free_quantization.py::"
_GRIDS = "tests/facade/test_hierarchical_vq.py::"

_OF_FAMILY = (
    Deviation(
        "FSP",
        "bfloat16 and half, the meta device",
        _FSP + "test_narrow_and_meta_modules_work",
        "modules in bfloat16 or half fail, and so do those made on the meta device; here they work",
    ),
    Deviation(
        "FSP",
        "one vector",
        _FSP + "test_one_vector_has_no_moments_and_zero_its_slope",
        "one vector gives a loss of NaN; here 0",
        ("output.2", "output.3.norm_info", "eval.2", "eval.3.norm_info", "*gradient"),
    ),
    Deviation(
        "FSP",
        "scalars at 0",
        _FSP + "test_one_vector_has_no_moments_and_zero_its_slope",
        "the Laplace distribution function has no slope at 0; here that of 1/2",
    ),
    Deviation(
        "FSP",
        "many codes, and indices that do not fit",
        _FSP + "test_many_codes_are_told_apart_and_wrong_ones_named",
        "more codes than an int32 can number share indices, and an index past the end wraps; here int64, and ValueError",
    ),
    Deviation(
        "BinaryMapper",
        "temperature=0.5",
        _MAPPER + "test_the_gradient_is_that_of_the_chances_at_the_temperature",
        "the gradient ignores the temperature at which bits are drawn; here it is that of the chances at this temperature",
        ("input_gradient",),
    ),
    Deviation(
        "BinaryMapper",
        "no vectors",
        _MAPPER + "test_logits_that_are_not_finite_and_none_at_all_have_no_loss",
        "without logits the loss is NaN; here 0",
        ("output.[12]", "eval.[12]", "*gradient"),
    ),
    Deviation(
        "BinaryMapper",
        "log_prob(sum_bits=False)",
        _MAPPER + "test_the_parts_are_the_peers",
        "log_prob gives back the bits of logits with one leading axis alone; here of any",
    ),
    Deviation(
        "EvoLFQ",
        "evolve()",
        _EVO + "test_populations_on_the_same_draws_are_the_peers",
        "`best_gene` is a member of the next population, at the place of the best; here it is what had `best_fitness`",
    ),
    Deviation(
        "EvoLFQ",
        "bits behind projections",
        _EVO + "test_bits_are_those_of_the_codes_that_a_call_gave",
        "with projections `encode` gives the signs of their output, which decode to something else; here the bits of the codes",
        ("encode",),
    ),
    Deviation(
        "EvoLFQ",
        "orthogonal_rotation",
        _EVO + "test_bits_are_those_of_the_codes_that_a_call_gave",
        "so it does with codes that are turned",
        ("encode",),
    ),
    Deviation(
        "EvoLFQ",
        "channel_first",
        _EVO + "test_bits_are_those_of_the_codes_that_a_call_gave",
        "bits whose width is first, as those of images, are decoded along their last axis, or fail; here in the layout that `encode` gives",
        ("decode.decode_bits",),
    ),
    Deviation(
        "HierarchicalVQ",
        "shared_codebook & decay=0.99 or 0.7",
        _GRIDS + "test_a_call_of_shared_levels_sees_one_codebook",
        "a shared codebook that learns changes between the levels of a call; here all levels of a call see one, which then learns from all",
        ("output.0", "output.1.[12]", "output.2", "*gradient*", "state.*", "eval.*", "decode.*"),
    ),
    Deviation(
        "HierarchicalVQ",
        "kmeans_init & shared_codebook",
        _GRIDS + "test_k_means_starts_at_what_all_levels_see",
        "k-means of a shared codebook sees the coarsest level alone, in eval mode, too; here all, and eval before it is a ValueError",
        ("output.*", "*gradient", "state", "eval.*", "decode.*"),
    ),
    Deviation(
        "HierarchicalVQ",
        "orthogonal_reg_weight & decay=0.99 or 0.7",
        _GRIDS + "test_the_regularisation_is_that_of_the_codes_of_the_call",
        "the regularisation is that of the codes after the update; here of those that the call used",
        ("output.2", "parameter_gradient.*embed"),
    ),
    Deviation(
        "HierarchicalVQ",
        "orthogonal_reg_weight & an optimizer",
        _GRIDS + "test_an_optimizer_moves_the_codes_that_are_regularised",
        "moving averages overwrite what the optimizer did to the codes; here they go on from there",
        ("state.*", "output.*", "input_gradient", "parameter_gradient", "eval.*", "decode.*"),
    ),
    Deviation(
        "HierarchicalVQ",
        "indices that do not fit",
        _GRIDS + "test_a_cell_without_a_code_gives_zeros_and_wrong_indices_are_named",
        "an index past the end, or of another grid, is an error of the device or another code; here ValueError",
    ),
)

_ERRORS = "tests/facade/test_errors.py::"

_BAD_INPUT = (
    Deviation(
        "*",
        "arguments of another type",
        _ERRORS + "test_constructors_name_what_is_wrong",
        "strings, lists and tensors count as True, what nothing reads is not looked at, and fractions are cut off "
        "(`levels=[7.5]`, `topk=1.5`); here TypeError. None is a flag that is not set, on both sides",
    ),
    Deviation(
        "*",
        "numbers out of range",
        _ERRORS + "test_constructors_name_what_is_wrong",
        "a `decay` outside 0 to 1, weights and `eps` below 0, temperatures (`inv_temperature`) and scales of 0 or below, counts below 1 "
        "(`codebook_size=0`, `levels=[1]`) and NaN are taken, and codes run away, are NaN, or fail in the first call; here ValueError",
    ),
    Deviation(
        "*",
        "lens below 0, or no integers",
        _ERRORS + "test_calls_name_what_is_wrong_and_change_nothing",
        "a length below 0 masks all, and fractions are compared; here an error. Lengths beyond the sequence are all of it, on both sides",
    ),
    Deviation(
        "*",
        "indices that are no integers",
        _ERRORS + "test_indices_that_are_none_are_named",
        "None is the whole codebook, bool is a mask, or 0 and 1, and fractions are cut off; here TypeError",
    ),
    Deviation(
        "VectorQuantize",
        "ema_update_weight below 0, or beyond the new averages",
        _ERRORS + "test_calls_name_what_is_wrong_and_change_nothing",
        "a weight below 0, or above 1 / (1 - decay), moves codes away from their vectors, or past them; here ValueError",
    ),
)

DEVIATIONS: tuple[Deviation, ...] = (*_OF_VECTOR_QUANTIZE, *_SCALARS, *_SIGNS, *_OF_RESIDUALS, *_OF_FAMILY, *_BAD_INPUT)


USED: set[Deviation] = set()
"""Rows that excused a difference so far."""


def excused(cls: str, kwargs: Mapping[str, Any], part: str) -> bool:
    """Whether this part of a comparison of `cls` with these arguments, those of the call among them, may differ."""
    found = [row for row in DEVIATIONS if row.covers(part) and row.meets(cls, kwargs)]
    USED.update(found)
    return bool(found)
