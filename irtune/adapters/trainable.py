"""What every kind of adapter does at its end: make its parameters and the head, and nothing else, trainable."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from irtune.adapters.linear import compute_in_input_dtype
from irtune.config.schema import AdapterConfig
from irtune.models import Classifier
from irtune.models.anatomy import is_linear


def freeze(model: nn.Module) -> None:
    """Make every parameter a constant."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def head_modules(classifier: Classifier) -> list[nn.Module]:
    """The modules that train besides the layers."""
    return [classifier.model.get_submodule(name) for name in classifier.anatomy.head]


def train_with_head(classifier: Classifier, adapter: AdapterConfig, parameters: Iterable[nn.Parameter]) -> None:
    """Make `parameters` and the head trainable, all in the number format that `adapter.dtype` says."""
    heads = head_modules(classifier)
    frozen = next(p.dtype for p in classifier.model.parameters() if p.is_floating_point() and p.dtype != torch.uint8)
    for parameter in [*parameters, *(p for head in heads for p in head.parameters())]:
        parameter.requires_grad_(True)
        parameter.data = parameter.data.to(torch.float32 if adapter.dtype == "float32" else frozen)
    if adapter.dtype == "float32":
        for head in heads:
            compute_in_input_dtype(head)


def layer_list(classifier: Classifier) -> list[nn.Module]:
    """The L layer modules."""
    return list(classifier.model.get_submodule(classifier.anatomy.layers).children())


def layer_biases(layer: nn.Module) -> list[nn.Parameter]:
    """The biases of the modules of `layer`.

    A model without any (Llama and its relatives have none) gets one of zeros in every linear module, which changes
    nothing until it is trained.
    """
    if not any(name.rpartition(".")[2] == "bias" for name, _ in layer.named_parameters()):
        linears: list[Any] = [module for module in layer.modules() if is_linear(module)]
        for module in linears:
            weight = module.weight
            module.bias = nn.Parameter(torch.zeros(module.out_features, dtype=weight.dtype, device=weight.device))
    return [parameter for name, parameter in layer.named_parameters() if name.rpartition(".")[2] == "bias"]
