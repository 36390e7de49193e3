"""The environment, read in this one place."""

import os
import socket


def variable(name: str, default: str) -> str:
    """Value of an environment variable, or `default`."""
    return os.environ.get(name, default)


def set_default(name: str, value: str) -> None:
    """Set an environment variable that nobody has set."""
    os.environ.setdefault(name, value)


def here() -> str:
    """Rank and host of this process, for messages."""
    return f"rank {variable('RANK', '0')} ({socket.gethostname()})"


def leave() -> None:
    """End this process at once, as failed: for threads, when the main one hangs."""
    os._exit(2)
