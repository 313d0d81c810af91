"""One step: the loss as the official code averages it, micro-batches as the whole batch, the state carried, codebooks once."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny_steps import FORMS, assert_same_course, course, model_config, new_model, random_batch
from vqkit.data import Batch
from vqkit.models import TransformerVQ
from vqkit.train.config import TrainConfig
from vqkit.train.initialization import initialize_codebooks_
from vqkit.train.optimizer import Optimizer
from vqkit.train.state import from_named_tensors, join_rows, named_tensors, split_rows
from vqkit.train.step import composite_loss, train_step


@settings(max_examples=10)
@given(st.integers(0, 1000), st.floats(0.0, 1.0))
def test_loss_is_a_mean_over_all_positions(seed, weight):
    batch, model = random_batch(seed=seed), new_model()
    output = model(batch.tokens, segments=batch.segment_ids, mask=batch.loss_mask)
    losses = composite_loss(output, batch, TrainConfig(commitment_weight=weight))
    log_probabilities = output.logits.detach().log_softmax(-1)
    total = sum(
        -log_probabilities[row, time, batch.targets[row, time]] for row in range(4) for time in range(12) if batch.loss_mask[row, time]
    )
    assert losses.language.item() == pytest.approx(float(total) / 48)
    assert losses.total.item() == pytest.approx((losses.language + weight * output.commitment).item())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("segments", [True, False])
def test_micro_batches_are_the_whole_batch(form, segments):
    """Masks that hold for a sequence included; ordinary attention draws more of them as it meets larger distances."""
    assert_same_course(*(course(form, micro_batches=count, segments=segments) for count in (1, 2, 4)))


@pytest.mark.parametrize("form", FORMS)
def test_recomputation_changes_nothing(form):
    """With all four dropouts on, those drawn for each position too."""
    noise = {"embedding_dropout": 0.2, "residual_dropout": 0.3}
    assert_same_course(*(course(form, micro_batches=2, recompute=recompute, **noise) for recompute in (False, True)))


def test_the_state_is_carried_and_without_gradient():
    """With nothing learned between them, the parts of a sequence have the losses of the whole; anew they have not."""
    batch, frozen = random_batch(), TrainConfig(batch_size=4, warmup_steps=10, commitment_weight=0.0)

    def losses(length, carry):
        total, model = 0.0, new_model(decay=1 - 1e-15)
        optimizer = Optimizer(model.named_parameters(), frozen)
        state = model.initial_state(4)
        for start in range(0, 12, length):
            result = train_step(model, optimizer, Batch(*(field[:, start : start + length] for field in batch)), state, 0)
            assert not any(tensor.requires_grad for tensor in named_tensors(result.state, "state").values())
            state = result.state if carry else model.initial_state(4)
            total += result.losses.language.item() * length / 12
        return total

    assert losses(4, carry=True) == pytest.approx(losses(12, carry=True), rel=1e-9)
    assert losses(4, carry=False) != pytest.approx(losses(12, carry=True), rel=1e-4)


def test_codebooks_are_updated_once_a_step_and_masked_positions_count_nowhere():
    model = new_model()
    optimizer = Optimizer(model.named_parameters(), TrainConfig(batch_size=4, micro_batches=2))
    batch = random_batch()
    result = train_step(model, optimizer, batch, model.initial_state(4), 0)
    assert [int(quantizer.updates) for quantizer in model.quantizers()] == [1, 1]
    assert all(counts.sum(-1).tolist() == [int(batch.loss_mask.sum())] * 2 for counts in result.code_counts)
    assert all(not tensor.any() for quantizer in model.quantizers() for tensor in quantizer.pending)


def test_clipping_leaves_codebooks_out():
    """However short the step of the parameters, that of the codebooks is the same."""
    steps = []
    for clip in (None, 1e-6):
        model, batch = new_model(), random_batch()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        optimizer = Optimizer(model.named_parameters(), TrainConfig(batch_size=4, clip=clip, warmup_steps=0, eps=1.0))
        result = train_step(model, optimizer, batch, model.initial_state(4), 0)
        assert result.gradient_norm > 0.01
        steps.append({name: tensor.double() - before[name].double() for name, tensor in model.state_dict().items()})
    for name, free in steps[0].items():
        if ".quantizer." in name:
            assert torch.equal(steps[1][name], free), name
        elif name.endswith("weight"):
            assert steps[1][name].abs().max() < 1e-4 * free.abs().max(), name


def test_kmeans_start_sets_every_unit_from_its_own_keys():
    model = new_model(init="kmeans")
    batch = random_batch()
    with pytest.raises(ValueError, match="k-means"):
        model(batch.tokens)
    initialize_codebooks_(model, batch)
    output = model(batch.tokens, segments=batch.segment_ids, mask=batch.loss_mask, statistics=True)
    random = new_model()(batch.tokens, segments=batch.segment_ids, mask=batch.loss_mask)
    assert output.commitment < 0.7 * random.commitment
    for quantizer, statistics in zip(model.quantizers(), output.statistics, strict=True):
        # Codes are the means of their keys: what k-means was run on is what the forward quantizes.
        used = statistics.count > 0
        means = statistics.sum / statistics.count.clamp(min=1).unsqueeze(-1)
        assert (quantizer.codebook - means)[used].abs().median() < 0.05
        assert used.double().mean() > 0.9
    assert not any(unit._forward_pre_hooks for unit in model.units())


def test_a_state_comes_back_from_its_rows_and_its_names():
    batch = random_batch()
    for model in (new_model(), *map(TransformerVQ, FORMS.values())):
        state = model(batch.tokens).state
        tensors = named_tensors(state, "state")
        for back in (join_rows(split_rows(state, 2)), from_named_tensors(model.initial_state(4), tensors, "state")):
            assert type(back) is type(state)
            assert (back.masks is None) == (state.masks is None) == (model.config.layer_dropout == 0.0)
            assert named_tensors(back, "state").keys() == tensors.keys()
            for name, tensor in tensors.items():
                assert torch.equal(named_tensors(back, "state")[name], tensor), name
    model = new_model()
    state = model(batch.tokens).state
    tensors = named_tensors(state, "state")
    with pytest.raises(ValueError, match=r"state\.position"):
        from_named_tensors(model.initial_state(3), tensors, "state")
    del tensors["state.attention.1.mean"]
    with pytest.raises(ValueError, match=r"state\.attention\.1\.mean'.*missing"):
        from_named_tensors(model.initial_state(4), tensors, "state")


def test_nothing_predicts_random_bytes():
    """The loss of a fresh model is near that of guessing, so no target leaks into its own input."""
    model = TransformerVQ(model_config())
    batch = random_batch(rows=8, length=64)
    output = model(batch.tokens)
    assert composite_loss(output, batch, TrainConfig()).language.item() > 0.9 * math.log(256)
