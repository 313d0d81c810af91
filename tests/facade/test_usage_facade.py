"""What users of the peer write, as short scripts: each runs on both libraries from the same seed, and sees the same.

A script is given the library, and `see`, which keeps what it is given: tensors, numbers, names. Nothing of the peer's is copied into the
facade at the start: equal seeds make equal modules.
"""

from __future__ import annotations

import copy
import io
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from torch.func import functional_call

from facade.peer import facade, peer
from facade.test_contract import SMALL

Library = Any
See = Callable[..., None]
Usage = Callable[[Library, See], None]
RTOL = 1e-5
FLOOR = 1e-2
"""Numbers may differ by RTOL of the largest entry, or of this where all are smaller."""
USAGES: dict[str, Usage] = {}


def usage(script: Usage) -> Usage:
    USAGES[script.__name__] = script
    return script


def run(script: Usage, library: Library) -> list[tuple[str, Any]]:
    seen: list[tuple[str, Any]] = []

    def see(**values: Any) -> None:
        for name, value in values.items():
            seen.extend(leaves(value, f"{len(seen)} {name}"))

    torch.manual_seed(0)
    random.seed(0)
    script(library, see)
    return seen


def leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key in sorted(value):
            yield from leaves(value[key], f"{path}.{key}")
    elif isinstance(value, (tuple, list)):
        for number, part in enumerate(value):
            yield from leaves(part, f"{path}.{number}")
    else:
        yield path, value.detach().clone() if isinstance(value, Tensor) else value


def differs(there: Any, here: Any) -> str | None:
    """How, if they do."""
    if isinstance(there, float) and isinstance(here, float):
        there, here = torch.tensor(there), torch.tensor(here)
    if not isinstance(there, Tensor) or not isinstance(here, Tensor):
        return None if type(there) is type(here) and there == here else f"{there!r} there, {here!r} here"
    if there.shape != here.shape or there.dtype != here.dtype:
        return f"{tuple(there.shape)} {there.dtype} there, {tuple(here.shape)} {here.dtype} here"
    if not there.is_floating_point() or there.numel() == 0:
        return None if torch.equal(there, here) else f"{(there != here).double().mean().item():.1%} of the entries differ"
    far = ((there.double() - here.double()).abs().max() / there.double().abs().max().clamp(min=FLOOR)).item()
    return None if far <= RTOL else f"{far:.1e} apart"


