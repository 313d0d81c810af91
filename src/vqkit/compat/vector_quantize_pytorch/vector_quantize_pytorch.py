"""The peer's VectorQuantize, and what its module offers beside: one `vqkit.quantizers.VectorQuantize` under another signature.

The parameters, buffers and layers are those of the parts, registered here by the peer's names; `native` is the quantizer made of them.

Shapes: B batch, N positions, D width of the input, K width of a code, C codes.
"""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Callable, Iterable
from numbers import Integral
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vqkit.compat.vector_quantize_pytorch import functions, translate
from vqkit.compat.vector_quantize_pytorch.arguments import in_these_words
from vqkit.compat.vector_quantize_pytorch.codebook import Call, Codebook, CodeWeights
from vqkit.compat.vector_quantize_pytorch.functions import Sequential as Sequential
from vqkit.compat.vector_quantize_pytorch.functions import accum_grad_ as accum_grad_
from vqkit.compat.vector_quantize_pytorch.functions import all_gather_sizes as all_gather_sizes
from vqkit.compat.vector_quantize_pytorch.functions import all_gather_variably_sized as all_gather_variably_sized
from vqkit.compat.vector_quantize_pytorch.functions import append_dims_to as append_dims_to
from vqkit.compat.vector_quantize_pytorch.functions import at_most_one_of as at_most_one_of
from vqkit.compat.vector_quantize_pytorch.functions import batched_bincount as batched_bincount
from vqkit.compat.vector_quantize_pytorch.functions import batched_sample_vectors as batched_sample_vectors
from vqkit.compat.vector_quantize_pytorch.functions import cdist as cdist
from vqkit.compat.vector_quantize_pytorch.functions import default as default
from vqkit.compat.vector_quantize_pytorch.functions import directional_reparam as directional_reparam
from vqkit.compat.vector_quantize_pytorch.functions import efficient_rotation_trick_transform as efficient_rotation_trick_transform
from vqkit.compat.vector_quantize_pytorch.functions import ema_inplace as ema_inplace
from vqkit.compat.vector_quantize_pytorch.functions import entropy as entropy
from vqkit.compat.vector_quantize_pytorch.functions import exists as exists
from vqkit.compat.vector_quantize_pytorch.functions import gumbel_noise as gumbel_noise
from vqkit.compat.vector_quantize_pytorch.functions import gumbel_sample as gumbel_sample
from vqkit.compat.vector_quantize_pytorch.functions import identity as identity
from vqkit.compat.vector_quantize_pytorch.functions import is_distributed as is_distributed
from vqkit.compat.vector_quantize_pytorch.functions import is_empty as is_empty
from vqkit.compat.vector_quantize_pytorch.functions import kmeans as kmeans
from vqkit.compat.vector_quantize_pytorch.functions import l2norm as l2norm
from vqkit.compat.vector_quantize_pytorch.functions import laplace_smoothing as laplace_smoothing
from vqkit.compat.vector_quantize_pytorch.functions import lens_to_mask as lens_to_mask
from vqkit.compat.vector_quantize_pytorch.functions import log as log
from vqkit.compat.vector_quantize_pytorch.functions import noop as noop
from vqkit.compat.vector_quantize_pytorch.functions import orthogonal_loss_fn as orthogonal_loss_fn
from vqkit.compat.vector_quantize_pytorch.functions import pad_shape as pad_shape
from vqkit.compat.vector_quantize_pytorch.functions import rotate_to as rotate_to
from vqkit.compat.vector_quantize_pytorch.functions import safe_div as safe_div
from vqkit.compat.vector_quantize_pytorch.functions import sample_multinomial as sample_multinomial
from vqkit.compat.vector_quantize_pytorch.functions import sample_vectors as sample_vectors
from vqkit.compat.vector_quantize_pytorch.functions import sample_vectors_distributed as sample_vectors_distributed
from vqkit.compat.vector_quantize_pytorch.functions import straight_through as straight_through
from vqkit.compat.vector_quantize_pytorch.functions import uniform_init as uniform_init
from vqkit.compat.vector_quantize_pytorch.own_optimizer import OwnsOptimizer
from vqkit.compat.vector_quantize_pytorch.rows import at_most, hide, learns, project_out
from vqkit.compat.vector_quantize_pytorch.settings import Settable, is_watched, keep_synchronized, overrides, unheard
from vqkit.dist import LocalReducer
from vqkit.quantizers.base import Quantized
from vqkit.quantizers.committed import in_backward
from vqkit.quantizers.config import Estimator, Gumbel, Loss
from vqkit.quantizers.layout import check_indices, check_tensor, has_hooks, is_nothing
from vqkit.quantizers.vector_quantize import VectorQuantize as _VectorQuantize

