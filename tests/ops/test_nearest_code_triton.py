"""The Triton kernels keep the laws of nearest code and of its statistics: interpreted on CPU, or on a CUDA device where there is one.

`make triton` runs them interpreted, and compiles them for a device that need not be there.
"""

import os
import subprocess
import sys

import pytest
import torch

from vqkit.ops.codebook import assignment_stats
from vqkit.ops.nearest_code import blocked, reference
from vqkit.ops.nearest_code import triton as kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"

with_triton = pytest.mark.skipif(not kernels.is_importable(), reason="triton is not installed: make triton")
runs = [
    with_triton,
    pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="no CUDA device, and TRITON_INTERPRET is not 1: make triton"),
    # Interpreted, what is not finite passes through numpy, which warns where a device does not.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
on_cuda = [with_triton, pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")]


def marked(marks):
    def mark(test):
        for m in marks:
            test = m(test)
        return test

    return mark


def nearest_index(x, codebook):
    return kernels.nearest_index(x.to(DEVICE), codebook.to(DEVICE)).cpu()


def scatter_statistics(x, indices, size, weights=None):
    found = kernels.scatter_statistics(x.to(DEVICE), indices.to(DEVICE), size, None if weights is None else weights.to(DEVICE))
    return tuple(tensor.cpu() for tensor in found)


def num_doubtful(x, codebook):
    return kernels._run(x.to(DEVICE), codebook.to(DEVICE)).num_doubtful.tolist()


def excess(x, codebook, indices):
    """How much further than the nearest code the chosen one is, in float64, in units of what rounding explains."""
    distance = (x.double().unsqueeze(-2) - codebook.double().unsqueeze(-3)).square().sum(-1)
    best = distance.amin(-1)
    chosen = distance.gather(-1, indices.unsqueeze(-1)).squeeze(-1)
    width, info = x.shape[-1], torch.finfo(torch.float32)
    return ((chosen - best) / ((width + 4) * (4 * info.eps * best + 2 * info.tiny))).amax().item()


KINDS = {
    "plain": lambda x: x,
    "off centre": lambda x: x + 1000.0,
    "tiny": lambda x: x * 1e-12,
    "near underflow": lambda x: x * 1e-18,
    "large": lambda x: x * 1e12,
    "two far clusters": lambda x: x * 1e-3 + torch.where(torch.arange(x.shape[-2]) % 2 == 0, 300.0, -300.0).unsqueeze(-1),
}
# G, N, C, K: one of everything, primes, several tiles along each axis, one less and one more than fills them
SHAPES = [(1, 1, 1, 3), (1, 31, 47, 7), (2, 17, 37, 65), (1, 5, 1, 4), (1, 1, 33, 16)]


@marked(runs)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chooses_as_well_as_explicit_differences(kind, shape):
    groups, num, size, width = shape
    x, codebook = KINDS[kind](torch.randn(groups, num, width)), KINDS[kind](torch.randn(groups, size, width))
    x[:, 0] = codebook.mean(-2)  # where a code of nothing but padding would be near
    indices = nearest_index(x, codebook)
    assert indices.shape == (groups, num) and indices.dtype == torch.int64
    assert excess(x, codebook, indices) <= 1


@marked(runs)
def test_a_close_race_is_settled_though_its_codes_lie_in_different_tiles():
    codebook = 100.0 * torch.randn(1, 40, 4)
    codebook[:, 25] = codebook[:, 3] + 1e-3 * torch.randn(4)
    x = codebook[:, 3:4] + 1e-3 * torch.randn(1, 40, 4)
    assert excess(x, codebook, nearest_index(x, codebook)) <= 1


@marked(runs)
@pytest.mark.parametrize(("distinct", "repeats", "groups"), [(3, 13, 1), (12, 2, 2), (1, 35, 1)])
def test_ties_go_to_the_lowest_index(distinct, repeats, groups):
    """Codes on a small grid, several times over: all arithmetic is exact, so the first of the nearest is the only right answer."""
    x = torch.randint(-3, 4, (groups, 37, 3)).float()
    codebook = torch.randint(-3, 4, (groups, distinct, 3)).float().repeat(1, repeats, 1)
    assert torch.equal(nearest_index(x, codebook), reference.nearest_index(x, codebook))


@marked(runs)
def test_many_equal_codes_are_settled_by_few_programs(monkeypatch):
    monkeypatch.setattr(kernels, "_SETTLING_PROGRAMS", 2)
    x, codebook = torch.randn(2, 40, 4), torch.ones(2, 150, 4).mul(0.1)
    x[:, 3] = codebook[:, 140] = 50.0
    assert num_doubtful(x, codebook) == [39, 39]
    indices = nearest_index(x, codebook)
    assert torch.equal(indices, reference.nearest_index(x, codebook)) and (indices[:, 3] == 140).all()


@marked(runs)
def test_a_common_offset_puts_no_choice_in_doubt():
    x, codebook = torch.randn(1, 40, 8), torch.randn(1, 40, 8)
    assert num_doubtful(x, codebook) == [0]
    assert num_doubtful(x + 1000.0, codebook + 1000.0) == [0]


@marked(runs)
@pytest.mark.parametrize("size", [1, 40])
def test_what_is_not_finite_gets_no_code_and_changes_no_other(size):
    x, codebook = torch.randn(1, 40, 20), torch.randn(1, size, 20)
    clean = nearest_index(x, codebook)
    spoiled = x.clone()
    lost = [0, 9, 18, 27, 36]
    for row, bad in zip(lost, [torch.nan, torch.inf, -torch.inf, 1e30, -3e25], strict=True):
        spoiled[0, row, row % 20] = bad
    keep = torch.ones(40, dtype=torch.bool)
    keep[lost] = False
    found = nearest_index(spoiled, codebook)
    assert (found[0, lost] == -1).all() and (clean >= 0).all() and torch.equal(found[0, keep], clean[0, keep])
    assert size == 1 or num_doubtful(spoiled, codebook) == [2]  # what holds NaN or infinity costs no second look


@marked(runs)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 3e38])
def test_a_codebook_that_is_not_finite_means_what_explicit_differences_make_of_it(bad):
    x, codebook = torch.randn(1, 20, 3), torch.randn(1, 21, 3)
    codebook[0, 5, 1] = bad
    indices = nearest_index(x, codebook)
    assert torch.equal(indices, reference.nearest_index(x, codebook)) and (indices == -1).all() == (bad != bad)


