"""The verbs that every quantizer has, and what its forward does besides quantizing: weigh the losses and feed the codebooks.

`quantize` is pure. `forward` of the outermost quantizer alone hands the statistics to the codebooks and, with `commit="auto"`, commits;
combinators call the `quantize` of their parts, so that whatever they combine is counted once a call.
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vqkit.dist import Reducer, has_default_group, is_managed, own_storage
from vqkit.quantizers.commit import Committing, Statistics, flatten_statistics, reduce_in_forward, synchronize_codebooks_
from vqkit.quantizers.committed import Committed, Counting, outside_backward

_COLLAPSED = 0.1
_ENOUGH_VECTORS = 32


class QuantizerOutput(NamedTuple):
    """What calling a quantizer returns."""

    quantized: Tensor  # shape and dtype of x
    indices: Tensor  # int64, the positions of x + code_shape; -1: masked, dropped or not finite
    loss: Tensor  # [] the weighted sum of the losses, float32 or wider; in eval mode without gradient


class Quantized(NamedTuple):
    """What `quantize` returns."""

    quantized: Tensor  # shape and dtype of x
    indices: Tensor  # int64, the positions of x + code_shape; -1: masked, dropped or not finite
    losses: dict[str, Tensor]  # [] each, unweighted, by the names of `loss_weights`
    statistics: Statistics  # aligned with `codebooks()`; None in eval mode and when frozen
    outputs: Sequence[Tensor] = ()  # of a residual quantizer, what each layer that took part gave, before the output projection


class Quantizer(Committing):
    """The interface of all quantizers; a subclass writes `quantize`, `decode`, `decode_codes`, `codebooks`, `code_shape`, `loss_weights`.

    commit="auto": every training forward is one step of the codebooks, as seen from outside. commit="manual": forwards collect
    statistics, `update_codebooks_(model)` commits them. `reducer` says over which processes an automatic commit sums (None: the default
    group, if there is one when a forward runs). A subclass ends its `__init__` with `self.commit = commit`.
    """

    dim: int
    """The width of the vectors that it takes."""
    whole_items = False
    """Whether indices are those of whole items, [B, *code_shape], whatever positions these have."""
    reducer: Reducer | None = None
    _synchronized = False

    # What a subclass writes

    @abstractmethod
    def quantize(self, x: Tensor, mask: Tensor | None = None, *, freeze_codebook: bool = False) -> Quantized:
        """Quantize x; mask [...] bool, True where a position counts. Changes nothing. A subclass may take more keywords."""

    @abstractmethod
    def decode(self, indices: Tensor) -> Tensor:
        """indices, positions + code_shape -> vectors as `forward` gives them, after the output projection; -1 gives zeros."""

    @abstractmethod
    def decode_codes(self, indices: Tensor) -> Tensor:
        """indices, positions + code_shape -> codes before the output projection; -1 gives zeros."""

    @abstractmethod
    def codebooks(self) -> Sequence[Counting]:
        """All codebooks in order, a shared one once; empty where there is nothing to learn."""

    @property
    @abstractmethod
    def code_shape(self) -> tuple[int, ...]:
        """What a position's indices look like: () one index, (heads,), (Q,) residual, (G, Q) grouped residual."""

    @property
    @abstractmethod
    def codebook_sizes(self) -> tuple[int, ...]:
        """The number of codes behind each index of a position, code_shape flattened."""

    @property
    @abstractmethod
    def loss_weights(self) -> dict[str, float]:
        """The weight of each loss that `quantize` returns, by name."""

    # What all have

    @property
    def out_dim(self) -> int:
        """The width of the vectors that it gives: `dim`, unless a subclass says another."""
        return self.dim

    @property
    def bits_per_vector(self) -> float:
        """log2 of the number of ways to code one position."""
        return sum(math.log2(size) for size in self.codebook_sizes)

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x -> indices int64, positions + code_shape."""
        return self.quantize(x, mask, freeze_codebook=True).indices

    def encode_and_decode(self, x: Tensor, mask: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        """`encode(x)` and `decode` of that: some need not look for what they have just found. `options` are those that both take."""
        indices = self.encode(x, mask, **options)
        return indices, self.decode(indices, **options)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, freeze_codebook: bool = False, **options: Any) -> QuantizerOutput:
        """`quantize`, the weighted loss, and in training mode (unless frozen for this call) the statistics to the codebooks.

        `options` are those of `quantize`.
        """
        found = self.quantize_and_learn(x, mask, freeze_codebook=freeze_codebook, **options)
        loss = self._weigh(found.losses, x)
        return QuantizerOutput(found.quantized, found.indices, loss if self.training else loss.detach())

    def quantize_and_learn(self, x: Tensor, mask: Tensor | None = None, *, freeze_codebook: bool = False, **options: Any) -> Quantized:
        """What a call does, with what `quantize` returns: the losses by name, unweighted."""
        members = _members(self)
        learning = self.training and not freeze_codebook
        if learning and torch.compiler.is_compiling() and not all(codebook.initialized for codebook in self.codebooks()):
            eager = torch.compiler.disable(self.quantize_and_learn, reason="a k-means start waits for its first vectors: the graph breaks")
            return eager(x, mask, **options)
        outside = outside_backward(x)
        if self.training and self._commit == "auto":
            self._begin_(members, outside)
        for member in members:
            member.enter_(learning=learning, frozen=freeze_codebook, reducer=self.reducer)
        try:
            found = self.quantize(x, mask, freeze_codebook=freeze_codebook, **options)
        finally:
            for member in members:
                member.leave_()
        if learning:
            self._learn_(members, found.statistics, outside)
        if is_managed(self) and not torch.compiler.is_compiling():
            found = found._replace(quantized=own_storage(found.quantized))
        return found

    def _begin_(self, members: list[Committed], outside: Tensor | bool) -> None:
        """Automatic commits: make the codebooks equal on all ranks once, then commit what the last training forward left."""
        for member in members:
            if not member.auto:
                member.auto = True
            if isinstance(member, Counting):
                member.check_commit()
        if outside is not False and not torch.compiler.is_exporting():
            self._synchronize_start_()
        for member in members:
            member.settle_(outside)

    def _synchronize_start_(self) -> None:
        """Make the codebooks equal on all ranks, once. A compiler runs this while it traces, and leaves it out of the program."""
        if not self._synchronized and has_default_group():
            synchronize_codebooks_(self, self.reducer)
            self._synchronized = True

    # What torch.compiler.assume_constant_result does, which to import takes the whole compiler and changes the environment.
    _synchronize_start_._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _learn_(self, members: list[Committed], statistics: Statistics, outside: Tensor | bool) -> None:
        if outside is False:
            return
        codebooks = self.codebooks()
        entries = [None] * len(codebooks) if statistics is None else flatten_statistics(statistics)
        if len(entries) != len(codebooks):
            raise ValueError(f"quantize returned {len(entries)} statistics: must be {len(codebooks)}, one a codebook")
        pairs = [(codebook, entry) for codebook, entry in zip(codebooks, entries, strict=True) if entry is not None]
        if self._commit == "manual":
            for codebook, entry in pairs:
                codebook.add_statistics_(entry, outside)
            return
        for (codebook, _), entry in zip(pairs, reduce_in_forward([entry for _, entry in pairs], self.reducer), strict=True):
            codebook.replace_statistics_(entry, outside)
        for member in members:
            if not isinstance(member, Counting):
                member.pend_(outside)

    def _weigh(self, losses: dict[str, Tensor], x: Tensor) -> Tensor:
        weights = self.loss_weights
        total = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        for name, loss in losses.items():
            total = total + weights[name] * loss
        return total

    def metrics(self) -> dict[str, float]:
        """Health by name, of the vectors of the last commit: perplexity, active, dead, relative_error, non_finite.

        Means over heads and codebooks; of several codebooks each alone as "NAME/NUMBER" too. Empty before the first commit; NaN for what
        no vector of that commit tells. Warns of a codebook that collapses: of its codes, or of as many as there were vectors if these were
        fewer, less than 10 % are in use, by at least 32 vectors. Waits for the device.
        """
        each = [codebook.metrics() for codebook in self.codebooks()]
        each = [found for found in each if found]
        if not each:
            return {}
        for number, found in enumerate(each):
            possible = min(found["codes"], found["vectors"])
            if found["vectors"] >= _ENOUGH_VECTORS and found["active"] * found["codes"] < _COLLAPSED * possible:
                warnings.warn(
                    f"codebook {number} collapses: {found['vectors']:.0f} vectors use {100 * found['active']:.1f} % of its "
                    f"{found['codes']:.0f} codes",
                    stacklevel=2,
                )
        names = [name for name in dict.fromkeys(name for found in each for name in found) if name not in ("vectors", "codes")]
        result = {name: _mean([found.get(name, math.nan) for found in each]) for name in names}
        if len(each) > 1:
            result |= {f"{name}/{number}": found[name] for number, found in enumerate(each) for name in names if name in found}
        return result


def _members(module: nn.Module) -> list[Committed]:
    """Those among `module.modules()` whose state commits change."""
    if torch.compiler.is_compiling():
        return [part for part in module.modules() if isinstance(part, Committed)]
    found: list[Committed] = []
    seen: set[nn.Module] = set()
    waiting: list[nn.Module | None] = [module]  # what modules() does, without names
    while waiting:
        part = waiting.pop()
        if part is None or part in seen:
            continue
        seen.add(part)
        if isinstance(part, Committed):
            found.append(part)
        waiting.extend(reversed(part._modules.values()))
    return found


def changed(module: object, **usual: object) -> str:
    """For `extra_repr`: ", NAME=VALUE" for each attribute that is not as usual."""
    return "".join(f", {name}={value!r}" for name, common in usual.items() if (value := getattr(module, name)) != common)


def _mean(values: list[float]) -> float:
    """Of those that are numbers."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
