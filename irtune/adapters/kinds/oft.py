"""OFT (Qiu et al., NeurIPS 2023): W' = W R, R orthogonal in blocks of adapter.size, the identity at first."""

from peft import OFTConfig
from torch import nn

from irtune.adapters.from_peft import add_from_peft
from irtune.config.declarations import AdapterKind
from irtune.config.schema import AdapterConfig
from irtune.models import Classifier


def build(classifier: Classifier, adapter: AdapterConfig) -> nn.Module:
    """OFT as peft has it."""
    return add_from_peft(classifier, adapter, OFTConfig, oft_block_size=adapter.size)


KIND = AdapterKind(
    name="oft",
    family="rotations and scales",
    summary="an orthogonal factor of each weight, in blocks",
    source="Qiu et al., NeurIPS 2023",
    licence="Apache-2.0 (peft)",
    build=build,
    silent=True,
    peft_format=True,
    fills={"adapter.size": 32},
    refuses=(({"adapter.dropout": ...}, "adapter.type oft has no dropout; set adapter.dropout to 0"),),
)
