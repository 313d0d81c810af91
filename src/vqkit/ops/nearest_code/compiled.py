"""Nearest code and the rest of a training step in C++; never needed, taken where it is there.

A wheel brings its libraries along (libraries.py), and the fastest that this processor runs is loaded. Where it brought none, `build_()`,
or `python -m vqkit.ops.nearest_code.compiled`, compiles one for this processor into the folder $VQKIT_CACHE, else $XDG_CACHE_HOME/vqkit,
else ~/.cache/vqkit. A file for another version or processor, half written or damaged is not loaded, and several processes may build at
once. VQKIT_COMPILED=0 keeps it from being taken unasked.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vqkit.ops.nearest_code import libraries

_NAMES = {torch.float32: "float", torch.float64: "double"}
_TYPES = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "i": ctypes.c_int, "d": ctypes.c_double}
_ARGUMENTS = {
    "nearest": "ppnnnnnniip",
    "few": "ppnnnnnniinpp",
    "gather": "pppnnnnnniipppppppp",
    "back": "ppppnnnnnnnndiiip",
    "learn": "ppppnnnnnnnnddiip",
}
_NO_MEMORY, _BAD_INDEX = 1, 2


def is_there() -> bool:
    """Whether a library for this machine is at hand and welcome. Compiles nothing; what it found first is remembered."""
    return os.environ.get("VQKIT_COMPILED") != "0" and _found() is not None


def build_() -> Path:
    """Compile, unless a library for this machine is at hand, and return where it is.

    Raises RuntimeError where there is no C++ compiler or it fails; OSError where the folder cannot be written.
    """
    _found.cache_clear()
    for path in _candidates():
        if _load(path) is not None:
            return path
    folder = _folder()
    folder.mkdir(parents=True, exist_ok=True)
    path = _make_one(folder)
    if _load(path) is None:
        raise RuntimeError(f"{path} was compiled and cannot be loaded")
    _found.cache_clear()
    return path


def nearest_index(x: Tensor, codebook: Tensor) -> Tensor:
    """x [G, N, K], codebook [G, C, K], both float32 or both float64 on the CPU -> [G, N] int64; -1 where the least distance is not finite.

    Of codes whose distances differ by less than the rounding of explicit differences any may be chosen; of equal codes the first. The
    answer does not depend on the number of threads, `torch.get_num_threads()`. Builds first what is not there; errors as `build_`.
    """
    _check(x, codebook)
    x, codebook = _with_dense_rows(x), codebook.detach().contiguous()
    index = torch.empty(x.shape[:2], dtype=torch.int64)
    _run("nearest", x.dtype, x.data_ptr(), codebook.data_ptr(), *_sizes(x, codebook), *x.stride()[:2], *_threads(), index.data_ptr())
    return index


def nearest_codes(x: Tensor, codebook: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest codes [G, N, k] int64, nearest first, and their squared distances; -1 and 0 where a distance is not finite.

    x and codebook as for `nearest_index`, 1 <= k <= C. Of equal codes the lower index is first; else up to the rounding of explicit
    differences. The answer does not depend on the number of threads. Errors as `nearest_index`, and ValueError for another k.
    """
    _check(x, codebook)
    if not 1 <= k <= codebook.shape[1]:
        raise ValueError(f"k = {k}: must be from 1 to {codebook.shape[1]}, the size of the codebook")
    x, codebook = _with_dense_rows(x), codebook.detach().contiguous()
    index, distance = torch.empty(*x.shape[:2], k, dtype=torch.int64), x.new_empty(*x.shape[:2], k)
    given = (x.data_ptr(), codebook.data_ptr(), *_sizes(x, codebook), *x.stride()[:2], *_threads(), k)
    _run("few", x.dtype, *given, index.data_ptr(), distance.data_ptr())
    return index, distance


