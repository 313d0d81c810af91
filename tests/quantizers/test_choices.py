"""Choices that do not fit are named: the class, the field, the value, and what would be right."""

import math

import pytest

from vqkit.quantizers.config import (
    EMA,
    MLP,
    Affine,
    BeamSearch,
    ClipEMA,
    Commitment,
    DeadCodes,
    DiVeQ,
    Diversity,
    Gradient,
    Gumbel,
    KMeans,
    Orthogonality,
    OwnOptimizer,
    QuantizeDropout,
    Softmax,
)

NUMBERS = [
    (EMA, "decay"),
    (EMA, "eps"),
    (ClipEMA, "decay"),
    (ClipEMA, "floor"),
    (Gradient, "decay"),
    (OwnOptimizer, "learning_rate"),
    (OwnOptimizer, "eps"),
    (OwnOptimizer, "momentum"),
    (OwnOptimizer, "decay"),
    (DeadCodes, "threshold"),
    (Affine, "batch_decay"),
    (Affine, "codebook_decay"),
    (Gumbel, "temperature"),
    (Softmax, "temperature"),
    (DiVeQ, "sigma2"),
    (Commitment, "weight"),
    (Orthogonality, "weight"),
    (Diversity, "weight"),
    (Diversity, "temperature"),
]
COUNTS = [
    (KMeans, "iterations", 0),
    (MLP, "hidden", 0),
    (MLP, "depth", 0),
    (Orthogonality, "max_codes", 0),
    (QuantizeDropout, "cutoff_index", -1),
    (QuantizeDropout, "multiple_of", 0),
    (QuantizeDropout, "seed", -1),
    (BeamSearch, "size", 0),
    (BeamSearch, "eval_size", 0),
]
NEEDED = {MLP: {"hidden": 4}, BeamSearch: {"size": 2}, DeadCodes: {"threshold": 1.0}}


def make(kind, **fields):
    return kind(**{**NEEDED.get(kind, {}), **fields})


@pytest.mark.parametrize("kind, name", NUMBERS)
def test_a_number_is_finite_and_in_range(kind, name):
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"^{kind.__name__}.{name} = {bad}: must be "):
            make(kind, **{name: bad})
    for bad in ("1", None, True):
        with pytest.raises(TypeError, match=rf"^{kind.__name__}.{name} = {bad!r}: must be a number"):
            make(kind, **{name: bad})


@pytest.mark.parametrize("kind, name, bad", COUNTS)
def test_a_count_is_an_integer_in_range(kind, name, bad):
    with pytest.raises(ValueError, match=rf"^{kind.__name__}.{name} = {bad}: must be at least {bad + 1}"):
        make(kind, **{name: bad})
    for wrong in (2.5, "2", True):
        with pytest.raises(TypeError, match=rf"^{kind.__name__}.{name} = {wrong!r}: must be an integer"):
            make(kind, **{name: wrong})


@pytest.mark.parametrize(
    "attempt, error, message",
    [
        (lambda: OwnOptimizer(name="rmsprop"), ValueError, r"^OwnOptimizer.name = 'rmsprop': must be one of 'adam', 'sgd'"),
        (lambda: OwnOptimizer(betas=0.9), TypeError, r"^OwnOptimizer.betas = 0.9: must be a tuple of numbers"),
        (lambda: OwnOptimizer(betas=(0.9, "a")), TypeError, r"^OwnOptimizer.betas\[1\] = 'a': must be a number"),
        (lambda: OwnOptimizer(betas=(0.9,)), ValueError, r"^OwnOptimizer.betas = \(0.9,\): must be two rates"),
        (lambda: KMeans(start="first"), ValueError, r"^KMeans.start = 'first': must be one of 'random', 'k-means\+\+'"),
        (lambda: DeadCodes(1.0, reset_count=0.5), ValueError, r"^DeadCodes.reset_count = 0.5: must be None or at least the threshold"),
        (lambda: DeadCodes(1.0, reset_count=math.inf), ValueError, r"^DeadCodes.reset_count = inf"),
        (lambda: Gumbel(estimator="best"), ValueError, r"^Gumbel.estimator = 'best': must be None, 'straight_through' or 'reinmax'"),
        (lambda: Softmax(estimator=None), ValueError, r"^Softmax.estimator = None: must be one of 'straight_through', 'reinmax'"),
        (lambda: Softmax(temperature=0.0), ValueError, r"^Softmax.temperature = 0.0: must be positive"),
        (lambda: BeamSearch(2, weights=0.5), TypeError, r"^BeamSearch.weights = 0.5: must be a tuple of numbers"),
        (lambda: BeamSearch(2, weights=(1.0, 0.0)), ValueError, r"^BeamSearch.weights = \(1.0, 0.0\): must be None or positive numbers"),
    ],
)
def test_other_choices_that_do_not_fit(attempt, error, message):
    with pytest.raises(error, match=message):
        attempt()
