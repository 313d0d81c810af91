"""Memory that one step frees is used by the next, instead of being given back to the system and asked for again."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # names of glibc's malloc.h; a threshold of -1 means never


def reuse_freed_memory() -> bool:
    """Tell the C library to keep freed memory for this process; returns whether it listened (glibc on Linux does).

    By default glibc maps every large tensor from the system and returns it when it is freed, so that each step touches all its pages
    for the first time again: at 32,768 tokens a step this halves the speed of training on a CPU (docs/log.md). The process then holds
    the most memory it ever used, which training does anyway.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))
