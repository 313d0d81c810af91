"""Bad input: every argument of every class, given what it cannot be, is named with what it was, in the words of the facade.

An error is ValueError or TypeError, and leaves the module as it was. What the peer takes nevertheless stands in `deviations.py`.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from facade.deviations import DEVIATIONS
from facade.peer import facade, peer
from facade.test_contract import SMALL
from facade.test_no_dead_parameter import INPUTS, arguments_of, sgd, vectors

PAIR = torch.ones(2)
META = torch.device("meta")

# What is bad for an argument of a name, by what it is

FLAG = ("x", [1], PAIR, 2)
NUMBER = ("x", [0.5], PAIR, math.nan, None)
NOT_NEGATIVE = (*NUMBER, -0.5)
POSITIVE = (*NOT_NEGATIVE, 0.0)
SHARE = (*NOT_NEGATIVE, 1.5)
WHOLE = ("x", 1.5, [2], PAIR, None)
FROM_0 = (*WHOLE, -1)
COUNT = (*FROM_0, 0)
FUNCTION = (3, "x")
MODULE = (3, "x", nn.Linear)

FLAGS = """
separate_codebook_per_head freeze_codebook kmeans_init sync_kmeans use_cosine_sim layernorm_after_project_in channel_last accept_image_fmap
accept_3d_fmap commitment_use_cross_entropy_loss orthogonal_reg_active_codes_only stochastic_sample_codes straight_through rotation_trick
directional_reparam sync_codebook sync_affine_param ema_update manual_ema_update learnable_codebook manual_in_place_optimizer_update
affine_param return_zeros_for_masked_padding route_gradients_to_input reinmax shared_codebook diveq quantize_dropout
implicit_neural_codebook norm keep_num_codebooks_dim channel_first projection_has_bias return_indices force_quantization_f32
preserve_symmetry bound_hard_clamp orthogonal_rotation need_inv_act has_projections cosine_sim_project_in
experimental_softplus_entropy_loss spherical is_channel_first optimize_values deterministic_on_eval return_loss_breakdown accum_ema_update
return_all_codes return_cutoff calc_aux_loss deterministic reduce_aux_kl_loss
"""
COUNTS = """
dim codebook_size codebook_dim heads num_codebooks num_quantizers groups bits kmeans_iters orthogonal_reg_max_codes topk frozen_codebook_dim
quantize_dropout_multiple_of pop_size tournament_size nested_dropout_min_levels
"""
WHOLE_FROM_0 = "beam_size eval_beam_size quantize_dropout_cutoff_index elitism_count generations"
NUMBERS = "threshold_ema_dead_code sample_codebook_temp diversity_gamma entropy_loss_offset kl_loss_threshold quant_resi"
NUMBERS_FROM_0 = """
eps commitment_weight orthogonal_reg_weight codebook_diversity_loss_weight directional_reparam_variance entropy_loss_weight
commitment_loss_weight quantization_loss_weight input_to_quantize_commit_loss_weight
"""
POSITIVES = """
codebook_diversity_temperature codebook_scale cosine_sim_project_in_scale inv_temperature temperature scale
"""
SHARES = """
decay affine_param_batch_decay affine_param_codebook_decay sync_update_v nested_dropout noise_dropout mutation_rate quantize_rate
quant_grad_frac
"""


def bad_indices(*shape: int) -> tuple[Any, ...]:
    """Of codes 0 ... 15."""
    right = torch.ones(shape, dtype=torch.int64)
    wrong = (right.float(), right.bool(), 99 * right, -2 * right, right[:, 1:], right.unsqueeze(0), torch.ones((), dtype=torch.int64))
    return ("x", 3, *wrong, right.to(META))


RIGHT = torch.ones(2, 12, dtype=torch.int64)
LISTS = ([1, 2], [RIGHT], [RIGHT, RIGHT[:, 1:]], [RIGHT, 99 * RIGHT], [RIGHT, RIGHT.float()])
"""Of two layers."""
X = (
    None,
    "x",
    3,
    [1.0],
    torch.ones(()),
    torch.ones(5),
    torch.ones(2, 12, 7),
    torch.ones(2, 12, 8, dtype=torch.int64),
)
BAD: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(FLAGS.split(), FLAG),
    **dict.fromkeys(COUNTS.split(), COUNT),
    **dict.fromkeys(WHOLE_FROM_0.split(), FROM_0),
    **dict.fromkeys(["share_quant_resi", "rand_quantize_dropout_fixed_seed"], WHOLE),
    **dict.fromkeys(
        ["threshold_ema_dead_code", "sample_codebook_temp", "diversity_gamma", "entropy_loss_offset", "kl_loss_threshold"], NUMBER
    ),
    "quant_resi": NUMBER,
    **dict.fromkeys(NUMBERS_FROM_0.split(), NOT_NEGATIVE),
    **dict.fromkeys(POSITIVES.split(), POSITIVE),
    **dict.fromkeys(SHARES.split(), SHARE),
    "frac_per_sample_entropy": (*SHARE, 0.0),
    "soft_clamp_input_value": ("x", math.nan, -0.5, 0.0),
    **dict.fromkeys(["in_place_codebook_optimizer", "straight_through_activation", "init_fn", "codebook_transform_fn"], FUNCTION),
    **dict.fromkeys(["vq_bridge", "codebook_transform", "encoder", "decoder", "lfq"], MODULE),
    "mlp_kwargs": (3, "x", {"depht": 1}),
    "beam_score_quantizer_weights": (3, "x", [], [1.0], ["x", "y"], [math.nan, 1.0], [-1.0, 1.0]),
    "levels": ("x", [], [1.5, 3], [0, 3], [-3, 3], ["x"], [1, 3], PAIR),
    "scales": ("x", 3, [], [0], [1.5], ["x"], [(1, 2), 2], [2, 1]),
    "allowed_dtypes": ("x", 3, [3]),
    "act_name": ("x", 3, None, [1]),
    "vector_norm": ("x", 3, None),
    "x": X,
    "z": X,
    "logits": X,
    "mask": (
        "x",
        3,
        [True],
        torch.ones(2, 12),
        torch.ones(2, 11, dtype=torch.bool),
        torch.ones(3, 12, dtype=torch.bool),
        torch.ones(2, 12, dtype=torch.int64),
        torch.ones((), dtype=torch.bool),
        torch.ones(2, 12, dtype=torch.bool, device=META),
    ),
    "lens": (
        "x",
        3,
        [1, 2],
        torch.ones(3, dtype=torch.int64),
        torch.ones(2),
        torch.tensor([-1, 2]),
        torch.ones(2, 2, dtype=torch.int64),
        torch.tensor([1, 2], device=META),
    ),
    "indices": bad_indices(2, 12),
    "ema_update_weight": (
        "x",
        [1.0],
        -1.0,
        torch.ones(3),
        torch.ones((), dtype=torch.complex64),
        -torch.ones(16),
        torch.ones(16, device=META),
    ),
}
"""By name of the argument; None is bad unless it is the default, and for flags, where it is False."""

OTHERS: dict[str, dict[str, tuple[Any, ...]]] = {
    "ResidualVQ": {"codebook_size": (*COUNT, (16, 8, 4), (16, 0), ("x", 2)), "indices": bad_indices(2, 12, 2) + LISTS},
    "GroupedResidualVQ": {"dim": (*COUNT, 7), "groups": (*COUNT, 3), "indices": bad_indices(2, 2, 12, 2)},
    "RandomProjectionQuantizer": {"indices": bad_indices(2, 12, 2)},
    "LFQ": {"codebook_size": (*COUNT, 15)},
    "LatentQuantize": {"codebook_dim": ("x", 1.5, [2], PAIR, None, 0, -2, 1, 3)},
    "HierarchicalVQ": {"codebook_size": (*WHOLE, 0, (16, 8)), "orthogonal_reg_max_codes": ("x", 1.5, [2], PAIR, 0, -1)},
    "EvoLFQ": {"x": (None, "x")},  # the rest is what the encoder of the user says
}
"""Where a name means something else in a class."""

NEEDS: dict[str, dict[str, Any]] = {
    "beam_score_quantizer_weights": {"beam_size": 2},
    "mlp_kwargs": {"implicit_neural_codebook": True},
    "soft_clamp_input_value": {"bound_hard_clamp": False},  # of ResidualFSQ
}
"""What an argument needs beside it."""

NATIVE = """
lengths targets layout code_weights top_k losses assignment estimator loss_mask soft_clamp loss_share gradient_fraction cdf mixing mixers
elites StoredEMA KMeans DeadCodes Gumbel Softmax DiVeQ Commitment Affine Diversity Orthogonality Entropy BeamSearch FreeBits NestedDropout
QuantizeDropout Evolution table native
"""
"""Words that name nothing in the facade."""


def bad_values(kind: str, name: str, default: Any) -> Iterator[Any]:
    found = OTHERS.get(kind, {}).get(name, BAD[name])
    return (value for value in found if value is not default)


def check_words(name: str, value: Any, error: BaseException) -> None:
    """It names the argument and what it was, and nothing that is no word of the facade."""
    text, what = str(error), f"{name} = {value!r:.40}: {type(error).__name__}: {error}"
    assert isinstance(error, (ValueError, TypeError)), what
    assert re.search(rf"(?<![\w.]){name}\b", text), what
    assert not [word for word in NATIVE.split() if word != name and re.search(rf"\b{word}\b", text)], what
    assert "given" in text or any(part in text for part in forms(value)), what


def forms(value: Any) -> Iterator[str]:
    """How a value, or what is wrong with it, may be written."""
    if isinstance(value, Tensor):
        yield from (str(tuple(value.shape)), str(tuple(value.shape[1:])), str(value.dtype))  # the second: of a group
        yield f"has {len(value) if value.dim() else 0} entries"
        yield from ["on meta"] if value.device == META else (f"holds {number}" for number in value.flatten().tolist())
        return
    yield from (repr(value), type(value).__name__)
    if isinstance(value, (list, tuple, dict)):
        yield f"has {len(value)} entries"
        for entry in value:
            yield from forms(entry)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def check_raises(name: str, value: Any, call: Callable[[], Any], module: nn.Module | None = None) -> None:
    before = {} if module is None else state_of(module)
    try:
        call()
    except Exception as error:
        check_words(name, value, error)
    else:
        pytest.fail(f"{name} = {value!r:.60} is taken")
    if module is not None:
        after = module.state_dict()
        changed = [key for key in before if not torch.equal(before[key], after[key])]
        assert before.keys() == after.keys() and not changed, f"{name} = {value!r:.60} changes {changed}"


@pytest.mark.parametrize("kind", sorted(SMALL))
def test_constructors_name_what_is_wrong(kind: str) -> None:
    cls = getattr(facade, kind)
    parameters = inspect.signature(cls.__init__).parameters
    for name in sorted(arguments_of(cls.__init__)):
        for value in bad_values(kind, name, parameters[name].default):
            given = {**constructor_of(kind, name), name: value}
            check_raises(name, value, lambda given=given: cls(**given))


def constructor_of(kind: str, name: str) -> dict[str, Any]:
    """Arguments of the class with which this one is of use."""
    known = inspect.signature(getattr(facade, kind).__init__).parameters
    return copy.deepcopy({**SMALL[kind], **{key: value for key, value in NEEDS.get(name, {}).items() if key in known}})


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", sorted(SMALL))
def test_calls_name_what_is_wrong_and_change_nothing(kind: str, training: bool) -> None:
    x = INPUTS.get(kind, vectors())
    module = getattr(facade, kind)(**copy.deepcopy(SMALL[kind]))
    module(x)  # after this the modules that start at what they see have started
    module.train(training)
    parameters = inspect.signature(module.forward).parameters
    own = next(iter(parameters))
    for name in sorted(arguments_of(type(module).forward)):
        for value in bad_values(kind, name, parameters[name].default if name != own else ...):
            given = {own: x, name: value}
            if not is_of_no_use(kind, name, value, training):
                check_raises(name, value, lambda given=given: module(given.pop(own), **given), module)


LEARNED = {"learnable_codebook": True, "ema_update": False, "in_place_codebook_optimizer": sgd}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("VectorQuantize", {**LEARNED, "codebook_dim": 4}),
        ("VectorQuantize", {"kmeans_init": True, "threshold_ema_dead_code": 2, "heads": 2, "codebook_dim": 4}),
        ("VectorQuantize", {"affine_param": True, "stochastic_sample_codes": True, "channel_last": False}),
        ("VectorQuantize", {"accept_image_fmap": True}),
        ("ResidualVQ", {**LEARNED, "codebook_dim": 4}),
        ("ResidualVQ", {**LEARNED, "shared_codebook": True}),
        ("ResidualVQ", {"kmeans_init": True, "quantize_dropout": True, "beam_size": 2}),
        ("ResidualVQ", {"implicit_neural_codebook": True, "accept_image_fmap": True}),
        ("GroupedResidualVQ", {**LEARNED}),
        ("HierarchicalVQ", {"channel_first": False, "orthogonal_reg_weight": 0.5}),
        ("LatentQuantize", {"in_place_codebook_optimizer": sgd}),
        ("LFQ", {"orthogonal_rotation": True, "spherical": True, "channel_first": True}),
        ("ResidualLFQ", {"quantize_dropout": True}),
        ("ResidualSimVQ", {"quantize_dropout": True, "channel_first": True}),
    ],
    ids=str,
)
def test_calls_of_other_settings_change_nothing_either(kind: str, options: dict[str, Any]) -> None:
    """Before the first call, which may start a codebook, too."""
    first = any(options.get(name) for name in ("channel_first", "accept_image_fmap")) or options.get("channel_last", True) is False
    x = vectors(2, 8, 3, 4) if "accept_image_fmap" in options else vectors().mT.contiguous() if first else INPUTS.get(kind, vectors())
    x = vectors() if options.get("channel_first") is False else x
    module = getattr(facade, kind)(**{**SMALL[kind], **options})
    parameters = inspect.signature(module.forward).parameters
    own = next(iter(parameters))
    for name in arguments_of(type(module).forward):
        for value in bad_values(kind, name, parameters[name].default if name != own else ...):
            given = {own: x, name: value}
            before = state_of(module)
            with pytest.raises((ValueError, TypeError)):
                module(given.pop(own), **given)
            assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items()), (name, value)
    module(x)


def is_of_no_use(kind: str, name: str, value: Any, training: bool) -> bool:
    """What nothing looks at."""
    on_meta = isinstance(value, Tensor) and value.device == META
    return on_meta and ((kind.endswith("LFQ") and not training) or (kind == "RandomProjectionQuantizer" and name == "indices"))


@pytest.mark.parametrize("kind", sorted(SMALL))
def test_every_argument_has_bad_values(kind: str) -> None:
    cls = getattr(facade, kind)
    assert arguments_of(cls.__init__) | arguments_of(cls.forward) <= {*BAD, *OTHERS.get(kind, {})}


DECODERS = """
get_codes_from_indices get_output_from_indices indices_to_codes indices_to_level_indices indices_to_act_value codes_to_indices decode_bits
update_indices update_ema_indices expire_codes_ log_prob
"""


def indices_of(kind: str, module: nn.Module, x: Tensor) -> Tensor:
    """Of a call."""
    output = module(x, return_indices=True) if kind == "BinaryMapper" else module(x)
    found = output if isinstance(output, Tensor) else output[1]
    return found


@pytest.mark.parametrize("kind", sorted({*SMALL} - {"HierarchicalVQ", "EvoLFQ"}))
def test_indices_that_are_none_are_named(kind: str) -> None:
    x = INPUTS.get(kind, vectors())
    module = getattr(facade, kind)(**copy.deepcopy(SMALL[kind])).eval()
    right = indices_of(kind, module, x)
    bad = ["x", 1.5, None, right.float(), right.bool(), torch.full_like(right, 99), torch.full_like(right, -2)]
    bad += [] if kind.endswith(("FSQ", "FSP", "LFQ")) else [right.to(META)]  # without a codebook there may be nothing elsewhere
    for name in DECODERS.split():
        if not hasattr(module, name) or name in ("codes_to_indices", "expire_codes_", "log_prob"):
            continue
        method, extra = getattr(module, name), {"x": x} if name.startswith("update") else {}
        for value in bad:
            check_raises("indices", value, lambda method=method, extra=extra, value=value: method(**extra, indices=value), module)


# What does not go together, and what the peer refuses

IMAGE, VOLUME = vectors(2, 8, 3, 4), vectors(2, 8, 2, 3, 4)
ONES = torch.ones(2, 12, dtype=torch.int64)
MASK = torch.ones(2, 12, dtype=torch.bool)
OWN = {"learnable_codebook": True, "ema_update": False, "rotation_trick": False}
CLASHES: list[tuple[str, dict[str, Any], dict[str, Any] | None, str]] = [
    ("VectorQuantize", {"straight_through": True, "rotation_trick": True}, None, "straight_through rotation_trick"),
    ("VectorQuantize", {"use_cosine_sim": True, **OWN}, None, "use_cosine_sim learnable_codebook"),
    ("VectorQuantize", {**OWN, "straight_through": True}, None, "straight_through learnable_codebook"),
    ("VectorQuantize", {"learnable_codebook": True, "ema_update": True}, None, "ema_update learnable_codebook"),
    ("VectorQuantize", {"vq_bridge": nn.Linear(8, 8), "learnable_codebook": False}, None, "learnable_codebook vq_bridge"),
    ("VectorQuantize", {"vq_bridge": nn.Linear(8, 8), "ema_update": True}, None, "ema_update vq_bridge"),
    ("VectorQuantize", {"sync_update_v": 0.5}, None, "sync_update_v learnable_codebook"),
    ("VectorQuantize", {"affine_param": True, "use_cosine_sim": True}, None, "affine_param use_cosine_sim"),
    ("VectorQuantize", {"in_place_codebook_optimizer": sgd}, None, "in_place_codebook_optimizer learnable_codebook"),
    ("VectorQuantize", {"accept_image_fmap": True}, {"x": IMAGE, "mask": MASK}, "mask accept_image_fmap"),
    ("VectorQuantize", {"accept_3d_fmap": True}, {"x": VOLUME, "mask": MASK}, "mask accept_3d_fmap"),
    ("VectorQuantize", {"accept_image_fmap": True}, {}, "x accept_image_fmap"),
    ("VectorQuantize", {}, {"mask": MASK, "lens": torch.tensor([3, 4])}, "mask lens"),
    ("VectorQuantize", {}, {"x": vectors(2, 8), "mask": MASK[:, 0]}, "mask"),
    ("VectorQuantize", {"heads": 2}, {"topk": 2}, "topk heads"),
    ("VectorQuantize", {"commitment_use_cross_entropy_loss": True}, {"topk": 2}, "topk commitment_use_cross_entropy_loss"),
    ("VectorQuantize", {**OWN, "in_place_codebook_optimizer": sgd}, {"topk": 2}, "topk in_place_codebook_optimizer"),
    (
        "VectorQuantize",
        {"heads": 2, "separate_codebook_per_head": True, "orthogonal_reg_weight": 1.0, "orthogonal_reg_active_codes_only": True},
        {},
        "orthogonal_reg_active_codes_only separate_codebook_per_head",
    ),
    ("ResidualVQ", {"heads": 2}, None, "heads"),
    ("ResidualVQ", {"num_quantizers": None}, None, "num_quantizers codebook_size"),
    ("ResidualVQ", {"codebook_size": (16, 8, 4)}, None, "num_quantizers codebook_size"),
    ("ResidualVQ", {"codebook_size": (16, 8), "shared_codebook": True}, None, "codebook_size shared_codebook"),
    ("ResidualVQ", {"eval_beam_size": 2}, None, "eval_beam_size beam_size"),
    ("ResidualVQ", {"beam_size": 2, "beam_score_quantizer_weights": [1.0]}, None, "beam_score_quantizer_weights"),
    ("ResidualVQ", {"accept_image_fmap": True}, {"x": IMAGE, "indices": ONES}, "indices accept_image_fmap"),
    ("ResidualVQ", {}, {"indices": torch.full((2, 12, 2), -1)}, "indices"),
    ("GroupedResidualVQ", {"groups": 3}, None, "groups dim"),
    ("GroupedResidualVQ", {}, {"x": vectors(2, 12, 6)}, "x"),
    ("GroupedResidualVQ", {}, {"indices": torch.ones(3, 2, 12, 2, dtype=torch.int64)}, "indices"),
    ("RandomProjectionQuantizer", {"heads": 2}, None, "heads"),
    ("FSQ", {"levels": [2, 3]}, None, "levels preserve_symmetry"),
    ("FSQ", {"noise_dropout": 0.5}, None, "noise_dropout preserve_symmetry"),
    ("FSQ", {"num_codebooks": 2, "keep_num_codebooks_dim": False}, None, "num_codebooks keep_num_codebooks_dim"),
    ("LFQ", {"codebook_size": None, "dim": None}, None, "codebook_size dim"),
    ("LFQ", {"soft_clamp_input_value": 0.5}, None, "soft_clamp_input_value codebook_scale"),
    ("LFQ", {"num_codebooks": 2, "keep_num_codebooks_dim": False}, None, "num_codebooks keep_num_codebooks_dim"),
    ("ResidualFSQ", {"soft_clamp_input_value": 2.0}, None, "soft_clamp_input_value bound_hard_clamp"),
    ("ResidualFSQ", {"quantize_dropout": True, "quantize_dropout_cutoff_index": -1}, None, "quantize_dropout_cutoff_index"),
    ("ResidualFSQ", {"num_codebooks": 2}, None, "num_codebooks"),
    ("GroupedResidualFSQ", {"groups": 3}, None, "groups dim"),
    ("GroupedResidualFSQ", {}, {"x": vectors(2, 12, 6)}, "x"),
    ("ResidualLFQ", {"quantize_dropout_cutoff_index": -1}, None, "quantize_dropout_cutoff_index"),
    ("ResidualLFQ", {"num_codebooks": 2}, None, "num_codebooks"),
    ("GroupedResidualLFQ", {"groups": 3}, None, "groups dim"),
    ("GroupedResidualLFQ", {}, {"x": vectors(2, 12, 6)}, "x"),
    ("ResidualSimVQ", {"heads": 2}, None, "heads"),
    ("ResidualSimVQ", {"quantize_dropout_cutoff_index": -1}, None, "quantize_dropout_cutoff_index"),
    ("LatentQuantize", {"levels": 5}, None, "codebook_dim levels"),
    ("LatentQuantize", {"codebook_dim": 3}, None, "codebook_dim levels"),
    ("HierarchicalVQ", {"accept_image_fmap": True, "accept_3d_fmap": True}, None, "accept_image_fmap accept_3d_fmap"),
    ("HierarchicalVQ", {"codebook_size": (16, 16, 16), "shared_codebook": False}, None, "codebook_size"),
    ("HierarchicalVQ", {"codebook_size": (16, 8)}, None, "codebook_size shared_codebook"),
    ("HierarchicalVQ", {"scales": (2, 1)}, None, "scales"),
    ("HierarchicalVQ", {"accept_image_fmap": True, "scales": (1, (2, 2, 2))}, None, "scales"),
    ("HierarchicalVQ", {}, {"x": IMAGE}, "x"),
    ("HierarchicalVQ", {}, {"mask": MASK, "lens": torch.tensor([3, 4])}, "mask lens"),
    ("HierarchicalVQ", {"accept_image_fmap": True}, {"x": IMAGE, "lens": torch.tensor([3, 4])}, "lens"),
    ("EvoLFQ", {"pop_size": 4, "elitism_count": 4}, None, "pop_size elitism_count"),
    ("EvoLFQ", {"dim": None}, None, "dim codebook_size lfq"),
]
"""Class, arguments, those of a call if it is the call, and the names that have to be told."""


@pytest.mark.parametrize(("kind", "options", "calls", "names"), CLASHES, ids=str)
def test_what_does_not_go_together_is_told_by_all_its_names(
    kind: str, options: dict[str, Any], calls: dict[str, Any] | None, names: str
) -> None:
    def make(package: Any) -> Any:
        return getattr(package, kind)(**copy.deepcopy({**SMALL[kind], **options}))

    def call(module: Any) -> Exception | None:
        given = {"x": INPUTS.get(kind, vectors()), **(calls or {})}
        return error_of(lambda: module(given.pop("x"), **given))

    error = error_of(lambda: make(facade)) if calls is None else call(make(facade))
    assert error_of(lambda: make(peer)) or call(make(peer)), "the library takes it"
    assert isinstance(error, (ValueError, TypeError)), repr(error)
    for name in names.split():
        assert re.search(rf"\b{name}\b", str(error)), f"{name}: {error}"


# What the peer takes


def error_of(call: Callable[[], Any]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def cases(kind: str, package: Any) -> Iterator[tuple[str, Any, Exception | None]]:
    """Name, bad value, and what it raises in a package: at construction, or in the first call."""
    x, cls = INPUTS.get(kind, vectors()), getattr(package, kind)
    names = getattr(facade, kind)
    parameters = inspect.signature(names.__init__).parameters
    for name in sorted(arguments_of(names.__init__)):
        for value in bad_values(kind, name, parameters[name].default):
            given = {**constructor_of(kind, name), name: value}
            yield name, value, error_of(lambda given=given: cls(**given)(x))
    module = cls(**copy.deepcopy(SMALL[kind]))
    parameters = inspect.signature(names.forward).parameters
    for name in sorted(arguments_of(names.forward, skip=2)):
        for value in bad_values(kind, name, parameters[name].default):
            yield name, value, error_of(lambda name=name, value=value: module(x, **{name: value}))


@pytest.mark.parametrize("kind", sorted(SMALL))
def test_what_is_refused_here_alone_stands_in_the_table(kind: str) -> None:
    for (name, value, here), (_, _, there) in zip(cases(kind, facade), cases(kind, peer), strict=True):
        if here is None or there is not None:
            continue
        option = OF_TENSORS.get(name) or ("arguments of another type" if isinstance(here, TypeError) else "numbers out of range")
        facts = {option: True}
        assert any(row.meets(kind, facts) for row in DEVIATIONS), f"{name} = {value!r:.60} is taken there; here: {here}"


OF_TENSORS = {
    "mask": "mask of another shape or dtype",
    "lens": "lens below 0, or no integers",
    "ema_update_weight": "ema_update_weight below 0, or beyond the new averages",
    "indices": "indices that do not fit",
    **dict.fromkeys(("x", "z", "logits"), "inputs that do not fit"),
}
"""What of them stands in the table."""


# Names that there are not


@pytest.mark.parametrize(
    ("kind", "misspelt", "near"),
    [
        ("VectorQuantize", "decya", "decay"),
        ("ResidualVQ", "decya", "decay"),
        ("ResidualVQ", "beam_sise", "beam_size"),
        ("GroupedResidualVQ", "num_quantizer", "num_quantizers"),
        ("GroupedResidualVQ", "kmean_init", "kmeans_init"),
        ("GroupedResidualVQ", "group", "groups"),
        ("RandomProjectionQuantizer", "commitment_weights", "commitment_weight"),
        ("GroupedResidualFSQ", "noise_droput", "noise_dropout"),
        ("GroupedResidualLFQ", "entropy_weight_loss", "entropy_loss_weight"),
        ("ResidualSimVQ", "codebook_transforms", "codebook_transform"),
        ("EvoLFQ", "spherica", "spherical"),
        ("HierarchicalVQ", "kmean_init", "kmeans_init"),
    ],
)
def test_a_name_that_there_is_not_is_answered_by_the_nearest(kind: str, misspelt: str, near: str) -> None:
    with pytest.raises(TypeError, match=f"{kind} has no argument '{misspelt}'; did you mean '{near}'"):
        getattr(facade, kind)(**SMALL[kind], **{misspelt: 1})


def test_a_name_that_a_call_has_not_is_answered_by_the_nearest() -> None:
    vq = facade.VectorQuantize(8, 16)
    with pytest.raises(TypeError, match="forward has no argument 'masks'; did you mean 'mask'"):
        vq(vectors(), masks=None)
    with pytest.raises(TypeError, match="'dim'"):
        facade.VectorQuantize()


# What is not bad


@pytest.mark.parametrize("kind", sorted(SMALL))
def test_none_is_a_flag_that_is_not_set(kind: str) -> None:
    parameters = inspect.signature(getattr(facade, kind).__init__).parameters
    for name in parameters.keys() & set(FLAGS.split()):
        getattr(facade, kind)(**{**SMALL[kind], name: None})


def test_numbers_of_numpy_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    vq = facade.VectorQuantize(numpy.int64(8), numpy.int32(16), decay=numpy.float32(0.5), kmeans_init=numpy.bool_(False))
    assert vq(vectors())[0].shape == (2, 12, 8)


@pytest.mark.parametrize(
    ("kind", "options", "name", "number"),
    [
        ("VectorQuantize", {"stochastic_sample_codes": True}, "sample_codebook_temp", 0.3),
        ("VectorQuantize", {"stochastic_sample_codes": True}, "sample_codebook_temp", -1.0),
        ("LFQ", {}, "inv_temperature", 3.0),
        ("BinaryMapper", {}, "temperature", 0.5),
    ],
)
def test_a_tensor_without_axes_is_a_number(kind: str, options: dict[str, Any], name: str, number: float) -> None:
    module, x = getattr(facade, kind)(**{**SMALL[kind], **options}), INPUTS.get(kind, vectors())
    found = []
    for given in (number, torch.tensor(number)):
        torch.manual_seed(0)
        found.append(copy.deepcopy(module)(x, **{name: given}))
    torch.testing.assert_close(*found)
    check_raises(name, given := torch.tensor(number, requires_grad=True), lambda: module(x, **{name: given}), module)
    assert facade.VectorQuantize(8, 16, decay=torch.tensor(0.5))._codebook.decay == 0.5


@pytest.mark.parametrize(
    ("kind", "options", "first"),
    [
        ("VectorQuantize", {}, False),
        ("VectorQuantize", {"channel_last": False}, True),
        ("HierarchicalVQ", {"scales": (1, 2), "kmeans_init": False}, True),
        ("HierarchicalVQ", {"scales": (1, 2), "kmeans_init": False, "channel_first": False}, False),
    ],
)
def test_lengths_beyond_the_sequence_are_all_of_it(kind: str, options: dict[str, Any], first: bool) -> None:
    module = getattr(facade, kind)(dim=8, codebook_size=16, **options).eval()
    x = vectors().mT.contiguous() if first else vectors()
    one, other = (module(x, lens=torch.tensor([5, most])) for most in (12, 99))
    torch.testing.assert_close(one[0], other[0])
    assert not torch.equal(one[0], module(x)[0])


def test_what_indexes_a_codebook_need_not_be_a_tensor() -> None:
    torch.manual_seed(0)
    there, here = (package.VectorQuantize(8, 16, codebook_dim=4) for package in (peer, facade))
    here.load_state_dict(there.state_dict())
    array = torch.tensor([[3, 0], [15, 3]]).numpy()
    for indices in (3, [3, 0, 15], array, torch.tensor(3)):
        for name in ("get_codes_from_indices", "get_output_from_indices"):
            torch.testing.assert_close(getattr(here, name)(indices), getattr(there, name)(indices))


@pytest.mark.parametrize("weight", [0.5, torch.arange(16) % 2, torch.arange(16) % 2 > 0], ids=["number", "integers", "bool"])
def test_weights_of_codes_are_numbers_of_any_kind(weight: Any) -> None:
    torch.manual_seed(0)
    there, here = (package.VectorQuantize(8, 16) for package in (peer, facade))
    here.load_state_dict(there.state_dict())
    for module in (there, here):
        module(vectors(), ema_update_weight=weight)
    torch.testing.assert_close(here._codebook.embed, there._codebook.embed)


# Errors that are not the facade's, and programs


def test_what_a_function_of_the_user_raises_is_left_alone() -> None:
    def raising(codes: Tensor) -> Tensor:
        raise ValueError("lengths and targets of mine, on another device")

    with pytest.raises(ValueError, match="lengths and targets of mine, on another device"):
        facade.VectorQuantize(8, 16)(vectors(), codebook_transform_fn=raising)
    with pytest.raises(RuntimeError, match="mat1"):
        facade.EvoLFQ(nn.Linear(5, 4), nn.Linear(4, 8), dim=4)(vectors())


def test_what_is_set_is_named() -> None:
    vq = facade.VectorQuantize(8, 16, learnable_codebook=True, ema_update=False)
    for module, name in ((vq._codebook, "decay"), (vq, "sync_update_v"), (vq, "directional_reparam_variance")):
        before = getattr(module, name)
        for value in (-1.5, "x"):
            check_raises(name, value, lambda module=module, name=name, value=value: setattr(module, name, value), vq)
        assert getattr(module, name) == before


@pytest.mark.parametrize("kind", ["VectorQuantize", "ResidualVQ", "HierarchicalVQ"])
def test_a_codebook_that_waits_for_its_start_says_what_to_do(kind: str) -> None:
    module = getattr(facade, kind)(**{**SMALL[kind], "kmeans_init": True}).eval()
    with pytest.raises(ValueError, match=r"^kmeans_init = True: .* training mode first.*_codebook\.init_embed_") as caught:
        module(INPUTS.get(kind, vectors()))
    assert "KMeans" not in str(caught.value)


@pytest.mark.parametrize("training", [True, False])
def test_codes_of_another_shape_that_were_written_are_named(training: bool) -> None:
    vq = facade.VectorQuantize(8, 16).train(training)
    vq._codebook.embed.data = torch.randn(16, 8)
    with pytest.raises(ValueError, match=r"^_codebook\.embed has shape \(16, 8\): must be \(1, 16, 8\)"):
        vq(vectors())


def test_calls_are_one_graph() -> None:
    vq = facade.VectorQuantize(8, 16).eval()
    compiled = torch.compile(vq, fullgraph=True, backend="aot_eager")
    mask = torch.arange(12).expand(2, 12) > 3
    for one, other in zip(compiled(vectors(), mask=mask), vq(vectors(), mask=mask), strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match="topk = 0: must be at least 1"):
        torch.compile(vq, backend="aot_eager")(vectors(), topk=0)
