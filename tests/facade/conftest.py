"""Draws that the facade and the peer can make alike: of what is drawn by content, not by place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vqkit.ops.codebook
import vqkit.ops.coding
import vqkit.ops.kmeans
import vqkit.quantizers.implicit as implicit
import vqkit.quantizers.vector_quantize as native
from facade.peer import peer

MOST_CODES = 16
there = peer.vector_quantize_pytorch


@pytest.fixture
def same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    every = -(-torch.rand(MOST_CODES, generator=torch.Generator().manual_seed(1)).clamp(1e-6).log()).log()

    def in_order(rows: Tensor) -> Tensor:
        """Rows [N, K] in an order of their own."""
        return rows[rows.double().matmul(torch.linspace(1.0, 2.0, rows.shape[-1], dtype=torch.float64)).argsort()]

    def peers_sample(samples: Tensor, num: int) -> Tensor:
        return torch.stack([in_order(own)[((torch.arange(num) + 0.5) * len(own) / num).long()] for own in samples])

    def kmeans_start(start: Any, metric: str, sample: Tensor, present: Tensor, num: int, generator: Any) -> Tensor:
        return torch.stack([peers_sample(own[is_there][None], num)[0] for own, is_there in zip(sample, present, strict=True)])

    def candidates(x: Tensor, dropped: Tensor | None, num: int) -> tuple[Tensor, Tensor]:
        dropped = torch.zeros(x.shape[:2], dtype=torch.bool) if dropped is None else dropped
        rows, keys = x.new_zeros(len(x), num, x.shape[-1]), x.new_zeros(len(x), num)
        for head, (own, lost) in enumerate(zip(x, dropped, strict=True)):
            kept = in_order(own[~lost])[:num]
            rows[head, : len(kept)], keys[head, : len(kept)] = kept, 1.0
        return rows, keys

    def first_of_order(samples: Tensor, num: int) -> Tensor:
        return torch.stack([in_order(own)[:num] for own in samples])

    def sample_indices(x: Tensor, codes: Tensor, num: int = 1, *, temperature: float, metric: str) -> Tensor:
        scores = (x @ codes.mT if metric == "product" else -torch.cdist(x, codes)) / temperature + every[: codes.shape[-2]]
        return scores.topk(num, -1).indices

    def draw(scores: Tensor, num: int, temperature: float) -> Tensor:
        return (scores / temperature + every[: scores.shape[-1]]).topk(num, -1).indices

    def draw_by_logits(noise: Tensor, logits: Tensor) -> Tensor:
        return draw(logits, noise.shape[-1], 1.0)

    init = there.Codebook.__init__

    def peers_init(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.replace_sample_fn = there.batched_sample_vectors  # the number of dead codes decides nothing else
        self.sample_fn = peers_sample

    monkeypatch.setattr(there, "entropy", lambda shares: -torch.xlogy(shares, shares).sum(-1))  # without its floor, which is a deviation
    monkeypatch.setattr(torch.nn.functional, "pairwise_distance", lambda x, y: torch.linalg.vector_norm(x - y, dim=-1))  # nor this one's
    monkeypatch.setattr(there, "gumbel_noise", lambda t: every[: t.shape[-1]].expand(t.shape))
    monkeypatch.setattr(there, "batched_sample_vectors", first_of_order)
    monkeypatch.setattr(there.Codebook, "__init__", peers_init)
    monkeypatch.setattr(native, "sample_indices", sample_indices)
    monkeypatch.setattr(implicit, "draw_by_logits", draw_by_logits)
    for module in (native, implicit):
        monkeypatch.setattr(module, "draw", draw)
        monkeypatch.setattr(module, "orthogonality_loss", _first_codes(module.orthogonality_loss))
    monkeypatch.setattr(vqkit.ops.kmeans, "_start", kmeans_start)
    monkeypatch.setattr(vqkit.ops.kmeans, "_SAMPLED_PER_CODE", 1000)
    for module in (vqkit.ops.codebook, vqkit.ops.coding):
        monkeypatch.setattr(module, "draw_candidates", candidates)
    monkeypatch.setattr(torch, "randn_like", lambda t, **_: torch.linspace(-1.0, 1.5, t.shape[-1]).to(t).expand(t.shape))
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.arange(n))


def _first_codes(loss: Any) -> Any:
    def of_the_first(codes: Tensor, active: Tensor | None = None, *, max_codes: int | None = None, noise: Any = None) -> Tensor:
        return loss(codes, active, max_codes=max_codes, noise=torch.linspace(0.9, 0.1, codes.shape[-2]).expand(codes.shape[:-1]))

    return of_the_first