# What the scripts share: data that no seed moves, an autoencoder and its loop


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class AutoEncoder(nn.Module):
    """A quantizer of width 8 between two layers."""

    quantizer: Any

    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        self.encoder, self.quantizer, self.decoder = nn.Linear(6, 8), quantizer, nn.Linear(8, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantized, indices, loss = self.quantizer(self.encoder(x))
        return self.decoder(quantized), indices, loss


def fit(
    model: Any, see: See, steps: int = 2, *, optimizer: Any = None, after: Callable[[int], None] = lambda step: None
) -> torch.optim.Optimizer:
    """Some steps; the optimizer."""
    optimizer = optimizer or torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    for step in range(steps):
        x = draw(4, 10, 6, seed=step)
        output, indices, loss = model(x)
        total = F.mse_loss(output, x) + loss.sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        see(output=output, indices=indices, loss=loss, total=total)
        after(step)
    return optimizer


QUANTIZERS: dict[str, Callable[[Library], Any]] = {
    "plain": lambda library: library.VectorQuantize(8, 16, decay=0.99, commitment_weight=0.25),
    "cosine": lambda library: library.VectorQuantize(dim=8, codebook_size=16, codebook_dim=4, use_cosine_sim=True),
    "heads": lambda library: library.VectorQuantize(8, 16, heads=2, codebook_dim=4, separate_codebook_per_head=True),
    "learned": lambda library: library.VectorQuantize(8, 16, learnable_codebook=True, ema_update=False, rotation_trick=False),
    "residual": lambda library: library.ResidualVQ(dim=8, num_quantizers=3, codebook_size=16, codebook_dim=4, use_cosine_sim=True),
    "stack": lambda library: library.ResidualVQ(dim=8, num_quantizers=2, codebook_size=16),
    "shared": lambda library: library.ResidualVQ(dim=8, num_quantizers=2, codebook_size=16, shared_codebook=True),
    "codec": lambda library: library.GroupedResidualVQ(
        dim=8, groups=2, num_quantizers=4, codebook_size=16, decay=0.95, quantize_dropout=True, quantize_dropout_cutoff_index=1
    ),
    "bits": lambda library: library.LFQ(dim=8, codebook_size=16, entropy_loss_weight=0.0, commitment_loss_weight=0.25),
    "table": lambda library: library.SimVQ(dim=8, codebook_size=16),
}


def autoencoder(library: Library, kind: str = "plain") -> AutoEncoder:
    return AutoEncoder(QUANTIZERS[kind](library))


# Making and training


@usage
def equal_seeds_make_equal_modules(library: Library, see: See) -> None:
    for make in QUANTIZERS.values():
        see(state=make(library).state_dict(), next_draw=torch.rand(2))


@usage
def calls_leave_the_random_numbers_of_others_alone(library: Library, see: See) -> None:
    for make in QUANTIZERS.values():
        made = make(library)
        made(draw(2, 5, 8))
        made.eval()(draw(2, 5, 8))
        see(next_draw=torch.rand(2))


@usage
def training_loops(library: Library, see: See) -> None:
    for kind in QUANTIZERS:
        model = autoencoder(library, kind)
        fit(model, see)
        see(evaluated=model.eval()(draw(4, 10, 6)), state=model.state_dict())


@usage
def codebooks_fitted_without_gradients(library: Library, see: See) -> None:
    residual = library.ResidualVQ(dim=8, num_quantizers=3, codebook_size=16)
    with torch.no_grad():
        for step in range(3):
            _, indices, losses = residual(draw(2, 20, 8, seed=step))
            see(indices=indices, losses=losses, requires_grad=losses.requires_grad)
    with torch.inference_mode():
        see(evaluated=residual.eval()(draw(2, 20, 8)))
    see(trained=residual.train()(draw(2, 20, 8)), state=residual.state_dict())


@usage
def two_passes_a_step_and_accumulated_gradients(library: Library, see: See) -> None:
    model = autoencoder(library)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(4):
        with torch.no_grad():
            see(for_the_discriminator=model(draw(4, 10, 6, seed=step))[0])
        first, second = model(draw(4, 10, 6, seed=step)), model(draw(4, 10, 6, seed=10 + step))
        (first[0].square().mean() + second[0].square().mean() + first[2] + second[2]).backward()
        if step % 2:
            see(norm=nn.utils.clip_grad_norm_(model.parameters(), 1.0))
            optimizer.step()
            optimizer.zero_grad()
    see(state=model.state_dict())


@usage
def a_frozen_quantizer_in_a_model_that_trains(library: Library, see: See) -> None:
    model = autoencoder(library, "residual")
    fit(model, see, 1)
    model.quantizer.eval()
    see(evaluated=model(draw(4, 10, 6)), modes=[model.training, *(layer.training for layer in model.quantizer.layers)])
    model.quantizer.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "quantizer" not in name
    fit(model, see, 1)
    frozen = library.VectorQuantize(8, 16, freeze_codebook=True)
    frozen(draw(2, 5, 8))
    frozen(draw(2, 5, 8), freeze_codebook=False)
    frozen.freeze_codebook = False
    see(state=model.state_dict(), other=frozen(draw(2, 5, 8)), codes=frozen.codebook)


@usage
def an_optimizer_of_the_codes_whose_rate_is_set(library: Library, see: See) -> None:
    adam = {"in_place_codebook_optimizer": lambda *a, **k: torch.optim.Adam(*a, **k, lr=1e-3)}
    learned = {"learnable_codebook": True, "ema_update": False, "commitment_weight": 0.0}
    residual = library.ResidualVQ(dim=3, num_quantizers=2, codebook_size=11, **learned, **adam)
    residual.layers[0]._codebook.embed.data.copy_(draw(1, 11, 3, seed=9))
    for step in range(3):
        for layer in residual.layers:
            for group in layer.in_place_codebook_optimizer.param_groups:
                group["lr"] = 0.1 / (step + 1)
        x = draw(30, 3, seed=step).requires_grad_()
        quantized, indices, losses = residual(x)
        quantized.square().sum().backward()
        see(quantized=quantized, indices=indices, losses=losses, gradient=x.grad, codes=residual.codebooks)


@usage
def initializers_and_counts_of_a_whole_model(library: Library, see: See) -> None:
    model = autoencoder(library, "residual")

    def initialize(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3)
            nn.init.zeros_(module.bias)

    model.apply(initialize)
    see(parameters=[(name, p.numel(), p.requires_grad) for name, p in model.named_parameters()])
    see(vector=nn.utils.parameters_to_vector(model.parameters()), modules=[name for name, _ in model.named_modules()])
    see(kinds=[type(module).__name__ for module in model.modules()])
    see(residual=sum(isinstance(module, library.ResidualVQ) for module in model.modules()))
    see(layers=sum(isinstance(module, library.VectorQuantize) for module in model.modules()))
    fit(model, see)


@usage
def settings_that_are_scheduled(library: Library, see: See) -> None:
    model = autoencoder(library)
    fit(model, see, 3, after=lambda step: setattr(model.quantizer, "commitment_weight", 0.1 * step))
    residual = library.ResidualVQ(dim=8, num_quantizers=4, codebook_size=16)
    residual.quantize_dropout = True
    for cutoff in (0, 2):
        residual.quantize_dropout_cutoff_index = cutoff
        see(dropped=residual(draw(2, 10, 8), rand_quantize_dropout_fixed_seed=3))
    residual.quantize_dropout = False
    see(whole=residual(draw(2, 10, 8)))
    model.quantizer.rotation_trick = False
    fit(model, see, 1)
    see(state=model.state_dict())


@usage
def codebooks_whose_rule_is_scheduled(library: Library, see: See) -> None:
    model = autoencoder(library, "residual")

    def follow(step: int) -> None:
        for layer in model.quantizer.layers:
            layer._codebook.decay = 0.9 + 0.02 * step
            layer._codebook.ema_update = step != 1

    fit(model, see, 4, after=follow)
    see(state=model.state_dict())
    quantizer = library.VectorQuantize(8, 16, threshold_ema_dead_code=1e-6)
    quantizer(draw(2, 10, 8))
    quantizer._codebook.threshold_ema_dead_code = 0.9
    quantizer(draw(4, 10, 8))
    see(replaced=(quantizer._codebook.cluster_size < 0.5).sum(), state=quantizer._codebook.cluster_size.sort().values)
    quantizer._codebook.threshold_ema_dead_code = 0
    quantizer(draw(4, 10, 8))
    see(then=quantizer._codebook.cluster_size.sort().values[:, :3])


@usage
def residual_quantizers_that_are_taken_apart(library: Library, see: See) -> None:
    residual = library.ResidualVQ(dim=8, num_quantizers=4, codebook_size=16)
    seen: list[Any] = []
    for layer in residual.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(output))
    see(hooked=residual(draw(2, 10, 8)), layers=seen)
    residual.layers[1] = library.VectorQuantize(8, 16)
    residual.layers = residual.layers[:3]
    see(shorter=residual(draw(2, 10, 8)), evaluated=residual.eval()(draw(2, 10, 8)), codes=residual.codebooks, state=residual.state_dict())


