"""Half fine-tuning (Hui et al., ACL 2025): of each layer's own weights one half trains, drawn once per run.

Second-hand (S): two accounts of the paper agree, and there is no official code. Of the attention's matrices two of four
train; of three feed-forward matrices two in a random half of the layers and one in the others, of two one; of the
norms half. A bias goes with its matrix. Of an odd number of layers, one more has the smaller share. The paper trains
the embeddings too, which is `adapter.embeddings` here, and draws anew for each stage, which is another run with
another seed here.
"""

import logging

from torch import nn

from irtune.adapters.trainable import freeze, layer_list, train_with_head
from irtune.config.declarations import AdapterKind
from irtune.config.schema import AdapterConfig
from irtune.distributed.partitioned import whole_shape
from irtune.distributed.runtime import derived_seed
from irtune.errors import ModelError
from irtune.models import Classifier
from irtune.models.anatomy import ATTENTION_NAMES, is_linear

log = logging.getLogger("irtune")


def halves(modules: list[list[str]], seed: int, what: str) -> list[list[str]]:
    """Of the names in each layer, those that train: half of them, and of odd numbers one more in half of the layers.

    Drawn by ordering hashes of `seed`, `what` and the name, which are the same everywhere and forever.
    """

    def order(*item: object) -> int:
        return derived_seed("hft", seed, what, *item)

    odd = sorted((n for n, names in enumerate(modules) if len(names) % 2), key=order)
    larger = set(odd[: len(odd) // 2])
    counts = [len(names) // 2 + (number in larger) for number, names in enumerate(modules)]
    drawn = [sorted((order(number, name), name) for name in names) for number, names in enumerate(modules)]
    return [[name for _, name in names[:count]] for names, count in zip(drawn, counts)]


def _sorts(layer: nn.Module) -> dict[str, list[str]]:
    """Names of the modules of a layer with parameters of their own, by what they are."""
    found: dict[str, list[str]] = {"attention": [], "feed-forward": [], "norm": []}
    for name, module in layer.named_modules():
        own = [parameter for _, parameter in module.named_parameters(recurse=False)]
        if is_linear(module):
            in_attention = any(word in name.lower() for word in ATTENTION_NAMES)
            found["attention" if in_attention else "feed-forward"].append(name)
        elif own and all(len(whole_shape(parameter)) == 1 for parameter in own):
            found["norm"].append(name)
        elif own:
            raise ModelError(
                f"adapter.type hft: {name} is neither a linear module nor a norm and cannot be halved by matrix; set "
                "adapter.type to none"
            )
    if len(found["attention"]) < 4:
        raise ModelError(
            f"adapter.type hft: an attention of the linear modules {', '.join(found['attention']) or 'none'} has its "
            "q, k and v in one and cannot be halved by matrix; set adapter.type to none"
        )
    return found


def build(classifier: Classifier, adapter: AdapterConfig) -> nn.Module:
    """Make one half of each layer trainable; says which share of the weights that is.

    Raises:
        ModelError: for layers that cannot be halved by matrix.
    """
    freeze(classifier.model)
    layers = layer_list(classifier)
    sorts = [_sorts(layer) for layer in layers]
    drawn = [halves([found[what] for found in sorts], classifier.run.seed, what) for what in sorts[0]]
    trained = [
        parameter
        for part in drawn
        for layer, names in zip(layers, part)
        for name in names
        for parameter in layer.get_submodule(name).parameters(recurse=False)
    ]
    every = [parameter for layer in layers for parameter in layer.parameters()]
    sizes = [sum(whole_shape(parameter).numel() for parameter in some) for some in (trained, every)]
    log.info("adapter.type hft trains %d of %d weights of the layers, %.1f%%", *sizes, 100 * sizes[0] / sizes[1])
    if adapter.embeddings:
        trained += list(classifier.model.get_input_embeddings().parameters())  # type: ignore[operator]
    train_with_head(classifier, adapter, trained)
    return classifier.model


KIND = AdapterKind(
    name="hft",
    family="own weights",
    summary="a random half of the layers' own weights",
    source="Hui et al., ACL 2025 (second-hand)",
    licence="irtune's own code",
    build=build,
    silent=True,
    own_weights=True,
    pretrained=True,
    fills={"adapter.dtype": "model"},
    keys=("adapter.embeddings",),
)
