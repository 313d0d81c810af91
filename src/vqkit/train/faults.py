"""Named points at which tests kill a run.

That a run killed at any instant resumes bit for bit is a promise of this package, and the dangerous instants are few and short:
within a checkpoint's write, between its last byte and its rename, before old ones are pruned. A test that kills at random
seldom meets them, so they have names, and the environment variable `VQKIT_FAULT=NAME` or `NAME:COUNT` lets the process die, by a
signal that nothing can catch, when it passes the point for the COUNT-th time. Without the variable a point does nothing.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

FAULT_POINTS = ("after_step", "before_checkpoint", "within_checkpoint", "after_checkpoint_write", "before_rename", "before_prune")

_passed: Counter[str] = Counter()


def fault_point(name: str) -> None:
    """Die here if `VQKIT_FAULT` says so."""
    wanted = os.environ.get("VQKIT_FAULT")
    if wanted is None:
        return
    wanted_name, _, count = wanted.partition(":")
    if wanted_name not in FAULT_POINTS:
        raise ValueError(f"VQKIT_FAULT = {wanted!r}: no fault point of that name; there are {', '.join(FAULT_POINTS)}")
    if name != wanted_name:
        return
    _passed[name] += 1
    if _passed[name] == int(count or 1):
        os.kill(os.getpid(), signal.SIGKILL)
