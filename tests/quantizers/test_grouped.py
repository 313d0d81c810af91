"""Groups side by side: each is what its part makes of its share of the width, and nothing of the others enters it."""

import copy
import itertools

import pytest
import torch

from vqkit.quantizers import (
    MLP,
    BeamSearch,
    Grouped,
    GroupedResidualVQ,
    Gumbel,
    KMeans,
    QuantizeDropout,
    Residual,
    ResidualVQ,
    VectorQuantize,
    update_codebooks_,
)

DIM, GROUPS, LAYERS, CODES = 8, 2, 3, 8

FAMILY = {
    "plain": {},
    "projected": {"codebook_dim": 3},
    "shared": {"shared_codebook": True},
    "dropout": {"quantize_dropout": QuantizeDropout(seed=1)},
    "beam": {"beam": BeamSearch(3)},
    "implicit": {"implicit": MLP(8)},
    "implicit shared": {"implicit": MLP(8), "shared_codebook": True},
    "first": {"layout": "first"},
}
family = pytest.mark.parametrize("name", FAMILY)


def build(**options):
    return GroupedResidualVQ(**{"dim": DIM, "codebook_size": CODES, "num_quantizers": LAYERS, "groups": GROUPS, **options})


def vectors(layout="last", seed=1):
    x = torch.randn(3, 10, DIM, generator=torch.Generator().manual_seed(seed))
    return x.movedim(-1, 1) if layout == "first" else x


def member(name):
    module = build(**FAMILY[name])
    for seed in range(2):
        module(vectors(module.layout, 10 + seed))
    return module, vectors(module.layout)


@family
@pytest.mark.parametrize("training", [True, False])
def test_grouped_is_each_group_alone(name, training):
    module, x = member(name)
    module.train(training)
    rows = x.movedim(1, -1) if module.layout == "first" else x
    alone = copy.deepcopy(list(module.parts))
    out = module(x)
    pieces = [part(piece) for part, piece in zip(alone, rows.chunk(GROUPS, -1), strict=True)]
    axis = 1 if module.layout == "first" else -1
    assert torch.equal(out.indices, torch.stack([piece.indices for piece in pieces], dim=2))
    found = torch.cat([piece.quantized for piece in pieces], dim=-1)
    assert torch.equal(out.quantized.movedim(axis, -1), found)
    torch.testing.assert_close(out.loss, sum(piece.loss for piece in pieces) / GROUPS)
    mine, theirs = ([book.codes() for part in parts for book in part.codebooks()] for parts in (module.parts, alone))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@family
def test_decode_of_encode_is_the_output(name):
    module, x = member(name)
    module.eval()
    out = module(x)
    assert torch.equal(module.encode(x), out.indices)
    torch.testing.assert_close(module.decode(out.indices), out.quantized, rtol=0, atol=1e-6)
    assert out.indices.shape == (3, 10, GROUPS, LAYERS) == (3, 10, *module.code_shape)
    assert module.bits_per_vector == GROUPS * LAYERS * 3
    coarse = module.decode(out.indices[..., :2])
    axis = 1 if module.layout == "first" else -1
    pieces = [part.decode(out.indices[:, :, g, :2]) for g, part in enumerate(module.parts)]
    assert torch.equal(coarse.movedim(axis, -1), torch.cat(pieces, dim=-1))
    assert not module.decode(torch.full_like(out.indices, -1)).any()


def test_options_of_the_parts_pass_through():
    module = build(codebook_size=16)
    x = vectors()
    for depth, beam_size in ((2, 1), (3, 4)):
        expected = [part.encode(piece, depth=depth, beam_size=beam_size) for part, piece in zip(module.parts, x.chunk(2, -1), strict=True)]
        assert torch.equal(module.encode(x, depth=depth, beam_size=beam_size), torch.stack(expected, dim=2))
    given = torch.randint(16, (3, 10, GROUPS, LAYERS))
    assert torch.equal(module.quantize(x, indices=given).indices, given)
    losses = module.quantize(x, targets=given).losses
    assert {f"cross_entropy/{g}/{q}" for g in range(GROUPS) for q in range(LAYERS)} < set(losses)


def test_groups_drop_the_same_layers():
    module = build(quantize_dropout=QuantizeDropout(seed=1), commit="manual")
    seen = set()
    for _ in range(8):
        depth = (module(vectors()).indices >= 0).sum(-1).unique()
        assert len(depth) == 1
        seen.add(depth.item())
        update_codebooks_(module)
    assert len(seen) > 1


