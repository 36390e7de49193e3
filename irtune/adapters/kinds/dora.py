"""DoRA (Liu et al., ICML 2024): LoRA on the direction of a weight, its magnitude trained beside it."""

from torch import nn

from irtune.adapters.low_rank import add_low_rank
from irtune.config.declarations import AdapterKind
from irtune.config.schema import AdapterConfig
from irtune.models import Classifier


def build(classifier: Classifier, adapter: AdapterConfig) -> nn.Module:
    """DoRA as peft has it."""
    return add_low_rank(classifier, adapter, use_dora=True)


KIND = AdapterKind(
    name="dora",
    family="low-rank",
    summary="LoRA on the direction of a weight, its magnitude beside it",
    source="Liu et al., ICML 2024",
    licence="Apache-2.0 (peft)",
    build=build,
    silent=True,
    peft_format=True,
    frozen=0.3,  # the norms of all columns of W + B A are stored for the gradients of magnitude and factors only
)