LossBreakdown = namedtuple("LossBreakdown", ["commitment", "codebook_diversity", "orthogonal_reg", "inplace_optimize"])
"""The losses, unweighted; 0 where there is none."""


_READ_IN_CALLS = (
    "has_commitment_loss",
    "commitment_use_cross_entropy_loss",
    "learnable_codebook",
    "has_codebook_orthogonal_loss",
    "orthogonal_reg_active_codes_only",
    "orthogonal_reg_max_codes",
    "has_codebook_diversity_loss",
    "codebook_diversity_temperature",
    "rotation_trick",
    "directional_reparam",
    "directional_reparam_variance",
    "route_gradients_to_input",
    "sync_update_v",
    "accept_image_fmap",
    "accept_3d_fmap",
    "channel_last",
    "return_zeros_for_masked_padding",
)
"""Arguments that the peer looks up as attributes in every call, of those that say what the quantizer is."""

_NEVER_READ = (
    "dim",
    "codebook_dim",
    "heads",
    "separate_codebook_per_head",
    "layernorm_after_project_in",
    "stochastic_sample_codes",
    "sample_codebook_temp",
    "straight_through",
    "reinmax",
    "sync_codebook",
)
"""Those that it has read when it is made."""

WEIGHTS = {
    "commitment": "commitment_weight",
    "cross_entropy_commitment": "commitment_weight",
    "orthogonality": "orthogonal_reg_weight",
    "diversity": "codebook_diversity_loss_weight",
}
"""The attributes that weigh the losses of vqkit."""