@family
def test_masked_and_broken_vectors_influence_nothing(name):
    module, x = member(name)
    first = module.layout == "first"
    rows = x.movedim(1, -1) if first else x
    broken = rows.clone()
    broken[1, 2, 0] = torch.nan  # in one group: no group gives it a code
    broken[2, 3, -1] = torch.inf
    lost = torch.zeros(3, 10, dtype=torch.bool)
    lost[1, 2] = lost[2, 3] = True
    results = []
    for given, mask in ((broken, None), (rows, ~lost), (broken, ~lost)):
        twin = copy.deepcopy(module)
        given = (given.movedim(-1, 1) if first else given).clone().requires_grad_()
        out = twin(given, mask)
        (out.quantized.sin().sum() + out.loss).backward()
        assert (out.indices[lost] == -1).all()
        results.append((out.quantized, out.indices, out.loss, given.grad, [book.codes() for book in twin.codebooks()]))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_to_quantize(training):
    module, x = member("plain")
    module.train(training)
    for given, mask in ((x[:0], None), (x, torch.zeros(3, 10, dtype=torch.bool))):
        out = module(given, mask)
        assert out.loss == 0
        assert not out.quantized.any()
        assert out.indices.shape == (len(given), 10, GROUPS, LAYERS)


def test_parts_may_differ_in_width_and_be_shared():
    narrow = VectorQuantize(2, 5)
    module = Grouped([narrow, VectorQuantize(4, 7), narrow])
    x = torch.randn(3, 10, 8)
    assert module.code_shape == (3,)
    assert module.codebook_sizes == (5, 7, 5)
    assert len(module.codebooks()) == 2
    found = module.quantize(x)
    apart = [narrow.quantize(x[..., piece]).statistics for piece in (slice(0, 2), slice(6, 8))]
    torch.testing.assert_close(found.statistics[0].sum, apart[0].sum + apart[1].sum)
    module(x)
    module.eval()
    torch.testing.assert_close(module.decode(module.encode(x)), module(x).quantized)


def test_groups_of_residuals_and_residuals_of_groups():
    module = Residual([Grouped([VectorQuantize(4, 5), VectorQuantize(4, 5)]) for _ in range(2)])
    x = torch.randn(3, 10, 8)
    out = module(x)
    assert out.indices.shape == (3, 10, 2, 2)
    module.eval()
    torch.testing.assert_close(module.decode(module.encode(x)), module(x).quantized)


def test_images_keep_their_layout():
    module = build(layout="first", codebook_dim=3).eval()
    x = torch.randn(2, DIM, 3, 5)
    out = module(x)
    assert out.quantized.shape == x.shape
    assert out.indices.shape == (2, 3, 5, GROUPS, LAYERS)
    torch.testing.assert_close(module.decode(out.indices), out.quantized)


