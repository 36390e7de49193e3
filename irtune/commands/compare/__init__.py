"""Methods, adapters, corpora and seeds side by side: one table, one picture, one significance test.

grid.py says which runs; launch.py makes one; linear.py is the row that is always there; report.py, significance.py and
picture.py write what comes out; command.py is `python -m irtune compare`.
"""

from irtune.commands.compare.command import compare as main

__all__ = ["main"]
