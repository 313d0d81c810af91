"""FSQ by the names of vector-quantize-pytorch: `vqkit.quantizers.FSQ` between linear layers.

Shapes: P... positions of the input, c codebooks, d scalars of a codebook.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from vqkit.compat.vector_quantize_pytorch.arguments import in_these_words
from vqkit.compat.vector_quantize_pytorch.rows import (
    check_codes,
    hide,
    index_dtype,
    keep_codebooks,
    linear,
    project_out,
    projected,
    rows_of,
    with_codebooks,
    without_codebooks,
)
from vqkit.compat.vector_quantize_pytorch.settings import Settable
from vqkit.ops.estimators import straight_through
from vqkit.ops.scalar import Bound, join_digits, level_codes, level_digits, round_to_levels
from vqkit.quantizers import fsq
from vqkit.quantizers.scalar import check_levels

_EPS = 1e-3


def round_ste(z: Tensor) -> Tensor:
    """z rounded, with the gradient of z."""
    return straight_through(z, z.round())


def floor_ste(z: Tensor) -> Tensor:
    """z rounded down, with the gradient of z."""
    return straight_through(z, z.floor())


@in_these_words()
class FSQ(Settable):
    """As the peer's: x [B, N, dim], images and more [B, dim, ...] -> (quantized of that shape, indices int32 [P...] or [P..., c], or None).

    `scale` multiplies the codes. Rounding is in float32 or wider. Raises ValueError and TypeError for what does not fit.
    """

    made_of = frozenset(("scale", "preserve_symmetry", "noise_dropout", "bound_hard_clamp", "orthogonal_rotation"))
    fixed = frozenset(("codebook_dim", "num_codebooks", "effective_codebook_dim", "has_projections", "codebook_size", "implicit_codebook"))

    uncalled = {  # noqa: RUF012
        **dict.fromkeys(("bound", "symmetry_preserving_bound", "quantize", "maybe_apply_noise", "codes_to_indices"), ("forward",)),
        "indices_to_level_indices": ("indices_to_codes",),
        "_scale_and_shift": ("codes_to_indices", "forward"),
        **dict.fromkeys(("_scale_and_shift_inverse", "_indices_to_codes"), ("indices_to_codes",)),
    }

    _levels: Tensor
    native: fsq.FSQ

    def __init__(
        self,
        levels: Sequence[int],
        dim: int | None = None,
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        scale: float | None = None,
        allowed_dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64),
        channel_first: bool = False,
        projection_has_bias: bool = True,
        return_indices: bool = True,
        force_quantization_f32: bool = True,
        preserve_symmetry: bool = False,
        noise_dropout: float = 0.0,
        bound_hard_clamp: bool = False,
        orthogonal_rotation: bool = False,
    ) -> None:
        super().__init__()
        levels = check_levels(levels)
        self.keep_num_codebooks_dim = keep_codebooks(keep_num_codebooks_dim, num_codebooks)
        self.scale, self.preserve_symmetry, self.noise_dropout = scale, preserve_symmetry, noise_dropout
        self.bound_hard_clamp, self.orthogonal_rotation = bound_hard_clamp, orthogonal_rotation
        self.codebook_dim, self.num_codebooks = len(levels), num_codebooks
        self.effective_codebook_dim = len(levels) * num_codebooks
        self.dim = self.effective_codebook_dim if dim is None else dim
        self.channel_first, self.return_indices = channel_first, return_indices
        self.allowed_dtypes, self.force_quantization_f32 = allowed_dtypes, force_quantization_f32
        self.codebook_size = math.prod(levels)
        dtype = index_dtype(self.codebook_size)
        places = [math.prod(levels[:number]) for number in range(len(levels))]
        self.register_buffer("_levels", torch.tensor(levels, dtype=torch.int32), persistent=False)
        self.register_buffer("_basis", torch.tensor(places, dtype=dtype), persistent=False)
        self.has_projections = self.dim != self.effective_codebook_dim
        self.project_in = linear(self.dim, self.effective_codebook_dim, self.has_projections, projection_has_bias)
        self.project_out = linear(self.effective_codebook_dim, self.dim, self.has_projections, projection_has_bias)
        hide(self, _sizes=levels)
        self._build()
        if orthogonal_rotation:
            self.register_buffer("orthogonal_rot", self.native.counts.rotation)

    _sizes: tuple[int, ...]

    def _build(self) -> None:
        if 2 in self._sizes and not self.preserve_symmetry:
            raise ValueError(f"levels = {self._sizes}: must be above 2 unless preserve_symmetry is True")
        if self.noise_dropout > 0 and not self.preserve_symmetry:
            raise ValueError(f"noise_dropout = {self.noise_dropout}: must be 0 unless preserve_symmetry is True")
        hide(self, native=self.make_native(self._sizes, 1.0 if self.scale is None else self.scale))

    def _check_setting(self, name: str, value: Any) -> None:
        if name == "orthogonal_rotation" and value and "orthogonal_rot" not in self._buffers:
            raise ValueError(f"orthogonal_rotation = {value}: must stay False where none was drawn; make another one")

    def make_native(self, levels: Sequence[int], scale: float | Sequence[float]) -> fsq.FSQ:
        """The native quantizer of these choices."""
        return fsq.FSQ(
            levels,
            heads=self.num_codebooks,
            symmetric=bool(self.preserve_symmetry),
            bound=self._bound(self.bound_hard_clamp),
            scale=scale,
            noise_dropout=self.noise_dropout,
            noise_on="codes",
            rotation=bool(self.orthogonal_rotation),
        )

    def settle(self, native: fsq.FSQ) -> fsq.FSQ:
        """`native` with the mode and the rotation of now."""
        if native.training is not self.training:
            native.training = self.training
        if self.orthogonal_rotation and native._rotation is not (rotation := self._buffers["orthogonal_rot"]):
            native.counts.rotation = rotation
        return native

    def _bound(self, hard_clamp: bool) -> Bound:
        bound = "clamp" if hard_clamp else "tanh"
        return cast(Bound, bound if self.preserve_symmetry else f"centred_{bound}")

    @property
    def implicit_codebook(self) -> Tensor:
        """[C, d], all codes, listed anew at every call, in the axes in which scalars are rounded."""
        indices = torch.arange(self.codebook_size, device=self._levels.device)
        return self.native._codes(self.native._split(indices), torch.float32)

    # The parts of rounding

    def bound(self, z: Tensor, eps: float = _EPS, hard_clamp: bool = False) -> Tensor:
        """Scalars [..., d] rounded between -1 and 1, with a code at 0. Raises ValueError for another `eps` than 1e-3."""
        if eps != _EPS:
            raise ValueError(f"eps = {eps}: must be {_EPS}, the margin of the outermost codes")
        return self._rounded(z, symmetric=False, bound="centred_clamp" if hard_clamp else "centred_tanh")

    def symmetry_preserving_bound(self, z: Tensor, hard_clamp: bool = False) -> Tensor:
        """Scalars [..., d] rounded to evenly spaced codes from -1 to 1."""
        return self._rounded(z, symmetric=True, bound="clamp" if hard_clamp else "tanh")

    def _rounded(self, z: Tensor, *, symmetric: bool, bound: Bound) -> Tensor:
        levels = self.native.levels
        found = round_to_levels(z, levels, symmetric=symmetric, bound=bound)
        return straight_through(found.values, level_codes(found.digits, levels, found.values.dtype, symmetric=symmetric))

    def quantize(self, z: Tensor) -> Tensor:
        """Scalars [..., d] -> their codes, before `scale`, noise and rotation."""
        bound = self.symmetry_preserving_bound if self.preserve_symmetry else self.bound
        return bound(z, hard_clamp=self.bound_hard_clamp)

    def maybe_apply_noise(self, bounded_z: Tensor) -> Tensor:
        """In training a share of codes [..., d] moved by noise."""
        if not self.training or self.noise_dropout == 0.0:
            return bounded_z
        return self.native._blur(bounded_z)

    # Codes and indices

    def indices_to_level_indices(self, indices: Tensor) -> Tensor:
        """[...] -> the level of each scalar [..., d]."""
        return self.native.digits(indices).to(indices.dtype)

    def codes_to_indices(self, zhat: Tensor) -> Tensor:
        """Codes [..., d] as they come out, before the output projection -> [...]."""
        check_codes("zhat", zhat, self.codebook_dim)
        native = self.settle(self.native)
        codes = native._turn(zhat if self.scale is None else zhat / self.scale)
        digits = level_digits(codes, native.levels, symmetric=native.symmetric)
        return join_digits(digits, native.levels).to(index_dtype(self.codebook_size))

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """The `quantized` of the call that gave the indices; -1 gives zeros. Raises ValueError for an index that there is not."""
        native = self.settle(self.native)
        found = without_codebooks(indices, self.num_codebooks, self.keep_num_codebooks_dim)
        codes = project_out(self.project_out, native.decode_codes(found).to(self._dtype), found)
        first = self.channel_first or indices.dim() >= 3 + int(self.keep_num_codebooks_dim)
        return codes.movedim(-1, 1) if first else codes

    @property
    def _dtype(self) -> torch.dtype:
        return cast(Tensor, self.project_out.weight).dtype if self.has_projections else torch.float32

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        first = bool(self.channel_first) or z.dim() >= 4
        vectors, finite = projected(self.project_in, rows_of(z, self.dim, first))
        found = self.settle(self.native).quantize_vectors(vectors, finite, freeze_codebook=True)
        out = project_out(self.project_out, found.quantized, None if finite is None else found.indices)
        indices: Any = None
        if self.return_indices:
            indices = with_codebooks(found.indices, self.num_codebooks, self.keep_num_codebooks_dim).to(index_dtype(self.codebook_size))
        return out.movedim(-1, 1) if first else out, indices
