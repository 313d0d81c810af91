"""Embeddings, logits and absolute positions against the official ones."""

import pytest
import torch

import golden_arrays
from vqkit.models.embedding import Logits, TokenEmbedding, check_tokens
from vqkit.models.positions import ScaledSinusoids, count_positions


@pytest.mark.parametrize("name", golden_arrays.case_ids("unit", "embeddings*"))
def test_official_embeddings(name: str) -> None:
    golden = golden_arrays.load("unit", name)
    vocab_size, dim = golden["params/embs"].shape
    embedding = TokenEmbedding(vocab_size, dim).to(golden.dtype)
    logits = Logits(vocab_size, dim, tied=True).to(golden.dtype)
    with torch.no_grad():
        embedding.weight.copy_(golden["params/embs"])
        logits.bias.copy_(golden["params/bias_out"])
    x = golden["x"].requires_grad_()

    embedded, scores = embedding(golden["tokens"]), logits(x, embedding.weight)
    golden.check("out/embeddings", embedded)
    golden.check("out/logits", scores)
    ((embedded * golden["cotangent/embeddings"]).sum() + (scores * golden["cotangent/logits"]).sum()).backward()
    golden.check("grad/x", x.grad)
    golden.check("grad/params/embs", embedding.weight.grad)
    golden.check("grad/params/bias_out", logits.bias.grad)


@pytest.mark.parametrize("name", golden_arrays.case_ids("unit", "scaled_sin*"))
def test_official_scaled_sinusoids(name: str) -> None:
    golden = golden_arrays.load("unit", name)
    for case in golden.meta["cases"]:
        module = ScaledSinusoids(case["d_model"], case["pe_lam"]).to(golden.dtype)
        with torch.no_grad():
            module.scale.copy_(golden[f"{case['key']}/params/scale"])
        positions = torch.arange(case["offset"], case["offset"] + case["length"])
        golden.check(f"{case['key']}/out", module(positions))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_logits_are_float32_or_wider(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 8).to(dtype)
    logits = Logits(5, 8, scale=0.5).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(x)
    wide = torch.promote_types(dtype, torch.float32)
    assert found.dtype == wide
    assert logits.weight is not None
    torch.testing.assert_close(found, 0.5 * (x.to(wide) @ logits.weight.to(wide).T + logits.bias.to(wide)))


@pytest.mark.parametrize("token", [-1, 24, 1000])
def test_tokens_outside_the_vocabulary_are_named(token: int) -> None:
    tokens = torch.tensor([[0, 23, token]])
    with pytest.raises(ValueError, match=rf"token {token}: must be in 0 \.\.\. 23"):
        TokenEmbedding(24, 4)(tokens)
    check_tokens(tokens[:, :2], 24)


def test_positions_count_within_documents_and_over_calls() -> None:
    segments = torch.tensor([[0, 0, 1, 1, 1, 3, 3, 4], [2, 2, 2, 2, 2, 2, 2, 3]])
    expected = torch.tensor([[0, 1, 0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5, 6, 0]])
    position, segment = torch.zeros(2, dtype=torch.int64), torch.full((2,), -1)
    for length in (8, 1, 3):
        found = []
        position, segment = torch.zeros(2, dtype=torch.int64), torch.full((2,), -1)
        for part in segments.split(length, dim=1):
            found.append(count_positions(position, segment, part))
            position, segment = found[-1][:, -1] + 1, part[:, -1]
        assert torch.equal(torch.cat(found, 1), expected)