# Layers by hand, subclasses, what wraps a module


@usage
def layers_called_in_a_loop_of_ones_own(library: Library, see: See) -> None:
    residual = library.ResidualVQ(dim=8, num_quantizers=3, codebook_size=16, quantize_dropout=True)
    for step in range(2):
        x = draw(2, 10, 8, seed=step).requires_grad_()
        left, total, losses = x, torch.zeros(()), []
        for layer in residual.layers:
            quantized, _, loss = layer(left, freeze_codebook=False, sample_codebook_temp=None, codebook_transform_fn=None)
            left, total = left - quantized.detach(), total + quantized
            losses.append(loss)
        (total.square().mean() + torch.stack(losses).sum()).backward()
        see(total=total, losses=losses, gradient=x.grad)
        see(whole=residual(x.detach(), rand_quantize_dropout_fixed_seed=step))
    see(state=residual.state_dict())


@usage
def subclasses(library: Library, see: See) -> None:
    class OfImages(library.VectorQuantize):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:  # pyrefly: ignore[bad-override]
            rows = x.movedim(1, -1)
            quantized, _, loss = super().forward(rows.reshape(len(x), -1, self.dim), *args, **kwargs)
            return quantized.view(rows.shape).movedim(-1, 1).contiguous(), loss

        @property
        def codebook(self) -> Tensor:
            return self._codebook.embed

        def look_up(self, indices: Tensor) -> Tensor:
            return F.embedding(indices, self._codebook.embed[0])

    class WithoutBias(library.ResidualVQ):
        def __init__(self, *, dim: int, codebook_dim: int, **kwargs: Any) -> None:
            super().__init__(dim=dim, codebook_dim=codebook_dim, **kwargs)
            self.project_in, self.project_out = nn.Linear(dim, codebook_dim, bias=False), nn.Linear(codebook_dim, dim, bias=False)

    made = OfImages(8, 16)
    x = draw(2, 8, 3, 4).requires_grad_()
    quantized, loss = made(x)
    (quantized.square().sum() + loss).backward()
    see(quantized=quantized, loss=loss, gradient=x.grad, codes=made.codebook, found=made.look_up(torch.arange(5)))
    see(is_one=isinstance(made, library.VectorQuantize), state=made.state_dict())
    see(residual=WithoutBias(dim=8, codebook_dim=4, num_quantizers=2, codebook_size=16)(draw(2, 5, 8)))


