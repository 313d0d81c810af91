"""The optimizer against the official composition: golden arrays, and laws about decay, clipping and saving."""

import pytest
import torch
from torch import nn

import golden_arrays
from vqkit.ops.codebook import CodebookStatistics, ema_update, zero_statistics
from vqkit.train.config import TrainConfig
from vqkit.train.optimizer import Optimizer, clip_


def config_of(case) -> TrainConfig:
    settings = case.meta["optimizer_settings"]
    return TrainConfig(
        steps=settings["n_max_step"],
        warmup_steps=settings["n_warmup_step"],
        learning_rate=settings["lr_max"],
        schedule=settings["lr_schedule"],
        weight_decay=settings["wd_lam"],
        clip=settings["grad_clip"],
    )


@pytest.mark.parametrize("case_id", golden_arrays.case_ids("training", "optimizer_only_adamw*"))
def test_golden_updates(case_id):
    case = golden_arrays.load("training", case_id)
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
            values.append(recorded(key, parameters, state))
    for key, values in after.items():
        case.check(key, torch.stack(values))
    multipliers = [optimizer.learning_rate(step) / config.learning_rate for step in range(len(case["lr_multiplier"]))]
    case.check("lr_multiplier", torch.tensor(multipliers, dtype=torch.float64))


def optimizer_keys(case) -> list[str]:
    wanted = case.keys("params_after/") + case.keys("opt_state_after/")
    return [key for key in wanted if "quantizer" not in key]


def recorded(key, parameters, state):
    """The value of ours that the golden array `key` is about."""
    if key.startswith("params_after/"):
        return parameters[key.removeprefix("params_after/")].detach().clone()
    if key.endswith("/count"):
        return next(value for name, value in state.items() if name.endswith(".step")).clone()
    for golden, ours in (("/mu/", "exp_avg"), ("/nu/", "exp_avg_sq")):
        if golden in key:
            return state[f"{key.split(golden)[1]}.{ours}"].clone()
    raise KeyError(key)


@pytest.mark.parametrize("case_id", golden_arrays.case_ids("training", "optimizer_only_adamw*"))
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
    return {f"rank{rank}": nn.Parameter(torch.randn((3,) * rank)) for rank in range(4)}


def test_decay_leaves_vectors_alone_and_ignores_the_learning_rate():
    parameters = parameters_of_every_rank()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = Optimizer(parameters.items(), TrainConfig(weight_decay=0.25, warmup_steps=10))
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step_(0)  # the multiplier is 0: nothing but decay
    for name, parameter in parameters.items():
        assert torch.equal(parameter, before[name] * (1.0 if name == "rank1" else 0.75)), name


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


def test_state_restored_goes_on_bit_for_bit():
    def steps(optimizer, parameters, first, last):
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            for parameter in parameters.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step_(step)

    config = TrainConfig(weight_decay=0.01, warmup_steps=2, clip=0.1)
    unbroken, broken = parameters_of_every_rank(), parameters_of_every_rank()
    steps(Optimizer(unbroken.items(), config), unbroken, 0, 6)
    first = Optimizer(broken.items(), config)
    steps(first, broken, 0, 3)
    second = Optimizer(broken.items(), config)
    second.load_state_tensors_({name: tensor.clone() for name, tensor in first.state_tensors().items()})
    steps(second, broken, 3, 6)
    for name in unbroken:
        assert torch.equal(unbroken[name], broken[name]), name


@pytest.mark.parametrize(("name", "shape"), [("rank9.exp_avg", (3,)), ("rank2.exp_avg", (2, 2)), ("rank2.momentum", (3, 3))])
def test_state_of_another_model_is_refused(name, shape):
    optimizer = Optimizer(parameters_of_every_rank().items(), TrainConfig())
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        optimizer.load_state_tensors_({name: torch.zeros(shape)})
    assert optimizer.state_tensors() == {}
