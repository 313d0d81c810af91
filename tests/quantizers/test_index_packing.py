"""Laws of packed indices: what was packed is unpacked, in no more bits than needed, and damage is told."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqkit.quantizers.packing import bits_per_index, pack_indices, unpack_indices

SIZES = st.one_of(st.integers(1, 70), st.sampled_from([255, 256, 257, 65536, 2**24 + 1, 2**40]))


@given(SIZES, st.lists(st.integers(0, 5), max_size=3), st.integers(0, 2**31))
def test_unpacking_undoes_packing(size, shape, seed):
    indices = torch.randint(0, size, shape, generator=torch.Generator().manual_seed(seed))
    data = pack_indices(indices, size)
    assert len(data) == -(-indices.numel() * bits_per_index(size) // 8)
    assert torch.equal(unpack_indices(data, size, shape), indices)


@pytest.mark.parametrize(("size", "bits"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (1024, 10), (1025, 11)])
def test_an_index_takes_the_bits_that_its_codebook_needs(size, bits):
    assert bits_per_index(size) == bits


def test_the_highest_bit_comes_first():
    assert pack_indices(torch.tensor([1, 2, 3, 0]), 4) == bytes([0b01101100])
    assert pack_indices(torch.tensor([[5], [1]], dtype=torch.int32), 8) == bytes([0b10100100])


def test_the_extremes_survive():
    for size in (2, 7, 1000, 2**33):
        ends = torch.tensor([0, size - 1, size - 1, 0])
        assert torch.equal(unpack_indices(pack_indices(ends, size), size, (4,)), ends)


def test_what_cannot_be_packed_is_named():
    for indices in (torch.tensor([0, -1]), torch.tensor([0, 4])):
        with pytest.raises(ValueError, match=r"^indices lie in .*: must lie in 0 \.\.\. 3"):
            pack_indices(indices, 4)
    for indices in (torch.zeros(2), torch.zeros(2, dtype=torch.bool)):
        with pytest.raises(TypeError, match=r"^indices is torch\.\w+: must be integer"):
            pack_indices(indices, 4)
    with pytest.raises(TypeError, match=r"^indices is of type list: must be a torch.Tensor"):
        pack_indices([1, 2], 4)
    with pytest.raises(TypeError, match=r"^codebook_size = 4.0: must be an integer"):
        pack_indices(torch.zeros(2, dtype=torch.int64), 4.0)
    with pytest.raises(ValueError, match=r"^codebook_size = 0"):
        pack_indices(torch.zeros(2, dtype=torch.int64), 0)


def test_damaged_data_is_told():
    data = pack_indices(torch.tensor([1, 2, 3]), 5)
    with pytest.raises(ValueError, match=r"^data has 1 bytes: must be 2"):
        unpack_indices(data[:1], 5, (3,))
    with pytest.raises(ValueError, match=r"^data has bits behind its last index"):
        unpack_indices(bytes([data[0], 255]), 5, (3,))
    with pytest.raises(ValueError, match=r"^data holds index 7"):
        unpack_indices(bytes([0b11100000]), 5, (1,))
    with pytest.raises(ValueError, match=r"^shape\[0\] = -1: must be at least 0"):
        unpack_indices(data, 5, (-1,))
    with pytest.raises(TypeError, match=r"^shape\[1\] = 2.0: must be an integer"):
        unpack_indices(data, 5, (1, 2.0))
    with pytest.raises(TypeError, match=r"^shape is of type int: must be a sequence of lengths"):
        unpack_indices(data, 5, 3)
    with pytest.raises(TypeError, match=r"^data is of type str: must be bytes"):
        unpack_indices("ab", 5, (3,))
