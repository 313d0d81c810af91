"""The decoding engine: prefill and steps are one call, memory is constant, every option does what it says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from vqkit.generate import engine
from vqkit.generate.engine import generate
from vqkit.generate.sampling import gumbel_noise
from vqkit.models import TransformerVQ
from vqkit.models.config import ModelConfig

CONFIG = ModelConfig(vocab_size=17, dim=16, key_dim=8, value_dim=12, layers=1, heads=2, codebook_size=6, block_len=4, mem_len=5)
NO_CACHE = replace(CONFIG, cache=False, mem_len=3)


def _model(config: ModelConfig = CONFIG) -> TransformerVQ:
    torch.manual_seed(1)
    return TransformerVQ(config).double()


def _prompts(batch: int, time: int, seed: int = 2) -> torch.Tensor:
    return torch.randint(0, 17, (batch, time), generator=torch.Generator().manual_seed(seed))


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [tree] if isinstance(tree, torch.Tensor) else [tensor for part in tree or () for tensor in _tensors(part)]


@pytest.mark.parametrize("config", [CONFIG, NO_CACHE], ids=["cache", "no cache"])
@pytest.mark.parametrize("time", [1, 4, 9, 23])
def test_prefill_and_steps_equal_one_call_over_everything(config: ModelConfig, time: int) -> None:
    model, prompts = _model(config), _prompts(3, time)
    steps = list(generate(model, prompts, 15, seed=3))
    tokens = torch.stack([step.tokens for step in steps], 1)
    whole = torch.cat([prompts, tokens], 1)[:, :-1]
    with torch.no_grad():
        expected = model(whole, statistics=False).logits[:, time - 1 :]
    torch.testing.assert_close(torch.stack([step.logits for step in steps], 1), expected, rtol=0, atol=1e-10)


def test_a_long_prompt_is_read_in_pieces_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = _model(), _prompts(2, 31)
    once = next(generate(model, prompts, 1))
    monkeypatch.setattr(engine, "PREFILL_LEN", 9)
    lengths = []
    model.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    pieces = next(generate(model, prompts, 1))
    assert lengths == [8, 8, 8, 7], "whole blocks, at most 9 positions"
    torch.testing.assert_close(pieces.logits, once.logits, rtol=0, atol=1e-10)


def test_the_state_keeps_its_size() -> None:
    sizes = {sum(t.nbytes for t in _tensors(step.state)) for step in generate(_model(), _prompts(2, 3), 40)}
    assert len(sizes) == 1


def test_every_call_after_the_prompt_reads_one_position() -> None:
    model, lengths = _model(), []
    model.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    list(generate(model, _prompts(2, 11), 5))
    assert lengths == [11, 1, 1, 1, 1]


def test_going_on_from_a_state_equals_not_having_stopped() -> None:
    model, prompts = _model(), _prompts(2, 5)
    noise = gumbel_noise((2, 12, 17), torch.Generator().manual_seed(4))
    unbroken = [step.tokens for step in generate(model, prompts, 12, noise=noise)]
    first = list(generate(model, prompts, 5, noise=noise[:, :5]))
    rest = generate(model, first[-1].tokens[:, None], 7, noise=noise[:, 5:], state=first[-1].state)
    assert torch.equal(torch.stack(unbroken), torch.stack([step.tokens for step in (*first, *rest)]))


def test_rows_do_not_influence_each_other() -> None:
    model, prompts = _model(), _prompts(4, 6)
    together = [step.tokens for step in generate(model, prompts, 10, temperature=0.0)]
    for row in range(4):
        alone = [step.tokens for step in generate(model, prompts[row : row + 1], 10, temperature=0.0)]
        assert torch.equal(torch.stack(together)[:, row], torch.stack(alone)[:, 0])


def test_text_is_a_function_of_the_seed_and_greedy_text_of_nothing() -> None:
    model, prompts = _model(), _prompts(2, 6)

    def written(**options: Any) -> list[list[int]]:
        return [step.tokens.tolist() for step in generate(model, prompts, 30, **options)]

    assert written(seed=1) == written(seed=1) != written(seed=2)
    assert written(seed=1, temperature=0.0) == written(seed=2, temperature=0.0) == written(seed=3, top_k=1)


def test_rows_stop_at_their_stop_tokens_and_the_text_with_the_last_row() -> None:
    model, prompts = _model(), _prompts(4, 6)
    free = torch.stack([step.tokens for step in generate(model, prompts, 60, seed=5)], 1)
    stop = (2, 9)
    ends = [next(t for t, token in enumerate(row) if token in stop) for row in free.tolist()]
    assert len(set(ends)) > 1, "the rows of this seed are to stop at different places"
    steps = list(generate(model, prompts, 60, seed=5, stop=stop))
    assert len(steps) == max(ends) + 1
    for row, end in enumerate(ends):
        tokens = [int(step.tokens[row]) for step in steps]
        assert tokens[: end + 1] == free[row, : end + 1].tolist()
        assert set(tokens[end:]) == {tokens[end]}, "a row that has stopped repeats its stop token"
        assert [bool(step.done[row]) for step in steps] == [t >= end for t in range(len(steps))]


def test_excluded_tokens_never_appear() -> None:
    tokens = {int(t) for step in generate(_model(), _prompts(4, 2), 60, exclude=(0, 3, 16)) for t in step.tokens}
    assert tokens.isdisjoint({0, 3, 16})
    assert len(tokens) > 8


def test_nothing_of_the_callers_world_changes() -> None:
    model, before = _model().train(), torch.random.get_rng_state()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for step in generate(model, _prompts(1, 3), 3):
        assert step.logits.is_inference()
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
    assert model.training
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    model(_prompts(1, 9)).logits.sum().backward()  # nothing that inference left behind stands in a gradient's way


def test_prompts_may_be_lists_and_no_token_may_be_asked_for() -> None:
    model = _model()
    lists = [step.tokens for step in generate(model, [[1, 2], [3, 4]], 4)]
    assert torch.equal(torch.stack(lists), torch.stack([s.tokens for s in generate(model, torch.tensor([[1, 2], [3, 4]]), 4)]))
    assert list(generate(model, [[1]], 0)) == []


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        ([[1, 2], [3]], {}, ValueError, r"prompts of lengths \[1, 2\]: must all be of one length"),
        ([[]], {}, ValueError, r"prompts of shape \(1, 0\): must be \[B, T\] with T >= 1"),
        ([], {}, ValueError, r"prompts of shape \(0,\)"),
        (torch.tensor([1, 2]), {}, ValueError, r"prompts of shape \(2,\)"),
        (torch.ones(1, 2), {}, TypeError, "prompts of torch.float32: must be integers"),
        ([[1, 17]], {}, ValueError, "prompts hold token 17: must be from 0 to 16"),
        ([[-1, 3]], {}, ValueError, "prompts hold token -1: must be from 0 to 16"),
        ([[1]], {"num_tokens": -1}, ValueError, "num_tokens = -1: must be an integer of at least 0"),
        ([[1]], {"num_tokens": 2.5}, ValueError, "num_tokens = 2.5"),
        ([[1]], {"stop": (17,)}, ValueError, "stop holds token 17: must be from 0 to 16"),
        ([[1]], {"exclude": range(17)}, ValueError, "exclude holds all 17 tokens"),
        ([[1]], {"temperature": -1.0}, ValueError, "temperature = -1.0"),
        ([[1]], {"noise": torch.zeros(1, 4, 16)}, ValueError, r"noise of shape \(1, 4, 16\): must be \(1, 5, 17\)"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_computed(
    prompts: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"num_tokens": 5, **options}
    with pytest.raises(error, match=message):
        generate(_model(), prompts, **arguments)
