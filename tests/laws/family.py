"""Every quantizer with every option: the cases on which the laws are tried.

A case is a class and its arguments, so that a test can ask whether any argument, choice or field of a choice stands in no case. Each case
changes one thing of the class's defaults, or a few that meet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vqkit.quantizers import (
    EMA,
    FSP,
    FSQ,
    LFQ,
    MLP,
    Affine,
    BeamSearch,
    BinaryMapper,
    ClipEMA,
    CodebookConfig,
    Commitment,
    CrossEntropyCommitment,
    DeadCodes,
    DiVeQ,
    Diversity,
    Entropy,
    EvoLFQ,
    Evolution,
    FreeBits,
    Frozen,
    Gradient,
    Grouped,
    GroupedResidualVQ,
    Gumbel,
    Hierarchical,
    HierarchicalVQ,
    KMeans,
    LatentQuantize,
    LearnableVQ,
    Moments,
    NestedDropout,
    Orthogonality,
    OwnOptimizer,
    ProductVQ,
    QuantizeDropout,
    Residual,
    ResidualVQ,
    SimpleVQ,
    SimVQ,
    Softmax,
    StoredEMA,
    VectorQuantize,
    VQBridge,
)
from vqkit.quantizers.codebook import Codebook

DIM, CODES, BATCH, TIME, HEADS = 8, 16, 4, 8, 2
_SIZES = {"dim", "num_quantizers", "groups"}


@dataclass(frozen=True, eq=False)
class Case:
    """`kind(**arguments)` on inputs that have `positions` behind the batch; `remark` says what is special about the input."""

    kind: type[nn.Module]
    arguments: Mapping[str, Any]
    positions: tuple[int, ...] = (TIME,)
    remark: str = ""
    represents: bool = False
    inductor: bool = False

    @cached_property
    def options(self) -> tuple[str, ...]:
        """`name=value` for each argument but the sizes, and the remark."""
        words = [f"{name}={label(value)}" for name, value in self.arguments.items() if name not in _SIZES and value != CODES]
        return (*words, *([self.remark] if self.remark else []))

    @cached_property
    def name(self) -> str:
        return f"{self.kind.__name__}({', '.join(self.options)})"

    def build(self, seed: int = 0, **changes: Any) -> Any:
        """A new module."""
        torch.manual_seed(seed)
        arguments = {name: value() if name in _BUILT and callable(value) else value for name, value in self.arguments.items()}
        return self.kind(**{**arguments, **changes})

    # What it can do

    @property
    def in_heads(self) -> bool:
        """Whether inputs are [B, H, T, K], as Transformer-VQ hands them."""
        return self.kind in (LearnableVQ, SimpleVQ)

    @property
    def of_items(self) -> bool:
        """Whether indices are those of whole items."""
        return not self.in_heads and self._example.whole_items

    @property
    def commits(self) -> bool:
        """Whether there is a choice of commit."""
        return not self.in_heads

    @property
    def learns(self) -> bool:
        """Whether any code can change."""
        frozen = "update=Frozen" in self.options and "transform" not in self.arguments
        if self.in_heads:
            return self.kind is not SimpleVQ
        books = self._example.codebooks()
        return not frozen and any(isinstance(book, Codebook) or any(True for _ in book.parameters()) for book in books)

    @property
    def steps(self) -> bool:
        """Whether training changes anything: codes, or layers around them."""
        return self.learns or self.projects

    @property
    def waits(self) -> bool:
        """Whether the codebook waits for data."""
        return any("KMeans" in option or "init=kmeans" in option for option in self.options)

    @property
    def replaces(self) -> bool:
        """Whether dead codes are replaced."""
        return any("DeadCodes" in option or "dead_code_threshold" in option for option in self.options)

    @cached_property
    def projects(self) -> bool:
        """Whether linear layers stand around the codebooks."""
        return any(isinstance(m, nn.Linear) for name, m in self._example.named_modules() if name.endswith("project_in"))

    @cached_property
    def _example(self) -> Any:
        with torch.random.fork_rng():
            return self.build()

    # What goes in

    @property
    def first(self) -> bool:
        return self.arguments.get("layout") == "first"

    def input(self, batch: int = BATCH, *, seed: int = 1) -> Tensor:
        """Normal vectors, float32."""
        generator = torch.Generator().manual_seed(seed)
        return self.unrows(torch.randn(batch, *self.positions, self.width, generator=generator))

    @cached_property
    def width(self) -> int:
        return HEADS * DIM if self.in_heads else self._example.dim

    def rows(self, x: Tensor) -> Tensor:
        """An input as [B, *positions, width]."""
        if self.in_heads:
            return x.transpose(1, 2).flatten(-2)
        return x.movedim(1, -1) if self.first else x

    def unrows(self, rows: Tensor) -> Tensor:
        if self.in_heads:
            return rows.unflatten(-1, (HEADS, DIM)).transpose(1, 2).contiguous()
        return rows.movedim(-1, 1).contiguous() if self.first else rows

    def mask_shape(self, batch: int = BATCH) -> tuple[int, ...]:
        return (batch, *self.positions)

    def index_shape(self, module: Any, batch: int = BATCH) -> tuple[int, ...]:
        """Of the indices of an input."""
        return (batch, *(() if self.of_items else self.positions), *module.code_shape)

    def some_mask(self, batch: int = BATCH, *, seed: int = 3) -> Tensor:
        return torch.rand(self.mask_shape(batch), generator=torch.Generator().manual_seed(seed)) < 0.6

    def spread(self, mask: Tensor, like: Tensor | None = None) -> Tensor:
        """One value a position -> one value an entry of the input, or of an output `like` this."""
        width = self.width if like is None else self.rows(like).shape[-1]
        return self.unrows(mask.unsqueeze(-1).expand(*mask.shape, width))

    def output_shape(self, module: Any, x: Tensor) -> torch.Size:
        """Of what the module makes of x."""
        width = self.width if self.in_heads else module.out_dim
        return self.unrows(self.rows(x)[..., :1].expand(*self.rows(x).shape[:-1], width)).shape

    def index_rows(self, indices: Tensor) -> Tensor:
        """Indices with their positions first: [B, *positions, ...]; of whole items those of the last grid, which has all positions."""
        if self.of_items:
            return indices[:, -math.prod(self.positions) :].unflatten(-1, self.positions)
        return indices.transpose(1, 2) if self.in_heads else indices

    def kept(self, indices: Tensor, mask: Tensor) -> Tensor:
        """The indices of the positions that count."""
        return self.index_rows(indices)[mask]

    def reorder(self, x: Tensor, order: Tensor) -> Tensor:
        rows = self.rows(x)
        return self.unrows(rows.reshape(-1, rows.shape[-1])[order].reshape(rows.shape))

    def reorder_indices(self, indices: Tensor, order: Tensor) -> Tensor:
        rows = self.index_rows(indices)
        moved = rows.reshape(len(order), -1)[order].reshape(rows.shape)
        return moved.transpose(1, 2) if self.in_heads else moved

    def as_one_batch(self, x: Tensor) -> Tensor:
        """The same vectors with another batch size: half the batch, twice the length, or another batch where there is no length."""
        rows = self.rows(x)
        return self.unrows(rows.reshape(len(rows) // 2, 2 * self.positions[0], *rows.shape[2:]))


def label(value: Any) -> str:
    """A short word for a choice: the class and the fields that are not default."""
    if is_dataclass(value):
        changed = [f"{f.name}={label(v)}" for f in fields(value) if (v := getattr(value, f.name)) != f.default]
        return type(value).__name__ + (f"({', '.join(changed)})" if changed else "")
    if isinstance(value, (tuple, list)):
        return "+".join(map(label, value)) or "none"
    if callable(value):
        return value.__name__
    return str(value)


def _vq(
    *, positions: tuple[int, ...] = (TIME,), remark: str = "", represents: bool = False, inductor: bool = False, **arguments: Any
) -> Case:
    return Case(VectorQuantize, {"dim": DIM, "codebook_size": CODES, **arguments}, positions, remark, represents, inductor)


def _rvq(
    *, positions: tuple[int, ...] = (TIME,), remark: str = "", represents: bool = False, inductor: bool = False, **arguments: Any
) -> Case:
    sizes = {"dim": DIM, "codebook_size": CODES, "num_quantizers": 3}
    return Case(ResidualVQ, {**sizes, **arguments}, positions, remark, represents, inductor)


def _grouped(*, positions: tuple[int, ...] = (TIME,), remark: str = "", **arguments: Any) -> Case:
    sizes = {"dim": 2 * DIM, "codebook_size": CODES, "num_quantizers": 2, "groups": 2}
    return Case(GroupedResidualVQ, {**sizes, **arguments}, positions, remark)


def tanh_of_linear() -> nn.Module:
    """A transform of the user's own."""
    return nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh())


