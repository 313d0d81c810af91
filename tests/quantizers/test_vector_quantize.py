"""What each choice of VectorQuantize does; the laws that all quantizers share are in tests/laws."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from states import snapshot
from vqkit.ops import scores
from vqkit.ops.assignment import soft_codes
from vqkit.quantizers.codebook import Codebook
from vqkit.quantizers.commit import update_codebooks_
from vqkit.quantizers.config import (
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
    KMeans,
    Orthogonality,
    OwnOptimizer,
    Softmax,
)
from vqkit.quantizers.vector_quantize import VectorQuantize

DIM, CODES, BATCH, TIME = 6, 8, 3, 7


def vectors(*positions, dim=DIM, dtype=torch.float32):
    return torch.randn(*(positions or (BATCH, TIME)), dim, dtype=dtype)


def spread_out(**options):
    """A quantizer whose codes are standard normal, as the vectors here."""
    quantizer = VectorQuantize(DIM, CODES, **options)
    if quantizer.table.transform is None:
        quantizer.codebook = torch.randn_like(quantizer.codebook)
    return quantizer


def assert_unchanged(module, before):
    after = module.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name


# What comes out


def test_a_call_gives_the_nearest_codes_and_their_mean_squared_error():
    quantizer = spread_out()
    x, codes = vectors(40, 50), quantizer.codebook
    out = quantizer(x)
    nearest = torch.cdist(x.double(), codes.double()).argmin(-1)
    assert torch.equal(out.indices, nearest)
    assert torch.equal(out.quantized, codes[nearest])
    torch.testing.assert_close(out.loss, F.mse_loss(codes[nearest], x))


@pytest.mark.parametrize("update", [EMA(0.5), Gradient(), OwnOptimizer()])
def test_one_call_has_one_codebook(update):
    quantizer = spread_out(update=update, dead_codes=DeadCodes(1.0))
    for _ in range(3):
        x, codes = vectors(), quantizer.codebook.clone()
        out = quantizer(x)
        assert torch.equal(out.quantized, codes[out.indices])
        torch.testing.assert_close(out.loss, F.mse_loss(codes[out.indices], x))


@pytest.mark.parametrize("update", [EMA(0.1), Gradient(), OwnOptimizer(learning_rate=0.5)])
def test_losses_have_the_gradient_of_the_codebook_that_made_the_output(update):
    quantizer = spread_out(update=update, losses=(Commitment(), CrossEntropyCommitment(), Diversity(temperature=1.0)))
    for _ in range(3):
        x = vectors().requires_grad_()
        frozen, learning = quantizer(x, freeze_codebook=True), quantizer(x)
        quantizer(vectors())  # commits what the call before left, ahead of its backward
        found, expected = (torch.autograd.grad(out.quantized.sin().sum() + out.loss, x)[0] for out in (learning, frozen))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("heads, code_shape", [(1, ()), (2, (2,))])
@pytest.mark.parametrize("positions", [(5,), (2, 5), (2, 3, 4), (2, 2, 3, 2)])
@pytest.mark.parametrize("layout", ["last", "first"])
def test_shapes_and_layouts(positions, layout, heads, code_shape):
    quantizer = spread_out(layout=layout, heads=heads)
    reference = VectorQuantize(DIM, CODES, heads=heads)
    reference.codebook = quantizer.codebook
    rows = vectors(*positions)
    x = rows.movedim(-1, 1) if layout == "first" else rows
    out, expected = quantizer(x), reference(rows)
    assert out.quantized.shape == x.shape and out.indices.shape == (*positions, *code_shape) and out.loss.shape == ()
    assert torch.equal(out.quantized, expected.quantized.movedim(-1, 1) if layout == "first" else expected.quantized)
    assert torch.equal(out.indices, expected.indices) and torch.equal(out.loss, expected.loss)
    quantizer.codebook = reference.codebook
    assert torch.equal(quantizer.decode(quantizer.encode(x)), quantizer.eval()(x).quantized)
    assert quantizer.code_shape == code_shape and quantizer.bits_per_vector == 3 * heads


@pytest.mark.parametrize("separate", [True, False])
def test_heads_are_quantizers_of_slices(separate):
    heads, width = 3, DIM // 3
    quantizer = spread_out(heads=heads, separate_heads=separate, update=EMA(0.5))
    assert quantizer.codebook.shape == ((heads, CODES, width) if separate else (CODES, width))
    x, book = vectors(), quantizer.codebook
    out = quantizer(x)
    slices = x.unflatten(-1, (heads, width)).unbind(-2)
    alone = []
    for head, part in enumerate(slices):
        one = VectorQuantize(width, CODES, update=EMA(0.5))
        one.codebook = book[head] if separate else book
        alone.append((one, one(part)))
        assert torch.equal(out.indices[..., head], alone[-1][1].indices)
    assert torch.equal(out.quantized, torch.cat([found.quantized for _, found in alone], dim=-1))
    torch.testing.assert_close(out.loss, torch.stack([found.loss for _, found in alone]).mean())
    if separate:
        torch.testing.assert_close(quantizer.codebook, torch.stack([one.codebook for one, _ in alone]))
    else:
        together = VectorQuantize(width, CODES, update=EMA(0.5))
        together.codebook = book
        together(torch.stack(slices))
        torch.testing.assert_close(quantizer.codebook, together.codebook)


@pytest.mark.parametrize("norm", [False, True])
def test_projections_stand_around_the_codebook(norm):
    quantizer = VectorQuantize(DIM, CODES, codebook_dim=4, heads=2, projection_norm=norm, estimator="straight_through")
    quantizer.codebook = torch.randn(CODES, 4)
    inner = VectorQuantize(8, CODES, heads=2, estimator="straight_through")
    inner.codebook = quantizer.codebook
    x = vectors()
    projected = quantizer.project_in(x)
    projected = F.layer_norm(projected, (8,)) if norm else projected
    out, expected = quantizer(x), inner(projected)
    assert torch.equal(out.indices, expected.indices)
    torch.testing.assert_close(out.quantized, quantizer.project_out(expected.quantized))
    torch.testing.assert_close(out.loss, expected.loss)
    codes = quantizer.decode_codes(out.indices)
    assert codes.shape == (BATCH, TIME, 8) and quantizer.decode(out.indices).shape == x.shape
    torch.testing.assert_close(quantizer.project_out(codes), quantizer.decode(out.indices))
    (out.quantized.sum() + out.loss).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in quantizer.parameters())


def test_cosine_compares_directions():
    quantizer = spread_out(metric="cosine")
    x, codes = vectors(), quantizer.codebook
    direction = F.normalize(x, dim=-1)
    torch.testing.assert_close(codes.norm(dim=-1), torch.ones(CODES))
    out = quantizer.quantize(x)
    assert torch.equal(out.indices, (direction @ codes.T).argmax(-1))
    assert torch.equal(out.indices, quantizer.encode(7 * x))
    torch.testing.assert_close(out.quantized, codes[out.indices])
    torch.testing.assert_close(out.losses["commitment"], F.mse_loss(codes[out.indices], direction))


@pytest.mark.parametrize(
    "options", [{"affine": Affine()}, {"transform": "linear", "update": Gradient()}, {"transform": MLP(8), "update": Frozen()}]
)
def test_what_is_decoded_is_what_came_out(options):
    quantizer = spread_out(**options)
    for _ in range(3):
        quantizer(3 + 2 * vectors())
    x = vectors()
    out = quantizer.eval()(x)
    assert torch.equal(quantizer.decode(out.indices), out.quantized)
    assert torch.equal(quantizer.codebook[out.indices], out.quantized)


# Masks, lengths, what does not count


@pytest.mark.parametrize("layout", ["last", "first"])
@pytest.mark.parametrize("masked", ["zero", "input"])
def test_masked_positions(masked, layout):
    quantizer = spread_out(masked=masked, layout=layout, heads=2, codebook_dim=4)
    rows, lengths = vectors(), torch.tensor([TIME, 2, 0])
    mask = torch.arange(TIME) < lengths[:, None]
    x = (rows if layout == "last" else rows.movedim(-1, 1)).requires_grad_()
    out, same = quantizer.quantize(x, mask), quantizer.quantize(x, lengths=lengths)
    assert torch.equal(out.quantized, same.quantized) and torch.equal(out.indices, same.indices)
    quantized = out.quantized if layout == "last" else out.quantized.movedim(1, -1)
    assert (out.indices[mask] >= 0).all() and (out.indices[~mask] == -1).all()
    assert torch.equal(quantized[~mask], rows[~mask] if masked == "input" else torch.zeros_like(rows[~mask]))
    assert torch.equal(quantizer.encode(x, mask), out.indices) and torch.equal(quantizer.encode(x, lengths=lengths), out.indices)
    (gradient,) = torch.autograd.grad(out.quantized.sum() + sum(out.losses.values()), x)
    gradient = gradient if layout == "last" else gradient.movedim(1, -1)
    assert torch.equal(gradient[~mask], torch.full_like(gradient[~mask], float(masked == "input")))
    kept = quantizer.quantize(rows[mask] if layout == "last" else rows[mask].requires_grad_())
    torch.testing.assert_close(out.losses["commitment"], kept.losses["commitment"])
    torch.testing.assert_close(out.statistics.sum, kept.statistics.sum)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "options", [{}, {"codebook_dim": 4, "heads": 2, "projection_norm": True}, {"metric": "cosine"}, {"heads": 2, "separate_heads": True}]
)
def test_what_is_not_finite_is_dropped(options, bad):
    quantizer = spread_out(**options)
    x = vectors()
    x[1, 3, 2] = bad
    x.requires_grad_()
    out = quantizer(x)
    (out.quantized.sum() + out.loss).backward()
    lost = torch.zeros(BATCH, TIME, dtype=torch.bool)
    lost[1, 3] = True
    assert (out.indices[lost] == -1).all() and (out.indices[~lost] >= 0).all()
    assert not out.quantized[lost].any() and out.quantized.isfinite().all() and not x.grad[lost].any()
    for tensor in (x.grad, out.loss, quantizer.codebook, *(p.grad for p in quantizer.parameters() if p.grad is not None)):
        assert tensor.isfinite().all()
    clean = spread_out(**options)
    clean.load_state_dict(quantizer.state_dict())
    torch.testing.assert_close(clean.quantize(x).losses["commitment"], clean.quantize(x[~lost]).losses["commitment"])
    assert quantizer.eval().metrics()["non_finite"] >= 1


def test_a_projection_that_overflows_is_not_finite():
    quantizer = VectorQuantize(DIM, CODES, codebook_dim=4, projection_norm=True)
    x = vectors()
    x[0, 0] = 3e38
    x.requires_grad_()
    out = quantizer(x)
    (out.quantized.sum() + out.loss).backward()
    assert out.indices[0, 0] == -1 and (out.indices >= 0).sum() == BATCH * TIME - 1
    assert all(p.grad.isfinite().all() for p in quantizer.parameters()) and x.grad.isfinite().all() and out.loss.isfinite()


@pytest.mark.parametrize("heads", [1, 2])
def test_what_can_be_compared_is_what_the_codes_can_be_compared_with_also_beside_a_mask(heads):
    quantizer = VectorQuantize(DIM, CODES, heads=heads).double().eval()
    x = vectors()
    x[0, 1] = 1e30  # whose square only float64 holds
    found, mask = quantizer.encode(x), torch.ones(BATCH, TIME, dtype=torch.bool)
    assert (found >= 0).all() and torch.equal(quantizer.encode(x, mask), found)
    x[2, 2] = torch.nan
    assert (quantizer.encode(x) < 0).sum() == heads


def test_what_is_not_finite_can_be_an_error():
    quantizer = spread_out(on_nonfinite="raise")
    x = vectors()
    x[0, 1] = torch.nan
    before = snapshot(quantizer)
    for call in (quantizer, quantizer.encode, quantizer.quantize):
        with pytest.raises(ValueError, match=r"^x holds 1 vectors not finite: must be finite"):
            call(x)
    assert_unchanged(quantizer, before)
    mask = torch.ones(BATCH, TIME, dtype=torch.bool)
    mask[0, 1] = False
    assert quantizer(x, mask).loss.isfinite()  # what is masked may hold anything
    compiled = torch.compile(quantizer.encode, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="x holds vectors that are not finite"):
        compiled(x)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"heads": 2, "codebook_dim": 4},
        {"assignment": Gumbel(), "losses": (Commitment(), Diversity(), CrossEntropyCommitment())},
        {"update": Gradient(), "losses": (Orthogonality(active_only=True, max_codes=3),)},
        {"update": OwnOptimizer(), "dead_codes": DeadCodes(0.5)},
        {"affine": Affine()},
    ],
)
def test_nothing_to_quantize_is_no_trouble(options, train):
    quantizer = spread_out(**options).train(train)
    for x, mask in ((vectors(0, TIME), None), (vectors(BATCH, 0), None), (vectors(), torch.zeros(BATCH, TIME, dtype=torch.bool))):
        x.requires_grad_()
        out = quantizer(x, mask)
        assert out.loss == 0 and out.quantized.shape == x.shape and not out.quantized.any()
        (gradient,) = torch.autograd.grad(out.quantized.sum() + out.loss, x, allow_unused=True)
        assert gradient is None or not gradient.any()
    assert quantizer.codebook.isfinite().all()


# Indices that are given


def test_given_indices_are_taken_instead():
    quantizer = spread_out(update=EMA(0.5), heads=2)
    x, codes = vectors(), quantizer.codebook
    indices = torch.randint(CODES, (BATCH, TIME, 2))
    indices[0, 0], indices[0, 1, 0] = -1, -1
    found = quantizer.quantize(x, indices=indices)
    assert torch.equal(found.indices, indices)
    assert torch.equal(found.quantized, quantizer.decode(indices)) and not found.quantized[0, 0].any()
    rows, chosen = x.reshape(-1, DIM // 2), indices.reshape(-1)
    expected = torch.stack([rows[chosen == code].sum(0) for code in range(CODES)])
    torch.testing.assert_close(found.statistics.sum[0], expected)
    assert torch.equal(found.statistics.count[0], torch.bincount(chosen[chosen >= 0], minlength=CODES).float())
    assert not found.statistics.non_finite.any()
    own = codes[chosen[chosen >= 0]]
    torch.testing.assert_close(found.losses["commitment"], F.mse_loss(own, rows[chosen >= 0]))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("separate", [True, False])
def test_cross_entropy_of_targets(metric, separate):
    quantizer = spread_out(heads=2, separate_heads=separate, metric=metric)
    x, codes = vectors().requires_grad_(), quantizer.codebook.expand(2, -1, -1)
    targets = torch.randint(-1, CODES, (BATCH, TIME, 2))
    found = quantizer.quantize(x, targets=targets)
    heads = x.unflatten(-1, (2, DIM // 2))
    if metric == "cosine":
        scores = torch.einsum("bthk,hck->bthc", F.normalize(heads, dim=-1), codes)
    else:
        scores = -(heads.unsqueeze(-2) - codes).norm(dim=-1)
    expected = F.cross_entropy(scores.reshape(-1, CODES), targets.reshape(-1), ignore_index=-1)
    torch.testing.assert_close(found.losses["cross_entropy"], expected)
    torch.testing.assert_close(torch.autograd.grad(found.losses["cross_entropy"], x)[0], torch.autograd.grad(expected, x)[0])
    assert torch.equal(found.indices, quantizer.encode(x))
    torch.testing.assert_close(quantizer(x, targets=targets).loss, sum(found.losses.values()))
    mask = torch.rand(BATCH, TIME) < 0.5
    masked = quantizer.quantize(x, mask, targets=targets).losses["cross_entropy"]
    left_out = quantizer.quantize(x, targets=targets.where(mask.unsqueeze(-1), -1)).losses["cross_entropy"]
    torch.testing.assert_close(masked, left_out)


# Weights


def same_for_all(codes):
    return codes[:, None, None].expand(-1, BATCH, TIME, -1, -1)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("assignment", ["nearest", Softmax(0.5), Softmax(2.0, "reinmax")])
@pytest.mark.parametrize(
    "options", [{}, {"top_k": 3}, {"top_k": 3, "reduction": "none"}, {"targets": True}, {"top_k": 3, "targets": True, "reduction": "none"}]
)
def test_the_same_codebook_for_every_vector_is_a_codebook(metric, assignment, options, monkeypatch):
    monkeypatch.setattr(scores, "_FEW_DIFFERENCES", 0)
    losses = (Commitment(pull=0.5), CrossEntropyCommitment(), Diversity(temperature=1.0), Orthogonality())
    quantizer = spread_out(update=Gradient(), metric=metric, losses=losses, assignment=assignment)
    mask = torch.rand(BATCH, TIME) > 0.3
    options = options | ({"targets": torch.randint(-1, CODES, (BATCH, TIME))} if "targets" in options else {})
    given, found = vectors(), []
    for codes_of in (None, same_for_all):
        x = given.clone().requires_grad_()
        out = quantizer.quantize(x, mask, codes_of=codes_of, **options)
        total = out.quantized.sin().sum() + sum((loss * 0.3).exp().sum() for loss in out.losses.values())
        found.append((out.quantized, out.indices, out.losses, torch.autograd.grad(total, [x, quantizer.table.weight])))
    torch.testing.assert_close(*found)
    assert {"commitment", "diversity", "orthogonality"} <= found[0][2].keys()


def test_a_pull_by_own_codes_is_that_of_the_codebook():
    quantizer, mask = spread_out(update=Gradient()), torch.rand(BATCH, TIME) > 0.3
    x, found = vectors(), []
    for codes_of in (None, same_for_all, lambda codes: same_for_all(2 * codes)):
        quantizer.zero_grad()
        found.append((quantizer.pull_(x, mask, codes_of=codes_of), quantizer.table.weight.grad.clone()))
    torch.testing.assert_close(found[0], found[1])
    quantizer.codebook = 2 * quantizer.codebook
    quantizer.zero_grad()
    torch.testing.assert_close(found[2], (quantizer.pull_(x, mask), 2 * quantizer.table.weight.grad))


def test_a_weight_of_two_is_a_vector_that_comes_twice():
    quantizer = spread_out()
    x, repeats = vectors(1, TIME), torch.tensor([[0, 1, 2, 3, 1, 0, 2]])
    weighted = quantizer.quantize(x, weights=repeats.float()).statistics
    repeated = quantizer.quantize(x[0].repeat_interleave(repeats[0], dim=0).unsqueeze(0)).statistics
    torch.testing.assert_close(weighted.count, repeated.count)
    torch.testing.assert_close(weighted.sum, repeated.sum)


@pytest.mark.parametrize("separate", [True, False])
def test_weights_of_heads_masks_and_functions(separate):
    quantizer = spread_out(heads=2, separate_heads=separate, codebook_dim=4)
    x, weights, mask = vectors(), torch.rand(BATCH, TIME, 2), torch.rand(BATCH, TIME) < 0.5

    def weigh(rows, indices):
        assert torch.equal(rows, x) and indices.shape == (BATCH, TIME, 2)
        return weights

    for given in (weights, weigh):
        found = quantizer.quantize(x, mask, weights=given).statistics
        kept = weights * mask.unsqueeze(-1)
        torch.testing.assert_close(found.count.sum(-1), kept.sum((0, 1)) if separate else kept.sum().reshape(1))
        assert not found.non_finite.any()
    torch.testing.assert_close(quantizer.quantize(x, weights=mask.float()).statistics.sum, quantizer.quantize(x, mask).statistics.sum)


# Gradients


def test_estimators():
    x, direction = vectors(), vectors()

    def gradient(**options):
        quantizer = spread_out(losses=(), **options)
        quantizer.codebook = codes
        given = x.clone().requires_grad_()
        out = quantizer(given).quantized
        assert torch.equal(out, codes[quantizer.encode(x)])
        return torch.autograd.grad((out * direction).sum(), given)[0] if out.requires_grad else None

    codes = torch.randn(CODES, DIM)
    frozen = {"update": Frozen()}
    assert torch.equal(gradient(estimator="straight_through", **frozen), direction)
    rotated = gradient(estimator="rotation", **frozen)
    nearest = codes[torch.cdist(x, codes).argmin(-1)]
    ratio = (nearest.norm(dim=-1) / x.norm(dim=-1)).unsqueeze(-1)
    torch.testing.assert_close(rotated.norm(dim=-1), (ratio * direction).norm(dim=-1))
    assert gradient(estimator="none", **frozen) is None


@pytest.mark.parametrize("options", [{"assignment": Softmax()}, {"update": Gradient()}, {"estimator": DiVeQ()}])
def test_each_choice_stands_alone(options):
    quantizer = spread_out(**options)
    x, before = vectors().requires_grad_(), quantizer.codebook.detach().clone()
    out = quantizer(x)
    (out.quantized.sin().sum() + out.loss).backward()
    assert x.grad.isfinite().all() and x.grad.any()
    if "update" in options:
        assert quantizer.table.weight.grad.any()
    else:
        assert not torch.equal(quantizer.codebook, before)


def test_no_gradient_for_the_input():
    quantizer = VectorQuantize(DIM, CODES, codebook_dim=4, input_gradient=False)
    x = vectors().requires_grad_()
    out = quantizer(x)
    (out.quantized.sum() + out.loss).backward()
    assert x.grad is None and quantizer.project_in.weight.grad.any()
    commitment = VectorQuantize(DIM, CODES, estimator="none")(x)
    assert not commitment.quantized.requires_grad and torch.autograd.grad(commitment.loss, x)[0].any()


def test_codes_that_learn_by_gradient_are_pulled_to_the_vectors():
    quantizer = spread_out(update=Gradient(), losses=(Commitment(0.5),))
    x = vectors().requires_grad_()
    out = quantizer(x)
    out.loss.backward()
    codes = quantizer.codebook.detach().requires_grad_()
    given = x.detach().requires_grad_()
    expected = 0.5 * F.mse_loss(codes[out.indices], given)
    torch.testing.assert_close(out.loss, expected)
    expected.backward()
    torch.testing.assert_close(x.grad, given.grad)
    torch.testing.assert_close(quantizer.table.weight.grad[0], codes.grad)


def test_sync_update_sends_a_share_of_the_gradient_to_the_codes():
    quantizer = spread_out(update=Gradient(), sync_update=0.25, losses=(), estimator="straight_through")
    x, direction = vectors().requires_grad_(), vectors()
    out = quantizer(x)
    assert torch.equal(out.quantized, quantizer.codebook[out.indices])
    (out.quantized * direction).sum().backward()
    expected = torch.zeros(CODES, DIM).index_add_(0, out.indices.flatten(), 0.25 * direction.flatten(0, 1))
    torch.testing.assert_close(quantizer.table.weight.grad[0], expected)
    assert torch.equal(x.grad, direction)


def test_directional_reparametrisation_is_near_the_code_and_teaches_it():
    quantizer = spread_out(update=Gradient(), estimator=DiVeQ(1e-6), losses=())
    x = vectors().requires_grad_()
    out = quantizer(x)
    torch.testing.assert_close(out.quantized, quantizer.codebook[out.indices], rtol=0, atol=0.02)
    assert not torch.equal(out.quantized, quantizer.codebook[out.indices])
    out.quantized.square().sum().backward()
    assert quantizer.table.weight.grad.any() and x.grad.any()
    out = quantizer.eval()(x)
    assert torch.equal(out.quantized, quantizer.codebook[out.indices])


# Drawing


@pytest.mark.parametrize("estimator", [None, "straight_through", "reinmax"])
def test_codes_are_drawn_in_training_alone(estimator):
    quantizer = spread_out(assignment=Gumbel(50.0, estimator), update=Frozen())
    x = vectors().requires_grad_()
    nearest = quantizer.encode(x)
    out = quantizer(x)
    assert (out.indices != nearest).any() and torch.equal(out.quantized, quantizer.codebook[out.indices])
    torch.testing.assert_close(out.loss, F.mse_loss(quantizer.codebook[out.indices], x))
    assert torch.autograd.grad(out.quantized.sum(), x, retain_graph=True)[0].any()
    assert torch.equal(quantizer(x, temperature=0.0).indices, nearest)
    assert torch.equal(quantizer(x, temperature=1e-4).indices, nearest)
    assert torch.equal(quantizer.eval()(x).indices, nearest)


def test_drawn_codes_pass_the_gradient_of_the_estimator():
    x, direction = vectors(), vectors()
    for estimator in ("straight_through", "rotation", "none", DiVeQ(1e-6)):
        quantizer = spread_out(assignment=Gumbel(50.0), estimator=estimator, update=Gradient(), losses=())
        drawn, given = (x.clone().requires_grad_() for _ in range(2))
        torch.manual_seed(1)
        out = quantizer(drawn)
        assert (out.indices != quantizer.encode(x)).any()
        torch.manual_seed(1)
        torch.rand(1, BATCH * TIME)  # what the draw took
        same = quantizer(given, indices=out.indices)
        assert torch.equal(out.quantized, same.quantized)
        of_drawn, of_given = (
            torch.autograd.grad((q * direction).sum(), (i, quantizer.table.weight), allow_unused=True, retain_graph=True)
            for q, i in ((out.quantized, drawn), (same.quantized, given))
        )
        for found, expected in zip(of_drawn, of_given, strict=True):
            assert found is expected is None or torch.equal(found, expected)
        if estimator == "straight_through":
            assert torch.equal(of_drawn[0], direction)


@pytest.mark.parametrize("estimator", ["straight_through", "reinmax"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_the_nearest_code_can_have_the_gradient_of_a_softmax(estimator, metric):
    quantizer = spread_out(assignment=Softmax(0.5, estimator), update=Gradient(), metric=metric, losses=())
    x, direction = vectors().requires_grad_(), vectors()
    state = torch.get_rng_state()
    out = quantizer(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(out.indices, quantizer.encode(x)) and torch.equal(out.quantized, quantizer.codebook[out.indices])
    own = F.normalize(x, dim=-1) if metric == "cosine" else x
    expected = soft_codes(own, quantizer.codebook, out.indices, temperature=0.5, estimator=estimator, metric=metric)
    of = (x, quantizer.table.weight)
    for a, b in zip(*(torch.autograd.grad((q * direction).sum(), of, retain_graph=True) for q in (out.quantized, expected)), strict=True):
        torch.testing.assert_close(a, b)
    warm = quantizer(x, temperature=5.0).quantized
    assert not torch.equal(
        torch.autograd.grad((warm * direction).sum(), x, retain_graph=True)[0],
        torch.autograd.grad((expected * direction).sum(), x, retain_graph=True)[0],
    )


# Several codes


@pytest.mark.parametrize("assignment", [Gumbel(20.0), Gumbel(20.0, "reinmax")])
def test_several_codes_are_drawn_in_training(assignment):
    quantizer = spread_out(assignment=assignment, update=Gradient())
    x = vectors(40, 5).requires_grad_()
    nearest = torch.cdist(x, quantizer.codebook).topk(3, largest=False).indices
    out = quantizer(x, top_k=3)
    ordered = out.indices.sort(-1).values
    assert (ordered.diff(dim=-1) > 0).all() and (out.indices != nearest).any()
    assert torch.equal(out.quantized, quantizer.codebook[out.indices])
    assert torch.equal(quantizer(x, top_k=3, temperature=0.0).indices, nearest)
    assert torch.equal(quantizer.eval()(x, top_k=3).indices, nearest)


@pytest.mark.parametrize("options", [{"estimator": "straight_through"}, {"estimator": "rotation"}, {"assignment": Gumbel(2.0, "reinmax")}])
def test_each_of_several_codes_has_the_gradient_of_a_single_one(options):
    quantizer = spread_out(update=Gradient(), dead_codes=DeadCodes(1.0), **options)
    x, direction = vectors().requires_grad_(), torch.randn(BATCH, TIME, 3, DIM)
    before = snapshot(quantizer)
    several = quantizer.quantize(x, top_k=3, reduction="none")
    alone = several.indices.movedim(-1, 0)
    if "assignment" in options:
        singles = [soft_codes(x, quantizer.codebook, i, temperature=2.0, estimator="reinmax") for i in alone]
    else:
        singles = [quantizer.quantize(x, indices=i).quantized for i in alone]
    of = (x, quantizer.table.weight)
    expected = torch.autograd.grad((torch.stack(singles, -2) * direction).sum(), of, allow_unused=True, retain_graph=True)
    for a, b in zip(
        torch.autograd.grad((several.quantized * direction).sum(), of, allow_unused=True, retain_graph=True), expected, strict=True
    ):
        assert a is b is None or torch.allclose(a, b, atol=1e-6)
    (of_codes,) = torch.autograd.grad(several.losses["commitment"].sum(), quantizer.table.weight)
    assert of_codes.any() and several.statistics is None
    out = quantizer(x, top_k=3)
    (out.quantized.sum() + out.loss).backward()
    assert_unchanged(quantizer, before)


def test_the_nearest_few_are_codes_without_noise():
    """What a beam search sees in training is what a path is then quantized to."""
    for options in ({"estimator": DiVeQ(1.0), "update": Gradient()}, {"assignment": Gumbel(100.0)}, {"codebook_dim": 4, "layout": "first"}):
        quantizer = spread_out(**options) if "codebook_dim" not in options else VectorQuantize(DIM, CODES, **options)
        x = vectors(9)
        x[4] = torch.nan
        state = torch.get_rng_state()
        indices, codes = quantizer.nearest(x, 3)
        assert torch.equal(torch.get_rng_state(), state)
        assert not codes.requires_grad and indices.shape == (9, 3) and codes.shape == (9, 3, DIM)
        assert torch.equal(indices[:, 0], quantizer.encode(x))
        assert (indices[4] == -1).all() and not codes[4].any()
        for place in range(3):
            assert torch.equal(codes[:, place], quantizer.decode(indices[:, place]))
    for bad, message in (
        ((vectors(), 2), r"^x has shape \(3, 7, 6\): must be \[vectors, 6\]"),
        ((vectors(9), 0), r"^num = 0: must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            spread_out().nearest(*bad)
    with pytest.raises(ValueError, match=r"^nearest needs one head: this has heads = 2"):
        spread_out(heads=2).nearest(vectors(9), 2)


def test_the_few_nearest_codes():
    quantizer = spread_out()
    x, mask = vectors(), torch.rand(BATCH, TIME) < 0.7
    before = snapshot(quantizer)
    out = quantizer(x, mask, top_k=3)
    expected = torch.cdist(x, quantizer.codebook).topk(3, largest=False).indices
    assert torch.equal(out.indices, expected.where(mask.unsqueeze(-1), -1))
    assert torch.equal(out.quantized, quantizer.codebook[expected].where(mask[..., None, None], 0.0))
    error = (quantizer.codebook[expected] - x.unsqueeze(-2)).square()[mask]
    torch.testing.assert_close(out.loss, error.mean())
    assert_unchanged(quantizer, before)
    first = spread_out(layout="first")
    first.codebook = quantizer.codebook
    turned = first(x.movedim(-1, 1), mask, top_k=3)
    assert torch.equal(turned.quantized, out.quantized.movedim(-1, 1))
    indices, codes = quantizer.nearest(x[0], 2)
    assert torch.equal(indices, expected[0, :, :2]) and torch.equal(codes, quantizer.codebook[indices])
    assert quantizer.nearest(x[0], 99)[0].shape == (TIME, CODES)


# Losses


@pytest.mark.parametrize("options", [{}, {"heads": 2}, {"heads": 3, "separate_heads": True, "layout": "first"}, {"codebook_dim": 4}])
def test_a_loss_for_each_vector(options):
    losses = (Commitment(0.5), CrossEntropyCommitment(0.25), Diversity(0.1))
    quantizer = VectorQuantize(DIM, CODES, update=Gradient(), losses=losses, **options)
    x, mask = vectors().requires_grad_(), torch.rand(BATCH, TIME) < 0.7
    x = x.movedim(-1, 1) if options.get("layout") == "first" else x
    targets = torch.randint(CODES, (BATCH, TIME, *quantizer.code_shape))
    each, mean = (quantizer.quantize(x, mask, targets=targets, reduction=r) for r in ("none", "mean"))
    kept = mask.reshape(*mask.shape, *(1 for _ in quantizer.code_shape)).expand(each.indices.shape)
    for name in ("commitment", "cross_entropy_commitment", "cross_entropy"):
        assert each.losses[name].shape == each.indices.shape and not each.losses[name][~kept].any()
        torch.testing.assert_close(each.losses[name].sum() / kept.sum(), mean.losses[name])
        of = (x, quantizer.table.weight)
        for a, b in zip(
            *(torch.autograd.grad(q, of, retain_graph=True) for q in (each.losses[name][kept].mean(), mean.losses[name])), strict=True
        ):
            torch.testing.assert_close(a, b)
    assert torch.equal(each.losses["diversity"], mean.losses["diversity"])
    if not options:
        error = (quantizer.codebook[each.indices] - x).square().mean(-1)
        torch.testing.assert_close(each.losses["commitment"], error.where(mask, 0.0))
    out = quantizer(x, mask, targets=targets, reduction="none")
    torch.testing.assert_close(out.loss, sum(quantizer.loss_weights[name] * loss for name, loss in each.losses.items()))


def test_a_loss_for_each_candidate():
    quantizer = spread_out(losses=(Commitment(0.5), Diversity(0.1)), update=Gradient())
    x, mask = vectors(), torch.rand(BATCH, TIME) < 0.7
    each = quantizer.quantize(x, mask, top_k=3, reduction="none")
    error = (quantizer.codebook[each.indices] - x.unsqueeze(-2)).square().mean(-1)
    torch.testing.assert_close(each.losses["commitment"], error.where(mask.unsqueeze(-1), 0.0))
    assert (each.losses["commitment"].diff(dim=-1)[mask] >= 0).all()
    single = quantizer.quantize(x, mask)
    torch.testing.assert_close(each.losses["diversity"], single.losses["diversity"])
    torch.testing.assert_close(
        quantizer(x, mask, top_k=3, reduction="none").loss, 0.5 * each.losses["commitment"] + 0.1 * single.losses["diversity"]
    )


def test_diversity_counts_the_nearest_code_almost_alone():
    """By default the scores are multiplied by 100."""
    quantizer = spread_out(losses=(Diversity(),))
    x, codes = vectors(), quantizer.codebook
    mean = (-100 * torch.cdist(x.flatten(0, 1), codes)).softmax(-1).mean(0)
    torch.testing.assert_close(quantizer.quantize(x).losses["diversity"], torch.xlogy(mean, mean).sum())
    count = torch.bincount(quantizer.encode(x).flatten(), minlength=CODES) / (BATCH * TIME)
    torch.testing.assert_close(torch.xlogy(mean, mean).sum(), torch.xlogy(count, count).sum(), rtol=0.1, atol=0)


def test_the_loss_is_the_weighted_sum_of_its_parts():
    losses = (Commitment(0.5), CrossEntropyCommitment(0.25), Orthogonality(2.0), Diversity(0.1, temperature=0.5))
    quantizer = spread_out(losses=losses, update=Gradient())
    x = vectors()
    parts = quantizer.quantize(x).losses
    assert list(parts) == ["commitment", "cross_entropy_commitment", "orthogonality", "diversity"]
    assert all(part.shape == () and part != 0 for part in parts.values())
    expected = sum(quantizer.loss_weights[name] * part for name, part in parts.items())
    torch.testing.assert_close(quantizer(x).loss, expected)
    codes = quantizer.codebook
    nearest = torch.cdist(x, codes).argmin(-1)
    scores = -(x.unsqueeze(-2) - codes).norm(dim=-1)
    torch.testing.assert_close(parts["cross_entropy_commitment"], F.cross_entropy(scores.flatten(0, 1), nearest.flatten()))
    mean = (scores / 0.5).softmax(-1).mean((0, 1))
    torch.testing.assert_close(parts["diversity"], (mean * mean.log()).sum())


def test_orthogonality_of_active_codes():
    quantizer = spread_out(losses=(Orthogonality(active_only=True),), update=Gradient())
    x = quantizer.codebook[torch.tensor([[1, 4, 4]])].detach()
    cosine = F.cosine_similarity(*quantizer.codebook[[1, 4]], dim=0)
    torch.testing.assert_close(quantizer.quantize(x).losses["orthogonality"], 2 * cosine**2 / 4)


@pytest.mark.parametrize("losses", [(Orthogonality(10.0),), (Commitment(), Orthogonality(active_only=True))])
def test_no_commit_undoes_the_step_of_the_optimizer(losses):
    quantizer = spread_out(update=Gradient(), losses=losses)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1)
    for _ in range(3):
        before = quantizer.codebook.detach().clone()
        optimizer.zero_grad()
        quantizer(vectors()).loss.backward()
        optimizer.step()
        stepped = before - 0.1 * quantizer.table.weight.grad.squeeze(0)
        quantizer.eval().train()
        assert not torch.equal(stepped, before)
        torch.testing.assert_close(quantizer.codebook, stepped)


# The codebook


def test_frozen_for_one_call():
    quantizer = spread_out(update=Gradient(), dead_codes=DeadCodes(1.0))
    quantizer(vectors())
    before = snapshot(quantizer)
    out = quantizer(vectors(), freeze_codebook=True)
    found = quantizer.quantize(vectors(), freeze_codebook=True)
    assert found.statistics is None and not any(loss.requires_grad for loss in (out.loss, *found.losses.values()))
    assert_unchanged(quantizer, before)


def test_the_codebook_can_be_set():
    quantizer = VectorQuantize(DIM, CODES, heads=2, separate_heads=True)
    codes = torch.randn(2, CODES, DIM // 2)
    quantizer.codebook = codes
    torch.testing.assert_close(quantizer.codebook, codes)
    with pytest.raises(ValueError, match=r"^codebook has shape \(8, 3\): must be \(2, 8, 3\)"):
        quantizer.codebook = codes[0]
    with pytest.raises(ValueError, match=r"^codebook has shape \(2, 8, 3\): must be \(8, 6\)"):
        VectorQuantize(DIM, CODES).codebook = codes


@pytest.mark.parametrize("options", [{}, {"heads": 2, "separate_heads": True}, {"codebook_dim": 4}, {"metric": "cosine"}])
def test_a_k_means_start(options):
    quantizer = VectorQuantize(DIM, CODES, init=KMeans(), **options)
    x = vectors(4, 20)
    for call in (quantizer.encode, quantizer.eval(), lambda x: quantizer.train()(x, freeze_codebook=True)):
        with pytest.raises(ValueError, match=r"^the codebook waits for its k-means start"):
            call(x)
    by_name = VectorQuantize(DIM, CODES, init=KMeans(), **options)
    by_name.load_state_dict({name: value for name, value in quantizer.state_dict().items() if "initialized" not in name}, strict=False)
    by_name.initialize_(x)
    random = spread_out(**options)
    assert by_name.quantize(x).losses["commitment"] < 0.8 * random.quantize(x).losses["commitment"]
    out = quantizer.train()(x)
    assert out.indices.unique().numel() == CODES
    if not options.get("codebook_dim"):
        torch.testing.assert_close(out.loss, by_name.quantize(x).losses["commitment"])


def test_dead_codes_are_replaced_by_hand():
    quantizer = spread_out(update=EMA(0.1))
    quantizer.codebook = torch.cat([100 + torch.randn(CODES - 1, DIM), torch.zeros(1, DIM)])
    x = vectors(4, 20)
    assert (quantizer(x).indices == CODES - 1).all()
    quantizer.replace_dead_codes_(x, threshold=0.5)
    assert quantizer(x).indices.unique().numel() > 1
    with pytest.raises(ValueError, match=r"^threshold = None"):
        quantizer.replace_dead_codes_(x)


def test_a_manual_commit_is_one_step_of_all_calls():
    manual, auto = (spread_out(update=EMA(0.5), commit=commit) for commit in ("manual", "auto"))
    auto.codebook = manual.codebook
    before, x = manual.codebook, vectors(4, 9)
    manual(x[:1])
    manual(x[1:])
    assert torch.equal(manual.codebook, before)
    update_codebooks_(manual)
    auto(x)
    torch.testing.assert_close(manual.codebook, auto.codebook)


# Arithmetic and engines


@pytest.mark.parametrize("options", [{}, {"metric": "cosine"}, {"heads": 2, "separate_heads": True}, {"assignment": Gumbel()}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_input_is_assigned_as_float32(dtype, options):
    quantizer = spread_out(**options)
    x = vectors(4, 50).to(dtype)

    def run(given, autocast=False):
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            return quantizer.quantize(given)

    narrow, wide, cast = run(x), run(x.float()), run(x.float(), autocast=True)
    assert torch.equal(narrow.indices, wide.indices) and torch.equal(cast.indices, wide.indices)
    assert narrow.quantized.dtype == dtype and cast.quantized.dtype == torch.float32
    assert torch.equal(narrow.quantized, wide.quantized.to(dtype)) and torch.equal(cast.quantized, wide.quantized)
    assert torch.equal(narrow.losses["commitment"], wide.losses["commitment"])
    assert torch.equal(narrow.statistics.sum, wide.statistics.sum) and torch.equal(cast.statistics.sum, wide.statistics.sum)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_modules_of_other_dtypes(dtype):
    quantizer = VectorQuantize(DIM, CODES, codebook_dim=4).to(dtype)
    assert quantizer.table.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    x = vectors(dtype=dtype).requires_grad_()
    out = quantizer(x)
    (out.quantized.sum() + out.loss).backward()
    assert out.quantized.dtype == dtype and x.grad.dtype == dtype and quantizer.project_in.weight.grad.any()
    projected = quantizer.project_in(x).detach()
    inner = VectorQuantize(4, CODES)
    inner.codebook = quantizer.codebook
    quantizer.codebook = inner.codebook
    assert torch.equal(quantizer.encode(x), inner.encode(projected.float() if dtype != torch.float64 else projected))


class _Largest(TorchDispatchMode):
    """The largest number of elements that any operation returned."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.size = max(self.size, *sizes, 0)
        return result


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"metric": "cosine"},
        {"assignment": Gumbel(), "update": Gradient()},
        {"losses": (CrossEntropyCommitment(), Diversity())},
        {"update": Gradient(), "losses": (Commitment(), Orthogonality(active_only=True))},
        {"update": OwnOptimizer(), "dead_codes": DeadCodes(1.0)},
    ],
)
def test_there_is_no_matrix_of_all_vectors_by_all_codes(options):
    number, size = 8192, 1024
    quantizer = VectorQuantize(4, size, **options)
    x = torch.randn(number, 4, requires_grad=True)
    with _Largest() as seen:
        for _ in range(2):
            out = quantizer(x, targets=torch.zeros(number, dtype=torch.int64))
            (out.quantized.sum() + out.loss).backward()
        quantizer(x, top_k=3)
    assert 0 < seen.size <= number * size // 4


