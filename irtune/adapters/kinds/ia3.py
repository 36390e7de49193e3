"""(IA)^3 (Liu et al., NeurIPS 2022): a factor for each output of a module, one at first.

The module that ends the feed-forward block has its inputs scaled. The paper has the modules of keys and values and that
one: adapter.target_modules [k_proj, v_proj, down_proj].
"""

import re

from peft import IA3Config
from torch import nn

from irtune.adapters.from_peft import add_from_peft
from irtune.adapters.targets import target_pattern
from irtune.config.declarations import AdapterKind
from irtune.config.schema import AdapterConfig
from irtune.models import Classifier
from irtune.models.anatomy import ATTENTION_NAMES, linear_names


def build(classifier: Classifier, adapter: AdapterConfig) -> nn.Module:
    """(IA)^3 as peft has it."""
    names = linear_names(classifier.model, classifier.anatomy)
    forward = [name for name in names if not any(word in name.lower() for word in ATTENTION_NAMES)]
    last = [name for name in forward if re.sub(r"\d+", "N", name) == re.sub(r"\d+", "N", forward[-1])]  # of all experts
    scaled = target_pattern(last, classifier.anatomy.layers) if last else []
    return add_from_peft(classifier, adapter, IA3Config, feedforward_modules=scaled)


KIND = AdapterKind(
    name="ia3",
    family="rotations and scales",
    summary="a factor for each output",
    source="Liu et al., NeurIPS 2022",
    licence="Apache-2.0 (peft)",
    build=build,
    silent=True,
    peft_format=True,
    refuses=(({"adapter.dropout": ...}, "adapter.type ia3 has no dropout; set adapter.dropout to 0"),),
)
