"""Byte models that two CPU cores train in minutes: on the Python standard library, or on text of your own."""

from __future__ import annotations

from dataclasses import replace

from vqkit.data.config import DataConfig
from vqkit.data.standard_library import KIBIBYTE, python_library
from vqkit.models.config import ModelConfig
from vqkit.train.config import RunConfig, TrainConfig


def quickstart() -> RunConfig:
    """A small model of the source code of Python's standard library, in under five minutes."""
    return RunConfig(
        recipe="quickstart",
        model=ModelConfig(dim=192, layers=2, key_dim=64, value_dim=384, codebook_size=128, block_len=128, mem_len=128),
        data=python_library(),
        train=TrainConfig(steps=550, batch_size=8, learning_rate=4e-3, warmup_steps=50),
    )


def text() -> RunConfig:
    """The model of the quickstart on the files that `data.path` names; it must be given."""
    data = DataConfig(max_validation_bytes=256 * KIBIBYTE, max_test_bytes=256 * KIBIBYTE)
    return replace(quickstart(), recipe="text", data=data)
