"""The mix-and-match adapter (He et al., ICLR 2022): prefixes in the attention, a scaled bottleneck beside the rest.

The official definition (F): y = FFN(x) + s relu(x D) U without norm or residual connection of its own; D starts kaiming
uniform (a = sqrt 5), U and the biases at zero. Its settings for summarisation are filled in: 30 keys and values, size
512, s = 4; for GLUE it takes 16, 16 and 2. Its prefixes come out of a network while they train; irtune's are trained
directly.
"""

import dataclasses

from torch import nn

from irtune.adapters.kinds.bottleneck import add_bottlenecks
from irtune.adapters.kinds.prefix import add_prefixes
from irtune.adapters.trainable import freeze, layer_list, train_with_head
from irtune.config.declarations import AdapterKind
from irtune.config.schema import AdapterConfig
from irtune.models import Classifier


def build(classifier: Classifier, adapter: AdapterConfig) -> nn.Module:
    """Give every attention a prefix and every feed-forward block a bottleneck beside it."""
    freeze(classifier.model)
    beside = dataclasses.replace(adapter, placement="parallel")
    added = [*add_prefixes(classifier, adapter), *add_bottlenecks(classifier, beside)]
    for layer in layer_list(classifier):
        nn.init.zeros_(layer.bottleneck.down.bias)  # type: ignore[union-attr, arg-type]
    train_with_head(classifier, adapter, added)
    return classifier.model


KIND = AdapterKind(
    name="mam",
    family="mixed",
    summary="prefix and parallel bottleneck together",
    source="He et al., ICLR 2022",
    licence="irtune's own code",
    build=build,
    attention="sdpa",
    fills={"adapter.num_tokens": 30, "adapter.size": 512, "adapter.scale": 4.0, "adapter.activation": "relu"},
)
