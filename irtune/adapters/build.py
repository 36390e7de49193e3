"""Put adapters of a type into a model."""

import logging
from dataclasses import dataclass

from torch import nn

from irtune.adapters.table import LayerTable, build_table
from irtune.config.declarations import adapter_kinds, implementation
from irtune.config.schema import AdapterConfig, Config
from irtune.distributed import runtime
from irtune.errors import ConfigError
from irtune.models import Classifier
from irtune.models.packing import cannot_pack, pack_layers

log = logging.getLogger("irtune")


@dataclass(frozen=True)
class AdapterTraits:
    """What training must know of adapters of a type; the defaults are LoRA's.

    pretrained: the layers' parameters are the model's own weights, which need not be saved before they train.
    below: parameters outside the layers need gradients through all of them: embeddings, a prompt.
    connected: a layer reads more than its input, so that it cannot be computed again by itself.
    frozen: least share of a trained layer's activations that the same layer stores when gradients only pass through.
    """

    pretrained: bool = False
    below: bool = False
    frozen: float = 0.6
    connected: bool = False


LORA = AdapterTraits()


def adapter_traits(adapter: AdapterConfig) -> AdapterTraits:
    """What the declaration of `adapter.type` and its settings say."""
    kind = adapter_kinds()[adapter.type]
    connected = adapter.type == "bottleneck" and adapter.placement == "connected"
    return AdapterTraits(kind.pretrained, kind.below or adapter.embeddings, kind.frozen, connected)


def add_adapters(classifier: Classifier, adapter: AdapterConfig) -> tuple[nn.Module, LayerTable]:
    """Put adapters of `adapter.type` into the layers; returns the model with them and the table.

    Raises:
        ConfigError, ModelError: when the type's settings do not fit the model.
    """
    kind = implementation(adapter_kinds()[adapter.type])
    if kind.needs_plain_base and getattr(classifier.model, "is_quantized", False):
        raise ConfigError(f"adapter.type {adapter.type} needs model.quantization none")
    assert kind.build is not None, f"{kind.module} declares no build"
    model = kind.build(classifier, adapter)
    table = build_table(model, classifier.anatomy, every_layer=kind.every_layer)
    dtypes = {parameter.dtype for _, parameter in table.all()}
    assert len(dtypes) == 1, f"adapters and head must share one dtype, not {dtypes}"
    return model, table


def leave_out_padding(config: Config, classifier: Classifier, table: LayerTable, began: bool | None = None) -> bool:
    """Let the layers, with their adapters, do without padding if `data.padding_free` asks for it.

    Args:
        config: of the run.
        classifier: the model.
        table: its layers.
        began: whether the run that is resumed did without; None for a new run.

    Returns:
        Whether they do. Where they cannot, a line of the log says why.
    """
    wanted = config.data.padding_free
    if wanted == "auto":
        on_cpu = runtime.read_world().device.type == "cpu"
        wanted = on_cpu and config.optim.micro_batch_tokens is None if began is None else began
    if not wanted:
        return False
    reason = cannot_pack(classifier.model)
    if adapter_kinds()[config.adapter.type].extra_tokens is not None:
        reason = f"adapter.type {config.adapter.type} puts embeddings before every text"
    elif config.model.compile:
        reason = "layers of model.compile would be compiled anew for every batch"
    elif config.optim.rdrop:
        reason = "optim.rdrop lets every text pass twice at a time"
    if reason is not None:
        level = logging.INFO if config.data.padding_free == "auto" else logging.WARNING
        log.log(level, "data.padding_free: %s; texts are padded", reason)
        return False
    pack_layers(classifier.model, table.modules)
    return True
