"""Quantizers that are a composition of what `VectorQuantize` has: SimVQ, index backpropagation, product quantization."""

import pytest
import torch
import torch.nn.functional as F

from vqkit.quantizers import EMA, MLP, Commitment, DeadCodes, Gradient, ProductVQ, SimVQ, Softmax, VectorQuantize


def test_sim_vq_is_the_map_of_a_frozen_table():
    quantizer = SimVQ(6, 32, estimator="straight_through")
    assert [name for name, _ in quantizer.named_parameters()] == ["table.transform.weight"]
    x = torch.randn(40, 6, requires_grad=True)
    weight, table = quantizer.table.transform.weight, quantizer.table.weight.clone()
    codes = F.linear(table, weight).squeeze(0)
    chosen = codes[torch.cdist(x, codes).argmin(-1)]
    quantized, _, loss = quantizer(x)
    torch.testing.assert_close(quantized, chosen)
    expected = F.mse_loss(chosen, x.detach()) + 0.25 * F.mse_loss(x, chosen.detach())
    assert loss.item() == pytest.approx(0.25 * F.mse_loss(x, chosen).item(), rel=1e-5)  # the value is that of one of the two terms
    for at in (x, weight):
        torch.testing.assert_close(
            torch.autograd.grad(loss, at, retain_graph=True)[0], torch.autograd.grad(expected, at, retain_graph=True)[0]
        )
    quantizer.eval()
    assert torch.equal(quantizer.table.weight, table)
    assert table.square().sum(-1).mean().item() == pytest.approx(1.0, abs=0.2)


def test_a_step_of_sim_vq_moves_codes_that_nobody_chose():
    quantizer = SimVQ(4, 64, transform=MLP(hidden=8))
    before = quantizer.codebook.detach().clone()
    output = quantizer(torch.randn(3, 4))
    output.loss.backward()
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter -= 0.1 * parameter.grad
    assert ((quantizer.codebook - before).norm(dim=-1) > 0).all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"update": EMA()}, TypeError, r"^update: is no option of SimVQ"),
        ({"dead_codes": DeadCodes(1.0)}, TypeError, r"^dead_codes: is no option of SimVQ"),
        ({"transform": None}, ValueError, r"^transform = None: must be one"),
        ({"transform": "cubic"}, ValueError, r"^transform = 'cubic'"),
    ],
)
def test_what_sim_vq_does_not_take_is_named(options, error, message):
    with pytest.raises(error, match=message):
        SimVQ(4, 8, **options)


def test_the_pull_of_codes_is_weighed_by_itself():
    x = torch.randn(20, 3)
    gradients = []
    for pull in (1.0, 4.0):
        torch.manual_seed(1)
        quantizer = VectorQuantize(3, 8, update=Gradient(), estimator="none", losses=(Commitment(weight=0.5, pull=pull),))
        y = x.clone().requires_grad_()
        quantizer(y).loss.backward()
        gradients.append((y.grad, quantizer.table.weight.grad))
    assert torch.equal(gradients[0][0], gradients[1][0])
    torch.testing.assert_close(4 * gradients[0][1], gradients[1][1])


def test_index_backpropagation_is_the_one_hot_with_the_gradient_of_the_softmax():
    """Shi et al. (2024), equations 3 and 4: Ind = one_hot(argmax p) - stop_gradient(p) + p; the output is Ind times the codes."""
    temperature = 0.3
    quantizer = VectorQuantize(5, 12, metric="cosine", assignment=Softmax(temperature=temperature), update=Gradient(), losses=()).double()
    one, other = (torch.randn(30, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    stored = quantizer.table.weight.detach().to(torch.float64).clone().requires_grad_()
    codes = F.normalize(stored.squeeze(0), dim=-1)
    p = (F.normalize(other, dim=-1) @ codes.T / temperature).softmax(-1)
    expected = (F.one_hot(p.argmax(-1), 12) - p.detach() + p) @ codes
    upstream = torch.randn(30, 5, dtype=torch.float64)
    found = quantizer(one)
    torch.testing.assert_close(found.quantized, expected.detach())
    assert torch.equal(found.indices, p.argmax(-1))
    (found.quantized * upstream).sum().backward()
    (expected * upstream).sum().backward()
    torch.testing.assert_close(one.grad, other.grad)
    torch.testing.assert_close(quantizer.table.weight.grad.to(torch.float64), stored.grad)
    assert (stored.grad.norm(dim=-1) > 0).all()


def test_a_product_quantizes_each_part_by_itself():
    quantizer = ProductVQ(6, 8, 3, metric="cosine").eval()
    x = torch.randn(10, 6)
    quantized, indices, _ = quantizer(x)
    assert indices.shape == (10, 3) and quantizer.bits_per_vector == 9
    for g, part in enumerate(quantizer.parts):
        piece = x[:, 2 * g : 2 * g + 2]
        assert torch.equal(part.encode(piece), indices[:, g])
        assert torch.equal(part.decode(indices[:, g]), quantized[:, 2 * g : 2 * g + 2])
    for groups in (0, 4):
        with pytest.raises(ValueError, match=rf"^groups = {groups}: must be at least 1 and divide dim = 6"):
            ProductVQ(6, 8, groups)
