"""`python -m irtune export`: an adapter, a merged model or an ONNX graph for others to use, each with its card."""

from irtune.commands.export.command import main

__all__ = ["main"]
