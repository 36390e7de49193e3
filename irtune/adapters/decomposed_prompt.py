"""A short prompt and a low-rank change of the text's own embeddings, which takes the place of a longer prompt.

The model reads [c P; E + s A B]: P [m, d] is the prompt, E [n, d] the text, A [S, r] has a row for each place in a text
(S is data.max_length) and B [r, d] is zero at first. s = alpha / sqrt(r). Adam's steps do not depend on a gradient's
scale, so P, stored as P / c, learns with c times the learning rate of A and B; clipping by the norm sees the scale.
"""

import math
from typing import Any

import torch
from torch import nn

from irtune.adapters.soft_tokens import SoftTokens, embeddings_of
from irtune.config.schema import AdapterConfig
from irtune.errors import ConfigError
from irtune.models import Classifier


class DecomposedPrompt(nn.Module):
    """P, A and B."""

    def __init__(self, first: torch.Tensor, places: int, adapter: AdapterConfig):
        """`first`: embeddings [m, d] that the prompt starts as. `places`: S."""
        super().__init__()
        width = first.shape[1]
        self.factor, self.scaling = adapter.prompt_lr, adapter.alpha / math.sqrt(adapter.r)
        self.prompt = nn.Parameter(first / self.factor)
        self.a = nn.Parameter(torch.empty(places, adapter.r, dtype=first.dtype))
        self.b = nn.Parameter(torch.zeros(adapter.r, width, dtype=first.dtype))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompt [m, d], and what is added to a text's first `length` embeddings, [length, d]."""
        return self.factor * self.prompt, self.scaling * (self.a[:length] @ self.b)


class Decomposed(SoftTokens):
    """A classifier that reads every text through a `DecomposedPrompt`."""

    def __init__(self, classifier: Classifier, adapter: AdapterConfig, kind: type[DecomposedPrompt]):
        super().__init__(classifier)
        self.name, self.places = adapter.type, classifier.run.max_length
        vocabulary = self.base.get_input_embeddings().num_embeddings  # type: ignore[operator]
        chosen = torch.randint(vocabulary, (adapter.num_tokens,))
        self.decomposed = kind(embeddings_of(self.base, chosen), self.places, adapter)

    def forward(self, **batch: torch.Tensor) -> Any:
        """A batch to the model's output.

        Raises:
            ConfigError: for a text that is longer than S, and, outside training, for texts padded on the left.
        """
        mask, length = batch["attention_mask"], batch["input_ids"].shape[1]
        if length > self.places:
            raise ConfigError(
                f"adapter.type {self.name} was trained for texts of up to {self.places} tokens, and one has {length}; "
                "set data.max_length to that of the run"
            )
        if not (self.training or mask.is_meta) and bool((mask[:, 0] < mask[:, -1]).any()):
            raise ConfigError(f"adapter.type {self.name} counts tokens from the left; pad texts on the right")
        prompt, shift = self.decomposed(length)
        soft = prompt.unsqueeze(0)
        return self.call(soft, torch.ones(soft.shape[:2], device=soft.device), shift, **batch)
