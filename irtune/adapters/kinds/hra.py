"""HRA (Yuan et al., NeurIPS 2024): W' = W H_1 ... H_r, reflections, which cancel in pairs at first."""

from peft import HRAConfig
from torch import nn

from irtune.adapters.from_peft import add_from_peft
from irtune.config.declarations import AdapterKind
from irtune.config.schema import AdapterConfig
from irtune.errors import ConfigError
from irtune.models import Classifier


def build(classifier: Classifier, adapter: AdapterConfig) -> nn.Module:
    """HRA as peft has it.

    Raises:
        ConfigError: for an odd number of reflections, which would change what the model computes.
    """
    if adapter.r % 2:
        raise ConfigError(
            f"adapter.r is {adapter.r}; adapter.type hra accepts even numbers: its reflections cancel in pairs"
        )
    return add_from_peft(classifier, adapter, HRAConfig, r=adapter.r)


KIND = AdapterKind(
    name="hra",
    family="rotations and scales",
    summary="r reflections of each weight's inputs",
    source="Yuan et al., NeurIPS 2024",
    licence="Apache-2.0 (peft)",
    build=build,
    silent=True,
    peft_format=True,
    unquantised=True,
    refuses=(({"adapter.dropout": ...}, "adapter.type hra has no dropout; set adapter.dropout to 0"),),
)
