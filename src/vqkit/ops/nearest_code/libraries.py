"""The shared libraries made of compiled.cpp: for which processors, how one is made, and which suits this machine. No torch.

A wheel carries one library for each level of instructions of its platform, made when it is built (hatch_build.py) and lying beside this
file. A name tells the level, what the library was made from and what it holds: where compiled.cpp has changed since, or the file has, it
is not taken. Standing alone, because the build of the wheel loads this file by its path.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
SOURCE = FOLDER / "compiled.cpp"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-w")


class Level(NamedTuple):
    """Instructions that a library may use."""

    name: str
    flags: tuple[str, ...]  # of the compiler
    needs: frozenset[str] = frozenset()  # what the kernel has to name among the flags of the processor


_V3 = frozenset(
    ["abm", "avx", "avx2", "bmi1", "bmi2", "cx16", "f16c", "fma", "lahf_lm", "movbe", "pni", "popcnt", "sse4_1", "sse4_2", "ssse3", "xsave"]
)
_V4 = _V3 | frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"])
_X86 = (
    Level("v4-vnni", ("-march=x86-64-v4", "-mavx512vnni"), _V4 | {"avx512_vnni"}),
    Level("v4", ("-march=x86-64-v4",), _V4),
    Level("v3-vnni", ("-march=x86-64-v3", "-mavxvnni"), _V3 | {"avx_vnni"}),
    Level("v3", ("-march=x86-64-v3",), _V3),
    Level("v1", ("-march=x86-64",)),
)
_LEVELS = {"x86_64": _X86, "amd64": _X86}
NATIVE = Level("native", ("-march=native",))


def levels() -> tuple[Level, ...]:
    """Those of this kind of machine, the fastest first; the last one runs on all of them."""
    return _LEVELS.get(platform.machine().lower(), (Level("any", ()),))


def is_runnable(level: Level) -> bool:
    """Whether this processor, and the system with its registers, has what the level takes."""
    return level.needs <= _processor_flags()


def suitable(folder: Path) -> list[Path]:
    """The libraries in the folder that are of this source and run here, the fastest first."""
    return [path for level in (*levels()[:-1], NATIVE, levels()[-1]) if is_runnable(level) for path in made(level, folder)]


def made(level: Level, folder: Path) -> list[Path]:
    """The libraries of this level and source in the folder."""
    return sorted(folder.glob(f"compiled-{level.name}-{_origin(level)}-*.so"))


def is_whole(path: Path) -> bool:
    """Whether the file holds what its name says."""
    return path.stem.rpartition("-")[2] == content_hash(path.read_bytes())


def make(wanted: tuple[Level, ...], folder: Path) -> list[Path]:
    """A library for each level, in the folder, which must be there; a level that the compiler does not know is left out.

    Raises RuntimeError where there is no C++ compiler, or it makes none of them; OSError where the folder cannot be written.
    """
    compiler = find_compiler()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda level: _make(compiler, level, folder), wanted))
    paths = [path for path in found if isinstance(path, Path)]
    if not paths:
        raise RuntimeError("\n".join(map(str, found)))
    return paths


def find_compiler() -> list[str]:
    """The command that starts it: $CXX, else what is on the path. Raises RuntimeError where there is none."""
    if named := shlex.split(os.environ.get("CXX", "")):
        candidates = [named]
    else:
        candidates = [["c++"], ["g++"], ["clang++"]]
    for command in candidates:
        if found := shutil.which(command[0]):
            return [found, *command[1:]]
    names = ", ".join(command[0] for command in candidates)
    raise RuntimeError(f"the compiled form of nearest code needs a C++ compiler, and there is none: looked for {names} (CXX names another)")


def content_hash(content: bytes) -> str:
    """Of a file, as names carry it."""
    return hashlib.blake2b(content, digest_size=12).hexdigest()


def _make(compiler: list[str], level: Level, folder: Path) -> Path | str:
    """The finished library, or the complaint of the compiler."""
    with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as scratch:
        result = Path(scratch) / "compiled.so"
        command = [*compiler, *FLAGS, *level.flags, str(SOURCE), "-o", str(result)]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            return f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}"
        path = folder / f"compiled-{level.name}-{_origin(level)}-{content_hash(result.read_bytes())}.so"
        os.replace(result, path)  # whole or absent, whoever else builds
        return path


def _origin(level: Level) -> str:
    """What a library was made from and for. Not the compiler: asking it costs more than a search may, and what it made has its own hash."""
    made_for = (FLAGS, level.flags, platform.system(), platform.machine(), _processor() if level.name == "native" else ())
    return content_hash(SOURCE.read_bytes() + repr(made_for).encode())


def _processor_flags() -> frozenset[str]:
    return frozenset(flag for line in _processor() if line.startswith("flags") for flag in line.partition(":")[2].split())


def _processor() -> tuple[str, ...]:
    """What tells processors apart for which different instructions may be chosen. A kernel without a register's state hides its flag."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            first = list(iter(lines.readline, "\n"))
    except OSError:
        return (platform.processor(),)
    told = ("vendor_id", "cpu family", "model", "flags", "CPU ", "Features")
    return tuple(line.strip() for line in first if line.startswith(told) and not line.startswith("cpu MHz"))
