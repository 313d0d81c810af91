"""Implicit neural codebooks: codes that depend on the partial reconstruction, searched in chunks, and learned by gradient."""

import copy

import pytest
import torch
import torch.nn.functional as F

from vqkit.ops.losses import orthogonality_loss
from vqkit.quantizers import (
    EMA,
    MLP,
    Affine,
    Commitment,
    CrossEntropyCommitment,
    DeadCodes,
    DiVeQ,
    Diversity,
    Frozen,
    Gradient,
    Gumbel,
    ImplicitVQ,
    KMeans,
    Orthogonality,
    ResidualVQ,
    Softmax,
    VectorQuantize,
    implicit,
)
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
    monkeypatch.setitem(implicit._ELEMENTS, "cpu", 3 * CODES * 9)
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


def test_the_commitment_pulls_vectors_codes_and_network(layer):
    x, partial = vectors().requires_grad_(), vectors()
    found = layer.quantize(x, partial=partial)
    codes = layer.decode(found.indices, partial=partial)
    torch.testing.assert_close(found.losses["commitment"], (codes - x).square().mean())
    found.losses["commitment"].backward()
    own = [parameter.grad for parameter in layer.parameters()]
    assert all(grad.any() for grad in own)
    expected = torch.autograd.grad((codes - x.detach()).square().mean(), list(layer.parameters()))
    torch.testing.assert_close(own, list(expected))
    torch.testing.assert_close(x.grad, 2 * (x - codes).detach() / x.numel())


def test_given_indices_leave_vectors_out(layer):
    given = torch.zeros(4, 6, dtype=torch.int64)
    given[0] = -1
    x = vectors()
    x[1, 0] = torch.nan
    found = layer.quantize(x, indices=given)
    (entry,) = found.statistics
    assert (entry.count[0, 0], entry.vectors, entry.non_finite) == (17, 17, 1)
    assert found.indices[1, 0] == -1
    assert not found.quantized[found.indices < 0].any()


def test_a_partial_reconstruction_that_is_not_finite_leaves_its_vector_out(layer):
    x, partial = vectors(), vectors()
    partial[1, 2, 0] = torch.nan
    found = layer.quantize(x, partial=partial, targets=torch.zeros(4, 6, dtype=torch.int64))
    assert found.indices[1, 2] == layer.encode(x, partial=partial)[1, 2] == -1
    assert all(loss.isfinite() for loss in found.losses.values())
    assert not found.quantized[1, 2].any()


@pytest.mark.parametrize("assignment", ["nearest", Softmax(1.0), Gumbel(1.0), Gumbel(1.0, "straight_through")])
@pytest.mark.parametrize("where", ["vector", "partial"])
def test_what_is_so_long_that_distances_overflow_is_left_out(layer, assignment, where):
    layer.assignment = assignment
    x, partial = vectors(), vectors()
    (x if where == "vector" else partial)[1, 2, 0] = 1e30
    x.requires_grad_()
    found = layer.quantize(x, partial=partial)
    (entry,) = found.statistics
    assert (found.indices < 0).nonzero().tolist() == [[1, 2]]
    assert (entry.vectors, entry.non_finite) == (23, 1)
    assert not found.quantized[1, 2].any()
    (found.quantized.sum() + sum(found.losses.values())).backward()
    assert all(tensor.grad.isfinite().all() for tensor in (x, *layer.parameters()))


def test_frozen_for_a_call(layer):
    x = vectors().requires_grad_()
    before = copy.deepcopy(layer.state_dict())
    out = layer(x, freeze_codebook=True, targets=torch.zeros(4, 6, dtype=torch.int64))
    (out.quantized.sum() + out.loss).backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in layer.parameters())
    torch.testing.assert_close(dict(layer.state_dict()), dict(before), rtol=0, atol=0)


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_without_an_estimator_the_gradient_is_that_of_the_decoded_codes(fraction):
    module = ResidualVQ(DIM, CODES, 3, implicit=MLP(9), estimator="none", condition_fraction=fraction, losses=())
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    found, cotangent = module.quantize(vectors()), vectors()
    expected = module.decode(found.indices)
    assert torch.equal(found.quantized, expected)
    parameters = list(module.parameters())
    own, theirs = (torch.autograd.grad((output * cotangent).sum(), parameters) for output in (found.quantized, expected))
    torch.testing.assert_close(own, theirs)
    assert all(gradient.any() for gradient in own)
    assert not module.quantize(vectors(), freeze_codebook=True).quantized.requires_grad


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
        ({"losses": (Commitment(), Commitment())}, "losses holds several"),
        ({"sync_update": 1.5}, "sync_update = 1.5"),
        ({"assignment": "soft"}, "assignment = 'soft'"),
        ({"transform": "linear", "init": KMeans()}, "transform"),
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


