"""A model of few bits that computes in fp32 for a while, with the weights that it has."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from irtune.models.weights import elements

AT_ONCE = 250e6  # numbers that are widened together, 1 GB of them: a small model, or a layer of a large one


@contextlib.contextmanager
def in_fp32(model: nn.Module) -> Iterator[None]:
    """Inside, `model` computes in fp32, in place: what is left of a difference is not rounding.

    Weights are widened while the part of the model that holds them runs, so that no second copy of a large model is
    ever there. Not for quantised or partitioned weights.
    """
    narrow: dict[torch.Tensor, torch.Tensor] = {}  # what was widened, and what it was
    handles: list[Any] = []

    def widen(part: nn.Module, given: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        for tensor in [*part.parameters(), *part.buffers()]:
            if tensor not in narrow and _is_narrow(tensor):
                narrow[tensor], tensor.data = tensor.data, tensor.data.float()
        return tuple(map(_wide, given)), {name: _wide(value) for name, value in named.items()}

    def restore(*_: Any) -> None:
        for tensor, data in narrow.items():
            tensor.data = data
        narrow.clear()

    try:
        for part in _parts(model):
            handles.append(part.register_forward_pre_hook(widen, with_kwargs=True))
            handles.append(part.register_forward_hook(restore, always_call=True))
        for table in model.modules():
            if isinstance(table, nn.Embedding):  # too large to widen for a few rows
                handles.append(table.register_forward_hook(lambda _table, _given, rows: _wide(rows)))
        yield
    finally:
        restore()
        for handle in handles:
            handle.remove()


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The largest parts that can be widened at once, which are called."""
    called = not isinstance(module, nn.ModuleList | nn.ModuleDict)
    if called and sum(map(elements, module.parameters())) <= AT_ONCE:
        yield module
        return
    for child in module.children():
        if not isinstance(child, nn.Embedding):
            yield from _parts(child)


def _is_narrow(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype.itemsize < 4


def _wide(value: Any) -> Any:
    return value.float() if _is_narrow(value) else value
