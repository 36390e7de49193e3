"""`python -m irtune report`: one self-contained page about a run, or about several side by side."""

from irtune.commands.report.command import main, write_page

__all__ = ["main", "write_page"]
