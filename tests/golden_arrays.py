"""Access to tests/golden: arrays computed by the official Transformer-VQ, and a book of which keys tests read.

Groups of branch `main` go by their names, those of branch `optimized` as `optimized/GROUP`.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent / "golden" / "transformer_vq"
ROOTS = {"": ROOT, "optimized/": ROOT.with_name("transformer_vq_optimized")}

# (group/case glob, key glob, reason). Empty once the whole model is done.
DEFERRED: list[tuple[str, str, str]] = []

# Per group, how many arrays `GoldenCase.check` compares in a full run: a loop that silently ran over nothing shows here.
EXPECTED_COMPARED: dict[str, int] = {
    "attention": 3578,
    "checkpoint": 636,
    "generation": 158,
    "training": 2900,
    "transformer": 8504,
    "unit": 1070,
    "optimized/attention": 1839,
    "optimized/training": 178,
    "optimized/transformer": 1622,
}

_read: dict[str, set[str]] = defaultdict(set)
worst: dict[str, float] = defaultdict(float)  # per group.variant: largest error seen
compared: dict[str, int] = defaultdict(int)  # per group: number of arrays compared


def folder_of(group: str) -> Path:
    """The folder that holds the cases of a group."""
    branch = "optimized/" if group.startswith("optimized/") else ""
    return ROOTS[branch] / group.removeprefix(branch)


class GoldenCase:
    """One case of one variant: `case[key]` is a tensor, `case.meta` the description beside it."""

    def __init__(self, group: str, case: str, variant: str) -> None:
        self.group, self.case, self.variant = group, case, variant
        self.name = f"{group}/{case}.{variant}"
        folder = folder_of(group)
        with np.load(folder / f"{case}.{variant}.npz") as arrays:
            self._arrays = dict(arrays)
        self.meta = json.loads((folder / f"{case}.{variant}.json").read_text())
        self.config = self.meta.get("config", {})

    def __getitem__(self, key: str) -> torch.Tensor:
        _read[self.name].add(key)
        return torch.from_numpy(np.array(self._arrays[key]))

    def __contains__(self, key: str) -> bool:
        return key in self._arrays

    def keys(self, prefix: str = "") -> list[str]:
        return [k for k in self._arrays if k.startswith(prefix)]

    def tree(self, prefix: str) -> dict[str, torch.Tensor]:
        """All arrays below `prefix`, by the rest of their names."""
        return {k[len(prefix) :]: self[k] for k in self.keys(prefix)}

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.variant.startswith("f64") else torch.float32

    def check(self, key: str, actual: torch.Tensor | None) -> None:
        """Compare with the array: integers exactly, floats by max|a - b| / max(1, max|b|). A gradient that is None is no gradient."""
        assert actual is not None, f"{self.name} {key}: None"
        expected = self[key]
        compared[self.group] += 1
        assert tuple(actual.shape) == tuple(expected.shape), (
            f"{self.name} {key}: shape {tuple(actual.shape)}, golden {tuple(expected.shape)}"
        )
        if not expected.is_floating_point():
            assert torch.equal(actual.to(expected.dtype), expected), f"{self.name} {key}: integers differ"
            return
        a, b = actual.detach().double(), expected.double()
        assert torch.equal(a.isnan(), b.isnan()), f"{self.name} {key}: NaN in different places"
        a, b = a.nan_to_num(nan=0.0), b.nan_to_num(nan=0.0)
        error = ((a - b).abs().max() / b.abs().max().clamp(min=1.0)).item() if b.numel() else 0.0
        tolerance = self.tolerance(key)
        worst[f"{self.group}.{self.variant}"] = max(worst[f"{self.group}.{self.variant}"], error)
        assert error <= tolerance, f"{self.name} {key}: error {error:.3e} exceeds {tolerance:.1e}"

    def tolerance(self, key: str) -> float:
        # The official optimizer computes its schedule in float32.
        exact = 1e-8 if self.group == "optimized/training" else 1e-9
        fixed = {"f64hp": exact, "f64": 1e-6, "bf16": 3e-2}
        if self.variant in fixed:
            # Arrays that the official code leaves in float32 even in f64hp are good to 1e-6 only.
            narrow = self.meta["arrays"].get(key, {})
            narrow_type = narrow.get("dtype") if isinstance(narrow, dict) else str(narrow)
            return 1e-6 if self.variant == "f64hp" and str(narrow_type).startswith("float32") else fixed[self.variant]
        figure = _float32_accuracy(f"{self.group}/{self.case}", key)
        # The figures of train_lion are those of signs that differ between its two variants; ours differ from neither.
        return 8 * figure if figure and self.case != "train_lion" else 1e-5


def _float32_accuracy(case: str, key: str) -> float:
    """Largest float32 difference that accuracy.json has for the longest group name that the key starts with; 0 for none."""
    entry = _ACCURACY.get(case, {})
    groups = (entry.get("f32_vs_f64hp") or entry.get("f32_vs_f64") or {"groups": entry.get("groups", {})})["groups"]
    key = re.sub(r"^case_\d+/", "", key)  # the unit files hold several sub-cases under one entry
    best = max((g for g in groups if _matches(key, g)), key=len, default=None)
    return groups[best]["max_abs_diff"] if best else 0.0


def _matches(key: str, group: str) -> bool:
    return key == group or key.startswith(group + "/")


def _accuracy() -> dict:
    """The accuracy of float32 that comes with the arrays, by group/case."""
    entries: dict = {}
    for branch, root in ROOTS.items():
        entries |= {f"{branch}{case}": entry for case, entry in json.loads((root / "accuracy.json").read_text()).items()}
    return entries


_ACCURACY = _accuracy()


def cases(group: str, pattern: str = "*", variants: tuple[str, ...] | None = None) -> Iterator[GoldenCase]:
    """All cases of a group whose name matches, in a fixed order."""
    for path in sorted(folder_of(group).glob(f"{pattern}.*.npz")):
        case, variant = path.stem.rsplit(".", 1)
        if variants is None or variant in variants:
            yield GoldenCase(group, case, variant)


def case_ids(group: str, pattern: str = "*", variants: tuple[str, ...] | None = None) -> list[str]:
    """`CASE.VARIANT` names for parametrization, without opening a file."""
    names = (p.stem for p in sorted(folder_of(group).glob(f"{pattern}.*.npz")))
    return [n for n in names if variants is None or n.rsplit(".", 1)[1] in variants]


def load(group: str, case_id: str) -> GoldenCase:
    case, variant = case_id.rsplit(".", 1)
    return GoldenCase(group, case, variant)


def unread() -> list[str]:
    """Keys that no test of this process read and that no deferral covers."""
    return [f"{name} {key}" for name, key in _missing() if not any(_covers(d, name, key) for d in DEFERRED)]


def idle_deferrals() -> list[tuple[str, str, str]]:
    """Deferrals that cover no key: what they waited for is read by now."""
    missing = list(_missing())
    return [d for d in DEFERRED if not any(_covers(d, name, key) for name, key in missing)]


def _missing() -> Iterator[tuple[str, str]]:
    for branch, root in ROOTS.items():
        for path in sorted(root.glob("*/*.npz")):
            name = f"{branch}{path.parent.name}/{path.stem}"
            with np.load(path) as arrays:
                yield from ((name, key) for key in arrays.files if key not in _read[name])


def _covers(deferral: tuple[str, str, str], name: str, key: str) -> bool:
    return fnmatch(name, deferral[0]) and fnmatch(key, deferral[1])
