"""Laws of a codebook alone: its start, its rules of learning against their definitions, expiry, transforms, and what it refuses."""

import copy
import pickle

import pytest
import torch
from torch import nn

from states import snapshot
from vqkit.ops.codebook import assignment_stats
from vqkit.ops.nearest_code import nearest_index
from vqkit.quantizers import (
    EMA,
    MLP,
    Affine,
    ClipEMA,
    Codebook,
    DeadCodes,
    Frozen,
    Gradient,
    ImplicitVQ,
    KMeans,
    OwnOptimizer,
    StoredEMA,
    VectorQuantize,
    update_codebooks_,
)
from vqkit.quantizers.update import stored_codes

HEADS, SIZE, DIM = 2, 6, 3
RULES = [EMA(0.8), ClipEMA(0.8), Gradient(0.8), OwnOptimizer(), OwnOptimizer("sgd"), Frozen()]


def vectors(number=30, seed=0, dtype=torch.float32):
    return torch.randn(HEADS, number, DIM, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def see_(codebook, x):
    """One commit of x; the indices."""
    indices = nearest_index(x, codebook.codes().detach())
    codebook.add_statistics_(codebook.statistics(x, indices))
    update_codebooks_(codebook)
    return indices


# Rules


def test_the_moving_average_is_one_step_of_gradient_descent_on_its_codebook_loss():
    for rule in (EMA(0.8), ClipEMA(0.8)):
        codebook, x = Codebook(HEADS, SIZE, DIM, update=rule, dtype=torch.float64), vectors(dtype=torch.float64)
        total, count = (tensor.clone().requires_grad_() for tensor in (codebook.sum, codebook.count))
        indices = see_(codebook, x)
        seen = assignment_stats(x, indices, SIZE)
        loss = 0.1 * ((total - seen.sum).square().sum() + (count - seen.count).square().sum())
        loss.backward()
        torch.optim.SGD([total, count], lr=1.0).step()
        torch.testing.assert_close(codebook.sum, total.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(codebook.count, count.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("rule", "optimizer"),
    [
        (OwnOptimizer(learning_rate=0.05, betas=(0.8, 0.9)), lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.8, 0.9))),
        (OwnOptimizer("sgd", learning_rate=0.5, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9)),
    ],
)
def test_an_optimizer_of_its_own_is_that_of_torch_on_the_mean_squared_error(rule, optimizer):
    codebook = Codebook(HEADS, SIZE, DIM, update=rule, dtype=torch.float64)
    weight = nn.Parameter(codebook.weight.clone())
    stepped = optimizer([weight])
    for step in range(4):
        x = vectors(seed=step, dtype=torch.float64)
        indices = see_(codebook, x)
        chosen = weight.gather(1, indices.unsqueeze(-1).expand(-1, -1, DIM))
        loss = sum(nn.functional.mse_loss(chosen[head], x[head]) for head in range(HEADS))
        stepped.zero_grad()
        loss.backward()
        stepped.step()
        torch.testing.assert_close(codebook.codebook, weight.detach(), rtol=1e-10, atol=1e-12)


def test_weights_count_as_copies():
    x = vectors()
    one = Codebook(HEADS, SIZE, DIM)
    other = copy.deepcopy(one)
    indices = nearest_index(x, one.codes())
    weights = torch.randint(0, 3, (HEADS, 30)).float()
    one.add_statistics_(one.statistics(x, indices, weights))
    for weight in (1, 2):
        kept = torch.where(weights >= weight, indices, -1)
        other.add_statistics_(other.statistics(x, kept))
    for codebook in (one, other):
        update_codebooks_(codebook)
    torch.testing.assert_close(one.sum, other.sum)
    torch.testing.assert_close(one.count, other.count)


# Codes that follow faster than others


def slow_where_many(total, count):
    assert total.shape == (HEADS, SIZE, DIM) and count.shape == (HEADS, SIZE)
    return 2 / (1 + count)