@pytest.mark.parametrize(
    "options",
    [
        {"heads": 2, "codebook_dim": 4, "dead_codes": DeadCodes(1.0)},
        {"metric": "cosine", "losses": (Commitment(), Diversity(), CrossEntropyCommitment())},
        {"assignment": Gumbel(), "update": Gradient(), "losses": (Orthogonality(active_only=True, max_codes=3),)},
        {"affine": Affine(), "update": OwnOptimizer()},
    ],
)
def test_no_value_is_looked_at(options):
    """On the meta device there is none to look at; elsewhere than on CPU looking would wait for the device."""
    quantizer = VectorQuantize(DIM, CODES, **options).to("meta")
    x = vectors().to("meta").requires_grad_()
    mask = torch.ones(BATCH, TIME, dtype=torch.bool, device="meta")
    indices = torch.zeros(BATCH, TIME, *quantizer.code_shape, dtype=torch.int64, device="meta")
    for _ in range(2):
        out = quantizer(x, mask, targets=indices, weights=mask.float())
        (out.quantized.sum() + out.loss).backward()
    quantizer(x, indices=indices)
    quantizer.eval()(x, lengths=torch.ones(BATCH, dtype=torch.int64, device="meta"))
    assert quantizer.decode(quantizer.encode(x)).shape == x.shape


