"""DeLoRA (Bini et al., ICLR 2025): LoRA with normalised factors and a trained bound, adapter.alpha at first."""

from peft import DeloraConfig
from torch import nn

from irtune.adapters.from_peft import add_from_peft
from irtune.config.declarations import AdapterKind
from irtune.config.schema import AdapterConfig
from irtune.models import Classifier


def build(classifier: Classifier, adapter: AdapterConfig) -> nn.Module:
    """DeLoRA as peft has it."""
    return add_from_peft(classifier, adapter, DeloraConfig, r=adapter.r, delora_lambda=adapter.alpha)


KIND = AdapterKind(
    name="delora",
    family="low-rank",
    summary="LoRA of a trained norm",
    source="Bini et al., ICLR 2025",
    licence="Apache-2.0 (peft)",
    build=build,
    silent=True,
    peft_format=True,
    fills={"adapter.alpha": 15.0},
    unquantised=True,
    whole_weights=True,
    refuses=(({"adapter.dropout": ...}, "adapter.type delora has no dropout; set adapter.dropout to 0"),),
)