@pytest.mark.parametrize("rule", [EMA(0.8), ClipEMA(0.8)])
@pytest.mark.parametrize("affine", [None, Affine()])
def test_code_weights_scale_what_is_new(rule, affine):
    weights = torch.rand(HEADS, SIZE) * 5
    weights[0, 0] = 0.0
    plain = Codebook(HEADS, SIZE, DIM, update=rule, affine=affine)
    see_(plain, vectors(seed=9))
    for given in (weights, weights[1], slow_where_many):
        codebook = Codebook(HEADS, SIZE, DIM, update=rule, affine=affine, code_weights=given)
        codebook.load_state_dict(plain.state_dict())
        total, count = codebook.sum.clone(), codebook.count.clone()
        new = copy.deepcopy(plain)
        new.update = type(rule)(0.0)
        see_(new, vectors())  # of which nothing old is left
        see_(codebook, vectors())
        factor = 0.2 * (given(new.sum, new.count) if callable(given) else given.expand(HEADS, SIZE))
        torch.testing.assert_close(codebook.count, count + factor * (new.count - count))
        torch.testing.assert_close(codebook.sum, total + factor.unsqueeze(-1) * (new.sum - total), rtol=1e-5, atol=1e-5)


def test_code_weights_of_one_are_no_weights_also_for_nothing():
    plain = Codebook(HEADS, SIZE, DIM)
    others = [
        Codebook(HEADS, SIZE, DIM, code_weights=given)
        for given in (torch.ones(SIZE), lambda total, count: (count + 1) / (count + 1), lambda total, count: count * torch.nan)
    ]
    for codebook in others:
        codebook.load_state_dict(plain.state_dict())
    for x in (vectors()[:, :0], vectors()):
        see_(plain, x)
        for codebook in others[: 3 if x.numel() == 0 else 2]:
            see_(codebook, x)
            torch.testing.assert_close(codebook.sum, plain.sum, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(codebook.count, plain.count, rtol=1e-5, atol=1e-6)


def test_code_weights_travel_with_the_module():
    codebook = Codebook(HEADS, SIZE, DIM, code_weights=torch.rand(SIZE, dtype=torch.bfloat16))
    expected = codebook.code_weights.clone()
    assert "code_weights" not in codebook.state_dict() and "code_weights" in dict(codebook.named_buffers())
    with torch.device("meta"):
        empty = Codebook(HEADS, SIZE, DIM, code_weights=expected)
    narrow = copy.deepcopy(codebook).half()
    for other in (pickle.loads(pickle.dumps(codebook)), narrow, empty.to_empty(device="cpu"), codebook.to("meta").to_empty(device="cpu")):
        assert other.code_weights.dtype == torch.float32 and torch.equal(other.code_weights, expected)
    called = Codebook(HEADS, SIZE, DIM, code_weights=slow_where_many)
    assert pickle.loads(pickle.dumps(called)).code_weights is copy.deepcopy(called).code_weights is slow_where_many


def test_code_weights_that_do_not_fit_are_refused_and_change_nothing():
    for error, message, choices in [
        (ValueError, r"code_weights has shape \(3,\): must be \(6,\) or \(2, 6\)", {"code_weights": torch.ones(3)}),
        (TypeError, "code_weights is torch.int64", {"code_weights": torch.ones(SIZE, dtype=torch.int64)}),
        (ValueError, "code_weights holds -1.0", {"code_weights": -torch.ones(SIZE)}),
        (ValueError, "code_weights holds 3.0: must lie in 0.0 ... 2.0", {"code_weights": 3 * torch.ones(SIZE), "update": EMA(0.5)}),
        (ValueError, r"code_weights with update = Gradient\(", {"code_weights": torch.ones(SIZE), "update": Gradient()}),
    ]:
        with pytest.raises(error, match=f"^{message}"):
            Codebook(HEADS, SIZE, DIM, **choices)
    for error, given in [(ValueError, lambda t, c: c[:1]), (TypeError, lambda t, c: 1.0), (ValueError, lambda t, c: c * torch.nan)]:
        codebook = Codebook(HEADS, SIZE, DIM, code_weights=given)
        codebook.add_statistics_(codebook.statistics(vectors(), torch.zeros(HEADS, 30, dtype=torch.int64)))
        before = snapshot(codebook)
        with pytest.raises(error, match=r"^code_weights"):
            update_codebooks_(codebook)
        after = snapshot(codebook)
        assert all(torch.equal(after[name], before[name]) for name in before)


# Start


@pytest.mark.filterwarnings("ignore:update_codebooks_. nothing was counted")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_what_is_set_is_read_and_stays(rule, metric):
    codebook = Codebook(HEADS, SIZE, DIM, update=rule, metric=metric)
    codes = torch.randn(HEADS, SIZE, DIM)
    if metric == "cosine":
        codes = nn.functional.normalize(codes, dim=-1)
    codebook.add_statistics_(codebook.statistics(vectors(), torch.zeros(HEADS, 30, dtype=torch.int64)))
    codebook.codebook = codes
    torch.testing.assert_close(codebook.codebook, codes, rtol=1e-6, atol=1e-7)
    update_codebooks_(codebook)  # of nothing: what was pending went with the old codes
    torch.testing.assert_close(codebook.codebook, codes, rtol=1e-5, atol=1e-6)
    see_(codebook, codes)
    torch.testing.assert_close(codebook.codebook, codes, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_kmeans_starts_every_rule_alike(metric):
    found = []
    for rule in RULES:
        codebook = Codebook(HEADS, SIZE, DIM, update=rule, init=KMeans(), metric=metric)
        with pytest.raises(ValueError, match=r"call initialize_\(x\)"):
            codebook.codes()
        codebook.initialize_(vectors(), seed=3)
        found.append(codebook.codebook.detach())
    for codes in found[1:]:
        torch.testing.assert_close(codes, found[0], rtol=1e-6, atol=1e-6)
    if metric == "cosine":
        torch.testing.assert_close(found[0].norm(dim=-1), torch.ones(HEADS, SIZE))


# Expiry


@pytest.mark.parametrize("rule", [EMA(0.9), ClipEMA(0.9), Gradient(0.9), OwnOptimizer(learning_rate=1e-30, decay=0.9)])
def test_dead_codes_become_vectors_of_the_batch_after_their_time(rule):
    codebook = Codebook(HEADS, SIZE, DIM, update=rule, dead_codes=DeadCodes(0.5))
    codes = torch.randn(HEADS, SIZE, DIM)
    codes[:, :2] = 50.0  # nobody will choose them
    codebook.codebook = codes
    x, commits = vectors(), 0
    while (codebook.codebook[:, :2] > 20).all():
        assert commits < 20
        see_(codebook, x)
        commits += 1
    assert commits > 5  # 0.9 ** 6 is above a half
    for head in range(HEADS):
        distance = (codebook.codebook[head, :2, None] - x[head]).abs().amax(-1)
        assert (distance.amin(1) < 1e-5).all() and len(distance.argmin(1).unique()) == 2
    assert (codebook.count[:, :2] == 1.0).all()


def test_where_new_codes_die_at_once_every_one_has_its_turn():
    """More codes than the vectors can keep alive: those that waited longest come first."""
    codebook = Codebook(1, 150, DIM, dead_codes=DeadCodes(10.0, reset_count=10.0), update=EMA(0.8))
    codebook.codebook = codes = 1e3 + torch.randn(1, 150, DIM)
    for seed in range(4):  # 64 a step at most
        see_(codebook, torch.randn(1, 200, DIM, generator=torch.Generator().manual_seed(seed)))
    assert ((codebook.codebook - codes).abs().amax(-1) > 100).all()


def test_expiry_by_hand():
    codebook = Codebook(HEADS, SIZE, DIM)
    codebook.count[0, 1] = codebook.count[1, 4] = 0.1
    before, x = codebook.codebook.clone(), vectors()
    codebook.expire_(x, threshold=0.5)
    changed = (codebook.codebook - before).abs().amax(-1) > 1e-3
    assert changed.nonzero().tolist() == [[0, 1], [1, 4]]
    for head, code in ((0, 1), (1, 4)):
        assert (codebook.codebook[head, code] - x[head]).abs().amax(-1).min() < 1e-5
    with pytest.raises(ValueError, match="threshold = None"):
        codebook.expire_(x)


@pytest.mark.parametrize("choices", [{"metric": "cosine"}, {"affine": Affine(0.5, 0.5)}, {"update": ClipEMA()}, {"update": OwnOptimizer()}])
def test_what_expiry_by_hand_writes_is_read_as_vectors(choices):
    codebook = Codebook(HEADS, SIZE, DIM, **choices)
    x = 3 + 2 * vectors()
    see_(codebook, x)
    codebook.count[0, 1] = 0.0
    codebook.expire_(x, threshold=0.5)
    expected = nn.functional.normalize(x[0], dim=-1) if codebook.metric == "cosine" else x[0]
    assert (codebook.codebook[0, 1] - expected).abs().amax(-1).min() < 1e-4
    if codebook.metric == "cosine":  # a longer one would weigh more in the average
        assert stored_codes(codebook.update, codebook.committed_state())[0, 1].norm() == pytest.approx(1.0)


def test_expiry_by_hand_comes_after_the_commit_of_what_is_pending():
    found = []
    for early in (False, True):
        torch.manual_seed(0)
        codebook = Codebook(HEADS, SIZE, DIM, update=EMA(0.5))
        codebook.auto = True
        codebook.replace_statistics_(codebook.statistics(vectors(), torch.zeros(HEADS, 30, dtype=torch.int64)))
        if early:
            codebook.eval().train()
        codebook.expire_(vectors(seed=1), threshold=0.6)
        found.append(snapshot(codebook))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])


