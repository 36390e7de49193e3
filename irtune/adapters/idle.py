"""Leave out updates that are zero: those of layers that never trained.

A LoRA update starts with B = 0, so W x + B A x = W x bit for bit until its layer first trains. IR-Tuning never trains
most layers, and the narrow products of A and B take far longer than their few operations suggest.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn


class IdleAdapters:
    """Switches the updates of layers that never trained off, and on where their gradients are asked for."""

    def __init__(self, layers: Sequence[nn.Module]):
        """Find those adapters of the L `layers` that add nothing before they train; other kinds are left alone."""
        self._idle: list[list[Any]] = [[part for part in layer.modules() if _adds_nothing(part)] for layer in layers]
        self.trained: set[int] = set()

    def has_trained(self, layers: Iterable[int]) -> None:
        """The updates of `layers` may be other than zero from now on; those of all other layers are left out."""
        self.trained |= set(layers)
        self._leave_out(True)

    @staticmethod
    def changed_by(
        tensors: Mapping[str, torch.Tensor], layers: Sequence[Sequence[tuple[str, nn.Parameter]]]
    ) -> list[int]:
        """Those of `layers`, given by their named parameters, whose updates `tensors` makes other than zero."""
        factors = {name for name, tensor in tensors.items() if "lora_B" in name and bool(tensor.any())}
        return [number for number, named in enumerate(layers) if any(name in factors for name, _ in named)]

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Inside, no update is left out: every adapter has gradients if it requires them."""
        left_out = [module.disable_adapters for modules in self._idle for module in modules]
        self._leave_out(False)
        try:
            yield
        finally:
            self._leave_out(any(left_out))

    def _leave_out(self, idle: bool) -> None:
        for number, modules in enumerate(self._idle):
            for module in modules:
                # peft's own switch for a forward pass without adapter; its setter would change requires_grad as well.
                module._disable_adapters = idle and number not in self.trained


def _adds_nothing(part: nn.Module) -> bool:
    """Whether `part` computes W x + s B A x with B = 0, and draws no random numbers (dropout) on the way."""
    if not isinstance(part, LoraLayer) or part.lora_variant or getattr(part, "holds_weight", False):
        return False
    dropped = any(not isinstance(dropout, nn.Identity) for dropout in part.lora_dropout.values())
    factors: list[Any] = list(part.lora_B.values())
    return not dropped and all(factor.weight.is_meta or not factor.weight.any() for factor in factors)
