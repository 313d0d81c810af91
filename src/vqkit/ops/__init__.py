"""Pure functions of tensors: no module, no configuration, no process group, no global state but the random generator where said."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vqkit.ops.codebook import (
        CodebookStatistics,
        assignment_stats,
        codes_from_ema,
        ema_update,
        gather_codes,
        merge_statistics,
        replace_dead_codes,
    )
    from vqkit.ops.estimators import straight_through
    from vqkit.ops.kmeans import kmeans
    from vqkit.ops.losses import commitment_loss
    from vqkit.ops.nearest_code import NearestCode, nearest_code, nearest_index
    from vqkit.ops.positions import sinusoids
    from vqkit.ops.usage import active_fraction, perplexity, quantization_metrics

_HOME = {
    "CodebookStatistics": "codebook",
    "NearestCode": "nearest_code",
    "active_fraction": "usage",
    "assignment_stats": "codebook",
    "codes_from_ema": "codebook",
    "commitment_loss": "losses",
    "ema_update": "codebook",
    "gather_codes": "codebook",
    "kmeans": "kmeans",
    "merge_statistics": "codebook",
    "nearest_code": "nearest_code",
    "nearest_index": "nearest_code",
    "perplexity": "usage",
    "quantization_metrics": "usage",
    "replace_dead_codes": "codebook",
    "sinusoids": "positions",
    "straight_through": "estimators",
}

__all__ = [  # noqa: RUF022
    "NearestCode",
    "nearest_code",
    "nearest_index",
    "CodebookStatistics",
    "assignment_stats",
    "codes_from_ema",
    "ema_update",
    "gather_codes",
    "merge_statistics",
    "replace_dead_codes",
    "kmeans",
    "straight_through",
    "commitment_loss",
    "active_fraction",
    "perplexity",
    "quantization_metrics",
    "sinusoids",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
