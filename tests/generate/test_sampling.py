"""Sampling rules: golden nucleus, and laws over random logits with ties."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import golden_arrays
from vqkit.generate.sampling import SamplingRules, apply_rules, gumbel_noise, keep_top_k, keep_top_p, next_token

NONSENSE = {"temperature": (-1.0, math.inf, math.nan), "top_k": (0, True, 2.5), "top_p": (-0.1, 1.1, math.nan)}


def _logits(seed: int, shape: tuple[int, ...] = (5, 23)) -> torch.Tensor:
    """Random logits in steps of a quarter, so that equal ones occur."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 8).round() / 4


@pytest.mark.parametrize("case_id", golden_arrays.case_ids("unit", "nucleus"))
def test_official_nucleus_matches_the_golden_arrays(case_id: str) -> None:
    case = golden_arrays.load("unit", case_id)
    assert len(case.meta["cases"]) == 100
    for entry in case.meta["cases"]:
        logits = case[f"{entry['key']}/logits"]
        kept = keep_top_p(logits, entry["p"], official=True)
        case.check(f"{entry['key']}/out", kept.masked_fill(kept.isinf(), -1e10))


@pytest.mark.parametrize("p", [0.0, 1e-3, 0.3, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_top_p_keeps_the_smallest_set_that_reaches_p(seed: int, p: float) -> None:
    for row in _logits(seed).double():
        probabilities = row.softmax(-1)
        order = sorted(range(len(row)), key=lambda i: (-row[i].item(), i))
        size = next((n for n in range(1, len(row)) if probabilities[order[:n]].sum() >= p - 1e-12), len(row))
        expected = torch.full_like(row, -math.inf)
        expected[order[:size]] = row[order[:size]]
        assert torch.equal(keep_top_p(row, p), expected)


@pytest.mark.parametrize(("p", "size"), [(0.5, 4), (0.51, 5), (0.25, 2), (0.125, 1), (0.1, 1)])
def test_top_p_takes_no_more_than_it_needs(p: float, size: int) -> None:
    kept = keep_top_p(torch.zeros(8), p)
    assert kept.isfinite().tolist() == [True] * size + [False] * (8 - size)


def test_top_p_of_one_keeps_tokens_of_no_measurable_probability() -> None:
    logits = torch.tensor([[0.0, -500.0, -40.0]])
    assert torch.equal(keep_top_p(logits, 1.0), logits)
    assert keep_top_p(logits, 1.0, official=True).isinf().any(), "the official slack drops the tail"


@pytest.mark.parametrize("k", [1, 2, 7, 22, 23, 100])
@pytest.mark.parametrize("seed", range(5))
def test_top_k_keeps_k_tokens_the_lower_index_first_among_equals(seed: int, k: int) -> None:
    for row in _logits(seed):
        order = sorted(range(len(row)), key=lambda i: (-row[i].item(), i))[:k]
        assert torch.equal(keep_top_k(row, k).isfinite().nonzero().flatten(), torch.tensor(sorted(order)))


@pytest.mark.parametrize("rules", [SamplingRules(temperature=0.0), SamplingRules(top_k=1), SamplingRules(top_p=0.0)])
def test_all_ways_of_being_greedy_agree(rules: SamplingRules) -> None:
    logits = _logits(3)
    generator = torch.Generator().manual_seed(0)
    expected = torch.tensor([min(range(23), key=lambda i, r=row: (-r[i].item(), i)) for row in logits])
    assert torch.equal(next_token(logits, rules, generator=generator), expected)


def test_excluded_tokens_are_never_chosen_and_the_rest_keeps_its_proportions() -> None:
    logits = _logits(4)
    kept = apply_rules(logits, SamplingRules(exclude=(0, 7)))
    assert kept[:, [0, 7]].isinf().all()
    others = [i for i in range(23) if i not in (0, 7)]
    assert torch.equal(kept[:, others], logits[:, others])


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0])
    rules = SamplingRules(temperature=0.7, top_k=4, top_p=0.98)
    expected = apply_rules(logits, rules).softmax(-1)
    draws = next_token(logits.expand(40_000, 5), rules, generator=torch.Generator().manual_seed(5))
    share = torch.bincount(draws, minlength=5) / 40_000
    assert (share[expected == 0] == 0).all()
    # Five standard deviations of a share of 40,000 draws.
    assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / 40_000).sqrt()).all()


def test_a_draw_is_a_function_of_the_seed() -> None:
    logits = _logits(6, (400, 23))
    draw = [next_token(logits, SamplingRules(), generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])


def test_given_noise_replays_the_generator_and_leaves_the_global_state_alone() -> None:
    logits, before = _logits(7), torch.random.get_rng_state()
    noise = gumbel_noise((5, 23), torch.Generator().manual_seed(8))
    a = next_token(logits, SamplingRules(), generator=torch.Generator().manual_seed(8))
    assert torch.equal(a, next_token(logits, SamplingRules(), noise=noise))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_temperature_divides_the_logits(temperature: float) -> None:
    logits = _logits(9).double()
    expected = (logits / temperature).softmax(-1)
    torch.testing.assert_close(apply_rules(logits, SamplingRules(temperature=temperature)).softmax(-1), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("temperature", [1e-320, 1e-38, 1e-3, 1e30])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    logits = torch.tensor([[1e4, -1e4, 9e3, 1e4]])
    kept = apply_rules(logits, SamplingRules(temperature=temperature))
    assert kept.softmax(-1).isfinite().all()


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in NONSENSE.items() for value in values],
)
def test_rules_refuse_what_makes_no_sense(field: str, value: Any) -> None:
    options: dict[str, Any] = {field: value}
    with pytest.raises(ValueError, match=rf"^{field} = {value!r}: must be"):
        SamplingRules(**options)


def test_sampling_without_randomness_is_refused() -> None:
    with pytest.raises(ValueError, match="generator = None: sampling needs"):
        next_token(_logits(1), SamplingRules())
    with pytest.raises(ValueError, match=r"noise of shape \(5, 22\): must have the shape of logits, \(5, 23\)"):
        next_token(_logits(1), SamplingRules(), noise=torch.zeros(5, 22))
