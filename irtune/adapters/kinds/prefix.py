"""Prefix tuning (Li and Liang, ACL 2021): trained keys and values before those of every attention.

Their own parameters, without the paper's reparameterisation by a network. Unlike peft's, which live in one matrix
outside the layers, each layer has its own, so that layers can be chosen; and the text's positions stay what they were.
"""

import torch
from torch import nn

from irtune.adapters.prefix_attention import AttentionPlace, KeysAndValues, attention_places
from irtune.adapters.trainable import freeze, train_with_head
from irtune.config.declarations import AdapterKind
from irtune.config.schema import AdapterConfig
from irtune.models import Classifier

INITIAL_DEVIATION = 0.02


class Prefix(KeysAndValues):
    """`num_tokens` keys [heads, P, dim] and values of one layer."""

    def __init__(self, place: AttentionPlace, num_tokens: int):
        super().__init__()
        self.key = nn.Parameter(torch.randn(place.heads, num_tokens, place.key_dim) * INITIAL_DEVIATION)
        self.value = nn.Parameter(torch.randn(place.heads, num_tokens, place.value_dim) * INITIAL_DEVIATION)

    def forward(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same prefix for every row of the batch."""
        rows = key.shape[0]
        first_key = self.key.to(key.dtype).expand(rows, -1, -1, -1)
        first_value = self.value.to(value.dtype).expand(rows, -1, -1, -1)
        return torch.cat([first_key, key], dim=2), torch.cat([first_value, value], dim=2)


def add_prefixes(classifier: Classifier, adapter: AdapterConfig) -> list[nn.Parameter]:
    """Give every attention a prefix; returns their parameters."""
    added: list[nn.Parameter] = []
    for place in attention_places(classifier, adapter.type):
        place.module.prefix = Prefix(place, adapter.num_tokens)
        added += place.module.prefix.parameters()
    return added


def build(classifier: Classifier, adapter: AdapterConfig) -> nn.Module:
    """Prefixes, and nothing else."""
    freeze(classifier.model)
    train_with_head(classifier, adapter, add_prefixes(classifier, adapter))
    return classifier.model


KIND = AdapterKind(
    name="prefix",
    family="prefixes and prompts",
    summary="keys and values before those of each attention",
    source="Li and Liang, ACL 2021",
    licence="irtune's own code",
    build=build,
    attention="sdpa",
)
