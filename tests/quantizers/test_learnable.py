"""Laws of the learnable codebook: `quantize` changes nothing, an update counts every vector once, and nothing is lost on the way."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import golden_arrays
from states import assert_same, snapshot
from thread_ranks import in_ranks
from vqkit.ops.codebook import CodebookStatistics, assignment_stats, ema_update
from vqkit.ops.nearest_code import nearest_code
from vqkit.ops.usage import quantization_metrics
from vqkit.quantizers import CodebookConfig, LearnableVQ, add_statistics_, update_codebooks_

HEADS, CODES, DIM = 2, 8, 4
EXPIRY = CodebookConfig(decay=0.9, dead_code_threshold=1.0)


class Two(nn.Module):
    """Two codebooks of different size behind a layer."""

    def __init__(self, config=None):
        super().__init__()
        self.layer = nn.Linear(DIM, DIM, bias=False)
        self.first = LearnableVQ(HEADS, CODES, DIM, config)
        self.second = LearnableVQ(HEADS, CODES + 3, DIM, config)

    def forward(self, x, mask=None):
        one = self.first(self.layer(x), mask)
        two = self.second(one.quantized + x, mask)
        return two.quantized, one.commitment + two.commitment, (one.statistics, two.statistics)


def vectors(batch=4, time=9, dtype=torch.float32):
    return torch.randn(batch, HEADS, time, DIM, dtype=dtype)


def assert_statistics(found, expected):
    assert_same(found._asdict(), expected._asdict())


# The official implementation


@pytest.mark.parametrize("case_id", golden_arrays.case_ids("unit", "learnable_vq_call"))
def test_a_call_equals_the_official_one(case_id):
    golden = golden_arrays.load("unit", case_id)
    for case in golden.meta["cases"]:
        key, config = case["key"], case["config"]
        quantizer = LearnableVQ(
            config["n_head"], config["n_code"], config["d_k"], CodebookConfig(decay=config["c_gamma"]), dtype=golden.dtype
        )
        given = golden.tree(f"{key}/params/")
        quantizer.load_state_dict({"sum": given["c_sum"], "count": given["c_count"], "updates": torch.tensor(0)})
        golden.check(f"{key}/codebook", quantizer.codebook)

        train = config["is_train"]
        x = golden[f"{key}/in/vecs"].requires_grad_()
        mask = golden[f"{key}/in/loss_mask"].bool()
        out = quantizer.quantize(x, mask)
        golden.check(f"{key}/out/quantized", out.quantized)
        golden.check(f"{key}/out/shortcodes", out.indices)
        errors = nearest_code(x, quantizer.codebook).squared_distance
        golden.check(f"{key}/out/errs2", errors)
        commitment = out.commitment if train else torch.zeros((), dtype=golden.dtype)  # in evaluation the official code has no losses
        golden.check(f"{key}/out/l_commit", commitment)
        golden.check(f"{key}/out/l_codebook", torch.zeros((), dtype=golden.dtype))
        ((out.quantized * golden[f"{key}/cotangent"]).sum() + 0.5 * commitment).backward()
        golden.check(f"{key}/grad/vecs", x.grad)

        old = quantizer.sum.clone(), quantizer.count.clone()
        if train:
            statistics = assignment_stats(x, out.indices, config["n_code"], mask)
            assert_statistics(out.statistics, statistics)
            factor = case["n_device"] * case["n_block_per_update"]
            quantizer.add_statistics_(statistics._replace(count=statistics.count * factor, sum=statistics.sum * factor))
            quantizer.commit_()
        golden.check(f"{key}/grad/params/c_sum", old[0] - quantizer.sum)
        golden.check(f"{key}/grad/params/c_count", old[1] - quantizer.count)

        metrics = quantization_metrics(x, out.quantized, errors, *old)
        expected = golden.keys(f"{key}/out/metrics/")
        assert len(expected) == (len(metrics) if train else 0)
        for name in expected:
            golden.check(name, metrics[name.rsplit("/", 1)[1]])


def test_the_start_is_the_official_one():
    quantizer = LearnableVQ(16, 256, 8)
    assert (quantizer.count == 1).all()
    assert quantizer.sum.std().item() == pytest.approx((16 * 256) ** -0.5, rel=0.02)
    assert abs(quantizer.sum.mean().item()) < 5 * (16 * 256) ** -0.5 / quantizer.sum.numel() ** 0.5


# Reading changes nothing


@pytest.mark.parametrize("train", [True, False])
def test_nothing_but_the_named_places_changes_the_state(train):
    quantizer = LearnableVQ(HEADS, CODES, DIM, EXPIRY).train(train)
    before = snapshot(quantizer)
    x = vectors().requires_grad_()
    out = quantizer(x, torch.rand(4, 9) < 0.5)
    (out.quantized.sum() + out.commitment).backward()
    quantizer.decode(quantizer.encode(x))
    quantizer.eval().train()
    assert_same(snapshot(quantizer), before)


def test_decode_of_encode_is_quantize():
    quantizer = LearnableVQ(HEADS, CODES, DIM)
    x = vectors()
    out = quantizer.quantize(x, statistics=False)
    assert out.statistics is None
    assert torch.equal(quantizer.encode(x), out.indices)
    assert torch.equal(quantizer.decode(out.indices), out.quantized)
    assert torch.equal(quantizer.decode(torch.full((1, HEADS, 3), -1)), torch.zeros(1, HEADS, 3, DIM))


def test_mask_of_ones_is_no_mask_and_masked_vectors_influence_nothing():
    quantizer = LearnableVQ(HEADS, CODES, DIM)
    x = vectors()
    plain, ones = quantizer(x), quantizer(x, torch.ones(4, 9, dtype=torch.bool))
    assert torch.equal(plain.commitment, ones.commitment) and torch.equal(plain.statistics.sum, ones.statistics.sum)
    mask = torch.rand(4, 9) < 0.5
    spoiled = torch.where(mask[:, None, :, None], x, 1e3 * torch.randn_like(x)).requires_grad_()
    clean, other = quantizer(x, mask), quantizer(spoiled, mask)
    assert torch.equal(clean.commitment, other.commitment)
    assert torch.equal(clean.statistics.count, other.statistics.count) and torch.equal(clean.statistics.sum, other.statistics.sum)
    (gradient,) = torch.autograd.grad(other.commitment, spoiled)
    assert not gradient.masked_fill(mask[:, None, :, None], 0.0).any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_dropped(bad):
    quantizer = LearnableVQ(HEADS, CODES, DIM, EXPIRY)
    x = vectors()
    x[1, 0, 3, 2] = bad
    x.requires_grad_()
    out = quantizer(x)
    assert out.indices[1, 0, 3] == -1 and not out.quantized[1, 0, 3].any()
    assert (out.indices >= 0).sum() == out.indices.numel() - 1 and out.statistics.count.sum() == out.indices.numel() - 1
    (gradient,) = torch.autograd.grad(out.quantized.sum() + out.commitment, x)
    assert out.commitment.isfinite() and gradient.isfinite().all() and not gradient[1, 0, 3].any()
    add_statistics_(quantizer, [out.statistics])
    update_codebooks_(quantizer)
    assert quantizer.codebook.isfinite().all()


def test_permuting_the_batch_permutes_the_output():
    quantizer = LearnableVQ(HEADS, CODES, DIM)
    x, order = vectors(), torch.randperm(4)
    out, permuted = quantizer(x), quantizer(x[order])
    assert torch.equal(permuted.quantized, out.quantized[order]) and torch.equal(permuted.indices, out.indices[order])
    torch.testing.assert_close(permuted.statistics.sum, out.statistics.sum)


def test_compiled_is_eager():
    quantizer = LearnableVQ(HEADS, CODES, DIM)
    compiled = torch.compile(quantizer, backend="aot_eager", fullgraph=True)
    mask = torch.rand(4, 9) < 0.5
    results = []
    for run in (quantizer, compiled):
        torch.manual_seed(5)
        x = vectors().requires_grad_()
        out = run(x, mask)
        (out.quantized.square().sum() + out.commitment).backward()
        results.append([out.quantized, out.indices, out.commitment, out.statistics.count, out.statistics.sum, x.grad])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_in_is_dtype_out_and_assignment_is_wide(dtype):
    quantizer = LearnableVQ(HEADS, CODES, DIM)
    x = vectors(dtype=dtype)
    out = quantizer(x)
    wide = quantizer(x.to(torch.promote_types(dtype, torch.float32)))
    assert out.quantized.dtype == dtype and torch.equal(out.indices, wide.indices)
    assert torch.equal(out.commitment, wide.commitment) and torch.equal(out.statistics.sum, wide.statistics.sum)


def test_autocast_changes_nothing():
    quantizer, x = LearnableVQ(HEADS, CODES, DIM), vectors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = quantizer(x)
    outside = quantizer(x)
    assert torch.equal(inside.quantized, outside.quantized) and torch.equal(inside.commitment, outside.commitment)
    assert torch.equal(inside.statistics.sum, outside.statistics.sum)


# The update


def test_the_update_is_the_moving_average_of_what_was_added():
    quantizer, x = LearnableVQ(HEADS, CODES, DIM, CodebookConfig(decay=0.8)), vectors()
    mask = torch.rand(4, 9) < 0.7
    expected = ema_update(quantizer.sum, quantizer.count, assignment_stats(x, quantizer.encode(x), CODES, mask), 0.8)
    quantizer.add_statistics_(quantizer(x, mask).statistics)
    quantizer.commit_()
    assert torch.equal(quantizer.sum, expected[0]) and torch.equal(quantizer.count, expected[1])
    assert quantizer.updates == 1 and not any(t.any() for t in quantizer.pending)


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_accumulated_is_one_batch(micro_batches):
    whole = Two()
    parts = copy.deepcopy(whole)
    x, mask = vectors(batch=4), torch.rand(4, 9) < 0.8
    for model, number in ((whole, 1), (parts, micro_batches)):
        for x_part, mask_part in zip(x.chunk(number), mask.chunk(number), strict=True):
            add_statistics_(model, model(x_part, mask_part)[2])
        before = snapshot(model)
        update_codebooks_(model)
        assert not torch.equal(model.first.codebook, before["first.sum"] / before["first.count"].unsqueeze(-1))
    assert_same(snapshot(parts), snapshot(whole), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_is_not(reentrant):
    plain = Two(EXPIRY)
    recomputed = copy.deepcopy(plain)
    x = vectors()
    results = []
    for model, run in ((plain, plain), (recomputed, lambda v: checkpoint(recomputed, v, use_reentrant=reentrant))):
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        out, commitment, statistics = run(leaf)
        add_statistics_(model, statistics)
        (out.square().sum() + commitment).backward()
        update_codebooks_(model)
        results.append({**snapshot(model), "out": out.detach(), "grad": leaf.grad, "weight": model.layer.weight.grad})
    assert_same(results[1], results[0])


@pytest.mark.parametrize("config", [CodebookConfig(decay=0.9), EXPIRY])
@pytest.mark.parametrize("shares", [(2, 2), (1, 3), (0, 4), (1, 1, 2)])
def test_several_ranks_are_one(config, shares):
    one = Two(config)
    for quantizer in (one.first, one.second):
        quantizer.count.fill_(1.0)  # so that some codes are dead at once
    x, mask = vectors(batch=4), torch.rand(4, 9) < 0.8
    ranks = [copy.deepcopy(one) for _ in shares]
    for model, share, share_mask in zip(ranks, x.split(shares), mask.split(shares), strict=True):
        if len(share):
            add_statistics_(model, model(share, share_mask)[2])
    before = snapshot(one)
    add_statistics_(one, one(x, mask)[2])
    update_codebooks_(one)
    in_ranks(len(shares), lambda reducer: update_codebooks_(ranks[reducer.rank], reducer))
    for model in ranks[1:]:
        assert_same(snapshot(model), snapshot(ranks[0]))
    for name in ("first", "second"):
        found, expected = getattr(ranks[0], name), getattr(one, name)
        torch.testing.assert_close(found.count, expected.count)
        replaced = (expected.count == 2 * config.dead_code_threshold) & (config.dead_code_threshold > 0)
        torch.testing.assert_close(found.sum[~replaced], expected.sum[~replaced], rtol=1e-5, atol=1e-6)
        assert not torch.equal(found.sum, before[f"{name}.sum"])
        if name == "first":
            rows = one.layer(x).movedim(1, 0)[:, mask]
            for head, code in replaced.nonzero().tolist():
                assert (found.codebook[head, code] - rows[head]).abs().amax(-1).min() < 1e-6


def test_expiry_replaces_exactly_the_dead_codes_by_vectors_of_the_batch():
    quantizer, x = LearnableVQ(HEADS, CODES, DIM, EXPIRY), vectors()
    with torch.no_grad():
        quantizer.sum[0, :3] = 100.0  # far from every vector
        quantizer.count[0, :3] = 0.5
    quantizer.add_statistics_(quantizer(x).statistics)
    expected = ema_update(quantizer.sum, quantizer.count, quantizer.pending, 0.9)
    quantizer.commit_()
    dead = expected[1] < 1.0
    assert dead[0, :3].all() and not dead.all()
    assert torch.equal(quantizer.sum[~dead], expected[0][~dead]) and torch.equal(quantizer.count[~dead], expected[1][~dead])
    assert (quantizer.count[dead] == 2.0).all()
    for head in range(HEADS):
        new = quantizer.codebook[head, dead[head]]
        distance = (new[:, None] - x[:, head].reshape(1, -1, DIM)).abs().amax(-1)
        assert (distance.amin(1) == 0).all() and len(distance.argmin(1).unique()) == len(new)


def test_without_a_threshold_nothing_is_drawn():
    quantizer, x = LearnableVQ(HEADS, CODES, DIM), vectors()
    before = torch.get_rng_state()
    assert quantizer(x).statistics.keys.shape == (HEADS, 0)
    assert torch.equal(torch.get_rng_state(), before)


# Starts


def test_before_a_kmeans_start_quantize_says_what_to_do():
    quantizer = LearnableVQ(HEADS, CODES, DIM, CodebookConfig(init="kmeans"))
    for use in (quantizer, quantizer.encode):
        with pytest.raises(ValueError, match=r"call initialize_\(x\)"):
            use(vectors())
    x = vectors(batch=20)
    quantizer.initialize_(x)
    assert quantizer(x).commitment < 0.7 * LearnableVQ(HEADS, CODES, DIM)(x).commitment
    assert (quantizer.count.sum(-1) == x[:, 0, :, 0].numel()).all() and (quantizer.count >= 1).all()


def test_a_kmeans_start_ignores_masked_vectors_and_drops_what_is_pending():
    x, mask = vectors(), torch.rand(4, 9) < 0.6
    results = []
    for poison in (0.0, 1e6, torch.nan):
        quantizer = LearnableVQ(HEADS, CODES, DIM, EXPIRY)
        quantizer.add_statistics_(quantizer(x).statistics)
        quantizer.initialize_(torch.where(mask[:, None, :, None], x, poison), mask, seed=1)
        assert not any(t.any() for t in quantizer.pending)
        results.append((quantizer.codebook, quantizer.count))
    for found in results[1:]:
        assert torch.equal(found[0], results[0][0]) and torch.equal(found[1], results[0][1])


def test_a_failed_start_changes_nothing():
    quantizer = LearnableVQ(HEADS, CODES, DIM, CodebookConfig(init="kmeans"))
    before = snapshot(quantizer)
    with pytest.raises(ValueError, match="no finite vector"):
        quantizer.initialize_(torch.full((1, HEADS, 3, DIM), torch.nan))
    assert_same(snapshot(quantizer), before)


def test_a_kmeans_start_is_equal_on_all_ranks_and_counts_the_vectors_of_all():
    x = vectors(batch=30)
    ranks = [LearnableVQ(HEADS, CODES, DIM, CodebookConfig(init="kmeans")) for _ in range(2)]
    in_ranks(2, lambda reducer: ranks[reducer.rank].initialize_(x.split([10, 20])[reducer.rank], reducer=reducer))
    assert torch.equal(ranks[0].codebook, ranks[1].codebook) and torch.equal(ranks[0].count, ranks[1].count)
    assert (ranks[0].count.sum(-1) == x[:, 0, :, 0].numel()).all() and (ranks[0].count >= 1).all()


def test_setting_the_codebook_drops_what_is_pending():
    quantizer, x = LearnableVQ(HEADS, CODES, DIM, CodebookConfig(init="kmeans")), vectors()
    codes = torch.randn(HEADS, CODES, DIM)
    quantizer.codebook = codes
    quantizer.add_statistics_(quantizer(x).statistics)
    quantizer.codebook = codes
    assert torch.equal(quantizer.codebook, codes) and not any(t.any() for t in quantizer.pending)
    with pytest.raises(ValueError, match=r"^codebook has shape \(8, 4\)"):
        quantizer.codebook = codes[0]


# Moving and storing


@pytest.mark.filterwarnings("ignore:update_codebooks_. nothing was counted")
@pytest.mark.parametrize("config", [CodebookConfig(), EXPIRY, CodebookConfig(init="kmeans")])
def test_any_state_survives_the_state_dict(config):
    model = Two(config)
    if config.init == "kmeans":
        model.first.initialize_(vectors())  # the second still waits
    else:
        add_statistics_(model, model(vectors())[2])
        update_codebooks_(model)
        add_statistics_(model, model(vectors())[2])
    stored = io.BytesIO()
    torch.save(model.state_dict(), stored)
    stored.seek(0)
    other = Two(config)
    other.load_state_dict(torch.load(stored, weights_only=True), strict=True)
    assert_same(snapshot(other), snapshot(model))
    assert (other.first.initialized, other.second.initialized) == (model.first.initialized, model.second.initialized)
    for model_ in (model, other):
        update_codebooks_(model_)
    assert_same(snapshot(other), snapshot(model))


def test_state_dicts_load_by_assignment_onto_the_meta_device():
    model = Two(EXPIRY)
    add_statistics_(model, model(vectors())[2])
    with torch.device("meta"):
        other = Two(EXPIRY)
    assert other.first.pending.sum.is_meta
    other.load_state_dict(model.state_dict(), assign=True)
    assert_same(snapshot(other), snapshot(model))


def test_a_missing_pending_key_loads_as_zero_and_stale_pending_is_dropped():
    model, other = Two(), Two()
    add_statistics_(other, other(vectors())[2])
    state = {name: value for name, value in model.state_dict().items() if "pending" not in name}
    other.load_state_dict(state, strict=True)
    assert not any(t.any() for q in (other.first, other.second) for t in q.pending)


def test_wrong_states_are_refused():
    state = LearnableVQ(HEADS, CODES, DIM).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for sum"):
        LearnableVQ(HEADS, CODES + 1, DIM).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"pending\.candidates has shape \(2, 0, 4\): must be \(2, 8, 4\)"):
        LearnableVQ(HEADS, CODES, DIM, EXPIRY).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"pending_sum"'):
        LearnableVQ(HEADS, CODES, DIM).load_state_dict({**state, "pending_sum": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r'Missing key.*"count"'):
        LearnableVQ(HEADS, CODES, DIM).load_state_dict({name: value for name, value in state.items() if name != "count"})
    vars(state)["_metadata"][""]["version"] = 2
    with pytest.raises(RuntimeError, match="format version 2: this vqkit reads up to 1"):
        LearnableVQ(HEADS, CODES, DIM).load_state_dict(state)


@pytest.mark.parametrize(
    "move", [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.bfloat16), lambda m: m.to("cpu", torch.half)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_codebooks_are_never_made_narrower(move, dtype):
    quantizer = LearnableVQ(HEADS, CODES, DIM, EXPIRY, dtype=dtype)
    quantizer.add_statistics_(CodebookStatistics(*(torch.rand_like(t) for t in quantizer.pending)))
    before = snapshot(quantizer)
    assert_same(snapshot(move(quantizer)), before)
    assert quantizer.sum.dtype == quantizer.pending.sum.dtype == dtype
    assert quantizer.quantize(vectors().half()).quantized.dtype == torch.half


def test_a_module_moves_whole_and_copies_whole():
    quantizer = LearnableVQ(HEADS, CODES, DIM, EXPIRY)
    quantizer.add_statistics_(quantizer(vectors()).statistics)
    before = snapshot(quantizer)
    for other in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        assert_same(snapshot(other), before)
        other.pending.sum.zero_()
    assert_same(snapshot(quantizer), before)
    assert quantizer.double().pending.sum.dtype == quantizer.sum.dtype == torch.float64
    assert quantizer.to("meta").pending.sum.is_meta
    empty = quantizer.bfloat16().to_empty(device="cpu")
    assert empty.pending.sum.device.type == "cpu" and empty.sum.dtype == torch.float64


def test_parameters_and_buffers_hold_no_pending():
    quantizer = LearnableVQ(HEADS, CODES, DIM)
    assert not list(quantizer.parameters())
    assert {name for name, _ in quantizer.named_buffers()} == {"sum", "count", "updates"}


# Bad input


def test_bad_arguments_are_named_and_change_nothing():
    quantizer, x = LearnableVQ(HEADS, CODES, DIM), vectors()
    before = snapshot(quantizer)
    statistics, wider = quantizer(x).statistics, LearnableVQ(HEADS, CODES, DIM + 1)
    mask = torch.ones(4, 9, dtype=torch.bool)
    for error, match, call in [
        (ValueError, r"^x has shape \(2, 9, 4\): must be \[batch, 2, time, 4\]", lambda: quantizer(x[0])),
        (ValueError, r"^x has shape \(4, 2, 9, 3\)", lambda: quantizer(x[..., :3])),
        (TypeError, r"^x is torch.int64", lambda: quantizer(x.long())),
        (TypeError, r"^mask is torch.float32", lambda: quantizer(x, mask.float())),
        (ValueError, r"^mask has shape \(4, 8\): must be \(4, 9\)", lambda: quantizer(x, mask[:, 1:])),
        (ValueError, r"^indices has shape \(4, 3, 9\)", lambda: quantizer.decode(torch.zeros(4, 3, 9, dtype=torch.int64))),
        (ValueError, r"^statistics.sum has shape", lambda: quantizer.add_statistics_(statistics._replace(sum=statistics.sum[..., :3]))),
        (ValueError, r"^statistics.sum has shape", lambda: add_statistics_(nn.ModuleList([quantizer, wider]), [statistics] * 2)),
        (ValueError, r"^statistics has 2 entries: must be 1", lambda: add_statistics_(quantizer, [statistics] * 2)),
        (ValueError, r"^heads = 0", lambda: LearnableVQ(0, CODES, DIM)),
        (ValueError, r"^dtype = torch.float16", lambda: LearnableVQ(HEADS, CODES, DIM, dtype=torch.float16)),
    ]:
        with pytest.raises(error, match=match):
            call()
    assert_same(snapshot(quantizer), before)


def test_before_a_kmeans_start_the_codebook_has_its_shape():
    assert LearnableVQ(HEADS, CODES, DIM, CodebookConfig(init="kmeans")).codebook.shape == (HEADS, CODES, DIM)
