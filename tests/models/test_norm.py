"""Normalisation against the official LayerNorm and against its definition."""

import pytest
import torch

import golden_arrays
from vqkit.models.norm import RMSNorm, normalize


@pytest.mark.parametrize("name", golden_arrays.case_ids("unit", "layer_norm*"))
def test_official_layer_norm(name: str) -> None:
    golden = golden_arrays.load("unit", name)
    for switches in golden.meta["cases"]:
        key = switches["key"]
        x = golden[f"{key}/x"].requires_grad_()
        gain = golden[f"{key}/params/g"].requires_grad_() if switches["gain"] else None
        bias = golden[f"{key}/params/b"].requires_grad_() if switches["bias"] else None

        out = normalize(x, gain, bias, center=switches["center"], norm=switches["norm"])
        golden.check(f"{key}/out", out)
        (out * golden[f"{key}/cotangent"]).sum().backward()
        golden.check(f"{key}/grad/x", x.grad)
        if gain is not None:
            golden.check(f"{key}/grad/params/g", gain.grad)
        if bias is not None:
            golden.check(f"{key}/grad/params/b", bias.grad)

        if f"{key}/out_bf16_input" not in golden:
            continue
        # A result of 8 bits: equal to the official one up to the last of them.
        low = normalize(x.detach().bfloat16(), gain, bias, center=switches["center"], norm=switches["norm"])
        assert low.dtype == torch.bfloat16
        official = golden[f"{key}/out_bf16_input"]
        torch.testing.assert_close(low.float(), official.float(), rtol=2**-7, atol=1e-5)


def test_module_starts_as_a_plain_rms_norm() -> None:
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(RMSNorm(6).double()(x), expected)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e15])
def test_extreme_lengths_stay_finite_in_value_and_gradient(scale: float) -> None:
    x = (torch.randn(3, 8) * scale).requires_grad_()
    normalize(x).sum().backward()
    assert torch.isfinite(normalize(x)).all()
    assert x.grad is not None and torch.isfinite(x.grad).all()