ENGINE_OPTIONS = [
    {},
    {"heads": 2, "separate_heads": True, "codebook_dim": 4, "metric": "cosine", "layout": "first", "masked": "input"},
    {
        "assignment": Gumbel(estimator="reinmax"),
        "update": Gradient(),
        "losses": (Commitment(), Orthogonality(active_only=True, max_codes=4)),
    },
    {"assignment": Softmax(), "layout": "first"},
    {"dead_codes": DeadCodes(1.0), "affine": Affine(), "losses": (Commitment(), Diversity()), "on_nonfinite": "raise"},
]


@pytest.mark.parametrize("options", ENGINE_OPTIONS)
def test_compiled_is_eager(options):
    torch._dynamo.reset()  # its limit of versions counts all quantizers
    eager, traced = spread_out(**options), spread_out(**options)
    traced.load_state_dict(eager.state_dict())
    compiled = torch.compile(traced, backend="aot_eager", fullgraph=True)
    rows, mask = vectors(), torch.rand(BATCH, TIME) < 0.7
    for step in range(4):
        if step == 3:
            eager.eval(), traced.eval()
        results = []
        for run in (eager, compiled):
            torch.manual_seed(step)
            x = (rows.movedim(-1, 1) if options.get("layout") == "first" else rows).clone().requires_grad_()
            out = run(x, mask)
            (out.quantized.sin().sum() + out.loss).backward()
            results.append([out.quantized, out.indices, out.loss, x.grad])
        for found, expected in zip(*reversed(results), strict=True):
            torch.testing.assert_close(found, expected)
    torch.testing.assert_close(traced.state_dict(), eager.state_dict())


