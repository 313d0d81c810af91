"""Puts the compiled form of nearest code into the wheel; without a C++ compiler the wheel is a pure one, and works as well, slower."""

from __future__ import annotations

import importlib.util
import os
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PLACE = "src/vqkit/ops/nearest_code"


class LibrariesHook(BuildHookInterface):
    """Of a wheel: all levels of this platform. Of an editable install: the best level of this machine, beside its source."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Make the libraries and tell what the wheel now is."""
        libraries = _load(Path(self.root) / PLACE / "libraries.py")
        editable = version == "editable"
        self.scratch = tempfile.TemporaryDirectory(prefix="vqkit-")
        wanted = libraries.levels()
        if editable:
            wanted = tuple(level for level in wanted if libraries.is_runnable(level))[:1]
            for stale in libraries.FOLDER.glob("compiled-*.so"):
                stale.unlink()
        try:
            if os.name != "posix":
                raise RuntimeError(f"it is not made for {sysconfig.get_platform()}")
            if os.environ.get("VQKIT_COMPILED") == "0":
                raise RuntimeError("VQKIT_COMPILED=0 asks for that")
            paths = libraries.make(wanted, libraries.FOLDER if editable else Path(self.scratch.name))
        except (OSError, RuntimeError) as error:
            self.app.display_warning(f"vqkit is built without its compiled form: {str(error).splitlines()[0]}")
            return
        if not editable:
            build_data["force_include"] |= {str(path): f"vqkit/ops/nearest_code/{path.name}" for path in paths}
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Leave nothing behind."""
        self.scratch.cleanup()


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("vqkit_libraries", path)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"{path} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
