"""WaveFT (Bilican et al. 2025): W' = W + adapter.scale times the inverse wavelet transform of adapter.size values.

Their places are drawn once for all modules of a shape, from peft's seed. Zero at first.
"""

from peft import WaveFTConfig
from torch import nn

from irtune.adapters.from_peft import add_from_peft
from irtune.config.declarations import AdapterKind
from irtune.config.schema import AdapterConfig
from irtune.models import Classifier


def build(classifier: Classifier, adapter: AdapterConfig) -> nn.Module:
    """WaveFT as peft has it."""
    return add_from_peft(classifier, adapter, WaveFTConfig, n_frequency=adapter.size, scaling=adapter.scale)


KIND = AdapterKind(
    name="waveft",
    family="spectrum",
    summary="some wavelet coefficients of each update",
    source="Bilican et al. 2025",
    licence="Apache-2.0 (peft)",
    build=build,
    silent=True,
    peft_format=True,
    fills={"adapter.size": 2592, "adapter.scale": 25.0},
    unquantised=True,
    shapes_of="fourierft",  # its places are looked up
    refuses=(({"adapter.dropout": ...}, "adapter.type waveft has no dropout; set adapter.dropout to 0"),),
)
