"""RoAd (Liao and Monz 2024): pairs of outputs are rotated and scaled, by nothing at first."""

from peft import RoadConfig
from torch import nn

from irtune.adapters.from_peft import add_from_peft
from irtune.config.declarations import AdapterKind
from irtune.config.schema import AdapterConfig
from irtune.models import Classifier


def build(classifier: Classifier, adapter: AdapterConfig) -> nn.Module:
    """RoAd as peft has it."""
    return add_from_peft(classifier, adapter, RoadConfig, group_size=adapter.size)


KIND = AdapterKind(
    name="road",
    family="rotations and scales",
    summary="a rotation and a scale for each pair of outputs",
    source="Liao and Monz 2024",
    licence="Apache-2.0 (peft)",
    build=build,
    silent=True,
    peft_format=True,
    fills={"adapter.size": 64},
    refuses=(({"adapter.dropout": ...}, "adapter.type road has no dropout; set adapter.dropout to 0"),),
)
