"""Whoever writes an argument of vector-quantize-pytorch is told what it is called here."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest

from vqkit.quantizers import GroupedResidualVQ, ProductVQ, ResidualVQ, VectorQuantize
from vqkit.quantizers.peer_keywords import IN_OUR_WORDS

peer = pytest.importorskip("vector_quantize_pytorch")


def arguments(cls: type) -> set[str]:
    return set(inspect.signature(cls).parameters) - {"kwargs"}


def test_every_argument_of_the_peer_that_we_have_not_is_known() -> None:
    assert arguments(peer.VectorQuantize) - arguments(VectorQuantize) <= set(IN_OUR_WORDS)
    assert not set(IN_OUR_WORDS) & arguments(VectorQuantize)
    of_residual = arguments(peer.ResidualVQ) | arguments(peer.GroupedResidualVQ)
    ours = arguments(ResidualVQ) | arguments(GroupedResidualVQ) | arguments(VectorQuantize)
    assert of_residual - ours - {"vq_kwargs"} <= set(IN_OUR_WORDS)


@pytest.mark.parametrize("name", IN_OUR_WORDS)
def test_it_is_named_with_what_to_write(name: str) -> None:
    makers = (lambda **o: VectorQuantize(8, 4, **o), lambda **o: ResidualVQ(8, 4, 2, **o), lambda **o: ProductVQ(8, 4, 2, **o))
    for make in makers:
        with pytest.raises(TypeError) as raised:
            make(**{name: True})
        message = str(raised.value)
        assert f"VectorQuantize has no {name!r}" in message and IN_OUR_WORDS[name] in message and "docs/migration.md" in message


def test_other_keywords_name_the_nearest_and_the_signature_stays() -> None:
    with pytest.raises(TypeError, match=r"VectorQuantize has no argument 'metrik'; did you mean 'metric'\?"):
        VectorQuantize(8, 4, metrik="cosine")  # type: ignore[call-arg]
    assert list(inspect.signature(VectorQuantize).parameters)[:3] == ["dim", "codebook_size", "codebook_dim"]
    quantizer = VectorQuantize(8, 4)
    assert type(pickle.loads(pickle.dumps(quantizer))) is type(copy.deepcopy(quantizer)) is VectorQuantize
