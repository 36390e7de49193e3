"""Where the parts of a sequence classifier are: transformer layers, head, attention output projections.

Layers are found from the module tree, not from a table of architectures: they are the `ModuleList` that holds most
parameters. The head is everything outside the pretrained body, plus whatever the pretrained files did not contain.
"""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from irtune.distributed.partitioned import is_partitioned, whole
from irtune.errors import ModelError
from irtune.models.weights import elements, plain_weight

log = logging.getLogger(__name__)
ATTENTION_NAMES = ("attn", "attention")


@dataclass(frozen=True)
class Anatomy:
    """Names of a classifier's parts, as `named_modules()` of the model without adapters spells them.

    layers: the list of transformer layers; layer 3 is `{layers}.3`.
    num_layers: L.
    head: modules that are trained besides the layers, the classification head first.
    """

    layers: str
    num_layers: int
    head: tuple[str, ...]


def find_anatomy(model: nn.Module, missing: Collection[str] = ()) -> Anatomy:
    """Find layers and head of `model`.

    Args:
        model: a sequence classifier of transformers without adapters.
        missing: names of parameters that the pretrained files did not contain and that are random now.

    Raises:
        ModelError: when the model has no list of layers or no head.
    """
    best, size = "", 0
    for name, module in model.named_modules():
        count = sum(elements(parameter) for parameter in module.parameters())
        # Outer lists come first, so that a list inside a layer (experts) never beats the list of layers.
        if isinstance(module, nn.ModuleList) and count > size:
            best, size = name, count
    if not best:
        raise ModelError(f"{type(model).__name__} has no list of transformer layers")
    body = getattr(model, "base_model_prefix", "")
    head = [name for name, child in model.named_children() if name != body and any(True for _ in child.parameters())]
    for name in sorted(missing):
        owner = name.rpartition(".")[0]
        if not any(owner == part or owner.startswith(f"{part}.") for part in head):
            log.warning("%s is not in the pretrained files: it starts random and is trained with the head", owner)
            head.append(owner)
    if not head:
        raise ModelError(f"{type(model).__name__} has no classification head outside {body!r}")
    return Anatomy(best, len(list(model.get_submodule(best).children())), tuple(dict.fromkeys(head)))


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a matrix product that can get an adapter (GPT-2's Conv1D is one too)."""
    return isinstance(module, nn.Linear | Conv1D)


def attention_linears(layer: nn.Module) -> list[nn.Module]:
    """The linear modules of a layer's attention, in order: the output projection is the last."""
    return [
        module
        for name, module in layer.named_modules()
        if is_linear(module) and any(word in name.lower() for word in ATTENTION_NAMES)
    ]


def linear_names(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """Names of the linear modules inside one layer, for example `self_attn.q_proj`, in order."""
    names: dict[str, None] = {}
    for layer in model.get_submodule(anatomy.layers).children():
        names |= {name: None for name, module in layer.named_modules() if is_linear(module)}
    return list(names)


def weight_names(model: nn.Module, anatomy: Anatomy, dims: tuple[int, ...] = (2, 3)) -> list[str]:
    """Names of the weights inside one layer that no linear module holds, such as `mlp.experts.gate_up_proj`.

    `dims`: how many dimensions they may have; 3 for stacks of matrices, which experts are.
    """
    names: dict[str, None] = {}
    for layer in model.get_submodule(anatomy.layers).children():
        for owner, module in layer.named_modules():
            if is_linear(module) or isinstance(module, nn.Embedding | nn.Conv1d):
                continue
            for name, parameter in module.named_parameters(recurse=False):
                if len(getattr(parameter, "ds_shape", parameter.shape)) in dims:
                    names[f"{owner}.{name}" if owner else name] = None
    return list(names)


class PlainWeights(Sequence[torch.Tensor]):
    """Weights of linear modules; those that are quantised or partitioned are made plain one at a time, when asked for.

    Collective where they are partitioned.
    """

    def __init__(self, modules: Sequence[nn.Module]):
        self.modules = modules

    def __len__(self) -> int:
        return len(self.modules)

    def __getitem__(self, place: Any) -> Any:
        """The weight at `place`, a number."""
        module = self.modules[place]
        with whole(module.parameters(recurse=False)):
            weight = plain_weight(module)
            return weight.detach().clone() if is_partitioned(weight) else weight


def output_projections(model: nn.Module, anatomy: Anatomy) -> Sequence[torch.Tensor]:
    """Weight of each layer's attention output projection: the last linear module of its attention, L tensors.

    Raises:
        ModelError: when a layer has no attention with linear modules.
    """
    modules = []
    for number, layer in enumerate(model.get_submodule(anatomy.layers).children()):
        inside = attention_linears(layer)
        if not inside:
            raise ModelError(f"layer {number} has no attention output projection; use another tuning.score than weight")
        modules.append(inside[-1])
    return PlainWeights(modules)
