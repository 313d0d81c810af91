"""HierarchicalVQ by the names of vector-quantize-pytorch: `vqkit.quantizers.Hierarchical` of the codebooks of its VectorQuantize.

Shapes: B batch, D width, P... positions (1 to 3 axes), G... cells of a level, L levels.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vqkit.compat.vector_quantize_pytorch.arguments import in_these_words
from vqkit.compat.vector_quantize_pytorch.depth import get_maybe_sync_seed
from vqkit.compat.vector_quantize_pytorch.functions import default, exists
from vqkit.compat.vector_quantize_pytorch.layers import check_layers, part_of, set_parts, weigh
from vqkit.compat.vector_quantize_pytorch.rows import at_most, hide
from vqkit.compat.vector_quantize_pytorch.settings import Settable, are_of, keep_synchronized
from vqkit.compat.vector_quantize_pytorch.vector_quantize_pytorch import VectorQuantize
from vqkit.ops.grids import average, interpolate
from vqkit.quantizers.config import check_count
from vqkit.quantizers.hierarchical import Hierarchical, Mixer
from vqkit.quantizers.layout import check_tensor, is_integer

__all__ = ["HierarchicalVQ", "default", "exists", "get_maybe_sync_seed", "to_level_shape"]


def to_level_shape(scale: int | Sequence[int], spatial_dims: int) -> tuple[int, ...]:
    """A number for all axes, or one an axis. Raises ValueError for another number of them."""
    if isinstance(scale, int):
        return (scale,) * spatial_dims
    if len(scale) != spatial_dims:
        raise ValueError(f"scale = {scale}: must be a number, or {spatial_dims}, one an axis")
    return tuple(scale)


class _Axes(nn.Module):
    """Moves, joins or splits axes of a tensor: methods of it with their arguments, in turn. As data, so that it can be pickled."""

    def __init__(self, *steps: tuple[Any, ...]) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        for name, *arguments in self.steps:
            x = getattr(x, name)(*arguments)
        return x


@in_these_words()
class HierarchicalVQ(Settable):
    """As the peer's: x [B, D, P...], or [B, P..., D] -> (quantized, indices of each level [B, G...], loss), and the cutoff if asked for.

    Raises ValueError and TypeError for what does not fit.
    """

    made_of = frozenset(("vq", "vqs", "phi_shared", "phi_levels"))
    fixed = frozenset(
        (
            "dim",
            "spatial_dims",
            "channel_first",
            "level_shapes",
            "num_levels",
            "to_channel_first",
            "to_channel_last",
            "mask_to_channel",
            "mask_from_channel",
            "flatten_spatial",
            "flatten_indices",
            "unflatten_spatial",
            "indices_to_spatial",
        )
    )
    uncalled = {  # noqa: RUF012
        "pool_residual": ("forward",),
        **dict.fromkeys(("get_vq", "choose_phi", "upsample_to_full"), ("forward", "get_output_from_indices")),
    }

    def __init__(
        self,
        *,
        dim: int,
        codebook_size: int | Sequence[int],
        scales: Sequence[int | Sequence[int]],
        shared_codebook: bool = True,
        channel_first: bool = True,
        sync_codebook: bool | None = None,
        decay: float = 0.99,
        commitment_weight: float = 1.0,
        rotation_trick: bool = False,
        kmeans_init: bool = True,
        kmeans_iters: int = 10,
        threshold_ema_dead_code: float = 2,
        stochastic_sample_codes: bool = False,
        sample_codebook_temp: float = 0.1,
        orthogonal_reg_weight: float = 0.0,
        orthogonal_reg_max_codes: int | None = 128,
        orthogonal_reg_active_codes_only: bool = False,
        quant_resi: float = 0.5,
        share_quant_resi: int = 1,
        nested_dropout: float = 0.0,
        nested_dropout_min_levels: int = 1,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
    ) -> None:
        super().__init__()
        if accept_image_fmap and accept_3d_fmap:
            raise ValueError("accept_image_fmap and accept_3d_fmap are True: must be at most one of them")
        if not 0.0 <= nested_dropout <= 1.0:
            raise ValueError(f"nested_dropout = {nested_dropout}: must be from 0 to 1")
        check_count("nested_dropout_min_levels", nested_dropout_min_levels)
        self.dim, self.channel_first, self.scales = dim, channel_first, tuple(scales)
        self.spatial_dims = 2 if accept_image_fmap else 3 if accept_3d_fmap else 1
        self.level_shapes = tuple(to_level_shape(scale, self.spatial_dims) for scale in scales)
        self.num_levels = len(self.level_shapes)
        sizes = (codebook_size,) * self.num_levels if isinstance(codebook_size, int) else tuple(codebook_size)
        if len(sizes) != self.num_levels or (shared_codebook and len(set(sizes)) > 1):
            allowed = "one size for all" if shared_codebook else f"one size, or {self.num_levels}, one a level"
            raise ValueError(f"codebook_size = {codebook_size}: must be {allowed} with shared_codebook = {shared_codebook}")
        self.codebook_sizes = sizes
        self.nested_dropout, self.nested_dropout_min_levels = nested_dropout, nested_dropout_min_levels
        self._register_axes()
        options = {
            "dim": dim,
            "decay": decay,
            "commitment_weight": commitment_weight,
            "rotation_trick": rotation_trick,
            "kmeans_init": kmeans_init,
            "kmeans_iters": kmeans_iters,
            "threshold_ema_dead_code": threshold_ema_dead_code,
            "stochastic_sample_codes": stochastic_sample_codes,
            "sample_codebook_temp": sample_codebook_temp,
            "orthogonal_reg_weight": orthogonal_reg_weight,
            "orthogonal_reg_max_codes": orthogonal_reg_max_codes,
            "orthogonal_reg_active_codes_only": orthogonal_reg_active_codes_only,
            "sync_codebook": sync_codebook,
        }
        self.vq = VectorQuantize(codebook_size=sizes[0], **options) if shared_codebook else None
        self.vqs = None if shared_codebook else nn.ModuleList(VectorQuantize(codebook_size=size, **options) for size in sizes)
        number = self.num_levels if share_quant_resi <= 0 else min(self.num_levels, int(share_quant_resi))
        mixing = abs(quant_resi) if abs(quant_resi) > 1e-8 else 0.0
        mixers = [Mixer(dim, self.spatial_dims, mixing) for _ in range(number)]
        self.phi_shared = mixers[0] if share_quant_resi == 1 else None
        self.phi_levels = None if share_quant_resi == 1 else nn.ModuleList(mixers)
        hide(self, _mixing=mixing)
        self._build()

    native: Hierarchical
    _mixing: float
    _levels: list[VectorQuantize]
    _natives: list[Any]
    _parts: list[Any]

    def _build(self) -> None:
        levels = check_layers("vq", self._each())
        if len(levels) not in (1, self.num_levels) or (len(levels) == 1) != (self.vqs is None or self.num_levels == 1):
            raise ValueError(f"vqs has {len(levels)} entries: must be {self.num_levels}, one a level")
        mixers = self._mixers()
        with torch.device("meta"):  # its own convolutions are replaced
            parts = [part_of(level) for level in levels]
            native = Hierarchical(
                parts if self.vqs is not None else parts * self.num_levels,
                self.level_shapes,
                axes=self.spatial_dims,
                mixing=self._mixing,
                mixers=len(mixers),
                layout="first" if self.channel_first else "last",
            )
        if self._mixing:
            native.mixers = nn.ModuleList(mixers)
        native.reducer = levels[0].native.reducer
        native.train(self.training)
        keep_synchronized(self.__dict__.get("native"), native)
        hide(self, native=native, _levels=levels, _natives=[level.native for level in levels], _parts=parts)

    def _each(self) -> Iterable[nn.Module]:
        found: Any = [self.vq] if self.vqs is None else self.vqs
        return found

    def _mixers(self) -> list[Any]:
        levels: Any = self.phi_levels
        return [*levels] if self.phi_shared is None else [self.phi_shared]

    def _settle(self) -> Hierarchical:
        """The native quantizer, of the levels and convolutions of now."""
        if not are_of(self._each(), self._natives) or (self._mixing and self._mixers() != [*self.native.mixers]):
            self._build()
        return self.native

    def _register_axes(self) -> None:
        """Modules by the peer's names that move axes."""
        first = self.channel_first
        self.to_channel_first = nn.Identity() if first else _Axes(("movedim", -1, 1))
        self.to_channel_last = nn.Identity() if first else _Axes(("movedim", 1, -1))
        self.mask_to_channel, self.mask_from_channel = _Axes(("unsqueeze", 1)), _Axes(("squeeze", 1))
        self.flatten_spatial, self.flatten_indices = _Axes(("flatten", 2), ("transpose", 1, 2)), _Axes(("flatten", 1))
        shapes = self.level_shapes
        self.unflatten_spatial = nn.ModuleList(_Axes(("transpose", 1, 2), ("unflatten", 2, shape)) for shape in shapes)
        self.indices_to_spatial = nn.ModuleList(_Axes(("unflatten", 1, shape)) for shape in shapes)

    def train(self, mode: bool = True) -> HierarchicalVQ:
        super().train(mode)
        self.native.train(mode)
        return self

    # The parts of a level

    def get_vq(self, level_index: int) -> VectorQuantize:
        """The quantizer of a level."""
        found: Any = self.vq if self.vqs is None else self.vqs[level_index]
        return found

    def choose_phi(self, level_index: int) -> Mixer:
        """The convolution of a level."""
        mixers = self._mixers()
        return mixers[round(level_index / max(self.num_levels - 1, 1) * (len(mixers) - 1))]

    def pool_residual(self, t: Tensor, level_shape: tuple[int, ...], mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """t [B, D, P...] averaged over cells [B, D, G...], of what mask [B, P...] keeps; and the cells [B, G...] that have any."""
        cells, share = average(t, level_shape, None if mask is None else mask.unsqueeze(1).to(t.dtype))
        return cells, None if share is None else share.squeeze(1) > 0

    def upsample_to_full(self, q: Tensor, full_shape: tuple[int, ...], level_index: int) -> Tensor:
        """Cells [B, D, G...] spread over positions [B, D, P...]."""
        spread = interpolate(q, full_shape)
        return self.choose_phi(level_index)(spread) if self._mixing else spread

    def sample_nested_cutoff(self, device: torch.device | str) -> int | None:
        """The last level that takes part in a step of training; None: all."""
        least = self.nested_dropout_min_levels
        if not self.training or self.nested_dropout <= 0.0 or self.num_levels <= 1 or least >= self.num_levels:
            return None
        drawn = random.Random(get_maybe_sync_seed(device))
        if drawn.random() >= self.nested_dropout:
            return None
        return drawn.randrange(least - 1, self.num_levels - 1)

    # Calls

    def forward(
        self,
        x: Tensor,
        indices: Any = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        sample_codebook_temp: float | None = None,
        return_cutoff: bool = False,
    ) -> Any:
        if indices is not None:
            raise ValueError("indices are given: must be None; get_output_from_indices decodes them")
        if lens is not None and self.spatial_dims > 1:
            raise ValueError(f"lens is given for {self.spatial_dims} axes of positions: must be a mask")
        native, levels = self._settle(), self._levels
        if any(level.in_place_codebook_optimizer is not None for level in levels):
            raise ValueError("in_place_codebook_optimizer is set on a level: must be None")
        cutoff = self.sample_nested_cutoff(x.device)
        set_parts(native, levels, self._parts, learns=True)
        found = native.quantize_and_learn(
            x,
            mask,
            lengths=lens if lens is None else at_most(lens, x, self.channel_first),
            temperature=sample_codebook_temp,
            depth=None if cutoff is None else cutoff + 1,
        )
        loss = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        if found.losses:
            each = levels if self.vqs is not None else levels * self.num_levels
            alike: dict[float, Any] = {}
            for name, value in found.losses.items():
                _, weight = weigh(name, each)
                alike[weight] = alike[weight] + value if weight in alike else value
            loss = sum((weight / self.num_levels * value for weight, value in alike.items()), loss)
        grids = tuple(grid.contiguous() for grid in native.split(found.indices))  # which callers view as rows
        output = (found.quantized, grids, loss)
        return (*output, cutoff) if return_cutoff else output

    def get_output_from_indices(self, indices: Sequence[Tensor], full_shape: int | Sequence[int] | None = None) -> Tensor:
        """The indices of each level -> vectors at the positions of the last level, or at `full_shape`; a cell of index -1 gives zeros.

        Raises ValueError for another number of levels, other shapes, and indices that there are not.
        """
        if not isinstance(indices, (tuple, list)) or len(indices) != self.num_levels:
            raise ValueError(f"indices: must be a tuple of {self.num_levels} tensors, one a level")
        for level, (found, shape) in enumerate(zip(indices, self.level_shapes, strict=True)):
            check_tensor(f"indices[{level}]", found)
            if tuple(found.shape[1:]) != shape or not is_integer(found):
                what = f"indices[{level}] is {tuple(found.shape)} {found.dtype}"
                raise ValueError(f"{what}: must be integers of shape [batch, {', '.join(map(str, shape))}]")
        positions = None if full_shape is None else to_level_shape(full_shape, self.spatial_dims)
        joined = torch.cat(
            [found.reshape(len(found), math.prod(shape)) for found, shape in zip(indices, self.level_shapes, strict=True)], 1
        )
        return self._settle().decode(joined, positions)
