"""Where the first number that is not finite arises. Runs when training stops on it, so it may be slow."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from irtune.adapters import LayerTable
from irtune.engine import Engine

Places = list[tuple[str, torch.Tensor]]  # where, and 0-d bool: all finite


def find_origin(engine: Engine, batch: dict[str, torch.Tensor]) -> str | None:
    """The place of the first number that is not finite, such as "the output of layer 3"; None where all are finite.

    Forward from the bottom, then backward from the top. All ranks must call it equally often.
    """
    forward: Places = []
    backward: Places = []
    with _constants(engine.table), _watched(engine.table.modules, forward, backward):
        loss = engine.mean_loss(batch)
        forward.append(("the head or the loss", torch.isfinite(loss.detach())))
        if loss.requires_grad:
            loss.backward()
    return next((place for place, finite in forward + backward if not bool(finite)), None)


@contextlib.contextmanager
def _constants(table: LayerTable) -> Iterator[None]:
    """No gradients for parameters: ZeRO must not take these for a step's."""
    trained = [parameter for _, parameter in table.all() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def _watched(modules: list[nn.Module], forward: Places, backward: Places) -> Iterator[None]:
    """Note the input of the first layer, every layer's output, and the gradients of the outputs."""

    def enter(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        hidden = args[0] if args else kwargs["hidden_states"]
        forward.append(("the embeddings", torch.isfinite(hidden.detach()).all()))
        hidden = hidden.detach().requires_grad_(True)  # so that gradients reach every layer
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    def leave(number: int):
        def hook(_module: nn.Module, _args: tuple, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            forward.append((f"the output of layer {number}", torch.isfinite(hidden.detach()).all()))

            def see(gradient: torch.Tensor) -> None:
                backward.append((f"the gradient of layer {number}'s output", torch.isfinite(gradient).all()))

            hidden.register_hook(see)

        return hook

    with contextlib.ExitStack() as cleanup:
        cleanup.callback(modules[0].register_forward_pre_hook(enter, with_kwargs=True).remove)
        for number, module in enumerate(modules):
            cleanup.callback(module.register_forward_hook(leave(number)).remove)
        yield
