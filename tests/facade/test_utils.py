"""The facade's Sequential beside the peer's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from facade.peer import facade, peer


def test_the_quantizer_has_the_keywords_and_its_results_are_handed_through() -> None:
    layers = [nn.Linear(6, 8), nn.Linear(8, 6)]
    there = peer.Sequential(layers[0], peer.ResidualVQ(dim=8, num_quantizers=2, codebook_size=8), layers[1])
    here = facade.Sequential(
        *copy.deepcopy(layers[:1]), facade.ResidualVQ(dim=8, num_quantizers=2, codebook_size=8), copy.deepcopy(layers[1])
    )
    here.load_state_dict(there.state_dict())
    x = torch.randn(2, 7, 6)
    for _ in range(2):
        for one, other in zip(there(x, mask=x[..., 0] > 0), here(x, mask=x[..., 0] > 0), strict=True):
            torch.testing.assert_close(other, one)
    assert there.state_dict().keys() == here.state_dict().keys()


@pytest.mark.parametrize("number", [0, 2])
def test_there_is_one_quantizer(number: int) -> None:
    with pytest.raises(ValueError, match=f"fns holds {number} quantizers"):
        facade.Sequential(nn.Identity(), *(facade.FSQ([3, 3]) for _ in range(number)))
