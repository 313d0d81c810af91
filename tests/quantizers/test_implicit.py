"""Implicit neural codebooks: codes that depend on the partial reconstruction, searched in chunks, and learned by gradient."""

import copy

import pytest
import torch

from vqkit.quantizers import EMA, MLP, Commitment, DiVeQ, ImplicitVQ, KMeans, Orthogonality, ResidualVQ, VectorQuantize
from vqkit.quantizers.implicit import ConditionalCodes, nearest_implicit

DIM, CODES = 5, 7


@pytest.fixture
def network():
    net = ConditionalCodes(DIM, 9, 2)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return net


@pytest.fixture
def layer(network):
    module = ImplicitVQ(DIM, CODES, MLP(9, 2))
    module.network.load_state_dict(network.state_dict())
    return module


def vectors(*shape):
    return torch.randn(*(shape or (4, 6)), DIM)


def test_the_network_starts_as_the_identity_in_the_code():
    codes, partial = vectors(), vectors()
    assert torch.equal(ConditionalCodes(DIM, 9, 3)(codes, partial), codes)


def test_the_network_is_that_of_the_paper(network):
    codes, partial = vectors(8), vectors(8)
    y = codes + network.join(torch.cat([codes, partial], dim=-1))
    for widen, narrow in zip(network.widen, network.narrow, strict=True):
        y = y + narrow(widen(y).relu())
    torch.testing.assert_close(network(codes, partial), y)


def test_the_nearest_of_all_transformed_codes(network):
    x, partial, codebook = vectors(40), vectors(40), vectors(CODES)
    every = torch.stack([network(code.expand_as(partial), partial) for code in codebook], dim=1)
    distance = (x.unsqueeze(1) - every).norm(dim=-1)
    for num in (1, 3, 100):
        indices, codes = nearest_implicit(network, x, partial, codebook, num)
        assert torch.equal(indices, distance.argsort(dim=-1)[:, :num])
        torch.testing.assert_close(codes, every.gather(1, indices.unsqueeze(-1).expand(-1, -1, DIM)))


def test_chunks_are_the_whole(network, monkeypatch):
    x, partial, codebook = vectors(40), vectors(40), vectors(CODES)
    whole = nearest_implicit(network, x, partial, codebook, 2)
    monkeypatch.setattr("vqkit.quantizers.implicit._ELEMENTS", 3 * CODES * 9)
    torch.testing.assert_close(nearest_implicit(network, x, partial, codebook, 2), whole)


def test_ties_go_to_the_lowest_index_and_broken_vectors_nowhere():
    network = ConditionalCodes(DIM, 9, 2)
    codebook = vectors(1).expand(CODES, -1)
    x = vectors(3)
    x[1, 0] = torch.nan
    for num in (1, 2):
        indices, codes = nearest_implicit(network, x, vectors(3), codebook, num)
        assert indices.tolist() == [list(range(num)), [-1] * num, list(range(num))]
        assert not codes[1].any()


def test_decode_of_encode_is_the_output(layer):
    x, partial = vectors(), vectors()
    layer.eval()
    found = layer.quantize(x, partial=partial)
    assert torch.equal(layer.encode(x, partial=partial), found.indices)
    assert torch.equal(layer.decode(found.indices, partial=partial), found.quantized)
    assert not torch.equal(layer.decode(found.indices), found.quantized)
    assert torch.equal(layer(x).quantized, layer.decode(layer.encode(x), partial=torch.zeros_like(x)))


def test_losses_train_codes_and_network_and_commit_the_vectors(layer):
    x, partial = vectors().requires_grad_(), vectors()
    found = layer.quantize(x, partial=partial)
    codes = layer.decode(found.indices, partial=partial)
    torch.testing.assert_close(found.losses["codebook"], (codes - x).square().mean())
    torch.testing.assert_close(found.losses["commitment"], (codes - x).square().mean())
    found.losses["codebook"].backward()
    assert x.grad is None or not x.grad.any()
    assert all(parameter.grad.any() for parameter in layer.parameters())
    layer.zero_grad()
    layer.quantize(x, partial=partial).losses["commitment"].backward()
    assert x.grad.any()
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in layer.parameters())


