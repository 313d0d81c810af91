"""What every test starts from, and the book of the golden arrays, closed at the end of a full run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

# Before torch: one thread, so that sums have one order and processes started by tests do not crowd two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Plain torch; what runs compiled says so, as the laws of the quantizers do (see Makefile).
os.environ.setdefault("VQKIT_COMPILED", "0")

import numpy as np
import pytest
import torch
from hypothesis import settings

settings.register_profile("house", deadline=None, derandomize=True, database=None, print_blob=False)
settings.load_profile("house")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

_deselected = False


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """The same random numbers whatever ran before; and no test leaves the global state of torch changed."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - what code under test might read by mistake is to be repeatable too
    yield
    assert torch.get_default_dtype() == torch.float32, "the test left another default dtype"
    assert torch.is_grad_enabled(), "the test left gradients off"
    assert not torch.distributed.is_initialized(), "the test left a process group"


def pytest_deselected(items: list[pytest.Item]) -> None:
    global _deselected
    _deselected = _deselected or bool(items)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `closing` go last; those that only a full run can answer leave every other run."""
    closing = [i for i in items if i.get_closest_marker("closing")]
    rest = [i for i in items if not i.get_closest_marker("closing")]
    if closing and not _is_full(config):
        config.hook.pytest_deselected(items=closing)
        closing = []
    items[:] = rest + closing


def _is_full(config: pytest.Config) -> bool:
    """Whether the whole of tests/ was collected, with nothing left out."""
    whole = {str(config.rootpath), str(config.rootpath / "tests")}
    asked = {os.path.abspath(os.path.join(config.invocation_params.dir, a)) for a in config.args}
    left_out = config.option.ignore or config.option.ignore_glob or config.option.lf or config.option.collectonly
    return bool(asked & whole) and not _deselected and not left_out


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    golden_arrays = sys.modules.get("golden_arrays")
    if golden_arrays is None or not golden_arrays.compared:
        return
    terminalreporter.section("golden arrays of the official implementation")
    for group, number in sorted(golden_arrays.compared.items()):
        errors = {k.split(".", 1)[1]: e for k, e in sorted(golden_arrays.worst.items()) if k.split(".", 1)[0] == group}
        worst = ", ".join(f"{variant} {error:.1e}" for variant, error in errors.items())
        terminalreporter.line(f"{group}: {number} arrays compared; worst error: {worst or 'integers only'}")
