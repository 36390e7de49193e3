"""Prompt tuning (Lester et al., EMNLP 2021): trained embeddings before the text, the model itself constant.

They start as the embeddings of random tokens of the vocabulary, or of the labels' names, and live in no layer. Unlike
peft's, which loses the token ids and therefore reads the class at the padding of a short text, the model still finds
the last token.
"""

from typing import Any

import torch
from torch import nn

from irtune.adapters.soft_tokens import SoftTokens, embeddings_of
from irtune.adapters.trainable import freeze, train_with_head
from irtune.config.declarations import AdapterKind
from irtune.config.schema import AdapterConfig
from irtune.models import Classifier

FIRST_FILLER = 1000


class Prompted(SoftTokens):
    """A classifier behind a trained prompt of `num_tokens` embeddings."""

    def __init__(self, classifier: Classifier, adapter: AdapterConfig):
        super().__init__(classifier)
        vocabulary = self.base.get_input_embeddings().num_embeddings  # type: ignore[operator]
        chosen = torch.randint(vocabulary, (adapter.num_tokens,))
        if adapter.prompt_init == "labels":
            chosen = label_tokens(classifier, adapter.num_tokens, vocabulary)
        first = embeddings_of(self.base, chosen)
        # Adam's updates do not depend on the scale of gradients: what is stored small learns fast.
        self.scale = adapter.prompt_lr
        self.prompt = nn.Embedding(adapter.num_tokens, first.shape[1], _weight=first / self.scale)

    def forward(self, **batch: torch.Tensor) -> Any:
        """A batch to the model's output."""
        device = batch["input_ids"].device
        soft = self.scale * self.prompt(torch.arange(self.prompt.num_embeddings, device=device)).unsqueeze(0)
        return self.call(soft, torch.ones(soft.shape[:2], device=device), **batch)


def label_tokens(classifier: Classifier, count: int, vocabulary: int) -> torch.Tensor:
    """Tokens of the labels' names in their order, then 1000, 1001, ...; int64 [count] (Buchner et al., NAACL 2024)."""
    names: Any = classifier.model.config.id2label.values()  # type: ignore[operator, union-attr]
    ids = [token for name in names for token in classifier.tokenizer(str(name), add_special_tokens=False)["input_ids"]]
    if len(ids) > count:
        return torch.tensor(ids)[torch.randperm(len(ids))[:count].sort().values]
    return torch.tensor(ids + [(FIRST_FILLER + number) % vocabulary for number in range(count - len(ids))])


def build(classifier: Classifier, adapter: AdapterConfig) -> nn.Module:
    """Put a prompt before the texts."""
    freeze(classifier.model)
    model = Prompted(classifier, adapter)
    train_with_head(classifier, adapter, model.prompt.parameters())
    return model


KIND = AdapterKind(
    name="prompt",
    family="prefixes and prompts",
    summary="embeddings before the text",
    source="Lester et al., EMNLP 2021",
    licence="irtune's own code",
    build=build,
    every_layer=False,
    below=True,
    extra_tokens=lambda classifier, adapter: adapter.num_tokens,
    keys=("adapter.prompt_init", "adapter.prompt_lr"),
    fills={"tuning.method": "full"},
    needs={"tuning.method": ("full", "has its parameters before the first layer, not in layers")},
)