def slow_where_many(total: Tensor, count: Tensor) -> Tensor:
    """Codes that many vectors chose follow them slowly."""
    return 2 / (1 + count)


def two_kinds() -> list[nn.Module]:
    """Layers of different kinds."""
    return [VectorQuantize(DIM, CODES, metric="cosine"), VectorQuantize(DIM, 4, update=Gradient(), codebook_dim=3)]


def plain_layers() -> list[nn.Module]:
    """Layers without a gradient."""
    return [VectorQuantize(DIM, CODES), VectorQuantize(DIM, 4)]


def two_tables() -> list[nn.Module]:
    """Levels of different size."""
    return [VectorQuantize(DIM, CODES, estimator="straight_through"), VectorQuantize(DIM, 4, update=Gradient())]


def two_heads() -> list[nn.Module]:
    """Layers with a code shape of their own."""
    return [VectorQuantize(DIM, CODES, heads=2), VectorQuantize(DIM, CODES, heads=2, separate_heads=True)]


def unequal_widths() -> list[nn.Module]:
    """Parts of different width, one of them twice."""
    narrow = VectorQuantize(3, CODES)
    return [narrow, VectorQuantize(DIM, 4, estimator="straight_through"), narrow]


def groups_of_residuals() -> list[nn.Module]:
    """Combinators within a combinator."""
    return [Residual([VectorQuantize(DIM, CODES), VectorQuantize(DIM, CODES)]) for _ in range(2)]


