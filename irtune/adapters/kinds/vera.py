"""VeRA (Kopiczko et al., ICLR 2024): y = W x + b (.) B (d (.) A x); d and b train, b zero at first.

A and B are random, the same in every run, and all layers share them.
"""

from peft import VeraConfig
from torch import nn

from irtune.adapters.from_peft import add_from_peft
from irtune.config.declarations import AdapterKind
from irtune.config.schema import AdapterConfig
from irtune.models import Classifier


def build(classifier: Classifier, adapter: AdapterConfig) -> nn.Module:
    """VeRA as peft has it."""
    return add_from_peft(classifier, adapter, VeraConfig, r=adapter.r, vera_dropout=adapter.dropout)


KIND = AdapterKind(
    name="vera",
    family="low-rank",
    summary="two vectors around random matrices that all layers share",
    source="Kopiczko et al., ICLR 2024",
    licence="Apache-2.0 (peft)",
    build=build,
    silent=True,
    peft_format=True,
    fills={"adapter.r": 256},
)
