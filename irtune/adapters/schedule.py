"""What some adapter types decide while they train: heads, indices, ranks.

A decision follows from whole tensors, which are the same on all ranks, and from generators seeded by the run; ranks
compare what they decided, and checkpoints and the adapter's folder keep it.
"""

import contextlib
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

# Whole fp32 tensors of a layer by name, `PARAMETER`, `PARAMETER/exp_avg` and `PARAMETER/exp_avg_sq`, to be changed in
# place, and how many steps Adam has made there -> how many it shall believe to have made.
Change = Callable[[dict[str, torch.Tensor], float], float]


class AddGradient(torch.autograd.Function):
    """A tensor whose gradient has another one, that of a penalty, added; so a penalty needs no way to the loss."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        """The tensor itself."""
        ctx.save_for_backward(added)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """The loss's gradient, and the penalty's."""
        return gradients[0] + ctx.saved_tensors[0], None


class Deciding(nn.Module):
    """A module some of whose tensors are decisions. decisions: their names, in every module of the class the same."""

    decisions: tuple[str, ...] = ()


class Editor(Protocol):
    """What a decision needs of the engine."""

    selected: list[int]

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per optimizer step on this rank."""

    def edit(self, layer: int, change: Change) -> None:
        """Change the tensors of a layer that trains. Collective."""

    @property
    def gradient_factor(self) -> float:
        """What the gradient of a micro-batch must be multiplied with to be that of its mean loss."""


class Schedule:
    """Decides nothing. Steps are optimizer steps, counted from 1."""

    # All layers train, and none are chosen, until `decide` has made it False.
    trains_all = False

    def layers(self) -> list[int] | None:
        """The layers among which is chosen once it is not all of them any more; None: those with parameters."""
        return None

    def watching(self, step: int, engine: Editor) -> contextlib.AbstractContextManager[None]:
        """Around the forward and backward pass of each micro-batch of `step`."""
        return contextlib.nullcontext()

    def is_due(self, step: int) -> bool:
        """Whether something is decided after `step`."""
        return False

    def decide(self, step: int, engine: Editor) -> None:
        """Decide, after the update of `step`. Collective."""