def fine_after_coarse() -> list[nn.Module]:
    """Scalars, each layer at the scale of the steps of the one before."""
    return [FSQ((5, 5, 3), symmetric=True, bound="clamp", scale=[(n - 1.0) ** -i for n in (5, 5, 3)]) for i in range(3)]


def halving_bits() -> list[nn.Module]:
    """Signs, each layer at half the scale of the one before."""
    return [LFQ(DIM, scale=0.5**i, losses=(Entropy(weight=0.1), Commitment(weight=0.25))) for i in range(2)]


def groups_of_scalars() -> list[nn.Module]:
    """Scalars of different widths, grouped."""
    return [Residual([FSQ((4, 4)), FSQ((4, 4), scale=0.25)]), Residual([LFQ(3), LFQ(3, scale=0.5)])]


_BUILT = {"transform", "activation", "layers", "parts", "levels"}  # modules are made anew for each case
_QUICK = EMA(decay=0.3)
"""Forgets so fast that codes die within a step."""
_HEALTHY = DeadCodes(threshold=1.0)

_VECTOR_QUANTIZE = [
    _vq(represents=True, inductor=True),
    # What is near
    _vq(metric="cosine"),
    _vq(metric="cosine", update=Gradient()),
    # How codes are chosen and gradients pass
    _vq(assignment=Gumbel(temperature=0.5)),
    _vq(assignment=Gumbel(estimator="reinmax"), update=Gradient(), represents=True),
    _vq(assignment=Gumbel(), estimator=DiVeQ(), update=Gradient()),
    _vq(assignment=Softmax(temperature=0.5)),
    _vq(assignment=Softmax(estimator="reinmax"), update=Gradient()),
    _vq(assignment=Softmax(), update=Gradient(), metric="cosine"),  # IBQ
    _vq(estimator="straight_through"),
    _vq(estimator="none"),
    _vq(estimator="none", update=Gradient()),
    _vq(estimator=DiVeQ(sigma2=1e-2), update=Gradient(), represents=True),
    _vq(input_gradient=False),
    _vq(sync_update=0.2, update=Gradient()),
    # How the codebook learns
    _vq(update=EMA(decay=0.5, eps=1e-3)),
    _vq(update=ClipEMA(decay=0.9, floor=0.1)),
    _vq(update=StoredEMA(decay=0.5, eps=1e-3)),
    _vq(update=StoredEMA(learn=True), metric="cosine", losses=(Commitment(pull=0.0), Orthogonality())),
    _vq(update=StoredEMA(decay=0.3, follow=False), dead_codes=_HEALTHY),
    _vq(update=StoredEMA(follow=False, count=False, learn=True)),
    _vq(update=Gradient(decay=0.9), represents=True),
    _vq(update=OwnOptimizer(learning_rate=0.01, betas=(0.8, 0.9), eps=1e-6, decay=0.9), represents=True),
    _vq(update=OwnOptimizer(name="sgd", learning_rate=0.1, momentum=0.5)),
    _vq(update=Frozen()),
    _vq(commit="manual", represents=True),
    # How it starts and stays alive
    _vq(init="normal"),
    _vq(init=KMeans()),
    _vq(init=KMeans(iterations=3, start="random"), metric="cosine"),
    _vq(dead_codes=_HEALTHY, update=_QUICK),
    _vq(dead_codes=DeadCodes(threshold=1.0, reset_count=1.5), update=OwnOptimizer(decay=0.3)),
    _vq(dead_codes=_HEALTHY, update=Gradient(decay=0.3)),
    # What the codes are made of
    _vq(transform="linear", update=Frozen(), represents=True),
    _vq(transform=MLP(hidden=12, depth=2), update=Gradient(), init="unit"),
    _vq(transform=tanh_of_linear, update=Gradient()),
    _vq(transform=VQBridge(patch=4, hidden=12, depth=2, heads=2), update=Gradient(), represents=True),
    _vq(affine=Affine(batch_decay=0.5, codebook_decay=0.5), represents=True),
    _vq(affine=Affine(current=True)),
    _vq(code_weights=slow_where_many),
    # Losses
    _vq(losses=()),
    _vq(losses=(Commitment(weight=0.25), Diversity(weight=0.1, temperature=2.0))),
    _vq(losses=(CrossEntropyCommitment(weight=0.5),)),
    _vq(losses=(Commitment(weight=0.25, pull=4.0), Orthogonality(weight=0.5)), update=Gradient()),
    _vq(losses=(Commitment(), Orthogonality(active_only=True)), update=Gradient()),
    _vq(losses=(Commitment(), Orthogonality(max_codes=8)), update=Gradient()),
    # Heads and widths
    _vq(heads=2),
    _vq(heads=2, separate_heads=True),
    _vq(codebook_dim=4),
    _vq(codebook_dim=4, projection_norm=True),
    _vq(heads=2, separate_heads=True, codebook_dim=3, metric="cosine", dead_codes=_HEALTHY, update=_QUICK, init=KMeans()),
    # Layouts, masks, what is not finite
    _vq(layout="first"),
    _vq(layout="first", positions=(3, 4), remark="image"),
    _vq(positions=(3, 4), remark="image"),
    _vq(layout="first", heads=2, positions=(2, 2, 2), remark="volume"),
    _vq(positions=(), remark="single token"),
    _vq(masked="input"),
    _vq(on_nonfinite="raise"),
]

