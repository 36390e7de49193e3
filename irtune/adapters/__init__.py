"""What is put into the layers, and the table layer -> trainable parameters. One file per type, in kinds/."""

from irtune.adapters.build import add_adapters
from irtune.adapters.save import load_adapter, write_adapter
from irtune.adapters.suppress import remember_origins, suppressed
from irtune.adapters.table import LayerTable, build_table

__all__ = [
    "LayerTable",
    "add_adapters",
    "build_table",
    "load_adapter",
    "remember_origins",
    "suppressed",
    "write_adapter",
]
