"""Laws of the compiled form: it chooses as well as explicit differences, gathers and counts as the plain functions do, whatever the data,
the number of threads and the processor it was compiled for; and its cache of builds is never a danger.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vqkit.ops.codebook import assignment_stats, gather_codes
from vqkit.ops.estimators import rotation_trick, straight_through
from vqkit.ops.losses import mean_commitment_loss
from vqkit.ops.nearest_code import compiled, libraries, nearest_codes, reference


@contextlib.contextmanager
def threads(num):
    before = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def regret(x, codebook, indices):
    """How much further than the nearest code the chosen one is, in float64, relative to the nearest."""
    distance = torch.cdist(x.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    chosen, best = distance.gather(-1, indices.unsqueeze(-1)).squeeze(-1), distance.amin(-1)
    return ((chosen - best) / best.clamp(min=torch.finfo(torch.float64).tiny)).amax().item()


# The nearest code

KINDS = {
    "plain": lambda x: x,
    "off centre": lambda x: x + 1000.0,
    "small": lambda x: x * 1e-5,
    "tiny": lambda x: x * 1e-12,
    "large": lambda x: x * 1e12,
    "two far clusters": lambda x: x * 1e-3 + torch.where(torch.arange(x.shape[-2]) % 2 == 0, 300.0, -300.0).unsqueeze(-1).to(x.dtype),
    "on a grid": lambda x: (2 * x).round(),
    "of many lengths": lambda x: x * torch.logspace(-4, 4, x.shape[-2], dtype=x.dtype).unsqueeze(-1),
    "close together": lambda x: x[..., :1, :].expand(x.shape) + 1e-6 * x,
    "a few far away": lambda x: x * torch.where(torch.arange(x.shape[-2]) % 50 == 7, 1e5, 1.0).unsqueeze(-1).to(x.dtype),
}
SHAPES = [(1, 1, 1, 1), (1, 700, 100, 1), (3, 257, 33, 5), (2, 90, 1500, 8), (1, 150, 128, 64), (2, 300, 1, 7), (1, 500, 509, 67)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chooses_as_well_as_explicit_differences(build, kind, dtype):
    for groups, num, codes, width in SHAPES:
        x, codebook = KINDS[kind](torch.randn(groups, num, width, dtype=dtype)), KINDS[kind](torch.randn(groups, codes, width, dtype=dtype))
        indices = compiled.nearest_index(x, codebook)
        assert indices.shape == (groups, num) and indices.dtype == torch.int64
        assert regret(x, codebook, indices) <= 4 * (width + 4) * torch.finfo(dtype).eps


@pytest.mark.parametrize("far", [0.01, 1.0, 100.0, 1e6])
def test_vectors_and_codes_may_be_of_different_size(build, far):
    x, codebook = far * torch.randn(1, 700, 24), torch.randn(1, 300, 24)
    for vectors, codes in ((x, codebook), (codebook, x), (x + far, codebook)):
        assert regret(vectors, codes, compiled.nearest_index(vectors, codes)) <= 4 * 28 * torch.finfo(torch.float32).eps


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 150), st.integers(1, 12), st.integers(1, 5), st.integers(1, 20), st.integers(0, 2**31))
def test_ties_go_to_the_lowest_index(build, num, distinct, repeats, width, seed):
    """Codes on a small grid, several times over: all arithmetic is exact, so the first of the nearest is the only right answer."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, (1, num, width), generator=generator).float()
    codebook = torch.randint(-3, 4, (1, distinct, width), generator=generator).float().repeat(1, repeats, 1)
    expected = (x.unsqueeze(2) - codebook.unsqueeze(1)).square().sum(-1).argmin(-1)
    assert torch.equal(compiled.nearest_index(x, codebook), expected)


def test_many_equal_codes_and_an_all_zero_codebook(build):
    x = torch.randn(1, 300, 12)
    for codebook in (torch.zeros(1, 1200, 12), torch.ones(1, 64, 12).mul(0.1)):
        assert not compiled.nearest_index(x, codebook).any()
    repeated = torch.randn(1, 40, 12).repeat(1, 30, 1)
    assert torch.equal(compiled.nearest_index(x, repeated), compiled.nearest_index(x, repeated[:, :40]))


