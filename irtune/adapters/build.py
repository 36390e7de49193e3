"""Put adapters of a type into a model."""

import importlib
from dataclasses import dataclass
from types import ModuleType

from torch import nn

from irtune.adapters.table import LayerTable, build_table
from irtune.config.checks import PLAIN_BASE
from irtune.config.schema import AdapterConfig
from irtune.errors import ConfigError
from irtune.models import Classifier


@dataclass(frozen=True)
class AdapterTraits:
    """What training must know of adapters of a type; the defaults are LoRA's.

    own_weights: the layers' parameters are the model's own weights, which need not be saved before they train.
    below: parameters outside the layers need gradients through all of them: embeddings, a prompt.
    frozen: least share of a trained layer's activations that the same layer stores when gradients only pass through.
    """

    own_weights: bool = False
    below: bool = False
    frozen: float = 0.6


LORA = AdapterTraits()


def adapter_traits(adapter: AdapterConfig) -> AdapterTraits:
    """What the file of `adapter.type` says of it."""
    kind = _kind(adapter)
    return AdapterTraits(
        own_weights=getattr(kind, "PRETRAINED", LORA.own_weights),
        below=getattr(kind, "BELOW", LORA.below) or adapter.embeddings,
        frozen=getattr(kind, "FROZEN", LORA.frozen),
    )


def _kind(adapter: AdapterConfig) -> ModuleType:
    return importlib.import_module(f"irtune.adapters.kinds.{adapter.type.replace('-', '_')}")


def add_adapters(classifier: Classifier, adapter: AdapterConfig) -> tuple[nn.Module, LayerTable]:
    """Put adapters of `adapter.type` into the layers; returns the model with them and the table.

    Raises:
        ConfigError, ModelError: when the type's settings do not fit the model.
    """
    if adapter.type in PLAIN_BASE and getattr(classifier.model, "is_quantized", False):
        raise ConfigError(f"adapter.type {adapter.type} needs model.quantization none")
    kind = _kind(adapter)
    model = kind.build(classifier, adapter)
    table = build_table(model, classifier.anatomy, every_layer=getattr(kind, "EVERY_LAYER", True))
    dtypes = {parameter.dtype for _, parameter in table.all()}
    assert len(dtypes) == 1, f"adapters and head must share one dtype, not {dtypes}"
    return model, table