@usage
def wrappers(library: Library, see: See) -> None:
    model = autoencoder(library)
    seen: list[Any] = []
    model.quantizer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model.quantizer.register_forward_hook(lambda module, args, output: seen.append((args, output)))
    fit(model, see)
    see(parallel=nn.DataParallel(model)(draw(2, 5, 6)), hooked=seen)
    moved = {**dict(model.named_parameters()), "quantizer._codebook.embed": draw(1, 16, 8)}
    see(called=functional_call(model.eval(), moved, (draw(2, 5, 6),)), state=model.state_dict())


# Writing


@usage
def codes_from_elsewhere(library: Library, see: See) -> None:
    model, teacher = autoencoder(library), autoencoder(library)
    fit(teacher, see)
    codebook = model.quantizer._codebook
    for _ in range(3):
        codebook.embed.data.copy_(teacher.quantizer._codebook.embed.data)
        fit(model, see, 1)
    codebook.embed.data = draw(1, 16, 8, seed=9)
    see(codes=model.quantizer.codebook, evaluated=model.eval()(draw(4, 10, 6)))
    fit(model.train(), see)
    codebook.embed = draw(1, 16, 8, seed=10)
    codebook.embed_avg = codebook.embed.clone()
    fit(model, see)
    model.quantizer.codebook.mul_(0.5)
    model.quantizer.codebook[3] = 1.0
    see(evaluated=model.eval()(draw(4, 10, 6)), state=model.state_dict())


@usage
def dead_codes_replaced_by_hand(library: Library, see: See) -> None:
    class Reviving(library.VectorQuantize):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            found = super().forward(x, *args, **kwargs)
            codebook = self._codebook
            dead = codebook.cluster_size[0] < 0.8
            if self.training and dead.any():
                with torch.no_grad():
                    rows = x.reshape(-1, self.dim)[: int(dead.sum())]
                    codebook.embed.data[:, dead], codebook.embed_avg[:, dead] = rows, rows
                    codebook.cluster_size.data[:, dead] = 1.0
            return found

    model = AutoEncoder(Reviving(8, 16))
    fit(model, see, 3, after=lambda step: see(size=model.quantizer._codebook.cluster_size))
    least = model.quantizer._codebook.cluster_size[0].topk(4, largest=False).indices
    model.quantizer._codebook.embed[:, least, :] = draw(4, 8, seed=5)
    fit(model, see)
    see(state=model.state_dict())


