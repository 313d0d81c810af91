"""Laws of layouts: the width goes last and comes back, masks and lengths say the same, and what does not fit is named."""

import pytest
import torch

from vqkit.quantizers.layout import check_indices, check_layout, check_range, position_mask, rows_at, width_back, width_last

DIM = 5
POSITIONS = [(2,), (2, 3), (2, 3, 4), (2, 3, 4, 2)]


def of_layout(rows, layout):
    return rows if layout == "last" else rows.movedim(-1, 1)


@pytest.mark.parametrize("layout", ["last", "first"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_the_width_goes_last_and_comes_back(positions, layout):
    rows = torch.randn(*positions, DIM)
    x = of_layout(rows, layout)
    assert torch.equal(width_last(x, DIM, layout), rows)
    assert torch.equal(width_back(width_last(x, DIM, layout), layout), x)
    several = torch.stack([rows, rows + 1], dim=-2)  # [*positions, k, D], as top-k gives
    assert torch.equal(width_back(several, layout).select(-1 if layout == "first" else -2, 1), x + 1)


@pytest.mark.parametrize("positions", POSITIONS[1:])
def test_lengths_are_a_mask(positions):
    lengths = torch.tensor([positions[1], 1])
    mask = position_mask(torch.Size(positions), None, lengths)
    assert mask.shape == positions and mask.dtype == torch.bool
    assert mask[0].all() and mask[1, 0].all() and not mask[1, 1:].any()
    assert torch.equal(position_mask(torch.Size(positions), mask, None), mask)
    assert not position_mask(torch.Size(positions), None, torch.zeros(2, dtype=torch.int32)).any()


def test_no_mask_is_none_and_a_single_token_can_be_masked():
    assert position_mask(torch.Size((2, 3)), None, None) is None
    mask = torch.tensor([True, False])
    assert position_mask(torch.Size((2,)), mask, None) is mask


@pytest.mark.parametrize(
    "x, dim, layout, error, message",
    [
        (torch.zeros(2, 3, dtype=torch.int64), 3, "last", TypeError, r"^x is torch.int64: must be floating point"),
        (torch.zeros(3), 3, "last", ValueError, r"^x has shape \(3,\): must be \[batch, ..., 3\]"),
        (torch.zeros(2, 3, 4), 3, "last", ValueError, r"^x has shape \(2, 3, 4\): must be \[batch, ..., 3\]"),
        (torch.zeros(2, 3, 4), 4, "first", ValueError, r"^x has shape \(2, 3, 4\): must be \[batch, 4, ...\]"),
    ],
)
def test_vectors_that_do_not_fit_are_named(x, dim, layout, error, message):
    with pytest.raises(error, match=message):
        width_last(x, dim, layout)


@pytest.mark.parametrize(
    "mask, lengths, error, message",
    [
        (torch.ones(2, 3), None, TypeError, r"^mask is torch.float32: must be torch.bool"),
        (torch.ones(3, 2, dtype=torch.bool), None, ValueError, r"^mask has shape \(3, 2\): must be \(2, 3\)"),
        (torch.ones(2, 3, dtype=torch.bool), torch.tensor([1, 2]), ValueError, r"^mask and lengths are both given"),
        (None, torch.tensor([1.0, 2.0]), TypeError, r"^lengths is torch.float32: must be an integer type"),
        (None, torch.tensor([True, False]), TypeError, r"^lengths is torch.bool: must be an integer type"),
        (None, torch.tensor([1]), ValueError, r"^lengths has shape \(1,\): must be \(2,\)"),
        (None, torch.tensor([1, 4]), ValueError, r"^lengths holds 4: must lie in 0 ... 3"),
        (None, torch.tensor([-1, 3]), ValueError, r"^lengths holds -1: must lie in 0 ... 3"),
    ],
)
def test_masks_and_lengths_that_do_not_fit_are_named(mask, lengths, error, message):
    with pytest.raises(error, match=message):
        position_mask(torch.Size((2, 3)), mask, lengths)


def test_lengths_of_single_tokens_are_refused():
    with pytest.raises(ValueError, match=r"^lengths is given for positions \(2,\)"):
        position_mask(torch.Size((2,)), None, torch.tensor([1, 1]))


def test_an_unknown_layout_is_named():
    with pytest.raises(ValueError, match=r"^layout = 'NCHW': must be one of 'last', 'first'"):
        check_layout("NCHW")


@pytest.mark.parametrize("bad", [-2, 4])
def test_an_index_out_of_range_is_named(bad):
    check_indices("indices", torch.tensor([-1, 0, 3]), 4, torch.Size((3,)))
    with pytest.raises(ValueError, match=rf"^indices holds {bad}: must lie in -1 ... 3"):
        check_indices("indices", torch.tensor([0, bad]), 4)


def test_indices_of_another_kind_are_named():
    with pytest.raises(TypeError, match=r"^targets is torch.float32: must be an integer type"):
        check_indices("targets", torch.zeros(2), 4)
    with pytest.raises(ValueError, match=r"^targets has shape \(2,\): must be \(3,\)"):
        check_indices("targets", torch.zeros(2, dtype=torch.int64), 4, torch.Size((3,)))


def test_a_compiled_check_raises_when_it_runs():
    def doubled(values):
        check_range("values", values, 0, 3)
        return 2 * values

    compiled = torch.compile(doubled, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(torch.tensor([0, 3])), torch.tensor([0, 6]))
    with pytest.raises(RuntimeError, match=r"values holds a value outside 0 ... 3"):
        compiled(torch.tensor([0, 4]))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("shape", [(0,), (6,), (2, 3)])
def test_rows_are_those_of_their_indices_and_zeros_for_none(shape, dtype):
    table = torch.randn(7, DIM, requires_grad=True)
    indices = torch.arange(6)[: torch.Size(shape).numel()].reshape(shape)
    rows, complete = rows_at(table, indices.to(dtype))
    assert torch.equal(rows, table[indices]) and complete is bool(indices.numel() or dtype in (torch.int64, torch.int32))
    (gradient,) = torch.autograd.grad(rows.sum(), table)
    assert torch.equal(gradient.sum(1), DIM * torch.bincount(indices.flatten(), minlength=7).float())
    if indices.numel() and dtype != torch.uint8:
        indices = indices.where(indices != 1, -1)
        rows, complete = rows_at(table, indices.to(dtype))
        assert torch.equal(rows, table[indices].where((indices >= 0).unsqueeze(-1), 0.0)) and not complete


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
@pytest.mark.parametrize("index", [7, -2, 100, -7])
def test_rows_that_there_are_not_are_refused(index, dtype):
    with pytest.raises(ValueError, match=f"indices holds {index}: must lie in -1 ... 6"):
        rows_at(torch.randn(7, DIM), torch.tensor([[3, index]], dtype=dtype))
