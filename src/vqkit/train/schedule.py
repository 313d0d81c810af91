"""The course of the learning rate: a pure function of the step, so that nothing of it has to be saved."""

from __future__ import annotations

import math

from vqkit.train.config import TrainConfig


def schedule_multiplier(config: TrainConfig, step: int) -> float:
    """Factor on the finished optimizer update of step 0, 1, 2, ...

    Grows linearly from 0 in step 0 to 1 in step `warmup_steps`. From there "cosine" follows half a cosine, and "linear" a line, down to
    `final_ratio` in step `steps`; "inverse_square_root" is sqrt(warmup_steps / step), which the official code means but does not do:
    there it grows without bound; "constant" remains 1. From step `steps` on (`extra_steps`) it stays as it is there.
    """
    if step < config.warmup_steps:
        return step / config.warmup_steps
    step = min(step, config.steps)
    match config.schedule:
        case "constant":
            return 1.0
        case "inverse_square_root":
            return math.sqrt(max(config.warmup_steps, 1) / max(step, 1))
        case "linear":
            share = 1.0 - _progress(config, step)
        case "cosine":
            share = 0.5 * (1.0 + math.cos(math.pi * _progress(config, step)))
    return config.final_ratio + (1.0 - config.final_ratio) * share


def _progress(config: TrainConfig, step: int) -> float:
    return (step - config.warmup_steps) / (config.steps - config.warmup_steps)
