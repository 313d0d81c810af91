"""Choices of a quantizer as plain dataclasses, without torch: how a codebook starts, learns and is read, and what is lost on the way.

A choice without parameters is a string, one with parameters a small frozen dataclass; each says here what it does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal

Metric = Literal["euclidean", "cosine"]
Commit = Literal["auto", "manual"]


def check_choice(name: str, value: object, choices: Sequence[str], kinds: tuple[type, ...] = ()) -> None:
    """Raise ValueError unless `value` is one of the words, or an instance of one of the kinds."""
    if isinstance(value, kinds) or (isinstance(value, str) and value in choices):
        return
    what = [*map(repr, choices), *(f"{kind.__name__}(...)" for kind in kinds)]
    raise ValueError(f"{name} = {value!r}: must be one of {', '.join(what)}")


def check_kind(name: str, value: object, *kinds: type) -> None:
    """Raise TypeError unless `value` is an instance of one of the kinds."""
    if not isinstance(value, kinds):
        raise TypeError(f"{name} = {value!r}: must be {' or '.join(f'{kind.__name__}(...)' for kind in kinds)}")


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise TypeError unless `value` is an integer, ValueError unless it is at least `least`."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} = {value!r}: must be an integer")
    if value < least:
        raise ValueError(f"{name} = {value}: must be at least {least}")


def check_number(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a real number."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} = {value!r}: must be a number")


def check_positive(name: str, value: float | Sequence[float], width: int) -> float | tuple[float, ...]:
    """One positive number, or one a scalar. Raises ValueError, or TypeError for what is no number."""
    several = isinstance(value, Sequence) and not isinstance(value, str)
    values = tuple(value) if several else (value,)
    for place, entry in enumerate(values):
        own = f"{name}[{place}]" if several else name
        check_number(own, entry)
        if not 0 < entry < math.inf:
            raise ValueError(f"{own} = {entry}: must be positive and finite")
    if several and len(values) != width:
        raise ValueError(f"{name} has {len(values)} entries: must be {width}, one a scalar")
    return tuple(map(float, values)) if several else float(values[0])


def _check(owner: object, name: str, right: bool, what: str) -> None:
    if not right:
        raise ValueError(f"{type(owner).__name__}.{name} = {getattr(owner, name)!r}: must be {what}")


def _number(owner: object, name: str) -> float:
    value = getattr(owner, name)
    check_number(f"{type(owner).__name__}.{name}", value)
    return value


def _check_decay(owner: object, name: str = "decay") -> None:
    _check(owner, name, 0.0 <= _number(owner, name) < 1.0, "at least 0 and below 1")


def _check_moving(owner: object, *names: str) -> None:
    """Decays of what may also stand still."""
    for name in names:
        _check(owner, name, 0.0 <= _number(owner, name) <= 1.0, "from 0 to 1")


def _check_positive(owner: object, *names: str) -> None:
    for name in names:
        _check(owner, name, 0 < _number(owner, name) < math.inf, "positive and finite")


def _check_not_negative(owner: object, *names: str) -> None:
    for name in names:
        _check(owner, name, 0 <= _number(owner, name) < math.inf, "0 or positive, and finite")


def _check_numbers(owner: object, name: str) -> None:
    values = getattr(owner, name)
    if not isinstance(values, tuple | list):
        raise TypeError(f"{type(owner).__name__}.{name} = {values!r}: must be a tuple of numbers")
    for place, value in enumerate(values):
        check_number(f"{type(owner).__name__}.{name}[{place}]", value)


def _check_count(owner: object, *names: str, least: int = 1) -> None:
    for name in names:
        check_count(f"{type(owner).__name__}.{name}", getattr(owner, name), least)


# How a codebook learns


@dataclass(frozen=True)
class EMA:
    """Moving averages of count and sum per code, the counts smoothed after Laplace (van den Oord et al., 2017, appendix A.1)."""

    decay: float = 0.99
    """1 - decay of each new batch enters."""
    eps: float = 1e-5
    """What Laplace smoothing adds to each count."""

    def __post_init__(self) -> None:
        _check_decay(self)
        _check_not_negative(self, "eps")


@dataclass(frozen=True)
class ClipEMA:
    """Moving averages whose counts are clipped from below (Transformer-VQ; Lingle, 2024)."""

    decay: float = 0.99
    floor: float = 0.01
    """Codes are sum / max(count, floor)."""

    def __post_init__(self) -> None:
        _check_decay(self)
        _check_positive(self, "floor")


@dataclass(frozen=True)
class StoredEMA:
    """Codes of their own beside moving averages as `EMA` keeps them: what a commit makes of either is a choice."""

    decay: float = 0.99
    """1 - decay of each new batch enters the averages; 1 leaves them as they are."""
    eps: float = 1e-5
    """What Laplace smoothing adds to each count."""
    follow: bool = True
    """Whether a commit sets the codes to the averages; else they stay where they are, but for dead ones."""
    count: bool = True
    """Whether the averages move at all; only where the codes do not follow may they stand still."""
    learn: bool = False
    """Whether the codes are a parameter, too. Where they follow, the averages then start at every commit from where it stands."""

    def __post_init__(self) -> None:
        _check_moving(self, "decay")
        _check_not_negative(self, "eps")
        _check(self, "count", self.count or not self.follow, "True where follow is True")


@dataclass(frozen=True)
class Gradient:
    """The codes are a parameter, stepped by the optimizer of the whole model."""

    decay: float = 0.99
    """Of the moving count per code that the expiry of dead codes looks at."""

    def __post_init__(self) -> None:
        _check_decay(self)


@dataclass(frozen=True)
class OwnOptimizer:
    """The codes are stepped at every commit by an optimizer of their own, from the statistics.

    The gradient is that of the mean squared error of the vectors to their codes: 2 (count c - sum) / (N d) for N vectors of width d.
    """

    name: Literal["adam", "sgd"] = "adam"
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's rates."""
    eps: float = 1e-8
    """Adam's addend to the denominator."""
    momentum: float = 0.0
    """SGD's momentum."""
    decay: float = 0.99
    """Of the moving count per code that the expiry of dead codes looks at."""

    def __post_init__(self) -> None:
        check_choice("OwnOptimizer.name", self.name, ("adam", "sgd"))
        _check_positive(self, "learning_rate", "eps")
        _check_numbers(self, "betas")
        _check(self, "betas", len(self.betas) == 2 and all(0.0 <= beta < 1.0 for beta in self.betas), "two rates of at least 0 and below 1")
        _check_decay(self, "momentum")
        _check_decay(self)


