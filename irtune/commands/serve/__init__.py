"""`python -m irtune serve`: a finished run that answers over HTTP."""

from irtune.commands.serve.command import main

__all__ = ["main"]
