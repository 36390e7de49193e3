"""Versions of the packages that decide what a run computes."""

import platform
from importlib import metadata

from irtune import __version__

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "datasets", "numpy", "safetensors", "tensorboard")


def versions() -> dict[str, str]:
    """Versions of irtune, of Python, and of the packages that decide what a run computes."""
    return {"irtune": __version__, "python": platform.python_version()} | {
        name: metadata.version(name) for name in PACKAGES
    }