@dataclass(frozen=True)
class Frozen:
    """The codes never change; a transform of them may still learn (SimVQ)."""


Update = EMA | ClipEMA | StoredEMA | Gradient | OwnOptimizer | Frozen


# How a codebook starts and stays alive


@dataclass(frozen=True)
class KMeans:
    """Start at the k-means of the first vectors: by `initialize_`, or by itself in the first eager training forward."""

    iterations: int = 10
    start: Literal["random", "k-means++"] = "k-means++"

    def __post_init__(self) -> None:
        _check_count(self, "iterations")
        check_choice("KMeans.start", self.start, ("random", "k-means++"))


Init = Literal["uniform", "normal", "unit"] | KMeans


@dataclass(frozen=True)
class DeadCodes:
    """Codes whose moving count falls below `threshold` start anew at random vectors of the batch.

    Counts start at `reset_count` too, so that a code that was merely not yet used has time: by default about
    0.7 / (1 - decay) commits.
    """

    threshold: float
    reset_count: float | None = None
    """The count a new code gets; None = twice the threshold."""

    def __post_init__(self) -> None:
        _check_positive(self, "threshold")
        if self.reset_count is not None:
            _check(
                self, "reset_count", self.threshold <= _number(self, "reset_count") < math.inf, "None or at least the threshold, and finite"
            )

    @property
    def start_count(self) -> float:
        return 2 * self.threshold if self.reset_count is None else self.reset_count


# How a codebook is read


@dataclass(frozen=True)
class Affine:
    """Codes scaled and shifted as a whole to follow the moving mean and variance of the vectors (Huh et al., 2023)."""

    batch_decay: float = 0.99
    """Of the mean and variance of the vectors."""
    codebook_decay: float = 0.9
    """Of the mean and variance of the codes."""
    current: bool = False
    """Whether a training forward already reads the codes by the moments of its own vectors; else by those up to the last commit."""

    def __post_init__(self) -> None:
        _check_moving(self, "batch_decay", "codebook_decay")


@dataclass(frozen=True)
class MLP:
    """The codes are the stored vectors after a perceptron with `depth` hidden layers of width `hidden`."""

    hidden: int
    depth: int = 1

    def __post_init__(self) -> None:
        _check_count(self, "hidden", "depth")