@pytest.mark.parametrize("codes", [1, 40, 1500])
@pytest.mark.parametrize("num", [20, 200])
def test_what_is_not_finite_gets_no_code_and_changes_no_other(build, num, codes):
    x, codebook = torch.randn(1, num, 12), torch.randn(1, codes, 12)
    spoiled, lost = x.clone(), list(range(0, 18, 3))
    for row, bad in zip(lost, [torch.nan, torch.inf, -torch.inf, 1e30, -3e25, 3e38], strict=True):
        spoiled[0, row, row % 4] = bad
    found, clean = compiled.nearest_index(spoiled, codebook), compiled.nearest_index(x, codebook)
    keep = torch.ones(num, dtype=torch.bool)
    keep[lost] = False
    assert (found[0, lost] == -1).all() and (clean >= 0).all()
    assert torch.equal(found[0, keep], clean[0, keep])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e25])
def test_codes_that_are_not_finite_count_as_in_the_reference(build, bad):
    x, codebook = torch.randn(1, 200, 12), torch.randn(1, 90, 12)
    codebook[0, 30, 5] = bad
    assert torch.equal(compiled.nearest_index(x, codebook), reference.nearest_index(x, codebook))


def test_any_layout_and_empty_inputs(build):
    x, codebook = torch.randn(2, 90, 30), torch.randn(2, 70, 30)
    expected = compiled.nearest_index(x, codebook)
    for laid in (x.mT.contiguous().mT, torch.cat([x, x], dim=-1)[..., :30], x.transpose(0, 1).contiguous().transpose(0, 1)):
        assert not laid.is_contiguous() and torch.equal(compiled.nearest_index(laid, codebook), expected)
    assert torch.equal(compiled.nearest_index(x, codebook.mT.contiguous().mT), expected)
    assert torch.equal(compiled.nearest_index(x, codebook[:1].expand(2, 70, 30))[:1], expected[:1])
    for shape in [(0, 9, 4), (3, 0, 4)]:
        assert compiled.nearest_index(torch.randn(shape), torch.randn(shape[0], 5, 4)).shape == shape[:2]
    assert not compiled.nearest_index(torch.randn(1, 100, 0), torch.randn(1, 5, 0)).any()


# The nearest few


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_nearest_few_are_as_near_as_by_explicit_differences(build, kind, dtype):
    for (groups, num, codes, width), few in zip(SHAPES, (1, 3, 7, 4, 70, 1, 9), strict=True):
        x, codebook = KINDS[kind](torch.randn(groups, num, width, dtype=dtype)), KINDS[kind](torch.randn(groups, codes, width, dtype=dtype))
        indices, distance = compiled.nearest_codes(x, codebook, few)
        exact = torch.cdist(x.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
        best, bound = exact.sort(-1).values[..., :few], 4 * (width + 4) * torch.finfo(dtype).eps
        assert (indices.sort(-1).values.diff(dim=-1) > 0).all() and (indices >= 0).all()  # all different
        assert (exact.gather(-1, indices) <= best * (1 + bound)).all()
        torch.testing.assert_close(distance.double(), best, rtol=bound, atol=0.0)
        assert (distance.diff(dim=-1) >= 0).all()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 5), st.integers(1, 20), st.integers(0, 2**31))
