"""Dropout of the model: its noise comes from the global generator, or is given; what lives as long as a sequence is carried."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_models import random_tokens, tiny_model
from vqkit.models.config import ModelConfig
from vqkit.models.dropout import DropoutMasks, SequenceMasks, draw_keep, drop
from vqkit.models.transformer import ModelState, TransformerVQ

RATES: dict[str, Any] = {"embedding_dropout": 0.2, "residual_dropout": 0.4, "sinusoid_dropout": 0.3, "layer_dropout": 0.35}
FORMS: list[dict[str, Any]] = [
    {"layers": 2},
    {"layers": 2, "layer": "feed_forward", "heads": 2, "key_heads": 1},
    {"layers": 2, "layer": "feed_forward", "attention": "full"},
]


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def dropping_model(**options: Any) -> TransformerVQ:
    return tiny_model(**{**RATES, **options}).train()


def random_masks(model: TransformerVQ, batch: int, time: int) -> DropoutMasks:
    config = model.config
    shape, device = (batch, time, config.dim), torch.device("cpu")
    residual = (draw_keep(*shape, rate=config.residual_dropout, device=device) for _ in model.units())
    return DropoutMasks(draw_keep(*shape, rate=config.embedding_dropout, device=device), tuple(residual))


def part_of(masks: DropoutMasks, start: int, stop: int) -> DropoutMasks:
    assert masks.embedding is not None
    return DropoutMasks(masks.embedding[:, start:stop], tuple(mask[:, start:stop] for mask in masks.residual))


def test_drop_keeps_the_mean() -> None:
    x = torch.ones(200, 100, dtype=torch.float64)
    for keep in (None, draw_keep(200, 100, rate=0.25, device=x.device)):
        dropped = drop(x, 0.25, keep)
        assert set(dropped.unique().tolist()) == {0.0, 1 / 0.75}
        assert abs(dropped.mean().item() - 1.0) < 0.02
    assert drop(x, 0.0) is x


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_same_seed_repeats_and_evaluation_drops_nothing(form: dict[str, Any]) -> None:
    model, tokens = dropping_model(**form), random_tokens(2, 9)

    def seeded(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(tokens).logits

    close(seeded(0), seeded(0))
    assert (seeded(0) - seeded(1)).abs().max() > 1e-3
    model.eval()
    generator = torch.random.get_rng_state()
    out = model(tokens)
    assert out.state.masks is None and model.initial_state(2).masks is None
    assert torch.equal(torch.random.get_rng_state(), generator)
    close(out.logits, tiny_model(**form)(tokens).logits)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("rate", RATES)
def test_every_rate_drops_something(form: dict[str, Any], rate: str) -> None:
    tokens, plain = random_tokens(4, 9), tiny_model(**form)
    model = tiny_model(**form, **{rate: 0.5}).train()
    assert (model(tokens).logits - plain(tokens).logits).abs().max() > 1e-3


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_calls_with_carried_masks_equal_one_call(form: dict[str, Any]) -> None:
    model, tokens = dropping_model(**form), random_tokens(3, 20)
    masks, state = random_masks(model, 3, 20), model.initial_state(3)
    if model.config.attention == "full":  # as many distances as the whole has, drawn before
        state = state._replace(masks=model.sequence_masks(state, 3, 20))
    whole = model(tokens, state, dropout=masks)
    logits = []
    for start in range(0, 20, 4):
        out = model(tokens[:, start : start + 4], state, dropout=part_of(masks, start, start + 4))
        state = out.state
        logits.append(out.logits)
    close(torch.cat(logits, 1), whole.logits)
    close(state.masks, whole.state.masks)


def test_distances_that_ordinary_attention_meets_later_are_drawn_then() -> None:
    model, tokens = dropping_model(attention="full"), random_tokens(2, 12)
    state = model.initial_state(2)
    assert state.masks is not None and [m.shape for m in state.masks.sinusoid] == [(0, 8)] * 2
    first = model(tokens[:, :5], state).state.masks
    second = model(tokens[:, 5:], model(tokens[:, :5], state._replace(masks=first)).state).state.masks
    assert first is not None and second is not None
    assert [m.shape for m in second.sinusoid] == [(12, 8)] * 2
    assert all(torch.equal(long[:5], short) for long, short in zip(second.sinusoid, first.sinusoid, strict=True))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_batch_element_that_skips_all_layers_is_its_embedding(form: dict[str, Any]) -> None:
    model, tokens = tiny_model(**form, layer_dropout=0.5).train(), random_tokens(2, 7)
    skipping = tuple(torch.tensor([False, True]) for _ in range(4))
    state = model.initial_state(2)._replace(masks=SequenceMasks((), skipping))
    logits = model(tokens, state).logits
    assert model.embedding is not None and model.positions is not None and model.norm is not None
    embedded = model.embedding(tokens) + model.positions(torch.arange(7))
    close(logits[:1], model.logits(model.norm(embedded))[:1])
    assert (logits[1:] - model.logits(model.norm(embedded))[1:]).abs().max() > 1e-3


def test_masks_of_a_sequence_are_drawn_at_their_rates() -> None:
    model = tiny_model(dim=64, mem_len=40, layers=3, sinusoid_dropout=0.2, layer_dropout=0.3).train()
    masks = model.initial_state(200).masks
    assert masks is not None and len(masks.sinusoid) == len(masks.layer) == 6
    assert abs(torch.stack(masks.sinusoid).double().mean().item() - 0.8) < 0.02
    assert abs(torch.stack(masks.layer).double().mean().item() - 0.7) < 0.05


def masks_of(sinusoid: tuple[int, ...] = (4, 8), layer: int = 2, number: int = 2) -> SequenceMasks:
    def ones(*shape: int) -> tuple[Tensor, ...]:
        return (torch.ones(shape, dtype=torch.bool),) * number

    return SequenceMasks(ones(*sinusoid), ones(layer))


def state_with(masks: SequenceMasks) -> ModelState:
    return tiny_model().initial_state(2)._replace(masks=masks)


RESIDUAL = torch.ones(2, 5, 8, dtype=torch.bool)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state": state_with(masks_of(number=1))}, "state.masks.sinusoid has 1 masks: this model needs 2"),
        ({"state": state_with(masks_of(sinusoid=(5, 8)))}, r"state.masks.sinusoid has a mask of shape \(5, 8\)"),
        ({"state": state_with(masks_of(layer=3))}, r"state.masks.layer has a mask of shape \(3,\)"),
        ({"dropout": DropoutMasks(None, (RESIDUAL,))}, "dropout.residual has 1 masks: this model needs 2"),
        ({"dropout": DropoutMasks(RESIDUAL[:, :4], ())}, r"dropout.embedding has a mask of shape \(2, 4, 8\)"),
        ({"dropout": DropoutMasks(RESIDUAL.double(), ())}, "dropout.embedding .* of type bool"),
    ],
)
def test_masks_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dropping_model()(torch.zeros(2, 5, dtype=torch.int64), **options)


def test_masks_in_evaluation_are_refused() -> None:
    with pytest.raises(ValueError, match="dropout is given in evaluation"):
        dropping_model().eval()(torch.zeros(2, 5, dtype=torch.int64), dropout=DropoutMasks(RESIDUAL, ()))


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
@pytest.mark.parametrize("name", RATES)
def test_rates_outside_their_range_are_refused(name: str, rate: float) -> None:
    with pytest.raises(ValueError, match=f"model.{name} = {rate}: must be at least 0 and below 1"):
        ModelConfig(**{name: rate})