@pytest.mark.parametrize("options", [{}, {"assignment": Gumbel(estimator="reinmax"), "update": Gradient()}])
def test_compiled_candidates_are_eager_ones(options):
    torch._dynamo.reset()
    quantizer = spread_out(**options)
    compiled = torch.compile(quantizer, backend="aot_eager", fullgraph=True)
    rows, mask = vectors(), torch.rand(BATCH, TIME) < 0.7
    results = []
    for run in (quantizer, compiled):
        torch.manual_seed(1)
        x = rows.clone().requires_grad_()
        out = run(x, mask, top_k=3, reduction="none")
        (out.quantized.sin().sum() + out.loss.sum()).backward()
        results.append([*out, x.grad])
    for found, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(found, expected)


class _Verb(nn.Module):
    def __init__(self, quantizer, verb):
        super().__init__()
        self.quantizer, self.verb = quantizer, verb

    def forward(self, given):
        return getattr(self.quantizer, self.verb)(given)


@pytest.mark.parametrize("options", ENGINE_OPTIONS)
def test_encode_and_decode_can_be_exported(options):
    quantizer = spread_out(**options).eval()
    x = vectors().movedim(-1, 1) if options.get("layout") == "first" else vectors()
    indices = quantizer.encode(x)
    for verb, given in (("encode", x), ("decode", indices)):
        program = torch.export.export(_Verb(quantizer, verb), (given,)).module()
        torch.testing.assert_close(program(given), getattr(quantizer, verb)(given))


