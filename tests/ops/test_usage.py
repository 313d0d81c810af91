import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import golden_arrays
from vqkit.ops.codebook import assignment_stats
from vqkit.ops.usage import active_fraction, dead_fraction, perplexity, quantization_metrics, relative_error


@pytest.mark.parametrize("case_id", golden_arrays.case_ids("unit", "quantization_metrics"))
def test_metrics_equal_the_official_ones(case_id):
    golden = golden_arrays.load("unit", case_id)
    for case in golden.meta["cases"]:
        given = golden.tree(f"{case['key']}/in/")
        metrics = quantization_metrics(given["vecs"], given["vecs_hat"], given["errs2"], given["c_sum"], given["c_count"])
        expected = golden.keys(f"{case['key']}/out/")
        assert {key.rsplit("/", 1)[1] for key in expected} == set(metrics)
        for key in expected:
            metric = metrics[key.rsplit("/", 1)[1]]
            golden.check(key, metric)
            torch.testing.assert_close(metric, golden[key], rtol=2e-6, atol=2e-6, equal_nan=True)


def test_metrics_of_blocks_are_the_mean_of_each_blocks():
    torch.manual_seed(0)
    x, quantized = torch.randn(3, 2, 4, 5, 6), torch.randn(3, 2, 4, 5, 6)
    error = (x - quantized).square().sum(-1)
    codes = torch.randn(4, 7, 6), torch.rand(4, 7)
    together = quantization_metrics(x, quantized, error, *codes)
    each = [quantization_metrics(x[i], quantized[i], error[i], *codes) for i in range(3)]
    for name, value in together.items():
        torch.testing.assert_close(value, torch.stack([e[name] for e in each]).mean())


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=40))
def test_perplexity_and_active_codes_of_any_counts(counts):
    count = torch.tensor(counts, dtype=torch.float64)
    used = int((count > 0).sum())
    assert (perplexity(count) <= used + 1e-6) and (perplexity(count) >= min(used, 1) - 1e-6)
    expected = sum(10 * len(counts) * c >= sum(counts) for c in counts) / len(counts) if used else 0.0
    assert active_fraction(count).item() == pytest.approx(expected)


def test_usage_is_per_head_and_knows_the_extremes():
    count = torch.tensor([[5.0, 5.0, 5.0, 5.0], [9.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [39.0, 1.0, 0.0, 0.0]])
    torch.testing.assert_close(perplexity(count)[:3], torch.tensor([4.0, 1.0, 0.0]))
    assert active_fraction(count).tolist() == [1.0, 0.25, 0.0, 0.5]


def test_dead_codes_are_those_that_expiry_would_replace():
    count = torch.tensor([[0.0, 0.5, 1.0, 7.0], [0.0, 0.0, 0.0, 0.0]])
    assert dead_fraction(count).tolist() == [0.5, 1.0]
    assert dead_fraction(count, 0.25).tolist() == [0.25, 1.0]


@pytest.mark.parametrize(("offset", "scale"), [(0.0, 1.0), (30.0, 1.0), (0.0, 1e-12), (0.0, 1e12)])
def test_the_relative_error_is_the_root_of_the_lost_variance(offset, scale):
    x = torch.randn(2, 500, 4, dtype=torch.float64) * scale + offset
    quantized = x + 0.3 * torch.randn_like(x) * scale
    statistics = assignment_stats(x, torch.zeros(2, 500, dtype=torch.int64), 1, quantized=quantized, moments=True)
    lost = (x - quantized).square().sum((1, 2))
    expected = (lost / (x - x.mean(1, keepdim=True)).square().sum((1, 2))).sqrt()
    torch.testing.assert_close(relative_error(statistics.squared_error, statistics.vectors, statistics.moments), expected)


@pytest.mark.parametrize("offset", [1e3, -1e5])
def test_the_relative_error_is_right_far_from_the_origin(offset):
    x = offset + torch.randn(1, 500, 4)
    quantized = x + 0.3
    statistics = assignment_stats(x, torch.zeros(1, 500, dtype=torch.int64), 1, quantized=quantized, moments=True)
    lost = (x.double() - quantized.double()).square().sum((1, 2))
    expected = (lost / (x.double() - x.double().mean(1, keepdim=True)).square().sum((1, 2))).sqrt().float()
    found = relative_error(statistics.squared_error, statistics.vectors, statistics.moments)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_the_relative_error_of_no_code_but_the_mean_is_one_and_of_nothing_zero():
    x = torch.randn(1, 100, 4)
    statistics = assignment_stats(
        x, torch.zeros(1, 100, dtype=torch.int64), 1, quantized=x.mean(1, keepdim=True).expand_as(x), moments=True
    )
    torch.testing.assert_close(relative_error(statistics.squared_error, statistics.vectors, statistics.moments), torch.ones(1))
    assert relative_error(torch.zeros(2), torch.zeros(2), torch.zeros(2, 2, 3)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("value", [7.0, -0.1, 12345.678])
def test_the_relative_error_of_equal_vectors_is_that_of_their_length(value):
    x = torch.full((1, 1000, 4), value)
    statistics = assignment_stats(x, torch.zeros(1, 1000, dtype=torch.int64), 1, quantized=1.1 * x, moments=True)
    torch.testing.assert_close(relative_error(statistics.squared_error, statistics.vectors, statistics.moments), torch.tensor([0.1]))
