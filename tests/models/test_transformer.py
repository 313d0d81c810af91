"""Laws of the whole model: state, causality, independence, documents, statistics, and what it refuses."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tiny_models import random_tokens, tiny_config, tiny_model
from vqkit.models.config import ModelConfig
from vqkit.models.metrics import model_metrics, unit_metrics
from vqkit.models.presets import full_attention_twin, official_main, official_optimized
from vqkit.models.transformer import Layer, ModelState, TransformerVQ
from vqkit.quantizers.config import CodebookConfig
from vqkit.quantizers.learnable import LearnableVQ, add_statistics_, update_codebooks_

FORMS: list[dict[str, Any]] = [
    {},
    {"heads": 1, "layers": 2, "absolute_positions": False},
    {"cache": False, "tied": True},
    {"mem_len": 6, "block_len": 2, "output_norm": False, "logit_scale": 0.3},
    {"cache_gradient": False, "mem_len": 1},
    {"layer": "feed_forward", "heads": 4, "key_heads": 2, "norm": "plain"},
    {
        "layer": "feed_forward",
        "heads": 2,
        "key_heads": 1,
        "feed_forward_dim": 7,
        "tied": True,
        "tied_bias": False,
        "logit_scale_at": "input",
    },
    {"heads": 2, "key_heads": 1, "quantizer": "sinusoidal", "relative_positions": False},
    {"layer": "feed_forward", "attention": "full", "heads": 4, "key_heads": 2, "logit_scale": 0.5, "logit_scale_at": "input"},
    {"attention": "full", "relative_positions": False},
]
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 4, 5, 5, 5], [3] * 19 + [4]])


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def run_in_calls(model: TransformerVQ, tokens: Tensor, lengths: list[int], segments: Tensor | None = None) -> tuple[Tensor, ModelState]:
    state, logits, start = None, [], 0
    for length in itertools.cycle(lengths):
        part = slice(start, start + length)
        out = model(tokens[:, part], state, segments=None if segments is None else segments[:, part])
        state, start = out.state, start + length
        logits.append(out.logits)
        if start >= tokens.shape[1]:
            return torch.cat(logits, 1), state
    raise ValueError("lengths is empty")


@pytest.mark.parametrize("segments", [None, DOCUMENTS], ids=["one document", "several"])
@pytest.mark.parametrize("lengths", [[1], [4, 8], [3, 7, 1]], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_calls_with_carried_state_equal_one_call(form: dict[str, Any], lengths: list[int], segments: Tensor | None) -> None:
    model, tokens = tiny_model(**form), random_tokens(2, 20)
    whole = model(tokens, segments=segments)
    with torch.no_grad():
        logits, state = run_in_calls(model, tokens, lengths, segments)
    close(logits, whole.logits)
    close(state.position, whole.state.position)
    close(state.segment, whole.state.segment)
    for found, expected in zip(state.attention, whole.state.attention, strict=True):
        close(found._asdict(), expected._asdict())


@pytest.mark.parametrize("impl", ["reference", "recurrent", "blocked"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_implementations_agree(form: dict[str, Any], impl: Any) -> None:
    """In value and in gradient."""
    model, tokens = tiny_model(**form), random_tokens(2, 20)
    if model.config.attention == "full" and impl != "reference":
        with pytest.raises(ValueError, match=f"impl = '{impl}': model.attention = \"full\" has"):
            model(tokens, impl=impl)
        return
    expected, found = model(tokens, segments=DOCUMENTS), model(tokens, segments=DOCUMENTS, impl=impl)
    close(found.logits, expected.logits)
    close(found.commitment, expected.commitment)
    close(*(torch.autograd.grad(out.logits.square().mean() + out.commitment, list(model.parameters())) for out in (found, expected)))


@pytest.mark.parametrize("reduction", ["serial", "matmul", "associative"])
def test_reductions_agree(reduction: Any) -> None:
    tokens = random_tokens(2, 20)
    found, expected = (tiny_model(reduction=r)(tokens, segments=DOCUMENTS, impl="blocked").logits for r in (reduction, "auto"))
    close(found, expected)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_no_token_sees_a_later_one_and_the_last_sees_the_first(form: dict[str, Any]) -> None:
    model, tokens = tiny_model(**form), random_tokens(1, 14)
    logits = model(tokens).logits
    for changed in range(14):
        other = tokens.clone()
        other[0, changed] = (tokens[0, changed] + 1) % 11
        difference = (model(other).logits - logits).abs().amax((0, 2))
        close(difference[:changed], torch.zeros(changed, dtype=torch.float64))
        assert difference[changed] > 1e-6
        if model.config.cache:
            assert difference[-1] > 1e-9


def test_the_jacobian_is_causal_and_within_the_batch_element() -> None:
    model, features = tiny_model(input="features"), torch.randn(2, 9, 8, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x).logits.sum(2), features)
    size = jacobian.abs().amax(-1)  # [B, T, B, T]
    assert isinstance(size, Tensor)
    for b, i, c, j in itertools.product(range(2), range(9), range(2), range(9)):
        if b == c and j <= i:
            assert size[b, i, c, j] > 0
        else:
            assert size[b, i, c, j] == 0


def test_batch_elements_are_independent() -> None:
    model, tokens = tiny_model(layers=2), random_tokens(3, 13)
    segments = torch.stack([DOCUMENTS[0, :13], DOCUMENTS[1, :13], DOCUMENTS[0, :13]])
    together = model(tokens, segments=segments)
    for b in range(3):
        alone = model(tokens[b : b + 1], segments=segments[b : b + 1])
        close(together.logits[b : b + 1], alone.logits)
        for found, expected in zip(together.state.attention, alone.state.attention, strict=True):
            close({k: t[b : b + 1] for k, t in found._asdict().items()}, expected._asdict())


@pytest.mark.parametrize("lengths", [[20], [4], [7]], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_packed_documents_equal_each_alone(form: dict[str, Any], lengths: list[int]) -> None:
    model, tokens = tiny_model(**form), random_tokens(2, 20)
    with torch.no_grad():
        packed, _ = run_in_calls(model, tokens, lengths, DOCUMENTS)
        for row in range(2):
            for document in DOCUMENTS[row].unique():
                own = DOCUMENTS[row] == document
                close(packed[row : row + 1, own], model(tokens[row : row + 1, own]).logits)


def test_masked_positions_count_neither_in_commitment_nor_in_statistics() -> None:
    model, tokens = tiny_model().train(), random_tokens(2, 12)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[:, 9:] = False
    masked, short = model(tokens, mask=mask), model(tokens[:, :9])
    close(masked.logits[:, :9], short.logits)
    close(masked.commitment * 12, short.commitment * 9)
    for found, expected in zip(masked.statistics, short.statistics, strict=True):
        close(found._asdict(), expected._asdict())


def test_statistics_follow_the_mode_unless_asked_for() -> None:
    model, tokens = tiny_model(), random_tokens(1, 5)
    assert len(model.train()(tokens).statistics) == 2
    assert model.train()(tokens, statistics=False).statistics == ()
    assert model.eval()(tokens).statistics == ()
    assert len(model.eval()(tokens, statistics=True).statistics) == 2
    total = sum(s.count.sum() for s in model(tokens, statistics=True).statistics)
    assert total == 2 * 2 * 5  # units, heads, tokens


def loss_of(logits: Tensor, tokens: Tensor, commitment: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="sum") + 0.3 * commitment


def train_once(model: TransformerVQ, parts: list[Tensor], weight: float) -> dict[str, Tensor]:
    """Gradients and codebooks after one step whose batch comes in parts."""
    for tokens in parts:
        out = model(tokens)
        loss_of(out.logits, tokens, out.commitment * weight).backward()
        add_statistics_(model, out.statistics)
    update_codebooks_(model)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**gradients, **{f"codebook {i}": q.codebook for i, q in enumerate(model.quantizers())}}


def test_a_batch_in_parts_teaches_what_the_whole_batch_does() -> None:
    tokens = random_tokens(4, 11)
    before = [q.codebook for q in tiny_model(layers=2).quantizers()]
    whole = train_once(tiny_model(layers=2).train(), [tokens], 4.0)
    parts = train_once(tiny_model(layers=2).train(), list(tokens.split(1)), 1.0)
    close(parts, whole)
    for i, codebook in enumerate(before):
        assert (whole[f"codebook {i}"] - codebook).abs().max() > 1e-4


class Recomputed(torch.nn.Module):
    """A layer whose activations a user makes again in the backward pass by a reentrant checkpoint; `recompute` does it without."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, states: Any, **options: Any) -> Any:
        def run(x: Tensor) -> tuple[Tensor, ...]:
            self.kept = self.layer(x, states, **options)  # a reentrant checkpoint passes tensors alone
            return self.kept.output, self.kept.commitment

        output, commitment = checkpoint(run, x, use_reentrant=True)
        return self.kept._replace(output=output, commitment=commitment)


