"""The functions of tensors that the peer's modules offer beside its classes, in terms of vqkit's where there is an equal.

Shapes: H codebooks, N vectors, C codes, K width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqkit.dist import LocalReducer, Reducer, default_reducer
from vqkit.ops import estimators
from vqkit.ops.kmeans import kmeans as _kmeans


def exists(val: Any) -> bool:
    """Whether it is not None."""
    return val is not None


def default(val: Any, d: Any) -> Any:
    """`val`, or `d` where that is None."""
    return d if val is None else val


def noop(*args: Any, **kwargs: Any) -> None:
    """Nothing."""


def identity(t: Any) -> Any:
    """What it is given."""
    return t


def is_empty(t: Tensor) -> bool:
    """Whether it has no entry."""
    return t.numel() == 0


def at_most_one_of(*bools: bool) -> bool:
    """Whether no two are true."""
    return sum(map(bool, bools)) < 2


def l2norm(t: Tensor, dim: int = -1, eps: float = 1e-6) -> Tensor:
    """t scaled to length 1 along `dim`; lengths below `eps` count as `eps`."""
    return F.normalize(t, dim=dim, eps=eps)


def safe_div(num: Tensor, den: Tensor, eps: float = 1e-6) -> Tensor:
    """num / max(den, eps)."""
    return num / den.clamp(min=eps)


def append_dims_to(t: Tensor, ndims: int) -> Tensor:
    """t with axes of length 1 behind, `ndims` in all. Raises ValueError where it has more."""
    if t.dim() > ndims:
        raise ValueError(f"t has {t.dim()} axes: must have at most ndims = {ndims}")
    return t[(..., *[None] * (ndims - t.dim()))]


def Sequential(*modules: nn.Module | None) -> nn.Module | None:
    """Those that are not None, one after the other: None where there is none, itself where there is one."""
    found = [module for module in modules if module is not None]
    if len(found) > 1:
        return nn.Sequential(*found)
    return found[0] if found else None


def cdist(x: Tensor, y: Tensor, eps: float = 1e-8) -> Tensor:
    """Distances [B, I, J] of x [B, I, K] and y [B, J, K], at least sqrt(eps)."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").clamp(min=sqrt(eps))


def log(t: Tensor, eps: float = 1e-20) -> Tensor:
    """The logarithm of max(t, eps)."""
    return t.clamp(min=eps).log()


def entropy(prob: Tensor, eps: float = 1e-5) -> Tensor:
    """Of distributions [..., C], in nats: [...]. Probabilities below `eps` have its logarithm."""
    return -(prob * log(prob, eps)).sum(-1)


def accum_grad_(t: Tensor, grad: Tensor) -> None:
    """Add `grad` to the gradient of t."""
    t.grad = grad.detach().clone() if t.grad is None else t.grad.add_(grad)


def ema_inplace(old: Tensor, new: Tensor, decay: float, weight: Tensor | float | None = None) -> None:
    """old = decay * old + (1 - decay) * (new + the gradient of old, if any, which is then forgotten), with 1 - decay times `weight`.

    old, new [H, C, ...]; weight a number, [C] or [H, C].
    """
    if old.grad is not None:
        new, old.grad = new + old.grad, None
    share = torch.as_tensor(1.0 if weight is None else weight, dtype=old.dtype, device=old.device) * (1.0 - decay)
    if share.dim() and share.shape not in (old.shape[1:2], old.shape[:2]):
        raise ValueError(f"weight has shape {tuple(share.shape)}: must be {tuple(old.shape[1:2])} or {tuple(old.shape[:2])}, one a code")
    share = append_dims_to(share.expand(old.shape[:2]), old.dim())
    old.data.lerp_(new.detach().to(old), share)


def lens_to_mask(lens: Tensor, max_length: int) -> Tensor:
    """[B] lengths -> [B, max_length] bool."""
    return torch.arange(max_length, device=lens.device) < lens.unsqueeze(-1)


def uniform_init(*shape: int) -> Tensor:
    """Codes drawn within sqrt(6 / (codes * width))."""
    return nn.init.kaiming_uniform_(torch.empty(shape))


def gumbel_noise(t: Tensor) -> Tensor:
    """Of the shape of t, drawn by the global random generator."""
    return -log(-log(torch.zeros_like(t).uniform_(0, 1)))


