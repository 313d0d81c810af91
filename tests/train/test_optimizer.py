"""The optimizer against the official composition: golden arrays, and laws about decay, clipping and saving."""

import pytest
import torch
from torch import nn

import golden_arrays
from official_lion import round_products
from vqkit.ops.codebook import CodebookStatistics, ema_update, zero_statistics
from vqkit.train.config import TrainConfig
from vqkit.train.optimizer import Optimizer, clip_, is_decayed
from vqkit.train.update_rules import Adafactor

MOMENTS = {"/mu/": "exp_avg", "/nu/": "exp_avg_sq", "/v/": "exp_avg_sq", "/v_row/": "exp_avg_sq_row", "/v_col/": "exp_avg_sq_col"}
RULES = [{"optimizer": "adamw"}, {"optimizer": "lion"}, {"optimizer": "lion", "momentum_dtype": "bfloat16"}, {"optimizer": "adafactor"}]


def config_of(case) -> TrainConfig:
    settings = case.meta["optimizer_settings"]
    return TrainConfig(
        steps=settings["n_max_step"],
        warmup_steps=settings["n_warmup_step"],
        optimizer=settings["optimizer"],
        momentum_dtype="bfloat16" if settings["optimizer"] == "lion" else "parameter",
        learning_rate=settings["lr_max"],
        schedule=settings["lr_schedule"],
        weight_decay=settings["wd_lam"],
        clip=settings["grad_clip"],
    )


@pytest.mark.parametrize("case_id", golden_arrays.case_ids("training", "optimizer_only_*"))
def test_golden_updates(case_id, monkeypatch):
    case = golden_arrays.load("training", case_id)
    if case_id == "optimizer_only_lion_clip.f64":
        round_products(monkeypatch)
    config = config_of(case)
    initial = {name: value.to(case.dtype) for name, value in case.tree("params_initial/").items() if "quantizer" not in name}
    gradients = {name: case[f"grads/{name}"].to(case.dtype) for name in initial}
    parameters = {name: nn.Parameter(value) for name, value in initial.items()}
    optimizer = Optimizer(parameters.items(), config)
    after: dict[str, list] = {key: [] for key in optimizer_keys(case)}
    for step in range(len(case["lr_multiplier"])):
        for name, parameter in parameters.items():
            parameter.grad = gradients[name][step].clone()
        optimizer.step_(step)
        state = optimizer.state_tensors()
        for key, values in after.items():
            values.append(recorded(key, parameters, state, step))
    for key, values in after.items():
        case.check(key, torch.stack(values))
    multipliers = [optimizer.learning_rate(step) / config.learning_rate for step in range(len(case["lr_multiplier"]))]
    case.check("lr_multiplier", torch.tensor(multipliers, dtype=torch.float64))


def optimizer_keys(case) -> list[str]:
    wanted = case.keys("params_after/") + case.keys("opt_state_after/")
    return [key for key in wanted if "quantizer" not in key]


def recorded(key, parameters, state, step):
    """The value of ours that the golden array `key` is about."""
    if key.startswith("params_after/"):
        return parameters[key.removeprefix("params_after/")].detach().clone()
    if key.endswith("/count"):
        assert all(value == step + 1 for name, value in state.items() if name.endswith(".step"))
        return torch.tensor(step + 1)
    for golden, ours in MOMENTS.items():
        if golden in key:
            # A moment that Adafactor does not keep of this parameter has one number there.
            return state.get(f"{key.split(golden)[1]}.{ours}", torch.zeros(1)).clone()
    raise KeyError(key)


