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
_ARGUMENTS = {"nearest": "ppnnnnnniip", "few": "ppnnnnnniinpp", "gather": "ppppnnnnnniipppp", "rotate": "ppppnnnnnnnndiip"}
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
    _run("nearest", x.dtype, x, codebook, *_sizes(x, codebook), *x.stride()[:2], *_threads(), index)
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
    _run("few", x.dtype, x, codebook, *_sizes(x, codebook), *x.stride()[:2], *_threads(), k, index, distance)
    return index, distance


class Gathered(NamedTuple):
    """What a training step needs of vectors and their codes; of the dtype of the vectors."""

    quantized: Tensor  # [G, N, K] the codes; zeros where the index is -1
    errors: Tensor  # [G, K] the sum over vectors of their squared differences from their codes
    count: Tensor  # [G, C] vectors per code, or the sum of their weights
    sum: Tensor  # [G, C, K] their sum, each times its weight


def gather_and_count(x: Tensor, codebook: Tensor, indices: Tensor, weights: Tensor | None = None) -> Gathered:
    """Codes, errors and statistics of x [G, N, K] for indices [G, N] int64 in one pass over x.

    codebook [G, C, K], weights [G, N], both of the dtype of x, float32 or float64, on the CPU. A vector of index -1 or weight 0 enters
    neither errors nor count nor sum, whatever it holds. No gradient. The sums do not depend on the number of threads.
    Raises ValueError for an index that is none of -1 ... C - 1; builds first what is not there; errors as `build_`.
    """
    _check(x, codebook, indices, weights=weights)
    x, codebook, indices = _with_dense_rows(x), codebook.detach().contiguous(), indices.contiguous()
    weights = None if weights is None else weights.detach().contiguous()
    result = Gathered(x.new_empty(x.shape), x.new_zeros(x.shape[::2]), x.new_zeros(codebook.shape[:2]), x.new_zeros(codebook.shape))
    given = (x, codebook, weights, indices, *_sizes(x, codebook), *x.stride()[:2], *_threads())
    _run("gather", x.dtype, *given, *result)
    return result


def rotation_gradient(gradient: Tensor, x: Tensor, codebook: Tensor, indices: Tensor, pull: float = 0.0) -> Tensor:
    """The gradient for x of `rotation_trick(x, codes)`, plus `pull` * (x - codes), in one pass: [G, N, K].

    gradient, x [G, N, K], codebook [G, C, K], of one dtype, float32 or float64, on the CPU; indices [G, N] int64; index -1 gets none.
    With pull = 2 / (G N K) times the gradient of a mean commitment loss, the second part is that of the loss.
    Raises ValueError for an index that is none of -1 ... C - 1; builds first what is not there; errors as `build_`.
    """
    _check(x, codebook, indices, gradient=gradient)
    gradient, x, codebook, indices = _with_dense_rows(gradient), _with_dense_rows(x), codebook.detach().contiguous(), indices.contiguous()
    result = x.new_empty(x.shape)
    given = (gradient, x, codebook, indices, *_sizes(x, codebook), *gradient.stride()[:2], *x.stride()[:2], pull)
    _run("rotate", x.dtype, *given, *_threads(), result)
    return result


def _check(
    x: Tensor, codebook: Tensor, indices: Tensor | None = None, *, weights: Tensor | None = None, gradient: Tensor | None = None
) -> None:
    """The functions behind trust their pointers: nothing wrong may reach them."""
    if x.dim() != 3 or codebook.dim() != 3 or x.shape[::2] != codebook.shape[::2] or codebook.shape[1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, codebook {tuple(codebook.shape)}: must be [G, N, K] and [G, C, K] with C > 0")
    if x.dtype not in _NAMES:
        raise TypeError(f"x is {x.dtype}: must be float32 or float64")
    wanted = {
        "x": (x, x.shape, x.dtype),
        "codebook": (codebook, codebook.shape, x.dtype),
        "indices": (indices, x.shape[:2], torch.int64),
        "weights": (weights, x.shape[:2], x.dtype),
        "gradient": (gradient, x.shape, x.dtype),
    }
    for name, (tensor, shape, dtype) in wanted.items():
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
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


def _run(name: str, dtype: torch.dtype, *arguments: Tensor | int | float | None) -> None:
    given = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
    result = getattr(_at_hand(), f"vqkit_{name}_{_NAMES[dtype]}")(*given)
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
