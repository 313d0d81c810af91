"""The peer's Codebook: a codebook of vqkit under the names, in the state dict and with the timing that users see at `_codebook`.

What is pending is shown as if it had been committed, as everywhere in vqkit; the peer's names are what they read. Shapes: H codebooks,
C codes, K width, N vectors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from vqkit.compat.vector_quantize_pytorch import functions
from vqkit.compat.vector_quantize_pytorch.arguments import in_these_words
from vqkit.compat.vector_quantize_pytorch.translate import codebook_options
from vqkit.dist import LocalReducer, Reducer
from vqkit.ops.codebook import CodebookStatistics, largest_keys, merge_statistics
from vqkit.quantizers.codebook import Codebook as _Codebook
from vqkit.quantizers.commit import reduce_in_forward
from vqkit.quantizers.committed import in_backward, outside_backward
from vqkit.quantizers.config import StoredEMA
from vqkit.quantizers.layout import check_indices
from vqkit.quantizers.update import expire, follow_averages

_AFFINE_KEYS = tuple(key for name in ("mean", "variance") for key in (f"batch_{name}", f"codebook_{name}", f"codebook_{name}_needs_init"))

CodeWeights = Tensor | Callable[[Tensor, Tensor], Tensor] | float


class Call(NamedTuple):
    """What one call says of the step that it makes."""

    ema_update: bool | None = None  # None: as the codebook
    weights: CodeWeights | None = None  # what 1 - decay of each code is multiplied by
    accumulate: bool = False  # the statistics wait for the next call that does not say so
    uses: int = 1  # how many steps in turn these statistics stand for, faded by `weight_of_use`


@in_these_words()
class Codebook(_Codebook):
    """A codebook of `codebook_size` codes of width `dim`, or `num_codebooks` of them, with the peer's arguments.

    State dict and attributes: `embed` [H, C, K], the codes, a parameter where they are learnable; `embed_avg` [H, C, K] and `cluster_size`
    [H, C], the moving averages; `initted` [] bool; while calls accumulate what waits for a step, `pending.*`, which the peer does not know.
    They show every training call at once. `embed` is the tensor itself, to be written in
    place, as long as no training call is pending: before the first one, and in eval mode.
    """

    synchronizes = True
    """Whether `update_indices` is a step of all processes."""

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        num_codebooks: int = 1,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sync_kmeans: bool = True,
        decay: float = 0.8,
        eps: float = 1e-5,
        threshold_ema_dead_code: float = 2,
        reset_cluster_size: float | None = None,
        use_ddp: bool = False,
        learnable_codebook: bool = False,
        gumbel_sample: Callable[..., tuple[Tensor, Tensor]] = functions.gumbel_sample,
        sample_codebook_temp: float = 1.0,
        ema_update: bool = True,
        manual_ema_update: bool = False,
        affine_param: bool = False,
        sync_affine_param: bool = False,
        affine_param_batch_decay: float = 0.99,
        affine_param_codebook_decay: float = 0.9,
        use_cosine_sim: bool = False,
        vq_bridge: nn.Module | None = None,
    ) -> None:
        if not callable(gumbel_sample):
            raise TypeError(f"gumbel_sample = {gumbel_sample!r}: must be a function of logits that gives indices and their one-hot rows")
        options = codebook_options(
            decay=decay,
            eps=eps,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            threshold_ema_dead_code=threshold_ema_dead_code,
            reset_cluster_size=reset_cluster_size,
            learnable_codebook=learnable_codebook,
            ema_update=ema_update,
            manual_ema_update=manual_ema_update,
            use_cosine_sim=use_cosine_sim,
            vq_bridge=vq_bridge,
            affine_param=affine_param,
            affine_param_batch_decay=affine_param_batch_decay,
            affine_param_codebook_decay=affine_param_codebook_decay,
        )
        self._waits = kmeans_init
        super().__init__(num_codebooks, codebook_size, dim, **options)
        self._rename()
        self.codebook_size, self.num_codebooks, self.kmeans_iters = codebook_size, num_codebooks, kmeans_iters
        self.ema_update, self.manual_ema_update, self.use_ddp = ema_update, manual_ema_update, use_ddp
        self.threshold_ema_dead_code, self.has_dead_code_replacement = threshold_ema_dead_code, threshold_ema_dead_code > 0
        self.reset_cluster_size = threshold_ema_dead_code if reset_cluster_size is None else reset_cluster_size
        self.learnable_codebook, self.use_cosine_sim = learnable_codebook, use_cosine_sim
        self.affine_param, self.sync_affine_param = affine_param, sync_affine_param
        self.gumbel_sample, self.sample_codebook_temp = gumbel_sample, sample_codebook_temp
        self.transform_input = functions.l2norm if use_cosine_sim else functions.identity
        self.call: Call | None = None
        self._accumulating = False
        self._pending_rule: StoredEMA | None = None
        self._pending_weights: Tensor | None = None

    def _rename(self) -> None:
        """Parameters, buffers and parts under the peer's names, which an optimizer's and a model's state dict goes by."""
        parts = self._modules
        if "transform" in parts:
            parts["vq_bridge"] = parts.pop("transform")
        for tensors in (self._parameters, self._buffers):
            for name, there in (("weight", "embed"), ("count", "cluster_size"), ("sum", "embed_avg")):
                if name in tensors:
                    cast(dict[str, Any], tensors)[there] = tensors.pop(name)
        self._non_persistent_buffers_set.add("updates")
        if self._waits:
            self._stored("embed").data.zero_()
            self._stored("embed_avg").zero_()

    def _stored(self, name: str) -> Tensor:
        """The parameter or buffer itself."""
        found = self._parameters.get(name)
        found = self._buffers.get(name) if found is None else found
        if found is None:
            raise AttributeError(name)
        return found

    # What vqkit reads

    @property
    def _start_count(self) -> float:
        """Twice the threshold, so that a code that was merely not yet used is not dead after the first step."""
        return max(1.0, 2.0 * self.dead_codes.threshold) if self.dead_codes else 1.0

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self._stored("embed")

    @property
    def sum(self) -> Tensor:  # type: ignore[override]
        return self._stored("embed_avg")

    @property
    def count(self) -> Tensor:  # type: ignore[override]
        return self._stored("cluster_size")

    @property
    def transform(self) -> nn.Module | None:  # type: ignore[override]
        return self._modules.get("vq_bridge", self._modules.get("transform"))

    @transform.setter
    def transform(self, module: nn.Module | None) -> None:
        if module is not None:
            self._modules["transform"] = module

    @property
    def initialized(self) -> bool:  # type: ignore[override]
        if self._waits and not torch.compiler.is_compiling() and bool(self._initted):
            self._waits = False
        return not self._waits

    @initialized.setter
    def initialized(self, value: bool) -> None:
        self._waits, self._initted = not value, torch.tensor(value)

    # What the peer's users read

    def _shown(self, name: str) -> Tensor:
        stored = self._stored(name)
        if not self.training or self._entered or int(self.follows) != int(self.updates):
            return stored
        of_vqkit = {"embed": "weight", "embed_avg": "sum", "cluster_size": "count"}
        return self._settled()[of_vqkit[name]]

    @property
    def embed(self) -> Tensor:
        """[H, C, K] the codes; the parameter itself where nothing but an optimizer changes it."""
        if isinstance(stored := self._stored("embed"), nn.Parameter) and not self.dead_codes and not self._rule().follow:
            return stored
        return self._shown("embed")

    @property
    def embed_avg(self) -> Tensor:
        """[H, C, K] moving average of the sum of the vectors of each code."""
        return self._shown("embed_avg")

    @property
    def cluster_size(self) -> Tensor:
        """[H, C] moving average of their number."""
        return self._shown("cluster_size")

    @property
    def initted(self) -> Tensor:
        """[] bool: whether the k-means start has been made, or none is wanted. To be written in place, too."""
        return self._initted

    @property
    def decay(self) -> float:
        """Of the moving averages; setting it holds from the next call on."""
        return cast(StoredEMA, self.update).decay

    @decay.setter
    def decay(self, decay: float) -> None:
        self.update = dataclasses.replace(cast(StoredEMA, self.update), decay=decay)

    @property
    def eps(self) -> float:
        """What Laplace smoothing adds to each count."""
        return cast(StoredEMA, self.update).eps

    @eps.setter
    def eps(self, eps: float) -> None:
        self.update = dataclasses.replace(cast(StoredEMA, self.update), eps=eps)

    # One step

    def _rule(self) -> StoredEMA:
        return self._pending_rule or cast(StoredEMA, self.update)

    def _rule_of_call(self) -> StoredEMA:
        rule = cast(StoredEMA, self.update)
        if self.call is not None and self.call.uses > 1:
            rule = dataclasses.replace(rule, decay=rule.decay**self.call.uses)
        if self.call is None or self.call.ema_update is None:
            return rule
        moves = bool(self.call.ema_update)
        return dataclasses.replace(rule, follow=moves and not self.manual_ema_update, count=moves or self.has_dead_code_replacement)

    def weight_of_use(self, number: int, uses: int) -> float:
        """Of the statistics of one of several uses, in a step of decay^uses, so that it is that of one step after each use."""
        decay = self.decay
        if decay == 1:
            return 1 / uses  # of nothing
        return (1 - decay) * decay ** (uses - 1 - number) / (1 - decay**uses)

    def _weigh_codes(self, statistics: CodebookStatistics) -> Tensor | None:
        return self._pending_weights

    @property
    def counts(self) -> bool:
        return self._rule_of_call().count or self.affine is not None

    def replace_statistics_(self, statistics: CodebookStatistics, outside: Tensor | bool | None = None) -> None:
        """As in vqkit, by what the call says: its rule, its weights of the codes; or as a part of what a later call takes."""
        outside = outside_backward(self.updates) if outside is None else outside
        if outside is False:
            return
        call = self.call or Call()
        if self._accumulating:
            statistics = merge_statistics(self.pending, statistics)
        self._accumulating = call.accumulate
        if call.accumulate:
            self._write_pending_(statistics, outside)
            self.follows.fill_(-1)
            return
        weights = self._weights_of_call(call.weights, statistics)  # what they are not raises before anything changes
        super().replace_statistics_(statistics, outside)
        self._pending_rule = None if call.ema_update is None and call.uses == 1 else self._rule_of_call()
        self._pending_weights = weights

    @torch.no_grad()
    def _weights_of_call(self, weights: CodeWeights | None, statistics: CodebookStatistics) -> Tensor | None:
        if weights is None:
            return None
        found = weights(statistics.sum, statistics.count) if callable(weights) else weights
        if isinstance(found, Real):
            found = statistics.count.new_full((self.size,), float(found))
        elif isinstance(found, Tensor) and not found.is_complex():  # True and 1, too, say which codes move
            found = found.to(statistics.count)
        return self._check_code_weights(found)

    def discard_pending_(self) -> None:
        super().discard_pending_()
        self._accumulating = False

    # Storing

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        settled = self._settled()
        for name, there in (("weight", "embed"), ("sum", "embed_avg"), ("count", "cluster_size")):
            if settled[name] is not self._stored(there):
                destination[prefix + there] = settled[name].detach()
        if self.affine:
            self._save_affine(destination, prefix, settled)
        if self._accumulating:
            destination |= {f"{prefix}pending.{name}": tensor.clone() for name, tensor in self.pending._asdict().items()}
        destination[f"{prefix}initted"] = self._initted.to(self.updates.device, copy=True)

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
        if self.affine:
            state_dict = self._load_affine(state_dict, prefix)
        arguments = (state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        nn.Module._load_from_state_dict(self, *arguments)
        started = state_dict.get(f"{prefix}initted")
        if started is None and strict:
            missing_keys.append(f"{prefix}initted")
        waiting = {name: state_dict[key] for name in self.pending._fields if (key := f"{prefix}pending.{name}") in state_dict}
        known = {f"{prefix}initted", *(f"{prefix}pending.{name}" for name in waiting)}
        unexpected_keys[:] = [key for key in unexpected_keys if key not in known]
        self.forget_pending_()
        for name, value in waiting.items():
            own = getattr(self.pending, name)
            if own.shape != value.shape:
                error_msgs.append(f"{prefix}pending.{name} has shape {tuple(value.shape)}: must be {tuple(own.shape)}")
            else:
                own.copy_(value)
        self._accumulating = bool(waiting)
        if started is not None:
            self.initialized = bool(started)

    def _save_affine(self, destination: dict[str, Any], prefix: str, settled: Mapping[str, Tensor]) -> None:
        """Mean and variance as the peer has them: [H, 1, K] each, those of the vectors once there were any."""
        seen = bool(settled["batch_seen"].all())
        for name in ("batch_mean", "batch_variance", "code_mean", "code_variance", "batch_seen"):
            destination.pop(prefix + name, None)
        for name in ("mean", "variance"):
            destination[f"{prefix}codebook_{name}_needs_init"] = torch.tensor(not seen, device=self.updates.device)
            destination[f"{prefix}codebook_{name}"] = settled[f"code_{name}"].detach().unsqueeze(1)
            if seen:
                destination[f"{prefix}batch_{name}"] = settled[f"batch_{name}"].detach().unsqueeze(1)

    def _load_affine(self, state_dict: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
        """The state dict with mean and variance as they are kept here."""
        found = dict(state_dict)
        there = {key: found.pop(prefix + key) for key in _AFFINE_KEYS if prefix + key in found}
        seen = "batch_mean" in there and not bool(there.get("codebook_mean_needs_init", False))
        for name in ("mean", "variance") if f"{prefix}embed" in found else ():
            codes = found[f"{prefix}embed"]
            of_codes = codes.mean(1) if name == "mean" else codes.var(1, correction=0)
            found[f"{prefix}code_{name}"] = there[f"codebook_{name}"].squeeze(1) if seen else of_codes
            found[f"{prefix}batch_{name}"] = there[f"batch_{name}"].squeeze(1) if seen else of_codes
        found[f"{prefix}batch_seen"] = torch.full((self.heads,), float(seen))
        return found

    @property
    def codebook_mean(self) -> Tensor:
        """[H, 1, K] moving mean of the codes, with affine_param."""
        return self._settled()["code_mean"].unsqueeze(1)

    @property
    def codebook_variance(self) -> Tensor:
        """[H, 1, K] their moving variance."""
        return self._settled()["code_variance"].unsqueeze(1)

    @torch.no_grad()
    def initialize_(self, x: Tensor, mask: Tensor | None = None, *, seed: int = 0, reducer: Reducer | None = None) -> None:
        """As in vqkit; the averages are then sum and number of the vectors of each code, and the codes follow them."""
        super().initialize_(x, mask, seed=seed, reducer=reducer)
        self.sum.copy_(self.weight * self.count.unsqueeze(-1))
        self._follow_averages_()

    def _follow_averages_(self) -> None:
        state = {"weight": self.weight, "sum": self.sum, "count": self.count}
        codes = follow_averages(cast(StoredEMA, self.update), state)["weight"]
        self.weight.copy_(functions.l2norm(codes) if self.use_cosine_sim else codes)

    # The peer's methods

    @torch.no_grad()
    def init_embed_(self, data: Tensor, mask: Tensor | None = None) -> None:
        """The k-means start from data [H, N, K] (mask [H, N] bool), if it has not been made."""
        if not self.initialized:
            self.initialize_(data, mask)

    @torch.no_grad()
    def update_ema(self) -> None:
        """Set the codes to the moving averages."""
        if in_backward():
            return
        self.settle_()
        self.follows.fill_(-1)
        self._follow_averages_()

    @torch.no_grad()
    def expire_codes_(self, batch_samples: Tensor, seq_mask: Tensor | None = None) -> None:
        """In training, codes of a moving count below the threshold start anew at vectors of batch_samples [H, ..., K]; seq_mask [H, N]."""
        if not self.has_dead_code_replacement or not self.training or in_backward():
            return
        rows = batch_samples.flatten(1, -2)
        self.expire_(rows, seq_mask, seed=int(torch.randint(2**31, ())))
        self.follows.fill_(-1)

    @torch.no_grad()
    def update_with_decay(self, buffer_name: str, new_value: Tensor, decay: float) -> None:
        """Let a buffer follow a value: decay * old + (1 - decay) * new."""
        buffer = getattr(self, buffer_name)
        buffer.copy_(torch.lerp(new_value.detach().to(buffer).reshape(buffer.shape), buffer, decay))

    @torch.no_grad()
    def replace(self, batch_samples: Tensor, batch_mask: Tensor, seq_mask: Tensor | None = None) -> None:
        """Let the codes of batch_mask [H, C] bool start anew at vectors of batch_samples [H, N, K]; seq_mask [H, N] bool.

        No vector is taken twice: where there are too few, codes stay as they are.
        """
        if in_backward():
            return
        self.begin_by_hand_()
        samples = functions.l2norm(batch_samples) if self.use_cosine_sim else batch_samples
        draws = 1.0 - torch.rand(samples.shape[:2], device=samples.device)
        draws = draws if seq_mask is None else draws.where(seq_mask, 0.0)
        rows, keys = largest_keys(samples.to(self.sum), draws, self.codebook_size)
        wanted = 1.0 - batch_mask.to(self.count.dtype)  # expiry takes those that count least
        state = {"weight": self.weight, "sum": self.sum, "count": wanted}
        after = expire(cast(StoredEMA, self.update), state, rows, keys, 0.5, max(self.reset_cluster_size, 1.0))
        replaced = (after["count"] != wanted) & batch_mask
        self.weight.copy_(after["weight"])
        self.count.copy_(torch.where(replaced, float(self.reset_cluster_size), self.count))
        self.sum.copy_(torch.where(replaced.unsqueeze(-1), after["weight"] * self.reset_cluster_size, self.sum))
        self.follows.fill_(-1)

    def update_codebook(
        self,
        flatten: Tensor,
        embed_onehot: Tensor,
        mask: Tensor | None = None,
        ema_update_weight: CodeWeights | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> None:
        """One step from vectors [H, N, K] and the one-hot rows [H, N, C] of their codes; mask [H, N] bool."""
        self._learn_from_(flatten, embed_onehot.argmax(-1), mask, Call(ema_update, ema_update_weight, accum_ema_update))

    def track_cluster_size_and_embed_avg(
        self,
        flatten: Tensor,
        embed_onehot: Tensor,
        mask: Tensor | None = None,
        ema_update_weight: CodeWeights | None = None,
        accum_ema_update: bool = False,
    ) -> None:
        """As `update_codebook`, of the averages alone."""
        codes = self.weight.detach().clone()
        self.update_codebook(flatten, embed_onehot, mask, ema_update_weight, accum_ema_update, True)
        if not accum_ema_update:
            self.settle_()
            self.follows.fill_(-1)
            self.weight.data.copy_(codes)

    def update_indices(
        self,
        x: Tensor,
        embed_ind: Tensor,
        mask: Tensor | None = None,
        ema_update_weight: CodeWeights | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> None:
        """One step, in eval mode too, from vectors x [..., K], [H, ..., K] where of rank 4, that chose embed_ind; mask [B, T] bool.

        Index -1 counts nothing. Raises ValueError for indices outside -1 ... codebook_size - 1.
        """
        if x.dim() < 4:
            x, embed_ind = x.unsqueeze(0), embed_ind.unsqueeze(0)
        rows, indices = x.flatten(1, -2), embed_ind.flatten(1)
        if mask is not None:
            repeats = rows.shape[1] // mask.numel()
            mask = mask.repeat_interleave(repeats, 0).reshape(1, -1).expand(rows.shape[:2])
        self._learn_from_(rows, indices, mask, Call(ema_update, ema_update_weight, accum_ema_update))

    update_ema_indices = update_indices

    @torch.no_grad()
    def _learn_from_(self, rows: Tensor, indices: Tensor, mask: Tensor | None, call: Call) -> None:
        check_indices("indices", indices, self.codebook_size, rows.shape[:-1])
        if self.begin_by_hand_():
            indices = indices if mask is None else indices.where(mask, -1)
            self.learn_by_hand_(self.statistics(rows, indices, (indices >= 0).to(self.dtype)), call)

    @torch.no_grad()
    def begin_by_hand_(self) -> bool:
        """Commit what is pending before a step outside of a forward; False in a recomputation, which makes none."""
        if in_backward():
            return False
        self.auto = True
        self.settle_()
        return True

    @torch.no_grad()
    def learn_by_hand_(self, statistics: CodebookStatistics, call: Call) -> None:
        """A step from `statistics`, of all processes: pending in training, done at once in eval mode, where nothing pends."""
        self.call = call
        try:
            if self.counts:
                (reduced,) = reduce_in_forward([statistics], None if self.synchronizes else LocalReducer())
                self.replace_statistics_(reduced)
                if not self.training:
                    self.settle_()
        finally:
            self.call = None

    @torch.no_grad()
    def update_affine(self, data: Tensor, embed: Tensor, mask: Tensor | None = None) -> None:
        """Let mean and variance follow those of data [H, ..., K] (mask bool) and of codes embed [H, ..., K].

        Raises ValueError without affine_param.
        """
        if not self.affine:
            raise ValueError("update_affine: must come with affine_param = True")
        rows, codes = data.flatten(1, -2), embed.flatten(1, -2)
        if mask is not None:
            rows = rows[mask.expand(rows.shape[:2])].unflatten(0, (len(rows), -1))
        for name, values, decay in (("code", codes, self.affine.codebook_decay), ("batch", rows, self.affine.batch_decay)):
            self.update_with_decay(f"{name}_mean", values.mean(1), decay)
            self.update_with_decay(f"{name}_variance", values.var(1, correction=0), decay)

    def forward(
        self,
        x: Tensor,
        sample_codebook_temp: float | None = None,
        mask: Tensor | None = None,
        freeze_codebook: bool = False,
        codebook_transform_fn: Callable[[Tensor], Tensor] | None = None,
        ema_update_weight: CodeWeights | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
        topk: int | None = None,
        update_usage: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, N, K], or [H, B, N, K] -> its codes, their indices and the scores [..., C] of all codes; in training one step.

        For those who call a codebook by itself: VectorQuantize does not, as the scores are a matrix of all vectors by all codes.
        `codebook_transform_fn` makes codes [H, B, N, C, K] of [H, C, K]. The rest is as for VectorQuantize.
        """
        given = (x if x.dim() == 4 else x.unsqueeze(0)).to(torch.promote_types(x.dtype, torch.float32))
        rows = given.flatten(1, -2)
        mask = None if mask is None else mask.repeat_interleave(rows.shape[1] // mask.numel(), 0).reshape(1, -1).expand(rows.shape[:2])
        learning = self.training and update_usage and not freeze_codebook and topk is None
        if self.training:
            self.begin_by_hand_()
        self.enter_(learning=learning, frozen=freeze_codebook)
        try:
            self.start_(rows, mask)
            codes = self.codes()
        finally:
            self.leave_()
        own = codes.unsqueeze(1) if codebook_transform_fn is None else codebook_transform_fn(codes).flatten(1, 2)  # [H, N or 1, C, K]
        if self.use_cosine_sim:
            scores = (functions.l2norm(own) @ rows.unsqueeze(-1)).squeeze(-1)
        else:
            scores = -(torch.cdist(rows, codes) if own.shape[1] == 1 else torch.cdist(rows.unsqueeze(-2), own).squeeze(-2))
        temperature = self.sample_codebook_temp if sample_codebook_temp is None else sample_codebook_temp
        index, chosen = self.gumbel_sample(scores, dim=-1, topk=topk, temperature=temperature, training=self.training)
        several = chosen if topk is not None else chosen.unsqueeze(-2)
        quantized = several @ own
        quantized = quantized if topk is not None else quantized.squeeze(-2)
        if learning:
            self._learn_from_(rows.detach(), index, mask, Call(ema_update, ema_update_weight, accum_ema_update))
        results = [found.unflatten(1, given.shape[1:-1]) for found in (quantized, index, scores)]
        return cast(Any, (*(found if x.dim() == 4 else found.squeeze(0) for found in results[:2]), results[2]))
