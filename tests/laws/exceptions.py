"""Where a law does not hold: one line for an option, a law and the reason. Each is tested to fail, so that none outlives its reason."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from laws.family import Case


@dataclass(frozen=True)
class Exempt:
    """`option` is the pattern of one of a case's options, of its class or of its whole name."""

    option: str
    law: str
    reason: str
    raises: type[Exception] | tuple[type[Exception], ...] = AssertionError

    def covers(self, case: Case) -> bool:
        return any(fnmatchcase(option, self.option) for option in (case.kind.__name__, case.name, *case.options))


_DRAWN = "which code a vector gets is drawn in training, one draw a place in the batch"
_NOISE = "the training output is moved by noise, one draw a place in the batch"
_EXPIRY = "which vectors replace dead codes is drawn, one draw a place in the batch"
_IN_TRAINING = "training draws its output, evaluation does not"
_ACTIVE = "the codes that a batch uses are more than those its parts use, and this loss looks at them alone"
_SAMPLED = "the codes that this loss looks at are drawn in every call"
_SHAPES = "codebooks of different shapes are read and set one by one; all at once is an error"

_MAPPED = "the codes are a transform of what is stored; setting them is an error"
_PRODUCT = "the codes are all combinations of the values of scalars, which are what can be set"
_SHARED = "which vectors the losses see is drawn in every call"
_NEIGHBOURS = "its codes are those of whole grids of neighbours"
_SPREAD = "the entropy of a batch is not the mean of those of its parts"

EXCEPTIONS = [
    Exempt("assignment=Gumbel*", "order_does_not_matter", _DRAWN),
    Exempt("assignment=Gumbel*", "training_returns_one_codebook", _IN_TRAINING),
    Exempt("assignment=Gumbel*", "micro_batches_are_one_batch", _DRAWN),
    Exempt("assignment=Gumbel*", "many_processes_are_one", _DRAWN),
    Exempt("estimator=DiVeQ*", "order_does_not_matter", _NOISE),
    Exempt("estimator=DiVeQ*", "training_returns_one_codebook", _IN_TRAINING),
    Exempt("estimator=DiVeQ*", "micro_batches_are_one_batch", _NOISE),
    Exempt("estimator=DiVeQ*", "many_processes_are_one", _NOISE),
    Exempt("*dead_code*", "order_does_not_matter", _EXPIRY),
    Exempt("*dead_code*", "micro_batches_are_one_batch", _EXPIRY),
    Exempt("affine=*current=True*", "training_returns_one_codebook", "training reads the codes by the moments of its own vectors"),
    Exempt("affine=*current=True*", "many_processes_are_one", "a forward reads the codes by the moments of its own micro-batch"),
    Exempt("update=StoredEMA(*count=False*", "metrics_are_told", "nothing is counted, as asked for"),
    Exempt("quantize_dropout=*", "training_returns_one_codebook", "training drops layers, evaluation does not"),
    Exempt("on_nonfinite=raise", "vectors_that_are_not_finite_enter_nothing", "they are an error, as asked for", ValueError),
    Exempt("input_gradient=False", "recomputed_is_not_counted_twice", "nothing asks for a gradient, and torch refuses", RuntimeError),
    Exempt("losses=*active_only*", "micro_batches_are_one_batch", _ACTIVE),
    Exempt("losses=*active_only*", "many_processes_are_one", _ACTIVE),
    Exempt("losses=*max_codes*", "micro_batches_are_one_batch", _SAMPLED),
    Exempt("losses=*max_codes*", "many_processes_are_one", _SAMPLED),
    Exempt("transform=*", "the_setter_lasts", _MAPPED, ValueError),
    Exempt("SimVQ", "the_setter_lasts", _MAPPED, ValueError),
    Exempt("layers=mapped_tables", "the_setter_lasts", _MAPPED, ValueError),
    Exempt("codebook_size=*+*", "the_setter_lasts", _SHAPES, ValueError),
    Exempt("layers=*", "the_setter_lasts", _SHAPES, ValueError),
    Exempt("parts=unequal_widths", "the_setter_lasts", _SHAPES, ValueError),
    Exempt("LatentQuantize", "the_setter_lasts", _PRODUCT, AttributeError),
    Exempt("noise_dropout=*", "order_does_not_matter", _NOISE),
    Exempt("noise_dropout=*", "training_returns_one_codebook", _IN_TRAINING),
    Exempt("noise_dropout=*", "micro_batches_are_one_batch", _NOISE),
    Exempt("noise_dropout=*", "many_processes_are_one", _NOISE),
    Exempt("quantize_rate=0*", "order_does_not_matter", _NOISE),
    Exempt("quantize_rate=0*", "training_returns_one_codebook", _IN_TRAINING),
    Exempt("quantize_rate=0*", "micro_batches_are_one_batch", _NOISE),
    Exempt("quantize_rate=0*", "many_processes_are_one", _NOISE),
    Exempt("BinaryMapper", "order_does_not_matter", _DRAWN),
    Exempt("BinaryMapper", "training_returns_one_codebook", _IN_TRAINING),
    Exempt("BinaryMapper", "micro_batches_are_one_batch", _DRAWN),
    Exempt("BinaryMapper", "many_processes_are_one", _DRAWN),
    Exempt("loss_share=*", "order_does_not_matter", _SHARED),
    Exempt("Hierarchical*", "order_does_not_matter", _NEIGHBOURS, (AssertionError, RuntimeError)),
    Exempt("Hierarchical*", "arrangement_does_not_matter", _NEIGHBOURS),
    Exempt("nested_dropout=*", "training_returns_one_codebook", "training leaves levels out, evaluation does not"),
    Exempt("Hierarchical(levels=*", "the_setter_lasts", _SHAPES, ValueError),
    Exempt("LFQ(*Diversity*", "micro_batches_are_one_batch", _SPREAD),
    Exempt("LFQ(*Diversity*", "many_processes_are_one", _SPREAD),
]

_DEVICE = "there is no other device than the CPU where the laws run; tests of meta-device construction set it"

NOT_VARIED: dict[tuple[str, ...], str] = {
    ("Quantizer",): "the interface",
    ("ImplicitVQ",): "a layer of ResidualVQ(implicit=...)",
    ("VectorQuantize", "device"): _DEVICE,
    ("VectorQuantize", "table"): "a codebook of another class with the same rules, as the facade makes it, which is compared with its peer",
    ("Residual", "device"): _DEVICE,
    ("ResidualVQ", "device"): _DEVICE,
    ("BinaryMapper", "device"): _DEVICE,
    ("FSP", "device"): _DEVICE,
    ("Hierarchical", "device"): _DEVICE,
    ("HierarchicalVQ", "device"): _DEVICE,
    ("FSQ", "device"): _DEVICE,
    ("LFQ", "device"): _DEVICE,
    ("LatentQuantize", "device"): _DEVICE,
    ("LearnableVQ", "device"): _DEVICE,
    ("LearnableVQ", "dtype"): "the golden arrays run in float64",
    ("SimpleVQ", "device"): _DEVICE,
    ("SimpleVQ", "dtype"): "the golden arrays run in float64",
    ("SimpleVQ", "base"): "the golden arrays have others",
}
"""(class,), (class, argument), (class, argument, choice) or (choice, field) that stands in no case, and why."""