def test_the_nearest_few_put_the_lower_index_first_among_equals(build, num, distinct, repeats, width, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, (1, num, width), generator=generator).float()
    codebook = torch.randint(-3, 4, (1, distinct, width), generator=generator).float().repeat(1, repeats, 1)
    few = 1 + seed % codebook.shape[1]
    for found, expected in zip(compiled.nearest_codes(x, codebook, few), reference.nearest_codes(x, codebook, few), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_the_nearest_few_of_and_among_what_is_not_finite_are_those_of_the_reference(build, bad):
    x, codebook = (2 * torch.randn(1, 90, 12)).round(), (2 * torch.randn(1, 40, 12)).round()
    clean = compiled.nearest_codes(x, codebook, 4)
    spoiled = x.clone()
    spoiled[0, [3, 50], 7] = bad
    indices, distance = compiled.nearest_codes(spoiled, codebook, 4)
    keep = torch.ones(90, dtype=torch.bool)
    keep[[3, 50]] = False
    assert (indices[0, ~keep] == -1).all() and not distance[0, ~keep].any()
    assert equal((indices[0, keep], distance[0, keep]), (clean[0][0, keep], clean[1][0, keep]))
    codebook[0, 5, 2] = bad
    for few in (4, 40):
        assert equal(compiled.nearest_codes(spoiled, codebook, few), reference.nearest_codes(spoiled, codebook, few))


def test_the_nearest_few_by_name_and_unasked_are_those_of_the_compiled_form(build):
    x, codebook = torch.randn(2, 70, 6), torch.randn(3, 2, 90, 6)
    expected = nearest_codes(x, codebook, 5, impl="reference")
    for impl in ("compiled", "auto"):
        found = nearest_codes(x, codebook, 5, impl=impl)
        assert torch.equal(found.indices, expected.indices)
        torch.testing.assert_close(found.squared_distance, expected.squared_distance)
    assert torch.equal(nearest_codes(x, codebook, 90).indices, nearest_codes(x, codebook, 90, impl="reference").indices)
    assert compiled.nearest_codes(torch.randn(1, 0, 4), torch.randn(1, 5, 4), 2)[0].shape == (1, 0, 2)


# After the choice


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gathers_and_counts_as_the_plain_functions(build, dtype):
    for groups, num, codes, width in [
        (1, 1, 1, 1),
        (1, 5000, 7, 13),
        (2, 1500, 100, 64),
        (3, 600, 1000, 5),
        (1, 1300, 2, 33),
        (2, 0, 3, 4),
    ]:
        x, codebook = torch.randn(groups, num, width, dtype=dtype), torch.randn(groups, codes, width, dtype=dtype)
        indices = torch.randint(-1, codes, (groups, num))
        x[indices < 0] = torch.nan
        codes_of = gather_codes(codebook, indices)
        expected = assignment_stats(x.double(), indices, codes, quantized=codes_of.double(), moments=True)
        found = compiled.gather_and_count(x, codebook, indices)
        assert torch.equal(found.quantized, codes_of)
        assert torch.equal(found.lost.long(), (indices < 0).sum(-1))
        bound = 4 * max(num, 1) * torch.finfo(dtype).eps
        mean = expected.squared_error.sum() / (expected.vectors.sum().clamp(min=1) * width)
        torch.testing.assert_close(found.error.double(), mean, rtol=bound, atol=0.0)
        for name in ("count", "vectors"):
            assert torch.equal(getattr(found, name).double(), getattr(expected, name))
        for name, atol in (("sum", bound), ("squared_error", 0.0), ("moments", 10 * bound)):
            torch.testing.assert_close(getattr(found, name).double(), getattr(expected, name), rtol=bound, atol=atol)
        uncounted = compiled.gather_and_count(x, codebook, indices, count=False)
        assert equal(uncounted[:5], found[:5]) and not any(tensor.numel() for tensor in uncounted[5:])


@pytest.mark.parametrize("pull", [0.0, 0.7])
def test_the_rotation_gradient_is_that_of_the_trick_and_the_loss(build, pull):
    for groups, num, codes, width in [(1, 1, 1, 1), (2, 300, 20, 1), (1, 700, 90, 64), (2, 150, 8, 7)]:
        lengths = torch.logspace(-4, 4, num, dtype=torch.float64).unsqueeze(-1)
        x, codebook = torch.randn(groups, num, width).double() * lengths, torch.randn(groups, codes, width).double()
        x[0, 0], codebook[0, -1] = 0.0, 0.0
        gradient, indices = torch.randn_like(x), torch.randint(-1, codes, (groups, num))
        given = x.clone().requires_grad_()
        quantized = gather_codes(codebook, indices)
        loss = mean_commitment_loss(given, quantized) * x.numel() / 2
        kept = (indices >= 0).unsqueeze(-1)
        of_error = pull * kept.sum().item() * width / 2
        for rotate, trick in ((True, rotation_trick), (False, straight_through)):
            of_output = torch.autograd.grad((trick(given, quantized) * gradient).sum(), given)[0]
            of_loss = torch.autograd.grad(pull * loss, given, retain_graph=True)[0]
            expected = (of_output + of_loss).where(kept, 0.0)
            found = compiled.code_gradient(gradient, of_error, x, codebook, indices, rotate=rotate)
            size = expected.abs().amax(-1, keepdim=True).clamp(min=1.0)
            assert ((found - expected) / size).abs().amax() < 1e-11
            low = compiled.code_gradient(gradient.float(), of_error, x.float(), codebook.float(), indices, rotate=rotate)
            assert ((low - expected) / size).abs().amax() < 1e-3
            alone = compiled.code_gradient(None, of_error, x, codebook, indices, rotate=rotate)
            torch.testing.assert_close(alone, of_loss.where(kept, 0.0), rtol=1e-12, atol=0.0)


def test_lengths_whose_squares_leave_the_range_rotate(build):
    x, codebook, gradient = torch.randn(1, 50, 8), torch.randn(1, 6, 8), torch.randn(1, 50, 8)
    indices = torch.randint(0, 6, (1, 50))
    expected = compiled.code_gradient(gradient, 0.0, x, codebook, indices, rotate=True)
    for scale in (2.0**-100, 2.0**100):
        found = compiled.code_gradient(gradient, 0.0, scale * x, scale * codebook, indices, rotate=True)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("bad", [-2, 5, 2**40])
def test_an_index_out_of_range_is_an_error(build, bad):
    x, codebook, indices = torch.randn(1, 9, 4), torch.randn(1, 5, 4), torch.zeros(1, 9, dtype=torch.int64)
    indices[0, 3] = bad
    for run in (
        lambda: compiled.gather_and_count(x, codebook, indices),
        lambda: compiled.code_gradient(x, 0.0, x, codebook, indices, rotate=True),
        lambda: compiled.codebook_gradient(x, 0.0, x, codebook, indices),
    ):
        with pytest.raises(ValueError, match=r"^indices holds a value"):
            run()


def test_bad_arguments_are_named(build):
    x, codebook, indices = torch.randn(2, 5, 4), torch.randn(2, 3, 4), torch.zeros(2, 5, dtype=torch.int64)
    for error, match, run in [
        (ValueError, r"^x has shape \(5, 4\)", lambda: compiled.nearest_index(x[0], codebook)),
        (ValueError, r"\(2, 3, 3\): must be", lambda: compiled.nearest_index(x, codebook[..., :3])),
        (ValueError, "C > 0", lambda: compiled.nearest_index(x, codebook[:, :0])),
        (TypeError, "^x is torch.bfloat16", lambda: compiled.nearest_index(x.bfloat16(), codebook.bfloat16())),
        (TypeError, "^codebook is torch.float64: must be torch.float32", lambda: compiled.nearest_index(x, codebook.double())),
        (ValueError, "^codebook is on meta", lambda: compiled.nearest_index(x, codebook.to("meta"))),
        (ValueError, "^k = 4: must be from 1 to 3", lambda: compiled.nearest_codes(x, codebook, 4)),
        (TypeError, "^indices is torch.int32", lambda: compiled.gather_and_count(x, codebook, indices.int())),
        (ValueError, "^indices has shape", lambda: compiled.gather_and_count(x, codebook, indices[:1])),
        (ValueError, "^gradient has shape", lambda: compiled.code_gradient(x[:, :2], 0.0, x, codebook, indices, rotate=True)),
    ]:
        with pytest.raises(error, match=match):
            run()


# Threads and processes


def everything(x, codebook):
    indices = compiled.nearest_index(x, codebook)
    few = compiled.nearest_codes(x[:, ::8], codebook, 3)
    gradient = compiled.code_gradient(x.flip(1), 0.1 * x.numel(), x, codebook, indices, rotate=True)
    of_codes = compiled.codebook_gradient(x.flip(1), 0.1 * x.numel(), x, codebook, indices, passed=0.5)
    return indices, *few, *compiled.gather_and_count(x, codebook, indices), gradient, of_codes


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def problem(build):
    x, codebook = torch.randn(1, 40000, 32), torch.randn(1, 100, 32)
    with threads(1):
        return x, codebook, everything(x, codebook)


@pytest.mark.parametrize("pooled", [False, True])
def test_the_answer_does_not_depend_on_the_number_of_threads(problem, pooled, monkeypatch):
    monkeypatch.setattr(compiled, "_keeps_threads", lambda process: pooled)
    x, codebook, expected = problem
    for num in (2, 3, 7):
        with threads(num):
            assert equal(everything(x, codebook), expected)


@pytest.mark.parametrize("pooled", [False, True])
def test_calls_from_several_threads_at_once(problem, pooled, monkeypatch):
    monkeypatch.setattr(compiled, "_keeps_threads", lambda process: pooled)
    x, codebook, expected = problem
    with threads(3), ThreadPoolExecutor(6) as pool:
        assert all(equal(found, expected) for found in pool.map(lambda _: everything(x, codebook), range(24)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_process_computes_as_its_parent(problem):
    x, codebook, expected = problem
    with threads(3):
        everything(x, codebook)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # later Pythons warn of any fork beside threads
            child = os.fork()
        if child == 0:
            os._exit(0 if compiled.nearest_index(x, codebook).tolist() == expected[0].tolist() else 1)
    assert wait(child, seconds=300) == 0


def wait(child, seconds):
    """The exit code of a process; it is killed if it does not end."""
    for _ in range(100 * seconds):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise TimeoutError("the forked process hangs")


# What a wheel brings along


def test_the_fastest_library_that_this_processor_runs_is_loaded(made, fresh, monkeypatch):
    monkeypatch.setattr(libraries, "FOLDER", made)
    runnable = [level.name for level in libraries.levels() if libraries.is_runnable(level)]
    assert [path.stem.rsplit("-", 2)[0] for path in libraries.suitable(made)] == [f"compiled-{name}" for name in runnable]
    assert compiled.build_() == libraries.suitable(made)[0] and not fresh.exists()
    flags = libraries._processor_flags()
    for gone in ("avx512_vnni", "avx512vl", "avx_vnni", "fma", "sse4_2"):
        monkeypatch.setattr(libraries, "_processor_flags", lambda gone=gone: flags - {gone})
        assert all(gone not in level.needs for level in libraries.levels() if libraries.is_runnable(level))
        assert libraries.is_runnable(libraries.levels()[-1])
        fit = [path for level in libraries.levels() if gone not in level.needs for path in libraries.made(level, made)]
        assert set(libraries.suitable(made)) <= set(fit)


def test_what_was_made_of_another_source_is_not_loaded(made, fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(libraries, "FOLDER", made)
    assert compiled.is_there()
    changed = tmp_path / "compiled.cpp"
    changed.write_text(libraries.SOURCE.read_text() + "\n")
    monkeypatch.setattr(libraries, "SOURCE", changed)
    compiled._found.cache_clear()
    assert not compiled.is_there()


def test_a_level_that_the_compiler_does_not_know_is_left_out(finished, tmp_path, monkeypatch):
    script = tmp_path / "old compiler"
    script.write_text(f"""#!/bin/sh
for word in "$@"; do [ "$word" = -march=new ] && exit 1; done
while [ "$1" != -o ]; do shift; done
cp "{finished}" "$2"
""")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", f"'{script}'")
    new, old = libraries.Level("new", ("-march=new",)), libraries.Level("old", ())
    folder = tmp_path / "folder"
    folder.mkdir()
    assert libraries.make((new, old), folder) == libraries.made(old, folder) != []
    with pytest.raises(RuntimeError, match=r"-march=new .*failed"):
        libraries.make((new,), folder)


# The cache of builds


@pytest.fixture
def finished(made):
    """A file as the compiler makes it."""
    return next(made.glob("*.so"))


@pytest.fixture
def compiler(tmp_path, finished, fresh, monkeypatch):
    """A compiler that takes no time: it copies what is finished, and leaves a trace of each run."""
    script = tmp_path / "quick compiler"
    script.write_text(f'#!/bin/sh\necho run >> "{tmp_path}/runs"\nwhile [ "$1" != -o ]; do shift; done\nsleep 0.2\ncp "{finished}" "$2"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", f"'{script}'")
    return lambda: len((tmp_path / "runs").read_text().split()) if (tmp_path / "runs").exists() else 0


def test_asking_compiles_nothing_and_building_once_is_enough(compiler, fresh):
    assert not compiled.is_there() and compiler() == 0 and not fresh.exists()
    path = compiled.build_()
    assert compiled.is_there() and compiler() == 1
    assert compiled.build_() == path and compiler() == 1
    assert [p.name for p in fresh.iterdir()] == [path.name]


def test_use_by_name_builds_what_is_missing(compiler):
    x = torch.randn(1, 50, 4)
    assert torch.equal(compiled.nearest_index(x, x), torch.arange(50).unsqueeze(0)) and compiler() == 1


def test_it_can_be_switched_off_for_those_who_do_not_ask_by_name(compiler, monkeypatch):
    compiled.build_()
    monkeypatch.setenv("VQKIT_COMPILED", "0")
    assert not compiled.is_there()
    x = torch.randn(1, 50, 4)
    assert torch.equal(compiled.nearest_index(x, x), torch.arange(50).unsqueeze(0))


def test_builders_do_not_disturb_each_other(compiler, fresh):
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: compiled.build_(), range(4)))
    assert compiler() > 1 and len(paths) == 1 and [*fresh.iterdir()] == [*paths]
    assert compiled.is_there()


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "no library", "another library"])
def test_a_damaged_or_foreign_file_is_not_loaded_and_built_anew(compiler, fresh, damage):
    path = compiled.build_()
    content = path.read_bytes()
    if damage in ("no library", "another library"):  # whose name is that of its contents
        content = b"no library" if damage == "no library" else other_library()
        path.unlink()
        path = path.with_name(f"{path.stem.rpartition('-')[0]}-{libraries.content_hash(content)}.so")
        path.write_bytes(content)
    else:
        path.unlink()  # the old contents may still be in use by this process
        path.write_bytes({"cut": content[: len(content) // 2], "changed": content[:-1] + bytes([content[-1] ^ 1]), "empty": b""}[damage])
    compiled._found.cache_clear()
    assert not compiled.is_there()
    compiled.build_()
    assert compiled.is_there() and compiler() == 2


def other_library():
    """A library that has none of the functions."""
    import _ctypes

    with open(_ctypes.__file__, "rb") as file:
        return file.read()


def test_a_build_for_another_processor_or_source_is_not_taken(compiler, monkeypatch, tmp_path):
    compiled.build_()
    monkeypatch.setattr(libraries, "_processor", lambda: ("another",))
    compiled._found.cache_clear()
    assert not compiled.is_there()
    monkeypatch.undo()
    monkeypatch.delenv("VQKIT_COMPILED", raising=False)
    monkeypatch.setattr(libraries, "FOLDER", tmp_path / "brought")
    changed = tmp_path / "compiled.cpp"
    shutil.copy(libraries.SOURCE, changed)
    changed.write_text(changed.read_text() + "\n")
    monkeypatch.setenv("VQKIT_CACHE", str(tmp_path / "cache"))
    compiled._found.cache_clear()
    assert compiled.is_there()
    monkeypatch.setattr(libraries, "SOURCE", changed)
    compiled._found.cache_clear()
    assert not compiled.is_there()


def test_without_a_compiler_the_error_says_so_and_asking_is_silent(fresh, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert not compiled.is_there()
    for run in (compiled.build_, lambda: compiled.nearest_index(torch.randn(1, 5, 2), torch.randn(1, 3, 2))):
        with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler, and there is none: looked for c\+\+, g\+\+, clang\+\+"):
            run()
    monkeypatch.setenv("CXX", "no-such-compiler -flag")
    with pytest.raises(RuntimeError, match="looked for no-such-compiler "):
        compiled.build_()


def test_a_failing_compiler_is_quoted_and_leaves_nothing(fresh, tmp_path, monkeypatch):
    script = tmp_path / "failing"
    script.write_text("#!/bin/sh\necho what is wrong >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(RuntimeError, match=r"compiled\.cpp .*failed:\nwhat is wrong"):
        compiled.build_()
    assert not compiled.is_there() and [*fresh.iterdir()] == []


def test_no_place_for_a_cache_is_no_error_of_asking(fresh, monkeypatch):
    for name in ("VQKIT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(compiled.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory.")))
    assert not compiled.is_there()


def test_the_command_builds(compiler, fresh):
    command = f"""
import pathlib, runpy
from vqkit.ops.nearest_code import libraries
libraries.FOLDER = pathlib.Path({str(libraries.FOLDER)!r})
runpy.run_module("vqkit.ops.nearest_code.compiled", run_name="__main__")
"""
    subprocess.run([sys.executable, "-W", "error", "-c", command], check=True, timeout=300)
    assert compiler() == 1 and compiled.is_there()
