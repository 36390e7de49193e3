"""rsLoRA (Kalajdzievski 2023): LoRA scaled by alpha / sqrt(r), so that large ranks keep learning."""

from torch import nn

from irtune.adapters.low_rank import add_low_rank
from irtune.config.declarations import AdapterKind
from irtune.config.schema import AdapterConfig
from irtune.models import Classifier


def build(classifier: Classifier, adapter: AdapterConfig) -> nn.Module:
    """rsLoRA as peft has it."""
    return add_low_rank(classifier, adapter, use_rslora=True)


KIND = AdapterKind(
    name="rslora",
    family="low-rank",
    summary="LoRA scaled by alpha / sqrt(r)",
    source="Kalajdzievski 2023",
    licence="Apache-2.0 (peft)",
    build=build,
    silent=True,
    peft_format=True,
    keys=("adapter.target_parameters",),
    refuses=(
        (
            {"adapter.target_parameters": ..., "adapter.dropout": ...},
            "adapter.target_parameters cannot have adapter.dropout; set it to 0",
        ),
    ),
)
