"""Nearest code by C++ that is compiled on this machine; never needed, taken where it is there.

`build_()`, or `python -m vqkit.ops.nearest_code.compiled`, compiles compiled.cpp for this processor into the folder $VQKIT_CACHE, else
$XDG_CACHE_HOME/vqkit, else ~/.cache/vqkit. The file's name carries a hash of what it was made from and for, and one of its contents: a
file for another version or processor, half written or damaged is not loaded, and several processes may build at once.
VQKIT_COMPILED=0 keeps it from being taken unasked.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_name("compiled.cpp")
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-w")
_FOR_THIS_PROCESSOR = (("-march=native",), ("-mcpu=native",), ())  # the first that the compiler takes
_NAMES = {torch.float32: "float", torch.float64: "double"}


def is_there() -> bool:
    """Whether a build for this machine is at hand and welcome. Compiles nothing; what it found first is remembered."""
    return os.environ.get("VQKIT_COMPILED") != "0" and _found() is not None


def build_() -> Path:
    """Compile, unless a build for this machine is at hand, and return where it is.

    Raises RuntimeError where there is no C++ compiler or it fails; OSError where the folder cannot be written.
    """
    folder = _folder()
    _found.cache_clear()
    for path in _candidates(folder):
        if _load(path) is not None:
            return path
    folder.mkdir(parents=True, exist_ok=True)
    path = _compile(_compiler(), folder)
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
    x, codebook = _with_dense_rows(x.detach()), codebook.detach().contiguous()
    groups, num, width = x.shape
    index = torch.empty(groups, num, dtype=torch.int64)
    _run(
        f"vqkit_nearest_{_NAMES[x.dtype]}",
        *(x, codebook, groups, num, codebook.shape[1], width, x.stride(0), x.stride(1), codebook.stride(0)),
        *(torch.get_num_threads(), index),
    )
    return index


def _check(x: Tensor, codebook: Tensor) -> None:
    for name, tensor in (("x", x), ("codebook", codebook)):
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} is on {tensor.device}: the compiled form is for the CPU")
        if tensor.dtype not in _NAMES or tensor.dtype != x.dtype:
            raise TypeError(f"{name} is {tensor.dtype}: both must be float32 or both float64")
    if x.dim() != 3 or codebook.dim() != 3 or x.shape[::2] != codebook.shape[::2] or codebook.shape[1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, codebook {tuple(codebook.shape)}: must be [G, N, K] and [G, C, K] with C > 0")


def _with_dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _run(name: str, *arguments: Tensor | int | None) -> None:
    given = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
    if getattr(_at_hand(), name)(*given):
        raise MemoryError(f"{name} ran out of memory")


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
        for path in _candidates(_folder()):
            if (library := _load(path)) is not None:
                return library
    return None


def _folder() -> Path:
    if cache := os.environ.get("VQKIT_CACHE"):
        return Path(cache)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vqkit"


def _candidates(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"nearest_code-{_origin()}-*.so"))


def _origin() -> str:
    """What a build was made from and for. Not the compiler: asking it costs more than a search may, and what it made has its own hash."""
    parts = (_SOURCE.read_bytes(), repr((_FLAGS, _FOR_THIS_PROCESSOR, platform.system(), platform.machine(), _processor())).encode())
    return _hash(b"".join(parts))


def _processor() -> tuple[str, ...]:
    """What tells processors apart for which different instructions may be chosen."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            first = list(iter(lines.readline, "\n"))
    except OSError:
        return (platform.processor(),)
    told = ("vendor_id", "cpu family", "model", "flags", "CPU ", "Features")
    return tuple(line.strip() for line in first if line.startswith(told) and not line.startswith("cpu MHz"))


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=12).hexdigest()


def _load(path: Path) -> ctypes.CDLL | None:
    """None for a file whose contents are not what its name says, or that does not load."""
    try:
        if path.stem.rpartition("-")[2] != _hash(path.read_bytes()):
            return None
        library = ctypes.CDLL(str(path))
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        for name in _NAMES.values():
            getattr(library, f"vqkit_nearest_{name}").argtypes = [pointer, pointer, *[number] * 7, ctypes.c_int, pointer]
    except (OSError, AttributeError):
        return None
    return library


def _compiler() -> list[str]:
    if named := shlex.split(os.environ.get("CXX", "")):
        candidates = [named]
    else:
        candidates = [["c++"], ["g++"], ["clang++"]]
    for command in candidates:
        if found := shutil.which(command[0]):
            return [found, *command[1:]]
    names = ", ".join(command[0] for command in candidates)
    raise RuntimeError(f"the compiled form of nearest code needs a C++ compiler, and there is none: looked for {names} (CXX names another)")


def _compile(compiler: list[str], folder: Path) -> Path:
    with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as scratch:
        result = Path(scratch) / "nearest_code.so"
        for processor in _FOR_THIS_PROCESSOR:
            command = [*compiler, *_FLAGS, *processor, str(_SOURCE), "-o", str(result)]
            done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
            if done.returncode == 0:
                break
        else:
            raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
        path = folder / f"nearest_code-{_origin()}-{_hash(result.read_bytes())}.so"
        os.replace(result, path)  # whole or absent, whoever else builds
    return path


if __name__ == "__main__":
    build_()
