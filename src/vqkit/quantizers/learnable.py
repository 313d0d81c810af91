"""The learnable codebook of Transformer-VQ (Lingle, 2024): moving averages of count and sum per code.

`quantize` is pure: it reads the codebook and returns statistics. They are collected by `add_statistics_` and enter the codebook at one
named place, `update_codebooks_`, once per optimizer step; so recomputation, accumulation and data parallelism count nothing twice.

Shapes: B batch, T time, H heads with a codebook each, C codes, K width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vqkit.dist import LocalReducer, Reducer
from vqkit.ops.codebook import (
    COUNT_FLOOR,
    CodebookStatistics,
    assignment_stats,
    codes_from_ema,
    ema_update,
    gather_codes,
    largest_keys,
    merge_statistics,
    replace_dead_codes,
    zero_statistics,
)
from vqkit.ops.estimators import straight_through
from vqkit.ops.kmeans import kmeans
from vqkit.ops.losses import commitment_loss
from vqkit.ops.nearest_code import nearest_index
from vqkit.quantizers.config import CodebookConfig

_WIDE = (torch.float32, torch.float64)
_MAX_CANDIDATES = 64


class Quantized(NamedTuple):
    """What `quantize` makes of x [B, H, T, K]."""

    quantized: Tensor  # [B, H, T, K] in the dtype of x: the codes, with the gradient straight through to x
    indices: Tensor  # [B, H, T] int64; -1 for a vector that is not finite, whose code is 0 and whose gradient is none
    commitment: Tensor  # [] mean over B * T of the squared error summed over K and heads; masked positions add 0
    statistics: CodebookStatistics | None


def check_vectors(x: Tensor, mask: Tensor | None, heads: int, dim: int) -> None:
    """Raise unless x is [B, heads, T, dim] floating point and mask, if any, [B, T] bool."""
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}: must be floating point")
    if x.dim() != 4 or x.shape[1] != heads or x.shape[3] != dim:
        raise ValueError(f"x has shape {tuple(x.shape)}: must be [batch, {heads}, time, {dim}]")
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"mask is {mask.dtype}: must be torch.bool")
    if mask.shape != (x.shape[0], x.shape[2]):
        raise ValueError(f"mask has shape {tuple(mask.shape)}: must be {(x.shape[0], x.shape[2])}, the batch and time of x")


class LearnableVQ(nn.Module):
    """`heads` codebooks of `codebook_size` codes of width `dim`: codes = sum / max(count, 0.01).

    `sum` [H, C, K] and `count` [H, C] are float32 or float64 and are never made narrower by `.to()`, `.half()` and the like. `pending`
    holds the statistics added since the last update; it is no buffer, so that nothing broadcasts over it, but moves with the module and
    stands in the state dict. `updates` counts the updates. At the start sum is normal with standard deviation 1 / sqrt(heads *
    codebook_size) and count is 1, as in the official implementation; with config.init = "kmeans" call `initialize_` first.
    With config.dead_code_threshold, up to 64 dead codes a head and update start anew at random vectors of that update, with a count of
    twice the threshold.
    """

    _version = 1
    sum: Tensor
    count: Tensor
    updates: Tensor

    def __init__(
        self,
        heads: int,
        codebook_size: int,
        dim: int,
        config: CodebookConfig | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("heads", heads), ("codebook_size", codebook_size), ("dim", dim)):
            if value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        if dtype not in _WIDE:
            raise ValueError(f"dtype = {dtype}: must be torch.float32 or torch.float64")
        self.heads, self.codebook_size, self.dim = heads, codebook_size, dim
        self.config = config or CodebookConfig()
        self.initialized = self.config.init != "kmeans"
        self.num_candidates = min(codebook_size, _MAX_CANDIDATES) if self.config.dead_code_threshold > 0 else 0
        self.register_buffer("sum", torch.empty(heads, codebook_size, dim, dtype=dtype, device=device))
        self.register_buffer("count", torch.empty(heads, codebook_size, dtype=dtype, device=device))
        self.register_buffer("updates", torch.empty((), dtype=torch.int64, device=device))
        self.pending = zero_statistics(heads, codebook_size, dim, num_candidates=self.num_candidates, dtype=dtype, device=self.sum.device)
        self.reset_parameters()

    def extra_repr(self) -> str:
        return f"heads={self.heads}, codebook_size={self.codebook_size}, dim={self.dim}, {self.config}"

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The official start, drawn by the global random generator."""
        self.sum.normal_(std=(self.heads * self.codebook_size) ** -0.5)
        self.count.fill_(1.0)
        self.updates.zero_()
        self.initialized = self.config.init != "kmeans"
        self.discard_pending_()

    # Reading

    @property
    def codebook(self) -> Tensor:
        """[H, C, K]. Setting it sets every count to 1 and discards what is pending."""
        return codes_from_ema(self.sum, self.count)

    @codebook.setter
    @torch.no_grad()
    def codebook(self, codes: Tensor) -> None:
        if codes.shape != self.sum.shape:
            raise ValueError(f"codebook has shape {tuple(codes.shape)}: must be {tuple(self.sum.shape)}")
        self.sum.copy_(codes)
        self.count.fill_(1.0)
        self.initialized = True
        self.discard_pending_()

    def quantize(self, x: Tensor, mask: Tensor | None = None, statistics: bool = True) -> Quantized:
        """x [B, H, T, K], mask [B, T] bool, True where a position counts. Changes nothing.

        Masked positions are quantized like others but enter neither commitment nor statistics. Raises ValueError for shapes that do
        not fit and before the codebook is initialized, TypeError for a mask that is not bool.
        """
        self._check(x, mask)
        codebook = self.codebook
        indices = nearest_index(x, codebook)
        x = x.where(indices.unsqueeze(-1) >= 0, 0.0)  # what is not finite is 0, as its code, and gets no gradient
        codes = gather_codes(codebook.to(torch.promote_types(x.dtype, codebook.dtype)), indices)
        return Quantized(
            straight_through(x, codes.to(x.dtype)),
            indices,
            commitment_loss(x.to(codes.dtype), codes, mask),
            assignment_stats(x, indices, self.codebook_size, mask, num_candidates=self.num_candidates) if statistics else None,
        )

    forward = quantize

    def encode(self, x: Tensor) -> Tensor:
        """x [B, H, T, K] -> indices [B, H, T] int64; -1 for a vector that is not finite."""
        self._check(x)
        return nearest_index(x, self.codebook)

    def decode(self, indices: Tensor) -> Tensor:
        """indices [B, H, T] -> codes [B, H, T, K]; -1 gives zeros."""
        if indices.dim() < 2 or indices.shape[-2] != self.heads:
            raise ValueError(f"indices has shape {tuple(indices.shape)}: must be [..., {self.heads}, time]")
        return gather_codes(self.codebook, indices)

    def _check(self, x: Tensor, mask: Tensor | None = None) -> None:
        if not self.initialized:
            raise ValueError('the codebook waits for its k-means start (init = "kmeans"): call initialize_(x) with some vectors first')
        check_vectors(x, mask, self.heads, self.dim)

    # Changing

    @torch.no_grad()
    def initialize_(self, x: Tensor, mask: Tensor | None = None, *, seed: int = 0, reducer: Reducer | None = None) -> None:
        """Set the codebook to the k-means of x [B, H, T, K] and count to what each code has of them; discards what is pending.

        Vectors that are masked or not finite take no part. With several ranks `reducer` makes the result that of all their vectors.
        Raises ValueError when a head has no vector.
        """
        check_vectors(x, mask, self.heads, self.dim)
        vectors = x.detach().to(self.sum.dtype).movedim(1, 0).reshape(self.heads, -1, self.dim)
        keep = None if mask is None else mask.reshape(1, -1).expand(self.heads, -1)
        generator = torch.Generator(x.device).manual_seed(seed)
        codes, count = kmeans(vectors, self.codebook_size, mask=keep, generator=generator, reducer=reducer)
        count = count.clamp(min=COUNT_FLOOR)
        self.count.copy_(count)
        self.sum.copy_(codes * count.unsqueeze(-1))
        self.initialized = True
        self.discard_pending_()

    @torch.no_grad()
    def add_statistics_(self, statistics: CodebookStatistics) -> None:
        """Add to what is pending."""
        self._check_statistics(statistics)
        for pending, merged in zip(self.pending, merge_statistics(self.pending, statistics), strict=True):
            pending.copy_(merged)

    def _check_statistics(self, statistics: CodebookStatistics) -> None:
        for name, new, pending in zip(statistics._fields, statistics, self.pending, strict=True):
            if new.shape != pending.shape:
                raise ValueError(f"statistics.{name} has shape {tuple(new.shape)}: must be {tuple(pending.shape)}")

    def commit_(self, reducer: Reducer | None = None) -> None:
        """`update_codebooks_` of this module alone."""
        update_codebooks_(self, reducer)

    @torch.no_grad()
    def discard_pending_(self) -> None:
        """Forget what was added since the last update."""
        for tensor in self.pending:
            tensor.zero_()

    def _update_(self, statistics: CodebookStatistics) -> None:
        total, count = ema_update(self.sum, self.count, statistics, self.config.decay)
        if threshold := self.config.dead_code_threshold:
            total, count = replace_dead_codes(total, count, statistics.candidates, statistics.keys, threshold, reset_count=2 * threshold)
        self.sum.copy_(total)
        self.count.copy_(count)
        self.updates += 1
        self.discard_pending_()

    # Moving and storing

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LearnableVQ:
        def apply(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if not tensor.is_floating_point() or moved.dtype in _WIDE:
                return moved
            if tensor.is_meta or moved.is_meta:
                return torch.empty_like(tensor, device=moved.device)
            return tensor.to(moved.device)

        super()._apply(apply, recurse)
        self.pending = CodebookStatistics(*(apply(tensor) for tensor in self.pending))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}initialized"] = torch.tensor(self.initialized)
        for name, tensor in self.pending._asdict().items():
            destination[f"{prefix}pending.{name}"] = tensor

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        version = local_metadata.get("version", self._version)
        if version > self._version:
            error_msgs.append(f"{prefix or 'the codebook'} has format version {version}: this vqkit reads up to {self._version}")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        self.initialized = bool(state_dict.get(f"{prefix}initialized", True))
        pending = {name: f"{prefix}pending.{name}" for name in self.pending._fields}
        known = {f"{prefix}initialized", *pending.values()}
        unexpected_keys[:] = [key for key in unexpected_keys if key not in known]
        self.discard_pending_()
        for name, key in pending.items():
            own, stored = getattr(self.pending, name), state_dict.get(key)
            if stored is None:
                continue
            if stored.shape != own.shape:
                error_msgs.append(f"{key} has shape {tuple(stored.shape)}: must be {tuple(own.shape)}")
            elif local_metadata.get("assign_to_params_buffers", False):
                self.pending = self.pending._replace(**{name: stored})
            else:
                own.copy_(stored)