def gumbel_sample(
    logits: Tensor,
    temperature: float = 1.0,
    stochastic: bool = False,
    straight_through: bool = False,
    dim: int = -1,
    training: bool = True,
    topk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The index of the largest logit, or the `topk` largest, and one-hot rows; in training drawn where `stochastic`.

    With `straight_through` the rows have the gradient of softmax(logits / temperature) (Jang et al., 2017).
    """
    drawn = training and stochastic and temperature > 0
    scores = logits / temperature + gumbel_noise(logits) if drawn else logits
    index = scores.argmax(dim) if topk is None else scores.topk(topk, dim=dim).indices
    rows = F.one_hot(index, logits.shape[dim]).to(logits.dtype)
    if straight_through and training and temperature > 0:
        soft = (logits / temperature).softmax(dim)
        rows = rows + (soft - soft.detach())
    return index, rows


def laplace_smoothing(x: Tensor, n_categories: int, eps: float = 1e-5, dim: int = -1) -> Tensor:
    """Shares of counts x, to each of which `eps` is added."""
    return (x + eps) / (x.sum(dim, keepdim=True) + n_categories * eps)


def sample_vectors(samples: Tensor, num: int) -> Tensor:
    """`num` of the vectors [N, K], without replacement if there are so many."""
    have = len(samples)
    if have >= num:
        return samples[torch.randperm(have, device=samples.device)[:num]]
    return samples[torch.randint(0, have, (num,), device=samples.device)]


def batched_sample_vectors(samples: Tensor, num: int) -> Tensor:
    """`sample_vectors` of each of [H, N, K]: [H, num, K]."""
    return torch.stack([sample_vectors(own, num) for own in samples])


def pad_shape(shape: Sequence[int], size: int, dim: int = 0) -> list[int]:
    """The shape with `size` along `dim`."""
    return [*shape[:dim], size, *shape[dim + 1 :]]


def sample_multinomial(total_count: int, probs: Tensor) -> Tensor:
    """How often each category of `probs` [P] was drawn in `total_count` draws: int64 [P]."""
    drawn = torch.multinomial(probs.detach().float().cpu(), int(total_count), replacement=True) if total_count else torch.empty(0).long()
    return torch.bincount(drawn, minlength=len(probs)).to(probs.device)


def all_gather_sizes(x: Tensor, dim: int) -> Tensor:
    """The length of x along `dim` on each process: int64 [P]."""
    reducer = default_reducer()
    sizes = torch.zeros(reducer.world_size, dtype=torch.int64, device=x.device)
    sizes[reducer.rank] = x.shape[dim]
    reducer.all_reduce_(sizes)
    return sizes


def all_gather_variably_sized(x: Tensor, sizes: Tensor | Sequence[int], dim: int = 0) -> list[Tensor]:
    """The x of each process, whose lengths along `dim` are `sizes`."""
    reducer = default_reducer()
    found = []
    for rank, size in enumerate(sizes):
        part = x.clone() if rank == reducer.rank else x.new_zeros(pad_shape(x.shape, int(size), dim))
        part = part.contiguous()
        reducer.all_reduce_(part)
        found.append(part)
    return found


def sample_vectors_distributed(local_samples: Tensor, num: int) -> Tensor:
    """`num` of the vectors [1, N, K] of all processes, the same on each: [1, num, K]. A process may have none."""
    reducer = default_reducer()
    rows = local_samples.squeeze(0)
    sizes = all_gather_sizes(rows, 0)
    each = torch.zeros_like(sizes)
    if reducer.rank == 0:
        each = sample_multinomial(num, sizes / sizes.sum())
    reducer.all_reduce_(each)
    own = int(each[reducer.rank])
    drawn = sample_vectors(rows, own) if own else rows[:0]
    return torch.cat(all_gather_variably_sized(drawn, each)).unsqueeze(0)


def batched_bincount(x: Tensor, *, minlength: int) -> Tensor:
    """How often each index stands in each row of x [H, N] int64: [H, minlength]."""
    return x.new_zeros(len(x), minlength).scatter_add_(-1, x, torch.ones_like(x))


def kmeans(
    samples: Tensor,
    num_clusters: int,
    num_iters: int = 10,
    use_cosine_sim: bool = False,
    sample_fn: Callable[[Tensor, int], Tensor] = batched_sample_vectors,
    all_reduce_fn: Callable[..., Any] = noop,
) -> tuple[Tensor, Tensor]:
    """Cluster samples [H, N, K], from codes that `sample_fn` draws: means [H, C, K] and how many chose each, int64 [H, C].

    With an `all_reduce_fn` of one's own the samples are those of all processes.
    """
    reducer: Reducer = LocalReducer() if all_reduce_fn is noop else default_reducer()
    start, metric = sample_fn(samples, num_clusters), "cosine" if use_cosine_sim else "euclidean"
    found = _kmeans(samples, num_clusters, iterations=num_iters, start=start, metric=metric, reducer=reducer)
    return found.codes, found.count.to(torch.int64)


def straight_through(src: Tensor, tgt: Tensor) -> Tensor:
    """tgt, with the gradient going to src as it is (Bengio et al., 2013)."""
    return estimators.straight_through(src, tgt)


def efficient_rotation_trick_transform(u: Tensor, q: Tensor, e: Tensor) -> Tensor:
    """e [N, K] under the rotation of unit vectors u to q (Fifty et al., 2024, section 4.2), which is a constant of the gradient."""
    u, q = u.detach(), q.detach()
    w = l2norm(u + q)
    return e - 2 * (e * w).sum(-1, keepdim=True) * w + 2 * (e * u).sum(-1, keepdim=True) * q


def rotate_to(src: Tensor, tgt: Tensor) -> Tensor:
    """tgt, with the gradient rotated and scaled to src (Fifty et al., 2024)."""
    return estimators.rotation_trick(src, tgt)


def directional_reparam(src: Tensor, tgt: Tensor, noise_variance: float = 5e-3) -> Tensor:
    """src moved by the length of its error in a noisy direction towards tgt (DiVeQ; Vali et al., 2025)."""
    return estimators.directional(src, tgt, sigma2=noise_variance)


def is_distributed() -> bool:
    """Whether there are several processes now."""
    return default_reducer().world_size > 1


def orthogonal_loss_fn(t: Tensor) -> Tensor:
    """The mean squared difference of the cosines of all pairs of codes t [H, C, K] from the identity (Shin et al., 2021, equation 2)."""
    codes = l2norm(t)
    cosines = codes @ codes.mT
    return (cosines - torch.eye(t.shape[-2], dtype=t.dtype, device=t.device)).square().mean()
