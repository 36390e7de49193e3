"""MiSS (Kang and Yin 2024): y = W x + D^T s(x), s the sums of r groups of inputs, D zero at first."""

from peft import MissConfig
from torch import nn

from irtune.adapters.from_peft import add_from_peft
from irtune.config.declarations import AdapterKind
from irtune.config.schema import AdapterConfig
from irtune.models import Classifier


def build(classifier: Classifier, adapter: AdapterConfig) -> nn.Module:
    """MiSS as peft has it."""
    return add_from_peft(classifier, adapter, MissConfig, r=adapter.r, miss_dropout=adapter.dropout)


KIND = AdapterKind(
    name="miss",
    family="low-rank",
    summary="one matrix on sums of the inputs",
    source="Kang and Yin 2024",
    licence="Apache-2.0 (peft)",
    build=build,
    silent=True,
    peft_format=True,
    fills={"adapter.r": 64},
)