@usage
def flags_that_say_a_start_was_made(library: Library, see: See) -> None:
    residual = library.ResidualVQ(dim=8, num_quantizers=2, codebook_size=16, kmeans_init=True)
    see(started=[bool(layer._codebook.initted.detach().item()) for layer in residual.layers], names=sorted(residual.state_dict()))
    for number, layer in enumerate(residual.layers):
        codes = draw(1, 16, 8, seed=number)
        layer._codebook.initted = torch.Tensor([1.0])
        layer._codebook.embed.data.copy_(codes)
        layer._codebook.embed_avg.data.copy_(codes.clone())
        layer._codebook.cluster_size.data.copy_(torch.ones(1, 16))
    for step in range(2):
        see(found=residual(draw(2, 10, 8, seed=step)))
    quantizer = library.VectorQuantize(8, 4, kmeans_init=True)
    quantizer(draw(2, 10, 8))
    see(started=quantizer._codebook.initted)
    quantizer._codebook.initted.data.copy_(torch.tensor(False))
    quantizer(100 + draw(2, 10, 8))
    see(started=quantizer._codebook.initted, again=bool((quantizer.codebook > 50).all()))


@usage
def averages_and_targets_by_buffers(library: Library, see: See) -> None:
    model = autoencoder(library, "stack")
    average, target = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
    see(names=[name for name, _ in model.named_buffers()], states=list(model.state_dict()))

    @torch.no_grad()
    def follow(step: int) -> None:
        for (name, own), (_, kept) in zip(model.named_buffers(), average.named_buffers(), strict=True):
            kept.copy_(own) if "_codebook." in name else kept.lerp_(own, 0.1)
        for own, kept in zip([*model.buffers(), *model.parameters()], [*target.buffers(), *target.parameters()], strict=True):
            kept.data.copy_(own.data) if kept.dtype == torch.bool else kept.data.mul_(0.5).add_(own.data, alpha=0.5)
        see(average=average(draw(4, 10, 6)), target=target(draw(4, 10, 6)))

    fit(model, see, 3, after=follow)
    state = model.state_dict()
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor.mul_(0.5)  # the tensors of the module itself
    see(halved=model.eval()(draw(4, 10, 6)), codes=model.quantizer.codebooks)


# Reading


@usage
def traced_modules(library: Library, see: See) -> None:
    for kind in ("heads", "residual", "bits"):
        model = autoencoder(library, kind).eval()
        with warnings.catch_warnings():  # of the tracer, which is deprecated, and warns of what it keeps as constants
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(model, draw(2, 5, 6), check_trace=False)
            file = io.BytesIO()
            torch.jit.save(traced, file)
            file.seek(0)
            see(traced=traced(draw(2, 5, 6, seed=1)), of_a_file=torch.jit.load(file)(draw(3, 4, 6, seed=2)))


@usage
def what_is_read_of_a_codebook(library: Library, see: See) -> None:
    model = autoencoder(library)
    fit(model, see)
    quantizer, codebook = model.quantizer, model.quantizer._codebook
    see(codes=quantizer.codebook, embed=codebook.embed, average=codebook.embed_avg, size=codebook.cluster_size, started=codebook.initted)
    see(used=(codebook.cluster_size > 1e-3).sum().item(), least=codebook.cluster_size.topk(3, largest=False).indices)
    see(bits=codebook.embed.numel() * torch.finfo(codebook.embed.dtype).bits, width=codebook.embed.shape[-1])
    see(leaf=[codebook.embed.requires_grad, codebook.embed.is_leaf], sizes=[quantizer.codebook_size, codebook.codebook_size])
    see(distances=torch.cdist(quantizer.codebook, quantizer.codebook), decay=codebook.decay)
    grouped = QUANTIZERS["codec"](library)
    layer = grouped.rvqs[0].layers[1]
    see(codes=grouped.codebooks, layer=layer.codebook, sizes=[grouped.rvqs[0].codebook_sizes, len(grouped.rvqs), layer.dim, layer.heads])
    scores = quantizer._codebook(draw(2, 5, 8))
    see(by_hand=scores, evaluated=quantizer.eval()._codebook(draw(2, 5, 8)))


