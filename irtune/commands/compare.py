"""`python -m irtune compare`."""

from irtune.compare import compare as main

__all__ = ["main"]
