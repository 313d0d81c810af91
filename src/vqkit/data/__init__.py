"""Data: files split, tokenized, packed and cut into batches whose order is a function of (seed, index). Names load lazily."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqkit.data.baselines import byte_baselines as byte_baselines
    from vqkit.data.batches import Batch as Batch
    from vqkit.data.batches import SequenceSampler as SequenceSampler
    from vqkit.data.batches import sequences as sequences
    from vqkit.data.batches import stream as stream
    from vqkit.data.config import DataConfig as DataConfig
    from vqkit.data.images import ImageTokenizer as ImageTokenizer
    from vqkit.data.images import image_grid as image_grid
    from vqkit.data.images import save_png as save_png
    from vqkit.data.packing import pack as pack
    from vqkit.data.pieces import SentencePieceTokenizer as SentencePieceTokenizer
    from vqkit.data.standard_library import python_library as python_library
    from vqkit.data.stored import DataSummary as DataSummary
    from vqkit.data.stored import Split as Split
    from vqkit.data.stored import SplitSummary as SplitSummary
    from vqkit.data.stored import find_defects as find_defects
    from vqkit.data.stored import is_packed as is_packed
    from vqkit.data.stored import read_rules as read_rules
    from vqkit.data.stored import read_summary as read_summary
    from vqkit.data.tokenizer import ByteTokenizer as ByteTokenizer
    from vqkit.data.tokenizer import IdTokenizer as IdTokenizer
    from vqkit.data.tokenizer import Tokenizer as Tokenizer
    from vqkit.data.tokenizer import load_tokenizer as load_tokenizer

__all__ = [
    "Batch",
    "ByteTokenizer",
    "DataConfig",
    "DataSummary",
    "IdTokenizer",
    "ImageTokenizer",
    "SentencePieceTokenizer",
    "SequenceSampler",
    "Split",
    "SplitSummary",
    "Tokenizer",
    "byte_baselines",
    "find_defects",
    "image_grid",
    "is_packed",
    "load_tokenizer",
    "pack",
    "python_library",
    "read_rules",
    "read_summary",
    "save_png",
    "sequences",
    "stream",
]

_MODULES = {
    "Batch": "batches",
    "ByteTokenizer": "tokenizer",
    "DataConfig": "config",
    "DataSummary": "stored",
    "IdTokenizer": "tokenizer",
    "ImageTokenizer": "images",
    "SentencePieceTokenizer": "pieces",
    "SequenceSampler": "batches",
    "Split": "stored",
    "SplitSummary": "stored",
    "Tokenizer": "tokenizer",
    "byte_baselines": "baselines",
    "find_defects": "stored",
    "image_grid": "images",
    "is_packed": "stored",
    "load_tokenizer": "tokenizer",
    "pack": "packing",
    "python_library": "standard_library",
    "read_rules": "stored",
    "read_summary": "stored",
    "save_png": "images",
    "sequences": "batches",
    "stream": "batches",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'vqkit.data' has no attribute {name!r}")
    return getattr(import_module(f"vqkit.data.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
