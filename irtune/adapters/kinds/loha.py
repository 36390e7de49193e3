"""LoHa (Hyeon-Woo et al., ICLR 2022): W' = W + (alpha / r) (A B) (.) (C D), one factor zero at first."""

from peft import LoHaConfig
from torch import nn

from irtune.adapters.from_peft import add_from_peft
from irtune.config.declarations import AdapterKind
from irtune.config.schema import AdapterConfig
from irtune.models import Classifier


def build(classifier: Classifier, adapter: AdapterConfig) -> nn.Module:
    """LoHa as peft has it."""
    return add_from_peft(classifier, adapter, LoHaConfig, r=adapter.r, alpha=adapter.alpha)


KIND = AdapterKind(
    name="loha",
    family="low-rank",
    summary="the elementwise product of two low-rank updates",
    source="Hyeon-Woo et al., ICLR 2022",
    licence="Apache-2.0 (peft)",
    build=build,
    silent=True,
    peft_format=True,
    unquantised=True,
    whole_weights=True,
    refuses=(({"adapter.dropout": ...}, "adapter.type loha has no dropout; set adapter.dropout to 0"),),
)
