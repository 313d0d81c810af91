"""The table of deviations as it stands in docs/migration.md. Run as `python -m facade.migration` in tests/ it writes the table there."""

from __future__ import annotations

import re
from pathlib import Path

from facade.deviations import DEVIATIONS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "migration.md"
_HEAD = "| class | argument or call | there, and here | test |\n|---|---|---|---|\n"
_TABLE = re.compile(re.escape(_HEAD) + r"(?:\|.*\n)*")


def table() -> str:
    """One row a deviation, in the order of the table."""
    rows = []
    for row in DEVIATIONS:
        path, _, name = row.test.partition("::")
        link = f"[{name.removeprefix('test_').replace('_', ' ')}](../{path})"
        rows.append(f"| `{row.cls}` | `{row.option}` | {row.defect.replace('|', chr(92) + '|')} | {link} |\n")
    return _HEAD + "".join(rows)


def written() -> str:
    """The table of the page."""
    found = _TABLE.search(PAGE.read_text(encoding="utf-8"))
    return found.group() if found else ""


if __name__ == "__main__":
    PAGE.write_text(_TABLE.sub(lambda _: table(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
