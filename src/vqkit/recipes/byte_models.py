"""Models that two CPU cores train in minutes: on the Python standard library, or on text or ids of your own."""

from __future__ import annotations

from dataclasses import replace

from vqkit.data.config import DataConfig, IdSource
from vqkit.data.standard_library import KIBIBYTE, python_library
from vqkit.models.config import ModelConfig
from vqkit.quantizers.config import CodebookConfig
from vqkit.train.config import RunConfig, TrainConfig


def quickstart() -> RunConfig:
    """A small model of the source code of Python's standard library, in under five minutes.

    It takes as many steps as this machine does in three and a half minutes, at most 4,000; the rest is for measuring and writing.
    So short a run wants many small steps, and few codes: the first attention unit sees single bytes, about 50 of which are frequent.
    """
    return RunConfig(
        recipe="quickstart",
        model=ModelConfig(
            dim=192,
            layers=2,
            key_dim=64,
            value_dim=384,
            codebook_size=32,
            block_len=64,
            mem_len=64,
            codebook=CodebookConfig(decay=0.98, dead_code_threshold=1.0),
        ),
        data=python_library(),
        train=TrainConfig(
            steps=4000,
            minutes=3.5,
            batch_size=1,
            learning_rate=3e-3,
            warmup_steps=100,
            commitment_weight=1e-2,
            log_every=20,
            eval_every=750,
            eval_batch_size=1,
            eval_tokens=32_768,
            checkpoint_every=150,
        ),
    )


def text() -> RunConfig:
    """The model of the quickstart on the files that `data.path` names; it must be given."""
    data = DataConfig(max_validation_bytes=256 * KIBIBYTE, max_test_bytes=256 * KIBIBYTE)
    return replace(quickstart(), recipe="text", data=data)


def tokens() -> RunConfig:
    """A model of your own ids, .npy or bare numbers (`--data.source.vocab-size`, `--data.source.dtype`), that `data.path` names."""
    data = DataConfig(source=IdSource(), max_validation_bytes=64 * KIBIBYTE, max_test_bytes=64 * KIBIBYTE)
    model = replace(quickstart().model, vocab_size=data.vocab_size, codebook_size=128)
    return replace(quickstart(), recipe="tokens", model=model, data=data)
