"""Training: configuration, step, loop, checkpoints and evaluation. Names load lazily."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqkit.train.config import RunConfig as RunConfig
    from vqkit.train.config import TrainConfig as TrainConfig
    from vqkit.train.evaluation import Evaluation as Evaluation
    from vqkit.train.evaluation import context_ablation as context_ablation
    from vqkit.train.evaluation import evaluate as evaluate
    from vqkit.train.loop import TrainResult as TrainResult
    from vqkit.train.loop import train as train

__all__ = ["Evaluation", "RunConfig", "TrainConfig", "TrainResult", "context_ablation", "evaluate", "train"]

_MODULES = {
    "RunConfig": "config",
    "TrainConfig": "config",
    "Evaluation": "evaluation",
    "context_ablation": "evaluation",
    "evaluate": "evaluation",
    "TrainResult": "loop",
    "train": "loop",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'vqkit.train' has no attribute {name!r}")
    return getattr(import_module(f"vqkit.train.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
