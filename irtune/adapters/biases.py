"""Biases of a layer, for the types that train them."""

from collections.abc import Callable

import torch
from torch import nn

from irtune.anatomy import is_linear


def layer_biases(layer: nn.Module, wanted: Callable[[str], bool] = lambda name: True) -> list[nn.Parameter]:
    """The biases of those modules of `layer` whose name is `wanted`.

    A model without any (Llama and its relatives have none) gets one of zeros in every wanted linear module, which
    changes nothing until it is trained.
    """
    if not any(name.rpartition(".")[2] == "bias" for name, _ in layer.named_parameters()):
        for name, module in layer.named_modules():
            if is_linear(module) and wanted(name):
                weight = module.weight
                module.bias = nn.Parameter(torch.zeros(module.out_features, dtype=weight.dtype, device=weight.device))
    return [
        parameter
        for name, parameter in layer.named_parameters()
        if name.rpartition(".")[2] == "bias" and wanted(name.rpartition(".")[0])
    ]
