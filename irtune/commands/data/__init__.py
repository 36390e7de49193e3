"""`python -m irtune data WHAT`: what a corpus holds, and better corpora made of it. A module each."""

import importlib
from collections.abc import Sequence

from irtune.errors import ConfigError

# What is asked for -> module of this package, with a function `main(arguments) -> exit status`.
PARTS = {"stats": "stats", "baseline": "stats", "curate": "curate", "terms": "terms", "select": "select"}


def main(arguments: Sequence[str]) -> int:
    """Hand over to the part that is asked for first; options before its name are those of stats and baseline.

    Raises:
        ConfigError: for a part that does not exist.
    """
    what = arguments[0] if arguments else ""
    if what.startswith("-"):
        module, rest = "stats", arguments
    elif what in PARTS:
        module = PARTS[what]
        rest = arguments if module == "stats" else arguments[1:]
    else:
        said = f"{what[:100]!r} is not a part of data" if what else "data needs to be told what to do"
        raise ConfigError(f"{said}; accepted: {', '.join(PARTS)} (python -m irtune data --help says more)")
    return importlib.import_module(f"{__name__}.{module}").main(rest)
