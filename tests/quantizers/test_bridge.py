"""VQBridge: against a vision transformer written out token by token. The laws of all quantizers are in tests/laws."""

import pytest
import torch
import torch.nn.functional as F

from vqkit.quantizers import Commitment, Gradient, VectorQuantize, VQBridge
from vqkit.quantizers.bridge import Bridge


def normalised(token, norm):
    centred = token - token.mean()
    return centred / (centred.square().mean() + norm.eps).sqrt() * norm.weight + norm.bias


def written_out(bridge, codes, patch, hidden, heads):
    """One codebook [C, K], as loops over tokens and heads."""
    tokens = [
        bridge.compress(codes[start : start + patch].reshape(-1)) + bridge.place[start // patch] for start in range(0, len(codes), patch)
    ]
    width = hidden // heads
    for block in bridge.blocks:
        rows = [
            block.query_key_value(F.layer_norm(t, (hidden,), block.before_attention.weight, block.before_attention.bias)) for t in tokens
        ]
        queries, keys, values = ([row.split(hidden)[i] for row in rows] for i in range(3))
        seen = []
        for query in queries:
            parts = []
            for head in range(heads):
                of = slice(head * width, (head + 1) * width)
                weights = torch.stack([query[of] @ key[of] for key in keys]).div(width**0.5).softmax(0)
                parts.append(sum(w * value[of] for w, value in zip(weights, values, strict=True)))
            seen.append(torch.cat(parts))
        tokens = [token + block.attention_out(one) for token, one in zip(tokens, seen, strict=True)]
        tokens = [token + block.narrow(F.gelu(block.widen(normalised(token, block.before_perceptron)))) for token in tokens]
    return torch.cat([bridge.recover(bridge.norm(token)).reshape(patch, -1) for token in tokens])


def test_it_is_the_transformer_written_out():
    bridge = Bridge(VQBridge(patch=3, hidden=8, depth=2, heads=2), 12, 5, dtype=torch.float64)
    with torch.no_grad():
        for parameter in bridge.parameters():
            parameter.normal_(std=0.5)
    codes = torch.randn(2, 12, 5, dtype=torch.float64)
    expected = torch.stack([written_out(bridge, each, 3, 8, 2) for each in codes])
    torch.testing.assert_close(bridge(codes), expected)


def test_a_step_moves_codes_that_nobody_chose():
    quantizer = VectorQuantize(4, 64, update=Gradient(), transform=VQBridge(patch=8, hidden=16), losses=(Commitment(pull=4.0),))
    before = quantizer.codebook.detach().clone()
    assert 0.1 < before.std().item() < 3.0
    output = quantizer(torch.randn(3, 4))
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in quantizer.parameters())
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter -= 0.1 * parameter.grad
    assert ((quantizer.codebook - before).norm(dim=-1) > 0).all()
    plain = VectorQuantize(4, 64)
    plain.codebook = quantizer.codebook
    x = torch.randn(50, 4)
    assert torch.equal(plain.eval().encode(x), quantizer.eval().encode(x))


def test_separate_heads_do_not_see_each_other():
    quantizer = VectorQuantize(4, 8, heads=2, separate_heads=True, update=Gradient(), transform=VQBridge(patch=4, hidden=8))
    (gradient,) = torch.autograd.grad(quantizer.codebook[0].sum(), quantizer.table.weight)
    assert gradient[0].any() and not gradient[1].any()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: VQBridge(patch=0), ValueError, r"^VQBridge.patch = 0: must be at least 1"),
        (lambda: VQBridge(hidden=10, heads=4), ValueError, r"^VQBridge.heads = 4: must be a divisor of hidden = 10"),
        (lambda: VQBridge(depth=1.5), TypeError, r"^VQBridge.depth = 1.5: must be an integer"),
        (lambda: VectorQuantize(4, 10, update=Gradient(), transform=VQBridge(patch=4)), ValueError, r"^VQBridge.patch = 4: must divide"),
        (lambda: VectorQuantize(4, 16, transform=VQBridge()), ValueError, r"^transform with update"),
    ],
)
def test_what_does_not_fit_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
