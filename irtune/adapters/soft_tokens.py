"""Embeddings placed among those of the text, in any model with an input embedding.

The model still gets token ids, with placeholders for soft tokens, so it finds the last token of a padded text,
which it could not in embeddings alone.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from irtune.distributed.partitioned import whole
from irtune.errors import ModelError
from irtune.models import Classifier
from irtune.models.pooling import begins_with_cls


class SoftTokens(nn.Module):
    """A classifier whose inputs begin with soft tokens. Subclasses say which."""

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.base = classifier.model
        self.start = leading_tokens(classifier.tokenizer)
        self._soft: torch.Tensor | None = None
        self._shift: torch.Tensor | None = None
        self._length = 0
        self.base.get_input_embeddings().register_forward_hook(self._splice)  # type: ignore[operator]

    def _splice(self, _module: nn.Module, _inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
        if self._soft is None:
            return embedded
        if embedded.shape[0] != self._soft.shape[0] or embedded.shape[1] != self._length:
            raise ModelError(
                f"{type(self.base).__name__} does not embed texts one beside the other, so nothing can be put before "
                "them; set adapter.type to lora"
            )
        soft, start = self._soft.to(embedded.dtype), self.start
        before, after = embedded[:, :start], embedded[:, start + soft.shape[1] :]
        if self._shift is not None:
            shift = self._shift.to(embedded.dtype)
            before, after = before + shift[:start], after + shift[start:]
        return torch.cat([before, soft, after], dim=1)

    def call(
        self, soft: torch.Tensor, attends: torch.Tensor, shift: torch.Tensor | None = None, **batch: torch.Tensor
    ) -> Any:
        """The model's output for a batch whose texts begin with `soft`.

        Args:
            soft: [rows, P, width], the rows of the batch or 1.
            attends: [rows, P], 1 where a soft token is seen, 0 where it is padding.
            shift: [length, width], added to the embeddings of every text, token by token.
            batch: input_ids, attention_mask and what else the model takes, [rows, length].
        """
        start, count = self.start, soft.shape[1]
        rows = batch["input_ids"].shape[0]

        def longer(name: str, tensor: torch.Tensor) -> torch.Tensor:
            if name == "attention_mask":
                extra = attends.to(tensor.dtype).expand(rows, -1)
            elif name in ("edit_mask", "side_mask"):
                extra = tensor.new_zeros(rows, count)
            else:  # a token of the text itself: never the padding, by which the model finds the end
                extra = tensor[:, :1].expand(rows, count)
            return torch.cat([tensor[:, :start], extra, tensor[:, start:]], dim=1)

        extended = {name: longer(name, tensor) for name, tensor in batch.items()}
        if hasattr(batch.get("attention_mask"), "padded"):  # what `attends` holds, the host does not know
            extended["attention_mask"].padded = True  # type: ignore[attr-defined]
        self._soft, self._length = soft.expand(rows, -1, -1), extended["input_ids"].shape[1]
        self._shift = shift
        try:
            return self.base(**extended)
        finally:
            self._soft = self._shift = None


def embeddings_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The embeddings [count, width] of `tokens` [count], copied. Collective if they are partitioned."""
    vocabulary = model.get_input_embeddings()  # type: ignore[operator]
    with whole(vocabulary.parameters()):
        return vocabulary(tokens.to(vocabulary.weight.device)).detach().clone()


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """1 for tokenizers that put a classification token first, where models read it; else 0."""
    return int(begins_with_cls(tokenizer))
