"""HiRA (Huang et al., ICLR 2025): W' = W (.) (1 + B A), B zero at first.

A product of r out in per module whatever the number of tokens, where lora's takes r (in + out) per token.
"""

from peft import HiraConfig
from torch import nn

from irtune.adapters.from_peft import add_from_peft
from irtune.config.declarations import AdapterKind
from irtune.config.schema import AdapterConfig
from irtune.models import Classifier


def build(classifier: Classifier, adapter: AdapterConfig) -> nn.Module:
    """HiRA as peft has it."""
    return add_from_peft(classifier, adapter, HiraConfig, r=adapter.r, hira_dropout=adapter.dropout)


KIND = AdapterKind(
    name="hira",
    family="low-rank",
    summary="low-rank factors of each weight's elements",
    source="Huang et al., ICLR 2025",
    licence="Apache-2.0 (peft)",
    build=build,
    silent=True,
    peft_format=True,
    fills={"adapter.r": 32},
)