# What takes a softmax over all codes


def tables(layer, partial):
    """The codes that each vector has for itself [N, C, D]."""
    return layer.network(layer.codebook, partial.reshape(-1, 1, DIM))


def logits_of(layer, x, partial):
    return -(x.reshape(-1, 1, DIM) - tables(layer, partial)).norm(dim=-1)


def gradients(layer, x, value):
    return torch.autograd.grad(value, [x, *layer.parameters()], allow_unused=True)


@pytest.mark.parametrize("name", ["cross_entropy", "cross_entropy_commitment", "diversity", "orthogonality"])
@pytest.mark.parametrize("chunked", [False, True])
def test_losses_are_those_of_all_codes_at_once(layer, name, chunked, monkeypatch):
    if chunked:
        monkeypatch.setattr(implicit, "_KEPT", 0)
        monkeypatch.setitem(implicit._ELEMENTS, "cpu", 5 * CODES * 9)
    layer.losses = (CrossEntropyCommitment(), Diversity(temperature=0.5), Orthogonality())
    x, partial = vectors().requires_grad_(), vectors()
    targets = torch.randint(CODES, (4, 6))
    targets[0, 0] = -1
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[1, 1] = False
    found = layer.quantize(x, mask, partial=partial, targets=targets)
    kept = mask.flatten()
    logits = logits_of(layer, x, partial)[kept]
    mean = (logits / 0.5).softmax(-1).mean(0)
    expected = {
        "cross_entropy": F.cross_entropy(logits, targets.flatten()[kept], ignore_index=-1),
        "cross_entropy_commitment": F.cross_entropy(logits, logits.argmax(-1)),
        "diversity": (mean * mean.log()).sum(),
        "orthogonality": orthogonality_loss(layer.codebook),
    }[name]
    torch.testing.assert_close(found.losses[name], expected)
    own, theirs = gradients(layer, x, found.losses[name]), gradients(layer, x, expected)
    for a, b in zip(own, theirs, strict=True):
        torch.testing.assert_close(torch.zeros(()) if a is None else a, torch.zeros(()) if b is None else b)
    assert layer.loss_weights[name] == 1.0


def test_orthogonality_may_look_at_some_codes(layer):
    layer.losses = (Orthogonality(active_only=True),)
    found = layer.quantize(vectors(3))
    active = torch.zeros(CODES, dtype=torch.bool)
    active[found.indices] = True
    torch.testing.assert_close(found.losses["orthogonality"], orthogonality_loss(layer.codebook, active))
    layer.losses = (Orthogonality(max_codes=3),)
    before = torch.get_rng_state()
    layer.eval().quantize(torch.ones(3, DIM))
    assert torch.equal(torch.get_rng_state(), before)
    layer.train().quantize(torch.ones(3, DIM))
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("few", [False, True])
def test_tables_of_many_are_made_again_and_not_kept(layer, few, monkeypatch):
    if not few:
        monkeypatch.setattr(implicit, "_KEPT", 300 * CODES * DIM)
    x = vectors(50, 6)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer.quantize(x, targets=torch.zeros(50, 6, dtype=torch.int64))
    assert (max(kept) >= 300 * CODES * DIM) is few