# What does not fit


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"dim": 0}, ValueError, r"^dim = 0: must be at least 1"),
        ({"codebook_size": 0}, ValueError, r"^codebook_size = 0: must be at least 1"),
        ({"heads": 0}, ValueError, r"^heads = 0: must be at least 1"),
        ({"heads": 4}, ValueError, r"^heads = 4: must divide dim = 6"),
        ({"metric": "manhattan"}, ValueError, r"^metric = 'manhattan': must be one of 'euclidean', 'cosine'"),
        ({"assignment": "gumbel"}, ValueError, r"^assignment = 'gumbel': must be one of 'nearest'"),
        ({"estimator": "ste"}, ValueError, r"^estimator = 'ste': must be one of 'rotation'"),
        ({"layout": "NCHW"}, ValueError, r"^layout = 'NCHW'"),
        ({"masked": "drop"}, ValueError, r"^masked = 'drop': must be one of 'zero', 'input'"),
        ({"on_nonfinite": "ignore"}, ValueError, r"^on_nonfinite = 'ignore': must be one of 'drop', 'raise'"),
        ({"commit": "never"}, ValueError, r"^commit = 'never'"),
        ({"projection_norm": True}, ValueError, r"^projection_norm = True: must be False"),
        ({"dim": 6.0}, TypeError, r"^dim = 6.0: must be an integer"),
        ({"codebook_size": True}, TypeError, r"^codebook_size = True: must be an integer"),
        ({"heads": "2"}, TypeError, r"^heads = '2': must be an integer"),
        ({"codebook_dim": 0}, ValueError, r"^codebook_dim = 0: must be at least 1"),
        ({"update": "ema"}, TypeError, r"^update = 'ema': must be EMA\(...\) or"),
        ({"update": EMA}, TypeError, r"^update = <class"),
        ({"dead_codes": 1.0}, TypeError, r"^dead_codes = 1.0: must be DeadCodes\(...\)"),
        ({"affine": True}, TypeError, r"^affine = True: must be Affine\(...\)"),
        ({"losses": Commitment()}, TypeError, r"^losses = Commitment\(.*\): must be a sequence"),
        ({"losses": None}, TypeError, r"^losses = None: must be a sequence"),
        ({"assignment": Gumbel}, ValueError, r"^assignment = <class .*: must be one of 'nearest', Gumbel\(...\), Softmax\(...\)"),
        ({"estimator": None}, ValueError, r"^estimator = None: must be one of 'rotation', 'straight_through', 'none', DiVeQ\(...\)"),
        ({"sync_update": "a", "update": Gradient()}, TypeError, r"^sync_update = 'a': must be a number"),
        ({"sync_update": 2.0, "update": Gradient()}, ValueError, r"^sync_update = 2.0: must be from 0 to 1"),
        ({"sync_update": 0.5}, ValueError, r"^sync_update = 0.5: must be 0 unless the codes learn by gradient"),
        ({"losses": (Orthogonality(),)}, ValueError, r"^losses holds Orthogonality, which moves nothing"),
        ({"losses": (Commitment(), Commitment(2.0))}, ValueError, r"^losses holds several of Commitment"),
        ({"losses": ("commitment",)}, TypeError, r"^losses holds 'commitment': must be of Commitment"),
    ],
)
def test_choices_that_do_not_fit_are_named(options, error, message):
    with pytest.raises(error, match=message):
        VectorQuantize(**{"dim": DIM, "codebook_size": CODES, **options})


