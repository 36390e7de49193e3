"""Put adapters of a type into a model."""

import importlib

from torch import nn

from irtune.adapters.table import LayerTable, build_table
from irtune.config.checks import PLAIN_BASE
from irtune.config.schema import AdapterConfig
from irtune.errors import ConfigError
from irtune.models import Classifier


def add_adapters(classifier: Classifier, adapter: AdapterConfig) -> tuple[nn.Module, LayerTable]:
    """Put adapters of `adapter.type` into the layers; returns the model with them and the table.

    Raises:
        ConfigError, ModelError: when the type's settings do not fit the model.
    """
    if adapter.type in PLAIN_BASE and getattr(classifier.model, "is_quantized", False):
        raise ConfigError(f"adapter.type {adapter.type} needs model.quantization none")
    kind = importlib.import_module(f"irtune.adapters.kinds.{adapter.type.replace('-', '_')}")
    model = kind.build(classifier, adapter)
    table = build_table(
        model,
        classifier.anatomy,
        every_layer=getattr(kind, "EVERY_LAYER", True),
        pretrained=getattr(kind, "PRETRAINED", False),
        below=getattr(kind, "BELOW", False) or adapter.embeddings,
    )
    table.frozen = getattr(kind, "FROZEN", table.frozen)
    dtypes = {parameter.dtype for _, parameter in table.all()}
    assert len(dtypes) == 1, f"adapters and head must share one dtype, not {dtypes}"
    return model, table