def test_codes_that_a_kmeans_start_leaves_over_have_their_time():
    x = vectors(3)
    for dead_codes, least in ((None, 0.01), (DeadCodes(0.5), 1.0), (DeadCodes(2.0), 4.0)):
        codebook = Codebook(HEADS, SIZE, DIM, init=KMeans(), dead_codes=dead_codes)
        codebook.initialize_(x)
        assert codebook.count.min() == pytest.approx(least)


# What stands between the stored vectors and the codes


@pytest.mark.parametrize("transform", ["linear", MLP(5, 2), nn.Linear(DIM, DIM)])
@pytest.mark.parametrize("rule", [Frozen(), Gradient()])
def test_a_transform_learns_and_stays_wide(rule, transform):
    codebook = Codebook(HEADS, SIZE, DIM, update=rule, transform=copy.deepcopy(transform))
    codebook.codes().sum().backward()
    assert all(parameter.grad is not None for parameter in codebook.parameters())
    assert len(list(codebook.parameters())) == len(list(codebook.transform.parameters())) + isinstance(rule, Gradient)
    before = codebook.half().codebook
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(codebook.codebook, before) and before.dtype == torch.float32


def test_affine_codes_follow_the_vectors_as_a_whole():
    codebook = Codebook(HEADS, SIZE, DIM, affine=Affine(0.5, 0.5))
    start = codebook.codebook.clone()
    torch.testing.assert_close(start, codebook.sum)  # nothing is moved before there were vectors
    x = 5 + 2 * vectors(400)
    for _ in range(3):
        see_(codebook, x)
    torch.testing.assert_close(codebook.batch_mean, x.mean(1))
    torch.testing.assert_close(codebook.batch_variance, x.var(1, correction=0), rtol=1e-4, atol=1e-4)
    distance = (x.unsqueeze(2) - codebook.codebook.unsqueeze(1)).norm(dim=-1).amin(-1).mean()
    still = (x.unsqueeze(2) - start.unsqueeze(1)).norm(dim=-1).amin(-1).mean()
    assert distance < 0.5 * still
    codes = torch.randn(HEADS, SIZE, DIM)
    codebook.codebook = codes
    torch.testing.assert_close(codebook.codebook, codes)


