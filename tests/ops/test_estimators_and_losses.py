import pytest
import torch

from vqkit.ops.estimators import straight_through
from vqkit.ops.losses import commitment_loss


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_straight_through_is_the_code_in_value_and_the_identity_in_gradient(dtype, compiled):
    run = torch.compile(straight_through, backend="aot_eager", fullgraph=True) if compiled else straight_through
    x = (1e4 * torch.randn(3, 5)).to(dtype).requires_grad_()
    codes = (1e-4 * torch.randn(3, 5)).to(dtype).requires_grad_()
    weight = torch.randn(3, 5).to(dtype)
    out = run(x, codes)
    assert torch.equal(out, codes)
    of_x, of_codes = torch.autograd.grad((out * weight).sum(), (x, codes), allow_unused=True)
    assert torch.equal(of_x, weight) and of_codes is None


def test_straight_through_works_under_function_transforms():
    x, codes = torch.randn(4), torch.randn(4)
    torch.testing.assert_close(torch.func.jacrev(lambda v: straight_through(v, codes) * 3)(x), 3 * torch.eye(4))
    torch.testing.assert_close(torch.func.vmap(straight_through)(x.expand(2, 4), codes.expand(2, 4)), codes.expand(2, 4))


def test_straight_through_refuses_what_does_not_match():
    with pytest.raises(ValueError, match=r"^quantized is \(3,\) torch.float32"):
        straight_through(torch.randn(4), torch.randn(3))
    with pytest.raises(ValueError, match=r"^quantized is \(4,\) torch.float64"):
        straight_through(torch.randn(4), torch.randn(4).double())


@pytest.mark.parametrize("poison", [1.0, torch.nan, torch.inf])
def test_commitment_is_the_mean_over_positions_of_the_sum_over_heads(poison):
    x, codes = torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 5) < 0.6
    expected = ((x - codes).square().sum(-1) * mask[:, None]).sum() / 10
    spoiled = torch.where(mask[:, None, :, None], x, poison).requires_grad_()
    loss = commitment_loss(spoiled, codes, mask)
    torch.testing.assert_close(loss, expected.detach())
    loss.backward()
    assert codes.grad is None
    torch.testing.assert_close(spoiled.grad, (2 * (x - codes) * mask[:, None, :, None] / 10).detach())


def test_commitment_of_nothing_is_zero():
    assert commitment_loss(torch.empty(2, 1, 0, 4), torch.empty(2, 1, 0, 4)) == 0
