"""Turn what some layers have learnt down for a measurement."""

import contextlib
import re
from collections.abc import Iterator, Sequence

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from irtune.adapters.table import LayerTable, Named
from irtune.distributed.partitioned import is_partitioned, join_shares, whole

FACTOR = re.compile(r"(?:^|\.)lora_[AB]\.")  # not DoRA's magnitude, which no scaling turns down


class Scaled(nn.Module):
    """An adapter whose output is multiplied by `scaling`."""

    scaling: float = 1.0


class Suppression:
    """Turns layers down: scales adapters that have a scaling, moves other parameters towards their first values.

    origins: first values, on the CPU, of the parameters that no scaling can turn down. Of partitioned ones, each rank
        keeps its share.
    """

    def __init__(self, table: LayerTable):
        """Remember what parameters are now, before any training."""
        self.table = table
        self.origins: dict[str, torch.Tensor] = {}
        self._shares: set[str] = set()  # those of `origins` of which a rank keeps its share only
        for name, parameter in _unscaled(table):
            if is_partitioned(parameter):
                self._shares.add(name)
            held = getattr(parameter, "ds_tensor", parameter)
            self.origins[name] = held.detach().cpu().clone()

    def _origin(self, name: str, parameter: nn.Parameter) -> torch.Tensor:
        """The first value of a parameter, whole, where the parameter is."""
        kept = self.origins[name].to(parameter.device)
        return join_shares(kept, parameter) if name in self._shares else kept

    @contextlib.contextmanager
    def suppressed(self, layers: Sequence[int], factor: float = 0.25) -> Iterator[None]:
        """Multiply what the adapters in `layers` do by `factor` inside the block. Collective if any is partitioned.

        Parameters without a scaling (biases, a layer's own weights, prefixes) become
        theta_0 + factor (theta - theta_0) with their first value theta_0, which is the same thing for an update that
        starts at zero. Afterwards everything is what it was, bit for bit, also when an exception flies.
        """
        named = [item for layer in layers for item in self.table.layers[layer]]
        moved = [(name, parameter) for name, parameter in named if name in self.origins]
        parameters = [parameter for _, parameter in moved]
        kept: list[torch.Tensor] = []
        try:
            _scale(self.table, layers, factor)
            if moved:
                with torch.no_grad(), whole(parameters, write=True):
                    for name, parameter in moved:
                        kept.append(parameter.data.clone())
                        origin = self._origin(name, parameter)
                        parameter.data.copy_(origin + factor * (parameter.data - origin))
            yield
        finally:
            _unscale(self.table, layers)
            if kept:
                with torch.no_grad(), whole(parameters, write=True):
                    for parameter, value in zip(parameters, kept):
                        parameter.data.copy_(value)


def _unscaled(table: LayerTable) -> Named:
    scaled = {
        id(parameter)
        for module in table.modules
        for part in module.modules()
        if isinstance(part, Scaled) or _starts_at_zero(part)
        for name, parameter in part.named_parameters()
        if isinstance(part, Scaled) or FACTOR.search(name)
    }
    return [(name, parameter) for layer in table.layers for name, parameter in layer if id(parameter) not in scaled]


def _starts_at_zero(part: nn.Module) -> bool:
    """Whether `part` is LoRA's, and its update zero at first: PiSSA's holds a part of the weight itself."""
    return isinstance(part, LoraLayer) and not getattr(part, "holds_weight", False)


def _scale(table: LayerTable, layers: Sequence[int], factor: float) -> None:
    for layer in layers:
        for module in table.modules[layer].modules():
            scaling = getattr(module, "scaling", None)
            if isinstance(module, Scaled):
                module.full_scaling = module.scaling  # type: ignore[assignment]
                module.scaling = module.scaling * factor
            elif _starts_at_zero(module) and isinstance(scaling, dict):
                module.full_scaling = dict(scaling)  # type: ignore[assignment]
                scaling.update({name: value * factor for name, value in scaling.items()})


def _unscale(table: LayerTable, layers: Sequence[int]) -> None:
    for layer in layers:
        for module in table.modules[layer].modules():
            full = module.__dict__.pop("full_scaling", None)
            if isinstance(full, dict):
                module.scaling.update(full)  # type: ignore[union-attr, operator]
            elif full is not None:
                module.scaling = full