_RESIDUAL = [
    _rvq(represents=True),
    _rvq(codebook_size=(16, 8, 4), num_quantizers=None),
    _rvq(codebook_dim=4),
    _rvq(shared_codebook=True, represents=True),
    _rvq(shared_codebook=True, dead_codes=DeadCodes(threshold=4.0), update=_QUICK),
    _rvq(shared_codebook=True, update=OwnOptimizer()),
    _rvq(estimator="straight_through", estimate="sum"),
    _rvq(estimator="none", update=Gradient()),
    _rvq(estimator=DiVeQ(), update=Gradient(), represents=True),
    _rvq(estimate="layers"),
    _rvq(assignment=Gumbel(temperature=0.5)),
    _rvq(gradient_fraction=0.5, update=Gradient()),
    _rvq(quantize_dropout=QuantizeDropout(seed=5), represents=True),
    _rvq(quantize_dropout=QuantizeDropout(cutoff_index=1, multiple_of=2, seed=5), codebook_size=8, num_quantizers=4),
    _rvq(beam=BeamSearch(size=3, eval_size=4, weights=(1.0, 0.8, 0.6)), represents=True),
    _rvq(implicit=MLP(hidden=12, depth=1), represents=True),
    _rvq(implicit=MLP(hidden=12), beam=BeamSearch(size=2)),
    _rvq(implicit=MLP(hidden=12), shared_codebook=True),
    _rvq(implicit=MLP(hidden=12), condition_fraction=1.0),
    _rvq(implicit=MLP(hidden=12), assignment=Softmax(), losses=(Commitment(), CrossEntropyCommitment())),
    _rvq(implicit=MLP(hidden=12), assignment=Gumbel(estimator="reinmax"), init=KMeans()),
    _rvq(sync_update=0.2, update=Gradient()),
    _rvq(input_gradient=False),
    _rvq(shared_codebook=True, init=KMeans()),
    _rvq(init=KMeans(), metric="cosine"),
    _rvq(heads=2, separate_heads=True),
    _rvq(layout="first", positions=(3, 4), remark="image", codebook_dim=4),
    _rvq(layout="first"),
    _rvq(masked="input"),
    _rvq(commit="manual"),
    Case(Residual, {"layers": two_kinds, "estimator": "rotation", "sync_update": 0.2}),
    Case(Residual, {"layers": plain_layers, "input_gradient": False}),
    Case(Residual, {"layers": two_heads, "dim": 6, "estimator": "layers"}),
]