@dataclass(frozen=True)
class VQBridge:
    """The codes are the stored vectors after a small vision transformer that sees all of them (FVQ; Chang et al., 2025).

    `patch` neighbours are compressed to one token; `depth` blocks of `heads` heads process tokens of width `hidden`; each token gives its
    codes back.
    """

    patch: int = 16
    """Must divide the number of codes. The time of a block grows with the square of codes / patch."""
    hidden: int = 256
    depth: int = 1
    heads: int = 4

    def __post_init__(self) -> None:
        _check_count(self, "patch", "hidden", "depth", "heads")
        _check(self, "heads", self.hidden % self.heads == 0, f"a divisor of hidden = {self.hidden}")


# How codes are chosen, and what gradient passes the choice


@dataclass(frozen=True)
class Gumbel:
    """In training, codes drawn from the softmax of minus the distances (or of the cosines) over `temperature`, as by Gumbel noise."""

    temperature: float = 1.0
    """0 is the nearest code."""
    estimator: Literal["straight_through", "reinmax"] | None = None
    """The gradient of the softmax that the output gets in place of the quantizer's `estimator`: of first order (Jang et al., 2017), or of
    second (Liu et al., 2023). None: that of the quantizer's `estimator`, none of the softmax."""

    def __post_init__(self) -> None:
        _check_not_negative(self, "temperature")
        _check(self, "estimator", self.estimator in (None, "straight_through", "reinmax"), "None, 'straight_through' or 'reinmax'")


@dataclass(frozen=True)
class Softmax:
    """The nearest code, in training with the gradient of a softmax, as `Gumbel` has it, in place of the quantizer's `estimator`."""

    temperature: float = 1.0
    estimator: Literal["straight_through", "reinmax"] = "straight_through"

    def __post_init__(self) -> None:
        _check_positive(self, "temperature")
        check_choice("Softmax.estimator", self.estimator, ("straight_through", "reinmax"))


Assignment = Literal["nearest"] | Gumbel | Softmax


@dataclass(frozen=True)
class DiVeQ:
    """Directional reparametrisation: the vector moves by the length of its error in a noisy direction towards its code."""

    sigma2: float = 1e-3
    """Variance of the noise."""

    def __post_init__(self) -> None:
        _check_not_negative(self, "sigma2")


Estimator = Literal["straight_through", "rotation", "none"] | DiVeQ


# Losses


@dataclass(frozen=True)
class Commitment:
    """Squared distance of the vectors to their codes, which are constants (van den Oord et al., 2017)."""

    weight: float = 1.0
    pull: float = 1.0
    """Where the codes learn by gradient: how much they are pulled to the vectors, in multiples of `weight`."""

    def __post_init__(self) -> None:
        _check_not_negative(self, "weight", "pull")


@dataclass(frozen=True)
class CrossEntropyCommitment:
    """Cross-entropy of the choice of a code, with the similarities as logits."""

    weight: float = 1.0

    def __post_init__(self) -> None:
        _check_not_negative(self, "weight")


@dataclass(frozen=True)
class Orthogonality:
    """Squared cosines of all pairs of different codes, over the number of codes squared (Shin et al., 2021).

    Its gradient reaches the codes alone, which must learn by gradient.
    """

    weight: float = 1.0
    active_only: bool = False
    """Only codes that this batch chose."""
    max_codes: int | None = None
    """At most so many codes, drawn at random; None = all."""

    def __post_init__(self) -> None:
        _check_not_negative(self, "weight")
        if self.max_codes is not None:
            _check_count(self, "max_codes")


@dataclass(frozen=True)
class Diversity:
    """Negative entropy, in nats, of the mean over all vectors of the softmax of minus the distances (or of the cosines).

    Least, -log(codebook_size), where the codes are equally near to the vectors on the whole.
    """

    weight: float = 1.0
    temperature: float = 0.01
    """Scores are divided by it. Far below the differences between the distances to a vector's codes it counts the nearest code almost
    alone, far above them all codes alike, whatever the vectors: then there is nothing to learn. It has the unit of the vectors."""

    def __post_init__(self) -> None:
        _check_not_negative(self, "weight")
        _check_positive(self, "temperature")


@dataclass(frozen=True)
class Entropy:
    """Mean over all vectors of the entropy, in nats, of the softmax of minus the squared distances: least where each has one near code."""

    weight: float = 1.0
    temperature: float = 0.01
    """Squared distances are divided by it."""

    def __post_init__(self) -> None:
        _check_not_negative(self, "weight")
        _check_positive(self, "temperature")


