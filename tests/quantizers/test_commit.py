"""Laws of the places where codebooks change: every rank takes part, in one sum, and a refused step changes nothing."""

import copy
import gc
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as torch_dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from plain_quantizer import Plain
from states import assert_same, snapshot
from thread_ranks import in_ranks
from vqkit.quantizers import (
    EMA,
    Affine,
    Codebook,
    DeadCodes,
    Gradient,
    KMeans,
    OwnOptimizer,
    ResidualVQ,
    VectorQuantize,
    add_statistics_,
    attach,
    register_fsdp_methods,
    synchronize_codebooks_,
    update_codebooks_,
)
from vqkit.quantizers.committed import Committed
from vqkit.quantizers.update import stored_codes

CHOICES = {
    "ema": {"update": EMA(0.5)},
    "expiry": {"update": EMA(0.5), "dead_codes": DeadCodes(1.0)},
    "adam": {"update": OwnOptimizer(learning_rate=0.1)},
    "affine": {"affine": Affine()},
    "gradient": {"update": Gradient()},
}


class Pair(nn.Module):
    """Two quantizers behind a layer."""

    def __init__(self, commit="manual", **choices):
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        self.first = Plain(commit=commit, **choices)
        self.second = Plain(size=11, commit=commit, **choices)

    def forward(self, x, mask=None):
        one = self.first(self.layer(x), mask)
        two = self.second(one.quantized + x, mask)
        return two.quantized, one.loss + two.loss


def batch(step, rows=12):
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(step))