@marked(runs)
@pytest.mark.parametrize("scale", [1e17, 3e18, 1e19, 1e20])
def test_no_code_is_given_where_the_distance_overflows(scale):
    x, codebook = torch.randn(1, 40, 3) * scale, torch.randn(1, 20, 3) * scale
    codebook[0, 7] = x[0, 11]
    assert torch.equal(nearest_index(x, codebook), reference.nearest_index(x, codebook))


@marked(runs)
def test_no_code_is_given_where_lengths_are_finite_and_the_distance_is_not():
    x, codebook = torch.tensor([[[1.4e18, 1.4e19], [7e18, 1.2e19]]]), torch.tensor([[[1.4e19, 0.0], [-1.4e19, 0.0]]])
    assert nearest_index(x, codebook).tolist() == reference.nearest_index(x, codebook).tolist() == [[-1, 0]]


@marked(runs)
def test_vectors_may_lie_in_any_order_in_memory():
    x, codebook = torch.randn(1, 5, 20), torch.randn(2, 7, 5)
    spread, turned = x.mT.expand(2, 20, 5), codebook.mT.contiguous().mT
    assert torch.equal(nearest_index(spread, turned), reference.nearest_index(spread, codebook))
    indices = torch.arange(20).remainder(3).expand(2, 20)
    for vectors, codes in [(spread, indices), (x.mT, indices[:1])]:
        found = scatter_statistics(vectors, codes, 3)[1]
        assert torch.equal(found, scatter_statistics(vectors.contiguous(), codes.contiguous(), 3)[1])


@marked(runs)
def test_float64_and_empty_inputs_take_the_plain_form(monkeypatch):
    x, codebook = torch.randn(2, 30, 5, dtype=torch.float64), torch.randn(2, 20, 5, dtype=torch.float64)
    close = codebook[:, :1] + 1e-12
    codebook = torch.cat([codebook, close], dim=1)
    near = torch.cat([x, close + 1e-13], dim=1)
    assert torch.equal(nearest_index(near, codebook), reference.nearest_index(near, codebook))
    for groups, num, width in [(0, 3, 4), (2, 0, 4), (2, 3, 0)]:
        found = nearest_index(torch.randn(groups, num, width), torch.randn(groups, 5, width))
        assert found.shape == (groups, num) and not found.any()