def test_codebook_and_start():
    module = build(init=KMeans())
    module.initialize_(vectors())
    codes = torch.randn(GROUPS, LAYERS, CODES, DIM // GROUPS)
    assert module.codebook.shape == codes.shape
    module.codebook = codes
    assert torch.equal(module.parts[1].layers[2].codebook, codes[1, 2])
    with pytest.raises(ValueError, match="codebook has shape"):
        module.codebook = codes[:, :2]


def test_each_layer_of_each_group_is_told():
    module = build(codebook_dim=3)
    indices = module.encode(vectors())
    layers = module.decode_layers(indices)
    assert layers.shape == (GROUPS, LAYERS, 3, 10, 3)
    torch.testing.assert_close(torch.cat(list(layers.sum(1)), dim=-1), module.decode_codes(indices))
    assert torch.equal(module.decode_layers(indices[..., :2]), layers[:, :2])


@pytest.mark.parametrize("by_name", [True, False])
def test_every_layer_of_every_group_starts_where_its_residuals_are(by_name):
    module = build(init=KMeans())
    x, mask = torch.randn(3, 40, DIM), torch.rand(3, 40) < 0.9
    if by_name:
        module.initialize_(x, mask)
    else:
        module(x.masked_fill(~mask.unsqueeze(-1), torch.nan), mask)
    module.eval()
    layers = module.decode_layers(module.encode(x))
    for piece, own in zip(x.chunk(GROUPS, -1), layers, strict=True):
        left = [piece[mask].square().mean()] + [(piece - own[: q + 1].sum(0))[mask].square().mean() for q in range(LAYERS)]
        assert all(after < 0.9 * before for before, after in itertools.pairwise(left))


@pytest.mark.parametrize("by_name", [True, False])
def test_a_shared_part_starts_at_what_all_its_uses_see(by_name):
    part = VectorQuantize(4, 16, init=KMeans())
    module = Grouped([part, part], commit="manual")
    x = torch.cat([torch.randn(3, 20, 4), torch.randn(3, 20, 4) + 8.0], dim=-1)
    mask = torch.rand(3, 20) < 0.8
    start = module.initialize_ if by_name else module
    start(x.masked_fill(~mask.unsqueeze(-1), -50.0), mask)
    assert 0 < (part.codebook.mean(-1) > 4.0).sum() < 16
    assert part.codebook.min() > -10
    codes = part.codebook.clone()
    module(x)
    assert torch.equal(part.codebook, codes)


def test_lengths_are_a_mask_in_images_too():
    module = build(layout="first", commit="manual")
    x = torch.randn(3, DIM, 5, 2)
    lengths = torch.tensor([5, 2, 0])
    mask = (torch.arange(5) < lengths.unsqueeze(-1)).unsqueeze(-1).expand(3, 5, 2)
    found, expected = module.quantize(x, lengths=lengths), module.quantize(x, mask)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(module.encode(x, lengths=lengths), found.indices)
    assert torch.equal((found.indices >= 0).all((-1, -2)), mask)
    assert not found.quantized.movedim(1, -1)[~mask].any()
    torch.testing.assert_close([s.count for s in found.statistics], [s.count for s in expected.statistics])


def test_options_of_a_call_reach_every_group():
    x = vectors()
    weights = torch.rand(3, 10)
    module = build()
    for entry in module.quantize(x, weights=weights).statistics:
        torch.testing.assert_close(entry.count.sum(), weights.sum())
    assert module.quantize(x, freeze_codebook=True).statistics is None
    drawn = build(assignment=Gumbel(1.0))
    assert torch.equal(drawn.quantize(x, temperature=0.0).indices, drawn.encode(x))
    assert (drawn.quantize(x, temperature=100.0).indices != drawn.encode(x)).any(0).any(0).all()


@pytest.mark.parametrize("options", [{"indices": 0}, {"targets": 0}, {"temperature": 0.5}, {"top_k": 2}, {"bean": 1}])
def test_a_call_that_raises_starts_nothing(options):
    module = build(init=KMeans())
    late = torch.zeros(3, 10, GROUPS, LAYERS, dtype=torch.int64)
    late[..., -1, -1] = CODES
    options = {name: late if name in ("indices", "targets") else value for name, value in options.items()}
    before = copy.deepcopy(module.state_dict())
    with pytest.raises((ValueError, TypeError), match=next(iter(options))):
        module(vectors(), **options)
    torch.testing.assert_close(dict(module.state_dict()), dict(before), rtol=0, atol=0)


def test_compiled_is_eager():
    module, x = member("dropout")
    twin = copy.deepcopy(module)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        results = []
        for run, owner in ((module, module), (compiled, twin)):
            owner.train(training)
            out = run(x)
            results.append((out.quantized, out.indices, out.loss, [book.codes() for book in owner.codebooks()]))
        torch.testing.assert_close(*results)
    torch.compiler.reset()


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: build(groups=3), ValueError, "groups = 3"),
        (lambda: build(groups=0), ValueError, "groups = 0"),
        (lambda: build(layout="middle"), ValueError, "layout = 'middle'"),
        (lambda: build(codebok_dim=3), TypeError, "codebok_dim"),
        (lambda: Grouped([]), ValueError, "parts is empty"),
        (lambda: Grouped([torch.nn.Linear(2, 2)]), TypeError, r"parts\[0\] is a Linear"),
        (lambda: Grouped([VectorQuantize(4, 4), ResidualVQ(4, 4, 2)]), ValueError, r"parts\[1\]\.code_shape"),
        (lambda: Grouped([VectorQuantize(4, 4, layout="first")]), ValueError, r"parts\[0\]\.layout"),
        (lambda: build()(vectors()[..., :-1]), ValueError, "x has shape"),
        (lambda: build()(vectors()[0, 0]), ValueError, "x has shape"),
        (lambda: build()(vectors().int()), TypeError, "x is torch.int32"),
        (lambda: build()(vectors(), torch.ones(3, 10)), TypeError, "mask is torch.float32"),
        (lambda: build()(vectors(), lengths=torch.tensor([1, 2, 11])), ValueError, "lengths holds 11"),
        (lambda: build()(vectors(), top_k=2), TypeError, "top_k: is no option"),
        (lambda: build()(vectors(), depth=4), ValueError, "depth = 4"),
        (lambda: build().encode(vectors(), depth=0), ValueError, "depth = 0"),
        (lambda: Grouped([VectorQuantize(4, 4)])(vectors()[..., :4], depth=1), TypeError, "depth: is no option of Grouped"),
        (lambda: build()(vectors(), targets=torch.zeros(3, 10, GROUPS, LAYERS)), TypeError, "targets is torch.float32"),
        (lambda: build().decode(torch.zeros(3, 10, GROUPS, LAYERS + 1, dtype=torch.int64)), ValueError, "indices has shape"),
        (lambda: build().decode(torch.zeros(2, dtype=torch.int64)), ValueError, "indices has shape"),
        (lambda: build()(vectors(), torch.ones(3, 9, dtype=torch.bool)), ValueError, "mask has shape"),
        (lambda: build().decode(torch.zeros(3, 10, 1, LAYERS, dtype=torch.int64)), ValueError, "indices has shape"),
        (lambda: build().decode(torch.zeros(3, 10, GROUPS, LAYERS)), TypeError, "indices is torch.float32"),
        (lambda: build().quantize(vectors(), indices=torch.zeros(3, 10, 3, LAYERS, dtype=torch.int64)), ValueError, "indices has shape"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
