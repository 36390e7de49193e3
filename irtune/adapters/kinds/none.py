"""No adapter: the layers' own weights train, in the model's number format with fp32 masters where that is lower.

This is full-parameter layer selection, as LISA (Pan et al., NeurIPS 2024) and BAdam (Luo et al., NeurIPS 2024) have it:
optimizer state is large, and choosing layers saves most.
"""

from torch import nn

from irtune.adapters.trainable import freeze, layer_list, train_with_head
from irtune.config.declarations import AdapterKind
from irtune.config.schema import AdapterConfig
from irtune.models import Classifier


def build(classifier: Classifier, adapter: AdapterConfig) -> nn.Module:
    """Make all weights of every layer trainable, and the input embeddings where `adapter.embeddings` says so."""
    freeze(classifier.model)
    weights = [parameter for layer in layer_list(classifier) for parameter in layer.parameters()]
    if adapter.embeddings:
        weights += list(classifier.model.get_input_embeddings().parameters())  # type: ignore[operator]
    train_with_head(classifier, adapter, weights)
    return classifier.model


KIND = AdapterKind(
    name="none",
    family="own weights",
    summary="the layers' own weights",
    source="as in LISA and BAdam",
    licence="irtune's own code",
    build=build,
    silent=True,
    own_weights=True,
    pretrained=True,
    fills={"adapter.dtype": "model"},
    keys=("adapter.embeddings",),
)
