"""Use a wheel as installed in a folder of its own: import, version, contents, public names, command line and compiled form.

The folder holds the wheel and what was installed of it, site/. A wheel for this platform has to bring libraries, and this machine has to
run one of them; a pure one has none, and a wheel is pure only where there is no compiler.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PROBE = """
import sys
sys.path.insert(0, {site!r})
import vqkit
if not vqkit.__file__.startswith({site!r}):
    sys.exit(f"imported {{vqkit.__file__}}, not the wheel")
for name in vqkit.__all__:
    getattr(vqkit, name)
print(vqkit.__version__)
"""

NEAREST = """
import os, sys
sys.path.insert(0, {site!r})
import torch
from vqkit.ops.nearest_code import compiled, nearest_codes, nearest_index
from vqkit.quantizers import VectorQuantize
if compiled.is_there() != {expected}:
    sys.exit(f"the compiled form is there: {{compiled.is_there()}}, must be {expected}")
loaded = os.path.dirname(compiled._found()._name) if {expected} else ""
if {expected} and loaded != {site!r} + "/vqkit/ops/nearest_code":
    sys.exit(f"the library comes from {{loaded}}, not from the wheel")
x, codes = torch.randn(2, 700, 19) + 50, torch.randn(2, 300, 19) + 50
distance = torch.cdist(x.double(), codes.double(), compute_mode="donot_use_mm_for_euclid_dist").sort(-1)
right = [torch.equal(nearest_index(x, codes), distance.indices[..., 0])]
right += [torch.equal(nearest_codes(x, codes, 3).indices, distance.indices[..., :3])]
if not all(right):
    sys.exit("the nearest codes are others")
quantized, indices, loss = VectorQuantize(19, 300)(x.requires_grad_())
(quantized.sum() + loss).backward()
if x.grad is None or not x.grad.isfinite().all():
    sys.exit("no gradient")
"""


def main(folder: Path) -> None:
    source, site = Path(__file__).resolve().parent.parent / "src" / "vqkit", folder / "site"
    (wheel,) = folder.glob("*.whl")
    libraries = list(site.rglob("*.so"))
    pure = wheel.name.endswith("-py3-none-any.whl")
    if pure == bool(libraries) or pure != (folder.name == "pure" or not any(map(shutil.which, ("c++", "g++", "clang++")))):
        sys.exit(f"{wheel.name} brings {len(libraries)} libraries")
    installed = _files(site / "vqkit")
    if installed != _files(source):
        sys.exit(f"wheel and source tree differ in {sorted(installed ^ _files(source))}")
    (metadata,) = site.glob("vqkit-*.dist-info")
    version = _run("-I", "-c", PROBE.format(site=str(site))).strip()
    if metadata.name != f"vqkit-{version}.dist-info":
        sys.exit(f"the package says version {version}, its metadata {metadata.name}")
    _run(
        "-I",
        "-c",
        NEAREST.format(site=str(site), expected=not pure),
        environment={"VQKIT_CACHE": str(folder / "none"), "VQKIT_COMPILED": "1"},
    )
    help_text = _run(str(site / "bin" / "vqkit"), "--help", environment={"PYTHONPATH": str(site)})
    if "train" not in help_text:
        sys.exit(f"vqkit --help does not name its commands:\n{help_text}")
    print(f"{wheel.name}: {len(installed)} files, {len(libraries)} libraries; import, quantizers and command line work")


def _files(package: Path) -> set[str]:
    """All but what was compiled."""
    found = (p for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts and p.suffix != ".so")
    return {str(p.relative_to(package)) for p in found}


def _run(*arguments: str, environment: dict[str, str] | None = None) -> str:
    """What this interpreter prints for `arguments`, started in an empty folder."""
    with tempfile.TemporaryDirectory() as empty:
        result = subprocess.run(
            [sys.executable, *arguments], cwd=empty, env={**os.environ, **(environment or {})}, capture_output=True, text=True
        )
    if result.returncode:
        sys.exit(f"{' '.join(arguments[:2])} failed from the wheel:\n{result.stdout}{result.stderr}")
    return result.stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
