"""LN tuning (Zhao et al., ICLR 2024): copies of the layers' norms train in place of the norms."""

from peft import LNTuningConfig
from torch import nn

from irtune.adapters.from_peft import add_from_peft
from irtune.adapters.targets import target_pattern
from irtune.adapters.trainable import layer_list
from irtune.config.declarations import AdapterKind
from irtune.config.schema import AdapterConfig
from irtune.distributed.partitioned import whole_shape
from irtune.errors import ModelError
from irtune.models import Classifier


def build(classifier: Classifier, adapter: AdapterConfig) -> nn.Module:
    """LN tuning as peft has it.

    Raises:
        ModelError: for layers without norms that have weights.
    """
    parts = (item for layer in layer_list(classifier) for item in layer.named_modules())
    norms = {name: None for name, part in parts if isinstance(getattr(part, "weight", None), nn.Parameter)
             and len(whole_shape(part.weight)) == 1}  # fmt: skip
    if not norms:
        raise ModelError(
            f"adapter.type ln_tuning: the layers of {type(classifier.model).__name__} have no norms to train"
        )
    pattern = target_pattern(list(norms), classifier.anatomy.layers)
    return add_from_peft(classifier, adapter, LNTuningConfig, pattern=pattern)


KIND = AdapterKind(
    name="ln_tuning",
    family="own weights",
    summary="copies of the norms",
    source="Zhao et al., ICLR 2024",
    licence="Apache-2.0 (peft)",
    build=build,
    silent=True,
    peft_format=True,
    whole_weights=True,
    fills={"adapter.dtype": "model"},
    needs={"adapter.dtype": ("model", "trains norms, which compute in the model's number format")},
    refuses=(
        ({"adapter.dropout": ...}, "adapter.type ln_tuning has no dropout; set adapter.dropout to 0"),
        ({"adapter.target_modules": ...}, "adapter.type ln_tuning trains all norms; leave adapter.target_modules out"),
    ),
)
