"""Quantizers of the facade as the layers of another one: native parts for the whole, of what each layer is when it is called.

A part has the codebook of its layer and computes as this one would; what the whole combines, learns from and weighs it by is read from
the layer in every call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from vqkit.compat.vector_quantize_pytorch import translate
from vqkit.compat.vector_quantize_pytorch.rows import hide
from vqkit.compat.vector_quantize_pytorch.vector_quantize_pytorch import WEIGHTS, VectorQuantize
from vqkit.quantizers.base import Quantized
from vqkit.quantizers.implicit import ImplicitVQ
from vqkit.quantizers.vector_quantize import VectorQuantize as _VectorQuantize

WEIGHED = "weighed"
"""The name of the loss of a layer that is called, which has weighed it."""


class Part:
    """Before the class of a native quantizer: how the whole calls it for `layer` of the facade."""

    layer: VectorQuantize
    pulls = False
    """Whether the own optimizer of `layer` steps right before its codes are read."""
    watched = False
    """Whether it is `layer` itself that is called, whose hooks, and whose own forward, then see what they would see."""
    steps = False
    """Whether the layer takes a step of its own in training, before the next one is called, as others have its codebook."""

    def quantize(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        freeze_codebook: bool = False,
        indices: Tensor | None = None,
        targets: Tensor | None = None,
        temperature: float | None = None,
        **condition: Any,
    ) -> Quantized:
        """As of the class behind."""
        frozen = freeze_codebook or self.layer.freeze_codebook
        if self.pulls and not frozen:
            self.step_(x, mask, temperature)
        if self.watched:
            if indices is not None:
                raise ValueError("layers have hooks, a forward of their own, or a codebook of another layer: must not with beam_size")
            return self._call(x, mask, frozen, targets, temperature, self.codes_of(**condition))
        if indices is None:
            condition["temperature"] = self.temperature(temperature)
        return cast(Any, super()).quantize(x, mask, freeze_codebook=frozen, indices=indices, targets=targets, **condition)

    def step_(self, x: Tensor, mask: Tensor | None, temperature: float | None) -> None:
        """A step of the codebook's own optimizer, if there is one, towards the vectors of x, or the gradients for one by hand."""
        layer = self.layer
        if layer.in_place_codebook_optimizer is not None and layer.training:
            with layer._codebook.pulling():
                cast(Any, self).pull_(x, mask, temperature=self.temperature(temperature))
            if not layer.manual_in_place_optimizer_update:
                layer.update_in_place_optimizer()

    def nearest(self, x: Tensor, num: int, *, temperature: float | None = 0.0, **condition: Any) -> tuple[Tensor, Tensor]:
        """As of the class behind."""
        return cast(Any, super()).nearest(x, num, temperature=self.temperature(temperature) or 0.0, **condition)

    def temperature(self, given: float | None) -> float | None:
        """That of a call, else of the codebook of the layer; None where nothing is drawn."""
        assignment = cast(Any, self).assignment
        return None if isinstance(assignment, str) else translate.temperature(assignment, given, self.layer._codebook.sample_codebook_temp)

    def hears(self) -> bool:
        """Whether it is `layer` that has to be called."""
        return (self.steps and self.layer.training) or self.layer.is_watched()

    def codes_of(self, **condition: Any) -> Callable[..., Tensor] | None:
        """What makes codes of those of the layer, if anything does."""
        return None

    def _call(
        self,
        x: Tensor,
        mask: Tensor | None,
        frozen: bool,
        targets: Tensor | None,
        temperature: float | None,
        codes_of: Callable[..., Tensor] | None,
    ) -> Quantized:
        """Let the layer do all but learn, which the whole does, unless the layer `steps`."""
        layer, first = self.layer, self.layer.native.layout == "first"
        found: list[Quantized] = []
        hide(layer, walked=None if self.steps else found)
        try:
            given = {"mask": mask, "indices": targets, "sample_codebook_temp": temperature, "freeze_codebook": frozen}
            output = layer(x.movedim(-1, 1) if first else x, **given, codebook_transform_fn=codes_of)
        finally:
            hide(layer, walked=None)
        statistics = found[-1].statistics if found else None
        if targets is not None:
            return Quantized(output[0], found[-1].indices if found else targets, {"cross_entropy": output[1]}, statistics)
        return Quantized(
            output[0].movedim(1, -1) if first else output[0], output[1], {WEIGHED: output[2]} if layer.training else {}, statistics
        )


class _Plain(Part, _VectorQuantize):
    pass


class _Implicit(Part, ImplicitVQ):
    def hears(self) -> bool:
        return super().hears() or cast(Any, self.network).hears()

    def codes_of(self, **condition: Any) -> Callable[..., Tensor]:
        return functools.partial(cast(Any, self.network).mlp, condition=condition["partial"])


def part_of(layer: VectorQuantize, network: nn.Module | None = None) -> Any:
    """The part for a layer, whose codes are those of a `network` where there is one. Its width is last."""
    options: dict[str, Any] = {**layer.options(), "layout": "last", "losses": layer.learned_losses}
    if network is None:
        part: Any = _Plain(**options, table=layer._codebook)
        layer.link(part)
    else:
        own: dict[str, Any] = {name: options[name] for name in ("assignment", "estimator", "losses", "sync_update")}
        part = _Implicit(options["codebook_dim"], options["codebook_size"], network, table=layer._codebook, **own)
        del part.__dict__["table"]
        part.table = layer._codebook  # a part of it, so that the whole finds all codebooks
    hide(part, layer=layer)
    return part


def check_layers(name: str, layers: Iterable[nn.Module]) -> list[VectorQuantize]:
    """Raises TypeError for modules that are no VectorQuantize, or none at all."""
    found = [*layers]
    others = [type(layer).__name__ for layer in found if not isinstance(layer, VectorQuantize)]
    if others or not found:
        raise TypeError(f"{name}: must hold VectorQuantize, at least one, and holds {', '.join(others) or 'none'}")
    return cast(list[VectorQuantize], found)


def set_parts(native: Any, layers: Iterable[VectorQuantize], parts: Iterable[Any], learns: bool) -> None:
    """Modes, estimators where a gradient has any place to go, and losses, as the layers have them; in eval mode there are none."""
    compiling, trains = torch.compiler.is_compiling(), False
    for layer, part in zip(layers, parts, strict=True):
        training = layer.training
        estimator = layer.estimator if training and learns else "none"
        losses = layer.learned_losses if training else ()
        if compiling or part.estimator is not estimator or part.losses is not losses or part.training is not training:
            part.estimator, part.losses, part.training = estimator, losses, training
        if part.watched is not (watched := part.hears()):
            hide(part, watched=watched)
        trains = trains or training
    if native.training is not trains:
        native.training = trains


def weigh(name: str, layers: Sequence[VectorQuantize]) -> tuple[int, float]:
    """The number of the layer of a loss of the whole, "NAME/NUMBER", and what it weighs."""
    loss, _, number = name.partition("/")
    layer = int(number)
    return layer, 1.0 if loss == WEIGHED else getattr(layers[layer], WEIGHTS[loss])