def _indices(value=0, *shape):
    return torch.full(shape or (BATCH, TIME), value)


@pytest.mark.parametrize(
    "options, arguments, error, message",
    [
        ({}, {"x": vectors(dim=5)}, ValueError, r"^x has shape \(3, 7, 5\): must be \[batch, ..., 6\]"),
        ({}, {"x": torch.zeros(BATCH, DIM, dtype=torch.int64)}, TypeError, r"^x is torch.int64"),
        ({}, {"mask": torch.ones(TIME, dtype=torch.bool)}, ValueError, r"^mask has shape \(7,\): must be \(3, 7\)"),
        ({}, {"lengths": torch.tensor([8, 0, 0])}, ValueError, r"^lengths holds 8: must lie in 0 ... 7"),
        ({}, {"indices": _indices(8)}, ValueError, r"^indices holds 8: must lie in -1 ... 7"),
        ({"heads": 2}, {"indices": _indices(0)}, ValueError, r"^indices has shape \(3, 7\): must be \(3, 7, 2\)"),
        ({}, {"indices": _indices(0).float()}, TypeError, r"^indices is torch.float32: must be an integer type"),
        ({}, {"targets": _indices(-2)}, ValueError, r"^targets holds -2: must lie in -1 ... 7"),
        ({}, {"weights": torch.ones(BATCH)}, ValueError, r"^weights has shape \(3,\): must be \(3, 7\)"),
        ({}, {"weights": -torch.ones(BATCH, TIME)}, ValueError, r"^weights holds -1.0: must lie in 0.0"),
        ({}, {"weights": torch.full((BATCH, TIME), torch.nan)}, ValueError, r"^weights holds nan"),
        ({}, {"weights": _indices(1)}, TypeError, r"^weights is torch.int64: must be a floating point tensor"),
        ({}, {"x": [[0.0] * DIM]}, TypeError, r"^x is of type list: must be a torch.Tensor"),
        ({}, {"mask": [[True]]}, TypeError, r"^mask is of type list"),
        ({}, {"lengths": [1, 2, 3]}, TypeError, r"^lengths is of type list"),
        ({}, {"indices": [0]}, TypeError, r"^indices is of type list"),
        ({}, {"weights": 1.0}, TypeError, r"^weights is float: must be a floating point tensor"),
        ({}, {"weights": torch.ones(BATCH), "freeze_codebook": True}, ValueError, r"^weights has shape \(3,\): must be \(3, 7\)"),
        ({"assignment": Gumbel()}, {"temperature": "hot"}, TypeError, r"^temperature = 'hot': must be a number"),
        ({"assignment": Gumbel()}, {"temperature": torch.nan}, ValueError, r"^temperature = nan: must be 0"),
        ({}, {"top_k": 2.0}, TypeError, r"^top_k = 2.0: must be an integer"),
        ({}, {"top_k": True}, TypeError, r"^top_k = True: must be an integer"),
        ({}, {"weights": lambda x, indices: 1.0}, TypeError, r"^weights is float: must be a floating point tensor"),
        ({}, {"temperature": 1.0}, ValueError, r"^temperature = 1.0: must be None with assignment = \"nearest\""),
        ({"assignment": Gumbel()}, {"temperature": -1.0}, ValueError, r"^temperature = -1.0: must be 0"),
        ({"assignment": Gumbel()}, {"temperature": 1.0, "indices": _indices(0)}, ValueError, r"^temperature = 1.0: must be None where"),
        ({}, {"top_k": 0}, ValueError, r"^top_k = 0: must be from 1 to 8"),
        ({}, {"reduction": "sum"}, ValueError, r"^reduction = 'sum': must be one of 'mean', 'none'"),
        ({}, {"top_k": 9}, ValueError, r"^top_k = 9: must be from 1 to 8"),
        ({"heads": 2}, {"top_k": 2}, ValueError, r"^top_k = 2: must be None with heads = 2"),
        ({}, {"top_k": 2, "indices": _indices(0)}, ValueError, r"^indices is given together with top_k = 2"),
        ({}, {"temprature": 2}, TypeError, "temprature"),
    ],
)
def test_arguments_that_do_not_fit_are_named_and_change_nothing(options, arguments, error, message):
    quantizer = VectorQuantize(DIM, CODES, dead_codes=DeadCodes(1.0), **options)
    quantizer(vectors())
    before = snapshot(quantizer)
    with pytest.raises(error, match=message):
        quantizer(**{"x": vectors(), **arguments})
    assert_unchanged(quantizer, before)


