"""C3A (Chen et al., ACL 2025): W' = W + circulant blocks, zero at first, which is not peft's default.

A block is as large as all widths of the targets allow, at most adapter.size: SmolLM2's 192, 576 and 1,536 have 192.
"""

import math
import re

from peft import C3AConfig
from torch import nn

from irtune.adapters.from_peft import add_from_peft
from irtune.adapters.targets import module_targets
from irtune.config.declarations import AdapterKind
from irtune.config.schema import AdapterConfig
from irtune.models import Classifier


def build(classifier: Classifier, adapter: AdapterConfig) -> nn.Module:
    """C3A as peft has it."""
    pattern = module_targets(classifier, adapter)
    targets = [
        module
        for name, module in classifier.model.named_modules()
        if isinstance(module, nn.Linear) and isinstance(pattern, str) and re.fullmatch(pattern, name)
    ]
    common = math.gcd(*(width for module in targets for width in (module.in_features, module.out_features)))
    block = max(size for size in range(1, adapter.size + 1) if common % size == 0)
    return add_from_peft(classifier, adapter, C3AConfig, pattern=pattern, block_size=block, init_weights=True)


KIND = AdapterKind(
    name="c3a",
    family="spectrum",
    summary="circulant blocks of each update",
    source="Chen et al., ACL 2025",
    licence="Apache-2.0 (peft)",
    build=build,
    silent=True,
    peft_format=True,
    unquantised=True,
    refuses=(({"adapter.dropout": ...}, "adapter.type c3a has no dropout; set adapter.dropout to 0"),),
)
