import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import golden_arrays
from vqkit.ops.usage import active_fraction, perplexity, quantization_metrics


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