@usage
def losses_are_numbers_to_reckon_with(library: Library, see: See) -> None:
    for make in QUANTIZERS.values():
        made = make(library)
        _, _, loss = made(draw(2, 5, 8))
        loss *= 0.25
        loss += 1
        see(scaled=loss, number=loss.detach().sum().item(), again=made(draw(2, 5, 8))[2], leaf=loss.is_leaf)
        loss = made.eval()(draw(2, 5, 8))[2]
        see(shape=loss.shape, dtype=str(loss.dtype), numbers=loss.detach().reshape(-1).tolist())
    halved = library.ResidualVQ(dim=8, num_quantizers=2, codebook_size=16).half().eval()
    see(dtypes=[str(part.dtype) for part in halved(draw(2, 5, 8).half())])


@usage
def outputs_that_are_written_into(library: Library, see: See) -> None:
    quantizer = library.VectorQuantize(8, 16).eval()
    quantized, indices, _ = quantizer(draw(2, 5, 8))
    quantized.mul_(2)
    indices.add_(1)
    see(codes=quantizer.codebook, again=quantizer(draw(2, 5, 8)))


@usage
def shapes(library: Library, see: See) -> None:
    quantizer = library.VectorQuantize(8, 16)
    for x in (draw(5, 8), draw(1, 5, 8), draw(1, 3, 4, 8), draw(2, 8, 5).transpose(1, 2)):
        see(quantized=quantizer(x))
    images, rows = library.VectorQuantize(8, 16, accept_image_fmap=True), library.VectorQuantize(8, 16, channel_last=False)
    for made, x in ((images, draw(2, 8, 3, 4)), (rows, draw(2, 8, 5))):
        quantized, indices, _ = made.eval()(x)
        see(quantized=quantized, indices=indices, decoded=made.get_output_from_indices(indices))
    residual = library.ResidualVQ(dim=1, num_quantizers=2, codebook_size=13, quantize_dropout=True)
    see(vectors=residual(draw(40, 1), rand_quantize_dropout_fixed_seed=2023), batch=residual(draw(1, 2, 3, 1), beam_size=None))


@usage
def decoding(library: Library, see: See) -> None:
    quantizer = library.VectorQuantize(8, 16)
    for indices in (torch.arange(16), torch.arange(16).reshape(2, 2, 4), torch.tensor(3), [1, 5], torch.arange(4).numpy()):
        see(codes=quantizer.get_codes_from_indices(indices), output=quantizer.get_output_from_indices(indices))
    see(by_int32=quantizer.get_codes_from_indices(torch.arange(16, dtype=torch.int32)))
    residual = library.ResidualVQ(dim=8, num_quantizers=3, codebook_size=16, codebook_dim=4, quantize_dropout=True).eval()
    indices = residual(draw(2, 5, 8))[1]
    some = indices.masked_fill(torch.arange(3) > torch.tensor([[0], [1], [2], [1], [0]]), -1)
    see(output=residual.get_output_from_indices(indices), coarse=residual.get_output_from_indices(indices[..., :2]))
    see(layers=residual.get_codes_from_indices(indices), some=residual.get_output_from_indices(some))
    see(
        summed=residual.project_out(residual.get_codes_from_indices(indices).sum(0)),
        all_codes=residual(draw(2, 5, 8), return_all_codes=True),
    )
    grouped = QUANTIZERS["codec"](library).eval()
    indices = grouped(draw(2, 5, 8))[1]
    flat = indices.permute(1, 2, 0, 3).flatten(2)
    see(
        grouped=grouped.get_output_from_indices(flat.unflatten(-1, (2, 4)).permute(2, 0, 1, 3)),
        codes=grouped.get_codes_from_indices(indices),
    )
    actions = torch.cartesian_prod(torch.arange(16), torch.arange(16))
    see(actions=library.ResidualVQ(dim=3, num_quantizers=2, codebook_size=16).get_codes_from_indices(actions).sum(0))


@usage
def cross_entropy_of_codes_of_another_encoder(library: Library, see: See) -> None:
    quantizer = library.VectorQuantize(8, 16)
    x = draw(2, 5, 8, seed=1).requires_grad_()
    quantized, loss = quantizer(x, indices=quantizer.eval()(draw(2, 5, 8))[1], freeze_codebook=True)
    loss.backward()
    see(quantized=quantized, loss=loss, gradient=x.grad, nearest=quantizer(draw(2, 5, 8), topk=3))