def statistics_agree(x, indices, size, weights=None, **tolerance):
    count, total = scatter_statistics(x, indices, size, weights)
    expected = assignment_stats(x, indices, size, weights=weights)
    torch.testing.assert_close(count, expected.count, **tolerance)
    torch.testing.assert_close(total, expected.sum, **tolerance)


@marked(runs)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("heads", "num", "size", "width"), [(1, 1, 1, 1), (2, 37, 5, 3), (1, 23, 11, 70), (2, 5, 40, 16)])
def test_statistics_are_those_of_the_plain_form(weighted, heads, num, size, width):
    """Of whole numbers, whose sums are exact in any order."""
    x = torch.randint(-9, 10, (heads, num, width)).float()
    indices = torch.randint(-1, size, (heads, num))
    weights = torch.randint(0, 3, (heads, num)).float() if weighted else None
    spoiled = x.masked_fill((indices < 0).unsqueeze(-1), torch.nan)
    if weights is not None:
        spoiled = spoiled.masked_fill((weights == 0).unsqueeze(-1), torch.inf)
    statistics_agree(spoiled, indices, size, weights, rtol=0.0, atol=0.0)


@marked(runs)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_statistics_are_as_wide_as_the_vectors_and_float32_at_least(dtype):
    x, indices = torch.randn(1, 40, 5).to(dtype), torch.randint(0, 3, (1, 40))
    tight = 1e-12 if dtype == torch.float64 else 1e-5
    statistics_agree(x, indices, 3, torch.rand(1, 40, dtype=torch.float64), rtol=tight, atol=tight)


@marked(runs)
@pytest.mark.parametrize("dropped", [0, 3])
def test_a_popular_code_is_summed_in_pieces(dropped, monkeypatch):
    monkeypatch.setattr(kernels, "_VECTORS_PER_PIECE", 24)
    x, indices = torch.randn(1, 250, 3).double(), torch.full((1, 250), 2)
    indices[0, 100 : 100 + dropped] = -1
    indices[0, 200:225] = 0
    statistics_agree(x, indices, 4)


@marked(runs)
def test_statistics_of_nothing_are_zero():
    for shape in [(1, 0, 3), (0, 4, 3)]:
        count, total = scatter_statistics(torch.randn(shape), torch.zeros(shape[:2], dtype=torch.int64), 5)
        assert count.shape == (shape[0], 5) and total.shape == (shape[0], 5, 3) and not count.any() and not total.any()
    assert not scatter_statistics(torch.full((1, 4, 3), torch.nan), torch.full((1, 4), -1), 2)[1].any()


@with_triton
def test_tiles_are_chosen_for_the_shape_and_fit_into_shared_memory():
    import triton

    for n, c, k, _, stages in kernels._CONFIGURATIONS:
        assert 4 * stages * (n + c) * k <= kernels.SHARED_BYTES
    configurations = [triton.Config({"BLOCK_N": n, "BLOCK_C": c, "BLOCK_K": k}) for n, c, k, _, _ in kernels._CONFIGURATIONS]
    for num, width in [(1, 1), (1, 64), (20, 40), (70, 17), (10**6, 256)]:
        tiles = [c.kwargs for c in kernels._fitting(configurations, {"num": num}, WIDTH=width)]
        assert tiles
        if num > 16 and width > 16:
            assert all(t["BLOCK_N"] < 2 * num and t["BLOCK_K"] < 2 * width for t in tiles)
    assert len(tiles) == len(configurations)


