"""BitFit (Ben Zaken et al., ACL 2022): only the biases train, which are the model's own, in its number format."""

from torch import nn

from irtune.adapters.trainable import freeze, layer_biases, layer_list, train_with_head
from irtune.config.declarations import AdapterKind
from irtune.config.schema import AdapterConfig
from irtune.models import Classifier


def build(classifier: Classifier, adapter: AdapterConfig) -> nn.Module:
    """Make the biases of every layer trainable."""
    freeze(classifier.model)
    train_with_head(classifier, adapter, [p for layer in layer_list(classifier) for p in layer_biases(layer)])
    return classifier.model


KIND = AdapterKind(
    name="bitfit",
    family="own weights",
    summary="the biases",
    source="Ben Zaken et al., ACL 2022",
    licence="irtune's own code",
    build=build,
    silent=True,
    own_weights=True,
    fills={"adapter.dtype": "model"},
)