class Counting:
    """A reducer of one of two ranks, the other of which saw nothing; counts its sums."""

    world_size = 2

    def __init__(self, rank):
        self.rank, self.sums = rank, 0

    def all_reduce_(self, flat):
        assert flat.dim() == 1 and flat.is_contiguous()
        self.sums += 1


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("shares", [(12, 12), (0, 24), (5, 1, 18)])
def test_several_ranks_are_one(name, shares):
    torch.manual_seed(1)
    one = Pair(**CHOICES[name])
    ranks = [copy.deepcopy(one) for _ in shares]
    for step in range(2):
        x = batch(step, 24)
        one(x)
        for rank, share in zip(ranks, x.split(shares), strict=True):
            rank(share[: len(share) // 2])
            rank(share[len(share) // 2 :], torch.ones(len(share) - len(share) // 2, dtype=torch.bool))
        update_codebooks_(one)
        in_ranks(len(shares), lambda reducer: update_codebooks_(ranks[reducer.rank], reducer))
        for rank in ranks[1:]:
            assert_same(snapshot(rank), snapshot(ranks[0]))
        if name == "expiry":
            torch.testing.assert_close(ranks[0].first.table.count, one.first.table.count)
            break  # other vectors of the batch in the place of dead codes
        assert_same(snapshot(ranks[0]), snapshot(one), rtol=1e-5, atol=1e-5)
        assert ranks[1].second.metrics() == pytest.approx(one.second.metrics(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", CHOICES)
def test_automatic_commits_sum_over_the_ranks_in_the_forward(name):
    torch.manual_seed(1)
    one = Plain(**CHOICES[name])
    ranks = [copy.deepcopy(one) for _ in range(3)]

    def work(reducer):
        module = ranks[reducer.rank]
        module.reducer = reducer
        for step in range(3):
            if reducer.rank == 1 and step == 1:
                module.eval().train()  # committing early, on one rank alone
            module(batch(step, 24).split([4, 0, 20])[reducer.rank])
        return snapshot(module)

    states = in_ranks(3, work)
    for state in states[1:]:
        assert_same(state, states[0])
    for step in range(3):
        one(batch(step, 24))
    found, expected = states[0], snapshot(one)
    if name == "expiry":
        for state in (found, expected):
            state.pop("table.sum"), state.pop("table.count")
    assert_same(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:update_codebooks_. nothing was counted")
def test_one_sum_for_the_codebooks_of_a_model_whatever_a_rank_saw():
    model = Pair(dead_codes=DeadCodes(1.0))
    for _ in range(2):
        reducer = Counting(0)
        update_codebooks_(model, reducer)
        assert reducer.sums == 1
        model(batch(0))


@pytest.mark.parametrize("rule", [EMA(0.9), Gradient(0.9)])
def test_an_update_of_nothing_warns_and_says_what_to_do(rule):
    model = Plain(commit="manual", update=rule)
    said = "nothing was counted since the last update, .* after forwards in training mode; .* after add_statistics_"
    with pytest.warns(UserWarning, match=said) as caught:
        update_codebooks_(model)  # before any forward
    assert caught[0].filename == __file__
    model(batch(0))
    update_codebooks_(model)
    with pytest.warns(UserWarning, match=said):
        update_codebooks_(model)  # twice a step
    model.eval()(batch(0))
    with pytest.warns(UserWarning, match=said):
        update_codebooks_(model)  # of a model that does not learn
    model.train()(batch(0)[:0])  # no vector, but a step of the loop
    update_codebooks_(model)
    torch.compile(model, backend="eager")(batch(0))
    update_codebooks_(model)


@pytest.mark.parametrize("commit", ["auto", "manual"])
def test_a_kmeans_start_by_itself_is_that_of_all_ranks(commit):
    ranks = [Plain(commit=commit, init=KMeans()) for _ in range(3)]

    def work(reducer):
        module = ranks[reducer.rank]
        module.reducer = reducer
        module(torch.full((4, 4), torch.nan))  # nobody has a vector: all wait
        waiting = not module.table.initialized
        module(batch(0, 24).split([20, 0, 4])[reducer.rank])
        return waiting and module.table.initialized, snapshot(module)

    results = in_ranks(3, work)
    for ready, state in results:
        assert ready
        for name in ("table.sum", "table.count"):
            assert torch.equal(state[name], results[0][1][name])


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_sums_nothing(reentrant):
    model, reducer = Plain(), Counting(0)
    model.reducer = reducer
    x = batch(0).requires_grad_()
    checkpoint(lambda x: model(x).quantized, x, use_reentrant=reentrant).sum().backward()
    assert x.grad is not None and reducer.sums == 1


def test_ranks_start_from_the_first():
    ranks = [Pair(**CHOICES["adam"]) for _ in range(3)]
    expected = snapshot(ranks[0].first)
    ranks[0].first.table.updates.fill_(2**40)
    in_ranks(3, lambda reducer: synchronize_codebooks_(ranks[reducer.rank], reducer))
    for rank in ranks:
        found = snapshot(rank.first)
        assert found.pop("table.updates") == 2**40
        assert_same(found, {name: value for name, value in expected.items() if name != "table.updates"})


def test_what_ranks_saw_apart_does_not_part_them_again():
    ranks = [Plain(**CHOICES["ema"]) for _ in range(3)]
    for number, rank in enumerate(ranks):
        rank(batch(number))  # pending, before there are several ranks
    expected = snapshot(ranks[0])
    in_ranks(3, lambda reducer: synchronize_codebooks_(ranks[reducer.rank], reducer))
    for rank in ranks:
        assert_same(snapshot(rank), expected)
        assert_same(snapshot(rank.eval()), expected)


@pytest.mark.parametrize("started", [0, 1])
def test_codebooks_wait_for_their_start_as_that_of_the_first_rank_does(started):
    ranks = [Plain(init=KMeans()) for _ in range(2)]
    ranks[started].table.initialize_(batch(0)[None])
    in_ranks(2, lambda reducer: synchronize_codebooks_(ranks[reducer.rank], reducer))
    assert [rank.table.initialized for rank in ranks] == [started == 0] * 2


# Other people's loops


def step_(model, optimizer, x, scaler=None):
    optimizer.zero_grad()
    quantized, loss = model(x)
    total = quantized.square().sum() + loss
    if scaler is None:
        total.backward()
        optimizer.step()
    else:
        scaler.scale(total).backward()
        scaler.step(optimizer)
        scaler.update()


def test_attached_is_committed_after_every_step():
    for micro_batches in (1, 3):
        torch.manual_seed(1)
        attached = Pair(commit="auto")
        attached.first(batch(9))  # what an automatic commit left counts
        by_hand = copy.deepcopy(attached)
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (attached, by_hand)]
        handle = attach(attached, optimizers[0])
        assert attached.first.commit == attached.second.commit == "manual" and not attached.first.table.auto
        by_hand.first.commit = by_hand.second.commit = "manual"
        for step in range(3):
            for number in range(micro_batches - 1):
                for model in (attached, by_hand):
                    model(batch(100 + number))
            for model, optimizer in zip((attached, by_hand), optimizers, strict=True):
                step_(model, optimizer, batch(step))
            update_codebooks_(by_hand)
            assert_same(snapshot(attached), snapshot(by_hand))
        assert attached.second.table.updates == 3
        handle.remove()
        step_(attached, optimizers[0], batch(5))
        assert attached.second.table.updates == 3 and attached.second.table.pending.count.any()


def test_one_optimizer_alone_commits():
    """A model that two optimizers train, as in a GAN: attached to one, it is committed once a round; to both, it is refused."""
    model = Pair(commit="auto")
    generator, other = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    handle = attach(model, generator)
    before = snapshot(model)
    whole = nn.ModuleList([model, Pair(commit="auto")])
    for part, optimizer in ((model, generator), (model, other), (model.first, other), (whole, other)):
        with pytest.raises(ValueError, match=r"^model: an optimizer commits its codebooks already"):
            attach(part, optimizer)
    assert whole[1].first.commit == "auto"
    assert_same(snapshot(model), before)
    step_(model, generator, batch(0))
    step_(model, other, batch(1))
    assert model.first.table.updates == 1
    step_(model, generator, batch(2))
    assert model.first.table.updates == 2
    attach(whole[1], other)  # another model is free
    attach(copy.deepcopy(model), other)
    handle.remove()
    second = attach(model, other)
    step_(model, other, batch(3))
    assert model.first.table.updates == 3
    del other, second, optimizer
    gc.collect()
    attach(model, generator)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_a_step_that_the_scaler_skips_commits_nothing(fused, named):
    model = Pair()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    attach(model, optimizer, scaler=scaler if named else None)
    step_(model, optimizer, batch(0), scaler)
    assert model.first.table.updates == 1
    before = {name: value for name, value in snapshot(model).items() if "pending" not in name}
    hook = model.layer.weight.register_hook(lambda gradient: gradient * torch.inf)
    step_(model, optimizer, batch(1), scaler)
    hook.remove()
    assert_same({name: value for name, value in snapshot(model).items() if "pending" not in name}, before)
    waits = not (fused or named)  # an optimizer that is not called cannot say that it dropped a step
    assert model.first.table.pending.count.any() == waits
    expected = copy.deepcopy(model)
    for quantizer in (expected.first, expected.second):
        quantizer.table.discard_pending_()
    if waits:
        expected(batch(1))
    expected(batch(2))
    step_(model, optimizer, batch(2), scaler)
    update_codebooks_(expected)
    assert model.first.table.updates == 2 and model.first.clock.updates == 2
    assert_same(snapshot(model.first), snapshot(expected.first))


def test_a_scaler_is_watched_for_its_optimizer_alone_and_as_long_as_attached():
    model = Pair()
    optimizer, other = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    handle = attach(model, optimizer, scaler=scaler)
    model.layer.weight.register_hook(lambda gradient: gradient * torch.inf)
    step_(model, other, batch(0), scaler)
    assert model.first.table.pending.count.any()
    step_(model, optimizer, batch(0), scaler)
    assert not model.first.table.pending.count.any()
    handle.remove()
    step_(model, optimizer, batch(0), scaler)
    assert model.first.table.pending.count.any() and model.first.table.updates == 0


def test_one_rank_whose_step_is_skipped_skips_for_all():
    models = [Pair() for _ in range(2)]
    before = [snapshot(model.first) for model in models]

    def work(reducer):
        model = models[reducer.rank]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        attach(model, optimizer, scaler=scaler, reducer=reducer)
        if reducer.rank:
            model.layer.weight.register_hook(lambda gradient: gradient * torch.inf)
        step_(model, optimizer, batch(0), scaler)
        return snapshot(model.first)

    for state in in_ranks(2, work):
        assert_same(state, before[0])


def test_one_rank_whose_gradients_overflowed_refuses_for_all():
    models = [Pair() for _ in range(2)]
    before = [snapshot(model.first) for model in models]

    def work(reducer):
        model = models[reducer.rank]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
        attach(model, optimizer, reducer=reducer)
        model(batch(0))
        optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.tensor(float(reducer.rank))
        optimizer.step()
        return snapshot(model.first)

    for state in in_ranks(2, work):
        assert_same(state, before[0])


def test_the_hook_does_not_keep_the_model():
    model = Pair()
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    attach(model, optimizer)
    del model
    gc.collect()
    optimizer.step()


def test_registering_for_fsdp_leaves_a_model_that_is_not_sharded_alone():
    model = Pair()
    register_fsdp_methods(model)
    assert "encode" not in vars(model.first)


# Processes


def test_two_processes(tmp_path):
    """All laws of two gloo processes in one spawn; a rank that fails ends the other and raises here."""
    mp.spawn(on_rank, args=(tmp_path,), nprocs=2)


def on_rank(rank, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # of the compiler, about itself
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch_dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2, timeout=timedelta(seconds=600))
    for name in ("expiry", "gradient"):
        start_equal_when_compiled_from_the_first_forward(rank, CHOICES[name])
    refuse_to_replace_sharded_codes(rank)
    hand_out_no_views_where_sharded(rank)
    torch_dist.destroy_process_group()


def assert_equal_on_both(tensor):
    total = tensor.detach().clone()
    torch_dist.all_reduce(total)
    assert torch.equal(total, 2 * tensor)


def start_equal_when_compiled_from_the_first_forward(rank, choices):
    torch.manual_seed(rank)
    torch._dynamo.reset()
    model = Plain(**choices)
    first = model.table.codebook.detach().clone()
    torch_dist.broadcast(first, 0)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(torch.zeros(0, 4)).quantized, torch.zeros(0, 4))
    torch.testing.assert_close(stored_codes(model.table.update, model.table.committed_state()), first)
    for step in range(2):
        run(batch(10 * step + rank))
        assert_equal_on_both(model.table.codebook)


def refuse_to_replace_sharded_codes(rank):
    """Under FSDP2, whichever the commit; codes that are left whole are replaced."""
    choices = {"update": Gradient(0.5), "dead_codes": DeadCodes(1.0)}

    def learn(model):
        out = model(batch(rank))
        (out.quantized.sum() + out.loss).backward()
        update_codebooks_(model)

    for commit in ("auto", "manual"):
        model = nn.Sequential(nn.Linear(4, 4), Plain(commit=commit, **choices))
        fully_shard(model)
        with pytest.raises(ValueError, match="dead_codes: the codes are a sharded parameter"):
            learn(model)
    quantizer = Plain(commit="manual", **choices)
    synchronize_codebooks_(quantizer)
    model = nn.Sequential(nn.Linear(4, 4), quantizer)
    fully_shard(model, ignored_params={quantizer.table.weight})
    before = quantizer.table.codebook.detach().clone()
    for step in range(6):
        model(100 + batch(10 * step + rank))
        update_codebooks_(model)
    assert not torch.equal(quantizer.table.codebook, before)
    assert_equal_on_both(quantizer.table.codebook)


def hand_out_no_views_where_sharded(rank):
    """FSDP2 warns of outputs that are views of others, and warnings are errors."""
    choices = [{"layout": "first"}, {"update": Gradient()}, {"layout": "first", "heads": 2, "codebook_dim": 6}]
    for make in (VectorQuantize, lambda *sizes, **options: ResidualVQ(*sizes, num_quantizers=2, **options)):
        for options in choices:
            model = make(4, 8, commit="manual", **options)
            fully_shard(model)
            x = torch.randn(3, 4, 4, requires_grad=True)
            out = model(x)
            (out.quantized.sum() + out.loss).backward()
            register_fsdp_methods(model)
            found = model.quantize(x)
            assert torch.equal(found.quantized, out.quantized) and found.quantized.stride() == out.quantized.stride()
            assert torch.equal(model.encode(x), out.indices)
            for vectors in (model.decode(out.indices), model.decode_codes(out.indices)):
                assert vectors._base is None


# A clock without codes


def test_a_clock_counts_the_commits():
    module = Plain()
    for step in range(3):
        assert module.clock.commits == step
        module(batch(step))
    assert module.eval().clock.updates == 3
    alone = Committed()
    update_codebooks_(alone)
    assert alone.commits == alone.updates == 1


# Bad input


def test_statistics_that_do_not_fit_are_refused_whole():
    model = Pair()
    out = [part.quantize(batch(0)).statistics for part in (model.first, model.second)]
    before = snapshot(model)
    for message, entries in [
        ("statistics has 1 entries: must be 2", out[:1]),
        (r"statistics.count has shape \(1, 11\)", [out[0], out[1]][::-1]),
        (r"statistics.count has shape \(1, 8\)", [out[0], [out[0]]]),
    ]:
        with pytest.raises(ValueError, match=f"^{message}"):
            add_statistics_(model, entries)
    assert_same(snapshot(model), before)
    add_statistics_(model, [None, [out[1]]])
    assert not model.first.table.pending.count.any() and model.second.table.pending.count.any()


def test_codebooks_that_commit_by_themselves_are_not_committed_by_hand():
    model = Pair(commit="auto")
    model(batch(0))
    before = snapshot(model)
    with pytest.raises(ValueError, match='commit = "auto"'):
        update_codebooks_(model)
    assert_same(snapshot(model), before)
    assert isinstance(model.first.table, Codebook)


def test_attach_wants_a_model_with_quantizers():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(TypeError, match="model is a SGD: must be a module, and the optimizer the second argument"):
        attach(optimizer, model)
    with pytest.raises(ValueError, match="model is a Linear without a quantizer"):
        attach(model, optimizer)