# What a device would run: compiled for an H100 or H200 without one.
_COMPILE = """
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vqkit.ops.nearest_code import triton as kernels

def compiled(kernel, constants, warps=4, stages=3):
    types = {"key": "*i64", "doubtful": "*i32", "num_doubtful": "*i32", "order": "*i64", "start": "*i64", "stop": "*i64",
             "num": "i32", "size": "i32", "magnitude": "i32", "rounding": "fp32", "underflow": "fp32"}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in kernel.arg_names}
    source = ASTSource(kernel, types, constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})

n, c, k, warps, stages = kernels._CONFIGURATIONS[int(sys.argv[1])]
shape = {"WIDTH": 65, "UNDECIDED": kernels._UNDECIDED}
if n == 16:  # triton makes a constant of an argument that is 1
    shape |= {"num": 1, "size": 1, "magnitude": 1}
race = compiled(kernels._race_kernel().fn, {**shape, "BLOCK_N": n, "BLOCK_C": c, "BLOCK_K": k}, warps, stages)
assert race.metadata.shared <= kernels.SHARED_BYTES, race.metadata.shared
assert "fma.rn.f32" in race.asm["ptx"] and "mma." not in race.asm["ptx"], "products are to be float32, not shortened"
compiled(kernels._settle_kernel(), {**shape, "BLOCK_N": 16, "BLOCK_C": 128})
compiled(kernels._sum_kernel(), {**shape, "BLOCK_N": 16, "BLOCK_K": 64})
compiled(kernels._sum_kernel(), {**shape, "BLOCK_N": 16, "BLOCK_K": 64, "share": None, "order": None})
"""


@with_triton
@pytest.mark.parametrize("configuration", [0, 1, len(kernels._CONFIGURATIONS) - 1])
def test_the_kernels_compile_for_a_device(configuration, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _COMPILE, str(configuration)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_what_is_missing_is_named(monkeypatch):
    x, codebook = torch.randn(1, 4, 3), torch.randn(1, 2, 3)
    calls = [lambda: kernels.nearest_index(x, codebook), lambda: kernels.scatter_statistics(x, torch.zeros(1, 4, dtype=torch.int64), 2)]
    monkeypatch.setitem(sys.modules, "triton", None)
    assert not kernels.is_importable()
    for call in calls:
        with pytest.raises(ImportError, match=r"pip install vqkit\[triton\]"):
            call()
    monkeypatch.undo()
    if kernels.is_importable():
        monkeypatch.setattr(kernels, "_is_interpreted", lambda: False)
        for call in calls:
            with pytest.raises(ValueError, match=r"^x is on cpu: .* needs a CUDA device"):
                call()


@marked(on_cuda)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num", "size", "width"), [(1000, 1024, 64), (5003, 300, 100), (4096, 8192, 8)])
def test_every_tile_size_chooses_as_well_on_a_device(kind, num, size, width, monkeypatch):
    x, codebook = (KINDS[kind](torch.randn(1, n, width)).to(DEVICE) for n in (num, size))
    distance = torch.cdist(x.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    best = distance.amin(-1)
    bound = (width + 4) * (4 * torch.finfo(torch.float32).eps * best + 2 * torch.finfo(torch.float32).tiny)
    for configuration in kernels._CONFIGURATIONS:
        monkeypatch.setattr(kernels, "_CONFIGURATIONS", [configuration])
        kernels._race_kernel.cache_clear()
        try:
            indices = kernels.nearest_index(x, codebook)
        finally:
            kernels._race_kernel.cache_clear()
        assert (distance.gather(-1, indices.unsqueeze(-1)).squeeze(-1) - best <= bound).all()
    agree = (kernels.nearest_index(x, codebook) == blocked.nearest_index(x, codebook)).double().mean()
    assert agree > 0.99


@marked(on_cuda)
def test_a_device_gives_the_same_bits_twice():
    x, codebook = torch.randn(2, 20_000, 64, device=DEVICE), torch.randn(2, 500, 64, device=DEVICE)
    codebook[:, 100:] = codebook[:, :1]
    first, second = kernels.nearest_index(x, codebook), kernels.nearest_index(x, codebook)
    assert torch.equal(first, second)
    sums = [kernels.scatter_statistics(x, first, 500)[1] for _ in range(3)]
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[0], sums[2])
    torch.testing.assert_close(sums[0], assignment_stats(x, first, 500).sum, rtol=1e-4, atol=1e-3)


@marked(on_cuda)
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_the_host_does_not_wait_for_the_device():
    x, codebook = torch.randn(1, 5000, 32, device=DEVICE), torch.zeros(1, 100, 32, device=DEVICE)
    kernels.scatter_statistics(x, kernels.nearest_index(x, codebook), 100)  # tile sizes are chosen
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.scatter_statistics(x, kernels.nearest_index(x, codebook), 100, torch.ones(1, 5000, device=DEVICE))
    finally:
        torch.cuda.set_sync_debug_mode("default")
