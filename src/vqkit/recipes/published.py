"""The published runs of Transformer-VQ (Lingle 2024, branch `main` of its code), and variants of them for one GPU and for a laptop.

The published ones let the documents of a sequence see each other and are measured sequence by sequence, each from a fresh state. The
variants do what is right instead: documents are kept apart, and the state is carried through the split. The sizes, batches and
learning rates of the variants are sensible beginnings, not the outcome of a search.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vqkit.data import published
from vqkit.data.config import DataConfig, FractionSplits
from vqkit.models.config import ModelConfig
from vqkit.models.presets import official_main
from vqkit.quantizers.config import CodebookConfig
from vqkit.recipes.byte_models import quickstart
from vqkit.train.config import RunConfig, TrainConfig

TOP_P = {"enwik8": 0.9, "pg19": 0.8, "imagenet64": 0.999}
"""The nucleus that the published samples were drawn from."""


def enwik8() -> RunConfig:
    """Bytes of Wikipedia as published: 190 M parameters, AdamW, 125,000 steps of 128 sequences; 0.99 bits per byte."""
    model = _published_model(dim=768, sinusoid_dropout=0.2, residual_dropout=0.5, layer_dropout=0.3, output_norm=False)
    train = _published_train(steps=125_000, update_len=2048, optimizer="adamw", learning_rate=4e-4, clip=0.1, weight_decay=2e-4)
    return RunConfig("enwik8", model, published.enwik8(), train)


def pg19() -> RunConfig:
    """Books in pieces of words as published: 1.3 B parameters, Adafactor, 500,000 steps of 128 sequences; word-level perplexity 26.6."""
    dropout: dict[str, Any] = {"sinusoid_dropout": 0.1, "residual_dropout": 0.1, "layer_dropout": 0.1}
    model = _published_model(dim=2048, vocab_size=32_000, tied=True, logit_scale=0.005, **dropout)
    return RunConfig("pg19", model, published.pg19(), _large_train(update_len=2048))


def imagenet64() -> RunConfig:
    """Images of 64 by 64 as published: 1.2 B parameters, Adafactor, 500,000 steps of 128 images; 3.16 bits per byte."""
    model = _published_model(dim=2048, tied=True, logit_scale=0.005, absolute_positions=True, sinusoid_dropout=0.1)
    return RunConfig("imagenet64", model, published.imagenet64(), _large_train(update_len=1536))


def enwik8_small() -> RunConfig:
    """Bytes of Wikipedia on one GPU: 19 M parameters, documents apart, measured with the state carried through."""
    return _small("enwik8-small", enwik8(), layer_dropout=0.1, residual_dropout=0.1, sinusoid_dropout=0.1)


def pg19_small() -> RunConfig:
    """Books in pieces of words on one GPU: 35 M parameters, documents apart, measured with the state carried through."""
    return _small("pg19-small", pg19(), layer_dropout=0.0, residual_dropout=0.0, sinusoid_dropout=0.1)


def imagenet64_small() -> RunConfig:
    """Images of 64 by 64 on one GPU: 19 M parameters."""
    return _small("imagenet64-small", imagenet64(), sinusoid_dropout=0.1)


def enwik8_tiny() -> RunConfig:
    """Bytes of Wikipedia on a laptop, in minutes: the model of the quickstart, measured on 256 KiB."""
    return _tiny("enwik8-tiny", replace(_tiny_data(limit=262_144), path=published.enwik8().path))


def pg19_tiny() -> RunConfig:
    """Bytes of the fifty validation books of PG-19 on a laptop, in minutes; some of these books are held out to measure on."""
    data = _tiny_data(limit=1_048_576)
    return _tiny("pg19-tiny", replace(data, path=f"{published.pg19().path}/validation", include=("*.txt",)))


def imagenet64_tiny() -> RunConfig:
    """Images of the published test split of ImageNet64 on a laptop, in minutes; 32 of them are held out to measure on."""
    images = published.imagenet64()
    data = replace(
        images,
        path=f"{images.path}/test.npy",
        splits=FractionSplits(),
        max_validation_bytes=32,
        max_test_bytes=32,
        segments="isolate",
    )
    # Four images at once: a step on neighbouring pixels of one alone learns slower, and lets codebooks collapse meanwhile.
    return _tiny("imagenet64-tiny", data, batch_size=4, update_len=128)


def _published_model(**options: Any) -> ModelConfig:
    common: dict[str, Any] = {
        "key_dim": 128,
        "value_dim": 2 * options["dim"],
        "layers": 24,
        "block_len": 512,
        "mem_len": 512,
        "codebook_size": 512,
    }
    return official_main(**common, codebook=CodebookConfig(decay=0.99), **options)


def _published_train(**options: Any) -> TrainConfig:
    common: dict[str, Any] = {
        "batch_size": 128,
        "warmup_steps": 10_000,
        "schedule": "cosine",
        "final_ratio": 0.1,
        "commitment_weight": 1e-4,
        "precision": "bfloat16",
        "eval_context": "sequence",
        "eval_every": 10_000,
        "checkpoint_every": 2_500,
        "log_every": 100,
    }
    return TrainConfig(**{**common, **options})


def _large_train(update_len: int) -> TrainConfig:
    return _published_train(steps=500_000, update_len=update_len, optimizer="adafactor", learning_rate=1e-2, clip=None, weight_decay=0.0)


def _small(name: str, of: RunConfig, **dropout: Any) -> RunConfig:
    """A published run with a narrower and flatter model, and batches of a quarter, trained by AdamW."""
    model = replace(of.model, dim=512, value_dim=1024, layers=5, **dropout)
    train = replace(
        of.train,
        steps=50_000,
        warmup_steps=2_000,
        batch_size=32,
        optimizer="adamw",
        learning_rate=1e-3,
        clip=1.0,
        weight_decay=2e-4,
        eval_context="carry",
        eval_every=2_500,
        eval_tokens=2_000_000,
        checkpoint_every=1_000,
    )
    return RunConfig(name, model, replace(of.data, segments="isolate"), train)


def _tiny(name: str, data: DataConfig, **train: Any) -> RunConfig:
    return replace(quickstart(), recipe=name, data=data, train=replace(quickstart().train, **train))


def _tiny_data(limit: int) -> DataConfig:
    return DataConfig(max_validation_bytes=limit, max_test_bytes=limit)
