"""Tables as lines of text."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Lines of aligned columns, those that `left` numbers to the left, the others to the right. A header of empty cells is left out."""
    lines = [header, *rows] if any(header) else rows
    widths = [max(len(row[i]) for row in lines) for i in range(len(header))]
    cells = [[cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))] for row in lines]
    return "\n".join("  ".join(row).rstrip() for row in cells)
