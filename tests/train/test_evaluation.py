"""Evaluation: every byte counted once with the state carried, codes counted by an oracle, nothing changed; the worth of context."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tiny_runs import tiny_config, with_codebook, write_texts
from vqkit.data import Split, pack, sequences
from vqkit.models import TransformerVQ
from vqkit.train.code_use import code_use
from vqkit.train.evaluation import context_ablation, evaluate


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    pack(tiny_config(write_texts(folder / "texts")).data, folder / "data")
    return Split(folder / "data", "validation")


@pytest.fixture
def model():
    """float64, so that ways to compute the same differ by rounding alone."""
    return TransformerVQ(with_codebook(tiny_config(Path()), init="normal").model).double()


def whole(model, split, segments=True):
    """One call over everything: negative log-likelihood of each target, and the codes of each unit."""
    targets = torch.from_numpy(split.tokens.astype("int64"))[None]
    tokens = torch.cat([torch.ones(1, 1, dtype=torch.int64), targets[:, :-1]], 1)
    documents = torch.cumsum(tokens[:, 1:] == 1, 1)
    documents = torch.cat([torch.zeros(1, 1, dtype=torch.int64), documents], 1)
    with torch.no_grad():
        output = model.eval()(tokens, segments=documents if segments else None, statistics=True)
    return tokens, targets, documents, F.cross_entropy(output.logits[0], targets[0], reduction="none"), output.statistics


@pytest.mark.parametrize("segments", [True, False])
@pytest.mark.parametrize("chunk_len", [8, 24, 4096])
def test_one_lane_is_one_long_call(model, split, chunk_len, segments):
    _, targets, _, nats, statistics = whole(model, split, segments)
    evaluation = evaluate(model, split, batch_size=1, chunk_len=chunk_len, segments=segments)
    assert evaluation.nats == pytest.approx(nats.sum().item(), rel=1e-9)
    assert (evaluation.num_tokens, evaluation.num_bytes) == (split.num_tokens, split.num_bytes)
    assert evaluation.bits == pytest.approx(nats.sum().item() / math.log(2) / int((targets >= 3).sum()), rel=1e-9)
    for counts, unit in zip(evaluation.code_counts, statistics, strict=True):
        assert torch.equal(torch.tensor(counts), unit.count.long())


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
@pytest.mark.parametrize("chunk_len", [5, 32])
def test_every_byte_is_counted_once(model, split, batch_size, chunk_len):
    evaluation = evaluate(model, split, batch_size=batch_size, chunk_len=chunk_len)
    assert (evaluation.num_tokens, evaluation.num_bytes) == (split.num_tokens, split.num_bytes)
    assert all(sum(head) == split.num_tokens for unit in evaluation.code_counts for head in unit)


@pytest.mark.parametrize("chunk_len", [5, 32])
def test_sequences_are_read_each_from_a_fresh_state(model, split, chunk_len):
    evaluation = evaluate(model, split, batch_size=3, chunk_len=chunk_len, sequence_len=16)
    nats = 0.0
    with torch.no_grad():
        for batch in sequences(split, 16, 1):
            output = model.eval()(batch.tokens, segments=batch.segment_ids, mask=batch.loss_mask)
            nats += (F.cross_entropy(output.logits[0], batch.targets[0], reduction="none") * batch.loss_mask[0]).sum().item()
    assert evaluation.nats == pytest.approx(nats, rel=1e-6)
    assert (evaluation.num_tokens, evaluation.num_bytes) == (split.num_tokens, split.num_bytes)
    assert evaluation.nats != pytest.approx(evaluate(model, split, batch_size=1, chunk_len=chunk_len).nats, rel=1e-4)


def test_a_part_is_read_when_asked_for(model, split):
    part = evaluate(model, split, batch_size=2, chunk_len=16, max_tokens=100)
    assert part.num_tokens == 96
    assert evaluate(model, split, batch_size=2, chunk_len=16, max_tokens=1).num_tokens == 32
    assert evaluate(model, split, batch_size=2, chunk_len=16, max_tokens=10**9).num_tokens == split.num_tokens


@pytest.mark.parametrize("mode", [True, False])
def test_nothing_is_changed(split, mode):
    model = TransformerVQ(with_codebook(tiny_config(Path()), init="normal").model).train(mode)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    evaluate(model, split, batch_size=2, chunk_len=32)
    context_ablation(model, split, batch_size=2, chunk_len=32)
    assert model.training is mode
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model(torch.full((1, 4), 7)).logits.sum().backward()  # nothing was left that gradients cannot pass


@pytest.mark.parametrize("context", [1, 4])
def test_context_is_cut_to_the_last_tokens(model, split, context):
    """Against a model run by hand on each window; the full figure is that of the very same bytes."""
    tokens, targets, documents, nats, _ = whole(model, split)
    stride, chunk_len = split.num_tokens // 40, 32
    at = [t for t in range(split.num_tokens) if t % stride == 0 and t % chunk_len >= context - 1 and targets[0, t] >= 3]
    cut = 0.0
    for t in at:
        window = slice(t - context + 1, t + 1)
        with torch.no_grad():
            logits = model(tokens[:, window], segments=documents[:, window]).logits
        cut += F.cross_entropy(logits[0, -1:], targets[0, t : t + 1]).item()
    ablation = context_ablation(model, split, context=context, positions=40, batch_size=1, chunk_len=chunk_len)
    assert ablation.num_positions == len(at) > 20
    assert ablation.cut_bits == pytest.approx(cut / len(at) / math.log(2), rel=1e-9)
    assert ablation.full_bits == pytest.approx(nats[at].mean().item() / math.log(2), rel=1e-9)
    assert ablation.full_bits != ablation.cut_bits


def test_bad_input_is_refused(model, split, tmp_path):
    with pytest.raises(ValueError, match=r"context = 33.*chunk_len = 32"):
        context_ablation(model, split, context=33, chunk_len=32)
    config = tiny_config(write_texts(tmp_path / "texts")).data
    pack(type(config)(path=config.path, sequence_len=32, test_fraction=0.0), tmp_path / "data")
    with pytest.raises(ValueError, match="test split is empty"):
        evaluate(model, Split(tmp_path / "data", "test"))


@pytest.mark.parametrize(
    ("counts", "active", "perplexity"),
    [
        ([5, 5, 5, 5], 1.0, 4.0),
        ([20, 0, 0, 0], 0.25, 1.0),
        ([39, 1, 0, 0], 0.5, math.exp(-0.975 * math.log(0.975) - 0.025 * math.log(0.025))),  # 1 of 40 is the bound itself
        ([40, 1, 0, 0], 0.25, math.exp(-40 / 41 * math.log(40 / 41) + math.log(41) / 41)),
        ([0, 0, 0, 0], 0.0, 0.0),
    ],
)
def test_code_use(counts, active, perplexity):
    use = code_use(torch.tensor([counts, [1, 1, 0, 0]]))
    assert use.active.tolist() == pytest.approx([active, 0.5])
    assert use.perplexity.tolist() == pytest.approx([perplexity, 2.0])
