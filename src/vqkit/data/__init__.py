"""Data: files as bytes, split, packed and cut into batches whose order is a function of (seed, index). Names load lazily."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqkit.data.baselines import byte_baselines as byte_baselines
    from vqkit.data.batches import Batch as Batch
    from vqkit.data.batches import SequenceSampler as SequenceSampler
    from vqkit.data.batches import stream as stream
    from vqkit.data.config import DataConfig as DataConfig
    from vqkit.data.packing import DataSummary as DataSummary
    from vqkit.data.packing import Split as Split
    from vqkit.data.packing import SplitSummary as SplitSummary
    from vqkit.data.packing import pack as pack
    from vqkit.data.packing import read_summary as read_summary
    from vqkit.data.standard_library import python_library as python_library
    from vqkit.data.tokenizer import ByteTokenizer as ByteTokenizer

__all__ = [
    "Batch",
    "ByteTokenizer",
    "DataConfig",
    "DataSummary",
    "SequenceSampler",
    "Split",
    "SplitSummary",
    "byte_baselines",
    "pack",
    "python_library",
    "read_summary",
    "stream",
]

_MODULES = {
    "Batch": "batches",
    "ByteTokenizer": "tokenizer",
    "DataConfig": "config",
    "DataSummary": "packing",
    "SequenceSampler": "batches",
    "Split": "packing",
    "SplitSummary": "packing",
    "byte_baselines": "baselines",
    "pack": "packing",
    "python_library": "standard_library",
    "read_summary": "packing",
    "stream": "batches",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'vqkit.data' has no attribute {name!r}")
    return getattr(import_module(f"vqkit.data.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