@pytest.mark.parametrize("estimator", ["straight_through", "reinmax"])
def test_a_drawn_code_brings_the_gradient_of_its_softmax(layer, estimator):
    layer.double().assignment = Gumbel(0.5, estimator)
    x, partial = vectors(20).double().requires_grad_(), vectors(20).double()
    found = layer.quantize(x, partial=partial)
    codes = layer.decode(found.indices, partial=partial)
    torch.testing.assert_close(found.quantized, codes)
    cotangent = vectors(20).double()
    own = gradients(layer, x, (found.quantized * cotangent).sum())
    table, logits = tables(layer, partial), logits_of(layer, x, partial) / 0.5
    p, drawn = logits.softmax(-1), F.one_hot(found.indices, CODES).to(x)
    soft = p
    if estimator == "reinmax":
        half = ((drawn + p) / 2).detach()
        soft = 2 * (half.log() + logits - logits.detach()).softmax(-1) - p / 2
    passed = codes + torch.einsum("nc,ncd->nd", soft, table.detach())
    for a, b in zip(own, gradients(layer, x, (passed * cotangent).sum()), strict=True):
        torch.testing.assert_close(a, b)
    assert own[0].any()


def test_draws_follow_the_softmax(layer):
    layer.assignment = Gumbel(1.0)
    x, partial = vectors(1), vectors(1)
    drawn = layer.quantize(x.expand(20000, -1), partial=partial.expand(20000, -1)).indices
    share = torch.bincount(drawn, minlength=CODES) / 20000
    torch.testing.assert_close(share, logits_of(layer, x, partial).softmax(-1).squeeze(0).detach(), rtol=0, atol=0.015)
    for options in ({"temperature": 0.0}, {"temperature": 1e-4}):
        cold = layer.quantize(x.expand(9, -1), partial=partial.expand(9, -1), **options).indices
        assert torch.equal(cold, layer.encode(x, partial=partial).expand(9))


def test_the_nearest_code_has_the_gradient_of_the_softmax(layer):
    layer.double().assignment = Softmax(0.5)
    x, partial = vectors(20).double().requires_grad_(), vectors(20).double()
    found = layer.quantize(x, partial=partial)
    assert torch.equal(found.indices, layer.encode(x, partial=partial))
    (own,) = torch.autograd.grad(found.quantized.sum(), x)
    soft = (logits_of(layer, x, partial) / 0.5).softmax(-1)
    (expected,) = torch.autograd.grad(torch.einsum("nc,ncd->", soft, tables(layer, partial).detach()), x)
    torch.testing.assert_close(own, expected)


def test_a_draw_without_a_gradient_of_its_own_is_passed_by_the_estimator(layer):
    layer.assignment, layer.estimator = Gumbel(0.5), "straight_through"
    x = vectors(20).requires_grad_()
    found = layer.quantize(x)
    (gradient,) = torch.autograd.grad(found.quantized.sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))


def test_a_vector_on_its_code_has_a_finite_gradient():
    layer = ImplicitVQ(DIM, CODES, MLP(4), losses=(CrossEntropyCommitment(),))
    x = layer.codebook[:3].detach().clone().requires_grad_()
    layer.quantize(x).losses["cross_entropy_commitment"].backward()
    assert x.grad.isfinite().all()


def test_the_synchronous_rule_adds_to_the_codes(layer):
    layer.estimator, layer.sync_update = "straight_through", 0.25
    x = vectors()
    own = gradients(layer, x.requires_grad_(), layer.quantize(x).quantized.sum())
    codes = gradients(layer, x, layer.decode(layer.encode(x)).sum())
    assert torch.equal(own[0], torch.ones_like(x))
    for a, b in zip(own[1:], codes[1:], strict=True):
        torch.testing.assert_close(a, 0.25 * b)


# The base codebook


@pytest.mark.parametrize("options", [{"transform": "linear"}, {"affine": Affine(0.5, 0.5)}, {"update": Frozen()}])
def test_the_base_may_be_transformed_follow_or_stay(options):
    layer = ImplicitVQ(DIM, CODES, MLP(4), **options)
    x = vectors() * 3 + 5
    before = layer.table.weight.detach().clone()
    for _ in range(2):
        layer.zero_grad()
        layer(x).loss.backward()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter -= 0.1 * (0.0 if parameter.grad is None else parameter.grad)
    assert layer.network.join.weight.any()
    assert torch.equal(layer.table.weight, before) == (options == {"update": Frozen()})
    layer.eval()
    assert torch.equal(layer.decode(layer.encode(x)), layer(x).quantized)


