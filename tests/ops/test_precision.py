"""Laws of precision: as wide as it says whatever autocast says, on every device, and nothing is left changed."""

import pytest
import torch

from vqkit.ops.precision import full_precision, widest, without_autocast


def test_the_widest_is_float32_or_float64():
    half, single, double = (torch.zeros(1, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64))
    assert widest() == widest(half) == widest(half, single) == torch.float32
    assert widest(half, double) == torch.float64


@pytest.mark.parametrize("guard", [without_autocast, full_precision])
def test_autocast_is_off_inside_and_on_again_behind(guard):
    x = torch.randn(3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with guard("cpu"):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16
    with guard("cpu"):
        assert torch.equal(x @ x, x @ x)


@pytest.mark.parametrize("guard", [without_autocast, full_precision])
def test_the_meta_device_which_knows_no_autocast_is_left_alone(guard):
    x = torch.empty(3, 3, device="meta")
    with guard("meta"):
        assert (x @ x).shape == (3, 3)


@pytest.mark.parametrize("allowed", ["tf32", "bf16"])
def test_products_are_whole_inside_and_as_allowed_behind_also_when_something_raises(allowed):
    matmul = torch.backends.mkldnn.matmul
    before, inside = matmul.fp32_precision, []

    def fail():
        with full_precision("cpu"):
            inside.append(matmul.fp32_precision)
            raise RuntimeError("stop")

    try:
        matmul.fp32_precision = allowed
        with pytest.raises(RuntimeError, match="stop"):
            fail()
        assert inside == ["ieee"] and matmul.fp32_precision == allowed
    finally:
        matmul.fp32_precision = before
