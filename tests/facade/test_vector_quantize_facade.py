"""The facade's VectorQuantize beside the peer's: every option and every pair of options that can stand together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from facade.compare import compare
from facade.peer import facade, facade_module, peer

DIM, CODES = 8, 16


def vectors(batch: int = 2, time: int = 12, seed: int = 0) -> Tensor:
    return 1.5 * torch.randn(batch, time, DIM, generator=torch.Generator().manual_seed(seed))


def some(*shape: int) -> Tensor:
    """A mask with True and False in every row."""
    return torch.arange(shape[-1]).expand(shape) % 3 > 0


@pytest.mark.parametrize(
    "kwargs, calls",
    [
        ({}, {}),
        ({}, {"mask": some(2, 12)}),
        ({"use_cosine_sim": True}, {}),
        ({"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True}, {}),
    ],
)
def test_a_call_is_the_peers(kwargs: dict[str, Any], calls: dict[str, Any]) -> None:
    compare("VectorQuantize", {"dim": DIM, "codebook_size": CODES, **kwargs}, vectors(), calls=calls).check()


def test_an_index_of_minus_one_gives_zeros() -> None:
    vq = facade.VectorQuantize(dim=DIM, codebook_size=CODES, codebook_dim=4)
    mask = some(2, 12)
    quantized, indices, _ = vq.eval()(vectors(), mask=mask)
    for decode in (vq.get_codes_from_indices, vq.get_output_from_indices):
        decoded = decode(indices)
        assert not decoded[~mask].any()
        assert decoded[mask].any(-1).all()
    assert torch.equal(vq.get_output_from_indices(indices), quantized)


@pytest.mark.parametrize("kwargs", [{}, {"use_cosine_sim": True}, {"num_codebooks": 2}])
def test_a_codebook_by_itself_is_the_peers(kwargs: dict[str, Any]) -> None:
    modules = peer.vector_quantize_pytorch, facade_module("vector_quantize_pytorch")
    made = [module.Codebook(dim=DIM, codebook_size=CODES, threshold_ema_dead_code=0, **kwargs) for module in modules]
    made[1].load_state_dict(made[0].state_dict())
    x = vectors() if "num_codebooks" not in kwargs else torch.stack([vectors(), vectors(seed=1)])
    x = made[0].transform_input(x)
    for _ in range(2):
        for there, here in zip(*(codebook(x, mask=some(2, 12)) for codebook in made), strict=True):
            torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-6)
    for key, there in made[0].state_dict().items():
        torch.testing.assert_close(made[1].state_dict()[key], there, rtol=1e-5, atol=1e-6)
