"""Use the wheel as installed in a folder of its own: import, version, contents, public names and command line."""

from __future__ import annotations

import os
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


def main(site: Path) -> None:
    source = Path(__file__).resolve().parent.parent / "src" / "vqkit"
    installed = _files(site / "vqkit")
    if installed != _files(source):
        sys.exit(f"wheel and source tree differ in {sorted(installed ^ _files(source))}")
    (metadata,) = site.glob("vqkit-*.dist-info")
    version = _run("-I", "-c", PROBE.format(site=str(site))).strip()
    if metadata.name != f"vqkit-{version}.dist-info":
        sys.exit(f"the package says version {version}, its metadata {metadata.name}")
    help_text = _run(str(site / "bin" / "vqkit"), "--help", environment={"PYTHONPATH": str(site)})
    if "train" not in help_text:
        sys.exit(f"vqkit --help does not name its commands:\n{help_text}")
    print(f"wheel: vqkit {version}, {len(installed)} files, import and command line work from {site.name}/")


def _files(package: Path) -> set[str]:
    return {str(p.relative_to(package)) for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts}


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
