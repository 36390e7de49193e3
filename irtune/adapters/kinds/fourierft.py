"""FourierFT (Gao et al., ICML 2024): W' = W + adapter.scale times the inverse Fourier transform of adapter.size values.

Their places are drawn once for all modules of a shape, from peft's seed. Zero at first: not peft's default.
"""

from peft import FourierFTConfig
from torch import nn

from irtune.adapters.from_peft import add_from_peft
from irtune.config.declarations import AdapterKind
from irtune.config.schema import AdapterConfig
from irtune.models import Classifier


def build(classifier: Classifier, adapter: AdapterConfig) -> nn.Module:
    """FourierFT as peft has it."""
    return add_from_peft(
        classifier, adapter, FourierFTConfig, n_frequency=adapter.size, scaling=adapter.scale, init_weights=True
    )


KIND = AdapterKind(
    name="fourierft",
    family="spectrum",
    summary="some Fourier coefficients of each update",
    source="Gao et al., ICML 2024",
    licence="Apache-2.0 (peft)",
    build=build,
    silent=True,
    peft_format=True,
    fills={"adapter.size": 1000, "adapter.scale": 150.0},
    unquantised=True,
    refuses=(({"adapter.dropout": ...}, "adapter.type fourierft has no dropout; set adapter.dropout to 0"),),
)