class Gathered(NamedTuple):
    """What a training step needs of vectors and their codes; of the dtype of the vectors."""

    quantized: Tensor  # [G, N, K] the codes; zeros where the index is -1
    error: Tensor  # [] the mean over the entries of all vectors with a code of their squared differences
    squared_error: Tensor  # [G] the sum of these
    vectors: Tensor  # [G] vectors with a code
    lost: Tensor  # [G] vectors without
    count: Tensor  # [G, C] vectors per code; [G, 0] where not asked for
    sum: Tensor  # [G, C, K] their sum; [G, 0, K] where not asked for
    moments: Tensor  # [G, 2, K] the sum of all vectors with a code, and of their squared differences from its mean; [G, 2, 0]


def gather_and_count(x: Tensor, codebook: Tensor, indices: Tensor, *, count: bool = True) -> Gathered:
    """Codes, errors and, with `count`, statistics of x [G, N, K] for indices [G, N] int64 in one pass over x.

    codebook [G, C, K] of the dtype of x, float32 or float64, on the CPU. A vector of index -1 enters nothing but `lost`, whatever it
    holds. No gradient. The sums do not depend on the number of threads.
    Raises ValueError for an index that is none of -1 ... C - 1; builds first what is not there; errors as `build_`.
    """
    _check(x, codebook, indices)
    x, codebook, indices = _with_dense_rows(x), codebook.detach().contiguous(), indices.contiguous()
    groups, _, width = x.shape
    size = codebook.shape[1] if count else 0
    result = Gathered(
        x.new_empty(x.shape),
        x.new_empty(()),
        x.new_empty(groups),
        x.new_empty(groups),
        x.new_empty(groups),
        x.new_empty(groups, size),
        x.new_zeros(groups, size, width),
        x.new_empty(groups, 2, width if count else 0),
    )
    places = [tensor.data_ptr() for tensor in (result if count else result[:5])] + [None] * (0 if count else 3)
    given = (x.data_ptr(), codebook.data_ptr(), indices.data_ptr())
    _run("gather", x.dtype, *given, *_sizes(x, codebook), *x.stride()[:2], *_threads(), *places)
    return result


def code_gradient(gradient: Tensor | None, of_error: float, x: Tensor, codebook: Tensor, indices: Tensor, *, rotate: bool) -> Tensor:
    """The gradient for x of its codes, by `rotation_trick` or `straight_through`, and of the mean squared error; [G, N, K], in one pass.

    gradient (None: 0), x [G, N, K], codebook [G, C, K], of one dtype, float32 or float64, on the CPU; indices [G, N] int64; index -1
    gets none. `of_error` is the gradient of `Gathered.error`.
    Raises ValueError for an index that is none of -1 ... C - 1; builds first what is not there; errors as `build_`.
    """
    _check(x, codebook, indices, gradient)
    result = x.detach().new_empty(x.shape)
    _run_back("back", gradient, x, codebook, indices, of_error, rotate, result)
    return result


def codebook_gradient(
    gradient: Tensor | None, of_error: float, x: Tensor, codebook: Tensor, indices: Tensor, *, passed: float = 1.0
) -> Tensor:
    """The gradient for the codebook of `passed` times its codes in the output, and of the mean squared error: [G, C, K], in one pass.

    Arguments and errors as for `code_gradient`. The sums do not depend on the number of threads.
    """
    _check(x, codebook, indices, gradient)
    result = x.detach().new_zeros(codebook.shape)
    _run_back("learn", gradient, x, codebook, indices, of_error, passed, result)
    return result


def _run_back(
    name: str, gradient: Tensor | None, x: Tensor, codebook: Tensor, indices: Tensor, of_error: float, how: float, result: Tensor
) -> None:
    x, codebook, indices = _with_dense_rows(x), codebook.detach().contiguous(), indices.contiguous()
    gradient = None if gradient is None else _with_dense_rows(gradient)
    of_output = (None, 0, 0) if gradient is None else (gradient.data_ptr(), *gradient.stride()[:2])
    given = (of_output[0], x.data_ptr(), codebook.data_ptr(), indices.data_ptr())
    strides = (*of_output[1:], *x.stride()[:2])
    _run(name, x.dtype, *given, *_sizes(x, codebook), *strides, of_error, how, *_threads(), result.data_ptr())


