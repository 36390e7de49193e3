"""DeepSpeed: the engine, and optimizer state for the selected layers only."""

from irtune.engine.engine import Engine

__all__ = ["Engine"]
