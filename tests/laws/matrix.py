"""docs/laws.md, written from the family, the laws and the table of exceptions: python tests/laws/matrix.py"""

from __future__ import annotations

import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "laws.md"

HEAD = """# The laws of the quantizers

Every quantizer with every option (a row) is tried on every law (a column); `tests/laws/` has them, and this page is written from there by
`python tests/laws/matrix.py`. In the matrix a dot is a law that holds and is tested, a letter an exception of the table below, which is
tested too: it has to fail. A space says that the law is tried on some cases only, as its line tells. Numbers without another figure are
compared bit by bit.
"""


def page() -> str:
    """The whole text."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from laws.book import LAWS, exemption
    from laws.exceptions import EXCEPTIONS
    from laws.family import CASES

    letters = {id(e): _letter(i) for i, e in enumerate(EXCEPTIONS)}
    lines = [HEAD, "## The laws\n"]
    for number, law in enumerate(LAWS.values(), 1):
        scope = f" (cases: {law.scope})" if law.scope else ""
        lines.append(f"{number}. `{law.name}`: {law.says}{scope}.")
    lines += ["", "## The matrix\n", "```"]
    width = max(len(case.name) for case in CASES)
    for digit in (10, 1):
        lines.append(" " * width + "  " + " ".join(str(n // digit % 10) if n >= digit else " " for n in range(1, len(LAWS) + 1)))
    for case in CASES:
        cells = []
        for law in LAWS.values():
            exempt = exemption(case, law.name)
            cells.append(" " if case not in law.cases else letters[id(exempt)] if exempt else ".")
        lines.append(f"{case.name:{width}}  {' '.join(cells)}".rstrip())
    lines += ["```", "", "## Exceptions\n", "| | option | law | reason |", "|---|---|---|---|"]
    lines += [f"| {letters[id(e)]} | `{e.option}` | `{e.law}` | {e.reason} |" for e in EXCEPTIONS]
    return "\n".join(lines) + "\n"


def _letter(number: int) -> str:
    alphabet = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return alphabet[number]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