def _check(x: Tensor, codebook: Tensor, indices: Tensor | None = None, gradient: Tensor | None = None) -> None:
    """The functions behind trust their pointers: nothing wrong may reach them."""
    shape, dtype = x.shape, x.dtype
    if len(shape) != 3 or codebook.dim() != 3 or shape[::2] != codebook.shape[::2] or codebook.shape[1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, codebook {tuple(codebook.shape)}: must be [G, N, K] and [G, C, K] with C > 0")
    if dtype not in _NAMES:
        raise TypeError(f"x is {x.dtype}: must be float32 or float64")
    _check_one("x", x, shape, dtype)
    _check_one("codebook", codebook, codebook.shape, dtype)
    if indices is not None:
        _check_one("indices", indices, shape[:2], torch.int64)
    if gradient is not None:
        _check_one("gradient", gradient, shape, dtype)


def _check_one(name: str, tensor: Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
    if not tensor.is_cpu:
        raise ValueError(f"{name} is on {tensor.device}: the compiled form is for the CPU")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} is {tensor.dtype}: must be {dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: must be {tuple(shape)}")


def _sizes(x: Tensor, codebook: Tensor) -> tuple[int, int, int, int]:
    groups, num, width = x.shape
    return groups, num, codebook.shape[1], width


def _threads() -> tuple[int, bool]:
    """How many, and whether those that torch's OpenMP keeps may be taken; they still wait for work after an operation of torch."""
    return torch.get_num_threads(), _keeps_threads(os.getpid())


@functools.cache
def _keeps_threads(process: int) -> bool:
    """False for a process that was forked: it has none of its parent's threads, and OpenMP would wait for them for ever."""
    try:
        flags = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[6])
    except OSError:
        return False
    return not flags & 0x40  # PF_FORKNOEXEC of Linux


def _with_dense_rows(x: Tensor) -> Tensor:
    x = x.detach()
    return x if x.stride(-1) == 1 else x.contiguous()


def _run(name: str, dtype: torch.dtype, *arguments: int | float | None) -> None:
    """Tensors are given by their pointers; the caller keeps them."""
    result = getattr(_at_hand(), f"vqkit_{name}_{_NAMES[dtype]}")(*arguments)
    if result == _NO_MEMORY:
        raise MemoryError(f"no memory for {name}")
    if result == _BAD_INDEX:
        raise ValueError("indices holds a value that is none of -1 ... C - 1")


# Finding, loading and building


def _at_hand() -> ctypes.CDLL:
    library = _found()
    if library is None:
        build_()
        library = _found()
    if library is None:
        raise RuntimeError("the compiled form was built and is gone again")
    return library


@functools.cache
def _found() -> ctypes.CDLL | None:
    with contextlib.suppress(OSError, RuntimeError):  # no home, no folder, no source: not there
        for path in _candidates():
            if (library := _load(path)) is not None:
                return library
    return None


def _candidates() -> Iterator[Path]:
    yield from libraries.suitable(libraries.FOLDER)
    yield from libraries.suitable(_folder())


def _make_one(folder: Path) -> Path:
    try:
        return libraries.make((libraries.NATIVE,), folder)[0]
    except RuntimeError:  # not every compiler knows this processor, or how to ask for it
        return libraries.make(libraries.levels()[-1:], folder)[0]


def _folder() -> Path:
    if cache := os.environ.get("VQKIT_CACHE"):
        return Path(cache)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vqkit"


def _load(path: Path) -> ctypes.CDLL | None:
    """None for a file whose contents are not what its name says, or that does not load."""
    try:
        if not libraries.is_whole(path):
            return None
        library = ctypes.CDLL(str(path))
        for (name, arguments), dtype in itertools.product(_ARGUMENTS.items(), _NAMES.values()):
            getattr(library, f"vqkit_{name}_{dtype}").argtypes = [_TYPES[argument] for argument in arguments]
    except (OSError, AttributeError):
        return None
    return library


if __name__ == "__main__":
    try:
        build_()
    except (OSError, RuntimeError) as error:
        raise SystemExit(str(error)) from None