def _codebooks(model: nn.Module) -> list[LearnableVQ]:
    return [module for module in model.modules() if isinstance(module, LearnableVQ)]


def add_statistics_(model: nn.Module, statistics: Sequence[CodebookStatistics]) -> None:
    """Add one micro-batch's statistics, one entry a quantizer in the order of `model.modules()`."""
    quantizers = _codebooks(model)
    if len(statistics) != len(quantizers):
        raise ValueError(f"statistics has {len(statistics)} entries: must be {len(quantizers)}, one a quantizer of the model")
    for quantizer, entry in zip(quantizers, statistics, strict=True):
        quantizer._check_statistics(entry)
    for quantizer, entry in zip(quantizers, statistics, strict=True):
        quantizer.add_statistics_(entry)


@torch.no_grad()
def update_codebooks_(model: nn.Module, reducer: Reducer | None = None) -> None:
    """The one place where codebooks change: call it once per optimizer step, on every rank.

    Sums what is pending over the ranks of `reducer` (one all-reduce for all codebooks; None: this process alone), makes one step of the
    moving averages, replaces dead codes where the configuration says so, counts the update and empties what is pending.
    """
    quantizers = _codebooks(model)
    for quantizer, statistics in zip(quantizers, _reduce([q.pending for q in quantizers], reducer or LocalReducer()), strict=True):
        quantizer._update_(statistics)