def test_frozen_for_a_call(layer):
    x = vectors().requires_grad_()
    before = copy.deepcopy(layer.state_dict())
    out = layer(x, freeze_codebook=True)
    (out.quantized.sum() + out.loss).backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in layer.table.parameters())
    torch.testing.assert_close(dict(layer.state_dict()), dict(before), rtol=0, atol=0)


def test_gradient_steps_reduce_the_error():
    torch.manual_seed(0)
    x = torch.randn(32, 16, DIM)
    errors = {}
    for kind, options in (("plain", {}), ("implicit", {"implicit": MLP(16, 2)})):
        torch.manual_seed(0)
        module = ResidualVQ(DIM, CODES, 3, init=KMeans(), **options)
        module.initialize_(x)
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-2) if options else None
        for _ in range(120):
            loss = module(x).loss
            if optimizer:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        module.eval()
        errors[kind] = (module(x).quantized - x).square().mean().item()
    assert errors["implicit"] < 0.9 * errors["plain"]


def test_at_the_start_it_is_plain_residual_quantization():
    implicit = ResidualVQ(DIM, CODES, 3, implicit=MLP(8)).eval()
    plain = ResidualVQ(DIM, CODES, 3).eval()
    plain.codebook = implicit.codebook.detach()
    x = vectors()
    assert torch.equal(implicit.encode(x), plain.encode(x))
    torch.testing.assert_close(implicit(x).quantized, plain(x).quantized)
    assert isinstance(implicit.layers[0], VectorQuantize)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_modules_and_autocast_assign_as_float32(layer, dtype):
    x, partial = vectors().to(dtype), vectors()
    narrow = copy.deepcopy(layer).to(dtype)
    for parameter, own in zip(layer.network.parameters(), narrow.network.parameters(), strict=True):
        parameter.data.copy_(own)
    expected = layer.quantize(x.float(), partial=partial)
    found = narrow.quantize(x, partial=partial)
    assert torch.equal(found.indices, expected.indices)
    assert found.quantized.dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.quantize(x.float(), partial=partial).quantized, expected.quantized)


def test_the_codebook_is_the_base(layer):
    codes = vectors(CODES)
    layer.codebook = codes
    assert torch.equal(layer.codebook, codes)
    with pytest.raises(ValueError, match="codebook has shape"):
        layer.codebook = codes[:-1]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"update": EMA()}, "update = EMA"),
        ({"losses": (Orthogonality(),)}, "losses = "),
        ({"losses": (Commitment(), Commitment())}, "losses = "),
        ({"estimator": "soft"}, "estimator = 'soft'"),
        ({"codebook_size": 0}, "codebook_size = 0"),
        ({"dim": 0}, "dim = 0"),
    ],
)
def test_contradictory_choices_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ImplicitVQ(**{"dim": DIM, "codebook_size": CODES, "network": MLP(4), **options})


def test_bad_input_is_refused(layer):
    with pytest.raises(ValueError, match="x has shape"):
        layer(vectors()[..., :-1])
    with pytest.raises(ValueError, match="partial has shape"):
        layer.quantize(vectors(), partial=vectors(3, 3))
    with pytest.raises(ValueError, match="indices holds 7"):
        layer.decode(torch.full((2, 3), CODES))
    with pytest.raises(ValueError, match="partial has shape"):
        layer.decode(torch.zeros(2, 3, dtype=torch.int64), partial=vectors(3, 3))


def test_an_estimator_with_noise_is_exact_in_eval():
    layer = ImplicitVQ(DIM, CODES, MLP(4), estimator=DiVeQ())
    x = vectors()
    assert not torch.equal(layer(x).quantized, layer.decode(layer.encode(x)))
    layer.eval()
    assert torch.equal(layer(x).quantized, layer.decode(layer.encode(x)))
