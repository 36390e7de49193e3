"""LT-Prefix (Kowsher et al. 2024): p = Z(F(h)) gives every layer keys and values; o = C(M(x, p)). F, Z and C train.

F is a self-attention pooling: F(h) = sum_j softmax_j(w . h_j) h_j, one vector per label. Z projects it, through
`adapter.r` dimensions in each layer, to `adapter.num_tokens` keys and values; its last map starts at zero values.
"""

from typing import Any

import torch
from torch import nn

from irtune.adapters.ltuning import candidate_logits, judge_pairs, label_states, per_label
from irtune.adapters.prefix_attention import AttentionPlace, KeysAndValues, attention_places
from irtune.adapters.trainable import freeze, train_with_head
from irtune.config.declarations import AdapterKind
from irtune.config.schema import AdapterConfig
from irtune.models import Classifier


class LabelKeysAndValues(KeysAndValues):
    """Z of one layer. `labels` holds F(h), [labels, d], while the model reads a batch."""

    def __init__(self, place: AttentionPlace, width: int, adapter: AdapterConfig):
        super().__init__()
        self.place, self.num_tokens = (place.heads, place.key_dim, place.value_dim), adapter.num_tokens
        count = place.heads * adapter.num_tokens
        self.inner = nn.Linear(width, adapter.r)
        self.to_key = nn.Linear(adapter.r, count * place.key_dim)
        self.to_value = nn.Linear(adapter.r, count * place.value_dim)
        nn.init.zeros_(self.to_value.weight)
        nn.init.zeros_(self.to_value.bias)
        self.labels: torch.Tensor | None = None

    def forward(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Row b * labels + c of the batch gets the prefix of label c."""
        assert self.labels is not None
        heads, key_dim, value_dim = self.place
        inner = torch.tanh(self.inner(self.labels))
        labels, rows = inner.shape[0], key.shape[0]
        keys = self.to_key(inner).view(labels, heads, self.num_tokens, key_dim).to(key.dtype)
        values = self.to_value(inner).view(labels, heads, self.num_tokens, value_dim).to(value.dtype)
        repeated = [tensor.repeat(rows // labels, 1, 1, 1) for tensor in (keys, values)]
        return torch.cat([repeated[0], key], dim=2), torch.cat([repeated[1], value], dim=2)


class LabelPrefixed(nn.Module):
    """A classifier whose attentions see, beside the text, what the layers make of each label."""

    states: torch.Tensor
    attends: torch.Tensor

    def __init__(self, classifier: Classifier, adapter: AdapterConfig):
        super().__init__()
        known = label_states(classifier)
        self.base = classifier.model
        self.register_buffer("states", known.states, persistent=False)
        self.register_buffer("attends", known.attends, persistent=False)
        self.label_head, width = adapter.label_head, known.states.shape[2]
        self.label_pooling = nn.Linear(width, 1, bias=False)  # w of F
        self.prefixes = []
        for place in attention_places(classifier, "ltuning-prefix"):
            place.module.prefix = LabelKeysAndValues(place, width, adapter)
            self.prefixes.append(place.module.prefix)

    def forward(self, **batch: torch.Tensor) -> Any:
        """A batch [batch, length] to logits [batch, labels]."""
        states = self.states.to(self.label_pooling.weight.dtype)
        weights = self.label_pooling(states).squeeze(-1).masked_fill(self.attends == 0, -torch.inf).softmax(-1)
        pooled = torch.einsum("cl,cld->cd", weights, states)
        for prefix in self.prefixes:
            prefix.labels = pooled
        output = self.base(**per_label(batch, len(states)))
        return candidate_logits(output.logits, len(states), self.label_head)


def build(classifier: Classifier, adapter: AdapterConfig) -> nn.Module:
    """Give every attention keys and values made of the labels."""
    freeze(classifier.model)
    model = LabelPrefixed(classifier, adapter)
    if adapter.label_head == "entailment":
        judge_pairs(classifier)
    added = [*model.label_pooling.parameters(), *(p for prefix in model.prefixes for p in prefix.parameters())]
    train_with_head(classifier, adapter, added)
    return model


KIND = AdapterKind(
    name="ltuning-prefix",
    family="prefixes and prompts",
    summary="keys and values made of each label's text",
    source="Kowsher et al. 2024",
    licence="irtune's own code",
    build=build,
    below=True,  # F, which all layers share
    reads_labels=True,
    keys=("adapter.label_head",),
    refuses=(
        (
            {"adapter.label_head": "entailment", "run.logit_adjust": ...},
            "run.logit_adjust is kept in a bias for each label, and adapter.label_head entailment has none; set one of "
            "the two back",
        ),
    ),
    attention="sdpa",
)
