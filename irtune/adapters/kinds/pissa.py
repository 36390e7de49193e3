"""PiSSA (Meng et al., NeurIPS 2024): LoRA that starts from the largest singular directions of each weight.

The base keeps the rest of the weight. peft computes the same decomposition again when it loads the adapter.
"""

from peft.tuners.lora import LoraLayer
from torch import nn

from irtune.adapters.low_rank import add_low_rank
from irtune.config.declarations import AdapterKind
from irtune.config.schema import AdapterConfig
from irtune.models import Classifier


def build(classifier: Classifier, adapter: AdapterConfig) -> nn.Module:
    """PiSSA as peft has it."""
    model = add_low_rank(classifier, adapter, init_lora_weights="pissa")
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.holds_weight = True  # type: ignore[assignment]  # to turn its scaling down would take a part of the pretrained weight away
    return model


KIND = AdapterKind(
    name="pissa",
    family="low-rank",
    summary="LoRA from the largest singular directions of each weight",
    source="Meng et al., NeurIPS 2024",
    licence="Apache-2.0 (peft)",
    build=build,
    silent=True,
    peft_format=True,
    decomposes=True,
    shapes_of="lora",  # its first values come from the weights
)
