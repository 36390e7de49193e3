"""SHiRA (Bhardwaj et al., NeurIPS 2024): r (in + out) elements of each weight get updates, zero at first.

Which elements depends on a weight's shape alone, as peft's random mask of one seed has it.
"""

from peft import ShiraConfig
from torch import nn

from irtune.adapters.from_peft import add_from_peft
from irtune.config.declarations import AdapterKind
from irtune.config.schema import AdapterConfig
from irtune.models import Classifier


def build(classifier: Classifier, adapter: AdapterConfig) -> nn.Module:
    """SHiRA as peft has it."""
    return add_from_peft(classifier, adapter, ShiraConfig, r=adapter.r, random_seed=0)


KIND = AdapterKind(
    name="shira",
    family="sparse",
    summary="some elements of each weight",
    source="Bhardwaj et al., NeurIPS 2024",
    licence="Apache-2.0 (peft)",
    build=build,
    silent=True,
    peft_format=True,
    unquantised=True,
    index_bytes=8,  # a row and a column, int32
    shapes_of="hira",  # as many parameters, and a whole weight per product; its places are looked up
    refuses=(({"adapter.dropout": ...}, "adapter.type shira has no dropout; set adapter.dropout to 0"),),
)