@pytest.mark.parametrize("case_id", golden_arrays.case_ids("training", "optimizer_only_*"))
def test_golden_codebook_group_is_an_ema_step(case_id):
    """SGD of rate 1 with gradient (1 - decay)(old - batch statistics) is our moving average of those statistics."""
    case = golden_arrays.load("training", case_id)
    decay = 0.75
    count, total = (case[f"params_initial/layer/quantizer/{name}"].to(case.dtype) for name in ("c_count", "c_sum"))
    grad_count, grad_total = (case[f"grads/layer/quantizer/{name}"].to(case.dtype) for name in ("c_count", "c_sum"))
    counts, totals = [], []
    for step in range(len(grad_count)):
        statistics = statistics_of(count - grad_count[step] / (1 - decay), total - grad_total[step] / (1 - decay))
        total, count = ema_update(total, count, statistics, decay)
        counts.append(count)
        totals.append(total)
    case.check("params_after/layer/quantizer/c_count", torch.stack(counts))
    case.check("params_after/layer/quantizer/c_sum", torch.stack(totals))


def statistics_of(count, total) -> CodebookStatistics:
    return zero_statistics(*total.shape)._replace(count=count, sum=total)


def parameters_of_every_rank() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    sizes = {f"rank{rank}": (3,) * rank for rank in range(4)} | {"large": (128, 130), "layers.0.vector": (4,)}
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in sizes.items()}


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("decayed", "spared"), [("all_but_vectors", {"rank1", "layers.0.vector"}), ("all_but_outer_vectors", {"rank1"})])
def test_decay_leaves_vectors_alone_and_ignores_the_learning_rate(rule, decayed, spared):
    parameters = parameters_of_every_rank()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    config = TrainConfig(weight_decay=0.25, warmup_steps=10, decayed=decayed, **rule)
    optimizer = Optimizer(parameters.items(), config)
    for name, parameter in parameters.items():
        assert is_decayed(name, parameter, config) == (name not in spared)
        parameter.grad = torch.ones_like(parameter) if name != "rank3" else None
    optimizer.step_(0)  # the multiplier is 0: nothing but decay
    for name, parameter in parameters.items():
        assert torch.equal(parameter, before[name] * (1.0 if name in spared else 0.75)), name


def one_step_of(optimizer, gradients):
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for _ in range(3):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def test_where_adafactor_is_that_of_torch_and_where_not():
    """Alike for vectors and large matrices, at rates below 1 / sqrt(step); small matrices are factored there, and high rates lowered."""
    torch.manual_seed(0)
    start = [torch.randn(shape, dtype=torch.float64) for shape in ((5,), (128, 130), (127, 130))]
    gradients = [torch.randn_like(value) for value in start]

    def both(lr):
        ours = Adafactor([{"params": [nn.Parameter(value.clone()) for value in start]}], lr=lr)
        theirs = torch.optim.Adafactor([nn.Parameter(value.clone()) for value in start], lr=lr, eps=(1e-15, 1e-3))
        return zip(one_step_of(ours, gradients), one_step_of(theirs, gradients), strict=True)

    vectors, larges, smalls = both(0.01)
    torch.testing.assert_close(*vectors)
    torch.testing.assert_close(*larges)
    assert (smalls[0] - smalls[1]).abs().max() > 1e-2
    assert all((ours - theirs).abs().max() > 1e-2 for ours, theirs in both(0.9))


def test_adafactor_keeps_rows_and_columns_of_large_matrices_alone():
    optimizer = Optimizer(parameters_of_every_rank().items(), TrainConfig(optimizer="adafactor"))
    for parameter in optimizer.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step_(0)
    shapes = {name: tuple(tensor.shape) for name, tensor in optimizer.state_tensors().items()}
    assert (shapes["large.exp_avg_sq_row"], shapes["large.exp_avg_sq_col"]) == ((128,), (130,))
    assert shapes["rank2.exp_avg_sq"] == (3, 3)
    assert sum(name.endswith("exp_avg_sq") for name in shapes) == len(optimizer.parameters) - 1


