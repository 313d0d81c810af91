"""The decoding engine: prefill and steps are one call, memory is constant, every option does what it says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from vqkit.generate import engine
from vqkit.generate.decoder import Decoder
from vqkit.generate.engine import generate, prefill
from vqkit.generate.sampling import SamplingRules, apply_rules, gumbel_noise
from vqkit.generate.states import row_seeds
from vqkit.models import TransformerVQ
from vqkit.models.config import ModelConfig

CONFIG = ModelConfig(vocab_size=17, dim=16, key_dim=8, value_dim=12, layers=1, heads=2, codebook_size=6, block_len=4, mem_len=5)
NO_CACHE = replace(CONFIG, cache=False, mem_len=3)
FORMS = {
    "gated": CONFIG,
    "no cache": NO_CACHE,
    "grouped heads": replace(CONFIG, layer="feed_forward", heads=4, key_heads=2, absolute_positions=True, tied=True),
    "sinusoidal codes, no positions": replace(CONFIG, quantizer="sinusoidal", relative_positions=False),
    "full": replace(CONFIG, attention="full", layer="feed_forward", key_heads=1),
    "full, no positions": replace(CONFIG, attention="full", relative_positions=False),
}
every_form = pytest.mark.parametrize("config", FORMS.values(), ids=FORMS.keys())


def _model(config: ModelConfig = CONFIG) -> TransformerVQ:
    torch.manual_seed(1)
    return TransformerVQ(config).double()


def _prompts(batch: int, time: int, seed: int = 2) -> torch.Tensor:
    return torch.randint(0, 17, (batch, time), generator=torch.Generator().manual_seed(seed))


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [tree] if isinstance(tree, torch.Tensor) else [tensor for part in tree or () for tensor in _tensors(part)]


@every_form
@pytest.mark.parametrize("time", [1, 4, 23])
def test_prefill_and_steps_equal_one_call_over_everything(config: ModelConfig, time: int) -> None:
    model, prompts = _model(config), _prompts(3, time)
    steps = list(generate(model, prompts, 15, seed=3))
    tokens = torch.stack([step.tokens for step in steps], 1)
    whole = torch.cat([prompts, tokens], 1)[:, :-1]
    with torch.no_grad():
        expected = model(whole, statistics=False).logits[:, time - 1 :]
    torch.testing.assert_close(torch.stack([step.logits for step in steps], 1), expected, rtol=0, atol=1e-10)


def test_the_first_token_after_a_long_prompt_is_that_of_reading_it_step_by_step() -> None:
    model, prompts = _model(), _prompts(2, 301)
    first = next(generate(model, prompts, 1))
    steps = Decoder(model, model.initial_state(2))
    logits = [steps.read(prompts[:, t]) for t in range(301)][-1]
    torch.testing.assert_close(first.logits, logits, rtol=0, atol=1e-10)


@every_form
def test_prompts_of_unequal_lengths_are_each_as_alone(config: ModelConfig) -> None:
    model = _model(config)
    prompts = [_prompts(1, time, seed=time)[0].tolist() for time in (5, 1, 19, 5, 8)]
    together = list(generate(model, prompts, 12, seed=6, repetition_penalty=1.2))
    for row, (prompt, seed) in enumerate(zip(prompts, row_seeds(6, 5), strict=True)):
        alone = list(generate(model, [prompt], 12, seed=seed, repetition_penalty=1.2))
        assert [int(step.tokens[row]) for step in together] == [int(step.tokens) for step in alone]
        for step, own in zip(together, alone, strict=True):
            torch.testing.assert_close(step.logits[row], own.logits[0], rtol=0, atol=1e-10)


def test_a_long_prompt_is_read_in_pieces_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = _model(), _prompts(2, 32)
    once = next(generate(model, prompts, 1))
    lengths = []
    model.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    for name, limit in (("PREFILL_POSITIONS", 18), ("PREFILL_LOGITS", 18 * 17)):
        with monkeypatch.context() as patch:
            patch.setattr(engine, name, limit)
            pieces = next(generate(model, prompts, 1))
        assert lengths == [8, 8, 8, 7, 1], "whole blocks of at most 18 positions of both rows, and the last token as a step"
        torch.testing.assert_close(pieces.logits, once.logits, rtol=0, atol=1e-10)
        lengths.clear()


def test_the_state_keeps_its_size() -> None:
    model = _model()
    generation, sizes = generate(model, _prompts(2, 3), 40), set()
    for _ in generation:
        sizes.add(sum(t.nbytes for t in _tensors(generation.state().model[:3])))
    assert len(sizes) == 1


def test_every_call_after_the_prompt_reads_one_position() -> None:
    model, lengths = _model(), []
    model.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    list(generate(model, _prompts(2, 11), 5))
    assert lengths == [10, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("config", [CONFIG, FORMS["full"]], ids=["vq", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_resumed_equals_unbroken_bit_for_bit(config: ModelConfig, dtype: torch.dtype) -> None:
    model = _model(config).to(dtype)
    options = {"seed": 8, "repetition_penalty": 1.5, "temperature": 1.3, "stop": (16,)}
    unbroken = list(generate(model, [[1, 2, 3], [4], [5] * 9], 24, **options))
    generation = generate(model, [[1, 2, 3], [4], [5] * 9], 24, **options)
    first = [next(generation) for _ in range(10)]
    state = generation.state()
    next(generation)  # a state that was taken is a value
    rest = list(generate(model, state, 14, **{**options, "seed": 99}))
    for step, other in zip([*first, *rest], unbroken, strict=True):
        assert torch.equal(step.tokens, other.tokens)
        assert torch.equal(step.done, other.done)
        assert torch.equal(step.logits, other.logits)


def test_given_noise_is_resumed_by_its_rest() -> None:
    model, prompts = _model(), _prompts(2, 5)
    noise = gumbel_noise((2, 12, 17), torch.Generator().manual_seed(4))
    unbroken = [step.tokens for step in generate(model, prompts, 12, noise=noise)]
    generation = generate(model, prompts, 5, noise=noise[:, :5])
    first = list(generation)
    rest = generate(model, generation.state(), 7, noise=noise[:, 5:])
    assert torch.equal(torch.stack(unbroken), torch.stack([step.tokens for step in (*first, *rest)]))


def test_forks_go_on_from_one_prefill_and_differ() -> None:
    model, lengths = _model(), []
    alone = [int(step.tokens) for step in generate(model, [[5] * 9], 30, seed=3)]
    state = prefill(model, [[1, 2], [5] * 9], seed=[7, 3])
    model.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    texts = torch.stack([step.tokens for step in generate(model, state.fork(3), 30)], 1).tolist()
    assert set(lengths) == {1}, "no prompt is read again"
    assert texts[3] == alone
    assert len({tuple(text) for text in texts}) == 6
    again = torch.stack([step.tokens for step in generate(model, state.fork(3), 30)], 1).tolist()
    assert texts == again
    assert torch.stack([step.tokens for step in generate(model, state.rows([1, 0]), 30)], 1).tolist() == [texts[3], texts[0]]


@pytest.mark.parametrize("number", [0, True, 1.5])
def test_forks_and_rows_are_numbers(number: Any) -> None:
    state = prefill(_model(), [[1, 2]])
    with pytest.raises(ValueError, match=rf"^number = {number}: must be an integer of at least 1"):
        state.fork(number)
    with pytest.raises(ValueError, match=r"^rows = \[1\]: must be at least one of 0 to 0"):
        state.rows([1])


def test_a_text_goes_on_with_more_prompt() -> None:
    model = _model()
    generation = generate(model, [[1, 2, 3], [7, 7]], 6, seed=1)
    written = torch.stack([step.tokens for step in generation], 1).tolist()
    more = [[4, 5], [6]]
    after = prefill(model, more, after=generation.state())
    step = next(generate(model, after, 1, temperature=0.0, repetition_penalty=2.0))
    whole = [[*prompt, *text, *new] for prompt, text, new in zip([[1, 2, 3], [7, 7]], written, more, strict=True)]
    expected = next(generate(model, whole, 1, temperature=0.0, repetition_penalty=2.0))
    torch.testing.assert_close(step.logits, expected.logits, rtol=0, atol=1e-10)
    assert torch.equal(step.tokens, expected.tokens)
    with pytest.raises(ValueError, match="after has 2 rows: must have one for each of 1 prompts"):
        prefill(model, [[1]], after=generation.state())


def test_repetition_penalty_is_over_prompt_and_text() -> None:
    model, prompt = _model(), [3, 3, 9]
    seen, written = set(prompt), []
    for step in generate(model, [prompt], 12, temperature=0.0, repetition_penalty=4.0):
        mask = torch.tensor([[token in seen for token in range(17)]])
        logits = step.logits
        assert int(step.tokens) == int(torch.where(mask, torch.where(logits > 0, logits / 4, logits * 4), logits).argmax())
        seen.add(int(step.tokens))
        written.append(int(step.tokens))
    assert written != [int(step.tokens) for step in generate(model, [prompt], 12, temperature=0.0)]


def test_logprobs_are_those_of_the_model_and_of_the_rules() -> None:
    model = _model()
    options = {"seed": 2, "top_k": 4, "temperature": 0.7, "stop": (3, 8)}
    stopped = torch.zeros(3, dtype=torch.bool)
    for step in generate(model, _prompts(3, 4), 20, logprobs=5, **options):
        found, chosen = step.logprobs, step.tokens[:, None]
        assert found is not None
        by_model = step.logits.log_softmax(-1)
        by_rules = apply_rules(step.logits, SamplingRules(temperature=0.7, top_k=4)).log_softmax(-1)
        torch.testing.assert_close(found.model, by_model.gather(1, chosen)[:, 0].masked_fill(stopped, 0.0))
        torch.testing.assert_close(found.sampled, by_rules.gather(1, chosen)[:, 0].masked_fill(stopped, 0.0))
        assert torch.equal(found.top_tokens, by_model.sort(-1, descending=True).indices[:, :5])
        torch.testing.assert_close(found.top, by_model.gather(1, found.top_tokens).masked_fill(stopped[:, None], 0.0))
        stopped = step.done
    assert stopped.any(), "a row of this seed is to stop"
    plain = list(generate(model, _prompts(3, 4), 3, **options))
    assert all(step.logprobs is None for step in plain)
    greedy = next(generate(model, _prompts(1, 4), 1, temperature=0.0, logprobs=0)).logprobs
    assert greedy is not None
    assert float(greedy.sampled) == 0.0 > float(greedy.model)
    assert greedy.top.shape == (1, 0)


@pytest.mark.parametrize("config", [CONFIG, FORMS["grouped heads"]], ids=["gated", "grouped heads"])
def test_compiled_steps_equal_eager_ones(config: ModelConfig) -> None:
    model, prompts = _model(config), _prompts(2, 7)
    eager, compiled = (list(generate(model, prompts, 12, seed=4, compile=backend)) for backend in (False, "aot_eager"))
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=1e-10)
        assert torch.equal(a.tokens, b.tokens)


def test_what_cannot_be_generated_from_is_refused() -> None:
    with pytest.raises(ValueError, match=r'model.attention = "full" keeps a state that grows'):
        generate(_model(FORMS["full"]), [[1]], 3, compile=True)
    with pytest.raises(ValueError, match=r'model.input = "features": generation needs a model of tokens'):
        generate(_model(replace(CONFIG, input="features")), [[1]], 3)
    with pytest.raises(ValueError, match=r"in training mode and has dropout: call model.eval\(\) first"):
        generate(_model(replace(CONFIG, residual_dropout=0.1)), [[1]], 3)
    with pytest.raises(ValueError, match=r"state.attention\[0\].k_hat has shape \(1, 2, 5, 8\): this model needs \(1, 2, 3, 8\)"):
        generate(_model(NO_CACHE), prefill(_model(), [[1, 2]]), 3)
    model = _model()
    with torch.no_grad():
        model.logits.bias[3] = torch.nan
    with pytest.raises(ValueError, match="logits are not finite"):
        next(generate(model, [[1]], 3))


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
        ([[1, 2], []], {}, ValueError, r"prompts\[1\] has shape \(0,\): must hold at least one token"),
        ([], {}, ValueError, "prompts is empty: must hold at least one prompt"),
        ([[1]], {"seed": [1, 2]}, ValueError, "seed has 2 numbers: must be one integer, or one for each of 1 prompts"),
        ([[1]], {"logprobs": 18}, ValueError, "logprobs = 18: must be None, or from 0 to 17"),
        ([[1]], {"repetition_penalty": 0.0}, ValueError, "repetition_penalty = 0.0: must be positive"),
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
