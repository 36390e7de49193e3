"""The table of what can be trained: per layer, and the head. Everything else in the model is a constant."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from irtune.adapters.schedule import Deciding
from irtune.distributed.partitioned import whole_shape
from irtune.errors import ModelError
from irtune.models.anatomy import Anatomy

Named = list[tuple[str, nn.Parameter]]


@dataclass
class LayerTable:
    """Trainable parameters by place.

    layers: for each of the L layers, its adapter parameters with their names in the model.
    head: parameters that always train.
    modules: the L layer modules themselves.
    decisions: tensors that hold what an adapter type decided: full name, module, and the tensor's name there.
    """

    layers: list[Named]
    head: Named
    modules: list[nn.Module]
    decisions: list[tuple[str, nn.Module, str]] = field(default_factory=list)

    def decided(self) -> list[tuple[str, torch.Tensor]]:
        """The tensors of `decisions` by full name, as they are now."""
        return [(name, getattr(module, own)) for name, module, own in self.decisions]

    def groups(self, layers: Iterable[int] | None = None) -> list[Named]:
        """Parameters of each of `layers` (None: of all that have any), and of the head."""
        chosen = range(self.num_layers) if layers is None else sorted(layers)
        return [*(self.layers[number] for number in chosen if self.layers[number]), self.head]

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    def all(self) -> Named:
        """Every parameter of the table, layer by layer, the head last."""
        return [item for layer in self.layers for item in layer] + self.head

    def head_bias(self, classes: int) -> nn.Parameter | None:
        """The bias that is added to logits of so many classes; None where the head has none, as decoders' own."""
        found = [p for name, p in self.head if name.endswith("bias") and whole_shape(p) == (classes,)]
        return found[-1] if found else None

    def set_trainable(self, selected: list[int]) -> None:
        """Gradients for the selected layers and the head; the other layers become constants."""
        for number, layer in enumerate(self.layers):
            for _, parameter in layer:
                parameter.requires_grad_(number in selected)
        for _, parameter in self.head:
            parameter.requires_grad_(True)


def build_table(model: nn.Module, anatomy: Anatomy, *, every_layer: bool = True) -> LayerTable:
    """Sort the parameters of `model` that require gradients into layers and head, which is what lies outside layers.

    Raises:
        ModelError: when there is a layer without a trainable parameter, and `every_layer` must have one.
    """
    layers: list[Named] = [[] for _ in range(anatomy.num_layers)]
    head: Named = []
    in_layer = re.compile(rf"(?:^|\.){re.escape(anatomy.layers)}\.(\d+)\.")
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        match = in_layer.search(name)
        (layers[int(match.group(1))] if match else head).append((name, parameter))
    empty = [number for number, layer in enumerate(layers) if not layer]
    if empty and every_layer:
        raise ModelError(f"no adapter in layers {empty}: adapter.target_modules does not reach them")
    suffix = f".{anatomy.layers}"
    lists = [module for name, module in model.named_modules() if f".{name}".endswith(suffix)]
    decisions: list[tuple[str, nn.Module, str]] = [
        (f"{name}.{own}", module, own)
        for name, module in model.named_modules()
        if isinstance(module, Deciding)
        for own in module.decisions
    ]
    return LayerTable(layers, head, list(lists[0].children()), decisions)