@usage
def scalars(library: Library, see: See) -> None:
    fsq = library.FSQ([8, 5, 5], dim=6)
    quantized, indices = fsq(draw(2, 5, 6))
    see(quantized=quantized, indices=indices, decoded=fsq.indices_to_codes(indices), table=fsq.implicit_codebook, size=fsq.codebook_size)
    see(bound=fsq.bound(draw(2, 5, 3)), rounded=fsq.quantize(draw(2, 5, 3)), digits=fsq.indices_to_level_indices(indices))
    residual = library.ResidualFSQ(dim=6, levels=[4, 4, 4], num_quantizers=2)
    quantized, indices = residual(draw(2, 5, 6))
    see(quantized=quantized, indices=indices, output=residual.get_output_from_indices(indices), tables=residual.codebooks)
    see(scales=residual.scales, layers=[layer.implicit_codebook for layer in residual.layers])
    lfq = library.LFQ(dim=6, codebook_size=16)
    found = lfq(draw(2, 5, 6), return_loss_breakdown=True)
    see(fields=[type(part)._fields for part in found], indices=found[0].indices, codes=lfq.indices_to_codes(found[0].indices))
    see(table=lfq.codebook, names=[lfq.dim, lfq.codebook_dim, lfq.codebook_size, lfq.num_codebooks, lfq.keep_num_codebooks_dim])
    projected = library.RandomProjectionQuantizer(dim=12, num_codebooks=4, codebook_dim=4, codebook_size=16)
    see(targets=projected(draw(2, 5, 12)), fixed=projected.rand_projs)


# Checkpoints and copies


@usage
def runs_that_go_on_from_files(library: Library, see: See) -> None:
    model = autoencoder(library, "codec")
    optimizer = fit(model, see)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    stored = torch.load(file, weights_only=True)
    other = autoencoder(library, "codec")
    other.load_state_dict(stored["model"])
    again = torch.optim.Adam(other.parameters(), 1e-2)
    again.load_state_dict(stored["optimizer"])
    fit(other, see, optimizer=again)
    file = io.BytesIO()
    torch.save(other, file)
    file.seek(0)
    whole = torch.load(file, weights_only=False)
    fit(whole, see)
    see(state=whole.state_dict(), untouched=other.state_dict())


@usage
def copies_go_their_own_way(library: Library, see: See) -> None:
    model = autoencoder(library, "residual")
    fit(model, see)
    other = copy.deepcopy(model)
    fit(other, see)
    see(state=model.state_dict(), other=other.state_dict())
    fit(model, see)
    kept = copy.deepcopy(model.state_dict())
    fit(model, see)
    model.load_state_dict(kept)
    see(back=model.state_dict(), evaluated=model.eval()(draw(4, 10, 6)))


@usage
def weights_that_are_averaged_by_state_dict(library: Library, see: See) -> None:
    model = autoencoder(library)
    average = copy.deepcopy(model).eval()

    def follow(step: int) -> None:
        state, own = model.state_dict(), average.state_dict()
        for name, tensor in own.items():
            tensor.copy_(torch.lerp(state[name], tensor, 0.5) if tensor.is_floating_point() else state[name])
        average.load_state_dict(own)
        see(evaluated=average(draw(4, 10, 6)))

    fit(model, see, after=follow)
    see(state=average.state_dict())


@usage
def safe_tensors(library: Library, see: See) -> None:
    model = autoencoder(library, "shared")
    fit(model, see)
    other = autoencoder(library, "shared")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(model, str(folder / "model.safetensors"))
        see(missing=[sorted(part) for part in load_model(other, folder / "model.safetensors")])
        single = library.VectorQuantize(8, 16)
        single(draw(2, 5, 8))
        save_file(single.state_dict(), folder / "single.safetensors")
        see(state=load_file(folder / "single.safetensors"), evaluated=other.eval()(draw(4, 10, 6)))


