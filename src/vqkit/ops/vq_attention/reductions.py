"""How the blocks of the blocked form come by the mean value of each code, and how gradients find their way back.

What a block finds in the cache is a prefix sum over the values that have left the window, cut where the document changes, over the counts.
`Running` carries the sums from group to group, so that no more than one group's means exist at a time; the means of all blocks at once,
`Held`, come of one of three scans over the blocks, those of the official code.

Shapes: B batch, H key heads, R blocks, N blocks of a group, L block length, M window memory, C codes, V value width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from vqkit.ops.vq_attention.groups import Call, Gradients, Group
from vqkit.ops.vq_attention.plan import alive


class Reduction(Protocol):
    """The means of all groups of a call, in the order of its lanes and runs, backwards for gradients."""

    def means(self, group: Group, v_extended: Tensor) -> Tensor:
        """Means [N, C, V] that the blocks of a group find."""

    def add_gradient(self, group: Group, grad_means: Tensor | None, grads: Gradients) -> None:
        """Take the gradient of what `means` returned; groups come from the last to the first."""

    def finish(self, grads: Gradients) -> Tensor:
        """Gradient [B, H, C, V] of the state's means, once all groups are through."""


def _rows(call: Call, group: Group) -> Tensor:
    """Codes [lanes, N / lanes, L] of what leaves the window after each block of a group."""
    return call.plan.leaving[group.at].reshape(group.lanes.number, group.length, -1)


