"""What the engine does to a model changes nothing: activations computed again, and compilation."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_models import random_tokens, tiny_model
from vqkit.models.transformer import TransformerVQ

RATES: dict[str, Any] = {"embedding_dropout": 0.2, "residual_dropout": 0.4, "sinusoid_dropout": 0.3, "layer_dropout": 0.35}
FORMS: list[dict[str, Any]] = [
    {"layers": 2},
    {"layers": 2, "layer": "feed_forward", "heads": 2, "key_heads": 1, "tied": True},
    {"layers": 2, "heads": 1, "quantizer": "sinusoidal"},
    {"layers": 2, "layer": "feed_forward", "attention": "full"},
    {"layers": 2, "attention": "full", "relative_positions": False},
]
SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0] * 9])


def rates(form: dict[str, Any]) -> dict[str, Any]:
    return RATES if form.get("relative_positions", True) else {**RATES, "sinusoid_dropout": 0.0}


def run(model: TransformerVQ, forward: Any = None, calls: int = 2) -> list[Tensor]:
    """Everything that a training step learns from calls with carried state, and where they leave the generator."""
    torch.manual_seed(3)
    found: list[Tensor] = []
    state = model.initial_state(2)
    for i, part in enumerate(random_tokens(2, 9 * calls).split(9, 1)):
        out = (model if forward is None else forward)(part, state, segments=SEGMENTS + 2 * i)
        (out.logits.square().mean() + out.commitment).backward()
        found += [out.logits, out.commitment, *(t for unit in out.statistics for t in unit)]
        state = out.state.detach()
    found += [p.grad for p in model.parameters() if p.grad is not None]
    return [t.detach() for t in found] + [torch.random.get_rng_state()]


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_recomputation_changes_no_bit(form: dict[str, Any], dropout: bool) -> None:
    options = {**form, **(rates(form) if dropout else {})}
    plain, again = tiny_model(**options).train(), tiny_model(**options, recompute=True).train()
    calls = [0]
    again.units()[0].register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    for found, expected in zip(run(again), run(plain), strict=True):
        assert torch.equal(found, expected)
    assert calls[0] == 4  # two calls, each forward and once more in its backward


COMPILED: list[dict[str, Any]] = [
    {**RATES, "recompute": True},
    {"layer": "feed_forward", "heads": 2, "key_heads": 1, **RATES},
    {"layer": "feed_forward", "attention": "full"},
]


@pytest.mark.parametrize("form", COMPILED, ids=["recomputed", "shared key heads", "full"])
def test_a_compiled_training_step_is_the_eager_one(form: dict[str, Any]) -> None:
    """With the same noise."""
    torch._dynamo.reset()
    eager, model = tiny_model(**{**form, "recompute": False}).train(), tiny_model(**form).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for found, expected in zip(run(model, compiled, calls=1), run(eager, calls=1), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("form", [{}, {"layer": "feed_forward", "quantizer": "sinusoidal"}], ids=str)
def test_a_compiled_step_of_decoding_is_the_eager_one(form: dict[str, Any]) -> None:
    torch._dynamo.reset()
    model, tokens = tiny_model(**form).eval(), random_tokens(2, 7)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    state = model.initial_state(2)
    with torch.no_grad():
        whole = model(tokens).logits
        for t in range(7):
            out = compiled(tokens[:, t : t + 1], state, statistics=False)
            state = out.state
            torch.testing.assert_close(out.logits, whole[:, t : t + 1], rtol=1e-9, atol=1e-10)
