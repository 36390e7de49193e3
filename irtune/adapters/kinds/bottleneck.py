"""Bottleneck adapters: scale * f(x W_down) W_up, W_up zero at first, so that the model computes what it did before.

serial (Houlsby et al., ICML 2019): on the output of the attention and of the feed-forward block, before the residual
connection. parallel (He et al., ICLR 2022): beside the feed-forward block, from its input to its output.
connected (after Ma et al., CIKM 2022): on the output of the feed-forward block, and each layer's inner state also reads
that of the layer below, z_l = f(h_l W_down + z_(l-1) C), C zero at first. That is our reading (R): the source says that
bottlenecks beside the model join the inserted ones in three ways, and its formulas are not known.
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


class Connected(Bottleneck):
    """A bottleneck whose inner state also reads that of the layer below; the lowest has none below."""

    def __init__(self, width: int, adapter: AdapterConfig, *, lowest: bool):
        super().__init__(width, width, adapter)
        self.across = None if lowest else AdapterLinear(adapter.size, adapter.size, bias=False)
        if self.across is not None:
            nn.init.zeros_(self.across.weight)

    def forward(  # type: ignore[override]
        self, hidden: torch.Tensor, below: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden [..., width], z of the layer below [..., size] -> hidden + scaling * z W_up, and z."""
        inner = self.down(self.dropout(hidden))
        if self.across is not None:
            inner = inner + self.across(below)
        inner = self.activation(inner)
        return hidden + (self.up(inner) * self.scaling).to(hidden.dtype), inner


def build(classifier: Classifier, adapter: AdapterConfig) -> nn.Module:
    """Bottlenecks, and nothing else."""
    freeze(classifier.model)
    train_with_head(classifier, adapter, add_bottlenecks(classifier, adapter))
    return classifier.model


def add_bottlenecks(classifier: Classifier, adapter: AdapterConfig) -> list[nn.Parameter]:
    """Add a module `bottleneck` to every layer, called by hooks on the layer's linear modules.

    Returns:
        Their parameters.

    Raises:
        ModelError: when a layer has no attention or no feed-forward block of linear modules.
    """
    added: list[nn.Parameter] = []
    states: list[torch.Tensor] = []  # of connected ones: z of the layer below, within one forward pass
    for number, layer in enumerate(layer_list(classifier)):
        linear = [(name, module) for name, module in layer.named_modules() if is_linear(module)]
        attention = [m for name, m in linear if any(word in name.lower() for word in ATTENTION_NAMES)]
        forward = [module for _, module in linear if module not in attention]
        if not attention or not forward:
            raise ModelError(f"adapter.type {adapter.type}: layer {number} has no attention or no feed-forward block")
        if adapter.placement == "serial":
            layer.bottleneck = nn.ModuleDict({
                place: _serial(module, adapter)
                for place, module in (("attention", attention[-1]), ("feed_forward", forward[-1]))
            })  # fmt: skip
        elif adapter.placement == "connected":
            layer.bottleneck = _connected(forward[-1], adapter, states, lowest=number == 0)
        else:
            layer.bottleneck = _parallel(forward[0], forward[-1], adapter)
        added += list(layer.bottleneck.parameters())
    return added


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


def _connected(last: nn.Module, adapter: AdapterConfig, states: list[torch.Tensor], *, lowest: bool) -> Connected:
    added = Connected(_width(last)[1], adapter, lowest=lowest)

    def add(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        output, state = added(output) if lowest else added(output, states[0])
        states[:] = [state]
        return output

    last.register_forward_hook(add)
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
    source="Houlsby et al., ICML 2019; He et al., ICLR 2022; Ma et al., CIKM 2022",
    licence="irtune's own code",
    build=build,
    silent=True,
    refuses=(
        (
            {"adapter.placement": "connected", "model.gradient_checkpointing": True},
            "adapter.placement connected does not go with model.gradient_checkpointing: a layer depends on more than "
            "its input; set one of the two back",
        ),
        (
            {"adapter.placement": "connected", "model.compile": True},
            "adapter.placement connected does not go with model.compile: a layer depends on more than its input; set "
            "one of the two back",
        ),
    ),
)
