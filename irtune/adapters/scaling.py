"""Turn the adapters of some layers down for a measurement."""

import contextlib
from collections.abc import Iterator, Sequence

from peft.tuners.tuners_utils import BaseTunerLayer

from irtune.adapters.table import LayerTable


@contextlib.contextmanager
def suppressed(table: LayerTable, layers: Sequence[int], factor: float = 0.25) -> Iterator[None]:
    """Multiply the scaling of the adapters in `layers` by `factor` inside the block.

    Afterwards every scaling is what it was, bit for bit, also when an exception flies.
    """
    before: list[tuple[dict[str, float], dict[str, float]]] = []
    try:
        for layer in layers:
            for module in table.modules[layer].modules():
                scaling = getattr(module, "scaling", None)
                if isinstance(module, BaseTunerLayer) and isinstance(scaling, dict):
                    before.append((scaling, dict(scaling)))
                    scaling.update({name: value * factor for name, value in scaling.items()})
        yield
    finally:
        for scaling, values in before:
            scaling.update(values)
