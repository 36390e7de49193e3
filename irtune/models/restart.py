"""Top layers that start anew (`model.restart_layers`): Zhang et al., Revisiting Few-sample BERT Fine-tuning, ICLR 2021.

The layers nearest to pretraining's own task may be a worse start than random ones.
"""

import math

import torch
from torch import nn

from irtune.distributed.partitioned import whole
from irtune.errors import ConfigError, ModelError

SEED = 0  # the layers of a run that is loaded again are those that it began with


@torch.no_grad()
def restart_layers(model: nn.Module, path: str, skeleton: nn.Module, count: int) -> None:
    """Give the last `count` layers of `model` the weights that their class draws before pretraining, in place.

    They are drawn in fp32 from one seed, so that they are the same in every run, number format and share of ZeRO 3.
    Collective where weights are partitioned.

    Args:
        model: freshly loaded.
        path: of its list of layers.
        skeleton: the same model on the meta device; its layers are used up.

    Raises:
        ConfigError: where it has fewer layers.
        ModelError: where its class does not say how a parameter starts.
    """
    layers, shapes = (list(one.get_submodule(path).children()) for one in (model, skeleton))
    if count > len(layers):
        raise ConfigError(
            f"model.restart_layers is {count}, and the model has {len(layers)} layers; accepted: at most that"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        for layer, shape in zip(layers[-count:], shapes[-count:], strict=True):
            drawn = dict(_drawn(skeleton, shape).named_parameters())
            named = list(layer.named_parameters())
            with whole([parameter for _, parameter in named], write=True):
                for name, parameter in named:
                    parameter.data.copy_(drawn[name])


def _drawn(skeleton: nn.Module, shape: nn.Module) -> nn.Module:
    """The layer `shape` with weights as its class draws them, fp32 on the CPU."""
    layer = shape.to_empty(device="cpu").float()
    for parameter in layer.parameters():
        parameter.fill_(math.nan)
    for part in layer.modules():
        skeleton._init_weights(part)  # type: ignore[operator]
    for name, parameter in layer.named_parameters():
        if parameter.isnan().any():
            raise ModelError(
                f"model.restart_layers: {type(skeleton).__name__} does not say how {name} of a layer starts"
            )
    return layer