def test_the_momentum_of_lion_in_bfloat16_is_close_to_that_in_the_type_of_the_parameter():
    """And its steps differ in sign nowhere but where the direction is near zero."""
    torch.manual_seed(0)
    moved = []
    for momentum_dtype in ("parameter", "bfloat16"):
        parameter = nn.Parameter(torch.zeros(1000))
        config = TrainConfig(optimizer="lion", momentum_dtype=momentum_dtype, warmup_steps=0, schedule="constant", clip=None)
        optimizer = Optimizer([("p", parameter)], config)
        for step in range(5):
            parameter.grad = torch.randn(1000, generator=torch.Generator().manual_seed(step))
            optimizer.step_(step)
        moved.append((parameter.detach(), optimizer.state_tensors()["p.exp_avg"]))
    (plain, exact), (narrow, rounded) = moved
    assert (exact.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(rounded.float(), exact, rtol=0.0, atol=2e-3)
    assert (plain != narrow).float().mean() < 0.01


@pytest.mark.parametrize("largest", [None, 0.5, 1e3])
def test_clip_bounds_the_norm_and_keeps_the_direction(largest):
    gradients = [torch.full((4,), 3.0), torch.full((2, 2), -1.0)]
    before = [g.clone() for g in gradients]
    norm = clip_(gradients, largest)
    assert norm.item() == pytest.approx(40**0.5)
    scale = 1.0 if largest is None else min(1.0, largest / 40**0.5)
    for gradient, old in zip(gradients, before, strict=True):
        torch.testing.assert_close(gradient, old * scale)


def test_clip_of_zero_gradients_is_zero():
    gradients = [torch.zeros(3)]
    assert clip_(gradients, 1.0).item() == 0.0
    assert torch.equal(gradients[0], torch.zeros(3))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_state_restored_goes_on_bit_for_bit(rule):
    def steps(optimizer, parameters, first, last):
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            for name, parameter in parameters.items():
                parameter.grad = torch.randn(parameter.shape, generator=generator) if name != "rank3" else None
            optimizer.step_(step)

    config = TrainConfig(weight_decay=0.01, warmup_steps=2, clip=0.1, **rule)
    unbroken, broken = parameters_of_every_rank(), parameters_of_every_rank()
    steps(Optimizer(unbroken.items(), config), unbroken, 0, 6)
    first = Optimizer(broken.items(), config)
    steps(first, broken, 0, 3)
    second = Optimizer(broken.items(), config)
    saved = {name: tensor.clone() for name, tensor in first.state_tensors().items()}
    second.load_state_tensors_(saved)
    assert {name: (t.dtype, t.shape) for name, t in second.state_tensors().items()} == {n: (t.dtype, t.shape) for n, t in saved.items()}
    steps(second, broken, 3, 6)
    for name in unbroken:
        assert torch.equal(unbroken[name], broken[name]), name


@pytest.mark.parametrize(
    ("rule", "name", "shape"),
    [
        ("adamw", "rank9.exp_avg", (3,)),
        ("adamw", "rank2.exp_avg", (2, 2)),
        ("adamw", "rank2.momentum", (3, 3)),
        ("adamw", "rank2.exp_avg_sq", (3, 3)),  # exp_avg is missing
        ("lion", "rank2.exp_avg_sq", (3, 3)),
        ("adafactor", "rank2.exp_avg_sq_row", (3,)),
        ("adafactor", "large.exp_avg_sq", (128, 130)),
        ("adafactor", "large.exp_avg_sq_row", (130,)),
    ],
)
def test_state_of_another_model_or_rule_is_refused(rule, name, shape):
    optimizer = Optimizer(parameters_of_every_rank().items(), TrainConfig(optimizer=rule))
    missing = name.replace("exp_avg_sq", "exp_avg") if name == "rank2.exp_avg_sq" and rule == "adamw" else name
    with pytest.raises(ValueError, match=rf"'{missing}'".replace(".", r"\.")):
        optimizer.load_state_tensors_({name: torch.zeros(shape)})
    assert optimizer.state_tensors() == {}