def _reduce(pending: list[CodebookStatistics], reducer: Reducer) -> list[CodebookStatistics]:
    """The statistics of all ranks: counts and sums added, the candidates of each rank in a slot of its own, then the best of all."""
    if reducer.world_size == 1 or not pending:
        return pending
    dtype = torch.float64 if any(s.sum.dtype == torch.float64 for s in pending) else torch.float32
    parts = [tensor for s in pending for tensor in s._replace(candidates=_in_slot(s.candidates, reducer), keys=_in_slot(s.keys, reducer))]
    flat = torch.cat([part.reshape(-1).to(dtype) for part in parts])
    reducer.all_reduce_(flat)
    summed = [piece.view(part.shape) for piece, part in zip(flat.split([part.numel() for part in parts]), parts, strict=True)]
    fields = len(CodebookStatistics._fields)
    return [_merge_slots(CodebookStatistics(*summed[i : i + fields])) for i in range(0, len(summed), fields)]


def _in_slot(rows: Tensor, reducer: Reducer) -> Tensor:
    slots = rows.new_zeros((reducer.world_size, *rows.shape))
    slots[reducer.rank] = rows
    return slots


def _merge_slots(summed: CodebookStatistics) -> CodebookStatistics:
    """Of statistics whose candidates and keys have an axis of ranks in front: one choice of candidates."""
    candidates, keys = (slots.movedim(0, 1).flatten(1, 2) for slots in (summed.candidates, summed.keys))
    candidates, keys = largest_keys(candidates, keys, summed.keys.shape[-1])
    return summed._replace(candidates=candidates, keys=keys)