@pytest.mark.parametrize("offset", [1e3, -1e4])
def test_the_affine_variance_is_right_far_from_the_origin_from_the_first_commit_on(offset):
    codebook = Codebook(HEADS, SIZE, DIM, affine=Affine(0.5, 0.5))
    x = offset + vectors(400)
    for part in (x[:, :100], x[:, 100:]):  # micro-batches
        codebook.add_statistics_(codebook.statistics(part, nearest_index(part, codebook.codes())))
    update_codebooks_(codebook)
    torch.testing.assert_close(codebook.batch_variance, x.double().var(1, correction=0).float(), rtol=1e-3, atol=0)
    torch.testing.assert_close(codebook.batch_mean, x.double().mean(1).float(), rtol=1e-6, atol=0)
    first = stored_codes(codebook.update, codebook.committed_state())
    torch.testing.assert_close(codebook.code_mean, first.mean(1))
    torch.testing.assert_close(codebook.code_variance, first.var(1, correction=0))
    see_(codebook, x)
    codes = stored_codes(codebook.update, codebook.committed_state())
    torch.testing.assert_close(codebook.code_mean, (first.mean(1) + codes.mean(1)) / 2)


@pytest.mark.parametrize("rule", [EMA(0.8), OwnOptimizer("sgd", learning_rate=0.1)])
def test_under_an_affine_map_the_rules_see_the_vectors_mapped_back(rule):
    codebook, x = Codebook(HEADS, SIZE, DIM, affine=Affine(0.9, 0.9), update=rule), vectors()
    see_(codebook, x)
    plain = Codebook(HEADS, SIZE, DIM, update=rule)
    for name in codebook._rule_names:
        getattr(plain, name).copy_(getattr(codebook, name))
    scale = (codebook.batch_variance / codebook.code_variance).sqrt().unsqueeze(1)
    back = (x - codebook.batch_mean.unsqueeze(1)) / scale + codebook.code_mean.unsqueeze(1)
    indices = see_(codebook, x)
    plain.add_statistics_(plain.statistics(back, indices))
    update_codebooks_(plain)
    for name in codebook._rule_names:
        torch.testing.assert_close(getattr(codebook, name), getattr(plain, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("offset", [1e3, -1e4])
def test_a_forward_tells_the_affine_variance_far_from_the_origin(offset):
    x = offset + vectors(400)[0]
    for quantizer in (VectorQuantize(DIM, SIZE, affine=Affine(0.5, 0.5)), ImplicitVQ(DIM, SIZE, MLP(4), affine=Affine(0.5, 0.5))):
        quantizer(x)
        found = quantizer.state_dict()["table.batch_variance"][0]
        torch.testing.assert_close(found, x.double().var(0, correction=0).float(), rtol=1e-3, atol=0)


def test_codes_that_stand_still_are_read_by_the_moments_of_the_vectors_and_their_weights_are_checked():
    rule = StoredEMA(follow=False, count=False)
    codebook, x = Codebook(HEADS, SIZE, DIM, affine=Affine(0.5, 0.5), update=rule), 5 + 2 * vectors()
    before = codebook.weight.clone()
    see_(codebook, x)
    torch.testing.assert_close(codebook.batch_mean, x.mean(1))
    torch.testing.assert_close(codebook.batch_variance, x.var(1, correction=0), rtol=1e-4, atol=1e-4)
    assert torch.equal(codebook.weight, before) and bool(codebook.batch_seen.all())
    weighed = Codebook(HEADS, SIZE, DIM, affine=Affine(current=True), update=rule, code_weights=lambda total, count: count[:1])
    with pytest.raises(ValueError, match=r"^code_weights has shape \(1, 6\)"):
        see_(weighed, x)


# Bad input


def test_contradictions_are_refused():
    for message, choices in [
        ("transform with update", {"transform": "linear"}),
        ("transform: what is stored", {"transform": "linear", "update": Frozen(), "init": KMeans()}),
        ("transform: what is stored", {"transform": "linear", "update": Gradient(), "dead_codes": DeadCodes(1.0)}),
        ("transform = 'cubic'", {"transform": "cubic", "update": Frozen()}),
        (r"update = Frozen\(\)", {"update": Frozen(), "dead_codes": DeadCodes(1.0)}),
        ("affine with metric", {"affine": Affine(), "metric": "cosine"}),
        ("metric = 'l1'", {"metric": "l1"}),
        ("init = 'zeros'", {"init": "zeros"}),
        ("dtype = torch.float16", {"dtype": torch.float16}),
    ]:
        with pytest.raises(ValueError, match=f"^{message}"):
            Codebook(HEADS, SIZE, DIM, **choices)
    with pytest.raises(ValueError, match=r"^codebook_size = 0"):
        Codebook(HEADS, 0, DIM)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EMA(1.0), "EMA.decay = 1.0: must be at least 0 and below 1"),
        (lambda: EMA(eps=-1.0), "EMA.eps = -1.0"),
        (lambda: ClipEMA(floor=0.0), "ClipEMA.floor = 0.0: must be positive"),
        (lambda: OwnOptimizer("lbfgs"), "OwnOptimizer.name = 'lbfgs': must be one of 'adam', 'sgd'"),
        (lambda: OwnOptimizer(learning_rate=0.0), "OwnOptimizer.learning_rate = 0.0"),
        (lambda: KMeans(0), "KMeans.iterations = 0"),
        (lambda: DeadCodes(0.0), "DeadCodes.threshold = 0.0"),
        (lambda: DeadCodes(2.0, 1.0), "DeadCodes.reset_count = 1.0: must be None or at least the threshold"),
        (lambda: MLP(0), "MLP.hidden = 0"),
        (lambda: Affine(1.5), "Affine.batch_decay = 1.5"),
    ],
)
def test_choices_name_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make()