def test_a_reentrant_checkpoint_of_a_users_own_changes_nothing() -> None:
    def run(recompute: bool) -> dict[str, Any]:
        model = tiny_model(layers=2, input="features").train()
        if recompute:
            model.layers = torch.nn.ModuleList(Recomputed(layer) for layer in model.layers)  # type: ignore[arg-type]
        units = model.units()
        calls = [0]
        units[0].register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
        x = torch.randn(2, 11, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
        tokens = random_tokens(2, 11)
        out = model(x)
        loss_of(out.logits, tokens, out.commitment).backward()
        add_statistics_(model, out.statistics)
        before = [unit.quantizer.codebook for unit in units]
        update_codebooks_(model)
        after = [unit.quantizer.codebook for unit in units]
        assert all((a - b).abs().max() > 1e-4 for a, b in zip(after, before, strict=True))
        assert calls[0] == 1 + recompute
        return {"logits": out.logits, "input": x.grad, "codebooks": after, "parameters": [p.grad for p in model.parameters()]}

    close(run(True), run(False))


def test_features_take_the_place_of_embedded_tokens() -> None:
    with_tokens, tokens = tiny_model(tied=True), random_tokens(2, 9)
    with_features = TransformerVQ(tiny_config(tied=True, input="features")).double()
    with_features.load_state_dict(with_tokens.state_dict())
    assert with_tokens.embedding is not None
    close(with_features(with_tokens.embedding(tokens)).logits, with_tokens(tokens).logits)
    assert TransformerVQ(tiny_config(input="features")).embedding is None


def test_metrics_are_those_of_each_unit_in_order() -> None:
    model, features = tiny_model(input="features", layers=2, absolute_positions=False), torch.randn(2, 9, 8, dtype=torch.float64)
    found = model_metrics(model, features)
    assert len(found) == 4
    close(found[0], unit_metrics(model.units()[0], features))
    close(found[1], unit_metrics(model.units()[1], model.units()[0](features).output))


def test_a_copy_or_a_reloaded_model_computes_the_same() -> None:
    model, tokens = tiny_model(), random_tokens(2, 9)
    expected = model(tokens).logits
    other = tiny_model(seed=5)
    assert not torch.allclose(other(tokens).logits, expected)
    other.load_state_dict(model.state_dict())
    close(other(tokens).logits, expected)
    with torch.inference_mode():
        model(tokens)  # remembers position keys
    twin = copy.deepcopy(model)
    close(twin(tokens).logits, expected)
    with torch.no_grad():
        twin.units()[0].r.weight.mul_(2.0)
        assert not torch.allclose(twin(tokens).logits, expected)
        close(model(tokens).logits, expected)


def test_position_keys_follow_the_weight_also_where_they_are_remembered() -> None:
    model, tokens = tiny_model(), random_tokens(1, 6)

    def same_as_with_gradients() -> Tensor:
        expected = model(tokens).logits.detach()
        for context in (torch.no_grad(), torch.inference_mode(), torch.no_grad()):
            with context:
                found = model(tokens).logits
            close(found.clone(), expected)
        return expected

    first = same_as_with_gradients()
    with torch.no_grad():
        model.units()[0].r.weight.mul_(2.0)
    second = same_as_with_gradients()
    assert not torch.allclose(first, second)
    model.load_state_dict(tiny_model(seed=3).state_dict())
    same_as_with_gradients()
    model.load_state_dict(tiny_model().state_dict(), assign=True)
    close(same_as_with_gradients(), first)
    model.units()[0].r.weight.data = model.units()[0].r.weight.data * 2.0
    close(same_as_with_gradients(), second)
    model.float().double()
    same_as_with_gradients()
    before = same_as_with_gradients()
    model(tokens).logits.square().mean().backward()
    torch.optim.Adam(model.parameters(), lr=0.1, fused=True).step()  # does not raise version counters
    assert not torch.allclose(same_as_with_gradients(), before)


def test_a_model_first_used_in_inference_mode_can_be_trained() -> None:
    model, tokens = tiny_model(), random_tokens(1, 6)
    with torch.inference_mode():
        model(tokens)
    model(tokens).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_types_of_activations() -> None:
    tokens = random_tokens(2, 9)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model = TransformerVQ(tiny_config()).to(dtype)
        out = model(tokens)
        wide = torch.promote_types(dtype, torch.float32)
        assert out.logits.dtype == wide
        assert out.state.attention[0].mean.dtype == wide
        assert model.initial_state(2).attention[0].v.dtype == dtype
        assert model.quantizers()[0].sum.dtype == wide


def test_detached_state_stops_gradients_and_changes_no_value() -> None:
    model, tokens = tiny_model(), random_tokens(1, 6)
    state = model(tokens).state
    detached = state.detach()
    assert state.attention[0].v.requires_grad
    assert not any(t.requires_grad for attention in detached.attention for t in attention)
    close(model(tokens, detached).logits, model(tokens, state).logits)


TOKENS = torch.zeros(2, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    "inputs, options, message",
    [
        (TOKENS + 11, {}, r"token 11: must be in 0 \.\.\. 10"),
        (TOKENS - 3, {}, r"token -3: must be in 0 \.\.\. 10"),
        (TOKENS[0], {}, r"inputs has shape \(5,\) .* token ids \[B, T\]"),
        (TOKENS[:, :0], {}, r"inputs has shape \(2, 0\): needs at least one token"),
        (torch.zeros(2, 5, 8), {}, "must be token ids"),
        (TOKENS, {"mask": torch.ones(2, 4, dtype=torch.bool)}, r"mask has shape \(2, 4\)"),
        (TOKENS, {"mask": torch.ones(2, 5)}, "of type bool"),
        (TOKENS, {"segments": torch.zeros(2, 4, dtype=torch.int64)}, r"segments has shape \(2, 4\)"),
        (TOKENS, {"segments": torch.tensor([[0, 1, 1, 0, 2]] * 2)}, r"segments\[0, 3\] = 0: must be at least 0 and never less"),
        (TOKENS, {"segments": TOKENS - 1}, r"segments\[0, 0\] = -1"),
        (TOKENS, {"state": tiny_model().initial_state(3)}, "state is that of a batch of 3: inputs has a batch of 2"),
        (TOKENS, {"state": tiny_model(layers=2).initial_state(2)}, "state is that of 4 attention units: this model has 2"),
        (TOKENS, {"state": tiny_model(mem_len=4).initial_state(2)}, r"state.attention\[0\].k_hat has shape \(2, 2, 4, 4\)"),
        (TOKENS, {"state": tiny_model(codebook_size=6).initial_state(2)}, r"state.attention\[0\].mean has shape \(2, 2, 6, 6\)"),
        (TOKENS, {"state": tiny_model(heads=4).initial_state(2)}, r"state.attention\[0\].k_hat has shape \(2, 4, 3, 4\)"),
        (
            TOKENS,
            {"state": tiny_model(attention="full").initial_state(2)},
            r"state.attention\[0\] is a KeyValueState: model.attention = \"vq\"",
        ),
        (TOKENS, {"impl": "fast"}, "impl = 'fast'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_computed(inputs: Tensor, options: dict[str, Any], message: str) -> None:
    model = tiny_model()
    reached: list[Any] = []
    model.units()[0].out.register_forward_pre_hook(lambda *args: reached.append(args))
    with pytest.raises(ValueError, match=message):
        model(inputs, **options)
    assert not reached


@pytest.mark.parametrize(
    "state, message",
    [
        (tiny_model().initial_state(2), 'is a AttentionState: model.attention = "full" needs a KeyValueState'),
        (tiny_model(attention="full", key_dim=6).initial_state(2), r"k has shape \(2, 2, 0, 6\): this model needs \(2, 2, 0, 4\)"),
        (tiny_model(attention="full").initial_state(3), "batch of 3"),
    ],
)
def test_ordinary_attention_refuses_states_that_do_not_fit(state: ModelState, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model(attention="full")(TOKENS, state)


def test_masked_keys_count_where_the_configuration_says_so() -> None:
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[:, 9:] = False
    tokens, left_out, counted = random_tokens(2, 12), tiny_model().train(), tiny_model(masked_keys="counted").train()
    close(counted(tokens, mask=mask).commitment, left_out(tokens).commitment)
    close([s.count for s in counted(tokens, mask=mask).statistics], [s.count for s in left_out(tokens).statistics])


def test_twins_have_the_same_parameters_but_for_the_codebook() -> None:
    config = official_optimized("mqa", dim=8, key_dim=4, block_len=4, vocab_size=11, layers=1, codebook_size=5, sinusoid_dropout=0.1)
    model, twin = TransformerVQ(config).double(), TransformerVQ(full_attention_twin(config)).double()
    twin.load_state_dict({name: t for name, t in model.state_dict().items() if ".quantizer." not in name})
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in model.named_parameters()] and not twin.quantizers()
    fast = TransformerVQ(full_attention_twin(config, relative_positions=False))
    gone = {n for n, _ in model.named_parameters()} - {n for n, _ in fast.named_parameters()}
    assert gone == {"layers.0.attention.0.r.weight", "layers.0.attention.0.position_bias"}
    # Where every key is a code, quantizing changes nothing: within the window both are one network.
    tokens = random_tokens(2, 4)
    with torch.no_grad():
        x = model.embedding(tokens)
        keys = model.units()[0].project(x).k
        model.units()[0].quantizer = LearnableVQ(1, 8, 4, dtype=torch.float64)
        model.units()[0].quantizer.codebook = keys.transpose(0, 1).reshape(1, 8, 4)
        close(model.units()[0](x).output, twin.units()[0](x).output)


def test_presets() -> None:
    main = official_main(heads=2, tied=True)
    assert (main.heads, main.tied, main.norm, main.masked_keys, main.logit_scale_at) == (2, True, "affine", "left_out", "logits")
    for tied in (True, False):
        other = official_optimized("mha", dim=8, key_dim=4, block_len=6, tied=tied)
        assert (other.heads, other.num_key_heads, other.feed_forward_width, other.mem_len) == (2, 2, 32, 6)
        assert other.tied_bias != tied
    with pytest.raises(ValueError, match="head_type = 'gqa'"):
        official_optimized("gqa", dim=8, key_dim=4, block_len=6)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dim = 8: must be a multiple of key_dim = 3"):
        official_optimized("mha", dim=8, key_dim=3, block_len=6)


def test_segments_go_on_from_the_state() -> None:
    model = tiny_model()
    state = model(TOKENS, segments=TOKENS + 2).state
    with pytest.raises(ValueError, match=r"segments\[0, 0\] = 1: must be at least 0 and never less than before it"):
        model(TOKENS, state, segments=TOKENS + 1)


@pytest.mark.parametrize("features", [torch.zeros(2, 5, 7), torch.zeros(2, 5, 8, dtype=torch.int64), torch.zeros(2, 8)])
def test_bad_features_are_refused(features: Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be float features \[B, T, 8\]"):
        tiny_model(input="features")(features)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dim": 0}, "model.dim = 0: must be an integer of at least 1"),
        ({"dim": 7}, "model.dim = 7: must be even"),
        ({"mem_len": 0}, "model.mem_len = 0"),
        ({"heads": True}, "model.heads = True"),
        ({"layers": 1.0}, "model.layers = 1.0"),
        ({"input": "bytes"}, "model.input = 'bytes'"),
        ({"position_base": 1.0}, "model.position_base = 1.0"),
        ({"logit_scale": 0.0}, "model.logit_scale = 0.0"),
        ({"logit_scale": float("nan")}, "model.logit_scale = nan"),
        ({"layer": "mlp"}, 'model.layer = \'mlp\': must be "gated" or "feed_forward"'),
        ({"attention": "linear"}, "model.attention = 'linear'"),
        ({"reduction": "sum"}, "model.reduction = 'sum'"),
        ({"heads": 4, "key_heads": 3}, "model.key_heads = 3: must divide model.heads = 4"),
        ({"key_heads": 0}, "model.key_heads = 0: must be an integer of at least 1"),
        ({"quantizer": "sinusoidal", "key_dim": 5}, "model.key_dim = 5: must be even for sinusoidal codes"),
        ({"feed_forward_dim": 64}, 'model.feed_forward_dim = 64: contradicts model.layer = "gated"'),
        ({"attention": "full", "cache": False}, 'model.cache = False: contradicts model.attention = "full"'),
        ({"attention": "full", "cache_gradient": False}, "model.cache_gradient = False: contradicts"),
        ({"attention": "full", "quantizer": "sinusoidal"}, "model.quantizer = 'sinusoidal': contradicts"),
        ({"attention": "full", "reduction": "serial"}, "model.reduction = 'serial': contradicts"),
        ({"attention": "full", "codebook": CodebookConfig(init="kmeans")}, "model.codebook = .* no codebook to start"),
        ({"quantizer": "sinusoidal", "codebook": CodebookConfig(dead_code_threshold=1.0)}, "whose codes never change"),
        ({"tied_bias": False}, "model.tied_bias = False: contradicts model.tied = False"),
        ({"relative_positions": False, "sinusoid_dropout": 0.1}, "model.sinusoid_dropout = 0.1: contradicts"),
    ],
)
def test_wrong_configurations_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**options)
