"""The repository speaks of the product alone: no path of a machine, no host of a package registry, no name told twice."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = {".py", ".md", ".toml", ".txt", ".json", ".jsonl", ".cfg", ".yml", ".yaml", ".sh", ".csv", ""}

# Written in parts, so that this file is no exception to its own rule.
FORBIDDEN = [
    re.compile(r"(?<![\w.])/" + folder + r"/[\w.-]+") for folder in ("root", "home", "Users", "work", "opt", "workspace", "mnt", "var/lib")
]
FORBIDDEN += [re.compile(r"\b[A-Z]:\\\\?" + "Users"), re.compile(r"\.\./" + "shared")]
FORBIDDEN += [
    re.compile(re.escape(host))
    for host in ("pypi" + ".org", "python" + "hosted", "download.py" + "torch", "ana" + "conda.org", "arti" + "factory")
]


def tracked() -> list[Path]:
    """The files of the repository; where there is no git, as in an unpacked archive, all that are no build output."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    outputs = {".venv", "build", "dist", "runs", "__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis"}
    return [p for p in ROOT.rglob("*") if p.is_file() and not outputs & set(p.relative_to(ROOT).parts)]


def forbidden(text: str) -> list[str]:
    return [match.group() for pattern in FORBIDDEN for match in pattern.finditer(text)]


def test_no_tracked_file_names_a_machine_or_a_registry() -> None:
    found = []
    for path in tracked():
        if path.suffix in TEXT and not ("golden" in path.parts and not path.suffix):  # official checkpoints have a name without one
            found += [f"{path.relative_to(ROOT)}: {words}" for words in forbidden(path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text", ["see /" + "home/anna/x.txt", "'/" + "root/.cache'", "https://" + "pypi" + ".org/simple", "copy ../" + "shared/golden"]
)
def test_a_planted_name_is_seen(text: str) -> None:
    assert forbidden(text)


@pytest.mark.parametrize("text", ["runs/home/x", "https://example.org/home", "src/work/x.py", "tmp_path / 'root'"])
def test_ordinary_paths_are_not_seen(text: str) -> None:
    assert not forbidden(text)


def test_names_of_test_files_are_unique_and_tests_are_no_package() -> None:
    names = Counter(p.name for p in tracked() if p.name.startswith("test_"))
    assert [n for n, count in names.items() if count > 1] == []
    assert not [p for p in tracked() if p.name == "__init__.py" and "tests" in p.relative_to(ROOT).parts]


def test_nothing_unreadable_is_tracked() -> None:
    """What is written to disk is safetensors, JSON, plain bytes or arrays of the official code; no large file slips in."""
    heavy = [str(p.relative_to(ROOT)) for p in tracked() if p.stat().st_size > 2_000_000 and "golden" not in p.parts]
    assert heavy == []
    assert not [p for p in tracked() if p.suffix in {".pkl", ".pickle", ".pt", ".pth", ".ckpt"}]
