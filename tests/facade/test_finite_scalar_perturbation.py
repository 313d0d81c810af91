"""The facade's FSP beside the peer's: every pair of options, and what is right where the two differ."""

import warnings
from contextlib import contextmanager

import pytest
import torch

from facade import strict
from facade.compare import compare
from facade.peer import facade, facade_module, peer
from facade.strict import Array

OPTIONS = {
    "levels": ([8, 5, 3], (4, 4, 2)),
    "dim": (None, 7),
    "channel_first": (False, True),
    "projection_has_bias": (True, False),
    "act_name": ("tanh", "sigmoid", "normal", "laplace", "cauchy"),
    "quantize_rate": (0.0, 0.5, 1.0),
    "need_inv_act": (False, True),
    "vector_norm": ("var_tanh", "none", "var", "kurt", "var_sigmoid", "var_laplace"),
    "eps": (None, 0.05),
    "input": ("sequence", "image", "video", "vectors", "one", "alone"),
}


def setting(row, seed=0):
    kwargs = {name: value for name, value in row.items() if name not in ("eps", "input")}
    x = strict.placed(row, row["dim"] or 3, first=row["channel_first"] and row["input"] != "alone", seed=seed, scale=1.0)
    return kwargs, x, {} if row["eps"] is None else {"eps": row["eps"]}


@contextmanager
def exact(row):
    """Moments are differences of what is near, where the library's float32 is no measure: both compute in float64."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="var_mean", category=UserWarning)  # there, of one vector
        yield {"dtype": torch.float64, "prepare": torch.nn.Module.double}


REFUSED = (
    ({"input": "empty"}, lambda row: row["input"] == "empty"),
    ({"input": "no batch"}, lambda row: row["input"] == "no batch"),
    ({"input": "alone", "channel_first": True}, lambda row: row["input"] == "alone" and row["channel_first"]),
)
DEVIATING = {"one vector": {"input": "one"}}
ARRAY = Array("FSP", OPTIONS, setting, REFUSED, DEVIATING, around=exact)
ARRAYS = (ARRAY,)


@pytest.mark.parametrize("row", ARRAY.rows, ids=range(len(ARRAY.rows)))
def test_a_pair_of_options_is_the_peers(row):
    ARRAY.compared(compare, row).check()


@pytest.mark.parametrize("row", ARRAY.rows[:4], ids=range(4))
def test_single_precision_is_the_peers(row):
    kwargs, x, calls = setting(row)
    found = compare("FSP", kwargs, x, calls=calls, optimize=False)
    found.worst = {part: worst for part, worst in found.worst.items() if "norm_info" not in part}
    found.check()


def test_the_parts_of_a_call_are_the_peers():
    made = [package.FSP(levels=[8, 5, 3], act_name="laplace") for package in (peer, facade)]
    p, indices = torch.rand(6, 3), torch.arange(120)
    for there, here in zip(*(m.quantize_act_value(p, 1e-6) for m in made), strict=True):
        torch.testing.assert_close(here, there)
    assert torch.equal(*(m.indices_to_level_indices(indices) for m in made))
    assert torch.equal(*(m.level_indices_to_indices(m.indices_to_level_indices(indices)).long() for m in made))
    torch.testing.assert_close(*(m.indices_to_act_value(indices) for m in made))
    x = torch.randn(40, 2).exp()
    modules = peer.finite_scalar_perturbation, facade_module("finite_scalar_perturbation")
    for there, here in zip(*(module.batch_stats(x) for module in modules), strict=True):
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)
    for name in ("tanh", "sigmoid", "normal", "laplace", "cauchy"):
        for there, here in zip(*(module.build_cdf_act(name) for module in modules), strict=True):
            torch.testing.assert_close(here(p[:, 0]), there(p[:, 0]), rtol=1e-4, atol=1e-5)


def test_narrow_and_meta_modules_work():
    with torch.device("meta"):
        assert facade.FSP([8, 5], dim=6)._levels.is_meta
    for dtype in (torch.bfloat16, torch.float16):
        fsp = facade.FSP([8, 5], dim=6).to(dtype)
        quantized, indices, loss, _ = fsp(torch.randn(2, 9, 6, dtype=dtype, requires_grad=True))
        assert quantized.dtype == dtype and indices.dtype == torch.int32 and int(indices.min()) >= 0 and int(indices.max()) < 40
        (quantized.sum() + loss).backward()
        assert all(parameter.grad.isfinite().all() for parameter in fsp.parameters())


def test_one_vector_has_no_moments_and_zero_its_slope():
    alone = facade.FSP([8, 5], dim=3).eval()
    quantized, index, *_ = alone(torch.randn(3))
    torch.testing.assert_close(alone.indices_to_codes(index), quantized)
    assert facade.FSP([8, 5])(torch.randn(1, 1, 2))[2].item() == 0.0
    x = torch.zeros(1, requires_grad=True)
    assert torch.autograd.grad(facade_module("finite_scalar_perturbation").laplace_act(x), x)[0].item() == 0.5


def test_many_codes_are_told_apart_and_wrong_ones_named():
    fsp = facade.FSP([2**16, 2**16]).eval()
    quantized, indices, *_ = fsp(torch.tensor([[[1.0, 2.0], [float("nan"), 0.0]]]))
    assert indices.dtype == torch.int64 and indices[0, 1] == -1 and not quantized[0, 1].any()
    assert torch.equal(fsp.indices_to_codes(indices), quantized)
    for bad in (torch.tensor([2**32]), torch.tensor([-2])):
        with pytest.raises(ValueError, match=r"^indices holds"):
            fsp.indices_to_codes(bad)
    for arguments in ({"quantize_rate": 2.0}, {"act_name": "cubic"}, {"vector_norm": "all"}, {"levels": [1]}):
        with pytest.raises(ValueError, match=rf"^{next(iter(arguments))}"):
            facade.FSP(**{"levels": [4], **arguments})
    with pytest.raises(ValueError, match=r"^z has shape \(2, 3\): must be \[\.\.\., 2\]"):
        facade.FSP([4, 4])(torch.randn(2, 3))


def test_vectors_that_are_not_finite_have_no_bins():
    fsp = facade.FSP(levels=[4, 5]).eval()
    _, indices, _, info = fsp(torch.tensor([[[0.1, 0.2], [float("nan"), 0.0]]]))
    assert indices[0, 1] == -1 and torch.equal(info["level_indices"][0, 1], torch.zeros(2))
