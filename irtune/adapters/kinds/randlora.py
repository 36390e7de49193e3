"""RandLora (Albert et al., ICLR 2025): an update of full rank, sums of random products with trained diagonals.

The random matrices are the same in every run, and all layers share them.
"""

from peft import RandLoraConfig
from torch import nn

from irtune.adapters.from_peft import add_from_peft
from irtune.config.declarations import AdapterKind
from irtune.config.schema import AdapterConfig
from irtune.models import Classifier


def build(classifier: Classifier, adapter: AdapterConfig) -> nn.Module:
    """RandLora as peft has it."""
    return add_from_peft(
        classifier, adapter, RandLoraConfig, r=adapter.r, randlora_alpha=adapter.alpha, randlora_dropout=adapter.dropout
    )


KIND = AdapterKind(
    name="randlora",
    family="low-rank",
    summary="diagonals between random matrices that all layers share",
    source="Albert et al., ICLR 2025",
    licence="Apache-2.0 (peft)",
    build=build,
    silent=True,
    peft_format=True,
    fills={"adapter.r": 32, "adapter.alpha": 640.0},
)
