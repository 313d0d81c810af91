"""The training run of the official branch `optimized`, replayed: stacked layers, whose vectors decay, and statistics times n_block."""

import pytest
import torch

import golden_arrays
from golden_optimized import attention_name, gradients, model_arrays, model_of
from vqkit.data import Batch
from vqkit.quantizers import add_statistics_
from vqkit.train.config import TrainConfig
from vqkit.train.optimizer import Optimizer, is_decayed
from vqkit.train.step import train_step

CASES = golden_arrays.case_ids("optimized/training")
OPTIMIZER = "opt_state_final/inner_states/main/inner_state"


def test_cases_are_those_of_the_folder():
    assert CASES == ["train_adamw_mha_vq.f32", "train_adamw_mha_vq.f64hp"]


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("case_id", CASES)
def test_replay(case_id, micro_batches, monkeypatch):
    case = golden_arrays.load("optimized/training", case_id)
    count_blocks_times(case.meta["n_block"], monkeypatch)
    model, settings = model_of(case, "params_initial"), case.meta["optimizer_settings"]
    config = TrainConfig(
        steps=settings["n_max_step"],
        warmup_steps=settings["n_warmup_step"],
        batch_size=case.config["global_batch_size"],
        micro_batches=micro_batches,
        optimizer=settings["optimizer"],
        learning_rate=settings["lr_max"],
        schedule=settings["lr_schedule"],
        weight_decay=settings["wd_lam"],
        decayed="all_but_outer_vectors",
        clip=settings["grad_clip"],
        commitment_weight=case.config["c_beta"],
    )
    optimizer = Optimizer(model.named_parameters(), config)
    recorded: dict[str, list[torch.Tensor]] = {}
    for step in range(case.meta["n_update"]):
        for key, value in update(model, optimizer, batch_of(case, step), step).items():
            recorded.setdefault(key, []).append(value.detach().clone())
    for key, values in recorded.items():
        if key in case:  # gradients are those of the first two updates, in float64 alone
            case.check(key, torch.stack(values)[: len(case[key])])
    check_optimizer(case, model, optimizer)
    check_decay(case, model, config)


def batch_of(case, step):
    inputs, targets, mask = (case[f"batch/{name}"][step] for name in ("inputs", "targets", "loss_mask"))
    return Batch(inputs.long(), targets.long(), torch.zeros_like(inputs).long(), mask.bool())


def update(model, optimizer, batch, step):
    """What the arrays tell of one update."""
    before = {name: value.clone() for name, value in codebooks(model).items()}
    result = train_step(model, optimizer, batch, model.initial_state(len(batch.tokens)), step, segments=False)
    total, language, commitment = result.losses
    clipped = min(1.0, optimizer.config.clip / float(result.gradient_norm))
    moved = {name: before[name] - value for name, value in codebooks(model).items()}
    found = {
        "updates/out/l_total_avg": total,
        "updates/out/l_ce_term_avg": language,
        "updates/out/l_commit_avg": commitment,
        "updates/out/l_codebook_avg": torch.zeros_like(total),  # its gradient is our update, its value nothing
        "updates/out/l_ce_mask_avg": batch.loss_mask.double().mean(),
        "lr_multiplier": torch.tensor(optimizer.learning_rate(step) / optimizer.config.learning_rate),
        "grad_norm/main": result.gradient_norm,
        "grad_norm/codebook": torch.stack([value.square().sum() for value in moved.values()]).sum().sqrt(),
    }
    unclipped = {name: gradient / clipped for name, gradient in gradients(model).items()}
    found |= {f"updates/grads/{key}": value for key, value in (model_arrays(model, unclipped) | moved).items()}
    after = model_arrays(model, dict(model.named_parameters())) | codebooks(model)
    return found | {f"updates/params_after/{key}": value for key, value in after.items()}


def codebooks(model):
    """Sums and counts as the stacked arrays of the official tree."""
    quantizers = [layer.attention[0].quantizer for layer in model.layers]
    prefix = f"stack/{attention_name(model.config, 0)}/quantizer"
    return {
        f"{prefix}/c_sum": torch.stack([quantizer.sum for quantizer in quantizers]).unsqueeze(1),
        f"{prefix}/c_count": torch.stack([quantizer.count for quantizer in quantizers]).unsqueeze(1),
    }


def count_blocks_times(factor, monkeypatch):
    """As the official code does by mistake: every key counts as often as a sequence has blocks."""

    def add(model, statistics):
        add_statistics_(model, [unit._replace(sum=unit.sum * factor, count=unit.count * factor) for unit in statistics])

    monkeypatch.setattr("vqkit.train.step.add_statistics_", add)


def check_optimizer(case, model, optimizer):
    if not case.keys(OPTIMIZER):
        return
    state = optimizer.state_tensors()
    for official, ours in (("mu", "exp_avg"), ("nu", "exp_avg_sq")):
        moments = {name: state[f"{name}.{ours}"] for name, _ in model.named_parameters()}
        for key, value in model_arrays(model, moments).items():
            case.check(f"{OPTIMIZER}/1/0/{official}/{key}", value)
    for key in (f"{OPTIMIZER}/1/0/count", f"{OPTIMIZER}/2/count"):
        case.check(key, torch.tensor(case.meta["n_update"]))


def check_decay(case, model, config):
    """Which parameters decay, of each official one."""
    ours = {name: torch.tensor(is_decayed(name, p, config)).expand(p.shape) for name, p in model.named_parameters()}
    decayed = model_arrays(model, ours)
    table = case.meta["parameter_table"]
    assert {key for key, entry in table.items() if entry["optimizer_group"] == "main"} == set(decayed)
    for key, value in decayed.items():
        assert bool(value.all()) == bool(value.any()) == table[key]["weight_decay_applies"], key
