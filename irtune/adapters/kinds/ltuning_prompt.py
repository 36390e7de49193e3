"""LT-Prompt (Kowsher et al. 2024): e(y) = G(h) precedes the text; o = C(M(e(y), e(x))). G and C train."""

from typing import Any

import torch
from torch import nn

from irtune.adapters.ltuning import candidate_logits, judge_pairs, label_states, longest_label, per_label
from irtune.adapters.soft_tokens import SoftTokens
from irtune.adapters.trainable import freeze, train_with_head
from irtune.config.declarations import AdapterKind
from irtune.config.schema import AdapterConfig
from irtune.models import Classifier


class LabelPrompted(SoftTokens):
    """A classifier that reads each text behind what G makes of each label's hidden states."""

    states: torch.Tensor
    attends: torch.Tensor

    def __init__(self, classifier: Classifier, adapter: AdapterConfig):
        known = label_states(classifier)
        super().__init__(classifier)
        self.register_buffer("states", known.states, persistent=False)
        self.register_buffer("attends", known.attends, persistent=False)
        self.label_head, width = adapter.label_head, known.states.shape[2]
        # G: from hidden states to embeddings, through `size` dimensions.
        self.label_prompt = nn.Sequential(nn.Linear(width, adapter.size), nn.Tanh(), nn.Linear(adapter.size, width))

    def forward(self, **batch: torch.Tensor) -> Any:
        """A batch [batch, length] to logits [batch, labels]."""
        labels, rows = self.states.shape[0], batch["input_ids"].shape[0]
        soft = self.label_prompt(self.states.to(next(self.label_prompt.parameters()).dtype))
        output = self.call(soft.repeat(rows, 1, 1), self.attends.repeat(rows, 1), **per_label(batch, labels))
        return candidate_logits(output.logits, labels, self.label_head)


def build(classifier: Classifier, adapter: AdapterConfig) -> nn.Module:
    """Put the labels before the texts."""
    freeze(classifier.model)
    model = LabelPrompted(classifier, adapter)
    if adapter.label_head == "entailment":
        judge_pairs(classifier)
    train_with_head(classifier, adapter, model.label_prompt.parameters())
    return model


KIND = AdapterKind(
    name="ltuning-prompt",
    family="prefixes and prompts",
    summary="embeddings made of each label's text, before the text",
    source="Kowsher et al. 2024",
    licence="irtune's own code",
    build=build,
    every_layer=False,
    below=True,
    reads_labels=True,
    keys=("adapter.label_head",),
    refuses=(
        (
            {"adapter.label_head": "entailment", "run.logit_adjust": ...},
            "run.logit_adjust is kept in a bias for each label, and adapter.label_head entailment has none; set one of "
            "the two back",
        ),
    ),
    extra_tokens=lambda classifier, adapter: longest_label(classifier),
    fills={"tuning.method": "full"},
    needs={"tuning.method": ("full", "has its parameters before the first layer, not in layers")},
)
