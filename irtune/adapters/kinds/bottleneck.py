"""Bottleneck adapters: scale * f(x W_down) W_up, W_up zero at first, so that the model computes what it did before.

serial (Houlsby et al., ICML 2019): on the output of the attention and of the feed-forward block, before the residual
connection. parallel (He et al., ICLR 2022): beside the feed-forward block, from its input to its output.
"""

from typing import Any

import torch
from torch import nn

from irtune.adapters.linear import AdapterLinear
from irtune.adapters.suppress import Scaled
from irtune.adapters.trainable import freeze, layer_list, train_with_head
from irtune.config.declarations import AdapterKind
from irtune.config.schema import AdapterConfig
from irtune.errors import ModelError
from irtune.models import Classifier
from irtune.models.anatomy import ATTENTION_NAMES, is_linear

ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu}


class Bottleneck(Scaled):
    """[..., width] -> [..., width] through `size` dimensions, in the input's dtype."""

    def __init__(self, width_in: int, width_out: int, adapter: AdapterConfig):
        super().__init__()
        self.scaling = adapter.scale
        self.down = AdapterLinear(width_in, adapter.size)
        self.up = AdapterLinear(adapter.size, width_out)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.dropout = nn.Dropout(adapter.dropout)
        self.activation = ACTIVATIONS[adapter.activation]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """scaling * f(x W_down) W_up."""
        return (self.up(self.activation(self.down(self.dropout(hidden)))) * self.scaling).to(hidden.dtype)


def build(classifier: Classifier, adapter: AdapterConfig) -> nn.Module:
    """Add a module `bottleneck` to every layer, called by hooks on the layer's linear modules.

    Raises:
        ModelError: when a layer has no attention or no feed-forward block of linear modules.
    """
    freeze(classifier.model)
    added: list[nn.Parameter] = []
    for number, layer in enumerate(layer_list(classifier)):
        linear = [(name, module) for name, module in layer.named_modules() if is_linear(module)]
        attention = [m for name, m in linear if any(word in name.lower() for word in ATTENTION_NAMES)]
        forward = [module for _, module in linear if module not in attention]
        if not attention or not forward:
            raise ModelError(f"adapter.type bottleneck: layer {number} has no attention or no feed-forward block")
        if adapter.placement == "serial":
            layer.bottleneck = nn.ModuleDict({
                place: _serial(module, adapter)
                for place, module in (("attention", attention[-1]), ("feed_forward", forward[-1]))
            })  # fmt: skip
        else:
            layer.bottleneck = _parallel(forward[0], forward[-1], adapter)
        added += list(layer.bottleneck.parameters())
    train_with_head(classifier, adapter, added)
    return classifier.model


def _serial(module: nn.Module, adapter: AdapterConfig) -> Bottleneck:
    width = _width(module)[1]
    added = Bottleneck(width, width, adapter)
    module.register_forward_hook(lambda _module, _inputs, output: output + added(output))
    return added


def _parallel(first: nn.Module, last: nn.Module, adapter: AdapterConfig) -> Bottleneck:
    added = Bottleneck(_width(first)[0], _width(last)[1], adapter)
    inputs: list[torch.Tensor] = []  # from the block's first linear module to its last, within one forward pass

    def keep(_module: nn.Module, arguments: Any) -> None:
        inputs[:] = arguments[:1]

    first.register_forward_pre_hook(keep)
    last.register_forward_hook(lambda _module, _inputs, output: output + added(inputs.pop()))
    return added


def _width(module: nn.Module) -> tuple[int, int]:
    """Dimensions of input and output of a linear module (GPT-2's Conv1D stores its weight the other way round)."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return int(module.nx), int(module.nf)  # type: ignore[arg-type]


KIND = AdapterKind(
    name="bottleneck",
    family="networks",
    summary="a small network behind or beside a block",
    source="Houlsby et al., ICML 2019; He et al., ICLR 2022",
    licence="irtune's own code",
    build=build,
    silent=True,
)