@pytest.mark.parametrize(
    "heads, indices, message",
    [
        (1, _indices(8), r"^indices holds 8: must lie in -1 ... 7"),
        (1, torch.tensor(1), r"^indices has shape \(\): must be \[batch, ...\]"),
        (2, _indices(0), r"^indices has shape \(3, 7\): must be \[batch, ..., 2\]"),
    ],
)
def test_indices_that_do_not_decode_are_named(heads, indices, message):
    quantizer = VectorQuantize(DIM, CODES, heads=heads)
    for decode in (quantizer.decode, quantizer.decode_codes):
        with pytest.raises(ValueError, match=message):
            decode(indices)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_indices_of_any_integer_type(dtype):
    quantizer = spread_out()
    x, indices = vectors(), torch.randint(CODES, (BATCH, TIME))
    assert torch.equal(quantizer.decode(indices.to(dtype)), quantizer.decode(indices))
    assert torch.equal(quantizer.quantize(x, indices=indices.to(dtype)).indices, indices)


def test_other_verbs_name_what_does_not_fit_and_change_nothing():
    quantizer = VectorQuantize(DIM, CODES, dead_codes=DeadCodes(1.0))
    quantizer(vectors())
    before, x, codes = snapshot(quantizer), vectors(), quantizer.codebook
    wide = torch.zeros(CODES, DIM, dtype=torch.int64)
    cases = [
        (TypeError, r"^x is of type ndarray", lambda: quantizer.encode(x.numpy())),
        (TypeError, r"^indices is of type list", lambda: quantizer.decode([0])),
        (TypeError, r"^num = '2': must be an integer", lambda: quantizer.nearest(x[0], "2")),
        (TypeError, r"^x is torch.int64", lambda: quantizer.initialize_(x.long())),
        (ValueError, r"^x has shape", lambda: quantizer.initialize_(x[..., 1:])),
        (ValueError, r"^threshold = -1.0: must be positive", lambda: quantizer.replace_dead_codes_(x, threshold=-1.0)),
        (ValueError, r"^threshold = nan: must be positive", lambda: quantizer.replace_dead_codes_(x, threshold=torch.nan)),
        (TypeError, r"^threshold = 'a': must be a number", lambda: quantizer.replace_dead_codes_(x, threshold="a")),
        (TypeError, r"^codebook is of type list", lambda: setattr(quantizer, "codebook", [0.0])),
        (TypeError, r"^codebook is torch.int64: must be floating point", lambda: setattr(quantizer, "codebook", wide)),
        (
            ValueError,
            r"^codebook holds a value that is not finite",
            lambda: setattr(quantizer, "codebook", codes.where(codes > 0, torch.nan)),
        ),
    ]
    for error, message, attempt in cases:
        with pytest.raises(error, match=message):
            attempt()
        assert_unchanged(quantizer, before)