_GROUPED = [
    _grouped(),
    _grouped(layout="first", positions=(3, 4), remark="image"),
    _grouped(shared_codebook=True, quantize_dropout=QuantizeDropout()),
    _grouped(masked="input", commit="manual"),
    Case(Grouped, {"parts": unequal_widths}),
    Case(Grouped, {"parts": groups_of_residuals, "layout": "first", "commit": "manual"}),
]


def mapped_tables() -> list[nn.Module]:
    """Frozen tables behind learned maps."""
    return [SimVQ(DIM, CODES, estimator="none") for _ in range(2)]


_COMPOSED = [
    Case(SimVQ, {"dim": DIM, "codebook_size": CODES}),
    Case(SimVQ, {"dim": DIM, "codebook_size": CODES, "transform": MLP(hidden=12), "init": "normal", "losses": (Commitment(),)}),
    Case(SimVQ, {"dim": DIM, "codebook_size": CODES, "transform": VQBridge(patch=8, hidden=8)}),
    Case(Residual, {"layers": mapped_tables, "beam": BeamSearch(size=2)}),
    Case(ProductVQ, {"dim": 2 * DIM, "codebook_size": CODES, "groups": 2}),
    Case(ProductVQ, {"dim": 2 * DIM, "codebook_size": CODES, "groups": 2, "layout": "first", "commit": "manual"}, (3, 4), "image"),
]

_SCALAR = [
    Case(FSQ, {"levels": (8, 5, 5)}, represents=True),
    Case(FSQ, {"levels": (2, 3, 4), "dim": DIM}),
    Case(FSQ, {"levels": (4, 3), "heads": 2, "symmetric": True, "layout": "first"}, (3, 4), "image"),
    Case(FSQ, {"levels": (5, 4), "bound": "clamp", "scale": (0.5, 0.25), "masked": "input"}),
    Case(FSQ, {"levels": (4, 4), "dim": DIM, "symmetric": True, "noise_dropout": 0.5, "commit": "manual"}),
    Case(FSQ, {"levels": (4, 5), "dim": DIM, "heads": 2, "bound": "centred_tanh", "rotation": True}),
    Case(FSQ, {"levels": (4, 5), "bound": "centred_clamp"}),
    Case(FSQ, {"levels": (4, 5), "bound": "clamp", "symmetric": True, "noise_dropout": 0.5, "noise_on": "codes"}),
    Case(LFQ, {"dim": DIM}, represents=True),
    Case(LFQ, {"dim": DIM, "codebook_size": 16, "heads": 2, "spherical": True, "scale": 2.0, "diversity_bits": 3}),
    Case(
        LFQ,
        {
            "dim": DIM,
            "codebook_size": 64,
            "soft_clamp": 2.0,
            "diversity_over": "ranks",
            "losses": (Commitment(weight=0.25), Entropy(weight=0.2, temperature=0.5), Diversity(temperature=0.5)),
        },
    ),
    Case(LFQ, {"dim": DIM, "layout": "first", "masked": "input", "commit": "manual"}, (3, 4), "image"),
    Case(LFQ, {"dim": DIM, "first_bit": "highest", "rotation": True, "activation": nn.Tanh, "probability_floor": 1e-5}),
    Case(LFQ, {"dim": DIM, "loss_share": 0.5}),
    Case(LatentQuantize, {"levels": (5, 4, 3)}, represents=True),
    Case(LatentQuantize, {"levels": (4, 4), "dim": DIM, "heads": 2, "commitment": Commitment(weight=0.5, pull=2.0)}),
    Case(LatentQuantize, {"levels": (3, 2), "layout": "first", "masked": "input", "commit": "manual"}, (3, 4), "image"),
    Case(FSP, {"levels": (8, 5, 5), "quantize_rate": 1.0}, represents=True),
    Case(FSP, {"levels": (4, 3), "heads": 2, "cdf": "tanh", "quantize_rate": 1.0, "layout": "first", "masked": "input"}, (3, 4), "image"),
    Case(
        FSP,
        {
            "levels": (5, 4),
            "dim": DIM,
            "cdf": "sigmoid",
            "output": "latent",
            "scale": 0.5,
            "eps": 1e-3,
            "moments": None,
            "quantize_rate": 1.0,
        },
    ),
    Case(FSP, {"levels": (8, 5), "cdf": "cauchy", "moments": None, "quantize_rate": 0.0, "commit": "manual"}, represents=True),
    Case(
        FSP,
        {
            "levels": (4, 4),
            "dim": DIM,
            "cdf": "laplace",
            "output": "latent",
            "quantize_rate": 0.5,
            "moments": Moments(mean=0.2, variance=0.1, skewness=0.06, kurtosis=0.05, targets=(0.1, 2.0, 0.1, 2.0)),
        },
    ),
    Case(
        EvoLFQ, {"dim": DIM, "codebook_size": CODES, "evolution": Evolution(mutation_rate=0.1, tournament_size=3, elites=2), "losses": ()}
    ),
    Case(BinaryMapper, {"bits": 4, "dim": DIM}, represents=True),
    Case(BinaryMapper, {"bits": 3, "free_bits": None}),
    Case(
        BinaryMapper,
        {"bits": 2, "heads": 2, "free_bits": FreeBits(weight=0.5, threshold=0.1), "layout": "first", "commit": "manual"},
        (3, 4),
        "image",
    ),
    Case(Residual, {"layers": fine_after_coarse, "dim": DIM, "quantize_dropout": QuantizeDropout(seed=5)}),
    Case(Residual, {"layers": fine_after_coarse, "soft_clamp": (1.25, 1.25, 1.5)}),
    Case(Residual, {"layers": halving_bits, "beam": BeamSearch(size=3)}),
    Case(Grouped, {"parts": groups_of_scalars}),
]


