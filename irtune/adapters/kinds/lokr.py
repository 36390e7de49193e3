"""LoKr (Yeh et al., ICLR 2024): W' = W + (alpha / r) times a Kronecker product, one factor zero at first."""

from peft import LoKrConfig
from torch import nn

from irtune.adapters.from_peft import add_from_peft
from irtune.config.declarations import AdapterKind
from irtune.config.schema import AdapterConfig
from irtune.models import Classifier


def build(classifier: Classifier, adapter: AdapterConfig) -> nn.Module:
    """LoKr as peft has it."""
    return add_from_peft(classifier, adapter, LoKrConfig, r=adapter.r, alpha=adapter.alpha)


KIND = AdapterKind(
    name="lokr",
    family="low-rank",
    summary="a Kronecker product of small matrices",
    source="Yeh et al., ICLR 2024",
    licence="Apache-2.0 (peft)",
    build=build,
    silent=True,
    peft_format=True,
    unquantised=True,
    refuses=(({"adapter.dropout": ...}, "adapter.type lokr has no dropout; set adapter.dropout to 0"),),
)