def test_a_shared_base_belongs_to_its_owner():
    owner = VectorQuantize(DIM, CODES, update=Gradient())
    layer = ImplicitVQ(DIM, CODES, MLP(4), table=owner.table)
    assert layer.codebooks() == owner.codebooks()
    assert not any(name.startswith("table") for name in layer.state_dict())
    assert torch.equal(layer.codebook, owner.codebook)
    for wrong in (VectorQuantize(DIM, CODES), VectorQuantize(DIM, CODES + 1, update=Gradient())):
        with pytest.raises(ValueError, match=r"^table"):
            ImplicitVQ(DIM, CODES, MLP(4), table=wrong.table)
    with pytest.raises(ValueError, match="table is given together"):
        ImplicitVQ(DIM, CODES, MLP(4), table=owner.table, dead_codes=DeadCodes(1.0))


class Shift(torch.nn.Module):
    """A network of the user's own."""

    hidden = DIM

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, codes, partial):
        return codes + self.scale * partial


def test_a_network_of_ones_own():
    layer = ImplicitVQ(DIM, CODES, Shift())
    x, partial = vectors(), vectors()
    found = layer.quantize(x, partial=partial)
    table = layer.codebook + 0.5 * partial.unsqueeze(-2)
    nearest = (x.unsqueeze(-2) - table).square().sum(-1).argmin(-1)
    assert torch.equal(found.indices, nearest)
    torch.testing.assert_close(layer.decode(nearest, partial=partial), layer.codebook[nearest] + 0.5 * partial)
    found.losses["commitment"].backward()
    assert layer.network.scale.grad.abs() > 0
    with pytest.raises(TypeError, match="network = 3"):
        ImplicitVQ(DIM, CODES, 3)


def test_per_call_options_that_mean_nothing_are_refused(layer):
    with pytest.raises(ValueError, match=r"temperature = 0\.5: must be None with assignment"):
        layer.quantize(vectors(), temperature=0.5)
    layer.assignment = Gumbel()
    with pytest.raises(ValueError, match=r"temperature = -1\.0"):
        layer.quantize(vectors(), temperature=-1.0)
    with pytest.raises(ValueError, match="where indices are given"):
        layer.quantize(vectors(), temperature=0.5, indices=torch.zeros(4, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match="targets holds 7"):
        layer.quantize(vectors(), targets=torch.full((4, 6), CODES))


@pytest.mark.parametrize("kind", [VectorQuantize, ImplicitVQ])
def test_several_different_codes_are_drawn_where_a_temperature_is_given(kind):
    options = {"network": MLP(9, 1)} if kind is ImplicitVQ else {"estimator": "none"}
    layer, x = kind(DIM, CODES, assignment=Gumbel(0.5), **options), vectors()[0]
    nearest = layer.nearest(x, 3)
    for found, expected in zip(layer.nearest(x, 3, temperature=1e-6), nearest, strict=True):
        torch.testing.assert_close(found, expected)
    many = layer.nearest(x[:1].expand(4000, -1), 2, temperature=None)[0]
    assert (many[:, 0] != many[:, 1]).all()
    shares = torch.bincount(many[:, 0], minlength=CODES) / 4000
    torch.testing.assert_close(shares, (-torch.cdist(x[:1], layer.codebook)[0] / 0.5).softmax(-1).detach(), rtol=0, atol=0.04)


def test_affine_codes_are_read_by_the_vectors_at_hand():
    """A fresh network changes no code, so that the layer is a plain one."""
    options = {"update": Gradient(), "affine": Affine(current=True)}
    layer, plain = ImplicitVQ(DIM, CODES, MLP(9, 1), **options), VectorQuantize(DIM, CODES, **options)
    plain.table.load_state_dict(layer.table.state_dict())
    for x in (3 + vectors(), 7 + 2 * vectors()):
        expected, found = plain(x), layer(x)
        torch.testing.assert_close(found.quantized, expected.quantized)
        assert torch.equal(found.indices, expected.indices)
