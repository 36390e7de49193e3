"""Imports bitsandbytes before peft does, without torch's compiler: a run starts a second earlier.

bitsandbytes hands some functions to torch.compile when it is imported, which loads Inductor, though few runs call
one of them. Here they are handed over when they are first called. Nothing depends on this module: where peft was
imported before it, only the second is lost.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch


def _compile_when_called(function: Callable | None = None, **options: Any) -> Callable:
    """torch.compile, put off to the first call."""
    if function is None:
        return functools.partial(_compile_when_called, **options)
    compiled: list[Callable] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not compiled:
            compiled.append(torch.compile(function, **options))
        return compiled[0](*args, **kwargs)

    return call


_compile = torch.compile
torch.compile = _compile_when_called  # type: ignore[assignment]
try:
    import bitsandbytes  # noqa: F401
finally:
    torch.compile = _compile