@in_these_words()
class VectorQuantize(OwnsOptimizer, Settable):
    """`codebook_size` codes for vectors of width `dim`, with the peer's arguments; what each means here is in docs/migration.md.

    Inputs are [B, N, D], [B, D] (one vector each), with channel_last=False [B, D, N], with accept_image_fmap [B, D, H, W], with
    accept_3d_fmap [B, D, T, H, W]. A call returns the quantized vectors like the input, the indices int64 [B, N] ([B, N, heads] with
    several heads; -1: masked or not finite), and the loss [], 0 in eval mode; in training it is one step of the codebook.

    Raises ValueError for arguments that contradict each other.
    """

    made_of = frozenset((*_READ_IN_CALLS, "project_in", "project_out", "_codebook"))
    fixed = frozenset(("heads", "separate_codebook_per_head", "has_projections"))
    uncalled = {"maybe_split_heads_from_input": ("forward",)}  # noqa: RUF012

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        heads: int = 1,
        separate_codebook_per_head: bool = False,
        decay: float = 0.8,
        eps: float = 1e-5,
        freeze_codebook: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sync_kmeans: bool = True,
        use_cosine_sim: bool = False,
        layernorm_after_project_in: bool = False,
        threshold_ema_dead_code: float = 0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        commitment_weight: float = 1.0,
        commitment_use_cross_entropy_loss: bool = False,
        orthogonal_reg_weight: float = 0.0,
        orthogonal_reg_active_codes_only: bool = False,
        orthogonal_reg_max_codes: int | None = None,
        codebook_diversity_loss_weight: float = 0.0,
        codebook_diversity_temperature: float = 100.0,
        stochastic_sample_codes: bool = False,
        sample_codebook_temp: float = 1.0,
        straight_through: bool = False,
        rotation_trick: bool | None = None,
        directional_reparam: bool = False,
        directional_reparam_variance: float = 5e-3,
        sync_codebook: bool | None = None,
        sync_affine_param: bool = False,
        ema_update: bool | None = None,
        vq_bridge: nn.Module | None = None,
        manual_ema_update: bool = False,
        learnable_codebook: bool | None = None,
        in_place_codebook_optimizer: Callable[..., Optimizer] | None = None,
        manual_in_place_optimizer_update: bool = False,
        affine_param: bool = False,
        affine_param_batch_decay: float = 0.99,
        affine_param_codebook_decay: float = 0.9,
        sync_update_v: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        route_gradients_to_input: bool = True,
        *,
        reinmax: bool = False,
    ) -> None:
        given = translate.settled({name: value for name, value in locals().items() if name not in ("self", "__class__")})
        super().__init__()
        self.dim, self.heads, self.separate_codebook_per_head = dim, heads, separate_codebook_per_head
        inner = given["codebook_dim"] * heads
        self.has_projections = inner != dim
        project_in = [nn.Linear(dim, inner), *([nn.LayerNorm(inner)] if layernorm_after_project_in else [])] if inner != dim else []
        self.project_in = functions.Sequential(*project_in) or nn.Identity()
        self.project_out = nn.Linear(inner, dim) if inner != dim else nn.Identity()
        self.eps, self.codebook_size, self.freeze_codebook = eps, codebook_size, freeze_codebook
        self.has_commitment_loss = given["has_commitment_loss"]
        self.commitment_weight, self.commitment_use_cross_entropy_loss = commitment_weight, commitment_use_cross_entropy_loss
        self.has_codebook_orthogonal_loss = given["has_codebook_orthogonal_loss"]
        self.orthogonal_reg_weight = orthogonal_reg_weight
        self.orthogonal_reg_active_codes_only = orthogonal_reg_active_codes_only
        self.orthogonal_reg_max_codes = orthogonal_reg_max_codes
        self.has_codebook_diversity_loss = given["has_codebook_diversity_loss"]
        self.codebook_diversity_temperature = codebook_diversity_temperature
        self.codebook_diversity_loss_weight = codebook_diversity_loss_weight
        self.learnable_codebook, self.rotation_trick = given["learnable_codebook"], given["rotation_trick"]
        self.directional_reparam, self.directional_reparam_variance = directional_reparam, directional_reparam_variance
        self.route_gradients_to_input, self.sync_update_v = route_gradients_to_input, sync_update_v
        self.use_cosine_sim = use_cosine_sim
        self.accept_image_fmap, self.accept_3d_fmap, self.channel_last = accept_image_fmap, accept_3d_fmap, channel_last
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self._codebook = Codebook(
            given["codebook_dim"],
            codebook_size,
            heads if separate_codebook_per_head else 1,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            sync_kmeans=sync_kmeans,
            decay=decay,
            eps=eps,
            threshold_ema_dead_code=threshold_ema_dead_code,
            use_ddp=bool(sync_codebook),
            learnable_codebook=bool(given["learnable_codebook"] or orthogonal_reg_weight > 0.0),
            sample_codebook_temp=sample_codebook_temp,
            ema_update=given["ema_update"],
            manual_ema_update=manual_ema_update,
            affine_param=affine_param,
            sync_affine_param=sync_affine_param,
            affine_param_batch_decay=affine_param_batch_decay,
            affine_param_codebook_decay=affine_param_codebook_decay,
            use_cosine_sim=use_cosine_sim,
            vq_bridge=vq_bridge,
        )
        self.in_place_codebook_optimizer = _own_optimizer(in_place_codebook_optimizer, self._codebook)
        self.manual_in_place_optimizer_update = manual_in_place_optimizer_update
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)
        if sync_codebook is False:
            self._codebook.synchronizes = False
        hide(self, _given={name: given[name] for name in _NEVER_READ}, walked=None)
        self._build()

    native: _VectorQuantize
    walked: list[Quantized] | None
    """Where the results of calls are left by a residual quantizer, which then learns from them."""
    _given: dict[str, Any]
    estimator: Estimator
    _losses: tuple[Loss, ...]
    learned_losses: tuple[Loss, ...]

    def options(self) -> dict[str, Any]:
        """Those of the quantizer, as the attributes are now."""
        codebook = {"codebook_size": self._codebook.codebook_size, "use_cosine_sim": self._codebook.use_cosine_sim}
        return translate.quantizer_options({**self._given, **codebook, **{name: getattr(self, name) for name in _READ_IN_CALLS}})

    def _build(self) -> None:
        options = self.options()
        with torch.device("meta"):  # its own layers are replaced
            native = _VectorQuantize(**options, table=self._codebook)
        self.link(native)
        native.training = self.training
        keep_synchronized(self.__dict__.get("native"), native)
        if self._given["sync_codebook"] is False:
            native.reducer = LocalReducer()
        learned = tuple(loss for loss in native.losses if loss.weight > 0)
        hide(self, native=native, estimator=native.estimator, _losses=native.losses, learned_losses=learned)

    def _check_setting(self, name: str, value: Any) -> None:
        if name == "_codebook" and not isinstance(value, Codebook):
            raise TypeError(f"_codebook = {type(value).__name__}(...): must be a Codebook")
        if name == "sync_update_v" and not 0.0 <= cast(float, value) <= int(bool(self._codebook.learnable_codebook)):
            raise ValueError(f"sync_update_v = {value}: must be from 0 to 1, and 0 unless learnable_codebook is True")
        if name == "has_codebook_orthogonal_loss" and value and not self._codebook.learnable_codebook:
            raise ValueError("has_codebook_orthogonal_loss = True: must be False unless learnable_codebook is True")
        if name in ("project_in", "project_out") and not self.has_projections and not isinstance(value, nn.Identity):
            raise ValueError(
                f"{name} = {type(value).__name__}(...): must stay an Identity, as the codes have the width of the input; "
                "give codebook_dim to have projections"
            )

    def link(self, native: _VectorQuantize) -> None:
        if self.has_projections or self._is_heard():
            native.project_in, native.norm = cast(nn.Linear, self.project_in), None  # which holds its norm, and what else is put there
            native.project_out = cast(nn.Linear, self.project_out)
        else:
            native.project_in = native.project_out = None

    def _is_heard(self) -> bool:
        """Whether there are no projections, but somebody listens to what stands in their place."""
        parts = cast(dict[str, nn.Module], self._modules)
        return not self.has_projections and (has_hooks(parts["project_in"]) or has_hooks(parts["project_out"]))

    def _settle(self) -> _VectorQuantize:
        """The native quantizer, with projections where they are called."""
        native = self.native
        if not self.has_projections and (native.project_in is not None) is not self._is_heard():
            self.link(native)
        return native

    def is_watched(self) -> bool:
        """Whether a call of this module, or of its codebook, is more than what `native` does: then it has to be called."""
        watched = is_watched(self, VectorQuantize) or is_watched(cast(nn.Module, self._modules["_codebook"]), Codebook)
        return watched or self._is_heard()

    def train(self, mode: bool = True) -> VectorQuantize:
        super().train(mode)
        self.native.training = mode
        return self

    # Reading and setting codes

    @property
    def ema_update(self) -> bool:
        """Whether the codebook learns by moving averages."""
        return self._codebook.ema_update

    @property
    def codebook(self) -> Tensor:
        """[C, K], with separate codebooks [heads, C, K]: what is stored, as `_codebook.embed`. Setting it lasts."""
        codes = self._codebook.embed
        return codes if self.separate_codebook_per_head else codes.squeeze(0)

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        self.native.codebook = codes

    def get_codes_from_indices(self, indices: Tensor | Any) -> Tensor:
        """indices as a call gives them -> codes before the output projection, in the layout of the input; index -1 gives zeros.

        A number, a list of numbers or an array are as good as a tensor. Raises ValueError for indices outside -1 ... codebook_size - 1.
        """
        return self._decode(self.native.decode_codes, indices)

    def get_output_from_indices(self, indices: Tensor | Any) -> Tensor:
        """indices as a call gives them -> vectors as a call gives them; index -1 gives zeros."""
        if is_nothing(cast(nn.Module, self._modules["project_out"])):
            return self.get_codes_from_indices(indices)
        own = overrides(self, VectorQuantize, "get_codes_from_indices")
        return self._decode(self._output_of_codes if own else self._settle().decode, indices)

    def _decode(self, decode: Callable[[Tensor], Tensor], indices: Any) -> Tensor:
        """`decode` of indices, of one that has no axis, and of what is none of tensors but can index one."""
        if isinstance(indices, Tensor):
            return decode(indices) if indices.dim() else decode(indices.reshape(1)).squeeze(0)
        numbers = indices if isinstance(indices, (list, tuple)) else (indices,)
        if all(isinstance(number, Integral) for number in numbers) or hasattr(indices, "__array__"):
            return self._decode(decode, torch.as_tensor(indices, device=self.zero.device))
        return decode(indices)

    def _output_of_codes(self, indices: Tensor) -> Tensor:
        codes, first = self.get_codes_from_indices(indices), self.native.layout == "first"
        output = project_out(self.project_out, codes.movedim(1, -1) if first else codes, indices)
        return output.movedim(-1, 1) if first else output

    # Learning by hand

    def update_in_place_optimizer(self) -> None:
        """A step of the codebook's own optimizer, and no gradient behind it."""
        if self.in_place_codebook_optimizer is not None and not in_backward():
            self.in_place_codebook_optimizer.step()
            self.in_place_codebook_optimizer.zero_grad()

    def maybe_split_heads_from_input(self, x: Tensor) -> Tensor:
        """x [B, N, heads * K] -> [heads, B, N, K] with separate codebooks, else [1, B * heads, N, K]; itself with one head."""
        if self.heads == 1:
            return x
        split = x.reshape(*x.shape[:-1], self.heads, x.shape[-1] // self.heads)
        if self.separate_codebook_per_head:
            return split.permute(2, 0, 1, 3)
        return split.transpose(1, 2).flatten(0, 1).unsqueeze(0)

    def expire_codes_(self, x: Tensor) -> None:
        """In training, codes of a moving count below the threshold start anew at vectors of x [B, N, heads * K], projected already."""
        rows = self.maybe_split_heads_from_input(self._codebook.transform_input(x))
        self._codebook.expire_codes_(rows.unsqueeze(0) if self.heads == 1 else rows)

    def update_indices(self, x: Tensor, indices: Tensor, mask: Tensor | None = None) -> None:
        """One step of the codebook, in eval mode too, from x that chose `indices` (-1: none), both as for a call; mask [B, N] bool."""
        self._check_input(x, mask)
        if not in_backward():
            self._codebook.learn_by_hand_(self.native.statistics(x, mask, indices=indices), Call())

    update_ema_indices = update_indices

    # Calling

    def forward(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        topk: int | None = None,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
        codebook_transform_fn: Callable | None = None,
        ema_update_weight: CodeWeights | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> Any:
        """x -> (quantized, indices, loss), and a LossBreakdown if that is asked for.

        With mask [B, N] bool or lens [B] what is masked takes no part: index -1, zeros, or the input itself with
        return_zeros_for_masked_padding=False. With `topk` the nearest codes of each vector, nearest first, one axis more: quantized
        [..., k, D], indices [..., k], and in this shape the loss. With `indices` it returns codes [B, N, K] of what it chose ([heads, B,
        N, K] with separate codebooks, [1, B * heads, N, K] with shared heads; with `topk` [B, N, k, K]) and the cross-entropy of the given
        ones (-1: left out).

        Raises ValueError and TypeError for what does not fit.
        """
        self._check_input(x, mask)
        if topk is not None:
            topk = self._check_topk(topk)
        if indices is None:
            self._check_orthogonal()
        frozen = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        native, codebook = self._settle(), self._codebook
        self._set_native(x, topk, by_targets=indices is not None)
        options: dict[str, Any] = {"lengths": lens if lens is None else at_most(lens, x, native.layout == "first")}
        if codebook_transform_fn is not None:
            options["codes_of"] = self._codes_of(codebook_transform_fn)
        temperature = translate.temperature(native.assignment, sample_codebook_temp, codebook.sample_codebook_temp)
        if ema_update_weight is not None and not callable(ema_update_weight):
            ema_update_weight = codebook.weights_of_codes(ema_update_weight)
        targets = None if indices is None else self._as_positions(indices, x)
        in_place = None
        if self.in_place_codebook_optimizer is not None and self.training and not frozen and self.walked is None:
            if targets is not None:  # before a step is taken
                check_indices("indices", targets.to(x.device), self.codebook_size, self._shape_of_indices(x))
            with codebook.pulling():
                in_place = native.pull_(x, mask, temperature=temperature, **options)
            if not self.manual_in_place_optimizer_update:
                self.update_in_place_optimizer()
        if topk is not None:
            options |= {"top_k": topk, "reduction": "none" if indices is None else "mean"}
        if targets is not None:
            options |= {"targets": targets, "project": False}
        show = self._watch(x, mask, lens, frozen, sample_codebook_temp, topk, codebook_transform_fn)
        says = self.training and (ema_update is not None or ema_update_weight is not None or accum_ema_update)
        if says:
            hide(codebook, call=Call(ema_update, ema_update_weight, accum_ema_update, checked=not callable(ema_update_weight)))
        try:
            quantize = native.quantize_and_learn if self.walked is None else native.quantize
            found = quantize(x, mask, freeze_codebook=frozen, temperature=temperature, **options)
        finally:
            if says:
                hide(codebook, call=None)
        if show is not None:
            show()
        if self.walked is not None:
            self.walked.append(found)
        if targets is not None:
            return self._in_code_space(found.quantized, () if topk is None else (topk,)), found.losses["cross_entropy"]
        if topk is not None and x.dim() == 2:  # the codes of one vector stand one after the other, whatever the layout
            found = found._replace(quantized=found.quantized.movedim(-1 if native.layout == "last" else 1, -1))
        losses = self._name_losses(found, in_place, topk is not None)
        loss = self._weigh(losses, topk is not None)
        if topk is not None and losses.commitment.dim():
            losses = losses._replace(commitment=losses.commitment.reshape(len(x), -1, topk))
        return (found.quantized, found.indices, loss, losses) if return_loss_breakdown else (found.quantized, found.indices, loss)

    def _watch(
        self,
        x: Tensor,
        mask: Tensor | None,
        lens: Tensor | None,
        frozen: bool,
        temperature: float | None,
        topk: int | None,
        transform: Callable | None,
    ) -> Callable[[], None] | None:
        """Where the codebook has hooks: what lets them see, behind the step of this call, what a call of the codebook takes and gives."""
        codebook = cast(Codebook, self._modules["_codebook"])
        if not is_watched(codebook, Codebook):
            return None
        if self.training and codebook.learnable_codebook and (codebook._backward_hooks or codebook._backward_pre_hooks):
            raise ValueError("_codebook has hooks of the backward: must have none, as no gradient passes a call of it")
        if type(codebook).forward is not Codebook.forward or "forward" in vars(codebook):
            raise ValueError("_codebook has a forward of its own: must have none, as it is not called; hooks may look at what it would see")
        if self.training and isinstance(self.native.assignment, Gumbel):
            raise ValueError("_codebook has hooks: must have none with stochastic_sample_codes in training, as codes are drawn elsewhere")
        rows = x.movedim(1, -1) if self.native.layout == "first" else x
        with torch.no_grad(), unheard(self.project_in):
            rows = self.project_in(rows.unsqueeze(1) if x.dim() == 2 else rows.flatten(1, -2))
        rows = codebook.transform_input(self.maybe_split_heads_from_input(rows))
        mask = mask if lens is None else functions.lens_to_mask(lens, x.shape[1])
        given = {
            "sample_codebook_temp": temperature,
            "mask": mask,
            "freeze_codebook": frozen,
            "codebook_transform_fn": transform,
            "topk": topk,
        }

        @torch.no_grad()
        def look() -> Any:
            with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
                return Codebook.forward(codebook, rows, **given, update_usage=False)

        seen = [look()] if codebook.initialized else []

        def show() -> None:
            output = seen[0] if seen else look()
            hide(codebook, forward=lambda *_, **__: output)
            try:
                result = codebook(rows, **given)
            finally:
                del vars(codebook)["forward"]
            if result is not output:
                raise ValueError("a hook on _codebook returns something: must return None, as what it gives cannot be changed from there")

        return show

    def _set_native(self, x: Tensor, topk: int | None, *, by_targets: bool) -> None:
        """Let the quantizer do what this call returns, and no more: in eval mode a loss is but that of several codes."""
        losses = self.learned_losses if self.training else self._losses[:1] if topk is not None else ()
        losses = () if by_targets else losses
        for name, value in (("training", self.training), ("estimator", self._estimator_of(x)), ("losses", losses)):
            if torch.compiler.is_compiling() or getattr(self.native, name) is not value:
                setattr(self.native, name, value)

    def _estimator_of(self, x: Tensor) -> Estimator:
        """That of the output, where it has any place to go; in eval mode none passes."""
        if not self.training:
            return "none"
        reaches = x.requires_grad or learns(self.project_in)
        return self.estimator if reaches else "none"

    def _name_losses(self, found: Quantized, in_place: Tensor | None, several: bool) -> LossBreakdown:
        zero, named = torch.zeros_like(self.zero), found.losses
        if not self.training:
            return LossBreakdown(named["commitment"].detach() if several else zero, zero, zero, zero)
        name = "cross_entropy_commitment" if self.commitment_use_cross_entropy_loss else "commitment"
        commitment = named[name] if self.has_commitment_loss else zero
        in_place = zero if in_place is None else in_place
        return LossBreakdown(commitment, named.get("diversity", zero), named.get("orthogonality", zero), in_place)

    def _weigh(self, losses: LossBreakdown, several: bool) -> Tensor:
        if not self.training:
            return losses.commitment * self.commitment_weight if several and self.has_commitment_loss else losses.commitment
        parts = []
        if self.has_codebook_diversity_loss:
            parts.append(losses.codebook_diversity * self.codebook_diversity_loss_weight)
        if self.has_commitment_loss:
            parts.append(losses.commitment * self.commitment_weight)
        if self.has_codebook_orthogonal_loss:
            parts.append(losses.orthogonal_reg * self.orthogonal_reg_weight)
        loss = functools.reduce(torch.add, parts) if parts else None
        if torch.compiler.is_compiling():
            return torch.zeros_like(self.zero) if loss is None else loss
        # A loop may call backward whatever is trained.
        if loss is None:
            return torch.zeros_like(self.zero, requires_grad=True)
        return loss if loss.requires_grad else loss + torch.zeros_like(loss, requires_grad=True)

    # Checks and shapes

    def _check_input(self, x: Tensor, mask: Tensor | None) -> None:
        check_tensor("x", x)
        one = (4, "accept_image_fmap") if self.accept_image_fmap else (5, "accept_3d_fmap") if self.accept_3d_fmap else None
        if one is not None and x.dim() != one[0]:
            raise ValueError(f"x has shape {tuple(x.shape)}: must have {one[0]} axes, as {one[1]} = True says")
        if mask is not None and one is not None:
            raise ValueError(f"mask is given: must be None with {one[1]} = True")
        if mask is not None and x.dim() == 2:
            raise ValueError(f"mask is given for x {tuple(x.shape)}, one vector each: must come with sequences")

    def _check_orthogonal(self) -> None:
        active = self.has_codebook_orthogonal_loss and self.orthogonal_reg_active_codes_only
        if self.training and active and self.separate_codebook_per_head and self.heads > 1:
            raise ValueError("orthogonal_reg_active_codes_only = True: must be False with separate_codebook_per_head")

    def _check_topk(self, topk: int) -> int:
        if self.heads > 1:
            raise ValueError(f"topk = {topk}: must be None with heads = {self.heads}, whose nearest codes do not combine")
        if topk < 1:
            raise ValueError(f"topk = {topk}: must be at least 1")
        if self.training and self.commitment_use_cross_entropy_loss:
            raise ValueError(f"topk = {topk}: must be None in training with commitment_use_cross_entropy_loss = True")
        if self.training and self.in_place_codebook_optimizer is not None:
            raise ValueError(f"topk = {topk}: must be None in training with an in_place_codebook_optimizer")
        return min(int(topk), self.codebook_size)

    def _codes_of(self, transform: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """As vqkit has it; of heads that share a codebook it gives [1, B * heads, N, C, K]."""
        if self.heads == 1 or self.separate_codebook_per_head:
            return transform
        return lambda codes: transform(codes).unflatten(1, (-1, self.heads)).transpose(2, 3)

    def _as_positions(self, indices: Tensor, x: Tensor) -> Tensor:
        """Indices [B, positions in one axis, heads?] where the positions of x have several axes, or none, in their shape."""
        check_tensor("indices", indices)
        shape, heads = self._shape_of_indices(x), self.native.code_shape
        flat = (x.shape[0], shape[1 : len(shape) - len(heads)].numel(), *heads)
        return indices.reshape(shape) if indices.shape == flat else indices

    def _shape_of_indices(self, x: Tensor) -> torch.Size:
        """[P..., heads?]."""
        positions = x.shape[:-1] if self.native.layout == "last" else (x.shape[0], *x.shape[2:])
        return torch.Size((*positions, *self.native.code_shape))

    def _in_code_space(self, codes: Tensor, several: tuple[int, ...]) -> Tensor:
        """Codes in the layout of the input -> [B, N, K] or [B, N, k, K], in heads as `maybe_split_heads_from_input` says."""
        if self.native.layout == "first":
            codes = codes.movedim(1, -1)
        rows = codes.reshape(codes.shape[0], -1, *several, codes.shape[-1])
        return self.maybe_split_heads_from_input(rows)


def _own_optimizer(make: Callable[..., Optimizer] | None, codebook: Codebook) -> Optimizer | None:
    if make is None:
        return None
    parameters: Iterable[nn.Parameter] = [*codebook.parameters()]
    if not parameters:
        raise ValueError("in_place_codebook_optimizer is given: must be None unless learnable_codebook is True")
    return make(parameters)
