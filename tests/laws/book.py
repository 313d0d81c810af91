"""The laws by name: what each says, and on which cases of the family it is tried.

A law is tested by the function `test_<name>` of a file of this folder, for every case that `among` lets through; `exceptions.py` says
where it does not hold. docs/laws.md is written from here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from laws.exceptions import EXCEPTIONS, Exempt
from laws.family import CASES, Case


@dataclass(frozen=True)
class Law:
    """`says` is a sentence for people; `among` picks the cases, and `scope` says in words which."""

    name: str
    says: str
    among: Callable[[Case], bool] = lambda case: True
    scope: str = ""

    @property
    def cases(self) -> list[Case]:
        return [case for case in CASES if self.among(case)]


def _learns(case: Case) -> bool:
    return case.learns


def _steps(case: Case) -> bool:
    return case.steps


def _has_verbs(case: Case) -> bool:
    return not case.in_heads


def _plain(case: Case) -> bool:
    """One codebook whose codes can be set, and no projection between them and the input."""
    moved = ("transform", "affine")
    return case.kind.__name__ == "VectorQuantize" and not case.projects and not any(name in case.arguments for name in moved)


def _few(case: Case) -> bool:
    return case.represents and (not case.options or any(option.startswith(("assignment=", "commit=")) for option in case.options))


def _reads_its_own_way(case: Case) -> bool:
    own = {
        "metric",
        "transform",
        "affine",
        "heads",
        "codebook_dim",
        "layout",
        "codebook_size",
        "shared_codebook",
        "implicit",
        "layers",
        "parts",
    }
    changed = {option.split("=")[0] for option in case.options}
    return bool(own & changed) or not case.options or case.represents


def _has_time(case: Case) -> bool:
    return bool(case.positions)


_LEARNING = {"among": _learns, "scope": "those that learn"}
_STEPPING = {"among": _steps, "scope": "those that learn, or have layers that do"}
_QUANTIZERS = {"among": _has_verbs, "scope": "all but those of Transformer-VQ, which its model calls"}
_SEQUENCES = {"among": _has_time, "scope": "those with positions behind the batch"}
_PLAIN = {"among": _plain, "scope": "VectorQuantize whose codes are what is stored, on the input itself"}
_ONE_OF_EACH = {"among": lambda case: case.represents, "scope": "one of each way to learn; tests/quantizers has more"}
_FEW = {"among": _few, "scope": "a few, as it takes long"}
_READ = {"among": _reads_its_own_way, "scope": "those that read or write in a way of their own"}
_ONE = {"among": lambda case: case.inductor, "scope": "one, as it takes long"}

_LAWS = [
    # Values
    Law("decode_of_encode_is_the_output", "decode(encode(x)) is the output of an eval call, and encode its indices, in training too"),
    Law("shapes_are_told", "indices have the positions of the input and code_shape; bits_per_vector; -1 decodes", **_QUANTIZERS),
    Law("a_mask_of_ones_is_no_mask", "a mask of ones gives the output, loss, gradients and codebook of no mask"),
    Law("masked_vectors_influence_nothing", "what a masked vector holds, NaN too, changes no output, loss, gradient or codebook"),
    Law("order_does_not_matter", "permuted vectors give permuted outputs, the same loss and codebook (1e-5)"),
    Law("arrangement_does_not_matter", "the same vectors in another batch size give the same loss and codebook (1e-5)", **_SEQUENCES),
    Law("dtype_in_is_dtype_out", "output and input gradient have the dtype of the input: float64, float32, bfloat16, float16"),
    Law("autocast_changes_nothing", "under autocast the same projected input gets the same indices and codes, in train and eval"),
    Law("narrow_modules_assign_as_float32", "bfloat16 and float16 modules assign as float32 does, and learn in float32"),
    Law("far_and_tiny_data_assign_right", "data 1000 from the origin or of scale 1e-5: regret within rounding, in float64", **_PLAIN),
    Law("vectors_that_are_not_finite_enter_nothing", "NaN, Inf: index -1, output 0, no loss, no gradient, no codebook"),
    Law("nothing_to_quantize_works", "an empty or fully masked input gives finite outputs, losses, gradients and codebooks"),
    Law("training_returns_one_codebook", "output and indices of a training call are those of the codebook before it, and of eval"),
    Law("the_same_seed_repeats", "the same seed gives the same steps"),
    Law(
        "second_derivatives_are_given_or_refused",
        "no gradient is taken for a constant, whichever way it is asked for",
    ),
    # State
    Law("eval_changes_nothing", "eval calls of every verb, with gradients, leave state and random generator as they were"),
    Law("frozen_changes_nothing", "training calls with freeze_codebook leave the state as it was", **_QUANTIZERS),
    Law("a_call_that_raises_changes_nothing", "wrong width, rank, dtype, mask, indices: an error that names them, the state as it was"),
    Law("the_loss_is_nobodys_buffer", "changing a returned loss or output in place changes nothing; eval losses have no gradient"),
    Law("reading_writes_nothing", "state_dict() and codebook give the committed value and write nothing; twice is once", **_LEARNING),
    Law("the_codebook_learns", "a training step changes the codes", **_LEARNING),
    Law("any_state_survives_the_state_dict", "strict round trip before, between and after steps; then both go on alike"),
    Law("copies_are_whole", "pickles, copies and modules made on the meta device and loaded go on alike"),
    Law("the_setter_lasts", "a codebook that is set stays set, also after a commit (1e-6)", **_LEARNING),
    Law("metrics_are_told", "metrics() after a step: perplexity, active, dead, relative_error, non_finite", **_QUANTIZERS),
    # Engines
    Law("recomputed_is_not_counted_twice", "activation checkpointing, reentrant or not: output, gradients, codebook, which did change"),
    Law(
        "compiled_is_eager",
        "torch.compile(fullgraph=True, backend='aot_eager') in train and eval: output, gradients, codebook",
        **_ONE_OF_EACH,
    ),
    Law("checkpointing_compiles", "checkpointing around and inside compile: output, gradients, codebook", **_FEW),
    Law("inductor_is_eager", "the default compiler in train and eval (1e-5)", **_ONE),
    Law("transforms_see_what_autograd_does", "torch.func's grad, vmap and vmap of grad of an eval call: gradient and output (1e-5)"),
    Law("encode_and_decode_export", "torch.export of encode and decode", **_READ),
    Law("micro_batches_are_one_batch", "k micro-batches and one commit give the gradients and codebook of one batch (1e-5)", **_STEPPING),
    Law("many_processes_are_one", "DDP, 2 and 4 processes x 2 micro-batches: ranks equal; one process on it all (1e-5)", **_STEPPING),
]

LAWS = {law.name: law for law in _LAWS}


def exemption(case: Case, law: str) -> Exempt | None:
    """The first line of the table of exceptions that speaks of this case and law."""
    return next((e for e in EXCEPTIONS if e.law == law and e.covers(case)), None)


def law(function: Any) -> Any:
    """Try `test_<name>(case)` on every case of the law; where the table exempts one, it must fail as the table says."""
    name = function.__name__.removeprefix("test_")
    parameters = []
    for case in LAWS[name].cases:
        exempt = exemption(case, name)
        mark = pytest.mark.xfail(strict=True, raises=exempt.raises, reason=exempt.reason) if exempt else ()
        parameters.append(pytest.param(case, id=case.name, marks=mark))
    return pytest.mark.parametrize("case", parameters)(function)