def table_and_scalars() -> list[nn.Module]:
    """Levels of different kinds."""
    return [VectorQuantize(3, CODES), FSQ((4, 4, 3)), FSQ((4, 4, 3))]


def _hierarchical(*, positions: tuple[int, ...] = (4, 4), remark: str = "", represents: bool = False, **arguments: Any) -> Case:
    sizes = {"dim": DIM, "codebook_size": CODES, "scales": (1, 2, 4)}
    return Case(HierarchicalVQ, {**sizes, **arguments}, positions, remark, represents)


_HIERARCHICAL = [
    _hierarchical(represents=True),
    _hierarchical(axes=1, positions=(8,), scales=(1, 3, 8), codebook_size=(16, 8, 4), shared_codebook=False, mixers=2, mixing=0.25),
    _hierarchical(axes=3, positions=(2, 3, 2), scales=(1, (2, 2, 1), (2, 3, 2)), layout="first", mixers=None, masked="input"),
    _hierarchical(init=KMeans(), mixing=0.0, commit="manual"),
    _hierarchical(nested_dropout=NestedDropout(probability=0.8, min_levels=2, seed=5)),
    Case(Hierarchical, {"levels": table_and_scalars, "scales": ((1, 2), 2, (2, 4)), "layout": "first", "masked": "input"}, (2, 4)),
    Case(
        Hierarchical,
        {
            "levels": two_tables,
            "scales": (2, 3),
            "axes": 1,
            "mixing": 0.7,
            "mixers": 2,
            "nested_dropout": NestedDropout(),
            "commit": "manual",
        },
        (3,),
    ),
]

_TRANSFORMER = [
    Case(LearnableVQ, {"heads": HEADS, "codebook_size": CODES, "dim": DIM}),
    Case(LearnableVQ, {"heads": HEADS, "codebook_size": CODES, "dim": DIM, "config": CodebookConfig(decay=0.3, dead_code_threshold=1.0)}),
    Case(LearnableVQ, {"heads": HEADS, "codebook_size": CODES, "dim": DIM, "config": CodebookConfig(init="kmeans")}),
    Case(SimpleVQ, {"heads": HEADS, "codebook_size": CODES, "dim": DIM}),
]

CASES = [*_VECTOR_QUANTIZE, *_RESIDUAL, *_GROUPED, *_COMPOSED, *_SCALAR, *_HIERARCHICAL, *_TRANSFORMER]