@dataclass(frozen=True)
class Moments:
    """Squared distances of the moments of each scalar, over the vectors of a batch, to those that it is to have (VP-VAE, 2026).

    The fields are weights; kurtosis is the excess over that of a normal distribution.
    """

    mean: float = 0.1
    variance: float = 0.07
    skewness: float = 0.0
    kurtosis: float = 0.0
    targets: tuple[float, float, float, float] | None = None
    """Of mean, variance, skewness and kurtosis; None: those of the distribution that the quantizer assumes."""

    def __post_init__(self) -> None:
        _check_not_negative(self, "mean", "variance", "skewness", "kurtosis")
        if self.targets is not None:
            _check_numbers(self, "targets")
            _check(self, "targets", len(self.targets) == 4 and all(map(math.isfinite, self.targets)), "None or four finite numbers")


@dataclass(frozen=True)
class FreeBits:
    """What the Kullback-Leibler divergence of a vector's bits from fair coins, in nats, has above a threshold (Kingma et al., 2016)."""

    weight: float = 1.0
    threshold: float = math.log(2.0)
    """In nats; log 2 is one bit."""

    def __post_init__(self) -> None:
        _check_not_negative(self, "weight", "threshold")


Loss = Commitment | CrossEntropyCommitment | Orthogonality | Diversity


# Residual quantizers


@dataclass(frozen=True)
class QuantizeDropout:
    """In training only the first layers take part, how many is drawn anew for every commit (Zeghidour et al., 2021)."""

    cutoff_index: int = 0
    """The last layer that always takes part, from 0."""
    multiple_of: int = 1
    """The number of layers that take part is rounded up to a multiple of this."""
    seed: int = 0
    """The draw is a function of this and the number of commits, so that it is equal on all processes."""

    def __post_init__(self) -> None:
        _check_count(self, "cutoff_index", "seed", least=0)
        _check_count(self, "multiple_of")


@dataclass(frozen=True)
class NestedDropout:
    """In training the output is at times that of the first levels alone, fewer than all; how many is drawn anew for every commit."""

    probability: float = 0.5
    """How often levels are left out."""
    min_levels: int = 1
    """So many always take part."""
    seed: int = 0
    """The draw is a function of this and the number of commits, so that it is equal on all processes."""

    def __post_init__(self) -> None:
        _check(self, "probability", 0.0 < _number(self, "probability") <= 1.0, "above 0 and at most 1")
        _check_count(self, "min_levels")
        _check_count(self, "seed", least=0)


@dataclass(frozen=True)
class BeamSearch:
    """Keep the best `size` paths through the layers, by the error of the path; 1 is greedy."""

    size: int
    eval_size: int | None = None
    """In eval mode; None = the same."""
    weights: tuple[float, ...] | None = None
    """One a layer: paths then compete by the weighted sum of their errors after each layer."""

    def __post_init__(self) -> None:
        _check_count(self, "size")
        if self.eval_size is not None:
            _check_count(self, "eval_size")
        if self.weights is not None:
            _check_numbers(self, "weights")
            _check(self, "weights", all(0 < weight < math.inf for weight in self.weights), "None or positive numbers")

    def size_in(self, training: bool) -> int:
        """The number of paths in training or in eval mode."""
        return self.size if training or self.eval_size is None else self.eval_size


# Evolution of codes


@dataclass(frozen=True)
class Evolution:
    """How the next population is made of the one that was judged: the fittest stay, the others are children of two parents each."""

    mutation_rate: float = 0.02
    """The share of a child's bits that are flipped."""
    tournament_size: int = 2
    """A parent is the fittest of so many that are drawn."""
    elites: int = 1
    """How many of the fittest stay as they are."""

    def __post_init__(self) -> None:
        _check(self, "mutation_rate", 0.0 <= _number(self, "mutation_rate") <= 1.0, "from 0 to 1")
        _check_count(self, "tournament_size")
        _check_count(self, "elites", least=0)


# Transformer-VQ


@dataclass(frozen=True)
class CodebookConfig:
    """A codebook kept as moving averages: codes are sum / max(count, 0.01)."""

    decay: float = 0.99
    """Rate of the moving averages (gamma); 1 - decay of each new batch enters."""
    init: Literal["normal", "kmeans"] = "normal"
    """Random start, or k-means on the keys of the first training step."""
    dead_code_threshold: float = 0.0
    """Codes whose average count falls below this are replaced by keys of the batch; 0 = never."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"codebook.decay = {self.decay}: must be at least 0 and below 1")
        if self.dead_code_threshold < 0.0:
            raise ValueError(f"codebook.dead_code_threshold = {self.dead_code_threshold}: must be 0 (never) or positive")
