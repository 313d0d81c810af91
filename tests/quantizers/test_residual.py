"""Residual quantization over any quantizer: what each layer adds, which layers take part, and what of it trains them."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F

from thread_ranks import in_ranks
from vqkit.dist import LocalReducer
from vqkit.ops.codebook import merge_statistics
from vqkit.quantizers import (
    EMA,
    FSQ,
    LFQ,
    MLP,
    BeamSearch,
    Commitment,
    DeadCodes,
    DiVeQ,
    Frozen,
    Gradient,
    Gumbel,
    KMeans,
    Quantized,
    QuantizeDropout,
    Quantizer,
    Residual,
    ResidualVQ,
    Softmax,
    VectorQuantize,
    update_codebooks_,
)
from vqkit.quantizers.residual import dropout_depth

DIM, CODES, LAYERS = 6, 8, 3

FAMILY = {
    "plain": {},
    "sizes": {"codebook_size": (8, 5, 3), "num_quantizers": None},
    "projected": {"codebook_dim": 4},
    "shared": {"shared_codebook": True},
    "heads": {"heads": 2},
    "cosine": {"metric": "cosine"},
    "dropout": {"quantize_dropout": QuantizeDropout()},
    "beam": {"beam": BeamSearch(3)},
    "beam and dropout": {"beam": BeamSearch(2, eval_size=4), "quantize_dropout": QuantizeDropout(seed=5)},
    "directional": {"estimator": DiVeQ(), "update": Gradient()},
    "layers": {"estimate": "layers", "gradient_fraction": 0.5},
    "implicit": {"implicit": MLP(8, 2)},
    "implicit beam": {"implicit": MLP(8, 2), "beam": BeamSearch(3)},
    "implicit shared": {"implicit": MLP(8, 2), "shared_codebook": True, "dead_codes": DeadCodes(1.0)},
    "implicit drawn": {"implicit": MLP(8, 2), "assignment": Gumbel(0.5, "reinmax")},
    "dead codes": {"dead_codes": DeadCodes(1.0), "shared_codebook": True},
    "first": {"layout": "first", "codebook_dim": 4},
}

family = pytest.mark.parametrize("name", FAMILY)


def build(**options):
    return ResidualVQ(**{"dim": DIM, "codebook_size": CODES, "num_quantizers": LAYERS, **options})


def vectors(batch=3, time=10, layout="last", seed=1):
    x = torch.randn(batch, time, DIM, generator=torch.Generator().manual_seed(seed))
    return x.movedim(-1, 1) if layout == "first" else x


def member(name):
    """A module after a few steps, and an input for it."""
    module = build(**FAMILY[name])
    layout = FAMILY[name].get("layout", "last")
    optimizer = torch.optim.SGD(parameters, lr=0.1) if (parameters := list(module.parameters())) else None
    for seed in range(3):
        out = module(vectors(layout=layout, seed=10 + seed))
        if optimizer:
            module.zero_grad()
            (out.quantized.square().mean() + out.loss).backward()
            optimizer.step()
    return module, vectors(layout=layout)


class Axes(Quantizer):
    """The nearest of the 2 D vectors +-length on the axes: nothing to learn, one index."""

    def __init__(self, dim, length):
        super().__init__()
        self.dim, self.length = dim, length

    code_shape = ()
    loss_weights = {"distance": 2.0}  # noqa: RUF012

    @property
    def codebook_sizes(self):
        return (2 * self.dim,)

    def codebooks(self):
        return []

    def quantize(self, x, mask=None, *, freeze_codebook=False):
        kept = x.isfinite().all(-1) if mask is None else x.isfinite().all(-1) & mask
        clean = x.where(kept.unsqueeze(-1), 0.0)
        axis = clean.abs().argmax(-1)
        negative = clean.gather(-1, axis.unsqueeze(-1)).squeeze(-1) < 0
        indices = torch.where(kept, 2 * axis + negative, -1)
        codes = self.decode(indices).to(x.dtype)
        distance = ((clean - codes).square().sum(-1) * kept).sum() / kept.sum().clamp(min=1)
        return Quantized(codes + (clean - clean.detach()), indices, {"distance": distance}, None)

    def decode(self, indices):
        sign = 1.0 - 2.0 * (indices % 2)
        codes = F.one_hot(indices.clamp(min=0) // 2, self.dim) * (self.length * sign).unsqueeze(-1)
        return codes.where((indices >= 0).unsqueeze(-1), 0.0)

    decode_codes = decode


def axes(**options):
    return Residual([Axes(DIM, 0.5**i) for i in range(LAYERS)], **options)


# Values


@family
def test_decode_of_encode_is_the_output(name):
    module, x = member(name)
    module.eval()
    out = module(x)
    assert torch.equal(module.encode(x), out.indices)
    torch.testing.assert_close(module.decode(out.indices), out.quantized, rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.stack(list(module.quantize(x).outputs)), module.decode_layers(out.indices), rtol=0, atol=1e-6)
    assert out.quantized.shape == x.shape
    assert out.indices.shape == (3, 10, *module.code_shape)
    assert module.code_shape[0] == LAYERS


@family
def test_a_coarse_prefix_is_a_partial_sum(name):
    module, x = member(name)
    indices = module.eval().encode(x)
    layers = module.decode_layers(indices)
    assert len(layers) == LAYERS
    for depth in range(1, LAYERS + 1):
        prefix = indices[:, :, :depth]
        codes = module.decode_codes(prefix)
        torch.testing.assert_close(codes, layers[:depth].sum(0))
        dropped = indices.clone()
        dropped[:, :, depth:] = -1
        assert torch.equal(module.decode(dropped), module.decode(prefix))
        torch.testing.assert_close(module.decode_layers(dropped)[depth:].abs().sum(), torch.tensor(0.0))
    assert not module.decode(torch.full_like(indices, -1)).any()


@pytest.mark.parametrize("beam_size", [1, 3])
def test_what_takes_no_part_is_as_if_it_was_not_there(beam_size):
    """The first layers alone are a quantizer of their own; the others learn nothing, lose nothing, and stay as they are."""
    module, short = build(), build(num_quantizers=2)
    for own, of_whole in zip(short.layers, module.layers, strict=False):
        own.load_state_dict(of_whole.state_dict())
    before = module.layers[2].table.sum.clone(), module.layers[2].table.count.clone()
    for seed in range(2):
        out, expected = (m(vectors(seed=seed), beam_size=beam_size, **own) for m, own in ((module, {"depth": 2}), (short, {})))
        torch.testing.assert_close(out.quantized, expected.quantized)
        torch.testing.assert_close(out.loss, expected.loss)
        assert torch.equal(out.indices[..., :2], expected.indices)
    torch.testing.assert_close(module.layers[1].codebook, short.layers[1].codebook)
    module.eval()
    assert torch.equal(module.layers[2].table.sum, before[0]) and torch.equal(module.layers[2].table.count, before[1])
    encoded = module.encode(vectors(), depth=2, beam_size=beam_size)
    assert torch.equal(encoded[..., :2], short.eval().encode(vectors(), beam_size=beam_size))


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0, None])
def test_the_gradient_of_the_condition_is_a_choice(fraction):
    """Of later losses, through what the networks are told of earlier codes; without a gradient through the residual."""
    module = build(num_quantizers=2, implicit=MLP(8, 1), condition_fraction=fraction, estimator="none")
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    loss = module.quantize(vectors()).losses["commitment/1"]
    (found,) = torch.autograd.grad(loss, module.layers[0].table.weight, allow_unused=True)
    if not fraction:
        assert found is None
        return
    whole = copy.deepcopy(module)
    whole.condition_fraction = 1.0
    (expected,) = torch.autograd.grad(whole.quantize(vectors()).losses["commitment/1"], whole.layers[0].table.weight)
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, fraction * expected)


@pytest.mark.parametrize("name", ["plain", "shared", "implicit", "projected", "layers"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_depth_names_the_layers_that_take_part(name, depth):
    module, x = member(name)
    found = module.quantize(x, depth=depth)
    whole = module.quantize(x)
    assert torch.equal(found.indices[..., :depth], whole.indices[..., :depth])
    assert (found.indices[..., depth:] == -1).all()
    torch.testing.assert_close(found.quantized, module.decode(found.indices[..., :depth]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"assignment": Gumbel()},
        {"assignment": Gumbel(), "beam": BeamSearch(2)},
        {"estimator": DiVeQ(), "estimate": "layers", "implicit": MLP(4)},
    ],
)
def test_encode_draws_nothing_and_is_that_of_eval(options):
    module = build(**options)
    before = torch.get_rng_state()
    indices = module.encode(vectors())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(indices, module.eval()(vectors()).indices)


def test_each_layer_quantizes_what_is_left():
    module = build().eval()
    x = vectors()
    residual, total = x, torch.zeros_like(x)
    out = module(x)
    for number, layer in enumerate(module.layers):
        found = layer(residual)
        assert torch.equal(found.indices, out.indices[..., number])
        total, residual = total + layer.decode(found.indices), residual - layer.decode(found.indices)
    assert torch.equal(total, out.quantized)


@family
def test_permuted_vectors_give_permuted_outputs(name):
    module, x = member(name)
    module.eval()
    axis = 2 if module.layout == "first" else 1
    order = torch.randperm(10)
    out, permuted = module(x), module(x.index_select(axis, order))
    assert torch.equal(permuted.indices, out.indices[:, order])
    torch.testing.assert_close(permuted.quantized, out.quantized.index_select(axis, order), rtol=0, atol=1e-6)
    torch.testing.assert_close(permuted.loss, out.loss)


@pytest.mark.parametrize(
    "layout, shape",
    [("first", (2, 5, 3, 4)), ("first", (2, 5, 2, 2, 2)), ("last", (2, 3, 4, 5)), ("first", (4, 5)), ("last", (4, 5))],
)
def test_images_volumes_and_tokens_of_another_width(layout, shape):
    module = build(dim=5, codebook_dim=3, layout=layout).eval()
    x = torch.randn(shape)
    out = module(x)
    assert out.quantized.shape == x.shape
    torch.testing.assert_close(module.decode(out.indices), out.quantized)
    rows = x.movedim(1, -1) if layout == "first" else x
    assert out.indices.shape == (*rows.shape[:-1], LAYERS)
    module.layout = "last"
    flat = module(rows.reshape(-1, 5))
    assert torch.equal(flat.indices, out.indices.reshape(-1, LAYERS))


def test_projections_stand_around_the_whole_once():
    module = build(codebook_dim=4)
    names = {name for name, _ in module.named_parameters()}
    assert names == {"project_in.weight", "project_in.bias", "project_out.weight", "project_out.bias"}


# Masks, and vectors that are not finite


@family
def test_masked_and_broken_vectors_influence_nothing(name):
    module, x = member(name)
    first = module.layout == "first"
    mask = torch.rand(3, 10) < 0.6
    mask[0, 0] = True
    spread = mask.unsqueeze(1 if first else -1).expand_as(x)
    results = []
    for filler in (0.0, torch.nan, 7.0):
        twin = copy.deepcopy(module)
        given = x.masked_fill(~spread, filler).requires_grad_()
        torch.manual_seed(3)
        out = twin(given, mask)
        (out.quantized.sin().sum() + out.loss).backward()
        assert (out.indices[~mask] == -1).all()
        assert not out.quantized[~spread].any()
        assert not given.grad[~spread].any()
        results.append((out.quantized, out.indices, out.loss, given.grad, [book.codes() for book in twin.codebooks()]))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@family
def test_vectors_that_are_not_finite_enter_nothing(name):
    module, x = member(name)
    rows = x.movedim(1, -1) if module.layout == "first" else x
    broken = rows.clone()
    broken[1, 2, 3], broken[2, 0] = torch.nan, torch.inf
    lost = torch.zeros(3, 10, dtype=torch.bool)
    lost[1, 2] = lost[2, 0] = True
    results = []
    for given, mask in ((broken, None), (rows, ~lost)):
        twin = copy.deepcopy(module)
        given = given.movedim(-1, 1) if module.layout == "first" else given
        given = given.clone().requires_grad_()
        torch.manual_seed(3)
        out = twin(given, mask)
        (out.quantized.sin().sum() + out.loss).backward()
        results.append((out.quantized, out.indices, out.loss, given.grad, [book.codes() for book in twin.codebooks()]))
        if mask is None and not module.clock:
            assert twin.eval().metrics()["non_finite"] == 2 * LAYERS / len(twin.codebooks())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


@family
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("empty", [True, False])
def test_nothing_to_quantize(name, training, empty):
    module, x = member(name)
    module.train(training)
    x = (x[:0] if empty else x).clone().requires_grad_()
    before = [book.codes().clone() for book in module.codebooks()]
    out = module(x, None if empty else torch.zeros(3, 10, dtype=torch.bool))
    (out.quantized.sum() + out.loss).backward()
    assert out.loss == 0
    assert not out.quantized.any()
    assert not x.grad.any()
    assert (out.indices == -1).all()
    assert all(book.codes().isfinite().all() for book in module.codebooks())
    if not training:
        torch.testing.assert_close([book.codes() for book in module.codebooks()], before, rtol=0, atol=0)


def test_masked_positions_may_pass_through():
    module = build(codebook_dim=4, masked="input", layout="first")
    x = vectors(layout="first")
    out = module(x, lengths=torch.tensor([10, 4, 0]))
    assert torch.equal(out.quantized[1, :, 4:], x[1, :, 4:])
    assert torch.equal(out.quantized[2], x[2])
    assert not torch.equal(out.quantized[0], x[0])


# Gradients


def gradient(module, x, cotangent):
    x = x.clone().requires_grad_()
    (module.quantize(x).quantized * cotangent).sum().backward()
    return x.grad


def test_straight_through_is_the_identity_whatever_the_layers():
    cotangent = torch.randn(3, 10, DIM)
    for module in (build(estimator="straight_through"), axes()):
        assert torch.equal(gradient(module, vectors(), cotangent), cotangent)


def test_layers_add_their_gradients_up():
    cotangent = torch.randn(3, 10, DIM)
    module = build(estimator="straight_through", estimate="layers")
    torch.testing.assert_close(gradient(module, vectors(), cotangent), LAYERS * cotangent)
    chained = build(estimator="straight_through", estimate="layers", gradient_fraction=1.0)
    torch.testing.assert_close(gradient(chained, vectors(), cotangent), cotangent)


def test_a_fraction_of_the_gradient_reaches_earlier_codes():
    x = vectors()
    norms = []
    for fraction in (0.0, 0.25, 0.5):
        torch.manual_seed(0)
        module = build(update=Gradient(), gradient_fraction=fraction)
        module.quantize(x).losses["commitment/2"].backward()
        grads = [layer.table.weight.grad for layer in module.layers]
        norms.append(0.0 if grads[0] is None else grads[0].norm())
        assert grads[2].any()
    assert norms[0] == 0
    torch.testing.assert_close(norms[2], 2 * norms[1])


def test_directional_over_the_sum_trains_every_layer():
    module = build(estimator=DiVeQ(sigma2=1e-4), update=Gradient(), losses=())
    x = vectors().requires_grad_()
    out = module(x)
    codes = module.decode(out.indices)
    error = (x - codes).norm(dim=-1)
    torch.testing.assert_close((x - out.quantized).norm(dim=-1), error)
    assert not torch.equal(out.quantized, codes)
    out.quantized.square().sum().backward()
    assert all(layer.table.weight.grad.any() for layer in module.layers)
    module.eval()
    out = module(x)
    assert torch.equal(out.quantized, module.decode(out.indices))


def test_no_gradient_but_that_of_the_codes():
    module = build(estimator="none", update=Gradient(), losses=())
    x = vectors().requires_grad_()
    module(x).quantized.sum().backward()
    assert x.grad is None or not x.grad.any()
    assert all(layer.table.weight.grad.any() for layer in module.layers)


# Statistics


def pending(module):
    return [book.pending for book in module.codebooks()]


@pytest.mark.parametrize("name", ["plain", "beam", "shared", "implicit", "dropout"])
def test_statistics_are_those_of_the_layers_on_the_chosen_path(name):
    module = build(commit="manual", **FAMILY[name])
    x = vectors()
    found = module.quantize(x)
    module(x)
    torch.testing.assert_close([s.count for s in pending(module)], [s.count for s in found.statistics])
    counts = [F.one_hot(found.indices[..., i][found.indices[..., i] >= 0], CODES).sum(0) for i in range(LAYERS)]
    if name == "shared":
        counts = [sum(counts)]
    torch.testing.assert_close([s.count.squeeze(0) for s in pending(module)], counts, check_dtype=False)


def test_a_beam_trains_every_layer_on_its_path():
    module = build(beam=BeamSearch(4), commit="manual")
    x = vectors()
    residual, found = x, module.quantize(x)
    for i, layer in enumerate(module.layers):
        own = layer.table.statistics(residual.reshape(1, -1, DIM), found.indices[..., i].reshape(1, -1))
        torch.testing.assert_close(found.statistics[i].sum, own.sum)
        residual = residual - layer.decode(found.indices[..., i])


@pytest.mark.parametrize("options", [{}, {"shared_codebook": True}, {"beam": BeamSearch(3)}, {"implicit": MLP(8)}])
def test_codebooks_made_frozen_never_change(options):
    module = build(update=Frozen(), **options)
    before = [book.codes().clone() for book in module.codebooks()]
    for seed in range(3):
        out = module(vectors(seed=seed).requires_grad_())
        (out.quantized.square().sum() + out.loss).backward()
    assert all(torch.equal(book.codes(), codes) for book, codes in zip(module.codebooks(), before, strict=True))
    assert not any("table" in name for name, _ in module.named_parameters())
    assert module.metrics()["perplexity"] > 1


@pytest.mark.parametrize("options", [{}, {"beam": BeamSearch(3)}])
def test_a_shared_codebook_that_is_frozen_keeps_its_dead_codes(options):
    module = build(shared_codebook=True, update=EMA(0.1), dead_codes=DeadCodes(5.0), **options)
    module(vectors())
    (book,) = module.codebooks()
    book.frozen = True
    before = book.codes().clone()
    for seed in range(3):
        module(vectors(seed=seed))
        assert torch.equal(book.codes(), before)
    book.frozen = False
    module(vectors())
    assert not torch.equal(book.codes(), before)


def test_a_shared_layer_is_stored_once_and_learns_from_all_uses():
    module = build(shared_codebook=True, commit="manual", dead_codes=DeadCodes(0.5))
    assert len(module.codebooks()) == 1
    assert len([key for key in module.state_dict() if key.endswith("sum") and "pending" not in key and "last" not in key]) == 1
    x = vectors()
    found = module.quantize(x)
    residual, merged = x, None
    for i in range(LAYERS):
        own = module.layers[0].quantize(residual, indices=found.indices[..., i]).statistics
        merged = own if merged is None else merge_statistics(merged, own)
        residual = residual - module.layers[0].decode(found.indices[..., i])
    torch.testing.assert_close(found.statistics[0].sum, merged.sum)
    torch.testing.assert_close(found.statistics[0].count, merged.count)
    before = module.codebook.clone()
    out = module(x)
    assert torch.equal(module.codebook, before)
    update_codebooks_(module)
    assert not torch.equal(module.codebook, before)
    assert torch.equal(out.indices, found.indices)


@pytest.mark.parametrize("name", ["shared", "plain", "beam", "implicit"])
def test_eval_gives_what_training_gave(name):
    module = build(commit="manual", **FAMILY[name])
    x = vectors()
    trained = module(x)
    held = module.eval()(x)
    assert torch.equal(held.indices, trained.indices)
    torch.testing.assert_close(held.quantized, trained.quantized, rtol=0, atol=1e-6)
    torch.testing.assert_close(held.loss, trained.loss)


def test_losses_are_told_by_layer():
    module = build(losses=(Commitment(0.5),))
    found = module.quantize(vectors())
    assert set(found.losses) == {f"commitment/{i}" for i in range(LAYERS)}
    torch.testing.assert_close(module(vectors()).loss, 0.5 * sum(found.losses.values()))
    module = axes()
    torch.testing.assert_close(module(vectors()).loss, 2 * sum(module.quantize(vectors()).losses.values()))


# Dropout


def depths_of(indices):
    return (indices >= 0).sum(-1)


@pytest.mark.parametrize("name", ["dropout", "beam and dropout", "axes"])
def test_dropped_layers_have_no_index_no_statistics_and_no_loss(name):
    dropout = QuantizeDropout(seed=2)
    module = axes(quantize_dropout=dropout) if name == "axes" else build(**{**FAMILY[name], "quantize_dropout": dropout})
    x, seen = vectors(), set()
    for commits in range(12):
        depth = dropout_depth(dropout, commits, LAYERS)
        seen.add(depth)
        held = copy.deepcopy(module).eval()  # which commits what is pending, so that its codes are those of this step
        found = module.quantize(x)
        out = module(x)
        assert (depths_of(out.indices) == depth).all()
        assert (out.indices[..., depth:] == -1).all()
        torch.testing.assert_close(out.quantized, held.decode(out.indices), rtol=0, atol=1e-6)
        assert all(loss == 0 for key, loss in found.losses.items() if int(key[-1]) >= depth)
        assert all(loss > 0 for key, loss in found.losses.items() if int(key[-1]) < depth)
        for book, entry in zip(module.codebooks(), pending(module), strict=True):
            number = module.codebooks().index(book)
            assert entry.count.sum() == (30 if number < depth else 0)
    assert seen == {1, 2, 3}


@pytest.mark.parametrize("of", [build, axes])
def test_the_depth_follows_the_number_of_commits(of):
    dropout = QuantizeDropout(seed=7)
    module = of(quantize_dropout=dropout, commit="manual")
    x = vectors()
    for commits in range(8):
        expected = dropout_depth(dropout, commits, LAYERS)
        for _ in range(2):  # micro-batches of one step
            assert (depths_of(module(x).indices) == expected).all()
        restored = of(quantize_dropout=dropout, commit="manual")
        restored.load_state_dict(module.state_dict())
        assert (depths_of(restored(x).indices) == expected).all()
        update_codebooks_(module)


def test_depths_are_uniform_above_the_cutoff_and_multiples():
    counts = torch.bincount(dropout_depth(QuantizeDropout(seed=3), torch.arange(8000), 8))
    assert counts[0] == 0
    assert ((counts[1:] - 1000).abs() < 150).all()
    depths = dropout_depth(QuantizeDropout(cutoff_index=2, multiple_of=2), torch.arange(500), 8)
    assert set(depths.tolist()) == {4, 6, 8}
    assert set(dropout_depth(QuantizeDropout(multiple_of=4), torch.arange(100), 6).tolist()) == {4, 6}
    assert [dropout_depth(QuantizeDropout(), i, 8) for i in range(50)] == dropout_depth(QuantizeDropout(), torch.arange(50), 8).tolist()
    different = [dropout_depth(QuantizeDropout(seed=seed), torch.arange(100), 8) for seed in range(3)]
    assert all((a != b).float().mean() > 0.7 for a, b in itertools.combinations([*different, different[0].roll(1)], 2))


def test_dropout_is_for_training_calls_alone():
    module = build(quantize_dropout=QuantizeDropout())
    for _ in range(6):
        module(vectors())
        assert (module.encode(vectors()) >= 0).all()
        assert (module.quantize(vectors(), depth=LAYERS).indices >= 0).all()
    assert (module.eval()(vectors()).indices >= 0).all()


# Beam search


def error(module, x, indices):
    return (x - module.decode(indices)).square().sum(-1)


@pytest.mark.parametrize("name", ["plain", "shared", "implicit", "sizes"])
def test_beams_from_greedy_to_exhaustive(name):
    module = build(**{"codebook_size": 4, **FAMILY[name]}).eval()
    x = vectors()
    assert torch.equal(module.encode(x, beam_size=1), module.encode(x))
    errors = [error(module, x, module.encode(x, beam_size=size)) for size in (1, 2, 8, 64)]
    assert all(b.mean() <= a.mean() + 1e-6 for a, b in itertools.pairwise(errors))
    every = torch.tensor(list(itertools.product(*(range(size) for size in module.codebook_sizes))))
    torch.testing.assert_close(errors[-1], torch.stack([error(module, x, path.expand(3, 10, -1)) for path in every]).min(0).values)


def test_sizes_for_training_evaluation_and_a_call():
    torch.manual_seed(0)
    module = build(beam=BeamSearch(4, eval_size=1), codebook_size=16)
    x = vectors()
    four, one = module.encode(x, beam_size=4), module.encode(x, beam_size=1)
    assert not torch.equal(four, one)
    assert torch.equal(module.quantize(x).indices, four)
    assert torch.equal(module.quantize(x, beam_size=1).indices, one)
    assert torch.equal(module.eval()(x).indices, one)
    assert torch.equal(module(x, beam_size=4).indices, four)


def test_weights_reach_the_search():
    torch.manual_seed(0)
    x = vectors(8, 16)
    coarse = build(codebook_size=16, beam=BeamSearch(16, weights=(100.0, 1.0, 1.0))).eval()
    fine = build(codebook_size=16, beam=BeamSearch(16)).eval()
    fine.codebook = coarse.codebook
    assert torch.equal(coarse.encode(x)[..., 0], coarse.encode(x, beam_size=1)[..., 0])
    assert not torch.equal(fine.encode(x)[..., 0], coarse.encode(x)[..., 0])


@pytest.mark.parametrize("name", ["dropout", "beam and dropout", "shared", "dead codes", "projected"])
def test_no_value_is_looked_at(name):
    """On the meta device there is none to look at; elsewhere than on CPU looking would wait for the device."""
    module = build(**FAMILY[name]).to("meta")
    x = vectors().to("meta").requires_grad_()
    for _ in range(2):
        out = module(x, torch.ones(3, 10, dtype=torch.bool, device="meta"))
        (out.quantized.sum() + out.loss).backward()
    module.eval()
    assert module.decode(module.encode(x)).shape == x.shape


# Given indices


@pytest.mark.parametrize("name", ["plain", "shared", "implicit", "heads"])
def test_given_indices_are_the_path(name):
    module = build(commit="manual", **FAMILY[name])
    x = vectors()
    given = torch.randint(CODES, (3, 10, *module.code_shape))
    found = module.quantize(x, indices=given)
    assert torch.equal(found.indices, given)
    torch.testing.assert_close(found.quantized, module.decode(given), rtol=0, atol=1e-6)
    update = module(x, indices=given)
    assert torch.equal(update.indices, given)
    torch.testing.assert_close([s.sum for s in pending(module)], [s.sum for s in found.statistics])


def test_targets_give_the_cross_entropy_of_every_layer():
    module = build()
    x = vectors().requires_grad_()
    own = module.quantize(x)
    targets = torch.randint(CODES, (3, 10, LAYERS))
    found = module.quantize(x, targets=targets)
    assert torch.equal(found.indices, own.indices)
    residual = x.detach()
    for i, layer in enumerate(module.layers):
        logits = -torch.cdist(residual, layer.codebook)
        expected = F.cross_entropy(logits.flatten(0, 1), targets[..., i].flatten())
        torch.testing.assert_close(found.losses[f"cross_entropy/{i}"], expected)
        residual = residual - layer.decode(own.indices[..., i])
    module(x, targets=targets).loss.backward()
    assert x.grad.any()


# The start


@pytest.mark.parametrize("name", ["plain", "shared", "projected", "sizes", "implicit", "implicit shared"])
@pytest.mark.parametrize("by_name", [True, False])
def test_kmeans_starts_every_layer_where_its_residuals_are(name, by_name):
    module = build(**{"codebook_size": 16, **FAMILY[name], "init": KMeans()})
    x = vectors(4, 32)
    with pytest.raises(ValueError, match="waits for its k-means start"):
        module.eval()(x)
    module.train()
    if by_name:
        module.initialize_(x)
    else:
        module(x)
    module.eval()
    vectors_in = module.project_in(x)
    layers = module.decode_layers(module.encode(x))
    left = [vectors_in.square().mean()] + [(vectors_in - layers[: i + 1].sum(0)).square().mean() for i in range(LAYERS)]
    steps = list(itertools.pairwise(left))
    assert all(after < before for before, after in steps)


def residuals(module, x):
    """What each layer sees of x, greedily: [Q, P..., d]."""
    layers = module.decode_layers(module.encode(x))
    return [x - layers[:i].sum(0) for i in range(LAYERS)]


def test_a_start_is_the_kmeans_of_each_residual():
    x = vectors(4, 32)
    by_itself, by_name, by_hand = (build(codebook_size=16, init=KMeans(), commit="manual") for _ in range(3))
    by_itself(x)
    by_name.initialize_(torch.cat([x, x + 9.0]), torch.arange(8).unsqueeze(-1).expand(8, 32) < 4)
    assert all(layer.table.count.sum() == 4 * 32 for module in (by_itself, by_name) for layer in module.layers)
    by_name.initialize_(x)
    residual = x
    for number, layer in enumerate(by_hand.layers):
        layer.initialize_(residual, seed=number)
        residual = residual - layer.decode(layer.encode(residual))
    torch.testing.assert_close(by_name.codebook, by_hand.codebook, rtol=0, atol=0)
    for module in (by_itself, by_name):
        for layer, seen in zip(module.layers, residuals(module, x), strict=True):
            means = torch.stack([seen[layer.encode(seen) == code].mean(0) for code in layer.encode(seen).unique()])
            assert torch.cdist(layer.codebook, means).min(1).values.median() < 0.05


@pytest.mark.parametrize("implicit", [None, MLP(4)])
def test_a_shared_codebook_starts_at_what_all_its_uses_see(implicit):
    x = vectors(4, 64)
    mask = torch.rand(4, 64) < 0.8
    options = {"codebook_size": 16, "shared_codebook": True, "init": KMeans(), "implicit": implicit, "commit": "manual"}
    modules = {name: build(**options) for name in ("itself", "name", "first")}
    modules["itself"](x.masked_fill(~mask.unsqueeze(-1), 50.0), mask)
    modules["name"].initialize_(x, mask)
    modules["first"].layers[0].initialize_(x, mask)
    left = {}
    for name, module in modules.items():
        layers = module.eval().decode_layers(module.encode(x))
        left[name] = (x - layers.sum(0))[mask].square().mean()
    for name, uses in (("itself", LAYERS), ("name", LAYERS), ("first", 1)):
        assert modules[name].codebooks()[0].count.sum() == uses * mask.sum()
    assert left["itself"] < 0.9 * left["first"]
    torch.testing.assert_close(left["itself"], left["name"], rtol=0.1, atol=0)


def test_a_shared_start_waits_for_vectors_and_happens_once():
    module = build(shared_codebook=True, init=KMeans(), commit="manual")
    x = vectors(4, 32)
    out = module(x, torch.zeros(4, 32, dtype=torch.bool))
    assert not module.codebooks()[0].initialized
    assert (out.indices == -1).all()
    for frozen_or_eval in ({"freeze_codebook": True}, {}):
        module.train(bool(frozen_or_eval))
        with pytest.raises(ValueError, match="waits for its k-means start"):
            module(x, **frozen_or_eval)
    module.train()
    out = module(x)
    codes = module.codebook.clone()
    torch.testing.assert_close(out.quantized, module.decode(out.indices), rtol=0, atol=1e-6)
    module(vectors(4, 32, seed=9))
    assert torch.equal(module.codebook, codes)


@pytest.mark.parametrize("name", ["plain", "shared", "implicit"])
@pytest.mark.parametrize("by_name", [True, False])
def test_processes_start_from_the_vectors_of_all(name, by_name):
    x = vectors(4, 32)
    x[3] += 6.0  # one process has what no other has
    shares = [x[:3], x[3:]]

    def start(module, share, reducer):
        if by_name:
            module.initialize_(share, reducer=reducer)
        else:
            module.reducer = reducer
            module(share)
        return module.eval()

    torch.manual_seed(0)
    template = build(**{"codebook_size": 16, **FAMILY[name], "init": KMeans(), "commit": "manual"})
    modules = [copy.deepcopy(template) for _ in shares]
    ranks = in_ranks(len(shares), lambda reducer: start(modules[reducer.rank], shares[reducer.rank], reducer))
    codes = [[book.codes() for book in rank.codebooks()] for rank in ranks]
    torch.testing.assert_close(codes[0], codes[1], rtol=0, atol=0)
    one, all_of_them = (start(copy.deepcopy(template), part, LocalReducer()) for part in (shares[0], x))
    found, partly, wholly = (error(module, x, module.encode(x)).mean() for module in (ranks[0], one, all_of_them))
    assert (found - wholly).abs() < 0.1 * (partly - wholly)  # k-means ends where it started from, a little


def test_layers_that_dropout_cuts_off_start_when_they_take_part():
    module = build(init=KMeans(), quantize_dropout=QuantizeDropout(seed=2), commit="manual")
    for commits in range(12):
        module(vectors())
        started = [layer.table.initialized for layer in module.layers]
        deepest = max(dropout_depth(QuantizeDropout(seed=2), i, LAYERS) for i in range(commits + 1))
        assert started == [i < deepest for i in range(LAYERS)]
        update_codebooks_(module)
    assert all(started)


@pytest.mark.parametrize(
    "options",
    [
        {"indices": torch.tensor([0, 0, CODES]).expand(3, 10, 3)},
        {"targets": torch.tensor([0, 0, CODES]).expand(3, 10, 3)},
        {"temperature": 0.5},
        {"top_k": 2},
    ],
)
@pytest.mark.parametrize("shared", [True, False])
def test_a_call_that_raises_starts_nothing(options, shared):
    module = build(init=KMeans(), shared_codebook=shared)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises((ValueError, TypeError), match=next(iter(options))):
        module(vectors(), **options)
    torch.testing.assert_close(dict(module.state_dict()), before, rtol=0, atol=0)


# Options of a call


def test_weights_reach_every_layer():
    module = build(commit="manual")
    x, weights = vectors(), torch.rand(3, 10)
    found = module.quantize(x, weights=weights)
    for entry in found.statistics:
        torch.testing.assert_close(entry.count.sum(), weights.sum())
    doubled = module.quantize(x, weights=lambda rows, indices: torch.full(indices.shape, 2.0) + 0 * rows[..., 0])
    torch.testing.assert_close(doubled.statistics[2].count, 2 * module.quantize(x).statistics[2].count)
    with pytest.raises(TypeError, match="weights: is no option of part 1, a ImplicitVQ"):
        build(implicit=MLP(4))(x, weights=weights)


@pytest.mark.parametrize("implicit", [None, MLP(4)])
def test_temperature_reaches_every_layer(implicit):
    module = build(assignment=Gumbel(1.0), implicit=implicit)
    x = vectors()
    assert torch.equal(module.quantize(x, temperature=0.0).indices, module.encode(x))
    drawn = module.quantize(x, temperature=100.0).indices != module.encode(x)
    assert drawn.flatten(0, 1).any(0).all()


@pytest.mark.parametrize("shared", [True, False])
def test_targets_of_implicit_layers(shared):
    module = build(implicit=MLP(8), shared_codebook=shared)
    x = vectors()
    targets = torch.randint(CODES, (3, 10, LAYERS))
    found = module.quantize(x, targets=targets)
    residual = x
    for i, layer in enumerate(module.layers):
        logits = -torch.cdist(residual.detach(), layer.codebook)  # at the start the network is the identity in the code
        torch.testing.assert_close(found.losses[f"cross_entropy/{i}"], F.cross_entropy(logits.flatten(0, 1), targets[..., i].flatten()))
        residual = residual - module.decode_layers(found.indices)[i]
    module(x, targets=targets).loss.backward()
    assert all(layer.network.join.weight.grad.any() for layer in list(module.layers)[1:])


def test_implicit_layers_share_one_base_and_have_networks_of_their_own():
    module = build(implicit=MLP(8), shared_codebook=True, commit="manual")
    assert len(module.codebooks()) == 1
    assert len(module.layers) == LAYERS
    assert [key for key in module.state_dict() if key.endswith("table.weight")] == ["layers.0.table.weight"]
    assert module.codebook.shape == (CODES, DIM)
    found = module.quantize(vectors())
    counts = sum(F.one_hot(found.indices[..., i], CODES).flatten(0, 1).sum(0) for i in range(LAYERS))
    torch.testing.assert_close(found.statistics[0].count.squeeze(0), counts, check_dtype=False)
    sum(found.losses.values()).backward()
    alone = build(implicit=MLP(8))
    alone.codebook = module.codebook.detach().expand(LAYERS, -1, -1)
    sum(alone.quantize(vectors()).losses.values()).backward()
    grads = [layer.table.weight.grad for layer in alone.layers]
    torch.testing.assert_close(module.layers[0].table.weight.grad, sum(grads))
    twin = copy.deepcopy(module)
    twin.codebook = torch.zeros(CODES, DIM)
    assert not twin.layers[2].codebook.any()
    assert module.layers[2].codebook.any()


@pytest.mark.parametrize("estimator", ["straight_through", "rotation"])
def test_the_synchronous_rule_adds_to_the_codes_of_all_layers(estimator):
    module = build(update=Gradient(), estimator=estimator, sync_update=0.25)
    x, cotangent = vectors(), torch.randn(3, 10, DIM)
    found = module.quantize(x)
    (found.quantized * cotangent).sum().backward()
    for i, layer in enumerate(module.layers):
        expected = torch.zeros(CODES, DIM).index_add(0, found.indices[..., i].flatten(), 0.25 * cotangent.flatten(0, 1))
        torch.testing.assert_close(layer.table.weight.grad.squeeze(0), expected)
    plain = build(update=Gradient(), estimator=estimator)
    plain.codebook = module.codebook.detach()
    assert torch.equal(gradient(module, x, cotangent), gradient(plain, x, cotangent))


@pytest.mark.parametrize("options", [{}, {"estimate": "layers"}, {"update": Gradient()}, {"codebook_dim": 4}])
def test_the_gradient_to_the_input_can_be_switched_off(options):
    module = build(input_gradient=False, **options)
    x = vectors().requires_grad_()
    out = module(x)
    if out.quantized.requires_grad or out.loss.requires_grad:
        (out.quantized.sum() + out.loss).backward()
    assert x.grad is None or not x.grad.any()
    if "codebook_dim" in options:
        assert module.project_in.weight.grad.any()


@pytest.mark.parametrize("assignment", [Gumbel(0.5, "straight_through"), Softmax(0.5)])
def test_the_gradient_of_a_softmax_comes_from_the_layers(assignment):
    cotangent = torch.randn(3, 10, DIM)
    torch.manual_seed(0)
    module = build(assignment=assignment)
    assert module.estimator == "layers"
    torch.manual_seed(1)
    own = gradient(module, vectors(), cotangent)
    torch.manual_seed(1)
    x = vectors().requires_grad_()
    residual, total = x, 0.0
    for layer in module.layers:
        output = layer.quantize(residual).quantized
        residual, total = residual - output.detach(), total + output
    (total * cotangent).sum().backward()
    torch.testing.assert_close(own, x.grad)
    assert build(assignment=Gumbel(0.5)).estimator == "rotation"


@pytest.mark.parametrize("name", ["plain", "beam", "implicit", "dropout"])
def test_lengths_are_a_mask_in_every_layout(name):
    for layout, shape in (("last", (3, 5, DIM)), ("first", (3, DIM, 5)), ("first", (3, DIM, 5, 2)), ("last", (3, 5, 2, DIM))):
        module = build(**{**FAMILY[name], "layout": layout}).eval()
        x = torch.randn(shape)
        lengths = torch.tensor([5, 2, 0])
        mask = torch.arange(5) < lengths.unsqueeze(-1)
        if len(shape) == 4:
            mask = mask.unsqueeze(-1).expand(3, 5, 2)
        found = module.quantize(x, lengths=lengths)
        assert torch.equal(found.indices, module.quantize(x, mask).indices)
        assert torch.equal(found.indices, module.encode(x, lengths=lengths))
        assert torch.equal(found.indices >= 0, mask.unsqueeze(-1).expand_as(found.indices))
        rows = found.quantized.movedim(1, -1) if layout == "first" else found.quantized
        assert not rows[~mask].any()


# Anything may be a layer


def test_any_quantizer_is_a_layer():
    module = axes()
    x = vectors().requires_grad_()
    out = module(x)
    assert module.codebooks() == []
    assert module.bits_per_vector == pytest.approx(LAYERS * torch.tensor(12.0).log2().item())
    assert torch.equal(module.decode(out.indices), out.quantized)
    out.loss.backward()
    assert x.grad.any()
    assert module.metrics() == {}


def test_layers_may_differ_and_nest():
    inner = Residual([VectorQuantize(DIM, 5), VectorQuantize(DIM, 7, update=EMA(0.5))])
    with pytest.raises(ValueError, match=r"^layers\[1\]\.code_shape"):
        Residual([Axes(DIM, 1.0), inner])
    module = Residual([inner, Residual([VectorQuantize(DIM, 3)] * 2)])
    assert module.code_shape == (2, 2)
    assert module.codebook_sizes == (5, 7, 3, 3)
    out = module(vectors())
    assert out.indices.shape == (3, 10, 2, 2)
    assert len(module.codebooks()) == 3
    assert set(module.loss_weights) == {*(f"commitment/{i}/{j}" for i in range(2) for j in range(2))} | {
        *(f"cross_entropy/{i}/{j}" for i in range(2) for j in range(2))
    }
    module.eval()
    torch.testing.assert_close(module.decode(module.encode(vectors())), module(vectors()).quantized)
    mixed = Residual([Axes(DIM, 1.0), VectorQuantize(DIM, 5)])
    before = mixed.codebooks()[0].codes().clone()
    mixed(vectors())
    assert not torch.equal(mixed.codebooks()[0].codes(), before)


def test_the_codebook_is_one_tensor_where_that_is_possible():
    module = build()
    codes = torch.randn(LAYERS, CODES, DIM)
    module.codebook = codes
    assert torch.equal(module.codebook, codes)
    assert torch.equal(module.layers[1].codebook, codes[1])
    with pytest.raises(ValueError, match="codebook has shape"):
        module.codebook = codes[:2]
    shared = build(shared_codebook=True)
    shared.codebook = codes[0]
    assert torch.equal(shared.codebook, codes[0])
    with pytest.raises(ValueError, match="different shapes"):
        _ = build(**FAMILY["sizes"]).codebook


# Engines


@pytest.mark.parametrize("name", ["dropout", "beam and dropout", "shared", "implicit", "implicit beam", "directional", "first"])
def test_compiled_is_eager(name):
    module, x = member(name)
    twin = copy.deepcopy(module)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        for _ in range(2):
            results = []
            for run, owner in ((module, module), (compiled, twin)):
                owner.train(training)
                given = x.clone().requires_grad_()
                torch.manual_seed(4)
                out = run(given)
                (out.quantized.sin().sum() + out.loss).backward()
                results.append((out.quantized, out.indices, out.loss, given.grad, [book.codes() for book in owner.codebooks()]))
            torch.testing.assert_close(*results)
    torch.compiler.reset()


# Bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_quantizers": 0}, "num_quantizers = 0"),
        ({"num_quantizers": None}, "num_quantizers = None"),
        ({"codebook_size": (4, 4)}, "num_quantizers = 3"),
        ({"codebook_size": (), "num_quantizers": None}, "codebook_size = "),
        ({"codebook_size": (4, 4, 5), "shared_codebook": True}, "codebook_size = "),
        ({"implicit": MLP(4), "update": EMA()}, "update = EMA"),
        ({"implicit": MLP(4), "update": EMA(), "shared_codebook": True}, "update = EMA"),
        ({"implicit": MLP(4), "metric": "cosine"}, "metric = 'cosine': must be 'euclidean' with implicit codebooks"),
        ({"implicit": MLP(4), "heads": 2}, "heads = 2: must be 1 with implicit codebooks"),
        ({"implicit": MLP(4), "separate_heads": True}, "separate_heads = True"),
        ({"assignment": Gumbel(estimator="reinmax"), "estimate": "sum"}, 'estimate = "sum": must be "layers"'),
        ({"sync_update": 0.5}, "sync_update = 0.5: must be 0 unless the codes learn"),
        ({"sync_update": 1.5, "update": Gradient()}, "sync_update = 1.5"),
        ({"estimate": "all"}, "estimate = 'all'"),
        ({"estimator": "reinmax"}, "estimator = 'reinmax'"),
        ({"masked": "one"}, "masked = 'one'"),
        ({"layout": "middle"}, "layout = 'middle'"),
        ({"gradient_fraction": 1.5}, "gradient_fraction = 1.5"),
        ({"quantize_dropout": QuantizeDropout(cutoff_index=3)}, "QuantizeDropout.cutoff_index = 3"),
        ({"beam": BeamSearch(2, weights=(1.0,))}, "BeamSearch.weights has 1"),
        ({"beam": BeamSearch(2), "heads": 2}, r"layers\[0\]"),
        ({"commit": "never"}, "commit = 'never'"),
    ],
)
def test_contradictory_choices_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_misspelled_options_are_refused():
    with pytest.raises(TypeError, match="codebok_dim"):
        build(codebok_dim=3)
    with pytest.raises(TypeError, match="bean_size"):
        build()(vectors(), bean_size=3)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m: m(vectors()[..., :-1]), ValueError, "x has shape"),
        (lambda m: m(vectors().long()), TypeError, "x is torch.int64"),
        (lambda m: m(vectors(), torch.ones(3, 9, dtype=torch.bool)), ValueError, "mask has shape"),
        (lambda m: m(vectors(), torch.ones(3, 10)), TypeError, "mask is torch.float32"),
        (lambda m: build(condition_fraction=1.5), ValueError, "condition_fraction = 1.5"),
        (lambda m: m(vectors(), depth=0), ValueError, "depth = 0"),
        (lambda m: m(vectors(), depth=4), ValueError, "depth = 4"),
        (lambda m: m(vectors(), top_k=2), TypeError, "top_k: is no option"),
        (lambda m: m(vectors(), partial=vectors()), TypeError, "partial: is no option"),
        (lambda m: m(vectors(), temperature=0.5), ValueError, "temperature = 0.5"),
        (lambda m: m(vectors(), weights=torch.ones(3, 9)), ValueError, "weights has shape"),
        (lambda m: m(vectors(), lengths=torch.tensor([1, 2])), ValueError, "lengths has shape"),
        (lambda m: m(vectors(), torch.ones(3, 10, dtype=torch.bool), lengths=torch.ones(3).long()), ValueError, "mask and lengths"),
        (lambda m: m(vectors()[0, 0]), ValueError, "x has shape"),
        (lambda m: m(vectors(), beam_size=2, indices=torch.zeros(3, 10, 3, dtype=torch.int64)), ValueError, "beam_size = 2"),
        (lambda m: m(vectors(), targets=torch.full((3, 10, 3), CODES)), ValueError, "targets holds 8"),
        (lambda m: m.encode(vectors(), depth=9), ValueError, "depth = 9"),
        (lambda m: m(vectors(), beam_size=0), ValueError, "beam_size = 0"),
        (lambda m: m(vectors(), indices=torch.zeros(3, 10, 2, dtype=torch.int64)), ValueError, "indices has shape"),
        (lambda m: m(vectors(), indices=torch.zeros(3, 10, 3)), TypeError, "indices is torch.float32"),
        (lambda m: m(vectors(), indices=torch.full((3, 10, 3), CODES)), ValueError, "indices holds 8"),
        (lambda m: m(vectors(), targets=torch.zeros(3, 10, 2, dtype=torch.int64)), ValueError, "targets has shape"),
        (lambda m: m.decode(torch.zeros(3, 10, 4, dtype=torch.int64)), ValueError, "indices has shape"),
        (lambda m: m.decode(torch.zeros(3, 10, 0, dtype=torch.int64)), ValueError, "indices has shape"),
        (lambda m: m.decode(torch.zeros(3, 10, 3)), TypeError, "indices is torch.float32"),
        (lambda m: m.decode(torch.full((3, 10, 3), -2)), ValueError, "indices holds -2"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(call, error, message):
    module, _ = member("dropout")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(error, match=message):
        call(module)
    torch.testing.assert_close(dict(module.state_dict()), before, rtol=0, atol=0)


def test_layers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="layers is empty"):
        Residual([])
    with pytest.raises(TypeError, match=r"layers\[0\] is a Linear"):
        Residual([torch.nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=r"layers\[1\]\.dim = 3"):
        Residual([Axes(4, 1.0), Axes(3, 1.0)])
    with pytest.raises(ValueError, match=r"layers\[0\]\.layout"):
        Residual([VectorQuantize(4, 4, layout="first")])
    with pytest.raises(ValueError, match=r"layers\[0\] is a Axes"):
        axes(beam=BeamSearch(2))
    with pytest.raises(ValueError, match=r"layers\[0\] is a Axes"):
        axes()(vectors(), beam_size=2)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"quantize_dropout": True}, TypeError, r"quantize_dropout = True: must be QuantizeDropout\(...\)"),
        ({"quantize_dropout": QuantizeDropout}, TypeError, r"quantize_dropout = .*: must be QuantizeDropout\(...\)"),
        ({"beam": 4}, TypeError, r"beam = 4: must be BeamSearch\(...\)"),
        ({"implicit": True}, TypeError, r"implicit = True: must be MLP\(...\)"),
        ({"shared_codebook": "no"}, TypeError, r"shared_codebook = 'no'"),
        ({"quantize_dropout": QuantizeDropout(multiple_of=3)}, ValueError, r"multiple_of = 3: must be at most 2, the number of layers"),
        ({"init": "kmeans"}, ValueError, r"init = 'kmeans': must be one of 'uniform', 'normal', 'unit', KMeans\(...\)"),
        ({"code_weights": 0.5}, TypeError, r"code_weights = 0.5: must be a tensor"),
    ],
)
def test_choices_of_another_kind_are_named(options, error, match):
    with pytest.raises(error, match=match):
        ResidualVQ(8, 16, 2, **options)


def test_layers_are_a_sequence():
    with pytest.raises(TypeError, match="layers is a VectorQuantize: must be a sequence of quantizers"):
        Residual(VectorQuantize(8, 16))


def test_layers_see_what_is_softly_clamped():
    limit = torch.tensor([1.5, 0.5])
    layers = [FSQ((5, 5), scale=0.25**i, bound="clamp") for i in range(2)]
    plain, clamped = Residual(layers), Residual(layers, soft_clamp=(1.5, 0.5))
    x = torch.randn(3, 4, 2, requires_grad=True)
    found, expected = clamped(x), plain((x / limit).tanh() * limit)
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(*(torch.autograd.grad(out.quantized.sum(), x)[0] for out in (found, expected)))
    with pytest.raises(ValueError, match=r"^soft_clamp\[1\] = -1: must be positive"):
        Residual(layers, soft_clamp=(1.0, -1))


@pytest.mark.parametrize("layers", [lambda: [LFQ(4, scale=0.5**i) for i in range(3)], lambda: [FSQ((5, 5, 4, 4)), VectorQuantize(4, 8)]])
def test_vectors_between_the_projections_are_quantized_as_whole_inputs_are(layers):
    quantizer = Residual(layers(), estimator="layers", soft_clamp=1.5)
    x = torch.randn(3, 7, 4)
    expected, found = quantizer.quantize(x, depth=2), quantizer.quantize_vectors(x, None, depth=2)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    finite = torch.rand(3, 7) > 0.3
    expected = quantizer.quantize(x.where(finite.unsqueeze(-1), torch.nan), freeze_codebook=True)
    found = quantizer.quantize_vectors(x, finite, freeze_codebook=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with pytest.raises(TypeError, match=r"^weigths: is no option of Residual"):
        quantizer.quantize_vectors(x, finite, weigths=None)


def test_layers_that_may_give_what_is_not_finite_are_looked_at():
    quantizer = Residual([LFQ(4, activation=lambda x: x * torch.inf), LFQ(4)], estimator="layers")
    assert (quantizer(torch.randn(2, 4, requires_grad=True)).indices[..., 1] == -1).all()
