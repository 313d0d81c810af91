"""The examples of the peer's own README run here as they stand: read from the installed distribution, with the facade under its name."""

from __future__ import annotations

import importlib.metadata
import re
import sys

import pytest
import torch

from facade.peer import PEER, facade, facade_module, peer
from facade.test_contract import MODULES, NOT_YET

TEXT = importlib.metadata.distribution("vector-quantize-pytorch").read_text("METADATA") or ""
BLOCKS = re.findall(r"^```(?:python|py)\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)

BROKEN: dict[int, tuple[type[Exception], str]] = {
    24: (ValueError, "must be"),  # hands over images of width 32 where dim = 16 was said
    25: (NameError, "dim"),  # uses a name that it does not define
}
"""Blocks that no library could run, by their number, and what they raise here; with the peer they raise as well."""


def there(block: str) -> bool:
    """Whether all that it imports is in the facade by now."""
    names = re.findall(rf"from {PEER} import ([\w, ]+)", block)
    modules = {getattr(peer, name.strip()).__module__.rpartition(".")[2] for line in names for name in line.split(",")}
    return not modules & set(NOT_YET)


RUN = [number for number, block in enumerate(BLOCKS) if there(block)]


@pytest.mark.parametrize("number", RUN)
def test_examples_run(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PEER, facade)
    for name in MODULES:
        if name not in NOT_YET:
            monkeypatch.setitem(sys.modules, f"{PEER}.{name}", facade_module(name))
    torch.manual_seed(0)
    if number in BROKEN:
        error, message = BROKEN[number]
        with pytest.raises(error, match=message):
            exec(BLOCKS[number], {"__name__": "readme"})
    else:
        exec(BLOCKS[number], {"__name__": "readme"})


def test_all_blocks_are_found() -> None:
    assert len(BLOCKS) == 26
    assert all(f"from {PEER} import" in block for block in BLOCKS)
    assert set(BROKEN) < set(range(len(BLOCKS)))


@pytest.mark.parametrize("number", sorted(BROKEN))
def test_what_is_broken_is_so_with_the_peer(number: int) -> None:
    with pytest.raises((AssertionError, NameError)):
        exec(BLOCKS[number], {"__name__": "readme"})


def test_the_directional_example_runs() -> None:
    """With the peer it raises, as that wants dead codes replaced; the two have nothing to do with each other."""
    (block,) = [block for block in BLOCKS if "directional_reparam" in block]
    with pytest.raises(AssertionError):
        exec(block, {"__name__": "readme"})
    assert BLOCKS.index(block) in RUN and BLOCKS.index(block) not in BROKEN