def test_a_start_is_not_made_by_a_call_that_raises():
    quantizer = VectorQuantize(DIM, CODES, init=KMeans())
    before = snapshot(quantizer)
    with pytest.raises(ValueError, match=r"^weights has shape"):
        quantizer(vectors(4, 20), weights=torch.ones(3))
    assert_unchanged(quantizer, before)
    assert not quantizer.table.initialized


def test_the_table_is_one_codebook():
    quantizer = VectorQuantize(DIM, CODES, heads=2)
    assert quantizer.codebooks() == [quantizer.table] and isinstance(quantizer.table, Codebook)
    assert quantizer.codebook_sizes == (CODES, CODES)


def test_bad_indices_are_refused_in_a_transform():
    quantizer, indices = VectorQuantize(4, 8).eval(), torch.randint(8, (3, 5))
    decode = torch.func.vmap(quantizer.decode)
    assert torch.equal(decode(indices), torch.stack([quantizer.decode(own) for own in indices]))
    indices[2, 1] = 8
    with pytest.raises(ValueError, match=r"^indices holds a value outside -1 \.\.\. 7"):
        decode(indices)


def test_a_vector_without_a_norm_reaches_no_gradient():
    quantizer = VectorQuantize(DIM, CODES, codebook_dim=4, projection_norm=True)
    layer = quantizer.project_in
    with torch.no_grad():
        layer.weight.copy_(torch.eye(4, DIM) * torch.tensor([[0.9], [-0.9], [0.9], [-0.9]]))
    x = torch.randn(2, 5, DIM)
    x[0, 1] = 3e38
    found, expected = x.clone().requires_grad_(), x[1:].clone().requires_grad_()
    quantized, indices, _ = quantizer(found, freeze_codebook=True)
    assert indices[0, 1] == -1 and (indices >= 0).sum() == 9
    quantized.sin().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in quantizer.parameters() if parameter.grad is not None)
    quantizer(expected, freeze_codebook=True)[0].sin().sum().backward()
    torch.testing.assert_close(found.grad[1:], expected.grad)
    assert not found.grad[0, 1].any()
