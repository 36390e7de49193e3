"""`python -m irtune COMMAND`, which an installed irtune also has as the program `irtune`."""

import sys

from irtune.cli import main


def script() -> int:
    """The program `irtune`."""
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(script())
