"""The command `vqkit`: parse, one library call, exit code. All printing of the package lives here."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; `argv` are the words after `vqkit` (None: those of the process). Returns the exit code."""
    from vqkit.cli.app import run

    return run(argv)
