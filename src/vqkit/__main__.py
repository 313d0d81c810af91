"""`python -m vqkit` is the command `vqkit`."""

import sys

from vqkit.cli import main

if __name__ == "__main__":
    sys.exit(main())
