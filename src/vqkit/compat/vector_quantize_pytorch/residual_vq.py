"""The peer's ResidualVQ and GroupedResidualVQ: a `vqkit.quantizers.Residual` of the quantizers that the peer's arguments name.

`layers` are the facade's VectorQuantize, which own codebooks and names in the state dict; `native` combines quantizers of these codebooks.

Shapes: B batch, N positions, D width of the input, K width of the codes, Q layers, C codes, G groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from math import ceil
from random import Random
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqkit.compat.vector_quantize_pytorch.arguments import in_these_words
from vqkit.compat.vector_quantize_pytorch.codebook import Call, Codebook
from vqkit.compat.vector_quantize_pytorch.functions import default as default
from vqkit.compat.vector_quantize_pytorch.functions import exists as exists
from vqkit.compat.vector_quantize_pytorch.functions import is_distributed as is_distributed
from vqkit.compat.vector_quantize_pytorch.groups import Groups
from vqkit.compat.vector_quantize_pytorch.layers import Part, check_layers, part_of, set_parts, weigh
from vqkit.compat.vector_quantize_pytorch.rows import hide, learns, project_out
from vqkit.compat.vector_quantize_pytorch.settings import Settable, are_of, keep_synchronized, overrides
from vqkit.compat.vector_quantize_pytorch.vector_quantize_pytorch import VectorQuantize
from vqkit.dist import default_reducer
from vqkit.ops.precision import without_autocast
from vqkit.quantizers.base import Quantized, Statistics
from vqkit.quantizers.commit import flatten_statistics
from vqkit.quantizers.config import BeamSearch, Commitment, DiVeQ
from vqkit.quantizers.implicit import ImplicitVQ
from vqkit.quantizers.layout import any_hooks, check_indices, check_tensor, width_last
from vqkit.quantizers.residual import Residual, check_path

_DIVEQ_VARIANCE = 5e-3
"""Of the noise around the sum of the codes; the peer has no argument for it here."""
_NO_OPTIMIZER = "must be None with implicit_neural_codebook = True, whose codes learn with the networks"

_ERRORS = (Commitment(),)
"""What a beam search gives in eval mode, too."""

# Functions of the peer's module


def first(it: Sequence[Any]) -> Any:
    """Its first entry."""
    return it[0]


def cast_tuple(t: Any, length: int = 1) -> tuple[Any, ...]:
    """`t` if it is a tuple, else `length` times `t`."""
    return t if isinstance(t, tuple) else (t,) * length


def unique(arr: Iterable[Any]) -> list[Any]:
    """Its entries, each once, in no order."""
    return [*set(arr)]


def round_up_multiple(num: float, mult: int) -> int:
    """The least multiple of `mult` that is not below `num`."""
    return ceil(num / mult) * mult


def frac_gradient(t: Tensor, frac: float) -> Tensor:
    """t, through which `frac` of the gradient passes."""
    return t.detach() if frac <= 0 else frac * t + (1.0 - frac) * t.detach()


def pad_at_dim(t: Tensor, pad: tuple[int, int], dim: int = -1, value: float = 0.0) -> Tensor:
    """t with so many entries `value` before and behind along `dim`."""
    behind = -dim - 1 if dim < 0 else t.dim() - dim - 1
    return F.pad(t, (*(0, 0) * behind, *pad), value=value)


def pack_one(t: Tensor, pattern: str) -> tuple[Tensor, Callable[..., Tensor]]:
    """t with the axes that `pattern` ("* d", "b * d", "h *" ...) calls * joined into one, and what splits that axis again."""
    names = pattern.split()
    before, behind = names.index("*"), len(names) - names.index("*") - 1
    joined = t.shape[before : t.dim() - behind]

    def inverse(out: Tensor, inv_pattern: str | None = None) -> Tensor:
        own = (inv_pattern or pattern).split().index("*")
        return out.reshape(*out.shape[:own], *joined, *out.shape[own + 1 :])

    return t.reshape(*t.shape[:before], joined.numel(), *t.shape[t.dim() - behind :]), inverse


def batch_select(t: Tensor, indices: Tensor, pattern: str | None = None) -> Tensor:
    """The entries `indices` [B, S] of the second axis of t [B, R, ...]; with a pattern "* k ..." the axes before are those of * instead."""
    if pattern is None:
        index = indices.reshape(*indices.shape, *(1,) * (t.dim() - 2)).expand(*indices.shape, *t.shape[2:])
        return t.gather(1, index)
    rows, inverse = pack_one(t, pattern)
    return inverse(batch_select(rows, indices.flatten(0, -2)), pattern)


def get_maybe_sync_seed(device: torch.device | str, max_size: int = 10_000) -> int:
    """A number below `max_size` from the global random generator; the sum of those of all processes where there are several."""
    seed = torch.randint(0, max_size, (), device=device)
    default_reducer().all_reduce_(seed)
    return int(seed)


# Implicit neural codebooks


@in_these_words()
class MLP(nn.Module):
    """The network of an implicit neural codebook (Huijben et al., 2024), with the layers of the peer."""

    def __init__(self, dim: int, dim_hidden: int | None = None, depth: int = 4, l2norm_output: bool = False) -> None:
        super().__init__()
        dim_hidden = dim if dim_hidden is None else dim_hidden
        for name, value in (("dim", dim), ("dim_hidden", dim_hidden)):
            if value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        self.proj_in = nn.Linear(2 * dim, dim)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(dim, dim_hidden), nn.SiLU(), nn.Linear(dim_hidden, dim)) for _ in range(depth))
        self.l2norm_output = l2norm_output

    def forward(self, codes: Tensor, *, condition: Tensor) -> Tensor:
        """codes [C, D] or [H, C, D], condition [B, D] or [B, ..., D] -> the codes of each condition, [B, N, C, D] or [H, B, N, C, D]."""
        rows = condition.unsqueeze(1) if condition.dim() == 2 else condition.flatten(1, -2)
        return self.transform(codes[..., None, None, :, :], rows.unsqueeze(-2))

    def transform(self, codes: Tensor, condition: Tensor) -> Tensor:
        """codes and condition [..., D], whose leading axes broadcast -> [..., D]."""
        with without_autocast(codes.device.type):
            if self.hears():
                return self._by_calls(codes, condition)
            weight, bias = _parameters(self.proj_in, codes.dtype)
            of_condition, of_code = weight.chunk(2, dim=1)
            joined = F.linear(condition, of_condition, bias) + F.linear(codes, of_code)
            x = joined.flatten(0, -2)
            for layer in cast(Iterable[Any], self.layers):
                widen, _, narrow = layer
                hidden = F.silu(F.linear(x, *_parameters(widen, x.dtype)))
                x = x + F.linear(hidden, *_parameters(narrow, x.dtype))
        return (F.normalize(x, dim=-1) if self.l2norm_output else x).view(joined.shape)

    def hears(self) -> bool:
        """Whether anything listens to one of its parts, or makes its parameters before each call."""
        return any_hooks(self)

    def _by_calls(self, codes: Tensor, condition: Tensor) -> Tensor:
        x = torch.cat([*torch.broadcast_tensors(condition, codes)], dim=-1)
        x = self.proj_in(x.to(self.proj_in.weight.dtype))
        for layer in self.layers:
            x = x + layer(x)
        return (F.normalize(x, dim=-1) if self.l2norm_output else x).to(codes.dtype)


def _parameters(layer: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight, bias = layer.weight, layer.bias
    return (weight, bias) if weight.dtype == dtype else (weight.to(dtype), bias.to(dtype))


class _Network(nn.Module):
    """An MLP as `ImplicitVQ` calls it."""

    def __init__(self, mlp: MLP) -> None:
        super().__init__()
        self.mlp = mlp
        self.hidden: int = cast(Any, mlp.layers[0])[0].out_features if len(mlp.layers) else 1

    def hears(self) -> bool:
        """Whether it has to be called as a module."""
        return self.mlp.hears() or type(self.mlp).forward is not MLP.forward

    def forward(self, codes: Tensor, partial: Tensor) -> Tensor:
        return self.mlp.transform(codes, partial)


# Residual quantizers


class _InTurn(Residual):
    """A residual quantizer whose shared codebook learns as if it took a step after each of its uses: earlier uses fade by its decay."""

    def gather(self, found: Sequence[Statistics]) -> Statistics:
        entries = [entry for part in found for entry in flatten_statistics(part)]
        table = cast(Codebook, self.codebooks()[0])
        table.call = Call(uses=sum(entry is not None for entry in entries))
        faded: list[Statistics] = []
        for number, entry in enumerate(entries):
            if entry is not None:
                weight = table.weight_of_use(number, table.call.uses)
                entry = entry._replace(count=entry.count * weight, sum=entry.sum * weight)
            faded.append(entry)
        return super().gather(faded)


@in_these_words(handed_to=VectorQuantize)
class ResidualVQ(Settable):
    """`num_quantizers` layers of `VectorQuantize`, each for what those before it left over, with the peer's arguments.

    Inputs are [B, N, D], or [B, D, ...] with accept_image_fmap or the `vq_kwargs` accept_3d_fmap=True and channel_last=False. A call
    returns the sum of the codes like the input, the indices int64 [B, N, Q] (-1: masked, dropped or not finite), and the losses of the
    layers [Q], 0 in eval mode; in training it is one step of the codebooks. docs/migration.md says what each argument means here.

    What `layers` are at a call, and what is set on them, is what it computes with. A layer with hooks, or a forward of its own, is called.

    Raises ValueError for arguments that contradict each other.
    """

    made_of = frozenset(
        (
            "project_in",
            "project_out",
            "layers",
            "mlps",
            "implicit_neural_codebook",
            "quant_grad_frac",
            "beam_score_weights",
            "return_zeros_for_masked_padding",
        )
    )
    fixed = frozenset(("codebook_dim", "has_projections", "diveq", "shared_codebook", "vq_is_ema_updating"))

    beam_score_weights: Tensor

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int | None = None,
        codebook_size: int | tuple[int, ...],
        codebook_dim: int | None = None,
        shared_codebook: bool = False,
        diveq: bool = False,
        heads: int = 1,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        accept_image_fmap: bool = False,
        implicit_neural_codebook: bool = False,
        mlp_kwargs: dict = dict(),  # noqa: B006, C408 - the peer's default, never written
        beam_size: int | None = None,
        eval_beam_size: int | None = None,
        beam_score_quantizer_weights: list[float] | None = None,
        quant_grad_frac: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        **vq_kwargs: Any,
    ) -> None:
        super().__init__()
        sizes = _layer_sizes(codebook_size, num_quantizers)
        _refuse(heads, shared_codebook, sizes, quantize_dropout, quantize_dropout_cutoff_index, beam_size, eval_beam_size)
        if implicit_neural_codebook and len(sizes) > 1 and vq_kwargs.get("in_place_codebook_optimizer") is not None:
            raise ValueError(f"in_place_codebook_optimizer is given: {_NO_OPTIMIZER}")
        weights = [1.0] * len(sizes) if beam_score_quantizer_weights is None else [*beam_score_quantizer_weights]
        if len(weights) != len(sizes):
            raise ValueError(f"beam_score_quantizer_weights has {len(weights)} entries: must be {len(sizes)}, one a layer")
        self.codebook_dim = dim if codebook_dim is None else codebook_dim
        self.has_projections = self.codebook_dim != dim
        self.project_in = nn.Linear(dim, self.codebook_dim) if self.has_projections else nn.Identity()
        self.project_out = nn.Linear(self.codebook_dim, dim) if self.has_projections else nn.Identity()
        self.accept_image_fmap, self.return_zeros_for_masked_padding = accept_image_fmap, return_zeros_for_masked_padding
        self.implicit_neural_codebook, self.diveq, self.shared_codebook = implicit_neural_codebook, diveq, shared_codebook
        self.num_quantizers, self.codebook_sizes = len(sizes), sizes
        self.uniform_codebook_size = len(set(sizes)) == 1
        self._steps_shared = shared_codebook and not vq_kwargs.get("manual_in_place_optimizer_update")
        of_layers = _layer_arguments(vq_kwargs, shared_codebook, implicit_neural_codebook, diveq)
        of_layers |= {
            "dim": self.codebook_dim,
            "codebook_dim": self.codebook_dim,
            "accept_image_fmap": accept_image_fmap,
            "return_zeros_for_masked_padding": return_zeros_for_masked_padding,
        }
        self.layers = nn.ModuleList(VectorQuantize(codebook_size=size, **of_layers) for size in sizes)
        self.quantize_dropout = quantize_dropout and self.num_quantizers > 1
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of
        self.vq_is_ema_updating = self._first.ema_update
        self.quant_grad_frac = 1.0 if diveq else quant_grad_frac
        self.beam_size = beam_size
        self.eval_beam_size = beam_size if eval_beam_size is None else eval_beam_size
        self.register_buffer("beam_score_weights", torch.tensor(weights), persistent=False)
        self.mlps: Any = (None,) * (self.num_quantizers - 1)
        if implicit_neural_codebook:
            cosine = self._first.use_cosine_sim
            self.mlps = nn.ModuleList(MLP(dim=self.codebook_dim, l2norm_output=cosine, **mlp_kwargs) for _ in sizes[1:])
        if shared_codebook:
            for layer in self._each():
                layer._codebook = self._first._codebook
        hide(self, _dim=dim, _weighs=beam_score_quantizer_weights is not None)
        self._build()

    native: Residual
    _dim: int
    _weighs: bool
    """Whether paths compete by weights that were given; those that are not ones are taken anyway."""
    _natives: list[Any]
    _parts: list[Any]
    _networks: list[Any]
    _beam_weights: tuple[Tensor, int]
    """The tensor whose numbers `native` has, and its version."""

    def _build(self) -> None:
        """The residual quantizer of the layers, networks and projections that are registered here."""
        layers, networks, weights = self._check_layers(), self._each_network(), self.beam_score_weights
        with torch.device("meta"):  # its own layers are replaced
            parts = [
                part_of(layer, None if network is None else _Network(network)) for layer, network in zip(layers, networks, strict=True)
            ]
            native = (_InTurn if self.shared_codebook and len(layers) > 1 else Residual)(
                parts,
                dim=self._dim,
                estimator=DiVeQ(_DIVEQ_VARIANCE) if self.diveq else "layers",
                gradient_fraction=self.quant_grad_frac,
                condition_fraction=1.0,
                beam=_beam(weights, self._weighs),
                layout=layers[0].native.layout,
                masked="zero" if self.return_zeros_for_masked_padding else "input",
            )
        if not self.shared_codebook:
            uses = Counter(layer._codebook for layer in layers)
            for layer, part in zip(layers, parts, strict=True):
                hide(part, steps=uses[layer._codebook] > 1)
        native.project_in, native.project_out = self.project_in, self.project_out
        native.train(self.training)
        native.reducer = layers[0].native.reducer
        keep_synchronized(self.__dict__.get("native"), native)
        hide(self, native=native, _parts=parts, _networks=networks, _beam_weights=(weights, weights._version))
        hide(self, _natives=[layer.native for layer in layers])

    def _check_layers(self) -> list[VectorQuantize]:
        found = check_layers("layers", self.layers)
        number = len({id(layer._codebook) for layer in found})
        if self.shared_codebook and number > 1:
            raise ValueError(
                f"layers: {len(found)} of them have {number} codebooks between them: must all have one with shared_codebook = True; "
                "make another one with shared_codebook=False"
            )
        if not self.shared_codebook and number < len(found) and any(layer.in_place_codebook_optimizer is not None for layer in found):
            raise ValueError(
                f"layers: {len(found)} of them have {number} codebooks between them: must each have its own with "
                "in_place_codebook_optimizer; make another one with shared_codebook=True"
            )
        return found

    def _each_network(self) -> list[Any]:
        """The network of each layer, or None."""
        number = len(self.layers)
        networks = [None, *self.mlps] if self.implicit_neural_codebook else []
        return [*networks, *[None] * (number - len(networks))][:number]

    def _settle(self) -> Residual:
        """The residual quantizer, of the layers of now."""
        layers = cast(nn.ModuleList, self._modules["layers"])._modules.values()
        if not are_of(layers, self._natives) or (self.implicit_neural_codebook and self._each_network() != self._networks):
            self._build()
        return self.native

    def _layer(self, number: int) -> VectorQuantize:
        return cast(VectorQuantize, self.layers[number])

    def _each(self) -> Iterable[VectorQuantize]:
        return cast(Iterable[VectorQuantize], self.layers)

    @property
    def _first(self) -> VectorQuantize:
        return self._layer(0)

    def train(self, mode: bool = True) -> ResidualVQ:
        super().train(mode)
        self.native.train(mode)
        return self

    # Reading codes

    @property
    def codebook_size(self) -> int:
        """C of the first layer."""
        return self._first.codebook_size

    @property
    def codebooks(self) -> Any:
        """[Q, C, K]; where layers differ in size a tuple of [C, K]."""
        codes = tuple(layer._codebook.embed.squeeze(0) for layer in self._each())
        return torch.stack(codes) if self.uniform_codebook_size else codes

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """indices [B, ..., L] of the first L <= Q layers -> the code of each layer [Q, B, ..., K]; zeros for -1 and layers left out.

        Raises ValueError for indices outside -1 ... codebook_size - 1.
        """
        check_tensor("indices", indices)
        codes = self._settle().decode_layers(indices)
        return F.pad(codes, (*(0, 0) * (codes.dim() - 1), 0, max(self.num_quantizers - codes.shape[0], 0)))

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """indices [B, ..., L] of the first L <= Q layers -> vectors as a call gives them, in its layout."""
        native = self._settle()
        if not overrides(self, ResidualVQ, "get_codes_from_indices"):
            return native.decode(indices)
        output = project_out(self.project_out, self.get_codes_from_indices(indices).sum(0), indices)
        return output.movedim(-1, 1) if native.layout == "first" else output

    # Calling

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        indices: Tensor | list[Tensor] | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool = False,
        beam_size: int | None = None,
        rand_quantize_dropout_fixed_seed: int | None = None,
    ) -> Any:
        """x -> (quantized, indices, losses), and the code of each layer [Q, B, ..., K] with return_all_codes.

        mask [B, ...] bool. With `indices` [B, N, Q], or a list of Q times [B, N], (quantized, the sum of the cross-entropies of each
        layer's choice and these). In training with quantize dropout only the first layers take part, as many as
        rand_quantize_dropout_fixed_seed says, or a number drawn; the others have index -1 and loss 0.

        Raises ValueError and TypeError for what does not fit.
        """
        native, layers = self._settle(), [*self._each()]
        frozen = freeze_codebook or (layers[0].freeze_codebook and all(layer.freeze_codebook for layer in layers))
        options: dict[str, Any] = {}
        if indices is not None:
            options["targets"] = self.check_targets(indices, x)
        elif self.training and self.quantize_dropout:
            options["depth"] = self._draw_depth(rand_quantize_dropout_fixed_seed, x.device)
        size = self._beam_size(beam_size)
        options["beam_size"] = size
        if size > 1:
            self._weigh_beams()
        if sample_codebook_temp is not None:
            options["temperature"] = sample_codebook_temp
        self._set_layers(x, layers, size)
        if native.training and not frozen and any(layer.in_place_codebook_optimizer is not None for layer in layers):
            self._step_(x, mask, layers[: options.get("depth")], sample_codebook_temp)
        try:
            found = native.quantize_and_learn(x, mask, freeze_codebook=frozen, **options)
        finally:
            if self.shared_codebook:
                layers[0]._codebook.call = None
        if indices is not None:
            return found.quantized, torch.stack([found.losses[f"cross_entropy/{i}"] for i in range(len(layers))]).sum()
        losses = self._weigh(found, layers) if native.training else self._weigh_in_eval(found, layers)
        result = (found.quantized.contiguous(), found.indices, losses)
        return (*result, self._codes_of_call(found)) if return_all_codes else result

    def check_targets(self, indices: Tensor | list[Tensor], x: Tensor) -> Tensor:
        """indices [B, N, Q], or a list of Q times [B, N], in one tensor. Raises for those that are not of all layers and positions of x."""
        if self.accept_image_fmap:
            raise ValueError("indices are given: must be None with accept_image_fmap = True")
        positions = width_last(x, self.native.dim, self.native.layout).shape[:-1]
        sizes = [layer.codebook_size for layer in self._each()]
        if isinstance(indices, list):
            if len(indices) != len(sizes):
                raise ValueError(f"indices has {len(indices)} entries: must be {len(sizes)}, one a layer")
            for number, (own, size) in enumerate(zip(indices, sizes, strict=True)):
                check_indices(f"indices[{number}]", own, size, positions)
            indices = torch.stack(indices, dim=-1)
        targets = indices
        check_tensor("indices", targets)
        check_path("indices", targets, positions, (len(sizes),), sizes)
        if bool((targets == -1).any()):
            raise ValueError("indices hold -1: must be those of all layers, without dropout or mask, as eval mode gives them")
        return targets

    def _draw_depth(self, seed: int | None, device: torch.device) -> int:
        """How many layers take part: the peer's draw, which is a function of the seed alone."""
        seed = get_maybe_sync_seed(device) if seed is None else seed
        depth = Random(seed).randrange(self.quantize_dropout_cutoff_index, self.num_quantizers) + 1
        return min(round_up_multiple(depth, self.quantize_dropout_multiple_of), len(self.layers))

    def _beam_size(self, size: int | None) -> int:
        size = (self.beam_size if self.training else self.eval_beam_size) if size is None else size
        if size is not None and size > 1 and self.training:
            clash = "commitment_use_cross_entropy_loss" if self._first.commitment_use_cross_entropy_loss else ""
            clash = clash or ("in_place_codebook_optimizer" if self._first.in_place_codebook_optimizer is not None else "")
            if clash:
                raise ValueError(f"beam_size = {size}: must be 1 in training with {clash}")
        return size or 1

    def _weigh_beams(self) -> None:
        """Let paths compete by the weights of now."""
        weights, (seen, version) = self.beam_score_weights, self._beam_weights
        if not torch.compiler.is_compiling() and (weights is not seen or weights._version != version):
            self.native.beam = _beam(weights, self._weighs)
            hide(self, _beam_weights=(weights, weights._version))

    def _set_layers(self, x: Tensor, layers: list[VectorQuantize], beam_size: int) -> None:
        """Their modes, their estimators where a gradient has any place to go, and their losses: in eval mode the errors of a beam alone."""
        reaches = x.requires_grad or learns(self.project_in)
        set_parts(self.native, layers, self._parts, reaches)
        if beam_size > 1 and not self.native.training:
            for part in self._parts:
                part.losses = _ERRORS
        if self.diveq:
            self.native.estimator = DiVeQ(_DIVEQ_VARIANCE) if self.training else "layers"

    def _step_(self, x: Tensor, mask: Tensor | None, layers: list[VectorQuantize], temperature: float | None) -> None:
        """Let each layer's own optimizer step before its codes are read, or before any are if it moves what several layers read."""
        if any(isinstance(part, ImplicitVQ) for part in self._parts):
            raise ValueError(f"in_place_codebook_optimizer is given: {_NO_OPTIMIZER}")
        first = self.shared_codebook or any(layer._codebook.transform is not None for layer in layers)
        for part in self._parts:
            hide(part, pulls=not first)
        if first:
            self._step_first_(x, mask, layers, temperature)

    @torch.no_grad()
    def _step_first_(self, x: Tensor, mask: Tensor | None, layers: list[VectorQuantize], temperature: float | None) -> None:
        """A step of each layer's own optimizer on what the layers before it leave; of a shared codebook one for all."""
        native = self.native
        rows = width_last(x, native.dim, native.layout)
        residual = cast(Tensor, native.project_in(rows))
        for layer, part in zip(layers, self._parts, strict=False):
            if not layer.freeze_codebook:
                part.step_(residual, mask, temperature)
            losses, part.losses = part.losses, ()
            found = super(Part, part).quantize(residual, mask, freeze_codebook=True, temperature=part.temperature(temperature))
            part.losses = losses
            residual = residual - found.quantized.to(residual.dtype)
        if self._steps_shared:
            layers[0].update_in_place_optimizer()

    def _weigh(self, found: Quantized, layers: list[VectorQuantize]) -> Tensor:
        """[Q] the losses of the layers, float32 or wider."""
        number, zero = len(layers), layers[0].zero
        rows = [zero] * number
        dtype = torch.promote_types(found.quantized.dtype, torch.float32)
        for name, loss in found.losses.items():
            layer, weight = weigh(name, layers)
            own = loss if weight == 1.0 else weight * loss
            rows[layer] = own if rows[layer] is zero else rows[layer] + own
        losses = torch.stack([row.to(dtype) for row in rows])
        if not losses.requires_grad and not torch.compiler.is_compiling():
            losses = losses + torch.zeros_like(losses, requires_grad=True)  # so that a loop may call backward whatever is trained
        return losses

    def _weigh_in_eval(self, found: Quantized, layers: list[VectorQuantize]) -> Tensor:
        """[Q]: of a beam search the errors of the layers, of layers that are called their losses, else 0."""
        zero = layers[0].zero
        losses = zero.new_zeros(len(layers), dtype=torch.promote_types(zero.dtype, torch.float32))
        if not found.losses:
            return losses
        each = [*losses]
        for name, loss in found.losses.items():
            number, weight = weigh(name, layers)
            each[number] = loss * (weight if layers[number].has_commitment_loss else 1.0)
        return torch.stack([own.to(torch.promote_types(found.quantized.dtype, losses.dtype)) for own in each])

    def _codes_of_call(self, found: Quantized) -> Tensor:
        """The code of each layer as the call that chose them read it."""
        if not self.native.training:
            if overrides(self, ResidualVQ, "get_codes_from_indices"):
                return self.get_codes_from_indices(found.indices)
            dtype = self._first._codebook.embed.dtype
            return torch.stack([output.to(dtype) for output in found.outputs])  # each is the code itself
        tables = dict.fromkeys(layer._codebook for layer in self._each())
        for table in tables:
            table.recalls = True
        try:
            return self.get_codes_from_indices(found.indices)
        finally:
            for table in tables:
                table.recalls = False


def _beam(weights: Tensor, given: bool) -> BeamSearch | None:
    """Paths that compete by such weights of the layers, if any were `given` or are not ones."""
    numbers = () if weights.is_meta else tuple(weights.tolist())
    return BeamSearch(1, weights=numbers) if numbers and (given or set(numbers) != {1.0}) else None


def _layer_sizes(codebook_size: int | tuple[int, ...], num_quantizers: int | None) -> tuple[int, ...]:
    if not isinstance(codebook_size, tuple):
        if num_quantizers is None or num_quantizers < 1:
            raise ValueError(f"num_quantizers = {num_quantizers}: must be at least 1 where codebook_size is one number")
        return (codebook_size,) * num_quantizers
    if not codebook_size or num_quantizers not in (None, len(codebook_size)):
        raise ValueError(
            f"num_quantizers = {num_quantizers}: must be {len(codebook_size)} or None, as codebook_size = {codebook_size} says"
        )
    return codebook_size


def _refuse(
    heads: int, shared: bool, sizes: tuple[int, ...], dropout: bool, cutoff: int, beam_size: int | None, eval_beam_size: int | None
) -> None:
    if heads != 1:
        raise ValueError(f"heads = {heads}: must be 1 in a residual quantizer")
    if shared and len(set(sizes)) > 1:
        raise ValueError(f"codebook_size = {sizes}: must be one size with shared_codebook = True")
    if cutoff < 0 or (dropout and cutoff >= len(sizes)):
        raise ValueError(f"quantize_dropout_cutoff_index = {cutoff}: must be from 0 to {len(sizes) - 1}, a layer")
    if eval_beam_size is not None and beam_size is None:
        raise ValueError(f"eval_beam_size = {eval_beam_size}: must be None where beam_size is")


def _layer_arguments(given: dict[str, Any], shared: bool, implicit: bool, diveq: bool) -> dict[str, Any]:
    """The arguments of the layers, with what the choices about the whole decide."""
    found = dict(given)
    if implicit:
        found |= {"learnable_codebook": True, "ema_update": False}
    if shared:  # one step a call, which is that of all uses
        found |= {"manual_ema_update": False, "manual_in_place_optimizer_update": True}
    if diveq:
        found |= {"ema_update": False, "learnable_codebook": True, "route_gradients_to_input": False, "commitment_weight": 0.0}
    return found


def _refuse_one_bridge(groups: int, given: dict[str, Any]) -> None:
    """Raise ValueError where a group's own optimizer would step the bridge that the output of another has been computed with."""
    names = ("vq_bridge", "in_place_codebook_optimizer", "shared_codebook")
    if groups > 1 and all(given.get(name) for name in names) and not given.get("manual_in_place_optimizer_update"):
        raise ValueError(
            "in_place_codebook_optimizer is given: must be None with vq_bridge and shared_codebook in several groups, which have one bridge"
        )


@in_these_words(handed_to=ResidualVQ)
class GroupedResidualVQ(Groups):
    """`groups` times a `ResidualVQ` of width dim / groups, with the peer's arguments: `kwargs` are those of ResidualVQ.

    Inputs as there. A call returns the quantized vectors, the indices [G, B, N, Q] and the losses [G, Q].
    """

    def __init__(self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **kwargs: Any) -> None:
        _refuse_one_bridge(groups, kwargs)
        super().__init__(dim, groups, accept_image_fmap, lambda width: ResidualVQ(dim=width, accept_image_fmap=accept_image_fmap, **kwargs))

    @property
    def split_dim(self) -> int:
        """Where the width stands."""
        return 1 if self.rvqs[0].native.layout == "first" else -1

    def forward(
        self,
        x: Tensor,
        indices: Tensor | Sequence[Tensor] | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool = False,
        mask: Tensor | None = None,
    ) -> Any:
        """x -> (quantized, indices, losses), and a tuple of the codes [Q, B, ..., K] of each group with return_all_codes.

        With `indices`, one [B, N, Q] a group, (quantized, the sum of their cross-entropies). Dropout cuts all groups at the same layer.
        """
        pieces = self._pieces(x)
        given: list[Any] = [None] * self.groups
        if indices is not None and (isinstance(indices, Tensor) or len(indices) > 0):
            self._check_groups(indices)
            given = [rvq.check_targets(own, piece) for rvq, own, piece in zip(self.rvqs, indices, pieces, strict=True)]
        seed = get_maybe_sync_seed(x.device) if self.training else None
        found = [
            rvq(
                piece,
                mask=mask,
                indices=own,
                return_all_codes=return_all_codes,
                sample_codebook_temp=sample_codebook_temp,
                freeze_codebook=freeze_codebook,
                rand_quantize_dropout_fixed_seed=seed,
            )
            for rvq, piece, own in zip(self.rvqs, pieces, given, strict=True)
        ]
        joined, rest = self._joined(found)
        if given[0] is not None:
            return joined, torch.stack(rest[0]).sum()
        return (joined, torch.stack(rest[0]), torch.stack(rest[1]), *rest[2:])
