"""What is put into the layers, and the table layer -> trainable parameters. One file per type, in kinds/."""

from irtune.adapters.build import LORA, AdapterTraits, adapter_traits, add_adapters
from irtune.adapters.save import load_adapter, write_adapter
from irtune.adapters.suppress import Suppression
from irtune.adapters.table import LayerTable, build_table

__all__ = [
    "LORA",
    "AdapterTraits",
    "LayerTable",
    "Suppression",
    "adapter_traits",
    "add_adapters",
    "build_table",
    "load_adapter",
    "write_adapter",
]
