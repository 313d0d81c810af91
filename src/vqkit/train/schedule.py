"""The course of the learning rate: a pure function of the step, so that nothing of it has to be saved."""

from __future__ import annotations

import math

from vqkit.train.config import TrainConfig


def schedule_multiplier(config: TrainConfig, step: int) -> float:
    """Factor on the finished optimizer update of step 0, 1, 2, ...

    Grows linearly from 0 in step 0 to 1 in step `warmup_steps`; then follows half a cosine down to `final_ratio` in step `steps`,
    where it stays, or remains 1 (`schedule = "constant"`).
    """
    if step < config.warmup_steps:
        return step / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = min((step - config.warmup_steps) / (config.steps - config.warmup_steps), 1.0)
    return config.final_ratio + (1.0 - config.final_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))
