"""Nearest code of each vector: one meaning (reference.py), fast forms (blocked, compiled, triton), one door (api.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqkit.ops.nearest_code.api import NearestCode as NearestCode
    from vqkit.ops.nearest_code.api import nearest_code as nearest_code
    from vqkit.ops.nearest_code.api import nearest_codes as nearest_codes
    from vqkit.ops.nearest_code.api import nearest_index as nearest_index

__all__ = ["NearestCode", "nearest_code", "nearest_codes", "nearest_index"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vqkit.ops.nearest_code import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