def test_calls_that_raise_change_nothing():
    codebook, x = Codebook(HEADS, SIZE, DIM, update=Gradient(), transform="linear"), vectors()
    before, statistics = snapshot(codebook), codebook.statistics(x, nearest_index(x, codebook.codebook.detach()))
    for message, call in [
        ("codebook is the transform", lambda: setattr(codebook, "codebook", torch.zeros(HEADS, SIZE, DIM))),
        (r"codebook has shape \(3,\)", lambda: setattr(codebook, "codebook", torch.zeros(3))),
        ("initialize_: the codes are a transform", lambda: codebook.initialize_(x)),
        ("statistics.keys has shape", lambda: codebook.add_statistics_(statistics._replace(keys=torch.zeros(3)))),
        ("expire_: needs", lambda: codebook.expire_(x, threshold=1.0)),
    ]:
        with pytest.raises(ValueError, match=f"^{message}"):
            call()
    with pytest.raises(ValueError, match="frozen = False"):
        Codebook(HEADS, SIZE, DIM, update=Frozen()).frozen = False
    after = snapshot(codebook)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_frozen_parameter_gets_no_gradient_and_a_live_one_keeps_it_beside_replaced_codes():
    codebook, x = Codebook(HEADS, SIZE, DIM, update=Gradient(0.5), dead_codes=DeadCodes(0.9, reset_count=1.0)), vectors()
    codebook.auto = True
    indices = nearest_index(x, codebook.codes().detach())
    used = torch.zeros(HEADS, SIZE, dtype=torch.bool).scatter(1, indices.where(indices < 3, 0), True)
    codebook.replace_statistics_(codebook.statistics(x, indices.where(indices < 3, 0)))
    codebook.codes().sum().backward()  # of the value after the commit
    assert not used.all() and torch.equal(codebook.weight.grad.any(-1), used)
    codebook.frozen = True
    assert not codebook.codes().requires_grad
