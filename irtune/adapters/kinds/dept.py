"""DePT (Shi and Lipani, ICLR 2024): [P; E + s A B], a shorter prompt and a low-rank change of the text's embeddings.

The official definition (F). 40 tokens with r = 45 have as many parameters as 100 soft tokens at width 768 and 256
places, which are the source's for T5-base, with alpha = 8, and are filled in. There P learns at 3e-1 or 4e-1, A and B
at 5e-4 to 5e-3: `adapter.prompt_lr` is the quotient, whose right value goes with the size of a model's embeddings.
"""

from torch import nn

from irtune.adapters.decomposed_prompt import Decomposed, DecomposedPrompt
from irtune.adapters.trainable import freeze, train_with_head
from irtune.config.declarations import AdapterKind
from irtune.config.schema import AdapterConfig
from irtune.models import Classifier


def build(classifier: Classifier, adapter: AdapterConfig) -> nn.Module:
    """Put the prompt before the texts and the change onto them."""
    freeze(classifier.model)
    model = Decomposed(classifier, adapter, DecomposedPrompt)
    train_with_head(classifier, adapter, model.decomposed.parameters())
    return model


KIND = AdapterKind(
    name="dept",
    family="prefixes and prompts",
    summary="a prompt and a low-rank change of the text's embeddings",
    source="Shi and Lipani, ICLR 2024",
    licence="irtune's own code",
    build=build,
    every_layer=False,
    below=True,
    extra_tokens=lambda classifier, adapter: adapter.num_tokens,
    keys=("adapter.prompt_lr",),
    fills={"tuning.method": "full", "adapter.num_tokens": 40, "adapter.r": 45, "adapter.alpha": 8.0},
    needs={"tuning.method": ("full", "has its parameters before the first layer, not in layers")},
)
