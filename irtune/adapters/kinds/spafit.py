"""SPAFIT (Arora and Wang 2024): strata of layers [0, a) frozen, [a, b) biases only, [b, L) LoRA and biases.

In the last stratum the attention matrices that `adapter.target_modules` names get LoRA, and all biases of the layer
train, those of the attention and of the norms included.
"""

import math

from torch import nn

from irtune.adapters.low_rank import add_low_rank
from irtune.adapters.targets import target_pattern, wanted_modules
from irtune.adapters.trainable import freeze, layer_biases, layer_list, train_with_head
from irtune.config.declarations import AdapterKind
from irtune.config.schema import AdapterConfig
from irtune.errors import ConfigError, ModelError
from irtune.models import Classifier
from irtune.models.anatomy import ATTENTION_NAMES, linear_names


def strata(adapter: AdapterConfig, num_layers: int) -> tuple[int, int]:
    """a and b of a model of `num_layers`: `adapter.strata`, or the paper's SPAFIT-4-9 of 24 layers in proportion.

    Raises:
        ConfigError: when they overlap or leave the range, or no layer would train.
    """
    a, b = adapter.strata or (math.floor(num_layers * 4 / 24), math.floor(num_layers * 9 / 24))
    if not 0 <= a <= b <= num_layers or a == num_layers:
        raise ConfigError(
            f"adapter.strata is {[a, b]}; accepted: [a, b] with 0 <= a <= b <= {num_layers} (the model's layers) and a "
            f"below {num_layers}: layers [0, a) frozen, [a, b) biases, [b, {num_layers}) LoRA and biases"
        )
    return a, b


def build(classifier: Classifier, adapter: AdapterConfig) -> nn.Module:
    """LoRA in the upper layers and biases from the middle up."""
    layers = layer_list(classifier)
    a, b = strata(adapter, len(layers))
    parts = [n for n in linear_names(classifier.model, classifier.anatomy) if _in_attention(n)]
    if not parts:
        raise ModelError("adapter.type spafit: the layers have no attention of linear modules")
    names = wanted_modules(parts, adapter)
    biases = [p for layer in layers[a:] for p in layer_biases(layer)]
    numbers = "|".join(str(number) for number in range(b, len(layers))) or "never"
    pattern = target_pattern(names, classifier.anatomy.layers, numbers)
    if b < len(layers):
        model = add_low_rank(classifier, adapter, pattern=pattern)
        for parameter in biases:
            parameter.requires_grad_(True)  # peft has frozen them
        return model
    freeze(classifier.model)
    train_with_head(classifier, adapter, biases)
    return classifier.model


def _in_attention(name: str) -> bool:
    return any(word in name.lower() for word in ATTENTION_NAMES)


KIND = AdapterKind(
    name="spafit",
    family="mixed",
    summary="strata of layers: frozen, biases, LoRA and biases",
    source="Arora and Wang 2024",
    licence="irtune's own code",
    build=build,
    silent=True,
    own_weights=True,  # the biases
    every_layer=False,
    fills={"adapter.dtype": "model"},
    keys=("adapter.strata",),
)
