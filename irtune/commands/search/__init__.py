"""Settings by trials: the best dev metric for the least cost.

trials.py proposes what to try and keeps what became of it; report.py and picture.py write what comes out; command.py is
`python -m irtune search`.
"""

from irtune.commands.search.command import search as main

__all__ = ["main"]
