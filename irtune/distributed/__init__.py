"""Ranks and nodes. Empty: launch scripts import from this room without torch."""
