"""EPT (Lan et al., AAAI 2025): DePT whose prompt reads the change of the text and passes several gated spaces.

Our reading (R): the structure is known, a short prompt, a low-rank change of the text, their fusion by attention and
spaces with a gate; formulas and code are not. With M = A B, P' = P + softmax(P M^T / sqrt d) M, and the prompt is
P' + sum_k g_k f(P' D_k) U_k, g = softmax(w mean(P')), of K = 4 spaces with width `adapter.size`. U and w are zero at
first, so that it starts as `prompt`.
"""

import math

import torch
from torch import nn

from irtune.adapters.decomposed_prompt import Decomposed, DecomposedPrompt
from irtune.adapters.kinds.bottleneck import ACTIVATIONS
from irtune.adapters.trainable import freeze, train_with_head
from irtune.config.declarations import AdapterKind
from irtune.config.schema import AdapterConfig
from irtune.models import Classifier

SPACES = 4


class FusedPrompt(DecomposedPrompt):
    """P, A and B with D [K, d, size], U [K, size, d] and w [K, d]."""

    def __init__(self, first: torch.Tensor, places: int, adapter: AdapterConfig):
        super().__init__(first, places, adapter)
        width = first.shape[1]
        self.activation = ACTIVATIONS[adapter.activation]
        self.down = nn.Parameter(torch.empty(SPACES, width, adapter.size, dtype=first.dtype))
        self.up = nn.Parameter(torch.zeros(SPACES, adapter.size, width, dtype=first.dtype))
        self.gate = nn.Parameter(torch.zeros(SPACES, width, dtype=first.dtype))
        nn.init.uniform_(self.down, -1 / math.sqrt(width), 1 / math.sqrt(width))  # as of a linear module

    def forward(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As in `DecomposedPrompt`."""
        prompt, change = self.factor * self.prompt, self.a @ self.b
        prompt = prompt + (prompt @ change.T / math.sqrt(prompt.shape[1])).softmax(-1) @ change
        weights = (self.gate @ prompt.mean(0)).softmax(-1)
        spaces = self.activation(prompt @ self.down) @ self.up  # [K, m, d]
        return prompt + torch.einsum("k,kmd->md", weights, spaces), self.scaling * change[:length]


def build(classifier: Classifier, adapter: AdapterConfig) -> nn.Module:
    """Put the prompt before the texts and the change onto them."""
    freeze(classifier.model)
    model = Decomposed(classifier, adapter, FusedPrompt)
    train_with_head(classifier, adapter, model.decomposed.parameters())
    return model


KIND = AdapterKind(
    name="ept",
    family="prefixes and prompts",
    summary="dept with a prompt that reads the text's change",
    source="Lan et al., AAAI 2025 (our reading)",
    licence="irtune's own code",
    build=build,
    every_layer=False,
    below=True,
    extra_tokens=lambda classifier, adapter: adapter.num_tokens,
    keys=("adapter.prompt_lr",),
    fills={"tuning.method": "full", "adapter.num_tokens": 40, "adapter.r": 45, "adapter.alpha": 8.0},
    needs={"tuning.method": ("full", "has its parameters before the first layer, not in layers")},
)