@usage
def state_dicts_under_the_knife(library: Library, see: See) -> None:
    model = autoencoder(library)
    state = model.state_dict()
    without = {name: tensor for name, tensor in state.items() if "embed_avg" not in name}
    see(lenient=[sorted(part) for part in model.load_state_dict({**without, "old": torch.ones(1)}, strict=False)])
    codes = draw(1, 16, 8)
    own = {"initted": torch.tensor(True), "cluster_size": torch.ones(1, 16), "embed": codes, "embed_avg": codes.clone()}
    model.quantizer.load_state_dict({f"_codebook.{name}": tensor for name, tensor in own.items()}, strict=True)
    see(names=sorted(state), codes=model.quantizer.codebook)
    fit(model, see)
    renamed = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    other = autoencoder(library)
    other.load_state_dict({name.removeprefix("module."): tensor for name, tensor in renamed.items()})
    see(evaluated=other.eval()(draw(4, 10, 6)), table=renamed["module.quantizer._codebook.embed"].squeeze(0))


# Names


@usage
def modules_are_attributes_of_their_package(library: Library, see: See) -> None:
    module = library.vector_quantize_pytorch
    see(same=[module.VectorQuantize is library.VectorQuantize, library.residual_vq.ResidualVQ is library.ResidualVQ])
    see(cdist=module.cdist(draw(1, 3, 4), draw(1, 5, 4)), rotated=module.rotate_to(draw(3, 4), draw(3, 4, seed=1)))
    see(counts=module.batched_bincount(torch.tensor([[0, 2, 2]]), minlength=4), noop=module.noop(3))
    see(rounded=library.finite_scalar_quantization.round_ste(draw(4)), listed="residual_vq" in dir(library))


@pytest.mark.parametrize("name", USAGES)
def test_usage(name: str) -> None:
    expected, found = (run(USAGES[name], library) for library in (peer, facade))
    assert [where for where, _ in found] == [where for where, _ in expected]
    different = [f"{where}: {told}" for (where, there), (_, here) in zip(expected, found, strict=True) if (told := differs(there, here))]
    assert expected and not different, "\n".join(different)


def test_cosine_codes_that_are_written_count_by_their_direction() -> None:
    made = facade.VectorQuantize(8, 16, use_cosine_sim=True).eval()
    made._codebook.embed.mul_(torch.linspace(0.5, 2.0, 16).unsqueeze(-1))
    quantized, indices, _ = made(draw(2, 5, 8))
    torch.testing.assert_close(quantized.norm(dim=-1), torch.ones(2, 5))
    assert torch.equal(indices, F.cosine_similarity(draw(2, 5, 1, 8), made.codebook, dim=-1).argmax(-1))


WRITTEN: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{kind: (kind, SMALL[kind], {}) for kind in ("VectorQuantize", "ResidualVQ", "GroupedResidualVQ", "SimVQ", "ResidualSimVQ", "LFQ")},
    "straight-through": ("VectorQuantize", {**SMALL["VectorQuantize"], "rotation_trick": False}, {}),
    "heads": ("VectorQuantize", {**SMALL["VectorQuantize"], "heads": 2, "separate_codebook_per_head": True}, {}),
    "learnable": ("VectorQuantize", {**SMALL["VectorQuantize"], "learnable_codebook": True, "ema_update": False}, {}),
    "drawn": ("VectorQuantize", {**SMALL["VectorQuantize"], "stochastic_sample_codes": True, "straight_through": True}, {}),
    "cross-entropy": ("VectorQuantize", {**SMALL["VectorQuantize"], "commitment_use_cross_entropy_loss": True}, {}),
    "several": ("VectorQuantize", SMALL["VectorQuantize"], {"topk": 2}),
    "own codes": (
        "VectorQuantize",
        SMALL["VectorQuantize"],
        {"codebook_transform_fn": lambda codes: codes[:, None, None].expand(1, 2, 12, -1, -1)},
    ),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_indices_may_be_written_into_before_the_backward(case: str) -> None:
    """As those do that make room for a token of their own; gradients are those without it."""
    kind, arguments, calls = WRITTEN[case]
    found = []
    for written in (False, True):
        torch.manual_seed(0)
        module = getattr(facade, kind)(**arguments)
        x = torch.randn(2, 12, 8, requires_grad=True)
        quantized, indices, loss = module(x, **calls)[:3]
        if written:
            indices += 1
        (quantized.sin().sum() + loss.sum()).backward()
        found.append(x.grad)
    assert torch.equal(*found)
