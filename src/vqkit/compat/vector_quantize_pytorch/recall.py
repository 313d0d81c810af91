"""What the codebooks of the facade read in the calls that a backward may compute again: each is computed again from what it read itself.

There may be several such calls before one backward, which takes them in any order. They are told apart by their vectors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vqkit.quantizers.update import State

_VECTORS, _NUMBERS = 16, 16
"""How many vectors of a call, and numbers of each, it is known by."""


def may_be_computed_again() -> bool:
    """Whether this call may be: under checkpointing, whose calls save no tensors, or make no graph."""
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _looks(x: Tensor) -> Tensor:
    """A few numbers of vectors x [H, N, K], spread over them."""
    return x.detach()[:, :: max(1, x.shape[1] // _VECTORS), :_NUMBERS].float().nan_to_num().clone()


@dataclass
class _Seen:
    looks: Tensor
    read: State | None = None
    found: bool = False
    age: int = 0
    """How many calls there were since."""


@dataclass
class Recall:
    """The calls of one codebook since the last one of which nothing is due."""

    most: int = 8
    """So many are kept beside the last one."""
    last: _Seen | None = None
    earlier: list[_Seen] = field(default_factory=list)
    lost: bool = False

    def begin(self) -> None:
        """A call begins."""
        last = self.last
        if last is None and not self.earlier:
            return
        self.last = None
        waiting = self.earlier if last is None else [*self.earlier, last]
        if all(seen.found for seen in waiting):
            self.earlier, self.lost = [], False
            return
        for seen in waiting:
            seen.age += 1
        while waiting and (len(waiting) > self.most or waiting[0].age > 4 * self.most):
            self.lost |= not waiting.pop(0).found
        self.earlier, self.lost = waiting, self.lost and bool(waiting)

    def see(self, x: Tensor) -> None:
        """It is one of vectors x [H, N, K], and may be computed again."""
        if self.last is None:
            self.last = _Seen(_looks(x))

    def keep(self, read: State) -> None:
        """This is what it reads."""
        if self.last is not None:
            self.last.read = read

    def find(self, x: Tensor) -> State | None:
        """What the call of vectors x [H, N, K] read, of several alike the last one that was not found yet; None: what the last one did.

        Raises RuntimeError where that is no longer known.
        """
        if not self.earlier:
            if self.last is not None:
                self.last.found = True
            return None
        looks = _looks(x)
        seen = [entry for entry in (self.last, *reversed(self.earlier)) if entry is not None and entry.looks.shape == looks.shape]
        apart = torch.stack([(entry.looks - looks).norm() for entry in seen]).tolist() if seen else []
        if self.lost and 0.0 not in apart:
            self._raise_lost()
        if not seen:
            return None
        entry = min(zip(apart, seen, strict=True), key=lambda pair: (pair[0], pair[1].found))[1]
        entry.found = True
        return entry.read

    def __reduce__(self) -> Any:
        """A copy has seen nothing: no backward computes a call of it again."""
        return Recall, ()

    def _raise_lost(self) -> None:
        raise RuntimeError(
            f"more than {self.most + 1} calls of a codebook in training wait for one backward, in which the first of them is computed "
            "again, and what it read is no longer known: must be fewer under checkpointing, or take the quantizers of vqkit"
        )
