"""Optimizer states of the official code: read from its files, and gone on from along its own training runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import golden_arrays
from golden_arrays import GoldenCase
from golden_models import config_of, model_of
from official_files import nested, with_lists, write
from vqkit.compat import load_official
from vqkit.compat.flax_file import read_tensors
from vqkit.compat.official_names import parameter_places, shapes, to_official, unused
from vqkit.compat.official_optimizer import factored_axes, optimizer_from_official
from vqkit.data import Batch
from vqkit.models.config import ModelConfig
from vqkit.models.presets import official_main, official_optimized
from vqkit.models.transformer import ModelState, TransformerVQ
from vqkit.train.config import TrainConfig
from vqkit.train.optimizer import Optimizer
from vqkit.train.step import train_step

FOLDER = golden_arrays.ROOT / "checkpoint"
KINDS: dict[str, Any] = {"adafactor": "ckpt_adafactor_tied_posabs", "adamw": "ckpt_adamw_untied", "lion": "ckpt_lion_tied"}
MOMENTS = {"adamw": {"mu": "exp_avg", "nu": "exp_avg_sq"}, "lion": {"mu": "exp_avg"}, "adafactor": {"v": "exp_avg_sq"}}
CHAIN = "inner_states/main/inner_state"


def train_config(kind: Any, **options: Any) -> TrainConfig:
    return TrainConfig(optimizer=kind, momentum_dtype="bfloat16" if kind == "lion" else "parameter", **options)


@pytest.mark.parametrize("form", ["train_state.msgpack", "official_save"])
@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_those_of_the_file_and_fit_the_optimizer(kind: str, form: str) -> None:
    case = golden_arrays.load("checkpoint", f"{KINDS[kind]}.f32")
    path = FOLDER / f"{case.case}.{form}"
    loaded = load_official(path, config_of(case))
    assert loaded.optimizer is not None
    assert (loaded.optimizer.kind, loaded.optimizer.steps) == (kind, 3)
    file = path if path.is_file() else path / "checkpoint_3" / "checkpoint"
    arrays = {key.rsplit("/0/", 1)[1]: tensor for key, tensor in read_tensors(file).items() if f"{CHAIN}/" in key and "/0/" in key}
    compared = 0
    for name, parameter in loaded.model.named_parameters():
        (key,) = parameter_places(loaded.config)[name].keys
        for moment, ours in MOMENTS[kind].items():
            official, found = arrays[f"{moment}/{key}"], loaded.optimizer.tensors[f"{name}.{ours}"]
            assert found.dtype == (torch.bfloat16 if kind == "lion" else torch.float32)
            assert found.shape == parameter.shape
            assert torch.equal(found, official.T if key.endswith("/kernel") else official), name
            compared += 1
    assert compared == len(MOMENTS[kind]) * len(list(loaded.model.parameters()))
    optimizer = Optimizer(loaded.model.named_parameters(), train_config(kind))
    optimizer.load_state_tensors_(loaded.optimizer.tensors)
    for name, tensor in optimizer.state_tensors().items():
        assert torch.equal(tensor, loaded.optimizer.tensors[name].to(tensor.dtype)), name
    assert optimizer.state_tensors().keys() == loaded.optimizer.tensors.keys()


# Going on


def official_state(case: GoldenCase, kind: str, updates: int) -> dict[str, Tensor]:
    """The optimizer state after the first updates of an official run, from its gradients, by the formulas of the papers."""
    clip = float(case.meta["optimizer_settings"]["grad_clip"])
    arrays: dict[str, Tensor] = {f"{CHAIN}/1/0/count": torch.tensor(updates, dtype=torch.int32), f"{CHAIN}/2/count": torch.tensor(updates)}
    for key in case.keys("updates/grads/"):
        name = key.removeprefix("updates/grads/")
        if "/quantizer/" in name:
            continue
        first, second = (torch.zeros_like(case[key][0]) for _ in range(2))
        for update in range(updates):
            gradient = case[key][update] * min(1.0, clip / float(case["grad_norm/main"][update]))
            if kind == "adamw":
                first, second = 0.9 * first + 0.1 * gradient, 0.98 * second + 0.02 * gradient**2
            elif kind == "lion":
                keep = float(torch.tensor(0.98, dtype=torch.bfloat16))
                first = (keep * first.float() + 0.02 * gradient).bfloat16()
            else:
                keep = 1.0 - (update + 1) ** -0.8
                first = keep * first + (1.0 - keep) * (gradient**2 + 1e-30)
        arrays |= {f"{CHAIN}/1/0/{moment}/{name}": value for moment, value in zip(MOMENTS[kind], (first, second), strict=False)}
        if kind == "adafactor":
            arrays |= {f"{CHAIN}/1/0/{moment}/{name}": torch.zeros(1) for moment in ("v_row", "v_col")}
    return arrays


def goes(case: GoldenCase, model: TransformerVQ, optimizer: Optimizer, update: int, state: ModelState | None) -> ModelState:
    """One update of the run, and the state that the next one starts from."""
    per_sequence = case.config["sequence_len"] // case.config["update_len"]
    sequence, part = divmod(update, per_sequence)
    fields = [case[f"sequence_{sequence}/{name}"] for name in ("inputs", "targets", "loss_mask")]
    inputs, targets, mask = (field[:, part * case.config["update_len"] :][:, : case.config["update_len"]] for field in fields)
    batch = Batch(inputs.long(), targets.long(), torch.zeros_like(inputs).long(), mask.bool())
    state = model.initial_state(len(inputs)) if part == 0 or state is None else state
    return train_step(model.train(), optimizer, batch, state, update, segments=False).state


@pytest.mark.parametrize("form", ["one file", "a folder"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_from_a_checkpoint_as_the_official_run_did(tmp_path: Path, kind: str, form: str) -> None:
    """Parameters after two updates and moments of their gradients, written as the official code does: four more updates."""
    case = golden_arrays.load("training", f"train_{kind}.f32")
    settings, config = case.meta["optimizer_settings"], config_of(case)
    params = {key.removeprefix("updates/params_after/"): case[key][1] for key in case.keys("updates/params_after/")}
    tree = nested({f"params/{key}": array for key, array in params.items()} | {"step": torch.tensor(2, dtype=torch.int32)})
    tree["opt_state"] = nested(official_state(case, kind, 2))
    loaded = load_official(write(with_lists(tree) if form == "a folder" else tree, tmp_path / "checkpoint_2"), config)
    assert loaded.optimizer is not None

    options = {name: settings[key] for name, key in (("steps", "n_max_step"), ("warmup_steps", "n_warmup_step"), ("clip", "grad_clip"))}
    options |= {"learning_rate": settings["lr_max"], "weight_decay": settings["wd_lam"], "commitment_weight": case.config["c_beta"]}
    train = train_config(kind, schedule=settings["lr_schedule"], batch_size=case.config["global_batch_size"], **options)
    before = model_of(case, "params_initial")
    state, its_own = None, Optimizer(before.named_parameters(), train)
    for update in range(2):  # official checkpoints hold no attention state: the middle of a sequence has to be gone through
        state = goes(case, before, its_own, update, state)

    model, optimizer = loaded.model, Optimizer(loaded.model.named_parameters(), train)
    optimizer.load_state_tensors_(loaded.optimizer.tensors)
    for update in range(loaded.optimizer.steps, 6):
        state = goes(case, model, optimizer, update, state)
        arrays = to_official(model.state_dict(), config)
        for key in arrays.keys() - unused(config):
            name = f"updates/params_after/{key}"
            error = (arrays[key] - case[name][update]).abs().max() / case[name][update].abs().max().clamp(min=1.0)
            assert error <= case.tolerance(name), (update, key, error)


@pytest.mark.parametrize("head_type", ["shga", "mqa", "mha"])
@pytest.mark.parametrize("kind", ["adamw", "lion"])
def test_moments_of_stacked_layers_find_their_parameters(kind: str, head_type: Any) -> None:
    config = official_optimized(head_type, dim=12, key_dim=4, block_len=4, layers=3, vocab_size=11, codebook_size=5)
    model = TransformerVQ(config)
    arrays: dict[str, Tensor] = {f"{CHAIN}/0/0/count": torch.tensor(9), f"{CHAIN}/1/count": torch.tensor(9)}
    for key, array in to_official(model.state_dict(), config).items():
        if "quantizer" not in key:
            arrays |= {f"{CHAIN}/0/0/{moment}/{key}": array * factor for moment, factor in zip(MOMENTS[kind], (2.0, 3.0), strict=False)}
    state = optimizer_from_official(arrays, config)
    assert state is not None
    assert (state.kind, state.steps) == (kind, 9)
    for name, parameter in model.named_parameters():
        for ours, factor in zip(MOMENTS[kind].values(), (2.0, 3.0), strict=False):
            assert torch.equal(state.tensors[f"{name}.{ours}"], parameter * factor), name
    Optimizer(model.named_parameters(), train_config(kind)).load_state_tensors_(state.tensors)


# Factored moments


def test_which_axes_optax_factors() -> None:
    assert factored_axes((128, 200)) == (0, 1)
    assert factored_axes((200, 128)) == (1, 0)
    assert factored_axes((128, 128)) == (0, 1)
    assert factored_axes((127, 4096)) is None
    assert factored_axes((4096,)) is None
    assert factored_axes((2, 1, 300, 200)) == (3, 2)


def adafactor_arrays(squares: dict[str, Tensor]) -> dict[str, Tensor]:
    """The official Adafactor state with these mean squares, by official key: factored where optax does."""
    arrays: dict[str, Tensor] = {f"{CHAIN}/0/0/count": torch.tensor(4), f"{CHAIN}/1/count": torch.tensor(4)}
    for key, square in squares.items():
        axes = factored_axes(tuple(square.shape))
        row, column = (torch.zeros(1), torch.zeros(1)) if axes is None else (square.mean(axes[1]), square.mean(axes[0]))
        whole = square if axes is None else torch.zeros(1)
        arrays |= {f"{CHAIN}/0/0/{name}/{key}": moment for name, moment in (("v", whole), ("v_row", row), ("v_col", column))}
    return arrays


@pytest.mark.parametrize(
    "config",
    [
        official_main(
            dim=128, key_dim=64, value_dim=64, heads=2, layers=1, vocab_size=131, codebook_size=3, tied=True
        ),  # square, wide and tall
        official_optimized("mqa", dim=128, key_dim=64, block_len=4, layers=2, vocab_size=131, codebook_size=3),  # keys and values: not
        official_optimized("shga", dim=128, key_dim=64, block_len=4, layers=2, vocab_size=7, codebook_size=3),  # keys not, values
    ],
    ids=["main", "optimized mqa", "optimized shga"],
)
def test_factored_moments_are_the_means_of_rows_and_columns(config: ModelConfig) -> None:
    model = TransformerVQ(config)
    squares = {key: array.square() for key, array in to_official(model.state_dict(), config).items() if "quantizer" not in key}
    ours = optimizer_from_official(adafactor_arrays(squares), config)
    assert ours is not None
    optimizer = Optimizer(model.named_parameters(), train_config("adafactor"))
    optimizer.load_state_tensors_(ours.tensors)  # which are factored, ours decides
    factored = 0
    for name, parameter in model.named_parameters():
        square = parameter.detach().square()
        found = {key.rpartition(".")[2]: tensor for key, tensor in ours.tensors.items() if key.rpartition(".")[0] == name}
        if found.keys() == {"exp_avg_sq"}:
            torch.testing.assert_close(found["exp_avg_sq"], square)
        else:
            factored += 1
            torch.testing.assert_close(found["exp_avg_sq_row"], square.mean(1))
            torch.testing.assert_close(found["exp_avg_sq_col"], square.mean(0))
    assert factored >= 4


def test_moments_that_are_means_over_layers_are_refused() -> None:
    config = official_optimized("shga", dim=128, key_dim=64, block_len=4, layers=1, vocab_size=7, codebook_size=3)
    config = replace(config, layers=150)
    squares = {key: torch.ones(()).expand(shape) for key, shape in shapes(config).items() if "quantizer" not in key}
    with pytest.raises(ValueError, match=r"key 'opt_state/\.\.\./v_row/stack/VQAttention_0/\S+_proj/kernel' is a mean over layers"):
        optimizer_from_official(adafactor_arrays(squares), config)


# What is refused


def state_of(kind: str) -> tuple[dict[str, Tensor], ModelConfig]:
    case = golden_arrays.load("checkpoint", f"{KINDS[kind]}.f32")
    arrays = read_tensors(FOLDER / f"{case.case}.train_state.msgpack")
    return {key.removeprefix("opt_state/"): array for key, array in arrays.items() if key.startswith("opt_state/")}, config_of(case)


Q = "transformer_layers_0/scanned_attn1/q_proj/kernel"


@pytest.mark.parametrize(
    "kind, change, message",
    [
        ("adamw", {f"{CHAIN}/1/0/nu/{Q}": None}, f"key 'opt_state/.../nu/{Q}' is missing"),
        ("lion", {f"{CHAIN}/1/0/mu/{Q}": torch.zeros(6, 12)}, f"mu/{Q}' has shape (6, 12) of float32, expected floating point (12, 6)"),
        ("lion", {f"{CHAIN}/1/0/mu/{Q}": torch.zeros(12, 6, dtype=torch.int32)}, "has shape (12, 6) of int32, expected floating point"),
        ("adafactor", {f"{CHAIN}/0/0/v/{Q}": torch.zeros(1)}, f"v/{Q}' has shape (1,) of float32, expected floating point (12, 6)"),
        ("adamw", {f"{CHAIN}/1/0/mu/extra": torch.zeros(3)}, "key 'opt_state/.../mu/extra' of shape (3,) belongs to no parameter"),
        ("adamw", {f"{CHAIN}/2/count": torch.tensor(4)}, "expected counters that agree"),
        ("adamw", {f"{CHAIN}/2/count": torch.tensor(-3)}, "expected one integer of at least 0"),
        ("adamw", {f"{CHAIN}/2/count": None, f"{CHAIN}/1/0/count": None}, "opt_state has the counters none"),
        ("adamw", {f"{CHAIN}/1/0/trace/{Q}": torch.zeros(3)}, "belongs to no optimizer that is known"),
        ("adamw", {"inner_states/codebook/inner_state/0/trace/c_sum": torch.zeros(3)}, "belongs to no optimizer that is known"),
        ("adamw", {f"{CHAIN}/7/0/mu/{Q}": torch.zeros(12, 6)}, "stands twice in the chain of optimizers"),
        ("lion", {f"{CHAIN}/1/0/v/{Q}": torch.zeros(12, 6)}, "opt_state has the moments mu, v, expected those of AdamW, Lion or Adafactor"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_by_name(kind: str, change: dict[str, Tensor | None], message: str) -> None:
    arrays, config = state_of(kind)
    assert optimizer_from_official(arrays, config) is not None
    for key, value in change.items():
        arrays.pop(key, None)
        if value is not None:
            arrays[key] = value
    with pytest.raises(ValueError) as error:
        optimizer_from_official(arrays, config)
    assert message in str(error.value)


def test_no_state_is_none() -> None:
    assert optimizer_from_official({}, official_main(dim=12)) is None
