"""Latent quantization (Hsu et al., 2023): each scalar becomes the nearest of a few values of its own, which learn.

Shapes: P... positions of the input, H heads, d scalars of a head, L levels of a scalar.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vqkit.dist import Reducer
from vqkit.ops.losses import mean_commitment_loss
from vqkit.ops.precision import as_dtype, is_traced, may_keep
from vqkit.ops.scalar import Rounded, level_places, list_codes
from vqkit.quantizers.config import Commit, Commitment, check_kind
from vqkit.quantizers.layout import Layout, where_kept
from vqkit.quantizers.scalar import CodeCounts, ScalarQuantizer


def _whole_places(digits: Tensor, levels: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`level_places`, as indices."""
    return level_places(digits, levels, dtype).to(torch.int64)


def _table_places(levels: tuple[int, ...], device: torch.device) -> Tensor:
    """Where a table [L, d] has its values from, the first level in place of what a scalar has less than others: of equals it is taken."""
    firsts = [0, *itertools.accumulate(levels[:-1])]
    rows = [
        [first + (level if level < number else 0) for first, number in zip(firsts, levels, strict=True)] for level in range(max(levels))
    ]
    return torch.tensor(rows, device=device)


@functools.lru_cache(maxsize=256)
def _kept_places(levels: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _table_places(levels, device)


_AT_ONCE = 2**19
_AT_ONCE_ELSEWHERE = 2**26
"""Of differences to levels, on CPU and on other devices."""


def _nearest_levels(vectors: Tensor, table: Tensor) -> Tensor:
    """Vectors [..., d] -> the number [..., d] of the nearest of the levels [L, d] of each scalar; of equals the first."""
    most = _AT_ONCE if vectors.is_cpu else _AT_ONCE_ELSEWHERE
    if is_traced() or vectors.numel() * len(table) <= most:  # a compiler keeps none of the differences
        apart = vectors - table.view(len(table), *(1 for _ in vectors.shape[1:]), table.shape[1])
        return apart.abs_().min(0).indices
    rows = vectors.reshape(-1, table.shape[1]).split(max(1, most // table.numel()))
    return torch.cat([(some - table.unsqueeze(1)).abs_().min(0).indices for some in rows]).view(vectors.shape)


class LevelValues(CodeCounts):
    """The values of all levels, [L_1 + ... + L_d], a parameter that stays float32 or wider, and how often each code was used."""

    def __init__(
        self,
        heads: int,
        levels: Sequence[int],
        codes_of: Callable[[Tensor], Tensor],
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(heads, levels, codes_of, device=device)
        self.weight = nn.Parameter(torch.empty(sum(levels), dtype=torch.float32, device=device))
        self.constant = False
        self.reset_parameters()

    def enter_(self, *, learning: bool, frozen: bool = False, reducer: Reducer | None = None) -> None:
        super().enter_(learning=learning, frozen=frozen, reducer=reducer)
        self.constant = frozen

    def leave_(self) -> None:
        super().leave_()
        self.constant = False

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Evenly from -1/2 to 1/2; an even number of levels ends one step earlier, so that 0 is among them (Hsu et al., 2023)."""
        for values, number in zip(self.weight.split(self.levels), self.levels, strict=True):
            steps = torch.arange(number, dtype=torch.float32, device=self.weight.device)
            values.copy_(steps / (number - number % 2) - 0.5)


class LatentQuantize(ScalarQuantizer):
    """Scalars become the nearest of `levels[i]` values each: prod(levels) codes for every one of `heads` vectors of width len(levels).

    The values are parameters, equal for all heads, that learn by the optimizer of the model: from `commitment`, which pulls the scalars
    to their values and these, `pull` times as much, to the scalars; None: no loss. The output has the gradient of the scalars. Where
    heads * len(levels) is not `dim` (None: it is), linear projections stand before and behind.

    Masked positions get index -1 and zeros, or with masked="input" themselves; vectors that are not finite get index -1, zeros, no loss
    and no gradient. Raises ValueError for levels below 2, for more codes than an index can name, TypeError for other kinds.
    """

    def __init__(
        self,
        levels: Sequence[int],
        dim: int | None = None,
        *,
        heads: int = 1,
        commitment: Commitment | None = Commitment(weight=0.1),  # noqa: B008 - frozen
        layout: Layout = "last",
        masked: Literal["zero", "input"] = "zero",
        commit: Commit = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(levels, dim, heads, layout=layout, masked=masked, device=device)
        if commitment is not None:
            check_kind("commitment", commitment, Commitment)
        self.commitment = commitment
        self.counts: Any = LevelValues(heads, self.levels, self._codes_of, device=device)
        self.commit = commit

    @property
    def loss_weights(self) -> dict[str, float]:
        return {} if self.commitment is None else {"commitment": self.commitment.weight}

    def _round(self, vectors: Tensor) -> Rounded:
        weight = self.counts.weight.detach().to(vectors.dtype)
        table = weight[(_kept_places if may_keep(weight) else _table_places)(self.levels, weight.device)]
        return Rounded(vectors, _nearest_levels(vectors.detach(), table).to(vectors.dtype))

    def _codes(self, digits: Tensor, dtype: torch.dtype) -> Tensor:
        return self._at(level_places(digits, self.levels, digits.dtype), dtype)

    def _at(self, places: Tensor, dtype: torch.dtype) -> Tensor:
        weight = self.counts.weight.detach() if self.counts.constant else self.counts.weight
        return as_dtype(weight, dtype).index_select(0, places.to(torch.int64).flatten()).view_as(places)

    def _list(self, like: Tensor) -> Tensor | None:
        return list_codes(_whole_places, self.levels, like)

    def _of_listed(self, rows: Tensor, complete: bool, indices: Tensor) -> Tensor:
        codes = self._at(rows, torch.float32)
        return codes if complete else where_kept(indices >= 0, codes)

    def _losses(self, vectors: Tensor, values: Tensor, codes: Tensor, kept: Tensor | None) -> dict[str, Tensor]:
        if self.commitment is None:
            return {}
        return {"commitment": mean_commitment_loss(values, codes, kept, pull=self.commitment.pull)}
