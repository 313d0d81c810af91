"""What a fresh interpreter loads: nothing foreign for the package and its help, no extra for its public names, no side effect."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# The modules that a snippet added, without those that the interpreter had at its start.
_FOREIGN = """
import json, sys
start = set(sys.modules)
{snippet}
added = {{name.split(".")[0] for name in set(sys.modules) - start}}
print(json.dumps(sorted(added - sys.stdlib_module_names - {{"vqkit"}})), file=sys.stderr)
"""


def run_cold(code: str, *, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`code` in an interpreter of its own, where warnings are errors."""
    # What the compiler of this very process may have set would hide that an import sets it.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCH")}
    command = [sys.executable, "-I", "-W", "error", "-c", code]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def foreign(snippet: str) -> tuple[list[str], str]:
    """Foreign packages that `snippet` loads, and what it prints."""
    result = run_cold(_FOREIGN.format(snippet=snippet))
    assert result.returncode == 0, result.stderr
    return json.loads(result.stderr.splitlines()[-1]), result.stdout


def helped(*words: str) -> tuple[list[str], str]:
    """As `foreign`, for the command `vqkit WORDS`."""
    return foreign(
        f"import runpy\nsys.argv = {['vqkit', *words]!r}\n"
        "try:\n    runpy.run_module('vqkit', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "else:\n    raise AssertionError('the command did not end with an exit code')"
    )


def test_the_probe_sees_what_is_loaded() -> None:
    assert foreign("import numpy")[0] == ["numpy"]
    assert "torch" in foreign("import vqkit.dist")[0]


def test_importing_the_package_loads_nothing_foreign() -> None:
    assert foreign("import vqkit; assert vqkit.__version__; dir(vqkit)")[0] == []


def test_configurations_and_recipes_load_nothing_foreign() -> None:
    source = Path(__file__).resolve().parents[2] / "src"
    found = [*source.rglob("config.py"), source / "vqkit" / "files.py", *(source / "vqkit" / "recipes").glob("*.py")]
    names = sorted(".".join(p.relative_to(source).with_suffix("").parts).removesuffix(".__init__") for p in found)
    assert len(names) >= 8
    assert foreign("import " + ", ".join(names))[0] == []


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["train", "quickstart", "--help"], ["--version"]], ids=" ".join)
def test_help_needs_no_torch(words: list[str]) -> None:
    loaded, printed = helped(*words)
    assert not {"torch", "numpy", "matplotlib", "safetensors"} & set(loaded)
    assert "vqkit" in printed


def test_public_names_need_no_extra_and_change_nothing() -> None:
    result = run_cold(_PUBLIC_NAMES)
    assert result.returncode == 0, result.stderr
    report: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    assert report["changed"] == []
    assert report["missing"] == []
    assert report["hidden"] == []
    assert len(report["packages"]) >= 10


# Every name of every package, while the extras cannot be imported and nothing may ask for a device or seed a generator.
_PUBLIC_NAMES = """
import importlib, json, os, pkgutil, random, sys
for extra in ("tyro", "rich", "matplotlib", "pytest", "hypothesis", "triton", "msgpack", "huggingface_hub", "sentencepiece", "PIL"):
    sys.modules[extra] = None
import numpy, torch

def state():
    return {
        "environment": dict(os.environ), "threads": torch.get_num_threads(), "dtype": str(torch.get_default_dtype()),
        "grad": torch.is_grad_enabled(), "deterministic": torch.are_deterministic_algorithms_enabled(),
        "torch rng": torch.get_rng_state().tolist(), "random": hash(random.getstate()), "numpy": numpy.random.get_state()[1].tolist(),
        "device asked for": asked,
    }

asked = []
for name in ("is_available", "device_count", "init", "get_device_properties"):
    setattr(torch.cuda, name, lambda *a, _name=name, **k: asked.append(_name))
before = json.dumps(state())
import vqkit
packages = ["vqkit"] + [m.name for m in pkgutil.walk_packages(vqkit.__path__, "vqkit.") if m.ispkg]
missing, hidden = [], []
for package in map(importlib.import_module, packages):
    for name in getattr(package, "__all__", ()):
        try:
            getattr(package, name)
        except Exception as error:
            missing.append(f"{package.__name__}.{name}: {type(error).__name__}: {error}")
        if name not in dir(package):
            hidden.append(f"{package.__name__}.{name}")
    try:
        package.no_such_name
    except AttributeError as error:
        if package.__name__ not in str(error) or "no_such_name" not in str(error):
            missing.append(f"{package.__name__}: {error}")
after, before = state(), json.loads(before)
print(json.dumps({"missing": missing, "hidden": hidden, "packages": packages, "changed": [k for k in after if after[k] != before[k]]}))
"""


def test_the_documented_names_are_public() -> None:
    import vqkit

    documented = {"TransformerVQ", "ModelConfig", "LearnableVQ", "CodebookConfig", "RunConfig", "load", "nearest_code", "vq_attention"}
    documented |= {"update_codebooks_", "add_statistics_", "train", "generate", "__version__"}
    assert documented <= set(vqkit.__all__) <= set(dir(vqkit))
    assert callable(vqkit.train.train)
    assert callable(vqkit.generate.generate)


def test_a_warning_is_an_error(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getini("filterwarnings")[0] == "error"
