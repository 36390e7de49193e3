"""What is put into the layers: a builder per adapter type, and the table layer -> trainable parameters."""

from torch import nn

from irtune.adapters.lora import add_lora
from irtune.adapters.scaling import suppressed
from irtune.adapters.table import LayerTable, build_table
from irtune.config.schema import AdapterConfig
from irtune.models import Classifier

BUILDERS = {"lora": add_lora, "dora": add_lora, "rslora": add_lora}

__all__ = ["BUILDERS", "LayerTable", "add_adapters", "build_table", "suppressed"]


def add_adapters(classifier: Classifier, adapter: AdapterConfig) -> tuple[nn.Module, LayerTable]:
    """Put adapters of `adapter.type` into every layer; returns the model with them and the table."""
    model = BUILDERS[adapter.type](classifier, adapter)
    return model, build_table(model, classifier.anatomy)
