"""Contradictory or impossible data configurations are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from vqkit.config import from_json, to_json
from vqkit.data import DataConfig


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("path", None),
        ("include", ()),
        ("include", "*.py"),
        ("include", ("",)),
        ("exclude", (3,)),
        ("min_file_bytes", 0),
        ("min_file_bytes", True),
        ("max_validation_bytes", -1),
        ("max_test_bytes", 1.5),
        ("sequence_len", 0),
        ("validation_fraction", -0.1),
        ("validation_fraction", float("nan")),
        ("test_fraction", 1.0),
        ("test_fraction", "a lot"),
        ("segments", "isolated"),
    ],
)
def test_a_wrong_value_is_named(field: str, wrong: Any) -> None:
    with pytest.raises(ValueError, match=rf"^data\.{field} = .*must"):
        DataConfig(**{field: wrong})


def test_something_must_be_left_for_training() -> None:
    with pytest.raises(ValueError, match=r"data\.validation_fraction = 0\.5 and data\.test_fraction = 0\.5.*less than 1"):
        DataConfig(validation_fraction=0.5, test_fraction=0.5)


def test_a_configuration_comes_back_from_json_as_it_was() -> None:
    config = DataConfig(path="a folder", include=("*.py", "docs/*"), exclude=(), max_test_bytes=9, segments="ignore")
    assert from_json(DataConfig, to_json(config)) == config
