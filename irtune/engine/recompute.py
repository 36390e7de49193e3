"""Recomputing activations layer by layer (gradient checkpointing), only where it saves memory.

A layer below the lowest trained one stores nothing, so recomputing it would only cost time, and the reentrant kind,
which makes inputs require gradients, would drag it into the backward pass. A step that scores all layers reaches below:
there those layers are recomputed, so that scoring needs no more memory than training.
"""

import functools
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from irtune.adapters import LORA, AdapterTraits

# Largest share of a trained layer's activations that its input makes up, which is all that a recomputed layer stores.
INPUT = 1 / 8


class Recompute:
    """Says for every layer whether it is recomputed in the backward pass."""

    def __init__(self, modules: Sequence[nn.Module], *, reentrant: bool, always: bool, traits: AdapterTraits = LORA):
        """Take charge of the layers of a model.

        Args:
            modules: the L transformer layers, in order.
            reentrant: the kind of recomputation: ZeRO 3 needs the reentrant one, since the other kind meets parameters
                that are in pieces again.
            always: recompute trained layers in every step, not only what scoring adds.
            traits: whether gradients go below the lowest trained layer, how much frozen layers above it store, and
                whether a layer reads more than its input.
        """
        self.always, self.reentrant, self.traits = always, reentrant, traits
        # Layers of models that bring their own code may not know how; then scoring needs the memory of all layers.
        self.possible = not traits.connected and all(hasattr(module, "gradient_checkpointing") for module in modules)
        self.modules = list(modules) if self.possible else []
        for module in self.modules:
            module._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=reentrant)  # type: ignore
            if reentrant:
                module.register_forward_pre_hook(self._connect, with_kwargs=True)
        self.set_trained(())

    def set_trained(self, selected: Collection[int]) -> None:
        """From now on `selected` layers train, and gradients reach down to the lowest of them, or to all layers."""
        lowest = 0 if self.traits.below else min(selected, default=len(self.modules))
        self.selected, self.lowest = set(selected), min(lowest, len(self.modules))
        self._recompute(range(self.lowest, len(self.modules)) if self.always else ())

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """A pass in which the adapters of all layers get gradients, in no more memory than one without.

        In training, layers below the lowest trained one store nothing, and frozen ones above it less than all. So many
        layers are recomputed that the others store no more than that: the lowest, whose activations come back when
        those of the layers above are gone.
        """
        layers, trained = len(self.modules), len(self.selected)
        # In a training step, in trained layers' worth.
        stored = trained + self.traits.frozen * (layers - self.lowest - trained)
        lowest = math.ceil((layers - stored) / (1 - INPUT))
        self._recompute(range(layers if self.always else min(layers, lowest)))
        try:
            yield
        finally:
            self.set_trained(self.selected)

    def _recompute(self, layers: Collection[int]) -> None:
        for number, module in enumerate(self.modules):
            module.gradient_checkpointing = number in layers  # type: ignore[assignment]

    @staticmethod
    def _connect(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """A reentrant recomputation whose input needs no gradient gives its parameters none: let it need one."""
        hidden = args[0] if args else None
        trained = any(parameter.requires_grad for parameter in module.parameters())
        wanted = torch.is_grad_enabled() and module.training and module.gradient_checkpointing and trained
        if wanted and isinstance(hidden, torch.Tensor) and not hidden.requires_grad:
            return (hidden.detach().requires_grad_(True), *args[1:]), kwargs
        return None