class Running:
    """Prefix sums carried along; the gradient of the sums carried back."""

    def __init__(self, call: Call, mean: Tensor, borders: Tensor, grad_mean: Tensor | None = None) -> None:
        """mean [B, H, C, V] of the state. borders [runs, B, H, C + 1, V]: the sums before each run, which the forward pass fills."""
        self.call, self.borders, self.backwards = call, borders, grad_mean is not None
        count = call.plan.counts[:, :, -1 if self.backwards else 0, :, None]
        # The last row collects the tokens that must not count; its gradient is 0.
        start = mean * count if grad_mean is None else grad_mean / count.clamp(min=1)
        self.carry = F.pad(start, (0, 0, 0, 1))

    def _lanes(self, group: Group) -> Tensor:
        return self.carry[group.at[:2]].view(group.lanes.number, -1, self.carry.shape[-1])

    def _keep(self, group: Group, r: int) -> Tensor | None:
        keep = self.call.plan.keep
        return None if keep is None else keep[group.lanes.batch, r].repeat_interleave(group.lanes.shape[1])[:, None, None]

    def means(self, group: Group, v_extended: Tensor) -> Tensor:
        border = self.borders[group.first // self.call.length][group.at[:2]]
        sums = border.clone().view(group.lanes.number, -1, border.shape[-1]) if self.backwards else self._lanes(group)
        if not self.backwards:
            border.copy_(sums.view_as(border))
        size, width, lanes = sums.shape[1] - 1, sums.shape[2], group.lanes.number
        inverse = self.call.plan.inverse(*group.at[:2], group.first, group.last).view(lanes, group.length, size, 1)
        rows = _rows(self.call, group)
        gained = sums.new_zeros(lanes, group.length, size + 1, width)
        table = torch.arange(group.blocks, device=sums.device)[:, None] * (size + 1)
        left = v_extended[:, : rows[0].numel()].reshape(-1, width)
        gained.view(-1, width).index_add_(0, (rows.flatten(0, 1) + table).flatten(), left.to(sums.dtype))
        means = sums.new_empty(lanes, group.length, size, width)
        for g in range(group.length):
            torch.mul(sums[:, :-1], inverse[:, g], out=means[:, g])
            keep = self._keep(group, group.first + g)
            if keep is not None:
                sums.mul_(keep)
            sums.add_(gained[:, g])
        return means.view(group.blocks, size, width)

    def after(self) -> Tensor:
        """Means [B, H, C, V] after the last block, once all groups are through."""
        return self.carry[:, :, :-1] / self.call.plan.counts[:, :, -1, :, None].clamp(min=1)

    def add_gradient(self, group: Group, grad_means: Tensor | None, grads: Gradients) -> None:
        carry = self._lanes(group)
        size, width = carry.shape[1] - 1, carry.shape[2]
        after = carry.new_empty(group.lanes.number, group.length, size + 1, width)
        entering = None
        if grad_means is not None:
            inverse = self.call.plan.inverse(*group.at[:2], group.first, group.last).view(group.blocks, size, 1)
            entering = (grad_means * inverse).view(group.lanes.number, group.length, size, width)
        for g in reversed(range(group.length)):
            after[:, g] = carry
            keep = self._keep(group, group.first + g)
            if keep is not None:
                carry.mul_(keep)
            if entering is not None:
                carry[:, :-1].add_(entering[:, g])
        _gather_into(
            grads.v[group.at[:2]], after.flatten(0, 1), _rows(self.call, group).flatten(0, 1), group.first * self.call.options.block_len
        )

    def finish(self, grads: Gradients) -> Tensor:
        return self.carry[:, :, :-1] * self.call.plan.counts[:, :, 0, :, None]


def _gather_into(grad_v: Tensor, table: Tensor, rows: Tensor, start: int) -> None:
    """Add row `rows` [N, L] of each block's table [N, C + 1, V] to the tokens grad_v [b, h, M + R L, V] from `start` on."""
    blocks, size, width = table.shape
    flat = rows + torch.arange(blocks, device=rows.device)[:, None] * size
    found = table.reshape(-1, width).index_select(0, flat.flatten())
    tokens = found.shape[0] // (grad_v.shape[0] * grad_v.shape[1])
    grad_v[:, :, start : start + tokens] += found.view(*grad_v.shape[:2], tokens, width)


Scan = Callable[[Tensor, Tensor | None, bool], Tensor]
"""Entries [B, H, R + 1, C V], keep [B, R], backwards -> what has entered by each row and is still there; backwards the transposed map."""


def serial(entries: Tensor, keep: Tensor | None, backwards: bool) -> Tensor:
    """One block after the other."""
    steps = range(entries.shape[2] - 1)
    for r in reversed(steps) if backwards else steps:
        source, target = (r + 1, r) if backwards else (r, r + 1)
        carried = entries[:, :, source]
        entries[:, :, target] += carried if keep is None else carried * keep[:, None, r, None]
    return entries


def matmul(entries: Tensor, keep: Tensor | None, backwards: bool) -> Tensor:
    """One product with a triangular matrix of R + 1 rows."""
    weights = alive(keep, entries.shape[2] - 1, entries)[:, None]
    return (weights.mT if backwards else weights) @ entries


def associative(entries: Tensor, keep: Tensor | None, backwards: bool) -> Tensor:
    """log2 R rounds, each of which doubles how far back a row reaches (Hillis and Steele 1986)."""
    rows, step = entries.shape[2], 1
    while step < rows:
        near, far = slice(step, None), slice(None, rows - step)
        target, source = (far, near) if backwards else (near, far)
        carried = entries[:, :, source]
        if keep is not None:
            kept = keep.unfold(1, step, 1).amin(2)  # [B, rows - step]: nothing was cut between the two rows
            carried = carried * kept[:, None, :, None]
        summed = entries.clone()
        summed[:, :, target] += carried
        entries, step = summed, 2 * step
    return entries


SCANS: dict[str, Scan] = {"serial": serial, "matmul": matmul, "associative": associative}


class Held:
    """The means of all blocks at once, by a scan over all that enters the cache."""

    def __init__(self, call: Call, mean: Tensor, scan: Scan, grad_mean: Tensor | None = None) -> None:
        self.call, self.scan, plan = call, scan, call.plan
        batch, heads, size, width = mean.shape
        entries = mean.new_zeros(batch, heads, plan.blocks + 1, size + 1, width)
        entries[:, :, 0, :size] = mean * plan.counts[:, :, 0, :, None]
        time = plan.blocks * call.options.block_len
        left = torch.cat([call.v_window, call.v], 2)[:, :, :time].to(mean.dtype)
        block = torch.arange(1, plan.blocks + 1, device=mean.device)[:, None] * (size + 1)
        lane = torch.arange(batch * heads, device=mean.device).view(batch, heads, 1, 1) * ((plan.blocks + 1) * (size + 1))
        entries.view(-1, width).index_add_(0, (plan.leaving + block + lane).flatten(), left.reshape(-1, width))
        sums = scan(entries[..., :size, :].flatten(3), plan.keep, False).unflatten(3, (size, width))
        self.all = sums * plan.counts.clamp(min=1).reciprocal()[..., None]
        self.grads = torch.zeros_like(self.all) if grad_mean is not None else self.all.new_empty(0)
        if grad_mean is not None:
            self.grads[:, :, -1] = grad_mean

    def means(self, group: Group, v_extended: Tensor) -> Tensor:
        return self.all[group.at].reshape(group.blocks, *self.all.shape[3:])

    def after(self) -> Tensor:
        return self.all[:, :, -1].clone()

    def add_gradient(self, group: Group, grad_means: Tensor | None, grads: Gradients) -> None:
        if grad_means is not None:
            self.grads[group.at] = grad_means.view(*group.grid, *grad_means.shape[1:])

    def finish(self, grads: Gradients) -> Tensor:
        plan = self.call.plan
        size, width = self.all.shape[3:]
        of_sums = self.grads * plan.counts.clamp(min=1).reciprocal()[..., None]
        entered = self.scan(of_sums.flatten(3), plan.keep, True).unflatten(3, (size, width))
        table = F.pad(entered[:, :, 1:], (0, 0, 0, 1)).flatten(0, 2)
        _gather_into(grads.v, table, plan.leaving.flatten(0, 2), 0)
        return entered[:, :, 0] * plan.counts[:, :, 0, :, None]
